"""Text that is read, encoded and packed while it trains: what no disk holds twice. What became of its rows is told at the end."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfpipe import artifact
from hfpipe.annealing import anneals
from hfpipe.data.report import SourceReport
from hfpipe.errors import UserError
from hfpipe.sections import Source
from hfpipe.training.encode import encode_rows
from hfpipe.training.prepare import Prepared, open_source, prepare_held_out_rows, refuse_bad_rows, take_counts
from hfpipe.training.select_rows import shares
from hfpipe.training.shards import holds_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hfpipe.data.sources import Loaded
    from hfpipe.training.job import Job, Progress

_PACKED_TOGETHER = 1000  # rows that `datasets` takes at once for TRL's packing: none of them trains before all are read
_read_whole: set[Path] = set()  # sources that this process has read to their end


def stream_rows(job: Job, tokenizer: PreTrainedTokenizerBase, *, max_length: int, packing: bool) -> Prepared:
    """As `prepare_rows`, but training text is read, encoded and packed while training, again and again.

    A source whose faulty rows exceed `data.max_bad_rows` stops the training when its first reading ends. `tokens_per_row` is
    `max_length`: how full the rows are is not known beforehand.
    """
    from datasets import Features, IterableDataset, List, Value, interleave_datasets
    from trl import pack_dataset

    if job.rehearsal:
        return job.rehearsal.prepared("text")
    if not job.stage.trainer.get("max_steps") and not anneals(job.stage):
        raise UserError(f"{job.stage.file}: data.streaming needs trainer.max_steps: a stream has no known end.")
    features = Features({"input_ids": List(Value("int64")), "labels": List(Value("int64"))})
    streams = []
    for number, source in enumerate(job.stage.data.train):
        loaded = open_source(source, SourceReport.of(source, "train"), wanted="text", job=job, streaming=True)
        _, first = next(loaded.located_rows())
        holds_ids(first, tokenizer, f"{job.stage.file}: data.train {source.path}")
        options = {"job": job, "tokenizer": tokenizer, "source": source, "number": number, "max_length": max_length}
        stream = IterableDataset.from_generator(_stream, features=features, gen_kwargs=options)
        streams.append(pack_dataset(stream, max_length, "bfd").repeat(None))
    seed, weights = job.recipe.pipeline.seed, shares(job.stage.data.train)
    mixed = interleave_datasets(streams, probabilities=weights, seed=seed, stopping_strategy="all_exhausted")
    held_out, report = prepare_held_out_rows(job, tokenizer, max_length=max_length, packing=packing)
    return Prepared(mixed, held_out, {**report, "tokens_per_row": max_length})


def tell_streamed(job: Job, progress: Progress) -> list[dict[str, Any]]:
    """What became of the rows that were read, a record for each source as `Prepared.report` has them, and a line for the person."""
    told = [artifact.read_json(_told_in(job, number)) for number in range(len(job.stage.data.train))]
    for record in (found := [record for record in told if record]):
        progress.tell("data", text=record["text"])
    return found


def _stream(
    job: Job, tokenizer: PreTrainedTokenizerBase, source: Source, number: int, max_length: int
) -> Iterator[dict[str, Any]]:
    report = SourceReport.of(source, "train")
    loaded = open_source(source, report, wanted="text", job=job, streaming=True)
    told_in = _told_in(job, number)
    counting = told_in not in _read_whole and os.environ.get("RANK", "0") == "0"  # each process reads all of it
    for read, (_, encoded) in enumerate(
        encode_rows(loaded.located_rows(), report, "text", tokenizer, max_length), start=1
    ):
        if counting and read % _PACKED_TOGETHER == 0:
            _note(told_in, report, loaded, "; training ended before the source did")
        yield {"input_ids": encoded["input_ids"], "labels": encoded["labels"]}
    if counting:
        _note(told_in, report, loaded, "")
    _read_whole.add(told_in)
    take_counts(report, loaded)
    refuse_bad_rows(report, job, job.stage.data.max_bad_rows)


def _note(path: Path, report: SourceReport, loaded: Loaded, more: str) -> None:
    report = copy.deepcopy(report)
    take_counts(report, loaded)
    record = {**dataclasses.asdict(report), "left_out": dict(report.left_out), "streamed": True}
    path.parent.mkdir(parents=True, exist_ok=True)
    artifact.write_json(path, {**record, "text": report.line() + more})


def _told_in(job: Job, number: int) -> Path:
    """The fingerprint keeps apart what another recipe has read here: of a source of little weight nothing may be read."""
    return job.run / "logs" / f"{job.stage.name}.{job.fingerprint[:12]}.streamed-{number}.json"
