"""Which split a file belongs to: decided by its name and those of its folders."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

# Whole words, as in `datasets`; `eval` is test there, and validation here where there is a test beside it.
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
    "eval": ("eval", "evaluation"),
}
_SPLIT_OF = {word: split for split, words in _SPLIT_WORDS.items() for word in words}
_SPLIT_WORD = re.compile(rf"(?<![^\W\d_])({'|'.join(_SPLIT_OF)})(?![^\W\d_])")


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


def _named_split(path: Path) -> str | None:
    """Of the first part with a split's word its last one: `train_test_split_test.jsonl` is test."""
    words = (_SPLIT_WORD.findall(part.lower()) for part in path.parts)
    return next((_SPLIT_OF[found[-1]] for found in words if found), None)
