"""The Hub as a place to read from: which commit a name stands for, and its files, held to their digests. No torch.

What was verified is written down in the cache. Where the Hub cannot be reached only that is used, and it is said.
"""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import functools
import glob
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from hfpipe import artifact
from hfpipe.errors import StageFailed, UserError, hide_tokens
from hfpipe.paths import cache_dir

RepoType = Literal["model", "dataset"]
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REFUSED = (400, 401, 403, 404, 413, 422)  # answers that waiting does not change
# An answer of the Hub itself, not of its storage, as Xet's client tells it.
_XET_STATUS = re.compile(r"HTTP status client error \((\d{3}) [^)]*\), domain: \S*/api/")
# What a model is loaded from: no pickles, no weights of other frameworks.
_MODEL_FILES = (
    *("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"),
    *("*.tiktoken", "*.spm", "*.md", "*.py", "*.jsonl"),
)
_LISTING_S = 120
ABOUT_FILES = ("config.json", "tokenizer_config.json", "*.jinja")  # what a model is, without its weights

_notes: list[str] = []  # what this process has had to take from memory
_pins: dict[str, str] = {}
_used: dict[str, str] = {}


class Refused(Exception):
    """The Hub said no, and would say it again."""


class Unreachable(Exception):
    """The Hub gave no answer, or one that may be another later; `wait_s` where it said when."""

    def __init__(self, reason: str, wait_s: float | None = None, moved: bool = False):
        super().__init__(reason)
        self.wait_s = wait_s
        self.moved = moved  # 409 or 412: somebody else's commit came in between


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
        raise Refused(hide_tokens(str(error))) from None
    except UnicodeEncodeError:  # of the header that a token is sent in
        raise Refused(
            "the token holds a letter that no token has: it was not copied whole, or something else was"
        ) from None
    except (OSError, RuntimeError, ValueError, httpx.HTTPError, httpx.InvalidURL) as error:
        # HfHubHTTPError is an OSError, uploads through LFS raise RuntimeError, through Xet ConnectionError.
        causes = [error]  # of a RuntimeError about an upload the Hub's answer is the cause
        while cause := causes[-1].__cause__:
            causes.append(cause)
        response = next((found for cause in causes if (found := getattr(cause, "response", None)) is not None), None)
        status = getattr(response, "status_code", None)
        said = hide_tokens(": ".join(dict.fromkeys(map(_first_line, causes))))
        if status is None and (told := _XET_STATUS.search(said)):
            status = int(told[1])
        if status in _REFUSED:
            raise Refused(said) from None
        plain = isinstance(error, ValueError | FileNotFoundError | PermissionError) and not isinstance(
            error, json.JSONDecodeError
        )
        if status is None and plain:
            raise
        wait = getattr(response, "headers", {}).get("Retry-After", "")
        raise Unreachable(said, float(wait) if wait.isdigit() else None, status in (409, 412)) from None


def stream(name: str, rows: Iterable[Any]) -> Iterator[Any]:
    """Rows that the Hub gives while they are read; StageFailed, which hides a token, where it gives no more."""
    try:
        yield from rows
    except OSError as error:
        raise StageFailed(f"{name}: the Hub gives no more of it: {error}") from None


def within(seconds: float, act: Callable[[], None]) -> None:
    """Act in a thread, and stop waiting for it after a while: the client has no time limit of its own."""
    ended: list[BaseException | None] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            ended.append(error)
        else:
            ended.append(None)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not ended:
        raise Unreachable(f"no answer within {seconds:g} s")
    if ended[0] is not None:
        raise ended[0]


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip(".")


def split_id(source: str) -> tuple[str, str | None]:
    """`org/model@revision` as its two parts."""
    repo_id, _, revision = source.partition("@")
    return repo_id, revision or None


def is_commit(revision: Any) -> bool:
    return isinstance(revision, str) and _COMMIT.fullmatch(revision) is not None


def use_pins(pins: dict[str, str]) -> None:
    """From here on names stand for the commits of `pins`, where it has them: those that a stage was begun with."""
    _pins.clear()
    _pins.update(pins)
    _used.clear()


def used_pins() -> dict[str, str]:
    """What was resolved since `use_pins`: name -> commit; a data set's name begins with `datasets/`."""
    return dict(_used)


def tell_notes(tell: Callable[[str], Any]) -> None:
    """Say once each what has had to be taken from memory."""
    for note in dict.fromkeys(_notes):
        tell(note)
    _notes.clear()


def resolve(repo_id: str, revision: str | None = None, repo_type: RepoType = "model") -> str:
    """The commit of a branch or a tag; one that comes from memory is told by `tell_notes`.

    Raises:
        UserError: there is none, or the Hub is not reached and no commit of that name was seen from here before.
    """
    if is_commit(revision):
        return str(revision)
    name = ("datasets/" if repo_type == "dataset" else "") + (f"{repo_id}@{revision}" if revision else repo_id)
    _used[name] = _pins.get(name) or _resolve(repo_id, revision, repo_type)
    return _used[name]


def _resolve(repo_id: str, revision: str | None, repo_type: RepoType) -> str:
    name = f"{repo_id}@{revision}" if revision else repo_id
    try:
        commit = _ask_commit(repo_id, revision, repo_type)
    except Refused as error:
        raise UserError(
            f"{name} is not a local file or folder, nor a {repo_type} of the Hub that this token may read: {error}"
        ) from None
    except Unreachable as error:
        known = (artifact.read_json(_memory(repo_id, repo_type) / "refs.json") or {}).get(revision or "main")
        if known is None:
            raise UserError(
                f"{name} is not a local file or folder, and the Hub cannot be reached ({error}); no commit of that name was verified "
                "here before. Give a local folder, or connect."
            ) from None
        _notes.append(
            f"the Hub is not reached: {name} is taken as it stood {known['seen']}, at commit {known['commit'][:12]}"
        )
        return known["commit"]
    return commit


def ask_anew() -> None:
    """What the Hub answers holds for one command; a notebook's next one asks again, since branches move."""
    _ask_commit.cache_clear()


@functools.cache
def _ask_commit(repo_id: str, revision: str | None, repo_type: RepoType) -> str:
    """The Hub's answer, asked once until `ask_anew`, and written down."""
    from huggingface_hub import HfApi

    commit = ask(HfApi().repo_info, repo_id, revision=revision, repo_type=repo_type, timeout=10).sha
    memory = _memory(repo_id, repo_type)
    with _alone(memory):
        refs = artifact.read_json(memory / "refs.json") or {}
        refs[revision or "main"] = {"commit": commit, "seen": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())}
        artifact.write_json(memory / "refs.json", refs)
    return commit


def list_files(repo_id: str, commit: str, repo_type: RepoType = "model") -> dict[str, Any]:
    """Path -> the Hub's entry, with size and digest, of every file in a commit. Refused or Unreachable where `ask` is."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    tree: list[Any] = []
    options = {"recursive": True, "revision": commit, "repo_type": repo_type}
    within(_LISTING_S, lambda: ask(lambda: tree.extend(HfApi().list_repo_tree(repo_id, **options))))
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def fetch(repo_id: str, commit: str, repo_type: RepoType = "model", only: tuple[str, ...] | None = None) -> Path:
    """The folder of a commit's files, downloaded where they are not yet here, each held to the digest that the Hub gives.

    `only`: names or patterns of files, instead of all that a model is loaded from.

    Raises:
        UserError: files differ from their digests twice, or are not here and the Hub is not reached.
    """
    memory = _memory(repo_id, repo_type)
    with _alone(memory):  # one of several processes fetches, the others find it here
        if folder := verified(repo_id, commit, repo_type, only):
            return folder
        try:
            folder, files = _fetch(repo_id, commit, repo_type, only)
        except Refused as error:
            raise UserError(f"{repo_id}@{commit[:12]}: the Hub does not give it: {error}") from None
        except Unreachable as error:
            raise UserError(
                f"{repo_id}@{commit[:12]} was never verified here, and the Hub is not reached ({error}). "
                "Connect, or give a local folder."
            ) from None
        artifact.write_record(_verified_file(memory, commit, only), {"folder": str(folder), "files": files})
        return folder


def verified(
    repo_id: str, commit: str, repo_type: RepoType = "model", only: tuple[str, ...] | None = None
) -> Path | None:
    """What `fetch` left here before, where it is still as it was; asks nothing of the Hub."""
    known = artifact.read_record(_verified_file(_memory(repo_id, repo_type), commit, only))
    fine = known and not artifact.damage(Path(known["folder"]), known["files"], trust_times=True)
    return Path(known["folder"]) if known and fine else None


def _verified_file(memory: Path, commit: str, only: tuple[str, ...] | None) -> Path:
    return memory / f"{commit}{'-' + artifact.digest(only)[:8] if only else ''}.json"


def _fetch(
    repo_id: str, commit: str, repo_type: RepoType, only: tuple[str, ...] | None
) -> tuple[Path, dict[str, dict[str, Any]]]:
    from huggingface_hub import snapshot_download

    there = list_files(repo_id, commit, repo_type)
    wanted = {path: entry for path, entry in there.items() if _is_wanted(path, only, artifact.STAGE_FILE in there)}
    if not wanted:
        raise Refused(f"it holds none of {', '.join(only)}" if only else "it holds no model that can be loaded")
    for last in (False, True):
        patterns = [glob.escape(path) for path in wanted]
        options = {"revision": commit, "repo_type": repo_type, "allow_patterns": patterns}
        folder = Path(ask(snapshot_download, repo_id, **options))
        wrong = [path for path, entry in wanted.items() if not same(entry, folder / path)]
        if not wrong:
            break
        for path in wrong:  # the cache is other programs' too
            (folder / path).resolve().unlink(missing_ok=True)
            (folder / path).unlink(missing_ok=True)
        if last:
            told = ", ".join(wrong)
            raise UserError(
                f"{repo_id}@{commit[:12]}: {told} arrived twice with other bytes than the Hub names. Try again."
            )
    digests = {
        path: entry.lfs.sha256 if entry.lfs else artifact.file_sha256(folder / path) for path, entry in wanted.items()
    }
    stats = {path: (folder / path).stat() for path in wanted}
    return folder, {
        path: {"sha256": digests[path], "bytes": stats[path].st_size, "mtime_ns": stats[path].st_mtime_ns}
        for path in wanted
    }


def _is_wanted(path: str, only: tuple[str, ...] | None, is_ours: bool) -> bool:
    """Of a stage of ours every file; of other models those at the top, and no second copy of the weights."""
    if only is not None:
        return path in only or any(fnmatch.fnmatch(path, pattern) for pattern in only)
    if is_ours:
        return path != ".gitattributes"
    fits = any(fnmatch.fnmatch(path, pattern) for pattern in _MODEL_FILES)
    return fits and "/" not in path and not path.startswith("consolidated")


def locate(source: str, revision: str | None = None) -> Path:
    """A model's folder as it is, or that of `org/model@revision`, fetched and verified.

    Raises:
        UserError: see `resolve` and `fetch`.
    """
    folder = Path(source).expanduser()
    if folder.exists():
        return folder
    repo_id, named = split_id(source)
    return fetch(repo_id, resolve(repo_id, revision or named))


def same(entry: Any, path: Path) -> bool:
    """Whether a local file has the digest that the Hub's listing names: sha256 of large files, git's of small ones."""
    if not path.is_file() or path.stat().st_size != entry.size:
        return False
    if entry.lfs:
        return artifact.file_sha256(path) == entry.lfs.sha256
    return git_digest(path.read_bytes()) == entry.blob_id


def git_digest(content: bytes) -> str:
    """git's name for a file's content."""
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()


def _memory(repo_id: str, repo_type: RepoType) -> Path:
    """Where it is written down what was seen of a repo and verified: per Hub."""
    endpoint = hashlib.sha256(os.environ.get("HF_ENDPOINT", "").encode()).hexdigest()[:8]
    return cache_dir() / "hub" / endpoint / f"{repo_type}s--{repo_id.replace('/', '--')}"


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time, of several ranks or runs."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
