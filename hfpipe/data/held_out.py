"""What a recipe holds out, its probes among it, and the training rows that give it away."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hfpipe.data import tinyworld
from hfpipe.data.check import held_out_sources
from hfpipe.data.messages import RowProblem, text_of
from hfpipe.data.readers import read_file
from hfpipe.data.rows import Row
from hfpipe.data.shingles import Hashed, hash_words, ngrams, wholes
from hfpipe.data.sources import load_source, named
from hfpipe.data.texts import asked, askings, told
from hfpipe.errors import UserError
from hfpipe.sections import DEFAULT_SPLIT, Probe, Recipe, Source

NGRAM = 13  # words, as in the decontamination of GPT-3
SHARED = 0.5  # of the n-grams of the shorter of the two
_SHORTEST = 4  # words; a shorter question, such as a greeting, gives nothing away
_COMMON = 10  # held-out rows; an n-gram in more of them is the wording of a template
_MOST = 1 << 22  # n-grams held; above it a fixed part of all n-grams is compared
_CHUNK = 1000


class Match(NamedTuple):
    """Row `row` of those asked about shows the held-out row `item`; `share` of the shorter one's n-grams are the same."""

    row: int
    item: int
    share: float  # 1.0 also where the question as a whole is the same


class Places:
    """Where rows are, `file line 31`, in 12 bytes a row."""

    def __init__(self) -> None:
        self._names: dict[str, int] = {}
        self._name, self._number = array("I"), array("Q")

    def append(self, place: str) -> None:
        name, _, number = place.rpartition(" ")
        self._name.append(self._names.setdefault(name, len(self._names)))
        self._number.append(int(number))

    def __getitem__(self, at: int) -> str:
        return f"{list(self._names)[self._name[at]]} {self._number[at]}"

    def __len__(self) -> int:
        return len(self._name)


class HeldOut:
    """An index of held-out rows: of their whole questions, and of their 13-grams where they are that long."""

    def __init__(self) -> None:
        self.labels: list[str] = []  # where the rows come from
        self._label_of = array("H")
        self.places = Places()
        self._keys: list[np.ndarray] = []
        self._grams: list[np.ndarray] = []
        self._items: list[np.ndarray] = []
        self._part = 1  # one n-gram in so many is compared
        self._held = 0
        self._sorted: tuple[np.ndarray, ...] | None = None

    def __len__(self) -> int:
        return len(self.places)

    def label(self, item: int) -> str:
        return self.labels[self._label_of[item]]

    def sizes(self) -> dict[str, int]:
        """Rows of each label."""
        return {label: self._label_of.count(number) for number, label in enumerate(self.labels)}

    def add(self, label: str, rows: Iterable[tuple[str, Row]]) -> None:
        """Hold (place, row) for rows of any canonical form, the answer of a probe's left off."""
        number = len(self.labels)
        self.labels.append(label)
        rows = iter(rows)
        while chunk := list(itertools.islice(rows, _CHUNK)):
            first = len(self)
            for place, _ in chunk:
                self.places.append(place)
                self._label_of.append(number)
            texts = hash_words([asked(row) for _, row in chunk])
            keys = wholes(texts)
            self._keys.append(np.where(texts.lengths >= _SHORTEST, keys, 0))
            grams, owners = self._sampled(texts)
            self._grams.append(grams)
            self._items.append(owners + first)
            self._held += len(grams)
            while self._held > _MOST:
                self._thin()
        self._sorted = None

    def _sampled(self, texts: Hashed) -> tuple[np.ndarray, np.ndarray]:
        """The n-grams that are compared, each once a text, and the texts that they are in."""
        grams, owners = ngrams(texts, NGRAM)
        chosen = grams % np.uint64(self._part) == 0
        pairs = np.unique(np.stack([owners[chosen].astype(np.uint64), grams[chosen]]), axis=1)
        return pairs[1], pairs[0].astype(np.int64)

    def _thin(self) -> None:
        self._part *= 2
        kept = [grams % np.uint64(self._part) == 0 for grams in self._grams]
        self._items = [items[keep] for items, keep in zip(self._items, kept, strict=True)]
        self._grams = [grams[keep] for grams, keep in zip(self._grams, kept, strict=True)]
        self._held = sum(map(len, self._grams))

    def _index(self) -> tuple[np.ndarray, ...]:
        """(keys of questions and their items; n-grams, their items), both sorted; and the n-grams of each item."""
        if self._sorted is None:
            keys = np.concatenate(self._keys) if self._keys else np.empty(0, np.uint64)
            grams = np.concatenate(self._grams) if self._grams else np.empty(0, np.uint64)
            items = np.concatenate(self._items) if self._items else np.empty(0, np.int64)
            by_key, by_gram = np.argsort(keys, kind="stable"), np.argsort(grams, kind="stable")
            by_key = by_key[keys[by_key] != 0]
            _, back, count = np.unique(grams, return_inverse=True, return_counts=True)
            rare = count[back] <= _COMMON
            by_gram = by_gram[rare[by_gram]]
            sizes = np.bincount(items[rare], minlength=len(self))
            self._sorted = keys[by_key], by_key, grams[by_gram], items[by_gram], sizes
        return self._sorted

    def find(self, rows: Sequence[Row]) -> list[Match]:
        """The held-out rows that `rows` show, by row; keep `rows` to some thousands."""
        keys, key_items, grams, gram_items, sizes = self._index()
        turns = [askings(row) for row in rows]
        owners = np.repeat(np.arange(len(rows)), [len(one) for one in turns])
        where, items = _look_up(wholes(hash_words([text for one in turns for text in one])), keys, key_items)
        found = {(row, item): 1.0 for row, item in zip(owners[where].tolist(), items.tolist(), strict=True)}
        if len(grams):
            own, owners = self._sampled(hash_words([told(row) for row in rows]))
            where, items = _look_up(own, grams, gram_items)
            pairs, shared = np.unique(np.stack([owners[where], items]), axis=1, return_counts=True)
            lengths = np.bincount(owners, minlength=len(rows))
            share = shared / np.maximum(np.minimum(sizes[pairs[1]], lengths[pairs[0]]), 1)
            for row, item, part in zip(*pairs.tolist(), share.tolist(), strict=True):
                if part >= SHARED:
                    found.setdefault((row, item), min(part, 1.0))
        return sorted(Match(row, item, share) for (row, item), share in found.items())


def _look_up(wanted: np.ndarray, known: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(places in `wanted`, items that stand there in `known`, which is sorted), a pair for each item."""
    left, right = np.searchsorted(known, wanted, "left"), np.searchsorted(known, wanted, "right")
    many = right - left
    where = np.repeat(np.arange(len(wanted)), many)
    within = np.arange(len(where)) - np.repeat(np.cumsum(many) - many, many)
    return where, items[left[where] + within]


def probe_rows(probe: Probe, where: str = "") -> Iterator[tuple[str, Row]]:
    """(place, what is asked) of every row of a probe, as `messages` or `text`."""
    if probe.path == "tinyworld/probes" and not probe.check:
        rows = tinyworld.rows("probes", probe.split or "test", size=probe.limit)
        located = ((f"{probe.path} row {number}", row) for number, row in enumerate(rows, 1))
    elif probe.check:
        source = Source(path=probe.path, split=probe.split or "test", limit=probe.limit)
        located = load_source(source, wanted="messages", where=where).located_rows()
    else:
        located = ((str(at), at.row) for at in itertools.islice(read_file(Path(probe.path).expanduser()), probe.limit))
    for place, row in located:
        try:
            shown = _shown(row)
        except (KeyError, TypeError, RowProblem):
            raise UserError(
                f"{place}: expected `prompt` as text, or `messages` of objects with role and text."
            ) from None
        yield place, shown


def _shown(probe: Row) -> Row:
    if turns := probe.get("messages"):
        return {"messages": [{**turn, "role": turn["role"], "content": text_of(turn.get("content"))} for turn in turns]}
    return {"text": str(probe.get("prompt") or "")}


def index_held_out(recipe: Recipe, without: str | None = None) -> HeldOut:
    """All that a recipe holds out, but for the source `without`. UserError where a source or a probe cannot be read."""
    index = HeldOut()
    seed = recipe.pipeline.seed
    for label, source, form in held_out_sources(recipe, without):
        loaded = load_source(source, wanted=form, split=DEFAULT_SPLIT["eval"], seed=seed)
        index.add(label, loaded.located_rows())
    for number, probe in enumerate(recipe.pipeline.evaluate.probes):
        where = f"{recipe.folder / 'pipeline.yaml'}: evaluate.probes[{number}]"
        with named(where):
            index.add(f"probes {probe.path}", probe_rows(probe))
    return index
