"""The forms that users' rows come in, and their conversion to the canonical ones of rows.py."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from hfpipe.data.messages import RowProblem, is_transcript, is_turns, messages_of, read_turns, text_of, tools_of
from hfpipe.data.rows import Message, Row, up_to_last_user
from hfpipe.errors import NothingUsable

_TURNS = "messages|conversations|conversation"
_READ = {"text", "prompt", "completion", "chosen", "rejected", "label", "tools", "system", *_TURNS.split("|")}
_READ |= {"instruction", "input", "output", "history", "question"}
_SAID = {"prompt", "completion", "chosen", "rejected", *_TURNS.split("|")}  # may hold turns
_REFERENCES = ("reference", "answer", "solution", "ground_truth")
_CALCULATION = re.compile(r"<<[^<>\n=]*=\s*[$-]*[\d.,]+\s*>>")  # GSM8K's <<48/2=24>>24
_JUDGEMENTS = ("good", "bad", "yes", "no", "positive", "negative", "chosen", "rejected", "desirable", "undesirable")
_LABELS = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True)
class Form:
    """A form that rows come in; where a key reads `a|b`, a row has either."""

    name: str
    keys: tuple[str, ...]
    gives: str  # text | messages | preference | unpaired | prompt
    build: Callable[[Row], Row]
    test: Callable[[Row], bool] | None = None

    def fits(self, row: Row) -> bool:
        return all(_value(row, key) is not None for key in self.keys) and (self.test is None or self.test(row))

    def convert(self, row: Row) -> Row:
        """The canonical row, with the columns that no form reads; raises RowProblem."""
        row = _with_turns(row)
        for key in self.keys:
            if _value(row, key) is None:
                raise RowProblem(f"no `{key.replace('|', '` or `')}`")
        canonical = self.build(row)
        if self.gives != "text" and (tools := tools_of(row.get("tools"))):
            canonical["tools"] = tools
        return canonical | {key: value for key, value in row.items() if key not in _READ and key not in canonical}


def recognise(row: Row) -> Form | None:
    """The first form of the table that a row fits."""
    row = _with_turns(row)
    return next((form for form in FORMS if form.fits(row)), None)


def recognise_source(rows: Iterable[Row], where: str) -> Form:
    """The form of most of a source's first rows; raises UserError with the keys found and the forms known."""
    rows = list(rows)
    forms = {form.name: form for form in map(recognise, rows) if form}
    if forms:
        seen = Counter(form.name for form in map(recognise, rows) if form)
        return forms[seen.most_common(1)[0][0]]
    found = ", ".join(dict.fromkeys(str(key) for row in rows for key in row)) or "none"
    known = "\n".join(f"  {form.name}: {', '.join(form.keys).replace('|', ' or ')}" for form in FORMS)
    raise NothingUsable(
        f"{where}: rows in no known form. Keys found: {found}. Rename the columns to those of a form:\n{known}"
    )


def _with_turns(row: Row) -> Row:
    return {key: read_turns(value) if key in _SAID else value for key, value in row.items()}


def _value(row: Row, key: str) -> Any:
    return next((row[name] for name in key.split("|") if row.get(name) is not None), None)


def _is_sharegpt(row: Row) -> bool:
    turns = _value(row, _TURNS)
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and bool(turns[0].get("from"))


def _is_labelled(row: Row) -> bool:
    """Whether a label judges the answer, in whatever words: any other text or number is a class of its own."""
    return str(row["label"]).strip().lower() in (*_LABELS, *_JUDGEMENTS)


def _is_judged(row: Row) -> bool:
    """Whether a conversation's label is true or false; a number beside one may be a class of its own."""
    return str(row["label"]).lower() in ("true", "false")


def _are_transcripts(row: Row) -> bool:
    return is_transcript(row["chosen"]) and is_transcript(row["rejected"])


def _are_lists(row: Row) -> bool:
    return isinstance(row["chosen"], list) and isinstance(row["rejected"], list)


# What was asked


def _with_system(row: Row, messages: list[Message]) -> list[Message]:
    system = text_of(row.get("system"))
    return [{"role": "system", "content": system}, *messages] if system.strip() else messages


def _turns(row: Row) -> list[Message]:
    return _with_system(row, messages_of(_value(row, _TURNS)))


def _prompt(row: Row) -> list[Message]:
    messages = messages_of(row["prompt"])
    if len(messages) > 1 and messages[-1] == {"role": "assistant", "content": ""}:
        messages = messages[:-1]  # a transcript that leaves off at "Assistant:"
    return _with_system(row, messages)


def _question(row: Row) -> list[Message]:
    return _with_system(row, messages_of(row["question"]))


def _instruction(row: Row) -> list[Message]:
    history = row.get("history") or []
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
        raise RowProblem("expected `history` as pairs of instruction and output")
    earlier = [
        {"role": role, "content": text_of(said)} for pair in history for role, said in zip(_PAIR, pair, strict=True)
    ]
    asked = [part for part in (text_of(row["instruction"]), text_of(row.get("input"))) if part.strip()]
    return _with_system(row, [*earlier, {"role": "user", "content": "\n\n".join(asked)}])


def _instruction_in_context(row: Row) -> list[Message]:
    return _instruction({**row, "input": row.get("context")})


_PAIR = ("user", "assistant")


def _answer(row: Row, key: str, prompt: list[Message]) -> list[Message]:
    """The answer under `key`, without the prompt that it may repeat."""
    answer = messages_of(row[key], "assistant")
    if answer and answer[0]["role"] != "assistant":
        if answer[: len(prompt)] != prompt:
            raise RowProblem(f"`{key}` neither starts with the assistant nor repeats the prompt")
        return answer[len(prompt) :]
    return answer


# Whole rows


def _text(row: Row) -> Row:
    return {"text": text_of(row["text"])}


def _asked(row: Row) -> Row:
    """A prompt, with what an answer is compared with where a column has it."""
    found = next((row[key] for key in _REFERENCES if row.get(key) not in (None, "", [])), None)
    if found is None or (isinstance(found, list) and not is_turns(found)):  # a list of values is anybody's column
        return {"prompt": _prompt(row)}
    answer = found if isinstance(found, list) else str(found)
    return {"prompt": _prompt(row), "reference": messages_of(answer, "assistant")}


def _conversation(row: Row) -> Row:
    said = _value(row, _TURNS)
    if isinstance(said, str) and not is_transcript(said):
        raise RowProblem("expected a list of turns or its JSON text, found other text", said[:40])
    return {"messages": _turns(row)}


def _solution(row: Row) -> Row:
    answer = _CALCULATION.sub("", text_of(row["answer"]))
    return {"messages": [*_question(row), {"role": "assistant", "content": answer}]}


def _answered(ask: Callable[[Row], list[Message]], key: str) -> Callable[[Row], Row]:
    def build(row: Row) -> Row:
        prompt = ask(row)
        return {"messages": prompt + _answer(row, key, prompt)}

    return build


def _compared(ask: Callable[[Row], list[Message]]) -> Callable[[Row], Row]:
    def build(row: Row) -> Row:
        prompt = ask(row)
        return {"prompt": prompt, **{key: _answer(row, key, prompt) for key in ("chosen", "rejected")}}

    return build


def _compared_whole(row: Row) -> Row:
    """What two conversations share is the prompt."""
    chosen, rejected = (messages_of(row[key], "assistant") for key in ("chosen", "rejected"))
    shared, most = 0, min(len(chosen), len(rejected)) - 1
    while shared < most and chosen[shared] == rejected[shared]:
        shared += 1
    return {
        "prompt": _with_system(row, chosen[:shared]),
        "chosen": chosen[shared:],
        "rejected": rejected[shared:],
    }


def _judged(row: Row) -> Row:
    prompt = _prompt(row)
    return {"prompt": prompt, "completion": _answer(row, "completion", prompt), "label": _label(row)}


def _judged_whole(row: Row) -> Row:
    messages = _turns(row)
    prompt = up_to_last_user(messages)
    return {"prompt": prompt, "completion": messages[len(prompt) :], "label": _label(row)}


def _label(row: Row) -> bool:
    label = str(row["label"]).lower()
    if label not in _LABELS:
        raise RowProblem("`label` is neither true nor false", f"label is {row['label']!r}, expected true or false")
    return _LABELS[label]


_PREFERENCE = ("chosen", "rejected")
FORMS = (  # the first that fits is taken: the more demanding come first
    Form("preference with a prompt", ("prompt", *_PREFERENCE), "preference", _compared(_prompt)),
    Form("preference with a conversation", (_TURNS, *_PREFERENCE), "preference", _compared(_turns)),
    Form("preference with an instruction", ("instruction", *_PREFERENCE), "preference", _compared(_instruction)),
    Form("preference, transcripts", _PREFERENCE, "preference", _compared_whole, _are_transcripts),
    Form("preference, conversations", _PREFERENCE, "preference", _compared_whole, _are_lists),
    Form("preference with a question", ("question", *_PREFERENCE), "preference", _compared(_question)),
    Form("unpaired preference", ("prompt", "completion", "label"), "unpaired", _judged, _is_labelled),
    Form("unpaired preference, conversation", (_TURNS, "label"), "unpaired", _judged_whole, _is_judged),
    Form("alpaca", ("instruction", "output"), "messages", _answered(_instruction, "output")),
    Form("dolly", ("instruction", "response"), "messages", _answered(_instruction_in_context, "response")),
    Form("prompt/completion", ("prompt", "completion"), "messages", _answered(_prompt, "completion")),
    Form("question/answer", ("question", "answer"), "messages", _solution),
    Form("sharegpt", (_TURNS,), "messages", _conversation, _is_sharegpt),
    Form("messages", (_TURNS,), "messages", _conversation),
    Form("prompt", ("prompt",), "prompt", _asked),
    Form("text", ("text",), "text", _text),
)
