"""Which split a row belongs to: decided by its text alone, so that no prompt is in two splits, whatever the file."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata

from hfpipe.data.rows import Row, kind_of

SPLITS = ("train", "validation", "test")
_UP_TO = {"train": 0.8, "validation": 0.9, "test": 1.0}
_PUNCTUATION = re.compile(r"[^\w\s]|_")


def normalise(text: str) -> str:
    """The text in NFKC and casefolded, without punctuation and symbols, its white space collapsed."""
    return " ".join(_PUNCTUATION.sub("", _folded(text)).split())


def split_key(row: Row) -> str:
    """What a row is about, normalised: a text, or the user's first message.

    Not the system prompt or what follows, so that SFT and DPO rows on one question land in one split.
    """
    if kind_of(row) == "text":
        return normalise(row["text"])
    messages = row["messages"] if "messages" in row else row["prompt"]
    first = next((m["content"] for m in messages if m["role"] == "user"), None)
    return normalise(" ".join(m["content"] for m in messages) if first is None else first)


def split_of(row: Row) -> str:
    """train (80%), validation (10%) or test (10%) by a hash of `split_key`; the same row always the same one."""
    return split_of_text(split_key(row))


def split_of_text(text: str) -> str:
    share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
    return next(split for split, up_to in _UP_TO.items() if share < up_to)


def digest(row: Row) -> bytes:
    """A hash of all that a row says, but for case and white space (`7 - 2` is not `7 + 2`)."""
    parts = [row.get("text", ""), str(row.get("label")), json.dumps(row.get("tools"))]
    for key in ("messages", "prompt", "chosen", "rejected", "completion"):
        parts.append(key)
        for message in row.get(key, ()):
            parts += [message["role"], message["content"], json.dumps(message.get("tool_calls"))]
            parts += [message.get("reasoning_content", ""), str(message.get("weight"))]
    said = "\x1f".join(" ".join(_folded(part).split()) for part in parts)
    return hashlib.sha256(said.encode()).digest()[:16]


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()
