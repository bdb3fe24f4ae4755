"""Who is asked: a model on this machine, in batches, or one behind an OpenAI-compatible endpoint, several at a time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from hfpipe.data.messages import RowProblem, text_of
from hfpipe.errors import UserError
from hfpipe.evaluation.answers import MAX_CALLS, Answer, Question, answer_all, carry_out
from hfpipe.evaluation.endpoint import Refused, complete
from hfpipe.evaluation.tools import TOOLS
from hfpipe.synth_config import Synth


class Teacher(Protocol):
    def answer(self, questions: Sequence[Question], seed: int) -> list[Answer]:
        """Answers in the questions' order; called tools are carried out. The same seed and questions, the same answers."""


class LocalTeacher:
    """A causal language model's folder. UserError where there is none, or it takes no turns."""

    def __init__(self, folder: Path, synth: Synth):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from hfpipe.training.adapters import load_pretrained
        from hfpipe.training.templates import special_strings

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(str(folder))
            self.model = load_pretrained(AutoModelForCausalLM, folder).eval()
        except (OSError, ValueError) as error:
            raise UserError(f"teacher {folder}: no model there: {str(error).splitlines()[0]}") from None
        if self.tokenizer.chat_template is None:
            raise UserError(f"teacher {folder} has no chat template: it takes no turns. A midtrain stage gives it one.")
        if torch.accelerator.is_available():
            self.model.to(torch.accelerator.current_accelerator())
        self._special = special_strings(self.tokenizer)
        self._options: dict[str, Any] = {"max_new_tokens": synth.max_new_tokens}
        if synth.temperature > 0:
            sampled = {"do_sample": True, "temperature": synth.temperature, "top_p": synth.top_p, "top_k": 0}
            self._options |= sampled

    def answer(self, questions: Sequence[Question], seed: int) -> list[Answer]:
        import torch

        from hfpipe.training.templates import neutralise_row

        clean = [
            Question(neutralise_row({"messages": q.prompt}, self._special)[0]["messages"], q.tools) for q in questions
        ]
        torch.manual_seed(seed)
        return answer_all(self.model, self.tokenizer, clean, **self._options)


class EndpointTeacher:
    """Asked by the protocol of chat completions; how far `seed` decides its answers is the server's affair."""

    def __init__(self, url: str, model: str, concurrency: int, synth: Synth):
        self.url, self._concurrency = url, concurrency
        self._body = {"model": model, "temperature": synth.temperature, "max_tokens": synth.max_new_tokens}
        if synth.temperature > 0:
            self._body["top_p"] = synth.top_p

    def answer(self, questions: Sequence[Question], seed: int) -> list[Answer]:
        with ThreadPoolExecutor(self._concurrency) as threads:
            asked = [threads.submit(self._one, question, seed + at) for at, question in enumerate(questions)]
            try:
                answers = [future.result() for future in asked]
            except UserError:
                threads.shutdown(cancel_futures=True)  # what is refused once is not paid for again
                raise
        if answers and all(answer.fault for answer in answers):
            raise UserError(f"all of {len(answers)} questions were refused; the first: {answers[0].fault}")
        return answers

    def _one(self, question: Question, seed: int) -> Answer:
        answer = Answer()
        try:
            self._converse(answer, question, seed)
            text_of(json.dumps(answer.messages, ensure_ascii=False))  # what no file can hold
        except RowProblem as problem:
            answer.messages, answer.fault = [], f"not as the protocol has it: {problem}"
        except Refused as refused:
            answer.fault = f"refused: {refused}"
        except (KeyError, TypeError, AttributeError) as error:
            answer.fault = f"not as the protocol has it: {type(error).__name__}: {error}"
        return answer

    def _converse(self, answer: Answer, question: Question, seed: int) -> None:
        talk = [_sent(message) for message in question.prompt]
        body = {**self._body, "seed": seed, **({"tools": question.tools} if question.tools else {})}
        for _ in range(MAX_CALLS + 1):
            reply = complete(self.url, {**body, "messages": talk})
            choice = reply["choices"][0]
            answer.prompt_tokens += reply["usage"]["prompt_tokens"]
            answer.completion_tokens += reply["usage"]["completion_tokens"]
            answer.stopped = choice.get("finish_reason") in ("stop", "tool_calls")
            said = choice["message"]
            message = {"role": "assistant", "content": text_of(said.get("content"))}
            if calls := said.get("tool_calls"):
                message["tool_calls"] = [{"type": "function", "function": _called(call)} for call in calls]
            results = carry_out(message, TOOLS) if calls else []
            answer.messages += [message, *results]
            if not results:
                break
            ids = [call.get("id") for call in calls]
            message["tool_calls"] = [{"id": i, **call} for i, call in zip(ids, message["tool_calls"], strict=True)]
            talk += [_sent(message), *({**r, "tool_call_id": i} for r, i in zip(results, ids, strict=True))]


def _called(call: dict[str, Any]) -> dict[str, Any]:
    """A call with its arguments, JSON by the protocol, as a mapping or a text again."""
    arguments = call["function"].get("arguments") or ""
    if not isinstance(call["function"]["name"], str):
        raise TypeError("a call of a function without a name")
    try:
        found = json.loads(arguments)
    except (TypeError, ValueError):
        found = arguments
    return {"name": call["function"]["name"], "arguments": found if isinstance(found, dict | str) else arguments}


def _sent(message: dict[str, Any]) -> dict[str, Any]:
    """A message by the protocol: arguments of calls as JSON."""
    if not message.get("tool_calls"):
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def as_text(arguments: Any) -> str:
    """A tool call's arguments as one string: as they are, or a mapping's JSON."""
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def ends_with_calls(answer: Answer, tools: list[dict[str, Any]] | None) -> bool:
    """Whether the last turn calls declared tools, which nobody here carries out."""
    declared = {(tool.get("function") or tool).get("name") for tool in tools or ()}
    called = [call["function"]["name"] for call in (answer.messages or [{}])[-1].get("tool_calls") or ()]
    return bool(called) and declared.issuperset(called)
