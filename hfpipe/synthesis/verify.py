"""Whether an answer is right, by what can be checked of it: arithmetic, programs, JSON, any named check."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

from hfpipe.errors import ConfigErrors, UserError, nearest
from hfpipe.evaluation.answers import Answer
from hfpipe.evaluation.checks import NO_VALUE, check, find_check, numbers
from hfpipe.evaluation.probes import reference_value, try_check
from hfpipe.evaluation.tools import calculate
from hfpipe.sections import Recipe
from hfpipe.synth_config import CHECKERS, Verify
from hfpipe.synthesis.sandbox import check_isolation, run_tests

_SIGNS = {
    "*": re.compile(r"\b(?:multiplied by|times)\b|×|(?<=\d)\s*x\s*(?=\d)"),
    "/": re.compile(r"\bdivided by\b|÷"),
    "+": re.compile(r"\bplus\b"),
    "-": re.compile(r"\bminus\b|−"),
    "=": re.compile(r"\bequals?\b"),
}
_NO_SIGN = re.compile(
    r"(?<=\d),(?=\d{3})|[$€£]"  # 1,200
    r"|(?m:^\s*(?:\d+[.)]|[-*•])\s+)"  # the number or the bullet of a list
    r"|\b\d{4}([-/])\d{1,2}\1\d{1,2}\b|\b\d{1,2}([-/.])\d{1,2}\2\d{4}\b"  # dates
)
_ENDS = re.compile(r"\.(?!\d)|[\n,;:!?]")
_RUN = re.compile(r"(?<![\w^%])[\d.()+*/=-][\d.()+*/= \t-]*(?![\w^%])")
_GOES_ON = re.compile(r"[+*/=]|-\s")  # what is begun so goes on from something that is no number
_FENCED = re.compile(r"```(?:python|py)?\s*\n(.*?)```", re.DOTALL)


def check_verifiers(recipe: Recipe) -> None:
    """ConfigErrors names every check of a synth section that is not there or can't take its value; imports no torch."""
    problems = []
    for name, synth in recipe.pipeline.synth.items():
        for number, item in enumerate(synth.verify):
            where = f"{recipe.folder / 'pipeline.yaml'}: synth.{name}.verify[{number}]."
            try:
                if item.check == "prefers":
                    problems.append(f"{where}check = 'prefers' compares two answers. To grade one, give `judge`.")
                elif item.check == "code" and item.value is not None and not _as_program(item.value):
                    problems.append(f"{where}value = {item.value!r}: expected tests, as text or a list of lines.")
                elif item.check not in CHECKERS:
                    find_check(item.check)
                    if item.value is not None:
                        try_check({"check": {"type": item.check, "value": item.value}}, f"{where}value")
            except UserError as error:
                told = str(error)
                if item.check not in CHECKERS and "No check" in told:
                    told = f"{where}check: {told} Beside these: {', '.join(CHECKERS)}.{nearest(item.check, CHECKERS)}"
                problems.append(told)
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
    try:
        value = item.value if item.value is not None else _value(item.check, row)
        if value in (None, "") and item.check not in NO_VALUE:
            return f"{item.check}: its row has nothing to check with"
        if item.check == "code":
            program = "\n".join(_FENCED.findall(answer.text)) or answer.text
            reason = run_tests(program, _as_program(value) or "", isolated=item.isolated)
            return f"code: {reason}" if reason else None
        fine = check({"check": {"type": item.check, "value": value}}, answer) >= 1
    except UserError:
        raise
    except Exception as error:  # of this row's value or answer: the recipe's own values have been tried
        return f"{item.check}: cannot be checked: {type(error).__name__}"
    return None if fine else item.check


def _value(check_name: str, row: dict[str, Any]) -> Any:
    if check_name == "code":
        return _as_program(row.get("tests"))
    if check_name == "json_schema":
        schema = row.get("schema")
        return json.loads(schema) if isinstance(schema, str) else schema
    return reference_value(check_name, row.get("reference") or ())


def _as_program(tests: Any) -> str | None:
    """The column `tests`: a program, or a list of lines; None where there is nothing to run."""
    lines = tests if isinstance(tests, list | tuple) else [tests]
    if not lines or not all(isinstance(line, str) and line.strip() for line in lines):
        return None
    return "\n".join(lines)


def _question(row: dict[str, Any]) -> str:
    return next((m["content"] for m in reversed(row["messages"]) if m["role"] == "user"), "")


def _miscalculated(question: str, answer: str) -> str | None:
    """Every equation that the answer states holds, and its last number is the value of the question's expression."""
    equations = [sides for sides in _arithmetic(answer) if len(sides) > 1]
    if any(not _agree(left, right) for sides in equations for left, right in itertools.pairwise(sides)):
        return "calculator: an equation does not hold"
    asked = [side for sides in _arithmetic(question) for side in sides if _calculates(side)]
    if not asked:
        return None if equations else "calculator: no arithmetic to check"
    found = numbers(answer)
    fine = found and _agree(asked[-1], found[-1])
    return None if fine else "calculator: not the value of the question's expression"


def _arithmetic(text: str) -> Iterator[list[str]]:
    """The sides of each equation, or the one side of each expression; what letters or powers stand beside is left alone."""
    text = _NO_SIGN.sub("", text)
    for sign, words in _SIGNS.items():
        text = words.sub(f" {sign} ", text)
    for part in _ENDS.split(text):
        for run in _RUN.findall(part):
            sides = [_closed(side) for side in run.split("=") if side.strip()]
            if not _GOES_ON.match(run) and any(map(_calculates, sides)):
                yield sides


def _closed(side: str) -> str:
    """A side without the bracket that is opened, or closed, around the whole equation."""
    side = side.strip()
    if side.count("(") > side.count(")"):
        return side.removeprefix("(")
    return side.removesuffix(")") if side.count(")") > side.count("(") else side


def _calculates(side: str) -> bool:
    return re.search(r"[\d)]\s*[-+*/]", side) is not None


def _agree(one: str, other: str) -> bool:
    """Whether both have the same value, to the last digit that a written-out decimal has; False where one has none."""
    written = [side for side in (one, other) if not _calculates(side)]
    places = min((len(side.partition(".")[2]) for side in written if "." in side), default=None)
    rounded = 0.5000001 * 10**-places if places is not None else 0
    try:
        first = calculate(one)
        apart = abs(first - calculate(other))
        return apart <= (max(rounded, 1e-12 * abs(first)) if isinstance(apart, float) else 0)  # whole numbers exactly
    except (ValueError, OverflowError):
        return False
