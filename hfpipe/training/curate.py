"""Curation at scale, by datatrove: folders larger than memory -> filtered, deduplicated, tokenised shards.

Documents pass one by one through the steps of a task; what must be known of all of them lies in files. Departures from
datatrove: words are found by an expression where it asks for spaCy, shingles for MinHash are those of `hfpipe data
check`, languages are told by py3langid, whose model needs no download.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import multiprocess
import numpy as np
import pyarrow
import pyarrow.parquet
import regex
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import MinhashConfig, MinhashDedupSignature
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.formatters.base import BaseFormatter
from datatrove.pipeline.writers.disk_base import DiskWriter
from datatrove.utils.text import TERMINAL_PUNCTUATION
from datatrove.utils.word_tokenizers import WhitespaceTokenizer

from hfpipe import artifact
from hfpipe.data.check import SUMMARY_FILE
from hfpipe.data.held_out import HeldOut, index_held_out
from hfpipe.data.personal import mask
from hfpipe.data.readers import files_of
from hfpipe.data.shingles import hash_words, ngrams
from hfpipe.data.sources import is_hub_id, load_source, local_path, read_rows
from hfpipe.data.splits import SPLITS, digest, split_of
from hfpipe.errors import NothingUsable, UserError
from hfpipe.run_folder import put_in_place
from hfpipe.sections import Corpus, Recipe, Source
from hfpipe.training.shards import MADE, SCRATCH, SHARD_COLUMN, TextEncoder

_WORD = re.compile(r"\w+(?:[-'’]\w+)*|[^\w\s]")
_SAMPLE = 500  # characters of a document whose language is asked
_CHUNK = 500  # documents encoded and written at once


class Words(WhitespaceTokenizer):
    """Words and single signs; any two are equal, so that datatrove splits a document once for all its filters.

    Sentences are upstream's, found by an expression that goes back less.
    """

    def __init__(self):
        super().__init__()
        ends = re.escape("".join(TERMINAL_PUNCTUATION))
        self._sent_regex = regex.compile(
            rf"(?:\p{{Lu}}\.|.)(?:[^{ends}\n\p{{Lu}}]++|\p{{Lu}}\.|\p{{Lu}})*[{ends}\n]+[\"'”]?"
        )

    def word_tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Words)

    def __hash__(self) -> int:
        return hash(Words)


class ReadDocuments(PipelineStep):
    """Texts of the sources with their split: one in `world_size` of the files, or of the rows where files are fewer."""

    type, name = "READER", "hfpipe sources"

    def __init__(self, sources: tuple[Corpus, ...]):
        super().__init__()
        self.sources = sources

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for corpus in self.sources:
            for source, split, share in _parts(corpus, rank, world_size):
                counting = share[0] == 0  # of shared files every task sees all rows
                try:
                    loaded = load_source(source, wanted="text", split=split or "all", streaming=True)
                except NothingUsable:
                    if counting and (rows := _rows_in(source, split or "all")):
                        self.stat_update("dropped_no text in a known form", "dropped", value=rows)
                    continue
                with contextlib.suppress(NothingUsable):  # counted below, as faults
                    for place, row in itertools.islice(loaded.located_rows(), *share):
                        self.stat_update("total")
                        where = f"{source.path}: {place}"
                        yield Document(row["text"], where, metadata={"split": split or split_of(row)})
                if counting:
                    for reason, count in loaded.counts.faults.items():
                        self.stat_update(f"dropped_{reason}", "dropped", value=count)


def _rows_in(source: Source, split: str) -> int:
    rows = read_rows(source.path, split=split, revision=source.revision, name=source.name, streaming=True)
    with contextlib.suppress(NothingUsable):  # an empty file
        return sum(1 for _ in rows)
    return 0


def _parts(corpus: Corpus, rank: int, world_size: int) -> Iterator[tuple[Source, str | None, tuple[int, None, int]]]:
    """(what to read, its split if it has one, the arguments of `islice` for the rows that are this task's)."""
    shared, whole = (rank, None, world_size), (0, None, 1)
    if corpus.path.startswith("tinyworld/") or is_hub_id(corpus.path):
        for split in SPLITS:
            yield Source(corpus.path, name=corpus.name, revision=corpus.revision), split, shared
        return
    splits = files_of(local_path(corpus.path))
    files = [(file, None if split == "all" else split) for split, own in splits.items() for file in own]
    few = len(files) < world_size
    for file, split in files if few else files[rank::world_size]:
        yield Source(str(file), split="all"), split, shared if few else whole


class MaskPersonal(BaseFormatter):
    name = "personal data masked"

    def format(self, text: str) -> str:
        masked = mask(text)
        self.stat_update("masked", value=int(masked != text))
        return masked


class LanguageFilter(BaseFilter):
    """Upstream's filter of this name, its model replaced by py3langid's."""

    name = "LanguageFilter"

    def __init__(self, languages: list[str], language_threshold: float = 0.65, exclusion_writer: Any = None):
        super().__init__(exclusion_writer)
        if unknown := set(languages) - set(_language_model().labels):
            raise ValueError(f"py3langid knows no language {', '.join(sorted(unknown))}")
        self.languages, self.language_threshold = languages, language_threshold

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        language, sure = _language_model().classify(doc.text[:_SAMPLE])
        if sure <= self.language_threshold:
            return False, "unsure"
        return language in self.languages or (False, language)


@functools.cache
def _language_model() -> Any:
    from py3langid import langid

    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


_INDICES: dict[str, HeldOut] = {}


class Decontaminate(BaseFilter):
    """Leaves out training documents that show what the recipe holds out; those of other splits are left alone."""

    name = "decontaminate"

    def __init__(self, recipe: Recipe, without: str, exclusion_writer: Any = None):
        super().__init__(exclusion_writer, batch_size=1000)
        self.name_of_index = f"{recipe.folder} {without}"
        self.make_index = functools.partial(index_held_out, recipe, without)

    def filter_batch(self, batch: list[Document]) -> list[bool | tuple[bool, str]]:
        if self.name_of_index not in _INDICES:  # made once in each process
            _INDICES[self.name_of_index] = self.make_index()
        index = _INDICES[self.name_of_index]
        asked = [number for number, doc in enumerate(batch) if doc.metadata["split"] == "train"]
        shown = {
            asked[match.row]: index.label(match.item)
            for match in reversed(index.find([{"text": batch[number].text} for number in asked]))
        }
        return [(False, shown[number]) if number in shown else True for number in range(len(batch))]

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        return self.filter_batch([doc])[0]


EXACT = MinhashConfig(num_buckets=1, hashes_per_bucket=1)


class ExactSignatures(MinhashDedupSignature):
    """One hash of all that a text says, but for case and white space, in the place of its shingles."""

    def get_shingles(self, text: str) -> np.ndarray:
        """uint64 [1, 1]."""
        return np.frombuffer(digest({"text": text})[:8], dtype=np.uint64).reshape(-1, 1)


class Signatures(ExactSignatures):
    """Upstream's signatures, of the word n-grams that `hfpipe data check` compares; exact ones of shorter texts."""

    def get_shingles(self, text: str) -> np.ndarray:
        """uint64 [n-grams, 1]."""
        found = ngrams(hash_words([text]), self.config.n_grams)[0].reshape(-1, 1)
        return found if len(found) else super().get_shingles(text)


class Jsonl(DiskWriter):
    default_output_filename, name = "${rank}.jsonl", "jsonl"

    def __init__(self, output_folder: str):
        super().__init__(output_folder, compression=None)

    def _write(self, document: dict, file_handler: IO, _filename: str) -> None:
        file_handler.write(json.dumps(document, ensure_ascii=False) + "\n")


class ReadJsonl(PipelineStep):
    """What a task of the same rank wrote; nothing, if it had nothing to write."""

    type, name = "READER", "documents"

    def __init__(self, folder: str):
        super().__init__()
        self.folder = folder

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        path = Path(self.folder) / f"{rank:05d}.jsonl"
        if path.is_file():
            with path.open(encoding="utf-8") as file:
                yield from (Document(**json.loads(line)) for line in file)


class WriteShards(PipelineStep):
    """SPLIT/RANK.parquet: a document a row, `text`, `input_ids` and the identity of the tokenizer."""

    type, name = "WRITER", "shards"

    def __init__(self, folder: str, tokenizer: str):
        super().__init__()
        self.folder, self.tokenizer = Path(folder), tokenizer

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        encoder = TextEncoder(Path(self.tokenizer))
        types = {"text": pyarrow.string(), "input_ids": pyarrow.list_(pyarrow.int32()), SHARD_COLUMN: pyarrow.string()}
        schema, writers = pyarrow.schema(types), {}
        while chunk := list(itertools.islice(data, _CHUNK)):
            texts, ids = encoder([doc.text for doc in chunk])
            for split in SPLITS:
                own = [n for n, doc in enumerate(chunk) if doc.metadata["split"] == split]
                if own and split not in writers:
                    (self.folder / split).mkdir(parents=True, exist_ok=True)
                    file = self.folder / split / f"{rank:05d}.parquet"
                    writers[split] = pyarrow.parquet.ParquetWriter(file, schema, compression="zstd")
                if own:
                    columns = [[texts[n] for n in own], [ids[n] for n in own], [encoder.identity] * len(own)]
                    writers[split].write_table(pyarrow.table(columns, schema=schema))
                    self.stat_update(f"{split}_documents", value=len(own))
                    self.stat_update(f"{split}_tokens", value=sum(len(ids[n]) for n in own))
        for writer in writers.values():
            writer.close()
        yield from ()


class Finish(PipelineStep):
    """Writes `_summary.json` and gives the finished folder its place; UserError where no row of the sources was usable.

    `steps`: what the first executor's steps are called; `duplicates`: what those that are left out are; `made_by`: what
    stands in the summary beside the counts.
    """

    type, name = "WRITER", "summary"

    def __init__(self, root: str, folder: str, steps: list[str], duplicates: str, made_by: dict[str, Any]):
        super().__init__()
        self.root, self.folder = Path(root), Path(folder)
        self.steps, self.duplicates, self.made_by = steps, duplicates, made_by

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        made, scratch = self.root / MADE, self.root / SCRATCH
        read, *filters = zip(self.steps, counted(scratch / "read"), strict=False)
        write = counted(scratch / "write")
        if not read[1].get("total"):
            found = ", ".join(f"{n} {reason}" for reason, n in _reasons(read[1]).items()) or "they are empty"
            raise UserError(f"sources: no row in them can be used: {found}. Expected texts.")
        left_out = [
            {"step": name, "documents": counts["dropped"], "reasons": _reasons(counts)}
            for name, counts in [read, *filters, (self.duplicates, write[1])]
            if counts.get("dropped")
        ]
        splits = {
            split: {kind: write[-1].get(f"{split}_{kind}", 0) for kind in ("documents", "tokens")} for split in SPLITS
        }
        summary = {"documents": read[1].get("total", 0), "left_out": left_out, "splits": splits}
        summary["masked"] = sum(counts.get("masked", 0) for _, counts in filters)
        made.mkdir(exist_ok=True)  # not there where nothing was kept
        artifact.write_record(made / SUMMARY_FILE, {**self.made_by, **summary})
        artifact.sync_tree(made)
        put_in_place(made, self.folder)
        yield from ()


def _reasons(counts: dict[str, int]) -> dict[str, int]:
    return {key.removeprefix("dropped_"): n for key, n in counts.items() if key.startswith("dropped_")}


def counted(logs: Path) -> list[dict[str, int]]:
    """What the steps of a finished executor counted, of all its tasks together."""
    steps: list[dict[str, int]] = []
    for file in sorted((logs / "stats").glob("*.json")):
        for number, step in enumerate(json.loads(file.read_text(encoding="utf-8"))):
            if number == len(steps):
                steps.append({})
            for name, value in step["stats"].items():
                total = value["total"] if isinstance(value, dict) else value
                steps[number][name] = steps[number].get(name, 0) + int(total)
    return steps


def leave_with_parent(data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
    """First in every pipeline: ends this worker when the process that started it is gone, so that the next run is alone."""
    parent = multiprocess.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    return data
