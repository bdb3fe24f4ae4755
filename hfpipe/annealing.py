"""Annealing: what a stage that ends its parent's learning rate schedule may say, beside what parent, and how long it takes.

The parent's schedule has no decay (`constant_with_warmup`, or `warmup_stable_decay` with `num_decay_steps: 0`: WSD's stable
phase; Hu et al. 2024, arXiv:2404.06395); the annealing is the decay, on a better mixture.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hfpipe.sections import Anneal, Stage

# Safetensors; without their suffix, by which a model's weights are known and published.
OPTIMIZER_FILE = "optimizer.state"
LEAST = 0.05  # of its peak: below it a schedule has decayed already
_TO_ZERO = ("linear", "cosine", "warmup_stable_decay")
_END_AT_ZERO = ("linear", "cosine", "cosine_with_restarts", "polynomial")
_SET_BY_ANNEAL = ("learning_rate", "warmup_steps", "max_steps", "num_train_epochs")


def anneals(stage: Stage) -> Anneal | None:
    """The stage's section where it is in use."""
    section = stage.sections.get("anneal")
    return section if section and section.share is not None else None


def annealing_steps(share: float, parent_tokens: float, step_tokens: float) -> int:
    """Steps that see `share` of the parent's tokens, to the nearest one."""
    return max(round(share * parent_tokens / step_tokens), 1)


def schedule_of(stage: Stage) -> tuple[str, dict[str, Any]]:
    """`lr_scheduler_type` and `lr_scheduler_kwargs`, upstream's default where the recipe gives none."""
    options = stage.trainer.get("lr_scheduler_kwargs")
    return str(stage.trainer.get("lr_scheduler_type", "linear")), options if isinstance(options, dict) else {}


def contradictions(stage: Stage) -> Iterator[str]:
    """Keys beside `anneal` and `optimizer.keep_state` that do not go together with them."""
    yield from _keep_state(stage)
    section, (kind, options) = anneals(stage), schedule_of(stage)
    if section is None:
        if "anneal" in stage.sections and stage.sections["anneal"].carry_optimizer:
            yield "anneal.carry_optimizer without anneal.share: say for what share of the parent's tokens, such as 0.1."
        return
    if stage.model.config:
        yield "anneal: the model is made from scratch, by model.config: there is no schedule to go on from."
    if stage.adapter:
        yield "anneal beside adapter: the parent's learning rate is that of its whole weights. Leave one of the two out."
    for key in _SET_BY_ANNEAL:
        if key in stage.trainer:
            yield f"trainer.{key} beside anneal, which sets it by what the parent did: give one of the two."
    if "lr" in (stage.raw.get("optimizer") or {}):
        yield "optimizer.lr beside anneal, which sets it by what the parent did: give one of the two."
    if kind not in (*_TO_ZERO, "constant"):
        yield (
            f"anneal with trainer.lr_scheduler_type = {kind!r}: expected {', '.join(_TO_ZERO)}, which fall to zero over the "
            "stage, or constant, which is to go on without annealing."
        )
    for key in ("num_decay_steps", "num_stable_steps", "min_lr_ratio"):
        if key in options:
            yield f"trainer.lr_scheduler_kwargs.{key} beside anneal: the decay takes the whole stage and ends at zero. Remove it."


def _keep_state(stage: Stage) -> Iterator[str]:
    """Whose state can be carried over: AdamW's and Muon's, of whole weights."""
    if not getattr(stage.sections.get("optimizer"), "keep_state", False):
        return
    if not str(stage.trainer.get("optim", "adamw_torch")).startswith("adamw_torch"):
        yield f"optimizer.keep_state with trainer.optim = {stage.trainer['optim']!r}: what is kept is AdamW's and Muon's state."
    if stage.adapter:
        yield "optimizer.keep_state beside adapter: what an adapter trains is gone when it is merged. Leave one of the two out."


def check_parent(stages: dict[str, Stage], stage: Stage) -> Iterator[str]:
    """What the recipe shows of a parent that an annealing cannot go on from; the rest is looked at when it runs."""
    section, parent = anneals(stage), stages.get(stage.model.from_ or "")
    if section is None:
        return
    if parent is None:
        folder = Path(stage.model.from_ or "").expanduser()
        if section.carry_optimizer and folder.is_dir() and not (folder / OPTIMIZER_FILE).is_file():
            yield no_state(str(folder))
        return
    if parent.type.leaves != "model":
        return  # told already
    kind, ours = (getattr(one.sections.get("optimizer"), "type", None) for one in (parent, stage))
    if kind != ours:
        yield other_optimizer(parent.name, kind, ours)
    if section.carry_optimizer and not getattr(parent.sections.get("optimizer"), "keep_state", False):
        yield no_state(parent.name)
    if _has_decayed(parent):
        yield has_decayed(parent.name, f"its lr_scheduler_type {schedule_of(parent)[0]} ends near zero")


def _has_decayed(stage: Stage) -> bool:
    kind, options = schedule_of(stage)
    if kind == "warmup_stable_decay":
        return bool(options.get("num_decay_steps")) and _floor(options, "min_lr_ratio") < LEAST
    if kind.endswith("with_min_lr"):
        return "min_lr" not in options and _floor(options, "min_lr_rate") < LEAST
    return kind in _END_AT_ZERO


def _floor(options: dict[str, Any], key: str) -> float:
    value = options.get(key)
    return value if isinstance(value, int | float) else 0.0


def has_decayed(parent: str, why: str) -> str:
    return (
        f"anneal: the learning rate of `{parent}` has decayed already ({why}): there is nothing to anneal. Train it with "
        "lr_scheduler_type: constant_with_warmup, or warmup_stable_decay with lr_scheduler_kwargs: {num_decay_steps: 0}."
    )


def no_state(parent: str) -> str:
    return (
        f"anneal.carry_optimizer: `{parent}` keeps no optimizer state. Set optimizer.keep_state: true there, or leave "
        "carry_optimizer out. (It is not published: a model from the Hub has none.)"
    )


def other_optimizer(parent: str, theirs: str | None, ours: str | None) -> str:
    return (
        f"anneal: optimizer.type is {ours or 'null'}, but `{parent}` was trained with {theirs or 'null'}: an annealing goes "
        "on with its parent's optimizer."
    )
