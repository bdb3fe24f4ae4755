"""Texts as hashes of their words and n-grams, many rows at once."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import xxhash

_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u9fff"  # written without spaces: a word each
_WORD = re.compile(rf"[{_IDEOGRAPHS}]|[^\W{_IDEOGRAPHS}]+|[-+*/=<>^%$€£]")
_BASE = np.uint64(0x9E3779B97F4A7C15)
_WORDS_KNOWN = 1 << 20


class Hashed(NamedTuple):
    """Word hashes of several texts one after the other: text i has those from `starts[i]` to `starts[i + 1]`."""

    hashes: np.ndarray  # uint64
    starts: np.ndarray  # int64, one more than texts

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)


class _Known(dict):
    """Word -> xxh3 of it; emptied when it has grown large."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _WORDS_KNOWN:
            self.clear()
        value = self[word] = xxhash.xxh3_64_intdigest(word.encode(errors="surrogatepass"))
        return value


_known = _Known()


def words(text: str) -> list[str]:
    """Words and signs of arithmetic in NFKC, casefolded; punctuation and white space make no difference."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def hash_words(texts: Sequence[str]) -> Hashed:
    hashes, starts = [], np.zeros(len(texts) + 1, dtype=np.int64)
    for number, text in enumerate(texts):
        hashes += map(_known.__getitem__, words(text))
        starts[number + 1] = len(hashes)
    return Hashed(np.array(hashes, dtype=np.uint64), starts)


def wholes(texts: Hashed) -> np.ndarray:
    """A uint64 for all words of each text in their order, 0 for a text without any."""
    found = np.zeros(len(texts.starts) - 1, dtype=np.uint64)
    some = texts.lengths > 0
    if not some.any():
        return found
    place = np.arange(len(texts.hashes)) - np.repeat(texts.starts[:-1], texts.lengths)
    powers = np.cumprod(np.full(texts.lengths.max(), _BASE, dtype=np.uint64))
    found[some] = np.add.reduceat(texts.hashes * powers[place], texts.starts[:-1][some])
    return found


def ngrams(texts: Hashed, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all n-grams of words, and the number of the text that each is in, in order. Shorter texts have none."""
    owners = np.repeat(np.arange(len(texts.starts) - 1), texts.lengths)
    count = max(len(texts.hashes) - n + 1, 0)
    inside = np.arange(count) + n <= texts.starts[1:][owners[:count]]
    rolled = np.zeros(count, dtype=np.uint64)
    for shift in range(n):
        rolled = rolled * _BASE + texts.hashes[shift : shift + count]
    return rolled[inside], owners[:count][inside]
