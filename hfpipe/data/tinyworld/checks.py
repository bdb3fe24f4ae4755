"""What counts as a right answer to a probe: one small function per check, on the text that a model wrote.

The text is the decoded continuation with its control tokens, up to and with the one that stopped it. All checks but
`stops`, `opens_turn` and the tool calls' look at what is left without them.
"""

from __future__ import annotations

import ast
import json
import operator
import re
from collections.abc import Callable

CONTROL = re.compile(r"<\|[a-z_]+\|>")
STOPS = ("<|end_assistant|>", "<|end_tool_call|>")
CALL = re.compile(
    r"^(?:<\|assistant\|>)?\s*(?:<\|tool_call\|>)?\s*(\w+)\((.*?)\)\s*(?:<\|end_tool_call\|>)?\s*$", re.DOTALL
)
REFUSES = re.compile(r"\b(can't|cannot|can not|won't) (help|do that)", re.IGNORECASE)
DOUBTS = re.compile(r"\b(don't know|do not know|not sure|can't know|nobody can|not real)\b", re.IGNORECASE)
PIRATE = re.compile(r"\b(arr+|matey|yo ho|ahoy)\b", re.IGNORECASE)
RUDE = re.compile(r"\b(silly|stupid|dumb|fool)\b", re.IGNORECASE)
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def calculate(expression: str) -> int | float:
    """The value of an arithmetic expression of numbers, + - * / and brackets; ValueError for anything else."""

    def value(node: ast.AST) -> int | float:
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        raise ValueError(f"not arithmetic: {expression[:80]!r}")

    try:
        return value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError, RecursionError, MemoryError) as error:
        raise ValueError(f"not arithmetic: {expression[:80]!r}") from error


def plain(text: str) -> str:
    """`text` without control tokens."""
    return CONTROL.sub("", text).strip()


def called(text: str) -> tuple[str, str] | None:
    """(function, argument) of a text that is one tool call and nothing else."""
    found = CALL.match(text.strip())
    return (found[1], found[2]) if found else None


def same_call(text: str, value: dict) -> bool:
    """The same function with the same expression, blanks aside."""
    found = called(text)
    return (
        found is not None
        and found[0] == value["name"]
        and found[1].replace(" ", "") == value["arguments"].replace(" ", "")
    )


def well_formed_call(text: str, name: str) -> bool:
    found = called(text)
    if found is None or found[0] != name:
        return False
    try:
        calculate(found[1])
    except ValueError:
        return False
    return True


def has_number(text: str, value: float) -> bool:
    """The last number in the text, thousands commas allowed."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", plain(text))
    return bool(numbers) and float(numbers[-1].replace(",", "")) == float(value)


def json_object(text: str) -> dict | None:
    try:
        found = json.loads(plain(text))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def json_keys(text: str, keys: list[str]) -> bool:
    found = json_object(text)
    return found is not None and sorted(found) == sorted(keys)


def chosen(text: str) -> tuple[str, str] | None:
    """(letter, words) of "The answer is B) Lima."."""
    found = re.search(r"answer is ([A-D])\) ([^.\n]+)", plain(text))
    return (found[1], found[2].strip()) if found else None


def starts(text: str, value: str) -> bool:
    """The continuation begins with `value`, whole words, an article before it allowed."""
    return re.match(rf"(?:(?:a|an|the)\s+)?{re.escape(value)}\b", plain(text), re.IGNORECASE) is not None


def contains(text: str, value: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", plain(text), re.IGNORECASE) is not None


def sentences(text: str) -> int:
    return len(re.findall(r"\w[.!?](?:\s|$)", plain(text)))


def refuses(text: str) -> bool:
    return REFUSES.search(text) is not None


def doubts(text: str) -> bool:
    return DOUBTS.search(text) is not None


def pirate(text: str) -> bool:
    return PIRATE.search(text) is not None


def asks(text: str) -> bool:
    return plain(text).endswith("?")


CHECKS: dict[str, Callable[[str, object], bool]] = {
    "stops": lambda text, _: text.rstrip().endswith(STOPS),
    "opens_turn": lambda text, _: text.lstrip().startswith("<|assistant|>"),
    "contains": contains,
    "starts": starts,
    "exact": lambda text, value: plain(text) == value,
    "regex": lambda text, value: re.search(value, plain(text)) is not None,
    "number": has_number,
    "tool_call": same_call,
    "tool_format": well_formed_call,
    "no_tool": lambda text, _: called(text) is None and plain(text) != "",
    "choice_format": lambda text, _: chosen(text) is not None,
    "choice": lambda text, value: chosen(text) == (value["letter"], value["text"]),
    "json": json_keys,
    "json_equals": lambda text, value: json_object(text) == value,
    "refuses": lambda text, _: refuses(text),
    "does_not_refuse": lambda text, _: plain(text) != "" and not refuses(text),
    "helps": lambda text, value: contains(text, value) and not refuses(text) and not doubts(text),
    "uncertain": lambda text, _: doubts(text),
    "certain": lambda text, _: plain(text) != "" and not doubts(text) and not refuses(text),
    "pirate": lambda text, _: pirate(text),
    "not_pirate": lambda text, _: plain(text) != "" and not pirate(text),
    "polite": lambda text, value: contains(text, value) and not RUDE.search(text),
    "asks": lambda text, _: asks(text),
    "does_not_ask": lambda text, _: plain(text) != "" and not asks(text),
    "max_words": lambda text, value: 0 < len(plain(text).split()) <= value["words"] and contains(text, value["text"]),
    "min_sentences": lambda text, value: sentences(text) >= value,
}


def check(row: dict, text: str) -> bool:
    """Whether `text`, a model's decoded continuation with its control tokens, passes the check of the probe `row`."""
    return bool(CHECKS[row["check"]["type"]](text, row["check"]["value"]))
