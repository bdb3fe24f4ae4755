"""From a model back to its raw data: every stage with its parent's commit, and whether each hash still holds. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfpipe import artifact
from hfpipe.errors import UserError
from hfpipe.hub_client import (
    Refused,
    Unreachable,
    ask,
    ask_anew,
    fetch,
    is_commit,
    list_files,
    locate,
    resolve,
    same,
    split_id,
)
from hfpipe.sections import DEFAULT_SPLIT, Source
from hfpipe.strict import build
from hfpipe.training.identity import hash_source

HOLDS, BROKEN, UNKNOWN = "holds", "broken", "not here"


@dataclass(frozen=True)
class Link:
    """A stage, and what of it was checked: (what, `holds` | `broken` | `not here`, why)."""

    name: str
    where: str
    record: dict[str, Any]
    checks: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def broken(self) -> bool:
        return any(verdict == BROKEN for _, verdict, _ in self.checks)


def trace(source: str) -> list[Link]:
    """The stages that led to a model, the last one first.

    Raises:
        UserError: there is no such model, or it was not made by hfpipe.
    """
    ask_anew()
    folder, where = _read(source)
    record = _record(folder)
    if record is None:
        raise UserError(
            f"{source} has no {artifact.STAGE_FILE}: it was not made by hfpipe, so nothing is known of its making."
        )
    links: list[Link] = []
    while record is not None:
        link = Link(str(record.get("stage")), where, record, _checks(folder, where, record))
        links.append(link)
        parent = record.get("parent")
        if not parent:
            break
        folder_of_parent, where = _parent(folder, parent)
        if folder_of_parent is None:
            link.checks.append(("parent", UNKNOWN, where))
            break
        if where in (link.where for link in links):
            link.checks.append(("parent", BROKEN, f"{where} stands among its own parents"))
            break
        record, folder = _record(folder_of_parent), folder_of_parent
        if record is None:  # a model from outside, which has no record of ours
            known = is_commit(parent.get("revision")) or artifact.folder_identity(folder, ("model", "tokenizer"))
            fine = known is True or known == parent["fingerprint"]
            link.checks.append(("parent", HOLDS if fine else BROKEN, f"{where}, made elsewhere"))
            break
        fine = parent["fingerprint"] in (
            record.get("fingerprint"),
            parent.get("revision"),
        )  # a Hub model goes by its commit
        why = (
            where if fine else f"{where} holds {str(record.get('fingerprint'))[:12]}, not {parent['fingerprint'][:12]}"
        )
        if fine and parent.get("content", found := artifact.content_of(record)) != found:  # older records have none
            fine, why = False, f"{where} holds other files than those that {link.name} started from"
        link.checks.append(("parent", HOLDS if fine else BROKEN, why))
    return links


def _read(source: str) -> tuple[Path, str]:
    """A folder with the record, and what the model is known by. Of the Hub's only the small files are fetched."""
    if Path(source).expanduser().exists():
        return locate(source), source
    repo_id, revision = split_id(source)
    commit = resolve(repo_id, revision)
    return _small(repo_id, commit), f"{repo_id}@{commit}"


def _record(folder: Path) -> dict[str, Any] | None:
    """A `stage.json` as hfpipe writes it; None where there is none, or another program's."""
    record = artifact.read_json(folder / artifact.STAGE_FILE)
    shape = {"stage": str, "fingerprint": str, "config": dict, "data": dict, "files": dict}
    fits = record is not None and all(isinstance(record.get(key), kind) for key, kind in shape.items())
    return record if fits else None


def _small(repo_id: str, commit: str) -> Path:
    return fetch(repo_id, commit, only=("*.json", "*.jinja", "*.md"))


def _parent(folder: Path, parent: dict[str, Any]) -> tuple[Path | None, str]:
    """Where the parent's record is: its commit on the Hub, the folder beside, or the folder that it was."""
    beside = folder.parent / str(parent["from"])
    if (beside / artifact.STAGE_FILE).is_file():
        return beside, str(beside)
    commit = parent.get("commit") or parent.get("revision")
    if is_commit(commit):
        repo_id = parent.get("repo_id") or split_id(parent["from"])[0]
        try:
            return _small(repo_id, commit), f"{repo_id}@{commit}"
        except UserError as error:
            return None, str(error)
    elsewhere = Path(str(parent["from"])).expanduser()
    return (elsewhere, str(elsewhere)) if elsewhere.is_dir() else (None, f"{parent['from']} is not here")


def _checks(folder: Path, where: str, record: dict[str, Any]) -> list[tuple[str, str, str]]:
    sealed = artifact.read_record(folder / artifact.STAGE_FILE) is not None
    found = [("record", HOLDS if sealed else BROKEN, "its seal" if sealed else "changed after it was written")]
    if not sealed:
        return found
    parent = (record.get("parent") or {}).get("fingerprint")
    again = artifact.fingerprint(record["config"], record["data"], parent)
    fine = again == record["fingerprint"]
    found.append(("fingerprint", HOLDS if fine else BROKEN, record["fingerprint"][:16]))
    found.append(_weights(folder, where, record))
    elsewhere = is_commit(split_id(where)[1])  # its paths are names alone
    sources = [(role, number) for role in DEFAULT_SPLIT for number in range(_count(record, role))]
    return found + [_data(record, role, number, elsewhere) for role, number in sources]


def _weights(folder: Path, where: str, record: dict[str, Any]) -> tuple[str, str, str]:
    """A folder's files by reading them; the Hub's by the digests that it gives, without a download."""
    size = sum(file["bytes"] for file in record["files"].values())
    told = f"{len(record['files'])} files, {size / 1e6:.1f} MB"
    repo_id, commit = split_id(where)
    if not is_commit(commit):
        reason = artifact.damage(folder, record["files"])
        return ("files", BROKEN if reason else HOLDS, reason or told)
    try:
        there = list_files(repo_id, commit)
    except (Refused, Unreachable) as error:
        return ("files", UNKNOWN, str(error))
    for name, file in record["files"].items():
        entry = there.get(name)
        if entry is None:
            return ("files", BROKEN, f"{name} is missing")
        fine = entry.lfs.sha256 == file["sha256"] if entry.lfs else _same_small(folder / name, entry, file)
        if not fine:
            return ("files", BROKEN, f"{name} has another digest than the record names")
    return ("files", HOLDS, told)


def _same_small(path: Path, entry: Any, file: dict[str, Any]) -> bool:
    """A file that git itself stores is named by another digest: it is read, where it was fetched, else its size is held."""
    if not path.is_file():
        return entry.size == file["bytes"]
    return same(entry, path) and artifact.file_sha256(path) == file["sha256"]


def _count(record: dict[str, Any], role: str) -> int:
    return sum(name.startswith(f"{role}[") for name in record["data"])


def _data(record: dict[str, Any], role: str, number: int, elsewhere: bool) -> tuple[str, str, str]:
    """The content of one source, hashed again where it is to be had; `elsewhere`: a file here need not be the one meant."""
    name = next(n for n in record["data"] if n.startswith(f"{role}[{number}] "))
    path, written = name.partition(" ")[2], str(record["data"][name])
    if "@" in written:  # of the Hub: its commit is its hash
        return (name, *_of_the_hub(written))
    listed = (record["config"].get("data") or {}).get(role) or [{}] * (number + 1)
    options = {k: v for k, v in listed[number].items() if k in ("limit", "name", "revision", "split")}
    source = build(Source, {"path": path, **options}, "", [])
    if source is None:
        return (name, UNKNOWN, "no source that this version knows")
    if not path.startswith("tinyworld/") and not Path(path).expanduser().exists():
        return (name, UNKNOWN, "the file is not here")
    try:
        again = hash_source(source, DEFAULT_SPLIT[role], record["config"].get("seed", 0))
    except (UserError, OSError) as error:
        return (name, UNKNOWN, str(error))
    if again == written:
        return (name, HOLDS, again[:16])
    if elsewhere and not path.startswith("tinyworld/"):
        return (name, UNKNOWN, f"what is here under that name has other content, {again[:16]}")
    return (name, BROKEN, f"its content is {again[:16]} now, not {written[:16]}")


def _of_the_hub(written: str) -> tuple[str, str]:
    """Verdict on `org/rows@commit`: whether the Hub still has it."""
    from huggingface_hub import HfApi

    repo_id, commit = split_id(written.partition(" ")[0])
    try:
        ask(HfApi().dataset_info, repo_id, revision=commit, timeout=10)
    except Refused as error:
        return BROKEN, f"the Hub does not give {written}: {error}"
    except Unreachable as error:
        return UNKNOWN, f"the Hub is not reached: {error}"
    return HOLDS, f"pinned: {written}"
