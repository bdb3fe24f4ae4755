"""Sections about rows: sources, their order, corpora to curate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from hfpipe.sections.fields import above, at_least


@dataclass(frozen=True)
class Source:
    """One source of rows: a file, a folder, `tinyworld/NAME` or a Hub dataset id."""

    path: str
    weight: float | None = None  # share of the stage's training tokens (of its rows, for preferences and prompts)
    as_: Literal["text"] | None = None  # plain documents inside a stage of conversations (replay)
    split: str | None = None  # train, validation, test, or all; default: train, and validation under `eval`
    limit: int | None = at_least(1, None)  # rows at the most
    name: str | None = None  # configuration of a Hub dataset
    revision: str | None = None
    balance: str | None = None  # a column: rows of its rarer values are repeated, 10 times at the most


@dataclass(frozen=True)
class HeldOutText(Source):
    domain: str | None = None  # a name: the sources that share it are scored by themselves too


DEFAULT_SPLIT = {"train": "train", "eval": "validation"}


@dataclass(frozen=True)
class Curriculum:
    """From easy to hard, in each epoch; or drawn from the easiest rows alone at first, and in the end from all of them."""

    by: str  # length (in tokens), parent_loss (of a trained token, under model.from), or a column that holds a number
    pace: Literal["epoch", "growing"] = "epoch"
    start: float = above(0, 0.2, at_most=1)  # of `growing`: the share of the rows that may be drawn at first


@dataclass(frozen=True)
class Phase:
    """A part of a stage's training with a mixture and a length of its own."""

    share: float = field(metadata={"above": 0, "at_most": 1})  # of the stage's steps
    weights: tuple[float, ...] | dict[str, float] = ()  # shares of tokens by path, or one for each source; else by size
    max_length: int | None = at_least(2, None)  # tokens of a document or conversation; rows keep the stage's length

    def mixture(self, sources: tuple[Source, ...], sizes: Sequence[float]) -> list[float]:
        """What each source gives of the phase's tokens, as shares of 1; `sizes` are theirs in tokens."""
        named = isinstance(self.weights, dict)
        given = [self.weights.get(source.path, 0) for source in sources] if named else self.weights or sizes
        return [weight / sum(given) for weight in given]


@dataclass(frozen=True)
class Data:
    train: tuple[Source, ...] = ()
    eval: tuple[Source, ...] = ()
    max_bad_rows: float = at_least(0, 0.0, at_most=1)  # share of a source's rows that may be left out for a fault
    balance: str | None = None  # for every source of `train` that names no column of its own
    decontaminate: bool = False  # leave out training rows that show what the recipe holds out, its probes among it
    curriculum: Curriculum | None = None  # default: shuffled
    phases: tuple[Phase, ...] = ()  # of text and conversations, one after the other


@dataclass(frozen=True)
class TextData(Data):
    max_length: int = at_least(2, 1024)  # tokens in a packed row
    batch_tokens: int | None = at_least(1, None)  # tokens per optimizer step; sets gradient accumulation
    streaming: bool = False  # read while training; needs trainer.max_steps


@dataclass(frozen=True)
class PromptData(Data):
    max_prompt_length: int = at_least(1, 512)  # tokens; a longer prompt is left out and counted


@dataclass(frozen=True)
class Corpus:
    """A source of `hfpipe data prepare`, read whole: a file, a folder, or a Hub dataset id."""

    path: str
    name: str | None = None  # configuration of a Hub dataset
    revision: str | None = None


SHARDS = "shards"  # in the run's folder


@dataclass(frozen=True)
class Curation:
    """The file of `hfpipe data prepare`; fields of the classes that are named are datatrove's own."""

    sources: tuple[Corpus, ...]
    output_folder: str | None = None  # of a recipe's curation: shards in the run's folder
    filters: tuple[dict[str, Any], ...] = ()  # in this order: [{type: GopherQualityFilter, min_doc_words: 50}, ...]
    mask_personal: bool = False  # e-mail addresses, phone numbers and keys, as `hfpipe data check` finds them
    decontaminate: bool = False  # leave out what shows the held-out rows of the recipe whose folder the file is in
    minhash: dict[str, Any] | None = field(default_factory=dict)  # MinhashConfig; null: exact duplicates alone go
    tokenizer: str | None = None  # a folder; default: that of the recipe's tokenizer stage
    executor: dict[str, Any] = field(default_factory=dict)  # {type: local | slurm | ray, tasks: 8, ...}
