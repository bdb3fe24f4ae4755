"""What the test Hub holds, as plain files: `blobs/<sha256>` and one JSON file per repo under `repos/`.

A repo's file has its branches, its tags and every commit with its whole tree, and is replaced in one step: a reader,
or a server started again over the same folder, sees all of a commit or none of it. Content is kept once, unpacked and
unencrypted, so that a test can search everything that ever reached the Hub by reading the files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import tempfile
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path


class HubError(Exception):
    """An answer other than success: status, message, the client's error code and further headers."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | (headers or {})


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def git_sha1(kind: str, data: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(data)}\0".encode() + data).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


@dataclass(frozen=True)
class Entry:
    """A file of a tree: its git id (of the pointer, if LFS), size in bytes, and the sha256 its blob lies under."""

    oid: str
    size: int
    sha256: str
    lfs: bool

    def lfs_info(self) -> dict:
        size = len(lfs_pointer(self.sha256, self.size))
        return {"oid": self.sha256, "sha256": self.sha256, "size": self.size, "pointerSize": size}


@dataclass(frozen=True)
class Commit:
    id: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    tree: dict[str, Entry]


@dataclass
class Repo:
    type: str
    namespace: str
    name: str
    private: bool
    created: str = field(default_factory=now)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.namespace}/{self.name}"

    def commit(self, revision: str) -> Commit:
        """The commit that a branch, a tag or a commit id (7 to 40 digits) names, in that order."""
        name = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        if oid := self.branches.get(name) or self.tags.get(name):
            return self.commits[oid]
        found = [oid for oid in self.commits if oid.startswith(name)] if re.fullmatch("[0-9a-f]{7,40}", name) else []
        if len(found) != 1:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[found[0]]

    def history(self, revision: str) -> list[Commit]:
        """The commits from `revision` to the first one, newest first."""
        commits = [self.commit(revision)]
        while (parent := commits[-1].parent) is not None:
            commits.append(self.commits[parent])
        return commits


class Store:
    def __init__(self, root: Path):
        self.root = root
        for name in ("blobs", "repos", "tmp"):
            (root / name).mkdir(parents=True, exist_ok=True)
        self.repos: dict[tuple[str, str], Repo] = {}
        for path in sorted((root / "repos").rglob("*.json")):
            repo = Repo(**json.loads(path.read_text()))
            for oid, commit in repo.commits.items():
                tree = {name: Entry(**entry) for name, entry in commit.pop("tree").items()}
                repo.commits[oid] = Commit(**commit, tree=tree)
            self.repos[repo.type, repo.id] = repo

    def write(self, path: Path, data: bytes) -> None:
        """Writes a file so that it exists wholly or not at all."""
        handle, temporary = tempfile.mkstemp(dir=self.root / "tmp")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, path)

    def blob(self, sha256: str) -> Path:
        return self.root / "blobs" / sha256

    def add_blob(self, data: bytes) -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        if not self.blob(sha256).exists():
            self.write(self.blob(sha256), data)
        return sha256

    def regular_entry(self, data: bytes) -> Entry:
        return Entry(git_sha1("blob", data), len(data), self.add_blob(data), lfs=False)

    def lfs_entry(self, sha256: str) -> Entry:
        """The entry of an object that has been uploaded before."""
        if not self.blob(sha256).exists():
            raise HubError(400, f"LFS pointer pointed to a file that does not exist: {sha256}")
        size = self.blob(sha256).stat().st_size
        return Entry(git_sha1("blob", lfs_pointer(sha256, size)), size, sha256, lfs=True)

    def _path(self, repo: Repo) -> Path:
        return self.root / "repos" / f"{repo.type}s" / f"{repo.id}.json"

    def save(self, repo: Repo) -> None:
        self.write(self._path(repo), json.dumps(asdict(repo), indent=1).encode())
        self.repos[repo.type, repo.id] = repo

    def delete(self, repo: Repo) -> None:
        self._path(repo).unlink()
        del self.repos[repo.type, repo.id]

    def add_commit(self, repo: Repo, branch: str, tree: dict[str, Entry], title: str, message: str, author: str) -> str:
        """Puts a commit on top of `branch` and returns its id; the branch is made if it is the repo's first."""
        parent, date = repo.branches.get(branch), now()
        oid = git_sha1("commit", repr((parent, title, message, author, date, tree, secrets.token_hex(4))).encode())
        repo.commits[oid] = Commit(oid, parent, title, message, author, date, tree)
        repo.branches[branch] = oid
        self.save(repo)
        return oid
