"""What reinforcement learning is steered by: a reward model, checks on the row's own answer, anybody's function.

Each is a function with the arguments of TRL's reward functions: it gets `prompts`, `completions`, `completion_ids` and the
columns `reference` and `row`, and gives a number for each completion, or None where it has nothing to say.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import math
import reprlib
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfpipe.errors import ConfigErrors, UserError, nearest
from hfpipe.evaluation.answers import Answer
from hfpipe.evaluation.checks import CHECKS, NO_VALUE, find_check, score_answer
from hfpipe.evaluation.probes import reference_value, try_check
from hfpipe.training.identity import file_of_function

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hfpipe.sections import Recipe, RewardFunction, Stage
    from hfpipe.training.job import Job

Reward = Callable[..., list[float | None]]

_ROWS_AT_ONCE = 32
# What TRL's trainers call a function with, by name.
_GIVEN = (
    "prompts", "completions", "completion_ids", "reference", "row", "trainer_state", "log_extra", "log_metric",
)  # fmt: skip


def check_rewards(recipe: Recipe) -> None:
    """ConfigErrors names every check and function of every stage's `rewards` that is not there."""
    problems = []
    for stage in recipe.stages.values():
        for number, item in enumerate(_functions(stage)):
            try:
                _try_value(item) if item.check else _import(str(item.function), stage)
            except UserError as error:
                problems.append(f"{stage.file}: rewards.functions[{number}]: {error}")
    if problems:
        raise ConfigErrors(problems)


def _try_value(item: RewardFunction) -> None:
    """UserError where the check can't take its value, or what it would read from a row's answer, here a number."""
    name, value = str(item.check), item.value
    find_check(name)
    if name not in CHECKS:  # anybody's, which may read the row
        return
    if value is None and name not in NO_VALUE:
        value = reference_value(name, [{"role": "assistant", "content": "1"}])
        if value is None:  # it reads calls or JSON from the answer, of which there is none here
            return
    try:
        try_check({"check": {"type": name, "value": value}}, "value")
    except UserError:
        if item.value is None:
            raise UserError(f"check `{name}` reads no value from a row's answer: give `value`.") from None
        raise


def _functions(stage: Stage) -> tuple[RewardFunction, ...]:
    return getattr(stage.sections.get("rewards"), "functions", ())


def build_rewards(job: Job, tokenizer: PreTrainedTokenizerBase, stops: set[int]) -> tuple[list[Reward], list[float]]:
    """The stage's rewards and their weights; `stops` are the tokens that end a completion."""
    section = job.stage.sections["rewards"]
    rewards, weights = [], []
    if section.model:
        rewards.append(by_model(job.guide_path(), tokenizer, f"{job.stage.file}: rewards.model"))
        weights.append(section.weight)
    for number, item in enumerate(section.functions):
        where = f"{job.stage.file}: rewards.functions[{number}]: function {item.function!r}"
        rewards.append(
            by_check(item, stops) if item.check else by_function(_import(str(item.function), job.stage), where)
        )
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
            scores.append(score_answer({"check": {"type": item.check, "value": value}}, answer))
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


def by_function(function: Reward, where: str) -> Reward:
    """Anybody's function, plain or async; UserError, begun with `where`, for what it raises and what is no reward."""

    async def reward_later(completions: list[Any], **columns: Any) -> list[float | None]:
        with _told(where):
            found = await function(completions=completions, **columns)
        return _scores(found, len(completions), where)

    def reward(completions: list[Any], **columns: Any) -> list[float | None]:
        with _told(where):
            found = function(completions=completions, **columns)
        return _scores(found, len(completions), where)

    later = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
    chosen = reward_later if later else reward
    chosen.__name__ = getattr(function, "__name__", type(function).__name__)
    return chosen


@contextlib.contextmanager
def _told(where: str) -> Iterator[None]:
    try:
        yield
    except (Exception, SystemExit) as error:  # anybody's function
        frame = traceback.extract_tb(error.__traceback__)[:3][-1]  # ours are the first two
        raise UserError(f"{where}: {type(error).__name__}: {error} ({frame.filename} line {frame.lineno})") from error


def _scores(found: Any, wanted: int, where: str) -> list[float | None]:
    expected = f"expected a list with one number or None for each of the {wanted} completions."
    try:
        given = list(found)
        if any(isinstance(value, str) for value in given):
            raise TypeError
        scores = [None if value is None else float(value) for value in given]
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"{where}: it gave {reprlib.repr(found)}; {expected}") from None
    if len(scores) != wanted:
        raise UserError(f"{where}: it gave {len(scores)} values; {expected}")
    if endless := [place for place, value in enumerate(scores) if value is not None and math.isinf(value)]:
        place = endless[0]
        raise UserError(
            f"{where}: it gave {scores[place]} for completion {place} of the {wanted}, against which no other one counts; "
            "expected a finite number, or None where it has no say."
        )
    return scores


def _import(name: str, stage: Stage) -> Reward:
    """`package.module:function` or `path/to/file.py:function`; UserError where it cannot be called as it will be."""
    place, colon, attribute = name.rpartition(":")
    if not (place and colon and attribute):
        raise UserError(f"function {name!r}: expected `package.module:function` or `path/to/file.py:function`.")
    file = file_of_function(name, stage)
    if place.endswith(".py") and file is None:
        raise UserError(
            f"function {name!r}: no such file, neither beside {stage.file.name} nor in the working directory."
        )
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, file)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except Exception as error:  # anybody's file
        raise UserError(f"function {name!r}: {type(error).__name__}: {error}") from None
    found = getattr(module, attribute, None)
    if not callable(found):
        names = [known for known, value in vars(module).items() if callable(value) and not known.startswith("_")]
        raise UserError(f"function {name!r}: {place} has no function `{attribute}`.{nearest(attribute, names)}")
    try:
        inspect.signature(found).bind(**dict.fromkeys(_GIVEN))
    except TypeError as error:
        raise UserError(
            f"function {name!r}: {error}. It is called with {', '.join(_GIVEN)} by name: let it take **columns."
        ) from None
    except ValueError:  # of one that has no signature nothing is known
        pass
    return found
