"""Which split a file belongs to: decided by its name and those of its folders."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

# Words as in `datasets`, the first or the last of a name; `eval` is test there, and validation here where there is a test beside it.
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
    "eval": ("eval", "evaluation"),
}
_SPLIT_OF = {word: split for split, words in _SPLIT_WORDS.items() for word in words}
_WORD = re.compile(r"[^\W\d_]{2,}")
_SUFFIXES = frozenset(["jsonl", "ndjson", "json", "parquet", "arrow", "csv", "tsv", "txt", "md", "gz"])


def group_by_split(paths: Iterable[Path]) -> dict[str, list[Path]]:
    """Paths by the split that they name themselves after, under "" those that name none."""
    splits: dict[str, list[Path]] = {}
    for path in paths:
        splits.setdefault(_named_split(path) or "", []).append(path)
    if "eval" in splits:
        splits.setdefault("validation" if "test" in splits else "test", []).extend(splits.pop("eval"))
    return splits


def split_name(path: Path) -> str | None:
    """The split that a path names itself after: `data/test-00000.jsonl` and `mine_test.jsonl` are test."""
    name = _named_split(path)
    return "test" if name == "eval" else name


def begins_with_split(path: Path) -> bool:
    """Whether a name's first word is a split's: `validation-2.jsonl`."""
    return any(_WORD.findall(part.lower())[:1] and _WORD.findall(part.lower())[0] in _SPLIT_OF for part in path.parts)


def _named_split(path: Path) -> str | None:
    """Of the first part that ends or begins with a split's word: `train_test_split_test.jsonl` is test."""
    for part in path.parts:
        words = _WORD.findall(part.lower())
        while words and words[-1] in _SUFFIXES:
            words.pop()
        if found := next((_SPLIT_OF[word] for word in (*words[-1:], *words[:1]) if word in _SPLIT_OF), None):
            return found
    return None
