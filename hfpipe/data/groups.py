"""Rows that are equal or nearly so, found in one pass and in bounded memory: what is too much waits in files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rensa import RMinHash

from hfpipe.data.shingles import Hashed, ngrams

_FILES = 64
_PAIR = np.dtype([("key", np.uint64), ("row", np.int64)])
_PERMUTATIONS, _BANDS, _SHINGLE, _SEED = 128, 16, 5, 1
SIMILAR = 0.8  # estimated share of word 5-grams that two near duplicates have in common


class Groups:
    """Rows by a 64-bit key. At most `limit` pairs (16 bytes each) are held, and one file of 64 is read at a time."""

    def __init__(self, limit: int = 1 << 20):
        self.rows = 0
        self._limit, self._held, self._waiting = limit, 0, []
        self._folder = tempfile.TemporaryDirectory(prefix="hfpipe-")
        self._files: list[Path] = []

    def add(self, keys: np.ndarray, rows: np.ndarray) -> None:
        """`keys`: uint64, `rows`: numbers that rise from call to call."""
        pairs = np.empty(len(keys), dtype=_PAIR)
        pairs["key"], pairs["row"] = keys, rows
        self._waiting.append(pairs)
        self._held += len(pairs)
        self.rows += len(pairs)
        if self._held > self._limit:
            self._put_away()

    def _put_away(self) -> None:
        if not self._waiting:
            return
        self._files = self._files or [Path(self._folder.name) / str(number) for number in range(_FILES)]
        pairs = np.concatenate(self._waiting)
        target = pairs["key"] % np.uint64(_FILES)
        for number, file in enumerate(self._files):
            with file.open("ab") as stream:
                pairs[target == number].tofile(stream)
        self._waiting, self._held = [], 0

    def repeats(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(rows, the first row of the same key for each), without the firsts themselves; in parts."""
        if self._files:
            self._put_away()
        held = np.concatenate(self._waiting) if self._waiting else np.empty(0, dtype=_PAIR)
        for pairs in (np.fromfile(file, dtype=_PAIR) for file in self._files) if self._files else [held]:
            pairs = np.sort(pairs, order=("key", "row"))
            begins = np.ones(len(pairs), dtype=bool)
            begins[1:] = pairs["key"][1:] != pairs["key"][:-1]
            firsts = pairs["row"][begins][np.cumsum(begins) - 1]
            yield pairs["row"][~begins], firsts[~begins]


class NearDuplicates:
    """MinHash with banding: rows that share a band of their signatures are held against the band's first row.

    Signatures (512 bytes a row) lie in a file. A row counts once, with the first row that it is found to be like.
    """

    def __init__(self, limit: int = 1 << 20):
        self._groups = Groups(limit)
        self._file = tempfile.TemporaryFile(prefix="hfpipe-")  # noqa: SIM115
        self._numbers: list[np.ndarray] = []

    def add(self, texts: Hashed, rows: np.ndarray) -> None:
        """`rows`: numbers that rise from call to call, one a text; texts of fewer than 5 words are passed over."""
        shingles, owners = ngrams(texts, _SHINGLE)
        long = np.unique(owners)
        if not len(long):
            return
        ends = np.cumsum(np.bincount(owners, minlength=len(rows))[long])
        offsets = np.concatenate([[0], ends]).astype(np.uint64)
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(shingles, offsets, _PERMUTATIONS, _SEED)
        signatures = np.array(matrix.to_rows(), dtype=np.uint32)
        self._file.seek(0, 2)
        signatures.tofile(self._file)
        places = np.arange(len(long)) + sum(map(len, self._numbers))
        self._numbers.append(rows[long].astype(np.int64))
        width = _PERMUTATIONS // _BANDS
        for band in range(_BANDS):
            part = signatures[:, band * width : (band + 1) * width].astype(np.uint64)
            keys = np.full(len(part), band + 1, dtype=np.uint64)
            for column in part.T:
                keys = (keys ^ column) * np.uint64(0x9E3779B97F4A7C15)
                keys ^= keys >> np.uint64(29)
            self._groups.add(keys, places)

    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """(rows, an earlier row that each is like), by row."""
        if not self._numbers:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        numbers = np.concatenate(self._numbers)
        self._file.flush()
        signatures = np.memmap(self._file, dtype=np.uint32, mode="r", shape=(len(numbers), _PERMUTATIONS))
        like = np.full(len(numbers), len(numbers), dtype=np.int64)
        for rows, firsts in self._groups.repeats():
            for start in range(0, len(rows), 10_000):
                row, first = rows[start : start + 10_000], firsts[start : start + 10_000]
                alike = (signatures[row] == signatures[first]).mean(axis=1) >= SIMILAR
                np.minimum.at(like, row[alike], first[alike])
        found = np.flatnonzero(like < len(numbers))
        return numbers[found], numbers[like[found]]
