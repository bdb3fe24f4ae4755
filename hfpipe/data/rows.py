"""Canonical rows: what every source is converted to, and what a sound one looks like.

Plain dicts, where a message is `{"role", "content", "tool_calls"?, "name"?, "weight"?}` (weight 0: not trained):
    text:        {"text"}
    messages:    {"messages", "tools"?}
    preference:  {"prompt", "chosen", "rejected", "tools"?}     lists of messages
    unpaired:    {"prompt", "completion", "label", "tools"?}    label: was the completion good?
    prompt:      {"prompt", "reference"?, "tools"?}             reference: the messages that answer it
Other columns ("answer", "kind", ...) ride along.
"""

from __future__ import annotations

from typing import Any

from hfpipe.errors import NothingUsable

Row = dict[str, Any]
Message = dict[str, Any]

_KEY_OF_KIND = {"preference": "chosen", "unpaired": "completion", "messages": "messages", "text": "text"}
_CONVERSIONS = {
    "preference": ("preference", "unpaired", "messages", "prompt"),
    "unpaired": ("unpaired", "prompt"),
    "messages": ("messages", "prompt"),
}
_HINTS = {
    ("text", ""): " Among conversations, plain documents need `as: text`.",
    (
        "unpaired",
        "messages",
    ): " A `label` says whether an answer is good: rename the column if it means something else.",
    ("messages", "unpaired"): " A judged conversation has a `label`, true or false, beside it.",
}
_MAY_FOLLOW = {
    "start": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "tool call": ("tool",),
    "tool": ("tool", "assistant"),
}
_ROLES = ("system", "user", "assistant", "tool")


def kind_of(row: Row) -> str:
    """The canonical form of a converted row: text, messages, preference, unpaired or prompt."""
    return next((kind for kind, key in _KEY_OF_KIND.items() if key in row), "prompt")


def check_usable(kind: str, wanted: str) -> None:
    """Raise UserError unless rows of canonical form `kind` can be used as `wanted`."""
    usable = _CONVERSIONS.get(kind, (kind,))
    if wanted not in usable:
        hint = _HINTS.get((kind, wanted), _HINTS.get((kind, ""), ""))
        raise NothingUsable(f"its rows are `{kind}`, usable as {' or '.join(usable)}, not as `{wanted}`.{hint}")


def as_form(row: Row, wanted: str) -> Row:
    """A canonical row as another form, where that is well defined; raises UserError where it is not."""
    kind = kind_of(row)
    check_usable(kind, wanted)
    if kind == wanted:
        return row
    rest = {
        key: row[key] for key in row if key not in ("messages", "prompt", "chosen", "rejected", "completion", "label")
    }
    if wanted == "messages":
        return {"messages": row["prompt"] + row["chosen"], **rest}
    prompt = up_to_last_user(row["messages"]) if kind == "messages" else row["prompt"]
    answers = row["messages"][len(prompt) :] if kind == "messages" else row.get("chosen") or []
    told = {"reference": answers} if answers else {}  # before a column of that name
    return {"prompt": prompt, **told, **{key: value for key, value in rest.items() if key not in told}}


def as_forms(row: Row, wanted: str) -> list[Row]:
    """`as_form`, where one row may give several: a preference is two unpaired rows, the better answer and the worse."""
    if wanted != "unpaired" or kind_of(row) != "preference":
        return [as_form(row, wanted)]
    rest = {key: row[key] for key in row if key not in ("chosen", "rejected")}
    return [{**rest, "completion": row[side], "label": side == "chosen"} for side in ("chosen", "rejected")]


def up_to_last_user(messages: list[Message]) -> list[Message]:
    """The messages a model would answer: all up to the user's last turn."""
    last = max((at for at, message in enumerate(messages) if message["role"] == "user"), default=-1)
    return messages[: last + 1]


def row_problem(row: Row) -> str | None:
    """What is wrong with a row's structure: an empty turn, roles out of order, two equal answers."""
    kind = kind_of(row)
    if kind == "text":
        return None if row["text"].strip() else "empty text"
    if kind == "messages":
        return _turns_problem(row["messages"]) or _end_problem(row["messages"], "assistant")
    if kind == "prompt":
        return _turns_problem(row["prompt"]) or _end_problem(row["prompt"], "user", "tool")
    for name in ("chosen", "rejected") if kind == "preference" else ("completion",):
        if problem := _answer_problem(row["prompt"], row[name], name):
            return problem
    return "`chosen` equals `rejected`" if kind == "preference" and row["chosen"] == row["rejected"] else None


def _answer_problem(prompt: list[Message], answer: list[Message], name: str) -> str | None:
    if not answer or answer[0]["role"] != "assistant":
        return f"`{name}` does not start with the assistant"
    if any(message["role"] == "user" for message in answer):
        return f"a user turn inside `{name}`"
    if any(message.get("weight") == 0 for message in answer):
        return f"a turn of weight 0 inside `{name}`, which is compared whole"
    return _turns_problem(prompt + answer) or _end_problem(answer, "assistant")


def _turns_problem(messages: list[Message]) -> str | None:
    before = "start"
    for message in messages:
        role, calls = message["role"], message.get("tool_calls")
        if role not in _ROLES:
            return f"unknown role `{role}`, expected {', '.join(_ROLES[:-1])} or {_ROLES[-1]}"
        if not message["content"].strip() and not calls:
            return f"empty {role} turn"
        if role not in _MAY_FOLLOW[before]:
            return f"roles out of order: {role} after {before}" if before != "start" else f"starts with {role}"
        before = "tool call" if calls else role
    return None


def _end_problem(messages: list[Message], *roles: str) -> str | None:
    if messages and messages[-1]["role"] in roles:
        return None
    return f"does not end with {' or '.join(roles)}"
