"""Rows -> token ids, once, before anything trains: read, neutralise, render, mask, check, pack, mix, keep.

The result is stored under the hash of all that it depends on; every rank and every later run reads it from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import math
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfpipe import artifact, paths
from hfpipe.data.report import SourceReport
from hfpipe.errors import UserError
from hfpipe.sections import Data, Source
from hfpipe.training.encode import encode_rows
from hfpipe.training.identity import hash_source
from hfpipe.training.order import check_numbers, columns, is_ordered, measure, pack, store_ordered
from hfpipe.training.select_rows import Balance, concatenate, mix, without_held_out

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

    from hfpipe.data.held_out import HeldOut
    from hfpipe.data.sources import Loaded
    from hfpipe.training.job import Job

_VERSION = 4  # raise when the same inputs come to give other rows
_KEPT_SAMPLES = 64
_REMOVED = "decontaminated.jsonl"


@dataclass(frozen=True)
class Prepared:
    """What a stage trains on, and what was done to get there.

    Rows of `train` and `eval` are, for text and conversations, `input_ids`, `labels` and `seq_lengths` (the tokens of
    each document packed into the row); for preferences those of `templates.EncodedPreference`; for judged answers
    `prompt_ids`, `completion_ids` and `label`; for prompts `prompt_ids` and `row`, the whole row as JSON. With a curriculum or
    phases those of `train` also have `tokens`, and `difficulty` or `phase` (hfpipe/training/order.py). `report` holds
    `sources` (a record each), `samples` (some held-out rows, control tokens neutralised), `kinds` (the column `kind` of
    the rows of `eval` as they were read, None where they have none) and `tokens_per_row` (mean); with phases `turns`, the
    steps after which another phase begins.
    """

    train: Dataset | IterableDataset | None
    eval: Dataset | None
    report: dict[str, Any]

    @property
    def tokens_per_row(self) -> float:
        return self.report["tokens_per_row"]


# --- what the stages call ---


def prepare_rows(job: Job, tokenizer: PreTrainedTokenizerBase, *, max_length: int, packing: bool) -> Prepared:
    """The rows of a stage for one tokenizer, from the store or made now.

    `max_length` is in tokens: a longer document is cut into several rows, a longer conversation or pair is left out and
    counted. With `packing`, several documents or conversations share a row of at most that length.

    Raises:
        UserError: more rows are at fault than `data.max_bad_rows` allows, or none is left.
    """
    hashes = {name: found for name, found in job.data_hashes.items() if not name.startswith(("rewards.", "trainer."))}
    data = job.stage.data
    if data.curriculum and data.curriculum.by == "parent_loss":
        if job.parent_fingerprint:
            hashes["parent"] = f"{job.parent_fingerprint} {job.stage.model.dtype} {job.stage.adapter}"
        else:  # not made yet: its rows are looked at all the same
            data = dataclasses.replace(data, curriculum=None)
    return _stored(job, tokenizer, data, job.stage.type.rows or "text", max_length, packing, hashes)


def prepare_held_out_text(job: Job, tokenizer: PreTrainedTokenizerBase, data: Data) -> Prepared:
    """Plain text for a loss; `data.train` is read at its validation split unless it names another."""
    limit, seed = job.recipe.pipeline.evaluate.max_rows, job.recipe.pipeline.seed
    sources = tuple(dataclasses.replace(s, split=s.split or "validation", limit=s.limit or limit) for s in data.train)
    data = dataclasses.replace(data, train=sources, max_bad_rows=1.0)
    hashes = {s.path: hash_source(s, "validation", seed) for s in sources}
    return _stored(job, tokenizer, data, "text", data.max_length, True, hashes)


def prepare_held_out_rows(
    job: Job, tokenizer: PreTrainedTokenizerBase, *, max_length: int, packing: bool
) -> tuple[Dataset | None, dict[str, Any]]:
    """The rows of `data.eval` alone, for a stage that streams the others, and their report."""
    if not job.stage.data.eval:
        return None, {"sources": [], "samples": []}
    data = dataclasses.replace(job.stage.data, train=())
    stored = _stored(job, tokenizer, data, "text", max_length, packing, job.data_hashes)
    return stored.eval, stored.report


def read_source(source: Source, report: SourceReport, *, wanted: str, job: Job) -> Iterator[tuple[str, dict[str, Any]]]:
    """Canonical rows of one source with their places; the report counts what was seen and left out."""
    loaded = open_source(source, report, wanted=wanted, job=job)
    yield from loaded.located_rows()
    take_counts(report, loaded)


def open_source(source: Source, report: SourceReport, *, wanted: str, job: Job, streaming: bool = False) -> Loaded:
    """One source at the split of its report; its counts grow as it is read."""
    from hfpipe.data.sources import load_source

    where, seed = f"{job.stage.file}: data.{report.role}", job.recipe.pipeline.seed
    return load_source(source, wanted=wanted, split=report.split, seed=seed, where=where, streaming=streaming)


def take_counts(report: SourceReport, loaded: Loaded) -> None:
    """Once, when no more of it is read: what the reading has seen and left out."""
    counts = loaded.counts
    report.form, report.read = loaded.form_seen, counts.read
    report.other_splits, report.duplicates = counts.other_splits, counts.duplicates
    report.left_out.update(counts.faults)
    for reason, places in counts.places.items():
        report.places.setdefault(reason, []).extend(places)
    report.examples += counts.examples


# --- the store ---


def _stored(
    job: Job,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    rows: str,
    max_length: int,
    packing: bool,
    hashes: dict[str, str],
) -> Prepared:
    """One process makes the rows; others wait for it and read them."""
    from datasets import load_from_disk

    identity = [_VERSION, dataclasses.asdict(data), hashes, rows, max_length, packing, job.recipe.pipeline.seed]
    identity += [job.recipe.pipeline.evaluate.max_rows, tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template]
    identity += [tokenizer.bos_token, tokenizer.eos_token]  # templates write them
    folder = paths.cache_dir() / "prepared" / artifact.digest(identity)[:32]
    if job.rehearsal and not folder.is_dir():
        return job.rehearsal.prepared(rows)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_suffix(".lock")):
        if artifact.damage(folder, artifact.read_record(folder / artifact.CHECKSUMS_FILE), trust_times=True):
            shutil.rmtree(folder, ignore_errors=True)
            making = folder.with_suffix(".making")
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir()
            try:
                _make(making, job, tokenizer, data, rows, max_length, packing)
                artifact.write_record(making / artifact.CHECKSUMS_FILE, artifact.checksums(making))
                artifact.sync_tree(making)
                making.rename(folder)
            finally:
                shutil.rmtree(making, ignore_errors=True)
        if (folder / _REMOVED).is_file():
            (job.run / "logs").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / _REMOVED, job.run / "logs" / f"{job.stage.name}.{_REMOVED}")
    train, held_out = (load_from_disk(str(folder / r)) if (folder / r).is_dir() else None for r in ("train", "eval"))
    return Prepared(train, held_out, artifact.read_json(folder / "report.json") or {})


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(
    folder: Path,
    job: Job,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    rows: str,
    max_length: int,
    packing: bool,
) -> None:
    reports: list[SourceReport] = []
    held_out: list[dict[str, Any]] = []
    tokens_per_row = 0.0
    index = _index_held_out(job) if data.decontaminate else None
    for role in ("train", "eval"):
        sources, parts, own = getattr(data, role), [], []
        for number, source in enumerate(sources):
            if role == "eval" and source.limit is None:
                source = dataclasses.replace(source, limit=job.recipe.pipeline.evaluate.max_rows)
            report = SourceReport.of(source, role)
            wanted = source.as_ or rows
            given = read_source(source, report, wanted=wanted, job=job)
            if index and role == "train":
                given = without_held_out(given, index, report, folder / _REMOVED)
            ordered = role == "train" and is_ordered(data)
            if ordered:
                given = check_numbers(given, data.curriculum, f"{job.stage.file}")
            encoded = encode_rows(given, report, wanted, tokenizer, max_length)
            if ordered:
                encoded = measure(encoded, data)
            column = (source.balance or data.balance) if role == "train" else None
            balance = Balance(column, f"{job.stage.file}: data.train[{number}] {source.path}") if column else None
            kept = _keep(balance.note(encoded) if balance else encoded, held_out if role == "eval" else None)
            more = columns(data) if ordered else {}
            part = _write(kept, folder / f"{role}-{number}.arrow", rows, report, job, data.max_bad_rows, more)
            part = balance.repeat(part, report, job.recipe.pipeline.seed) if balance else part
            parts.append(pack(part, max_length) if packing and not ordered else part)
            own.append(report)
        if parts:
            if ordered:
                mixed = store_ordered(parts, own, job, data, tokenizer, max_length, packing)
            else:
                mixed = mix(parts, sources, own, job) if role == "train" else concatenate(parts)
            mixed.save_to_disk(str(folder / role), max_shard_size="1GB")
            if role == "train":
                tokens_per_row = sum(r.tokens * r.taken for r in own) / len(mixed)
        reports += own
    told = [{**dataclasses.asdict(r), "left_out": dict(r.left_out), "text": r.line()} for r in reports]
    report = {"sources": told, "samples": held_out[:_KEPT_SAMPLES], "kinds": [row.get("kind") for row in held_out]}
    artifact.write_json(folder / "report.json", {**report, "tokens_per_row": round(tokens_per_row, 2)})
    for scratch in folder.glob("*.arrow"):
        scratch.unlink()


def _index_held_out(job: Job) -> HeldOut:
    from hfpipe.data.held_out import index_held_out

    return index_held_out(job.recipe)


def _keep(encoded: Iterable[tuple[dict, dict]], rows: list[dict] | None) -> Iterator[dict]:
    """The encodings alone; the rows themselves go to `rows`, the first of them whole."""
    for row, ids in encoded:
        if rows is not None:
            rows.append(row if len(rows) < _KEPT_SAMPLES else {"kind": row.get("kind")})
        yield ids


def _write(
    encoded: Iterable[dict],
    path: Path,
    rows: str,
    report: SourceReport,
    job: Job,
    max_bad_rows: float,
    more: dict[str, str],
) -> Dataset:
    """Write encoded rows to an Arrow file as they come; refuse the source if too many were at fault."""
    from datasets import Dataset, Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    from hfpipe.training.templates import EncodedPreference

    by_kind = {
        "preference": EncodedPreference._fields,
        "unpaired": ("prompt_ids", "completion_ids", "label"),
        "prompt": ("prompt_ids", "row"),
    }
    names = (*by_kind.get(rows, ("input_ids", "labels", "seq_lengths")), *more)
    others = {name: Value(kind) for name, kind in {"label": "bool", "row": "string", **more}.items()}
    features = {name: others.get(name, List(Value("int32"))) for name in names}
    with ArrowWriter(path=str(path), features=Features(features)) as writer:
        for row in encoded:
            writer.write({name: row[name] for name in names})
        writer.finalize()
    refuse_bad_rows(report, job, max_bad_rows)
    return Dataset.from_file(str(path))


def refuse_bad_rows(report: SourceReport, job: Job, max_bad_rows: float) -> None:
    bad = sum(report.left_out.values())
    where = f"{job.stage.file}: {report.path} [{report.split}]"
    if not report.used:
        raise UserError(f"{where}: no row is left to use of {report.read} read. {report.reasons()}")
    if bad > max_bad_rows * (report.used + bad):
        raise UserError(
            f"{where}: {bad} of {report.used + bad} rows cannot be used, more than data.max_bad_rows = {max_bad_rows:g} "
            f"allows. {report.reasons()}\nMend the rows, or raise data.max_bad_rows, a share from 0 to 1, to leave them "
            f"out: {math.ceil(bad / (report.used + bad) * 100) / 100:g} would do here."
        )
