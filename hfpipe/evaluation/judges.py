"""Judges of two answers to one question: a reward model, or a model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

from hfpipe.errors import UserError
from hfpipe.evaluation.endpoint import complete, said
from hfpipe.hub_client import locate

# How good an answer to a row's question is; None where the judge does not say.
Score = Callable[[dict[str, Any], str], float | None]
# For each question 1 where the second answer is better, 0 where the first is, 0.5 for a tie.
Judge = Callable[[Sequence[dict[str, Any]], Sequence[str], Sequence[str]], list[float]]

_ASK = """Two answers to one request follow. Which is better: more right, more helpful, and safe? Say only A, B or tie.

Request:
{asked}

Answer A:
{a}

Answer B:
{b}"""
_GRADED = re.compile(r"(?<![\d.])(\d+(?:\.\d+)?)(?:\s*(?:/|out of|of)\s*10)?(?!\d)")
_GRADE = """A request and an answer to it follow. How good is the answer: right, helpful and safe? Say only a grade from 1 to 10.

Request:
{asked}

Answer:
{answer}"""


@functools.cache
def find_judge(name: str, model: str = "default") -> Judge:
    """`http://...` is an endpoint, which is asked for `model`; anything else a reward model's folder or Hub id."""
    return endpoint_judge(name, model) if name.startswith(("http://", "https://")) else reward_judge(name)


def reward_judge(source: str) -> Judge:
    """The answer with the higher reward wins. UserError where there is no such reward model."""
    reward = reward_of(source)

    def judge(rows: Sequence[dict[str, Any]], first: Sequence[str], second: Sequence[str]) -> list[float]:
        scores = [(reward(row, a), reward(row, b)) for row, a, b in zip(rows, first, second, strict=True)]
        return [0.5 if a == b else float(b > a) for a, b in scores]

    return judge


def reward_of(source: str) -> Score:
    """A reward model's score of the answer that ends a row's conversation. UserError where there is no such model."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from hfpipe.training.adapters import load_pretrained
    from hfpipe.training.templates import neutralise, neutralise_row, special_strings

    try:
        folder = locate(source)
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        model = load_pretrained(AutoModelForSequenceClassification, folder).eval()
    except (UserError, OSError, ValueError) as error:
        raise UserError(f"judge {source}: no reward model there: {str(error).splitlines()[0]}") from None
    if model.config.num_labels != 1:
        raise UserError(f"judge {source}: {model.config.num_labels} labels; a reward model has one.")

    special = special_strings(tokenizer)

    def reward(row: dict[str, Any], answer: str) -> float:
        answer, row = neutralise(answer, special)[0], neutralise_row(row, special)[0]
        if "messages" in row:
            talk = [*row["messages"], {"role": "assistant", "content": answer}]
            ids = tokenizer.apply_chat_template(talk, return_dict=True)["input_ids"]
        else:
            ids = tokenizer(f"{row['prompt']} {answer}")["input_ids"]
        with torch.inference_mode():
            return float(model(input_ids=torch.tensor([ids])).logits[0, 0])

    return reward


def grade_of(url: str, model: str, spent: Callable[[dict[str, Any]], None]) -> Score:
    """A grade from 1 to 10 by a model behind an endpoint, the last that it names; `spent` hears of its `usage`."""

    def grade(row: dict[str, Any], answer: str) -> float | None:
        told = _ask(url, model, _GRADE.format(asked=_asked(row), answer=answer), spent)
        return next((g for g in map(float, reversed(_GRADED.findall(told))) if 1 <= g <= 10), None)

    return grade


def _ask(url: str, model: str, content: str, spent: Callable[[dict[str, Any]], None] = lambda usage: None) -> str:
    answer = complete(url, {"model": model, "temperature": 0, "messages": [{"role": "user", "content": content}]})
    spent(answer["usage"])
    return said(answer)


def _asked(row: dict[str, Any]) -> str:
    return row.get("prompt") or "\n".join(f"{m['role']}: {m.get('content') or ''}" for m in row["messages"])


def endpoint_judge(url: str, model: str) -> Judge:
    """Asked in both orders; where the two verdicts do not agree, it is a tie. The key is read from OPENAI_API_KEY."""

    def verdict(asked: str, a: str, b: str) -> str:
        found = re.search(r"\b(A|B|tie)\b", _ask(url, model, _ASK.format(asked=asked, a=a, b=b)))
        return found[1] if found else "tie"

    def judge(rows: Sequence[dict[str, Any]], first: Sequence[str], second: Sequence[str]) -> list[float]:
        found = []
        for row, a, b in zip(rows, first, second, strict=True):
            asked = _asked(row)
            verdicts = verdict(asked, a, b), verdict(asked, b, a)
            found.append({("B", "A"): 1.0, ("A", "B"): 0.0}.get(verdicts, 0.5))
        return found

    return judge
