"""Rows -> token ids, once, before anything trains: read, neutralise, render, mask, check, pack, mix, keep.

The result is stored under the hash of all that it depends on; every rank and every later run reads it from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import itertools
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfpipe import artifact, paths
from hfpipe.errors import UserError
from hfpipe.sections import Data, Source
from hfpipe.training.job import DEFAULT_SPLIT

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

    from hfpipe.training.job import Job

_VERSION = 1  # raise when the same inputs come to give other rows
_CHUNK = 1000
_KEPT_SAMPLES = 64


@dataclass(frozen=True)
class Prepared:
    """What a stage trains on, and what was done to get there.

    Rows of `train` and `eval` are, for text and conversations, `input_ids`, `labels` and `seq_lengths` (the tokens of
    each document packed into the row); for preferences `prompt_ids`, `chosen_ids` and `rejected_ids`. `report` holds
    `sources` (a record each) and `samples` (some held-out rows as they were read).
    """

    train: Dataset | IterableDataset
    eval: Dataset | None
    report: dict[str, Any]


@dataclass
class SourceReport:
    """What became of one source's rows; nothing is left out silently."""

    path: str
    role: str
    split: str
    form: str = ""
    read: int = 0
    used: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    neutralised: int = 0
    other_splits: int = 0
    duplicates: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    unused: str = ""

    @classmethod
    def of(cls, source: Source, role: str) -> SourceReport:
        return cls(source.path, role, source.split or DEFAULT_SPLIT[role])

    def leave_out(self, number: int, reason: str) -> None:
        self.left_out[reason] += 1
        if len(self.examples) < 3:
            self.examples.append(f"row {number}: {reason}")

    def line(self) -> str:
        """One line for a person: the form seen, rows used and not used, and why."""
        parts = [f"{self.path} [{self.split}]: {self.form}; {self.used:,} rows used"]
        if self.tokens:
            parts.append(f"{self.tokens:,} tokens")
        if 0 < self.trained_tokens != self.tokens:
            parts.append(f"{self.trained_tokens / max(self.tokens, 1):.0%} of them trained")
        if self.other_splits:
            parts.append(f"{self.other_splits:,} in the other splits")
        if self.left_out:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.left_out.most_common())
            parts.append(f"{sum(self.left_out.values())} left out ({reasons})")
        if self.duplicates:
            parts.append(f"{self.duplicates} duplicates left out")
        if self.neutralised:
            parts.append(f"{self.neutralised} control tokens neutralised")
        return ", ".join(parts) + self.unused


# --- what the stages call ---


def prepare_rows(job: Job, tokenizer: PreTrainedTokenizerBase, *, max_length: int, packing: bool) -> Prepared:
    """The rows of a stage for one tokenizer, from the store or made now.

    `max_length` is in tokens: a longer document is cut into several rows, a longer conversation or pair is left out and
    counted. With `packing`, several documents or conversations share a row of at most that length.

    Raises:
        UserError: more rows are at fault than `data.max_bad_rows` allows, or none is left.
    """
    return _stored(job, tokenizer, job.stage.data, job.stage.type.rows or "text", max_length, packing, job.data_hashes)


def prepare_held_out_text(job: Job, tokenizer: PreTrainedTokenizerBase, data: Data) -> Prepared:
    """Plain text for a loss; `data.train` is read at its validation split unless it names another."""
    from hfpipe.data.sources import content_hash

    limit = job.recipe.pipeline.evaluate.max_rows
    sources = tuple(
        dataclasses.replace(s, split=s.split or "validation", limit=s.limit or limit) for s in data.train
    )
    data = dataclasses.replace(data, train=sources, max_bad_rows=1.0)
    seed = job.recipe.pipeline.seed
    hashes = {
        s.path: content_hash(s.path, split=s.split, seed=seed, size=s.limit, revision=s.revision, name=s.name)
        for s in sources
    }
    return _stored(job, tokenizer, data, "text", data.max_length, True, hashes)


def stream_rows(job: Job, tokenizer: PreTrainedTokenizerBase, *, max_length: int, packing: bool) -> Prepared:
    """As `prepare_rows`, but training text is read, encoded and packed while training; weights are shares of rows."""
    from datasets import Features, IterableDataset, List, Value, interleave_datasets
    from trl import pack_dataset

    if not job.stage.trainer.get("max_steps"):
        raise UserError(f"{job.stage.file}: data.streaming needs trainer.max_steps: a stream has no known end.")
    features = Features({"input_ids": List(Value("int64")), "labels": List(Value("int64"))})
    streams = []
    for source in job.stage.data.train:
        options = {"job": job, "tokenizer": tokenizer, "source": source, "max_length": max_length}
        stream = IterableDataset.from_generator(_stream, features=features, gen_kwargs=options)
        streams.append(pack_dataset(stream, max_length, "bfd_split").repeat(None))
    weights = _weights(job.stage.data.train, job)
    mixed = interleave_datasets(
        streams, probabilities=weights, seed=job.recipe.pipeline.seed, stopping_strategy="all_exhausted"
    )
    held_out = dataclasses.replace(job.stage.data, train=job.stage.data.eval, eval=job.stage.data.eval)
    stored = _stored(job, tokenizer, held_out, "text", max_length, packing, job.data_hashes)
    return Prepared(mixed, stored.eval, stored.report)


def _stream(job: Job, tokenizer: PreTrainedTokenizerBase, source: Source, max_length: int) -> Iterator[dict[str, Any]]:
    report = SourceReport.of(source, "train")
    rows = read_source(source, report, wanted="text", job=job)
    for encoded in _encode(rows, report, "text", tokenizer, max_length):
        yield encoded


def read_source(source: Source, report: SourceReport, *, wanted: str, job: Job) -> Iterator[tuple[int, dict[str, Any]]]:
    """Canonical rows of one source with their numbers; the report counts what was seen and left out."""
    from hfpipe.data.sources import load_source

    where = f"{job.stage.file}: data.{report.role}"
    loaded = load_source(source, wanted=wanted, split=report.split, seed=job.recipe.pipeline.seed, where=where)
    yield from enumerate(loaded.rows(), 1)
    counts = loaded.counts
    report.form, report.read = loaded.form_seen, counts.read
    report.other_splits, report.duplicates = counts.other_splits, counts.duplicates
    report.left_out.update(counts.faults)
    report.examples[:0] = counts.examples


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
    folder = paths.cache_dir() / "prepared" / artifact.digest(identity)[:32]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_suffix(".lock")):
        if not folder.is_dir():
            making = folder.with_suffix(".making")
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir()
            _make(making, job, tokenizer, data, rows, max_length, packing)
            making.rename(folder)
    held_out = folder / "eval"
    return Prepared(
        train=load_from_disk(str(folder / "train")),
        eval=load_from_disk(str(held_out)) if held_out.is_dir() else None,
        report=artifact.read_json(folder / "report.json") or {},
    )


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
    samples: list[dict[str, Any]] = []
    for role in ("train", "eval"):
        sources, parts, own = getattr(data, role), [], []
        for number, source in enumerate(sources):
            if role == "eval" and source.limit is None:
                source = dataclasses.replace(source, limit=job.recipe.pipeline.evaluate.max_rows)
            report = SourceReport.of(source, role)
            wanted = source.as_ or rows
            given = read_source(source, report, wanted=wanted, job=job)
            if role == "eval":
                given = _keep_first(given, samples)
            scratch = folder / f"{role}-{number}.arrow"
            encoded = _encode(given, report, wanted, tokenizer, max_length)
            parts.append(_write(encoded, scratch, rows, report, job, data.max_bad_rows))
            if packing:
                parts[-1] = _pack(parts[-1], max_length, wanted)
            own.append(report)
        if parts:
            mixed = _mix(parts, sources, own, job) if role == "train" else _concatenate(parts)
            mixed.save_to_disk(str(folder / role), max_shard_size="1GB")
        reports += own
    told = [{**dataclasses.asdict(r), "left_out": dict(r.left_out), "text": r.line()} for r in reports]
    artifact.write_json(folder / "report.json", {"sources": told, "samples": samples})
    for scratch in folder.glob("*.arrow"):
        scratch.unlink()


def _keep_first(rows: Iterable[tuple[int, dict]], samples: list[dict]) -> Iterator[tuple[int, dict]]:
    for number, row in rows:
        if len(samples) < _KEPT_SAMPLES:
            samples.append(row)
        yield number, row


def _write(
    encoded: Iterable[dict], path: Path, rows: str, report: SourceReport, job: Job, max_bad_rows: float
) -> Dataset:
    """Write encoded rows to an Arrow file as they come; refuse the source if too many were at fault."""
    from datasets import Dataset, Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    names = ("prompt_ids", "chosen_ids", "rejected_ids") if rows == "preference" else ("input_ids", "labels", "seq_lengths")
    with ArrowWriter(path=str(path), features=Features({name: List(Value("int32")) for name in names})) as writer:
        for row in encoded:
            writer.write({name: row[name] for name in names})
        writer.finalize()
    bad = sum(report.left_out.values())
    where = f"{job.stage.file}: {report.path} [{report.split}]"
    if not report.used:
        raise UserError(f"{where}: no row is left to use of {report.read} read. {_reasons(report)}")
    if bad > max_bad_rows * (report.used + bad):
        raise UserError(
            f"{where}: {bad} of {report.used + bad} rows cannot be used, more than data.max_bad_rows = {max_bad_rows:g} "
            f"allows. {_reasons(report)}\nMend the rows, or raise data.max_bad_rows to leave them out."
        )
    return Dataset.from_file(str(path))


def _reasons(report: SourceReport) -> str:
    counts = ", ".join(f"{count} {reason}" for reason, count in report.left_out.most_common())
    return f"{counts or 'none had a fault'}; {report.other_splits} are in other splits.\n  " + "\n  ".join(report.examples)


# --- encoding ---


def _encode(
    rows: Iterable[tuple[int, dict]],
    report: SourceReport,
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> Iterator[dict[str, list[int]]]:
    """Rows as token ids with their labels; those that cannot be trained on are counted and left out."""
    from hfpipe.training.templates import neutralise_row, special_strings

    special = special_strings(tokenizer)
    encode: Callable[..., list[dict]] = {"text": _encode_text, "preference": _encode_pairs}.get(kind, _encode_messages)
    rows = iter(rows)
    while chunk := list(itertools.islice(rows, _CHUNK)):
        clean = []
        for _, row in chunk:
            row, changed = neutralise_row(row, special)
            report.neutralised += changed
            clean.append(row)
        for number, encoded in zip((n for n, _ in chunk), _one_by_one_on_error(encode, tokenizer, clean), strict=True):
            problem = encoded if isinstance(encoded, str) else _problem(encoded, kind, max_length)
            if problem:
                report.leave_out(number, problem)
                continue
            report.used += 1
            report.tokens += _length(encoded)
            report.trained_tokens += _trained(encoded)
            yield encoded


def _one_by_one_on_error(encode: Callable, tokenizer: Any, rows: list[dict]) -> list[dict | str]:
    """A batch at once; where the template refuses a row of it, each alone, with the reason in that row's place."""
    try:
        return encode(tokenizer, rows)
    except UserError:
        encoded: list[dict | str] = []
        for row in rows:
            try:
                encoded += encode(tokenizer, [row])
            except UserError as error:
                encoded.append(str(error).removeprefix("Row 0: "))
        return encoded


def _encode_text(tokenizer: PreTrainedTokenizerBase, rows: list[dict]) -> list[dict]:
    from hfpipe.training.tokenizers import encode_text

    ids = encode_text(tokenizer, [row["text"] for row in rows])
    return [{"input_ids": i, "labels": i, "seq_lengths": [len(i)]} for i in ids]


def _encode_messages(tokenizer: PreTrainedTokenizerBase, rows: list[dict]) -> list[dict]:
    from hfpipe.training.templates import encode_batch

    return [
        {
            "input_ids": ids,
            "labels": [token if trained else -100 for token, trained in zip(ids, mask, strict=True)],
            "seq_lengths": [len(ids)],
        }
        for ids, mask in encode_batch(tokenizer, rows)
    ]


def _encode_pairs(tokenizer: PreTrainedTokenizerBase, rows: list[dict]) -> list[dict]:
    from hfpipe.training.templates import encode_preferences

    return [pair._asdict() for pair in encode_preferences(tokenizer, rows)]


def _problem(row: dict, kind: str, max_length: int) -> str | None:
    """Why an encoded row cannot be trained on, or None."""
    if kind == "text":
        return None if len(row["input_ids"]) > 1 else "empty text"
    longest = _length(row) if kind == "messages" else len(row["prompt_ids"]) + max(map(len, _answers(row)))
    if longest > max_length:
        return f"longer than max_length {max_length}"
    if kind == "preference":
        return None
    trained = _trained(row)
    if not trained:
        return "nothing of it is trained: no assistant's words"
    return "all of it is trained: no prompt" if trained == _length(row) else None


def _answers(row: dict) -> tuple[list[int], list[int]]:
    return row["chosen_ids"], row["rejected_ids"]


def _length(row: dict) -> int:
    return len(row["input_ids"]) if "input_ids" in row else 2 * len(row["prompt_ids"]) + sum(map(len, _answers(row)))


def _trained(row: dict) -> int:
    return sum(label != -100 for label in row["labels"]) if "labels" in row else sum(map(len, _answers(row)))


# --- packing and mixing ---


def _pack(rows: Dataset, max_length: int, kind: str) -> Dataset:
    """Several documents in a row (TRL's best-fit-decreasing); long text is cut, conversations are never."""
    from trl import pack_dataset

    return pack_dataset(rows.remove_columns("seq_lengths"), max_length, "bfd_split" if kind == "text" else "bfd")


def _concatenate(parts: list[Dataset]) -> Dataset:
    from datasets import concatenate_datasets

    return concatenate_datasets(parts)


def _mix(parts: list[Dataset], sources: tuple[Source, ...], reports: list[SourceReport], job: Job) -> Dataset:
    """All of every source, or, with weights, as much of each as the scarcest allows without repeating a row."""
    weights = _weights(sources, job)
    if weights:
        total = min(len(part) / weight for part, weight in zip(parts, weights, strict=True))
        for i, weight in enumerate(weights):
            keep = max(1, round(total * weight))
            if keep < len(parts[i]):
                reports[i].unused = f"; {keep / len(parts[i]):.0%} of it taken at weight {sources[i].weight:g}"
                parts[i] = parts[i].shuffle(seed=job.recipe.pipeline.seed).select(range(keep))
    return _concatenate(parts).shuffle(seed=job.recipe.pipeline.seed)


def _weights(sources: tuple[Source, ...], job: Job) -> list[float] | None:
    """The sources' weights as shares of 1, or None where none has one."""
    given = [source.weight for source in sources]
    if all(weight is None for weight in given):
        return None
    if any(weight is None or weight <= 0 for weight in given):
        raise UserError(f"{job.stage.file}: data.train: give every source a weight above 0, or none of them.")
    return [weight / sum(given) for weight in given]
