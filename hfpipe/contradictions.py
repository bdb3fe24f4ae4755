"""Keys of a stage that are right alone and wrong together, told before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator

from hfpipe import adapter_types
from hfpipe.sections import Stage


def split_batch(stage: Stage, processes: int) -> list[str]:
    """A batch in tokens that the processes of the recipe cannot share."""
    tokens, length = getattr(stage.data, "batch_tokens", None), getattr(stage.data, "max_length", 1)
    if tokens is None or tokens % (length * processes) == 0:
        return []
    return [
        f"{stage.file}: data.batch_tokens = {tokens} is not a multiple of {length * processes} tokens: one row of "
        f"data.max_length {length} in each of {processes} processes."
    ]


def contradictions(stage: Stage) -> list[str]:
    """One line per pair of keys of which one would silently lose to the other."""
    checks = (_optimizer, _batch, _length, _freeze, _weights, _checkpoints, _rewards, adapter_types.contradictions)
    return [f"{stage.file}: {problem}" for check in checks for problem in check(stage)]


def _optimizer(stage: Stage) -> Iterator[str]:
    section = stage.sections.get("optimizer")
    if section is None:
        return
    if section.type is None:
        if given := ", ".join(stage.raw.get("optimizer") or {}):
            yield f"optimizer has {given} but no type; the one there is is `muon`."
        return
    for key in ("optim", "optim_args", "optim_target_modules"):
        if key in stage.trainer:
            yield f"trainer.{key} beside optimizer.type = '{section.type}': give one of the two."


def _batch(stage: Stage) -> Iterator[str]:
    if getattr(stage.data, "batch_tokens", None) and "gradient_accumulation_steps" in stage.trainer:
        yield "trainer.gradient_accumulation_steps beside data.batch_tokens, which sets it: give one of the two."


def _length(stage: Stage) -> Iterator[str]:
    epochs, steps = stage.trainer.get("num_train_epochs", 1), stage.trainer.get("max_steps", -1)
    if isinstance(epochs, int | float) and isinstance(steps, int) and epochs <= 0 and steps <= 0:
        yield f"trainer.num_train_epochs = {epochs} trains nothing: give more than 0, or trainer.max_steps."


def _freeze(stage: Stage) -> Iterator[str]:
    freeze = stage.sections.get("freeze")
    if freeze is None:
        return
    decay = stage.trainer.get("weight_decay", 0)
    if freeze.embeddings and decay:
        yield (
            f"freeze.embeddings with trainer.weight_decay = {decay}: decay would shrink the frozen rows. "
            "Set weight_decay to 0 or freeze.embeddings to false."
        )


def _weights(stage: Stage) -> Iterator[str]:
    if any(source.weight is not None for source in stage.data.eval):
        yield "data.eval: weight has no meaning here: every held-out source is read whole. Remove it."
    weights = [source.weight for source in stage.data.train]
    if all(weight is None for weight in weights):
        return
    if not stage.type.trainer:
        yield "data.train: weight has no meaning here: a tokenizer reads every source whole. Remove it, or set limit."
    elif any(weight is None or weight <= 0 for weight in weights):
        yield "data.train: give every source a weight above 0, or none of them."


def _rewards(stage: Stage) -> Iterator[str]:
    section = stage.sections.get("rewards")
    if section is None:
        return
    if not section.model and not section.functions:
        yield "rewards: nothing to learn from. Give `model`, a reward stage or model, or `functions`: [{check: number}]."
    for number, item in enumerate(section.functions):
        if (item.check is None) == (item.function is None):
            yield f"rewards.functions[{number}]: give one of `check` and `function`."
        if item.function and item.value is not None:
            yield f"rewards.functions[{number}].value belongs to a check; a function reads the row itself."


def _checkpoints(stage: Stage) -> Iterator[str]:
    if stage.trainer.get("save_only_model") and stage.trainer.get("save_strategy") != "no":
        yield (
            "trainer.save_only_model keeps no optimizer state, so a killed run could not go on from its checkpoints. "
            "Leave it out, or set trainer.save_strategy: 'no'."
        )
