"""What the test Hub holds. All that ever reached it also lies under `root` as plain files, so that a test can search it.

`blobs/<sha256>` are contents, `repos/.../<name>.json` a repo's branches, tags and commits, the latter with whole trees.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
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
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Entry:
    """A file of a tree: its git id (of the pointer, if LFS), size in bytes, and the sha256 that its blob lies under."""

    oid: str
    size: int
    sha256: str
    lfs: bool

    def lfs_info(self) -> dict | None:
        """As listings give it; trees call the sha256 `oid`, the info of a repo calls it `sha256`."""
        about = {"oid": self.sha256, "sha256": self.sha256, "size": self.size, "pointerSize": 134}
        return about if self.lfs else None


@dataclass(frozen=True)
class Commit:
    id: str
    parent: str | None
    message: str
    """The title, and the description, if there is one, after an empty line."""
    author: str
    date: str
    tree: dict[str, Entry] = field(repr=False)


@dataclass
class Repo:
    type: str
    namespace: str
    name: str
    private: bool
    created: str = field(default_factory=now)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict, repr=False)

    @property
    def id(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def page(self) -> str:
        return f"/datasets/{self.id}" if self.type == "dataset" else f"/{self.id}"

    def commit(self, revision: str) -> Commit:
        """The commit that a branch, a tag or a commit id (7 to 40 digits) names, in that order."""
        if oid := self.branches.get(revision) or self.tags.get(revision):
            return self.commits[oid]
        found = [oid for oid in self.commits if re.fullmatch("[0-9a-f]{7,40}", revision) and oid.startswith(revision)]
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
        self.repos: dict[tuple[str, str], Repo] = {}

    def write(self, path: Path, content: bytes) -> None:
        """Writes a file so that it exists wholly or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.root / "being_written"
        temporary.write_bytes(content)
        temporary.replace(path)

    def blob(self, sha256: str) -> Path:
        return self.root / "blobs" / sha256

    def add_blob(self, content: bytes, announced: str | None = None) -> str:
        """Keeps content under its sha256, which it returns; one that was announced has to be the same."""
        sha256 = hashlib.sha256(content).hexdigest()
        if announced not in (None, sha256):
            raise HubError(400, f"BadDigest: the content's sha256 is {sha256}, not {announced}")
        self.write(self.blob(sha256), content)
        return sha256

    def regular_entry(self, content: bytes) -> Entry:
        return Entry(git_id(content), len(content), self.add_blob(content), lfs=False)

    def lfs_entry(self, sha256: str) -> Entry:
        """The entry of an object that has been uploaded before."""
        if not self.blob(sha256).exists():
            raise HubError(400, f"LFS pointer pointed to a file that does not exist: {sha256}")
        size = self.blob(sha256).stat().st_size
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
        return Entry(git_id(pointer.encode()), size, sha256, lfs=True)

    def save(self, repo: Repo) -> None:
        self.write(
            self.root / "repos" / f"{repo.type}s" / f"{repo.id}.json", json.dumps(asdict(repo), indent=1).encode()
        )
        self.repos[repo.type, repo.id] = repo

    def add_commit(self, repo: Repo, branch: str, tree: dict[str, Entry], message: str, author: str) -> str:
        """Puts a commit on top of `branch` and returns its id; the branch is made if it is the repo's first."""
        commit = Commit(secrets.token_hex(20), repo.branches.get(branch), message, author, now(), tree)
        repo.commits[commit.id] = commit
        repo.branches[branch] = commit.id
        self.save(repo)
        return commit.id
