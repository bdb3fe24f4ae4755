"""Many questions to one model: batched greedy generation with the KV cache, and tools carried out when it calls them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hfpipe.evaluation.tools import TOOLS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_BATCH_TOKENS = 16384  # prompts and answers of one batch
_FIRST_TOKENS = 20
MAX_CALLS = 3  # turns of one answer that call tools


@dataclass(frozen=True)
class Question:
    """Plain text to go on from, or a conversation to answer.

    `opens_turn`: the conversation is left as it stands, and the model itself must open the assistant's turn.
    """

    prompt: str | list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    opens_turn: bool = False


@dataclass
class Answer:
    """What a model wrote: `raw` is its first turn with the control tokens, `messages` all of its turns and tool results."""

    raw: str = ""
    messages: list[dict[str, Any]] = field(default_factory=list)
    stopped: bool = False  # every turn ended by itself, within the budget
    opened: bool = False  # asked to open the assistant's turn, the model did as its chat template does
    row: dict[str, Any] = field(default_factory=dict)  # the probe that was asked
    prompt_tokens: int = 0  # read, in all its turns
    completion_tokens: int = 0  # written
    fault: str | None = None  # why there is none: its question was refused

    @property
    def text(self) -> str:
        """What was said last, without control tokens; nothing where the model ended on a tool's result."""
        last = self.messages[-1] if self.messages else {}
        return "" if last.get("role") == "tool" else str(last.get("content") or "").strip()

    @property
    def calls(self) -> list[dict[str, Any]]:
        """The tool calls that the first turn consists of, each `{"name", "arguments"}`; none where it says something too."""
        first = self.messages[0] if self.messages else {}
        silent = not str(first.get("content") or "").strip()
        return [call["function"] for call in first.get("tool_calls") or ()] if silent else []

    @property
    def call(self) -> dict[str, Any] | None:
        """The one of `calls`; None where there is none, or more."""
        return self.calls[0] if len(self.calls) == 1 else None

    def turns(self) -> list[str]:
        """Each message in words, a tool call as `calculator(2 * 3)`."""
        return [said(message) for message in self.messages]


def said(message: dict[str, Any]) -> str:
    """A message's words, or `calculator(2 * 3)` for one that is a tool call."""
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    called = [f"{call['name']}({call['arguments']})" for call in calls]
    return "\n".join(filter(None, [str(message.get("content") or "").strip(), *called]))


def answer_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    max_new_tokens: int = 64,
    tools: Mapping[str, Callable[[Any], str]] = TOOLS,
    **sampling: Any,
) -> list[Answer]:
    """Answers in the questions' order, greedy unless `sampling` has `do_sample`, `temperature` and the like for `generate`.

    A called tool of `tools` is carried out and the model goes on from it.
    """
    answers = [Answer() for _ in questions]
    waiting = list(range(len(questions)))
    for turn in range(MAX_CALLS + 1):
        prompts = [prompt_ids(tokenizer, questions[i], answers[i]) for i in waiting]
        again = []
        written = generate_all(model, tokenizer, prompts, max_new_tokens, **sampling)
        for i, prompt, ids in zip(waiting, prompts, written, strict=True):
            answer, message = answers[i], parse(tokenizer, prompt, ids, questions[i])
            answer.prompt_tokens += len(prompt)
            answer.completion_tokens += len(ids)
            if turn == 0:
                answer.raw = tokenizer.decode(ids)
                answer.opened = questions[i].opens_turn and answer.raw.lstrip().startswith(turn_opening(tokenizer))
            answer.messages.append(message)
            stopped = bool(ids) and ids[-1] in stop_ids(model)
            answer.stopped = stopped and (turn == 0 or answer.stopped)
            if turn == MAX_CALLS and message.get("tool_calls"):
                answer.stopped = False  # it calls and calls, and never answers
            results = carry_out(message, tools) if stopped and turn < MAX_CALLS else []
            if results:
                answer.messages += results
                again.append(i)
        waiting = again
        if not waiting:
            break
    return answers


def generate_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    max_new_tokens: int,
    beyond: bool = False,
    **sampling: Any,
) -> list[list[int]]:
    """Continuations of token ids, each with the stop token that ended it; prompts of like length share a batch.

    Short answers are not kept waiting: what has not ended after a few tokens goes on in batches of its own. Where the
    model's positions end, so does the answer, unless it may go `beyond`.
    """
    written: list[list[int]] = [[] for _ in prompts]
    limit = sys.maxsize if beyond else positions(model)
    stops, room = stop_ids(model), [limit - len(prompt) for prompt in prompts]
    for i in (i for i, left in enumerate(room) if 0 < left < max_new_tokens):
        written[i] = _generate(model, tokenizer, [prompts[i]], room[i], **sampling)[0]
    going = [i for i, left in enumerate(room) if left >= max_new_tokens]
    for budget in (min(_FIRST_TOKENS, max_new_tokens), max_new_tokens - _FIRST_TOKENS):
        if budget <= 0:
            break
        order = sorted(going, key=lambda i: len(prompts[i]) + len(written[i]), reverse=True)
        while order:
            size = max(1, _BATCH_TOKENS // (len(prompts[order[0]]) + max_new_tokens))
            batch, order = order[:size], order[size:]
            starts = [prompts[i] + written[i] for i in batch]
            for i, ids in zip(batch, _generate(model, tokenizer, starts, budget, **sampling), strict=True):
                written[i] = written[i] + ids
        going = [i for i in going if not (written[i] and written[i][-1] in stops)]
    return written


def positions(model: PreTrainedModel) -> int:
    """Tokens that the model can read and write in all, by its configuration; a learnt prompt takes some of them."""
    from peft import PeftModel

    taken = getattr(model.active_peft_config, "num_virtual_tokens", 0) if isinstance(model, PeftModel) else 0
    return (getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize) - taken


def stop_ids(model: PreTrainedModel) -> set[int]:
    stops = model.generation_config.eos_token_id
    return set(stops) if isinstance(stops, list) else set() if stops is None else {stops}


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    max_new_tokens: int,
    **sampling: Any,
) -> list[list[int]]:
    import torch

    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    width, pad = max(map(len, prompts)), next(token for token in pads if token is not None)
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    with torch.inference_mode():
        options = {"do_sample": False, "max_new_tokens": max_new_tokens, "pad_token_id": pad, **sampling}
        output: torch.Tensor = model.generate(input_ids=ids, attention_mask=mask, **options)
    stops, answers = stop_ids(model), []
    for row in output[:, width:].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
        answers.append(row[:end])  # padding stands only after a stop token
    return answers


def prompt_ids(tokenizer: PreTrainedTokenizerBase, question: Question, answer: Answer) -> list[int]:
    """The question, what has been answered so far, and the opening of the assistant's turn."""
    from hfpipe.training.templates import encode_messages, encode_prompts, neutralise_row, special_strings
    from hfpipe.training.tokenizers import encode_text

    if isinstance(question.prompt, str):
        return encode_text(tokenizer, [question.prompt])[0]
    # The model's own words are data too: control tokens that it spells out are no turns.
    answered, _ = neutralise_row({"messages": answer.messages}, special_strings(tokenizer))
    talk = [*question.prompt, *answered["messages"]]
    if question.opens_turn and not answer.messages:
        return encode_messages(tokenizer, talk, question.tools).input_ids
    return encode_prompts(tokenizer, [{"prompt": talk, "tools": question.tools}])[0]


def parse(tokenizer: PreTrainedTokenizerBase, prompt: list[int], ids: list[int], question: Question) -> dict[str, Any]:
    """The message that token ids say; text that goes on from text is no message of a format."""
    from hfpipe.training.responses import parse_message

    if isinstance(question.prompt, str) or question.opens_turn:
        return {"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True)}
    return parse_message(tokenizer, prompt, ids, question.tools)


def turn_opening(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template puts before an assistant's words: `<|assistant|>`, or `<|im_start|>assistant`."""
    from hfpipe.training.templates import encode_messages, encode_prompts

    talk = [{"role": "user", "content": "Hi"}]
    asked = encode_messages(tokenizer, talk).input_ids
    return tokenizer.decode(encode_prompts(tokenizer, [{"prompt": talk}])[0][len(asked) :]).strip()


def carry_out(message: dict[str, Any], tools: Mapping[str, Callable[[Any], str]]) -> list[dict[str, Any]]:
    """The results of a message's tool calls; none where it calls a tool that is not to be had."""
    called = [call["function"] for call in message.get("tool_calls") or ()]
    if not all(function["name"] in tools for function in called):
        return []
    return [
        {"role": "tool", "name": function["name"], "content": tools[function["name"]](function["arguments"])}
        for function in called
    ]
