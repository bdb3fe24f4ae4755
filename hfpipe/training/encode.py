"""Canonical rows -> token ids with labels; a row that cannot be trained on is counted, never dropped silently."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from hfpipe.data.report import SourceReport
from hfpipe.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 1000


def encode_rows(
    rows: Iterable[tuple[str, dict]],
    report: SourceReport,
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> Iterator[tuple[dict[str, Any], dict[str, list[int]]]]:
    """Each row, its control tokens neutralised, with its token ids and labels.

    Rows that cannot be trained on are counted and left out. A text longer than `max_length` gives several.
    """
    from hfpipe.training.shards import holds_ids
    from hfpipe.training.templates import hides_reasoning, neutralise_row, special_strings

    special = special_strings(tokenizer)
    encode = _ENCODERS[kind]
    rows = iter(rows)
    while chunk := list(itertools.islice(rows, _CHUNK)):
        if encode is _encode_text and holds_ids(chunk[0][1], tokenizer, report.path):
            encode = _prepared_text
        clean = []
        for _, row in chunk:
            row, changed = neutralise_row(row, special)
            report.neutralised += changed
            clean.append(row)
        ids = _one_by_one_on_error(encode, tokenizer, clean)
        for (place, _), row, encoded in zip(chunk, clean, ids, strict=True):
            problem = encoded if isinstance(encoded, str) else _problem(encoded, kind, max_length)
            if problem:
                report.leave_out(place, problem)
                continue
            report.used += 1
            report.tokens += count_tokens(encoded)
            report.trained_tokens += count_trained(encoded)
            report.cut += kind == "text" and count_tokens(encoded) > max_length
            report.reasoning_hidden += any(
                hides_reasoning(tokenizer, talk, row.get("tools")) for talk in _conversations(row, kind)
            )
            for piece in _pieces(encoded, max_length) if kind == "text" else (encoded,):
                yield row, piece


def _one_by_one_on_error(encode: Callable, tokenizer: Any, rows: list[dict]) -> list[dict | str]:
    """A batch at once; where the template refuses a row of it, each alone, with the reason in that row's place."""
    try:
        return encode(tokenizer, rows)
    except UserError:
        encoded: list[dict | str] = []
        for row in rows:
            try:
                encoded += encode(tokenizer, [row])
            except UserError as error:
                encoded.append(str(error).removeprefix("Row 0: "))
        return encoded


def _conversations(row: dict, kind: str) -> list[list[dict]]:
    """What the chat template is given of a row, answers included."""
    if kind in ("text", "messages"):
        return [row["messages"]] if kind == "messages" else []
    answers = [row[key] for key in ("chosen", "rejected", "completion") if key in row]
    return [[*row["prompt"], *answer] for answer in answers or [[]]]


def _encode_text(tokenizer: PreTrainedTokenizerBase, rows: list[dict]) -> list[dict]:
    from hfpipe.training.tokenizers import encode_text

    ids = encode_text(tokenizer, [row["text"] for row in rows])
    return [{"input_ids": i, "labels": i, "seq_lengths": [len(i)]} for i in ids]


def _prepared_text(tokenizer: PreTrainedTokenizerBase, rows: list[dict]) -> list[dict]:
    return [{"input_ids": i, "labels": i, "seq_lengths": [len(i)]} for i in (row["input_ids"] for row in rows)]


def _pieces(encoded: dict, max_length: int) -> Iterator[dict]:
    ids = encoded["input_ids"]
    for start in range(0, len(ids), max_length):
        piece = ids[start : start + max_length]
        yield {"input_ids": piece, "labels": piece, "seq_lengths": [len(piece)]}


def _encode_messages(tokenizer: PreTrainedTokenizerBase, rows: list[dict]) -> list[dict]:
    from hfpipe.training.templates import encode_batch

    return [
        {
            "input_ids": ids,
            "labels": [token if trained else -100 for token, trained in zip(ids, mask, strict=True)],
            "seq_lengths": [len(ids)],
        }
        for ids, mask in encode_batch(tokenizer, rows)
    ]


def _encode_pairs(tokenizer: PreTrainedTokenizerBase, rows: list[dict]) -> list[dict]:
    from hfpipe.training.templates import encode_preferences

    return [pair._asdict() for pair in encode_preferences(tokenizer, rows)]


def _encode_unpaired(tokenizer: PreTrainedTokenizerBase, rows: list[dict]) -> list[dict]:
    from hfpipe.training.templates import encode_completions, encode_prompts

    prompts = encode_prompts(tokenizer, rows)
    answers = encode_completions(tokenizer, rows, prompts, "completion")
    return [
        {"prompt_ids": prompt, "completion_ids": answer, "label": row["label"]}
        for row, prompt, answer in zip(rows, prompts, answers, strict=True)
    ]


def _encode_asked(tokenizer: PreTrainedTokenizerBase, rows: list[dict]) -> list[dict]:
    from hfpipe.training.templates import encode_prompts

    asked = encode_prompts(tokenizer, rows)
    return [{"prompt_ids": ids, "row": json.dumps(row, default=str)} for row, ids in zip(rows, asked, strict=True)]


_ENCODERS: dict[str, Callable[..., list[dict]]] = {
    "text": _encode_text,
    "messages": _encode_messages,
    "preference": _encode_pairs,
    "unpaired": _encode_unpaired,
    "prompt": _encode_asked,
}


def _problem(row: dict, kind: str, max_length: int) -> str | None:
    """Why an encoded row cannot be trained on, or None."""
    if kind == "text":
        return None if len(row["input_ids"]) > 1 else "empty text"
    longest = (
        count_tokens(row) if kind == "messages" else len(row["prompt_ids"]) + max(map(len, _answers(row)), default=0)
    )
    if longest > max_length:
        return f"longer than max_length {max_length}"
    if kind in ("preference", "unpaired", "prompt"):
        return None
    trained = count_trained(row)
    if not trained:
        return "nothing of it is trained: no assistant's words, or all of weight 0"
    return "all of it is trained: no prompt" if trained == count_tokens(row) else None


def _answers(row: dict) -> list[list[int]]:
    return [row[name] for name in ("chosen_ids", "rejected_ids", "completion_ids") if name in row]


def count_tokens(row: dict) -> int:
    """Tokens of an encoded row, of all its answers."""
    if "input_ids" in row:
        return len(row["input_ids"])
    return sum(len(row["prompt_ids"]) + len(answer) for answer in _answers(row) or [[]])


def count_trained(row: dict) -> int:
    """Those of them that are trained."""
    return sum(label != -100 for label in row["labels"]) if "labels" in row else sum(map(len, _answers(row)))
