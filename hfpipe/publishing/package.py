"""What of a finished stage goes to the Hub: an allow-list of its files, with the record and the card in their public form."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from hfpipe import artifact
from hfpipe.adapter_types import ADAPTER_FILE
from hfpipe.errors import UserError
from hfpipe.hub_client import git_digest, is_commit, split_id
from hfpipe.publishing.card import build_card
from hfpipe.run_folder import damage_at
from hfpipe.sections import Hub
from hfpipe.strict import build

RUN_FILE = "run.json"
# Of what a stage's record names; an adapter's are in a folder of their own.
ALLOWED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.spm")
_PATH = re.compile(r"(~[\w.-]*)?/[^\n]*[^\n/]")
TOLD = ("eval.json", "metrics.jsonl")  # beside the model itself; not the probes, whose questions are held out


@dataclass(frozen=True)
class Package:
    """Path in the repo -> its content, or the local file that holds it; `weights`: sha256 of files that are known already."""

    stage: str
    files: dict[str, bytes | Path]
    known: dict[str, str]

    @cached_property
    def content(self) -> str:
        """One digest of all that is published; another one means that it must be published anew."""
        return artifact.digest({path: self.sha256(path) for path in sorted(self.files)})

    @property
    def size(self) -> int:
        return sum(len(f) if isinstance(f, bytes) else f.stat().st_size for f in self.files.values())

    def sha256(self, path: str) -> str:
        file = self.files[path]
        if path in self.known:
            return self.known[path]
        return hashlib.sha256(file).hexdigest() if isinstance(file, bytes) else artifact.file_sha256(file)

    def differing(self, there: dict[str, Any]) -> list[str]:
        """Paths that the Hub's listing of a commit lacks, or has with another content."""
        return [path for path in self.files if path not in there or not self._same(there[path])]

    def _same(self, entry: Any) -> bool:
        if entry.lfs:
            return entry.lfs.sha256 == self.sha256(entry.path)
        file = self.files[entry.path]
        return entry.blob_id == git_digest(file if isinstance(file, bytes) else file.read_bytes())


def hub_of(run: Path, repo_id: str | None = None, private: bool | None = None) -> Hub:
    """Where a run publishes: as its recipe says, or where its stages are already; what is given stands above both."""
    record = artifact.read_json(run / RUN_FILE) or {}
    section = build(Hub, record.get("hub") or {}, f"{run / RUN_FILE}: hub.", []) or Hub()
    stages = record.get("stages", [])
    known = [r["hub"] for s in stages if (r := artifact.read_record(run / s / artifact.STAGE_FILE)) and "hub" in r]
    if section.repo_id is None and known:
        section = build(Hub, known[-1]["section"], "hub.", []) or section
    given = {"repo_id": repo_id, "private": private}
    return dataclasses.replace(section, **{key: value for key, value in given.items() if value is not None})


def place_of(hub: Hub, stage: str) -> tuple[str, str]:
    """Repo and branch of a stage."""
    return (f"{hub.repo_id}-{stage}", "main") if hub.layout == "repos" else (str(hub.repo_id), stage)


def finished_stages(run: Path, known: Collection[str] = ()) -> list[str]:
    """The stages of a run that stand whole on the disk, in the recipe's order; of those `known` to, the files are not read."""
    stages = (artifact.read_json(run / RUN_FILE) or {}).get("stages", [])
    return [s for s in stages if (run / s).is_dir() and (s in known or damage_at(run / s) is None)]


def published_at(run: Path, hub: Hub, stage: str) -> str | None:
    """The commit that holds a stage as it stands on the disk now; None where it has to be published yet."""
    record = artifact.read_record(run / stage / artifact.STAGE_FILE) or {}
    told = record.get("hub")
    if not told or (told["repo_id"], told["revision"]) != place_of(hub, stage):
        return None
    return told["commit"] if told["content"] == pack(run, hub, stage).content else None


def pack(run: Path, hub: Hub, stage: str) -> Package:
    """The stage as it is published.

    Raises:
        UserError: it holds an adapter on a stage of the run that is not published, so that its base could not be found.
    """
    folder = run / stage
    record = _public(run, hub, artifact.read_record(folder / artifact.STAGE_FILE) or {})
    files: dict[str, bytes | Path] = {name: folder / name for name in record["files"]}
    files |= {name: folder / name for name in TOLD if (folder / name).is_file()}
    known = {name: told["sha256"] for name, told in record["files"].items()}
    for name in [name for name in record["files"] if Path(name).name == ADAPTER_FILE]:
        files[name] = content = _adapter_config(run, folder / name, record)
        known[name] = hashlib.sha256(content).hexdigest()
        record["files"][name] = {**record["files"][name], "bytes": len(content), "sha256": known[name]}
    sealed = {k: v for k, v in record.items() if k != "seal"}
    sealed["seal"] = artifact.digest(sealed)
    text = json.dumps(sealed, indent=2, ensure_ascii=False)
    files[artifact.STAGE_FILE] = f"{text}\n".encode()
    repo, branch = place_of(hub, stage)
    evaluation = artifact.read_json(folder / "eval.json") or {}
    files["README.md"] = _card(text, json.dumps(evaluation), f"{repo}@{branch}")
    return Package(stage, files, known)


@lru_cache(maxsize=64)
def _card(record: str, evaluation: str, source: str) -> bytes:
    """The card by the texts of its record and scores: a run looks at each stage's again with every push."""
    return build_card(json.loads(record), json.loads(evaluation), source).encode()


def _public(run: Path, hub: Hub, record: dict[str, Any]) -> dict[str, Any]:
    """The record as others may read it: the parent's place on the Hub, the card's fields, allowed files, no folders of ours."""
    record = {k: v for k, v in record.items() if k != "hub"}
    record["files"] = {
        name: told for name, told in record["files"].items() if any(fnmatch(name, pattern) for pattern in ALLOWED)
    }
    record["card"] = {
        "license": hub.license, "language": list(hub.language), "carbon_intensity": hub.carbon_intensity,
    }  # fmt: skip
    # Where a row was at fault its text is kept for its owner; how many there were is enough for the others.
    record["sources"] = [
        {key: value for key, value in source.items() if key not in ("examples", "places")}
        for source in record.get("sources", [])
    ]
    parent = record.get("parent")
    if parent:
        beside = artifact.read_record(run / str(parent["from"]) / artifact.STAGE_FILE)
        place = (beside or {}).get("hub") or {}
        if place and (place["repo_id"], place["revision"]) == place_of(hub, parent["from"]):
            parent = {**parent, "repo_id": place["repo_id"], "commit": place["commit"]}
        elif is_commit(parent.get("revision")):
            parent = {**parent, "repo_id": split_id(parent["from"])[0], "commit": parent["revision"]}
        record["parent"] = parent
    return _without_folders(record)


def _without_folders(record: dict[str, Any]) -> dict[str, Any]:
    """Names of files instead of their paths on this machine: `/home/me/rows.jsonl` as `rows.jsonl`."""
    paths = sorted(set(_paths(record)), key=len, reverse=True)
    # Whole paths alone: `/data` is in `org/dataset`, too. A file within is told by its own name.
    known = re.compile("|".join(rf"(?<![\w.-]){re.escape(path)}(?![\w-])" for path in paths)) if paths else None
    return _renamed(record, lambda text: known.sub(lambda found: Path(found[0]).name, text) if known else text)


def _renamed(value: Any, rename: Callable[[str], str]) -> Any:
    """`rename` over every string of a JSON value, keys included."""
    if isinstance(value, dict):
        return {rename(key): _renamed(item, rename) for key, item in value.items()}
    if isinstance(value, list):
        return [_renamed(item, rename) for item in value]
    return rename(value) if isinstance(value, str) else value


def _paths(value: Any) -> Iterator[str]:
    """Every string, and every key behind `train[0] ` and its like, that is the path of something on this machine."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _paths(key)
            yield from _paths(key.partition(" ")[2])
            yield from _paths(item)
    elif isinstance(value, list):
        for item in value:
            yield from _paths(item)
    elif isinstance(value, str) and _PATH.fullmatch(value):
        yield value


def _adapter_config(run: Path, file: Path, record: dict[str, Any]) -> bytes:
    """PEFT's configuration with the base's repo and commit in the place of a folder of this machine."""
    config = json.loads(file.read_text(encoding="utf-8"))
    parent = record.get("parent") or {}
    if "commit" in parent:
        config |= {"base_model_name_or_path": parent["repo_id"], "revision": parent["commit"]}
    elif (run / str(parent.get("from")) / artifact.STAGE_FILE).is_file():
        raise UserError(
            f"{file.parent} holds an adapter on `{parent['from']}`, which is not published: nobody could load it. "
            f"Push that stage first, or both: --stage {parent['from']} --stage {record['stage']}."
        )
    else:
        config["base_model_name_or_path"] = Path(str(config.get("base_model_name_or_path"))).name
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
