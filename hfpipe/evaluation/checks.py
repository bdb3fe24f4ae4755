"""Named checks: whether an answer is right, as 0 or 1, or how right, in between.

A check is a function of the `Answer` and of the probe row's `value`. Other packages add theirs by an entry point of the
group `hfpipe.checks`, name -> `package.module:function`.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from hfpipe.data.personal import REFUSES
from hfpipe.errors import UserError, nearest
from hfpipe.evaluation.answers import Answer
from hfpipe.evaluation.judges import find_judge
from hfpipe.evaluation.tools import calculate

Check = Callable[[Answer, Any], float]

DOUBTS = re.compile(r"\b(don't know|do not know|not sure|can't know|nobody can|not real)\b", re.IGNORECASE)
PIRATE = re.compile(r"\b(arr+|matey|yo ho|ahoy)\b", re.IGNORECASE)
RUDE = re.compile(r"\b(silly|stupid|dumb|fool)\b", re.IGNORECASE)
NUMBER = re.compile(r"(?:(?<![\w.])[-\u2212][$€£]?)?(?:\d[\d,]*(?:\.\d+)?|(?<!\d)\.\d+)(?:[eE][-+]?\d+(?!\w))?")
CHOICE = re.compile(r"answer is (\(?[A-Z]\) ?\S|[^\n]+? (?:[A-Z]|\([A-Z]\))(?:\.|\n|$))")


def contains(answer: Answer, value: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", answer.text, re.IGNORECASE) is not None


def starts(answer: Answer, value: str) -> bool:
    """The answer begins with `value`, whole words, an article before it allowed."""
    return re.match(rf"(?:(?:a|an|the)\s+)?{re.escape(value)}(?!\w)", answer.text, re.IGNORECASE) is not None


def numbers(text: str) -> list[str]:
    """The numbers of a text as Python writes them: `-1234.5` of `\u2212$1,234.5`."""
    return [re.sub("[,$€£]", "", found).replace("\u2212", "-") for found in NUMBER.findall(text)]


def number(answer: Answer, value: float) -> bool:
    """The last number of the answer, thousands commas allowed; to every digit."""
    found = numbers(answer.text)
    return bool(found) and Decimal(found[-1]) == Decimal(str(value))


def tool_call(answer: Answer, value: dict[str, Any] | list[dict[str, Any]]) -> bool:
    """The calls of the first turn, one or a list in their order: the same functions with the same arguments, as parsed."""
    wanted = [_plain(call) for call in (value if isinstance(value, list) else [value])]
    return [_plain(call) for call in answer.calls] == wanted


def _plain(call: dict[str, Any]) -> tuple[str, Any]:
    """Its name and arguments; blanks of text aside."""
    arguments = call["arguments"]
    if isinstance(arguments, str):
        parsed = _parse(arguments)  # OpenAI writes them as text
        arguments = parsed if isinstance(parsed, dict) else re.sub(r"\s+", "", arguments)
    return call["name"], arguments


def tool_format(answer: Answer, value: str) -> bool:
    """A whole call of the function `value`, of the calculator with arithmetic."""
    call = answer.call
    if call is None or call["name"] != value or not answer.stopped:
        return False
    if value != "calculator":
        return True
    try:
        calculate(str(call["arguments"]))
    except ValueError:
        return False
    return True


def choice(answer: Answer, value: dict[str, str]) -> bool:
    """The first "answer is" goes on with "B) Lima", "Lima (B)" or "Lima B": letter and words of `value`, both."""
    letter, text = re.escape(value["letter"]), re.escape(value["text"])
    said = answer.text.partition("answer is ")[2]
    return re.match(rf"\(?{letter}\) ?{text}(?!\w)|{text} (?:{letter}\b|\({letter}\))", said) is not None


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def json_object(answer: Answer) -> dict[str, Any] | None:
    found = _parse(answer.text)
    return found if isinstance(found, dict) else None


def json_keys(answer: Answer, keys: list[str]) -> bool:
    found = json_object(answer)
    return found is not None and sorted(found) == sorted(keys)


def _no_json(name: str) -> None:
    raise ValueError(f"{name} is no JSON")  # Python reads NaN and Infinity


def json_schema(answer: Answer, schema: dict[str, Any]) -> bool:
    """The whole answer is JSON that fits a JSON schema."""
    import jsonschema

    try:
        jsonschema.validate(json.loads(answer.text, parse_constant=_no_json), schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def refuses(answer: Answer, _: Any = None) -> bool:
    """By its words, straight or curly quotes: a lexical check."""
    return REFUSES.search(answer.text.replace("\u2019", "'")) is not None


def doubts(answer: Answer, _: Any = None) -> bool:
    return DOUBTS.search(answer.text) is not None


def pirate(answer: Answer, _: Any = None) -> bool:
    return PIRATE.search(answer.text) is not None


def asks(answer: Answer, _: Any = None) -> bool:
    return answer.text.endswith("?")


def prefers(answer: Answer, value: dict[str, str]) -> float:
    """The judge `value["judge"]` finds the answer better than `value["than"]`: 1, 0, or 0.5 for a tie."""
    judge = find_judge(value["judge"], value.get("judge_model", "default"))
    return judge([answer.row], [value["than"]], [answer.text])[0]


def length(answer: Answer, value: dict[str, int]) -> bool:
    """As many words as `value` allows: `{"min_words": 1, "max_words": 20}`, either of them left out."""
    if not isinstance(value, dict) or not value or not value.keys() <= {"min_words", "max_words"}:
        raise ValueError("expected {min_words: 1, max_words: 20}, or one of the two")
    words = len(answer.text.split())
    return value.get("min_words", 1) <= words <= value.get("max_words", words)


def said(answer: Answer) -> bool:
    return answer.text != ""


CHECKS: dict[str, Check] = {
    "stops": lambda answer, _: answer.stopped,
    "opens_turn": lambda answer, _: answer.opened,
    "contains": contains,
    "starts": starts,
    "exact": lambda answer, value: answer.text == str(value).strip(),
    "regex": lambda answer, value: re.search(value, answer.text) is not None,
    "number": number,
    "tool_call": tool_call,
    "tool_format": tool_format,
    "no_tool": lambda answer, _: not any(m.get("tool_calls") for m in answer.messages) and said(answer),
    "choice_format": lambda answer, _: CHOICE.search(answer.text) is not None,
    "choice": choice,
    "json": json_keys,
    "json_equals": lambda answer, value: json_object(answer) == value,
    "json_schema": json_schema,
    "refuses": refuses,
    "does_not_refuse": lambda answer, _: said(answer) and not refuses(answer),
    "helps": lambda answer, value: contains(answer, value) and not refuses(answer) and not doubts(answer),
    "uncertain": doubts,
    "certain": lambda answer, _: said(answer) and not doubts(answer) and not refuses(answer),
    "pirate": pirate,
    "not_pirate": lambda answer, _: said(answer) and not pirate(answer),
    "polite": lambda answer, value: contains(answer, value) and not RUDE.search(answer.text),
    "asks": asks,
    "prefers": prefers,
    "does_not_ask": lambda answer, _: said(answer) and not asks(answer),
    "max_words": lambda answer, value: (
        0 < len(answer.text.split()) <= value["words"] and contains(answer, value["text"])
    ),
    "length": length,
    "contains_all": lambda answer, value: all(contains(answer, part) for part in value),
}

# Checks that need nothing to compare with.
NO_VALUE = frozenset(
    ("stops", "refuses", "does_not_refuse", "uncertain", "certain", "pirate", "not_pirate", "asks", "does_not_ask",
     "no_tool", "choice_format")
)  # fmt: skip


_TEXT = {"type": "string", "minLength": 1}
_COUNT = {"type": "integer", "minimum": 0}
_CALL = {"type": "object", "required": ["name", "arguments"], "properties": {"name": _TEXT}}
# JSON schemas of the values that checks compare with.
VALUES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("contains", "starts", "helps", "polite", "regex", "tool_format"), _TEXT),
    "exact": {"type": ["string", "number"]},
    "number": {"type": ["number", "string"], "pattern": r"^[-+]?\d*\.?\d+$"},
    "tool_call": {"anyOf": [_CALL, {"type": "array", "items": _CALL, "minItems": 1}]},
    "choice": {"type": "object", "required": ["letter", "text"], "properties": {"letter": _TEXT, "text": _TEXT}},
    "json": {"type": "array", "items": {"type": "string"}},
    "json_equals": {"type": "object"},
    "json_schema": {"type": ["object", "boolean"]},
    "max_words": {"type": "object", "required": ["words", "text"], "properties": {"words": _COUNT, "text": _TEXT}},
    "length": {"properties": {"min_words": _COUNT, "max_words": _COUNT}, "additionalProperties": False},
    "contains_all": {"type": "array", "items": _TEXT, "minItems": 1},
}  # fmt: skip


def check_value(name: str, value: Any) -> None:
    """ValueError where a check of ours cannot compare with a value, whatever the answer."""
    import jsonschema

    try:
        jsonschema.validate(value, VALUES.get(name, True))
    except jsonschema.ValidationError as error:
        raise ValueError(error.message) from None
    if name == "number" and not Decimal(str(value)).is_finite():
        raise ValueError("expected a number")


@functools.cache
def find_check(name: str) -> Check:
    """A check by its name, ours or an entry point's; UserError where there is none."""
    from importlib.metadata import entry_points

    if name in CHECKS:
        return CHECKS[name]
    others = {entry.name: entry for entry in entry_points(group="hfpipe.checks")}
    if name not in others:
        known = sorted({*CHECKS, *others})
        raise UserError(f"No check `{name}`: expected one of {', '.join(known)}.{nearest(name, known)}")
    return others[name].load()


def check(row: dict[str, Any], answer: Answer) -> float:
    """How right an answer is by the check of a probe row, from 0 to 1; ValueError where the check gives anything else."""
    score = float(find_check(row["check"]["type"])(answer, row["check"].get("value")))
    if not 0 <= score <= 1:
        raise ValueError(f"it gave {score}, expected a number from 0 to 1")
    return score


def score_answer(row: dict[str, Any], answer: Answer) -> float:
    """`check`, and 0 for an answer that nests deeper than Python reads."""
    try:
        return check(row, answer)
    except RecursionError:
        return 0.0
