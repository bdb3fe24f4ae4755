"""What reinforcement learning is steered by: a reward model, checks on the row's own answer, anybody's function.

Each is a function with the arguments of TRL's reward functions: it gets `prompts`, `completions`, `completion_ids` and the
columns `reference` and `row`, and gives a number for each completion, or None where it has nothing to say.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfpipe.errors import ConfigErrors, UserError
from hfpipe.evaluation.answers import Answer
from hfpipe.evaluation.checks import NO_VALUE, check, find_check
from hfpipe.evaluation.probes import reference_value

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hfpipe.sections import Recipe, RewardFunction, Stage
    from hfpipe.training.job import Job

Reward = Callable[..., list[float | None]]

_ROWS_AT_ONCE = 32


def check_rewards(recipe: Recipe) -> None:
    """ConfigErrors names every check and function of every stage's `rewards` that is not there."""
    problems = []
    for stage in recipe.stages.values():
        for number, item in enumerate(_functions(stage)):
            try:
                find_check(item.check) if item.check else _import(str(item.function))
            except UserError as error:
                problems.append(f"{stage.file}: rewards.functions[{number}]: {error}")
    if problems:
        raise ConfigErrors(problems)


def _functions(stage: Stage) -> tuple[RewardFunction, ...]:
    return getattr(stage.sections.get("rewards"), "functions", ())


def build_rewards(job: Job, tokenizer: PreTrainedTokenizerBase, stops: set[int]) -> tuple[list[Reward], list[float]]:
    """The stage's rewards and their weights; `stops` are the tokens that end a completion."""
    section = job.stage.sections["rewards"]
    rewards, weights = [], []
    if section.model:
        rewards.append(by_model(job.guide_path(), tokenizer, f"{job.stage.file}: rewards.model"))
        weights.append(section.weight)
    for item in section.functions:
        rewards.append(by_check(item, stops) if item.check else _import(str(item.function)))
        weights.append(item.weight)
    return rewards, weights


def by_check(item: RewardFunction, stops: set[int]) -> Reward:
    """A check of the evaluation; None for a row that has no value for it."""

    def reward(
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        reference: list[Any],
        row: list[dict[str, Any]],
        **_: Any,
    ) -> list[float | None]:
        scores: list[float | None] = []
        for messages, ids, answers, whole in zip(completions, completion_ids, reference, row, strict=True):
            value = item.value
            if value is None and item.check not in NO_VALUE:
                value = reference_value(str(item.check), answers or [])
                if value is None:
                    scores.append(None)
                    continue
            answer = Answer(messages=list(messages), stopped=bool(ids) and ids[-1] in stops, row=whole)
            scores.append(check({"check": {"type": item.check, "value": value}}, answer))
        return scores

    reward.__name__ = str(item.check)
    return reward


def by_model(path: str, tokenizer: PreTrainedTokenizerBase, where: str) -> Reward:
    """A reward model's score at the conversation's last token.

    One with the policy's own vocabulary reads the very tokens that were sampled; another one's template renders the
    messages anew.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from hfpipe.training.adapters import load_pretrained
    from hfpipe.training.hardware import own_device
    from hfpipe.training.templates import closing_ids, encode_prompts

    try:
        model = load_pretrained(AutoModelForSequenceClassification, Path(path)).eval()
        own = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: no reward model in {path}: {str(error).splitlines()[0]}") from None
    if model.config.num_labels != 1:
        raise UserError(f"{where}: {path} has {model.config.num_labels} labels; a reward model has one.")
    model.requires_grad_(False)
    model.to(own_device())
    same = own.get_vocab() == tokenizer.get_vocab()
    closing = closing_ids(tokenizer)

    def encode(
        prompts: list[Any], completions: list[Any], sampled: list[list[int]], rows: list[Any]
    ) -> list[list[int]]:
        if not same:
            talks = [[*prompt, *messages] for prompt, messages in zip(prompts, completions, strict=True)]
            return own.apply_chat_template(talks, return_dict=True)["input_ids"]
        asked = encode_prompts(
            tokenizer, [{"prompt": p, "tools": row.get("tools")} for p, row in zip(prompts, rows, strict=True)]
        )
        return [
            [*before, *ids, *closing.get(ids[-1] if ids else None, [])]
            for before, ids in zip(asked, sampled, strict=True)
        ]

    def reward_model(
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        row: list[dict[str, Any]],
        **_: Any,
    ) -> list[float | None]:
        whole = encode(prompts, completions, completion_ids, row)
        order = sorted(range(len(whole)), key=lambda i: len(whole[i]))
        scores: list[float | None] = [None] * len(whole)
        for start in range(0, len(order), _ROWS_AT_ONCE):
            batch = order[start : start + _ROWS_AT_ONCE]
            padded = own.pad({"input_ids": [whole[i] for i in batch]}, padding_side="right", return_tensors="pt")
            with torch.inference_mode():
                found = model(**padded.to(model.device), use_cache=False).logits[:, 0].float().tolist()
            for i, score in zip(batch, found, strict=True):
                scores[i] = score
        return scores

    reward_model.model = model  # a critic may start from it, where the vocabulary is the policy's
    reward_model.same_vocabulary = same
    return reward_model


def _import(name: str) -> Reward:
    """`package.module:function` or `path/to/file.py:function`."""
    place, colon, attribute = name.rpartition(":")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, Path(place).expanduser())
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place) if colon else None
        found = getattr(module, attribute, None)
    except Exception as error:  # anybody's file
        raise UserError(f"function {name!r}: {type(error).__name__}: {error}") from None
    if not callable(found):
        raise UserError(f"function {name!r}: expected `package.module:function` or `path/to/file.py:function`.")
    return found
