"""How much a source holds, without reading it: rows known by their generator, or reckoned from a file's size and its first rows."""

from __future__ import annotations

import functools
import itertools
import json
from dataclasses import dataclass, replace
from typing import Any

from hfpipe.data.readers import files_of
from hfpipe.data.sources import is_hub_id, load_source, local_path
from hfpipe.errors import UserError

_SAMPLED = 400  # rows that are looked at
_SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}  # of files without splits of their own


@dataclass(frozen=True)
class Size:
    """Of one source and split: `rows` None where nothing is known; bytes and messages are means of the first rows."""

    rows: int | None
    exact: bool
    bytes_per_row: float = 0.0  # of what is said, in UTF-8
    messages_per_row: float = 0.0
    answers_per_row: float = 1.0  # whole conversations that a row is read as: two of a preference
    sample: tuple[tuple[int, int], ...] = ()  # (bytes, messages) of the first rows


def estimate_size(source: Any, wanted: str | None, split: str, seed: int) -> Size:
    """What is known of a source before it is read: no more of a file than its first rows."""
    generated = source.path.startswith("tinyworld/")
    try:
        if is_hub_id(source.path):
            return Size(source.limit, exact=False)
        if generated:  # asked for by several stages, and never another
            first = replace(source, limit=min(source.limit or _SAMPLED, _SAMPLED), weight=None)
            number, means = _look_again(first, wanted, split, seed)
        else:
            loaded = load_source(source, wanted=wanted, split=split, seed=seed)
            number, means = _look(loaded)
    except UserError:  # told with its reason when the source is checked; or a file that is made on the way
        return Size(None, exact=False)
    if number < _SAMPLED:
        return Size(number, True, **means)
    if generated:
        return Size(_generated(source, source.split or split), True, **means)
    count = _reckon(source, source.split or split, loaded)
    return Size(min(count, source.limit or count), False, **means)


def _look(loaded: Any) -> tuple[int, dict[str, Any]]:
    """How many of the first rows there are, and what they say."""
    rows = list(itertools.islice(loaded.rows(), _SAMPLED))
    sample = tuple((_said(row), len(_messages(row))) for row in rows)
    return len(rows), {
        "bytes_per_row": _mean(size for size, _ in sample),
        "messages_per_row": _mean(count for _, count in sample),
        "answers_per_row": 2.0 if rows and "chosen" in rows[0] else 1.0,
        "sample": sample,
    }


@functools.cache
def _look_again(source: Any, wanted: str | None, split: str, seed: int) -> tuple[int, dict[str, Any]]:
    return _look(load_source(source, wanted=wanted, split=split, seed=seed))


def _generated(source: Any, split: str) -> int:
    from hfpipe.data.tinyworld import HELD_OUT_SIZES, TRAIN_SIZES

    name = source.path.removeprefix("tinyworld/")
    sizes = {"train": TRAIN_SIZES[name]}
    held_out = HELD_OUT_SIZES[name]
    if source.limit:
        return source.limit
    return sizes.get(split, held_out) if split != "all" else sizes["train"] + 2 * held_out


def _reckon(source: Any, split: str, loaded: Any) -> int:
    """Rows by the bytes of the files and those that a row took among the first."""
    files = files_of(local_path(source.path))
    own = "all" not in files
    chosen = files[split] if own and split != "all" else [file for group in files.values() for file in group]
    raw = [len(json.dumps(at.row, ensure_ascii=False).encode()) for at in loaded.head()]
    share = 1.0 if own or split == "all" else _SHARES[split]
    return max(1, round(sum(file.stat().st_size for file in chosen) / _mean(raw) * share))


def _messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    found = [*row.get("messages", ()), *row.get("prompt", ())]
    answers = [row[key] for key in ("chosen", "rejected", "completion") if key in row]
    for answer in answers:
        found += answer
    return found + (row.get("prompt", []) if len(answers) == 2 else [])  # a pair's prompt is read with both


def _said(row: dict[str, Any]) -> int:
    if "text" in row:
        return len(row["text"].encode())
    parts = [m.get("content") or "" for m in _messages(row)]
    calls = [json.dumps(m["tool_calls"]) for m in _messages(row) if m.get("tool_calls")]
    return sum(len(part.encode()) for part in (*parts, *calls))


def _mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values) if values else 0.0
