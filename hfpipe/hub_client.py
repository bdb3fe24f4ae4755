"""The Hub as a place to read from: which commit a name stands for, and its files, held to their digests. No torch.

What was verified is written down in the cache. Where the Hub cannot be reached only that is used, and it is said.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from hfpipe import artifact
from hfpipe.errors import UserError
from hfpipe.paths import cache_dir

RepoType = Literal["model", "dataset"]
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")
_REFUSED = (400, 401, 403, 404, 413, 422)  # answers that waiting does not change
# What a model is loaded from: no pickles, no weights of other frameworks.
_MODEL_FILES = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.spm",
    "*.md",
    "*.py",
    "*.jsonl",
)


notes: list[str] = []  # what this process has had to take from memory; whoever shows its progress tells them


class Refused(Exception):
    """The Hub said no, and would say it again."""


class Unreachable(Exception):
    """The Hub gave no answer, or one that may be another later; `wait_s` where it said when."""

    def __init__(self, reason: str, wait_s: float | None = None, moved: bool = False):
        super().__init__(reason)
        self.wait_s = wait_s
        self.moved = moved  # 409 or 412: somebody else's commit came in between


def scrub(text: str) -> str:
    """Text that may be shown or written: without the token, whatever it says."""
    from huggingface_hub import get_token

    token = get_token()
    return _TOKEN.sub("hf_...", text.replace(token, "hf_...") if token else text)


def ask(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """A call to the Hub, whose failures of many types become two.

    Raises:
        Refused: 401, 403, 404 and their kin.
        Unreachable: no connection, no answer, 409, 412, 429, 5xx.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import httpx

    try:
        return call(*arguments, **options)
    except HFValidationError as error:
        raise Refused(scrub(str(error))) from None
    except (OSError, RuntimeError, ValueError, httpx.HTTPError, httpx.InvalidURL) as error:
        # HfHubHTTPError is an OSError, uploads through LFS raise RuntimeError, through Xet ConnectionError.
        causes = [error]  # of a RuntimeError about an upload the Hub's answer is the cause
        while cause := causes[-1].__cause__:
            causes.append(cause)
        response = next((found for cause in causes if (found := getattr(cause, "response", None)) is not None), None)
        status = getattr(response, "status_code", None)
        said = scrub(": ".join(dict.fromkeys(map(_first_line, causes))))
        if status in _REFUSED:
            raise Refused(said) from None
        if status is None and isinstance(error, ValueError | FileNotFoundError | PermissionError):
            raise
        wait = getattr(response, "headers", {}).get("Retry-After", "")
        raise Unreachable(said, float(wait) if wait.isdigit() else None, status in (409, 412)) from None


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip(".")


def split_id(source: str) -> tuple[str, str | None]:
    """`org/model@revision` as its two parts."""
    repo_id, _, revision = source.partition("@")
    return repo_id, revision or None


def is_commit(revision: str | None) -> bool:
    return revision is not None and _COMMIT.fullmatch(revision) is not None


@functools.cache
def resolve(repo_id: str, revision: str | None = None, repo_type: RepoType = "model") -> str:
    """The commit of a branch or a tag, asked once in a process. One that comes from memory is told in `notes`.

    Raises:
        UserError: there is none, or the Hub is not reached and no commit of that name was verified here before.
    """
    if is_commit(revision):
        return str(revision)
    from huggingface_hub import HfApi

    name = f"{repo_id}@{revision}" if revision else repo_id
    try:
        return ask(HfApi().repo_info, repo_id, revision=revision, repo_type=repo_type, timeout=10).sha
    except Refused as error:
        raise UserError(
            f"{name} is not a local folder, nor a {repo_type} of the Hub that this token may read: {error}"
        ) from None
    except Unreachable as error:
        known = (artifact.read_json(_memory(repo_id, repo_type) / "refs.json") or {}).get(revision or "main")
        if known is None:
            raise UserError(
                f"{name} is not a local folder, and the Hub is not reached ({error}); no commit of that name was verified "
                "here before. Give a local folder, or connect."
            ) from None
        notes.append(
            f"the Hub is not reached: {name} is taken as it stood {known['seen']}, at commit {known['commit'][:12]}"
        )
        return known["commit"]


def fetch(
    repo_id: str, commit: str, repo_type: RepoType = "model", name: str | None = None, only: tuple[str, ...] = ()
) -> Path:
    """The folder of a commit's files, downloaded where they are not yet here, each held to the digest that the Hub gives.

    Args:
        name: branch or tag that the commit was found under, to remember it by.
        only: files (patterns) instead of all that a model is loaded from.

    Raises:
        UserError: the files differ from their digests twice, or are not here and the Hub is not reached.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.hf_api import RepoFile

    memory = _memory(repo_id, repo_type) / f"{commit}{'-' + artifact.digest(only)[:8] if only else ''}.json"
    known = artifact.read_record(memory)
    if known and Path(known["folder"]).is_dir() and not artifact.damage(Path(known["folder"]), known["files"], True):
        _remember(repo_id, repo_type, name, commit)
        return Path(known["folder"])
    patterns = list(only or _MODEL_FILES) if repo_type == "model" or only else None
    for attempt in (1, 2):
        try:
            tree = ask(
                lambda: list(HfApi().list_repo_tree(repo_id, recursive=True, revision=commit, repo_type=repo_type))
            )
            folder = Path(
                ask(snapshot_download, repo_id, revision=commit, repo_type=repo_type, allow_patterns=patterns)
            )
        except Refused as error:
            raise UserError(f"{repo_id}@{commit[:12]}: the Hub does not give it: {error}") from None
        except Unreachable as error:
            raise UserError(
                f"{repo_id}@{commit[:12]} was never verified here, and the Hub is not reached ({error}). "
                "Connect, or give a local folder."
            ) from None
        wrong = [
            path
            for entry in tree
            if isinstance(entry, RepoFile) and (path := folder / entry.path).is_file() and not same(entry, path)
        ]
        if not wrong:
            break
        for path in wrong:
            path.resolve().unlink()
            path.unlink(missing_ok=True)
        if attempt == 2:
            told = ", ".join(str(path.relative_to(folder)) for path in wrong)
            raise UserError(
                f"{repo_id}@{commit[:12]}: {told} arrived twice with other bytes than the Hub names. Try again."
            )
    files = artifact.checksums(folder)
    memory.parent.mkdir(parents=True, exist_ok=True)
    artifact.write_record(memory, {"folder": str(folder), "files": files})
    _remember(repo_id, repo_type, name, commit)
    return folder


def locate(source: str, revision: str | None = None) -> Path:
    """A model's folder as it is, or that of `org/model@revision`, fetched and verified.

    Raises:
        UserError: see `resolve` and `fetch`.
    """
    folder = Path(source).expanduser()
    if folder.exists():
        return folder
    repo_id, named = split_id(source)
    named = revision or named
    return fetch(repo_id, resolve(repo_id, named), name=named or "main")


def same(entry: Any, path: Path) -> bool:
    """Whether a local file has the digest that the Hub's listing names: sha256 of large files, git's of small ones."""
    if path.stat().st_size != entry.size:
        return False
    if entry.lfs:
        return artifact.file_sha256(path) == entry.lfs.sha256
    return git_digest(path.read_bytes()) == entry.blob_id


def git_digest(content: bytes) -> str:
    """git's name for a file's content."""
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()


def _memory(repo_id: str, repo_type: RepoType) -> Path:
    endpoint = hashlib.sha256(os.environ.get("HF_ENDPOINT", "").encode()).hexdigest()[:8]
    return cache_dir() / "hub" / endpoint / f"{repo_type}s--{repo_id.replace('/', '--')}"


def _remember(repo_id: str, repo_type: RepoType, name: str | None, commit: str) -> None:
    file = _memory(repo_id, repo_type) / "refs.json"
    refs = artifact.read_json(file) or {}
    if name and (refs.get(name) or {}).get("commit") != commit:
        refs[name] = {"commit": commit, "seen": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())}
        artifact.write_json(file, refs)
