"""Probes: the same held-out questions put to the model of every stage, and a score with its interval per capability.

A row asks by `prompt` (text to go on from) or `messages`; names its `capability` and its `kind` within it; and carries
`check: {type, value}`. Rows of one `group` ask one thing in several wordings: the group scores as its worst wording.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfpipe.data import tinyworld
from hfpipe.data.messages import RowProblem, messages_of, text_of, tools_of
from hfpipe.data.readers import read_file
from hfpipe.data.rows import row_problem
from hfpipe.data.sources import load_source
from hfpipe.errors import UserError
from hfpipe.evaluation.answers import Answer, Question, answer_all
from hfpipe.evaluation.checks import check, check_value, find_check, json_object, numbers, score_answer
from hfpipe.evaluation.intervals import interval
from hfpipe.sections import Probe, Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TINYWORLD = "tinyworld/probes"


def load_probes(probes: Sequence[Probe], where: str) -> list[dict[str, Any]]:
    """The rows of every probe of a recipe; `where` begins an error. UserError names the row at fault."""
    rows = []
    for number, probe in enumerate(probes):
        place = f"{where}[{number}]"
        if probe.check:
            find_check(probe.check)
            found = _from_known_form(probe, place)
        elif probe.path == TINYWORLD:
            found = tinyworld.rows("probes", probe.split or "test", size=probe.limit)
        else:
            found = _from_file(probe, place)
        rows += [{**row, "capability": probe.capability or row["capability"]} for row in found]
    return rows


def _from_file(probe: Probe, where: str) -> Iterator[dict[str, Any]]:
    path = Path(probe.path).expanduser()
    if not path.is_file():
        looked = f"no such file (looked for {path.absolute()})"
        raise UserError(f"{where}: {probe.path}: {looked}. Give a jsonl file of probes, or {TINYWORLD}.")
    for at in itertools.islice(read_file(path), probe.limit):
        row = at.row
        asked = row.get("messages") or row.get("prompt")
        wanted = row.get("check")
        if not asked or not isinstance(wanted, dict) or "type" not in wanted:
            raise UserError(
                f"{where}: {at}: expected `messages` or `prompt`, and `check: {{type, value}}`; found {', '.join(row)}. "
                "For rows in another form give `check` in the recipe: its value is read from the row's answer."
            )
        if not (probe.capability or row.get("capability")):
            raise UserError(f"{where}: {at}: names no capability. Give it there, or `capability` in the recipe.")
        for key in ("capability", "kind"):
            if not isinstance(row.get(key, ""), str):
                raise UserError(f"{where}: {at}: {key} = {row[key]!r}: expected a text.")
        if not isinstance(row.get("group"), str | int | None):
            raise UserError(f"{where}: {at}: group = {row['group']!r}: expected a text or a number.")
        row = {"kind": row.get("capability", probe.capability), **row}
        if wanted["type"] == "prefers" and isinstance(wanted.get("value"), dict) and probe.judge:
            row["check"] = {**wanted, "value": {**_judge(probe), **wanted["value"]}}
        try_check(row, f"{where}: {at}")
        try:
            text_of(json.dumps(row, ensure_ascii=False))  # what follows writes it to files
            row["tools"] = tools_of(row.get("tools")) or None
        except RowProblem as error:
            raise UserError(f"{where}: {at}: {error}.") from None
        if row.get("messages"):
            row["messages"] = _turns(row["messages"], f"{where}: {at}")
        yield row


def _turns(messages: list[Any], where: str) -> list[dict[str, Any]]:
    """The turns of a question, as sound as those of a row that is trained on."""
    try:
        turns = messages_of(messages)
        problem = row_problem({"prompt": turns})
    except RowProblem as error:
        problem = str(error)
    if problem:
        raise UserError(f"{where}: `messages`: {problem}; they are asked as they stand, for the assistant to answer.")
    return turns


def try_check(row: dict[str, Any], where: str) -> None:
    """A check and its value are tried on an answer before any model is asked."""
    if not isinstance(row.get("prompt", ""), str) or not isinstance(row.get("messages", []), list):
        raise UserError(f"{where}: expected `prompt` as text or `messages` as a list.")
    wanted = row["check"]
    if not isinstance(wanted["type"], str):
        raise UserError(f"{where}: check.type = {wanted['type']!r}: expected the name of a check.")
    try:
        find_check(wanted["type"])
        check_value(wanted["type"], wanted.get("value"))
        if wanted["type"] == "json_schema":
            import jsonschema

            jsonschema.Draft202012Validator.check_schema(wanted.get("value"))
        if wanted["type"] == "prefers":  # its judge is not asked before there is an answer
            return _check_judge(wanted.get("value"))
        check(row, Answer("1", [{"role": "assistant", "content": "1"}], True, row=row))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except Exception as error:  # a check may be anybody's function
        value = wanted.get("value")
        raise UserError(f"{where}: check `{wanted['type']}` cannot take the value {value!r}: {error}") from None


def _judge(probe: Probe) -> dict[str, Any]:
    return {"judge": probe.judge, "judge_model": probe.judge_model}


def _check_judge(value: Any) -> None:
    value = value if isinstance(value, dict) else {}
    if not isinstance(value.get("than"), str) or not isinstance(value.get("judge"), str):
        raise UserError(
            "check `prefers` needs `than`, the answer to be better than, and `judge`, a reward model or the URL of an "
            "endpoint, in its value; `judge` may stand in the recipe beside `path`."
        )


def _from_known_form(probe: Probe, where: str) -> Iterator[dict[str, Any]]:
    """Rows with an answer of their own, which gives the check its value."""
    if probe.check == "prefers" and not probe.judge:
        raise UserError(
            f"{where}: check: prefers needs `judge`: a reward model's folder or Hub id, or an endpoint's URL."
        )
    if not probe.capability:
        raise UserError(f"{where}: {probe.path}: give `capability`: what do these rows show?")
    source = Source(path=probe.path, split=probe.split or "test", limit=probe.limit)
    for row in load_source(source, wanted="messages", where=where).rows():
        calls = probe.check == "tool_call"
        spots = [
            i
            for i, message in enumerate(row["messages"])
            if message["role"] == "assistant" and (message.get("tool_calls") or not calls)
        ]
        if not spots:
            continue
        spot = spots[0] if calls else spots[-1]
        answer = row["messages"][spot]
        value = reference_value(str(probe.check), [answer])
        if probe.check == "prefers":
            value = {"than": value, **_judge(probe)}
        if value is None:
            continue
        yield {
            "kind": Path(probe.path).stem,
            "capability": probe.capability,
            "messages": row["messages"][:spot],
            "tools": row.get("tools"),
            "check": {"type": probe.check, "value": value},
        }


def reference_value(check: str, answers: Sequence[dict[str, Any]]) -> Any:
    """What a check compares with, from a row's own answer; None where that holds nothing of the kind."""
    if check in ("tool_call", "tool_format"):
        turns = [[call["function"] for call in answer.get("tool_calls") or ()] for answer in answers]
        calls = next(filter(None, turns), [])  # of the first turn that has any
        if check == "tool_format":
            return calls[0]["name"] if calls else None
        return calls if len(calls) > 1 else calls[0] if calls else None
    text = str(answers[-1].get("content") or "") if answers else ""
    if check == "number":
        found = numbers(text)
        return float(found[-1]) if found else None
    if check == "json_equals":
        return json_object(Answer(messages=[{"role": "assistant", "content": text}]))
    return text or None


def ask(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]], max_new_tokens: int
) -> list[Answer]:
    """The model's answer to each row; control tokens inside a row are data here too."""
    from hfpipe.training.templates import neutralise_row, special_strings

    special = special_strings(tokenizer)
    clean = [neutralise_row(row, special)[0] for row in rows]
    questions = [
        Question(
            row.get("messages") or row["prompt"],
            tools=row.get("tools"),
            opens_turn=row.get("add_generation_prompt") is False,
        )
        for row in clean
    ]
    answers = answer_all(model, tokenizer, questions, max_new_tokens=max_new_tokens)
    for row, answer in zip(rows, answers, strict=True):
        answer.row = row
    return answers


def capabilities(rows: Sequence[dict[str, Any]], scores: Sequence[float]) -> dict[str, dict[str, Any]]:
    """`{capability: {"score", "n", "low", "high", "kinds": {kind: the same}}}`: shares or means in 0..1, with 95% intervals.

    Where rows stand in groups, `n` counts groups, and `agreement` is the share of those whose wordings all score alike.
    """
    by_kind: dict[str, dict[str, list[tuple[str | None, float]]]] = defaultdict(lambda: defaultdict(list))
    for row, score in zip(rows, scores, strict=True):
        by_kind[row["capability"]][row["kind"]].append((row.get("group"), score))
    found = {}
    for capability, kinds in by_kind.items():
        values = {kind: _worst(scored) for kind, scored in kinds.items()}
        entry = summary([value for group in values.values() for value in group])
        agreement = _agreement(list(kinds.values()))
        if agreement is not None:
            entry["agreement"] = agreement
        found[capability] = {**entry, "kinds": {kind: summary(group) for kind, group in values.items()}}
    return found


def _grouped(scored: Sequence[tuple[str | None, float]]) -> dict[str, list[float]]:
    groups: dict[str, list[float]] = defaultdict(list)
    for number, (group, score) in enumerate(scored):
        groups[f"row {number}" if group is None else f"group {group}"].append(score)
    return groups


def _worst(scored: Sequence[tuple[str | None, float]]) -> list[float]:
    return [min(group) for group in _grouped(scored).values()]


def _agreement(kinds: Sequence[Sequence[tuple[str | None, float]]]) -> float | None:
    groups = [group for scored in kinds for group in _grouped(scored).values() if len(group) > 1]
    return round(sum(len(set(group)) == 1 for group in groups) / len(groups), 4) if groups else None


def summary(values: Sequence[float]) -> dict[str, Any]:
    low, high = interval(values)
    mean = sum(values) / len(values)
    return {"score": round(mean, 4), "n": len(values), "low": round(low, 4), "high": round(high, 4)}


def _checked(row: dict[str, Any], answer: Answer) -> float:
    try:
        return score_answer(row, answer)
    except UserError:
        raise
    except Exception as error:  # a check may be anybody's function
        asked = row.get("prompt") or row["messages"][-1].get("content")
        raise UserError(
            f"check `{row['check']['type']}` of {row['capability']} failed on the answer {answer.text[:80]!r} to "
            f"{str(asked)[:80]!r}: {type(error).__name__}: {error}"
        ) from error


def score_probes(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]], max_new_tokens: int
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """The capabilities of a model, and every question with its answer and score."""
    answers = ask(model, tokenizer, rows, max_new_tokens)
    scores = [_checked(row, answer) for row, answer in zip(rows, answers, strict=True)]
    told = [
        {**row, "answer": answer.text, "turns": answer.turns(), "raw": answer.raw, "score": score}
        for row, answer, score in zip(rows, answers, scores, strict=True)
    ]
    return capabilities(rows, scores), told
