"""What a stage leaves: folders, `stage.json`, fingerprints and what changed since."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hfpipe.adapter_types import ADAPTER_FILE
from hfpipe.errors import UserError
from hfpipe.sections import Anneal, Data, ExtendTokenizer, Guards, Model, Optimizer, Regularize, Stage

STAGE_FILE = "stage.json"  # written last: its presence means that the stage is complete
BEGUN_FILE = "begun.json"  # in a working folder: which result it is for
TRAINED_FILE = "trained.json"  # weights are on disk, evaluation is not yet
CHECKSUMS_FILE = "checksums.json"  # of a checkpoint, written last
BESIDE = ".tmp"  # a file that is being written, beside its place

# A file larger than this is read again only where its size or time is not what was written down.
_TRUSTED_BYTES = 64 << 20

# Keys of `trainer` that say how a run is watched or stored, not what it computes.
_UNHASHED = frozenset(
    [
        "logging_steps",
        "logging_strategy",
        "logging_first_step",
        "report_to",
        "run_name",
        "log_level",
        "project",
        "save_steps",
        "save_strategy",
        "save_total_limit",
        "eval_steps",
        "eval_strategy",
        "per_device_eval_batch_size",
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_prefetch_factor",
        "precompute_ref_batch_size",
    ]
)


# Keys that came later than finished runs: at their default they do not count, and such a run stays finished.
_LATER: dict[type, tuple[str, ...]] = {
    Model: ("rope_parameters", "max_position_embeddings", "compile_blocks", "share_prefixes"),
    Data: ("balance", "decontaminate", "curriculum", "phases"),
    ExtendTokenizer: ("add_pieces", "min_frequency", "from_"),
    Optimizer: ("keep_state",),
    Anneal: ("share", "carry_optimizer"),
    Regularize: ("average_with_parent",),
    Guards: ("loss_spike", "spike_rule", "lr_factor", "overfit_patience"),
}


def digest(value: Any) -> str:
    """sha256 of a JSON value with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write a file whole or not at all: beside, synced, renamed."""
    beside = path.with_name(path.name + BESIDE)
    with open(beside, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False, default=str)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Have the disk itself hold a file's content, or a folder's list of names, before anything else is written."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF) or not path.is_dir():  # file systems that know no such thing
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """`sync` of all files in a folder, then of the folders, then of where its own name stands."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(root) / name)
        sync(Path(root))
    sync(folder.parent)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """One JSON object per line."""
    lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def read_json(path: Path) -> dict[str, Any] | None:
    """The mapping in a file, or None where it is missing, cut off or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    return value if isinstance(value, dict) else None


def write_record(path: Path, value: dict[str, Any]) -> None:
    """`write_json` with a `seal`, the hash of all the rest, by which `read_record` knows that nothing in it changed."""
    plain = json.loads(json.dumps({k: v for k, v in value.items() if k != "seal"}, default=str))
    write_json(path, {**plain, "seal": digest(plain)})


def amend_record(path: Path, **values: Any) -> dict[str, Any]:
    """Replace some values of a record and leave the others as they are by now, whoever else writes to it."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        record = read_record(path)
        if record is None:
            raise UserError(f"{path} is missing, cut off or changed: its stage has to be made again.")
        write_record(path, {**record, **values})
        return {**record, **values}
    finally:
        os.close(folder)


def read_record(path: Path) -> dict[str, Any] | None:
    """What `write_record` wrote, or None where it is missing, cut off or changed."""
    value = read_json(path) or {}
    seal = value.pop("seal", None)
    return value if seal is not None and seal == digest(value) else None


def hashed_config(stage: Stage, seed: int, processes: int) -> dict[str, Any]:
    """The part of a stage's configuration that decides its result, defaults included.

    Paths of data are left out: the hash of their content stands for them. Of batch size, accumulation and processes only
    their product counts, so that a run may go on with more processes and less accumulation.
    """
    sections = {name: _counted(section) for name, section in stage.sections.items()}
    sections = {name: section for name, section in sections.items() if section or name not in ("anneal", "guards")}
    for source in _sources(sections):
        del source["path"]
        if not source["balance"]:
            del source["balance"]
    watched = _watched(stage)
    trainer = {k: v for k, v in stage.trainer.items() if k not in watched}
    if stage.type.trainer:
        rows = (trainer.pop("per_device_train_batch_size", None) or 8) * (
            trainer.pop("gradient_accumulation_steps", None) or 1
        )
        if not getattr(stage.data, "batch_tokens", None):
            trainer["rows_per_step"] = rows * processes
    adapter = dataclasses.asdict(stage.adapter) if stage.adapter else None
    config = {"type": stage.type.name, **sections, "trainer": trainer, "adapter": adapter, "seed": seed}
    return _plain(config)


def _watched(stage: Stage) -> frozenset[str]:
    """Keys of `trainer` that decide nothing in this stage."""
    if stage.trainer.get("load_best_model_at_end"):
        return frozenset()
    guards = stage.sections.get("guards")
    evaluated = stage.trainer.get("eval_strategy", "no") not in ("no", False)
    if evaluated and guards and guards.overfit_patience is not None:  # an evaluation may end the training
        return _UNHASHED - {"eval_strategy", "eval_steps"}
    return _UNHASHED


def _counted(section: Any) -> dict[str, Any]:
    """A section's values without what decides nothing: a key that came later than finished runs, at its default."""
    values = dataclasses.asdict(section)
    for kind, keys in _LATER.items():
        if isinstance(section, kind):
            for key in keys:
                if getattr(section, key) == getattr(kind(), key):
                    del values[key]
    if isinstance(section, Guards):
        del values["rehearse"], values["max_rollbacks"]
    return values


def _sources(sections: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    data, tokenizer = sections.get("data", {}), sections.get("tokenizer", {})
    yield from (*data.get("train", ()), *data.get("eval", ()), *tokenizer.get("from_", ()))


def _plain(value: Any) -> Any:
    """As JSON would give it back, `2.0` as `2`."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def fingerprint(config: dict[str, Any], data: dict[str, str], parent: str | None) -> str:
    """Identity of a stage's result: its configuration, its data's content and its parent's fingerprint."""
    return digest({"config": config, "data": list(data.values()), "parent": parent})


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """`{"trainer": {"beta": 1}}` as `{"trainer.beta": 1}`; list items by their place."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in items:
        flat |= flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return flat


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two mappings: `trainer.learning_rate 5e-4 -> 1e-4`."""
    old, new = flatten(old), flatten(new)
    told = []
    for key in [*old, *(k for k in new if k not in old)]:
        if old.get(key) != new.get(key):
            told.append(f"{key} {_show(old, key)} -> {_show(new, key)}")
    return told


def _show(flat: dict[str, Any], key: str) -> str:
    value = flat.get(key, "(absent)")
    return f"{value:g}" if isinstance(value, float) else str(value)


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(folder: Path, names: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """`{name: {"sha256", "bytes", "mtime_ns"}}` of the files in a folder and below it, or of those named."""
    found = {}
    for path in [folder / name for name in names] if names is not None else sorted(folder.rglob("*")):
        if path.is_file() and path.name != CHECKSUMS_FILE:
            stat = path.stat()
            found[str(path.relative_to(folder))] = {
                "sha256": file_sha256(path), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns,
            }  # fmt: skip
    return found


def damage(folder: Path, expected: dict[str, dict[str, Any]] | None, trust_times: bool = False) -> str | None:
    """What is wrong with a folder whose files should have these checksums; None where nothing is.

    With `trust_times` a large file whose size and time of change are as written down is not read.
    """
    if expected is None:
        return "its list of checksums is missing, cut off or changed"
    for name, written in expected.items():
        path = folder / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            stat = path.stat()
            if stat.st_size != written["bytes"]:
                return f"{name} has {stat.st_size:,} bytes, not {written['bytes']:,}"
            unchanged = stat.st_size > _TRUSTED_BYTES and stat.st_mtime_ns == written["mtime_ns"]
            if not (trust_times and unchanged) and file_sha256(path) != written["sha256"]:
                return f"the content of {name} has changed"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


# Of a model that comes from elsewhere: what its numbers, its tokens and its answers depend on, beside its weights.
_DECIDING = (
    "config.json", ADAPTER_FILE, "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip


def content_of(record: dict[str, Any]) -> str:
    """One digest of what a stage left, by its record; published it is the same, so without an adapter's base, renamed there."""
    names = [name for name in record["files"] if name in _DECIDING or name.endswith(".safetensors")]
    return digest({name: record["files"][name]["sha256"] for name in names if name != ADAPTER_FILE})


def folder_identity(folder: Path, leaves: tuple[str, ...]) -> str:
    """Fingerprint of a parent outside the run: its `stage.json`'s, else a hash of weights, configuration and tokenizer.

    `leaves` is what the parent may hold: `model`, `tokenizer` or both.
    """
    record = read_record(folder / STAGE_FILE)
    if record and "fingerprint" in record:
        if reason := damage(folder, record["files"], trust_times=True):
            raise UserError(f"{folder} is damaged: {reason}. Make that stage again, or give another model.")
        if (left := record.get("leaves", leaves[0])) not in leaves:
            raise UserError(
                f"{folder} holds a {left}, expected a {' or a '.join(leaves)}. Give another folder.".replace("_", " ")
            )
        return record["fingerprint"]
    names = [folder / name for name in _DECIDING] + weight_files(folder) + sorted(folder.glob("pytorch_model*.bin"))
    found = {p.name: file_sha256(p) for p in names if p.is_file()}
    if not {"config.json", ADAPTER_FILE} & found.keys() and (
        "tokenizer" not in leaves or "tokenizer.json" not in found
    ):
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise UserError(
            f"{folder} is not a model folder: it holds {there}, but no config.json. "
            "Give a folder written by save_pretrained, or a stage's folder of a run."
        )
    if fault := model_fault(folder, "tokenizer" not in leaves):
        raise UserError(f"{folder} is no model that can be loaded: {fault}. Fetch or save it again.")
    return digest(found)


def model_fault(folder: Path, whole: bool) -> str | None:
    """What is wrong with the configuration or the weights of a folder, as far as their beginnings tell; a `whole` model has weights."""
    if (config := folder / "config.json").is_file():
        try:
            read = json.loads(config.read_text(encoding="utf-8"))
        except ValueError as error:
            return f"config.json is not readable as JSON ({error})"
        if not isinstance(read, dict) or (whole and not read.get("model_type")):
            return "config.json is no mapping with a model_type"
    listed = (read_json(folder / "model.safetensors.index.json") or {}).get("weight_map")
    shards = {folder / str(name) for name in listed.values()} if isinstance(listed, dict) else set()
    for file in sorted({*weight_files(folder), *shards}):
        if not file.is_file():
            return f"{file.name} is missing"
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            try:
                header = json.loads(opened.read(length) if length < file.stat().st_size else b"")
                ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            except (ValueError, AttributeError, TypeError, LookupError):
                return f"{file.name} does not begin as safetensors do"
        if (size := 8 + length + max(ends, default=0)) != file.stat().st_size:
            return f"{file.name} has {file.stat().st_size:,} bytes, not {size:,}"
    if whole and not weight_files(folder) and not any(folder.glob("*model*.bin")):
        return "it holds no weights (model.safetensors)"
    return None
