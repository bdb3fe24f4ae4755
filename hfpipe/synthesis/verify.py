"""Whether an answer is right, by what can be checked of it: arithmetic, programs, JSON, any named check."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from hfpipe.errors import ConfigErrors, UserError, nearest
from hfpipe.evaluation.answers import Answer
from hfpipe.evaluation.checks import NO_VALUE, NUMBER, check, find_check
from hfpipe.evaluation.probes import reference_value
from hfpipe.evaluation.tools import calculate
from hfpipe.sections import Recipe
from hfpipe.synth_config import CHECKERS, Verify
from hfpipe.synthesis.sandbox import check_isolation, run_tests

_SIGNS = {
    "*": re.compile(r"\b(?:multiplied by|times)\b|×"),
    "/": re.compile(r"\bdivided by\b|÷"),
    "+": re.compile(r"\bplus\b"),
    "-": re.compile(r"\bminus\b|−"),
    "=": re.compile(r"\bequals?\b"),
}
_EXPRESSION = re.compile(r"[\d(][\d\s.()+*/-]*[\d)]")
_EQUATION = re.compile(r"([\d(][\d\s.()+*/-]*[\d)])\s*=\s*(-?\d+(?:\.\d+)?)")
_FENCED = re.compile(r"```(?:python|py)?\s*\n(.*?)```", re.DOTALL)


def check_verifiers(recipe: Recipe) -> None:
    """ConfigErrors names every check of a synth section that is not there; imports no torch."""
    problems = []
    for name, synth in recipe.pipeline.synth.items():
        for number, item in enumerate(synth.verify):
            try:
                if item.check not in CHECKERS:
                    find_check(item.check)
            except UserError as error:
                where = f"{recipe.folder / 'pipeline.yaml'}: synth.{name}.verify[{number}].check"
                problems.append(f"{where}: {error} Beside these: {', '.join(CHECKERS)}.{nearest(item.check, CHECKERS)}")
    if problems:
        raise ConfigErrors(problems)


def check_can_run(items: tuple[Verify, ...]) -> None:
    """UserError where programs would have to be run without isolation."""
    if any(item.check == "code" and item.isolated for item in items):
        check_isolation()


def wrong(item: Verify, row: dict[str, Any], answer: Answer) -> str | None:
    """Why an answer does not pass a check; None where it does.

    `row` has the `messages` that are answered, its own `reference`, and its columns (`tests`, `schema`).
    """
    if item.check == "calculator":
        return _miscalculated(_question(row), answer.text)
    value = item.value if item.value is not None else _value(item.check, row)
    if value is None and item.check not in NO_VALUE:
        return f"{item.check}: its row has nothing to check with"
    if item.check == "code":
        program = "\n".join(_FENCED.findall(answer.text)) or answer.text
        reason = run_tests(program, str(value), isolated=item.isolated)
        return f"code: {reason}" if reason else None
    fine = check({"check": {"type": item.check, "value": value}}, answer) >= 1
    return None if fine else item.check


def _value(check_name: str, row: dict[str, Any]) -> Any:
    if check_name == "code":
        return row.get("tests")
    if check_name == "json_schema":
        schema = row.get("schema")
        return json.loads(schema) if isinstance(schema, str) else schema
    return reference_value(check_name, row.get("reference") or ())


def _question(row: dict[str, Any]) -> str:
    return next((m["content"] for m in reversed(row["messages"]) if m["role"] == "user"), "")


def _miscalculated(question: str, answer: str) -> str | None:
    """Every equation that the answer states holds, and its last number is the value of the question's expression."""
    for left, right in _EQUATION.findall(_in_signs(answer)):
        if (value := _calculated(left)) is not None and not math.isclose(value, float(right), rel_tol=1e-6):
            return "calculator: an equation does not hold"
    values = [v for e in _EXPRESSION.findall(_in_signs(question)) if (v := _calculated(e)) is not None]
    if not values:
        return None if _EQUATION.search(_in_signs(answer)) else "calculator: no arithmetic to check"
    found = NUMBER.findall(answer)
    right = found and math.isclose(float(found[-1].replace(",", "")), values[-1], rel_tol=1e-6)
    return None if right else "calculator: not the value of the question's expression"


def _calculated(expression: str) -> float | None:
    """The value of an expression that holds a sign between numbers."""
    try:
        return float(calculate(expression)) if re.search(r"[\d)]\s*[-+*/]", expression) else None
    except ValueError:
        return None


def _in_signs(text: str) -> str:
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    for sign, words in _SIGNS.items():
        text = words.sub(f" {sign} ", text)
    return text
