"""Messages out of users' texts, transcripts and turns, in either dialect (role/content, from/value)."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

from hfpipe.data.rows import Message

_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function": "tool"}
_DIALECTS = (("role", "content"), ("role", "tool_calls"), ("from", "value"))
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


class RowProblem(ValueError):
    """A row that does not fit its source's form; `reason` is worded alike for all rows with that fault."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def text_of(value: Any) -> str:
    """The text of a content: a string, a list of text parts, or nothing."""
    if isinstance(value, list):
        value = "".join(_text_part(part) for part in value)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowProblem(f"expected text, found {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowProblem("half of a surrogate pair in a text") from None
    return value


def _text_part(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise RowProblem(f"expected text, found a content part of type `{kind}`")
    return part["text"]


def messages_of(value: Any, role: str = "user") -> list[Message]:
    """Messages of a text said by `role`, a whole transcript, one turn, or a list of turns; empty system turns go."""
    if is_transcript(value):
        return _transcript(value)
    if isinstance(value, str):
        return [{"role": role, "content": text_of(value)}]
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list):
        raise RowProblem(f"expected turns or text, found {type(value).__name__}")
    messages = [_message(turn) for turn in turns]
    roles = [message["role"] for message in messages]
    if roles[:1] == ["developer"] and "system" not in roles:
        messages[0]["role"] = "system"
    return _matched([message for message in messages if message["role"] != "system" or message["content"].strip()])


def read_turns(value: Any) -> Any:
    """The turns of a JSON text, as a cell of csv or parquet holds them; anything else, other JSON too, as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        turns = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return turns if is_turns(turns) else value


def is_turns(value: Any) -> bool:
    """Whether a list holds turns, and nothing else."""
    return bool(value) and all(_is_turn(turn) for turn in value)


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and any(turn.get(role) and said in turn for role, said in _DIALECTS)


def is_transcript(value: Any) -> bool:
    r"""Whether a text is a dialogue of `\n\nHuman:` and `\n\nAssistant:`."""
    return isinstance(value, str) and value.lstrip().startswith("Human:") and "\n\nAssistant:" in value


def _transcript(text: str) -> list[Message]:
    _, *parts = _SPEAKER.split(text_of(text))
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": _SPEAKERS[speaker], "content": said.strip()} for speaker, said in turns]


def _message(turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise RowProblem(f"expected a turn with role and content, found {type(turn).__name__}")
    role, content = (
        (turn.get("from"), turn.get("value")) if turn.get("from") else (turn.get("role"), turn.get("content"))
    )
    if not isinstance(role, str | None):
        raise RowProblem(f"expected a role as text, found {type(role).__name__}")
    if role == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _tool_calls(content), **_untrained(turn)}
    message = {"role": _ROLES.get(role, role), "content": text_of(content)}
    if message["role"] == "assistant":
        message |= _untrained(turn)
    called = turn.get("function_call")  # before OpenAI had tools; a table's rows have it empty, too
    if calls := turn.get("tool_calls") or (called if isinstance(called, dict) and called.get("name") else None):
        message["tool_calls"] = _tool_calls(calls)
    if (reasoning := text_of(turn.get("reasoning_content") or turn.get("thinking"))).strip():  # the latter is gpt-oss's
        message["reasoning_content"] = reasoning
    return message | {key: turn[key] for key in ("name", "tool_call_id") if turn.get(key)}


def _matched(messages: list[Message]) -> list[Message]:
    """The messages, the results of calls made at once in the order of the calls, where all have ids."""
    found: list[Message] = []
    for is_result, group in itertools.groupby(messages, key=lambda message: message["role"] == "tool"):
        turns = list(group)
        calls = found[-1].get("tool_calls", []) if found else []
        order = [str(call.get("id") or "") for call in calls]
        answered = [str(turn.get("tool_call_id") or "") for turn in turns]
        if is_result and order and all(order):
            if len(order) > 1 and (unknown := next((name for name in answered if name and name not in order), None)):
                raise RowProblem("a tool's result for no call before it", f"no call has the id {unknown}")
            if len(set(order)) == len(order) and sorted(answered) == sorted(order):
                turns = [turns[answered.index(name)] for name in order]
        found += turns
    return found


def _untrained(turn: dict) -> dict:
    """`weight: 0` where a turn of the assistant is left out of the loss, in OpenAI's words (weight) or others' (train)."""
    for key, known in (("weight", "0 or 1"), ("train", "true or false")):
        if turn.get(key) is not None and turn[key] not in (0, 1):
            raise RowProblem(f"expected `{key}` of an assistant's turn as {known}", f"found {turn[key]!r}")
    return {"weight": 0} if 0 in (turn.get("weight"), turn.get("train")) else {}


def _tool_calls(value: Any) -> list[dict]:
    calls = _json(value, "tool call") if isinstance(value, str) else value
    return [_tool_call(call) for call in (calls if isinstance(calls, list) else [calls])]


def _tool_call(call: Any) -> dict:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowProblem("a tool call without a name")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str) and arguments.lstrip().startswith("{"):
        arguments = _json(arguments, "tool call")
    if not isinstance(arguments, dict | str):
        raise RowProblem(f"expected a tool call's arguments as an object or text, found {type(arguments).__name__}")
    identity = {"id": call["id"]} if call.get("id") else {}
    return {**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def tools_of(value: Any) -> list[dict]:
    """The tools offered, as JSON schemas, from a list or its JSON text."""
    tools = _json(value, "tools") if isinstance(value, str) and value.strip() else value or []
    if not isinstance(tools, list):
        raise RowProblem(f"expected `tools` as a list, found {type(tools).__name__}")
    return [_tool(tool) for tool in tools]


def _tool(tool: Any) -> dict:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowProblem("a tool without a name")
    return {"type": "function", "function": function}


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowProblem(f"malformed {what} JSON", str(error)) from None
