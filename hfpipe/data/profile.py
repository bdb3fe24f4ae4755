"""One source, one split, looked at in one pass: how much, how long, how often the same, what should not be there."""

from __future__ import annotations

import heapq
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hfpipe.data.groups import Groups, NearDuplicates
from hfpipe.data.held_out import HeldOut, Match, Places
from hfpipe.data.personal import CONTROL, REFUSES, find_personal, mask
from hfpipe.data.report import PLACES
from hfpipe.data.rows import Row, kind_of
from hfpipe.data.shingles import hash_words, wholes
from hfpipe.data.sources import Loaded
from hfpipe.data.texts import told, turns_of, whole

_CHUNK = 1000
_BYTES_A_TOKEN = 4.0  # of English text in a vocabulary of the usual size
_ENCODED = 2_000_000  # bytes of a source that are encoded to know its tokens; of the rest its share is taken
_SAMPLED = 300  # texts whose language is asked
_LONGEST_SAMPLE = 500  # characters
_VALUES = 100  # of a column; one with more is no category
_LONGEST_VALUE = 100  # characters
_CUT = re.compile(r"[^\W\d_][,;]?\s*$")
_CUT_FROM = 40  # words; a shorter answer may well end without a full stop
_CONVERSED = ("messages", "prompt", "chosen", "rejected", "completion", "label", "text", "tools", "reference")

CountTokens = Callable[[list[str]], list[int]]


@dataclass
class Seen:
    """Something that was found, how often, and where first."""

    count: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, place: str) -> None:
        self.count += 1
        if len(self.places) < PLACES:
            self.places.append(place)


@dataclass
class Profile:
    """What a source's split holds. Lengths are in tokens; `estimated` says that they come from bytes."""

    path: str
    split: str
    form: str = ""
    kind: str = ""  # text | messages | preference | unpaired | prompt
    rows: int = 0
    bytes: int = 0  # of all turns and the tools offered, without what a template writes around them
    answer_bytes: int = 0
    bytes_a_token: float = _BYTES_A_TOKEN
    estimated: str = "from bytes"  # "", "from bytes", or "from a part"
    lengths: Counter[int] = field(default_factory=Counter)  # in bytes; of a preference the longer conversation
    turns: Counter[int] = field(default_factory=Counter)
    left_out: dict[str, Seen] = field(default_factory=dict)  # rows that cannot be used, by reason
    exact: Seen = field(default_factory=Seen)
    near: Seen = field(default_factory=Seen)
    overlaps: dict[str, Seen] = field(default_factory=dict)  # rows that show held-out rows, by where these come from
    shown: dict[str, set[int]] = field(default_factory=dict)  # held-out rows that they show
    held_out: dict[str, int] = field(default_factory=dict)  # how many there are of each
    personal: dict[str, Seen] = field(default_factory=dict)
    control: dict[str, Seen] = field(default_factory=dict)
    refusals: int = 0
    answers: int = 0  # rows that end with an assistant's turn
    cut: Seen = field(default_factory=Seen)
    labels: Counter[str] = field(default_factory=Counter)  # of answers judged one by one: good, bad
    columns: dict[str, Counter[str]] = field(default_factory=dict)
    languages: Counter[str] = field(default_factory=Counter)  # of a sample

    @property
    def tokens(self) -> int:
        return round(self.bytes / self.bytes_a_token)

    @property
    def trained(self) -> float | None:
        """The assistant's share of the bytes, where there is one."""
        return self.answer_bytes / max(self.bytes, 1) if self.answers else None

    def length(self, share: float) -> int:
        """Tokens of a row than which `share` of the rows are not longer."""
        wanted, seen = share * sum(self.lengths.values()), 0
        for length, count in sorted(self.lengths.items()):
            seen += count
            if seen >= wanted:
                return round(length / self.bytes_a_token)
        return 0

    def longer_than(self, tokens: int) -> int:
        return sum(n for length, n in self.lengths.items() if length / self.bytes_a_token > tokens)

    def as_json(self) -> dict[str, Any]:
        """Counts, quantiles and places as plain values."""
        plain = {k: v for k, v in vars(self).items() if k not in ("lengths", "turns", "bytes_a_token")}
        plain |= {"tokens": self.tokens, "trained": None if self.trained is None else round(self.trained, 4)}
        plain["length"] = {f"p{round(100 * q)}": self.length(q) for q in (0.05, 0.5, 0.95, 1)}
        plain["columns"] = {name: values for name, values in self.columns.items() if len(values) <= _VALUES}
        plain["turns"] = {str(n): count for n, count in sorted(self.turns.items())}
        return _plain(plain)


def _plain(value: Any) -> Any:
    if isinstance(value, Seen):
        return {"rows": value.count, "places": value.places}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return len(value) if isinstance(value, set) else value


def profile(loaded: Loaded, count_tokens: CountTokens | None = None, held_out: HeldOut | None = None) -> Profile:
    """Read a source once and say what it holds.

    Args:
        count_tokens: texts -> tokens of each; without it tokens are estimated from bytes.
        held_out: what rows may not show; where they come from here themselves, it is None.
    Raises:
        UserError: the source cannot be read, or no row of it can be used.
    """
    found = Profile(loaded.source.path, loaded.split)
    every, near, places, sample = Groups(), NearDuplicates(), Places(), _Sample()
    encoded = [0, 0]  # bytes, tokens
    rows = loaded.located_rows()
    while chunk := list(itertools.islice(rows, _CHUNK)):
        numbers = np.arange(len(places), len(places) + len(chunk))
        texts = [whole(row) for _, row in chunk]
        for (place, row), text in zip(chunk, texts, strict=True):
            places.append(place)
            _look_at(found, place, row, text)
        if count_tokens and encoded[0] < _ENCODED:
            encoded[0] += sum(len(text.encode()) for text in texts)
            encoded[1] += sum(count_tokens(texts))
        said = [told(row) for _, row in chunk]
        keys = wholes(hash_words([_all_of(row) for _, row in chunk]))
        every.add(keys, numbers)
        near.add(hash_words(said), numbers)
        sample.add(keys, said)
        if held_out:
            _note_overlaps(found, held_out, held_out.find([row for _, row in chunk]), chunk)
    if held_out:
        found.held_out = held_out.sizes()
    counts = loaded.counts
    found.form = loaded.form_seen
    found.left_out = {reason: Seen(n, counts.places[reason]) for reason, n in counts.faults.items()}
    found.exact.count += counts.duplicates
    if encoded[1]:
        found.bytes_a_token = encoded[0] / encoded[1]
        found.estimated = "" if encoded[0] == found.bytes else "from a part"
    _note_repeats(found, every, near, places)
    found.languages = sample.languages()
    return found


def _all_of(row: Row) -> str:
    return "\n".join([str(row.get("label", "")), *(f"{role} {said}" for role, said in turns_of(row))])


def _shorter(row: Row) -> int:
    """Bytes of the shorter answer of a preference, whose length is that of the other conversation."""
    sides = [told({"messages": row[side]}) for side in ("chosen", "rejected") if side in row]
    return min((len(side.encode()) for side in sides), default=0)


def _answer(row: Row, turns: list[tuple[str, str]]) -> str | None:
    """What the assistant says at the end; of a preference in the better answer."""
    if "chosen" in row:
        turns = turns_of({"chosen": row["chosen"]})
    return next((said for role, said in reversed(turns) if role == "assistant"), None)


def _look_at(found: Profile, place: str, row: Row, text: str) -> None:
    size = len(text.encode())
    turns = turns_of(row)
    found.kind = found.kind or kind_of(row)
    found.rows += 1
    found.bytes += size
    found.lengths[size - _shorter(row)] += 1
    found.turns[sum(role in ("user", "assistant") for role, _ in turns)] += 1
    if (answer := _answer(row, turns)) is not None:
        found.answers += 1
        found.answer_bytes += sum(len(said.encode()) for role, said in turns if role == "assistant")
        found.answer_bytes -= sum(len(m["content"].encode()) for m in row.get("messages", ()) if m.get("weight") == 0)
        found.refusals += bool(REFUSES.search(answer[:300].replace("\u2019", "'")))
        if _CUT.search(answer[-20:]) and answer.count(" ") >= _CUT_FROM:
            found.cut.add(place)
    if found.kind == "unpaired":
        found.labels["good" if row["label"] else "bad"] += 1
    for kind in {kind for kind, _, _ in find_personal(text)}:
        found.personal.setdefault(kind, Seen()).add(place)
    if "<" in text or "[" in text or not text.isprintable():
        for token in set(CONTROL.findall(text)):
            found.control.setdefault(token if token.isprintable() else repr(token), Seen()).add(place)
    for name, value in row.items():
        if name not in _CONVERSED and isinstance(value, str | int | bool):
            column = found.columns.setdefault(name, Counter())
            if len(column) <= _VALUES:  # with one more it is no category, and counted no further
                column[mask(str(value)) if len(str(value)) <= _LONGEST_VALUE else "(long)"] += 1


def _note_overlaps(found: Profile, held_out: HeldOut, matches: list[Match], chunk: list[tuple[str, Row]]) -> None:
    for label, row in dict.fromkeys((held_out.label(m.item), m.row) for m in matches):
        first = next(m.item for m in matches if m.row == row and held_out.label(m.item) == label)
        found.overlaps.setdefault(label, Seen()).add(f"{chunk[row][0]} = {held_out.places[first]}")
    for match in matches:
        found.shown.setdefault(held_out.label(match.item), set()).add(match.item)


def _note_repeats(found: Profile, every: Groups, near: NearDuplicates, places: Places) -> None:
    same = []
    for rows, firsts in every.repeats():
        found.exact.count += len(rows)
        same.append(rows)
        for at in np.argsort(rows)[:PLACES].tolist():
            found.exact.places.append(f"{places[rows[at]]} = {places[firsts[at]]}")
    found.exact.places = found.exact.places[:PLACES]
    rows, firsts = near.pairs()
    fresh = ~np.isin(rows, np.concatenate(same)) if same else np.ones(len(rows), dtype=bool)
    found.near.count = int(fresh.sum())
    for row, first in zip(rows[fresh][:PLACES].tolist(), firsts[fresh].tolist(), strict=False):
        found.near.places.append(f"{places[row]} ~ {places[first]}")


class _Sample:
    """Texts for a look at their language: those with the lowest hashes, the same ones in every run."""

    def __init__(self) -> None:
        self._held: list[tuple[int, str]] = []

    def add(self, keys: np.ndarray, texts: Iterable[str]) -> None:
        for key, text in zip(keys.tolist(), texts, strict=True):
            item = (-key, text[:_LONGEST_SAMPLE])
            if len(self._held) < _SAMPLED:
                heapq.heappush(self._held, item)
            elif item[0] > self._held[0][0]:
                heapq.heapreplace(self._held, item)

    def languages(self) -> Counter[str]:
        import py3langid

        texts = [text for _, text in self._held if sum(map(str.isalpha, text)) >= 20]
        return Counter(py3langid.classify(text)[0] for text in texts)
