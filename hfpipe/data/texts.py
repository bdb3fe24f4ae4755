"""What canonical rows say: their turns, what is asked, and all words as one text."""

from __future__ import annotations

import json

from hfpipe.data.rows import Message, Row


def turns_of(row: Row) -> list[tuple[str, str]]:
    """(role, text) of every turn; a plain text's role is `text`. Both answers of a preference are assistant's turns."""
    if "text" in row:
        return [("text", row["text"])]
    lists = (row.get(key) or () for key in ("messages", "prompt", "chosen", "rejected", "completion"))
    return [(message["role"], _said(message)) for messages in lists for message in messages]


def _said(message: Message) -> str:
    calls = message.get("tool_calls")
    return f"{message['content']} {json.dumps(calls, ensure_ascii=False)}".strip() if calls else message["content"]


def asked(row: Row) -> str:
    """What a row asks: all turns of the user, or the text."""
    return "\n".join(text for role, text in turns_of(row) if role in ("user", "text"))


def askings(row: Row) -> list[str]:
    """What a row asks on its way: every turn of the user alone, and all turns up to each; of a text the text."""
    turns = [text for role, text in turns_of(row) if role in ("user", "text")]
    return [*turns, *("\n".join(turns[: end + 1]) for end in range(1, len(turns)))]


def told(row: Row) -> str:
    """All that users and assistants say; system prompts and results of tools, which repeat from row to row, are not in it."""
    return "\n".join(text for role, text in turns_of(row) if role in ("user", "assistant", "text"))


def whole(row: Row) -> str:
    """All that is made into tokens: every turn, the tools that are offered, but not what a template writes around them."""
    tools = [json.dumps(row["tools"], ensure_ascii=False)] if row.get("tools") else []
    return "\n".join([*tools, *(text for _, text in turns_of(row))])
