"""What a stage will cost and read, by arithmetic alone: no torch, no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hfpipe.adapter_types import describe
from hfpipe.annealing import anneals, schedule_of
from hfpipe.plan.advice import advise
from hfpipe.plan.devices import Devices
from hfpipe.plan.ordering import describe_order
from hfpipe.plan.quote import Quote, as_json, quote_stage
from hfpipe.progress import duration, money, quantity
from hfpipe.sections import Recipe, Stage

_LAUNCHES_S = 0.02  # of a step on a GPU: some hundreds of kernels forward and backward, at some ten microseconds each


def describe_stage(
    recipe: Recipe, stage: Stage, run: Path | None = None, devices: Devices | None = None
) -> dict[str, Any]:
    """All numbers of a stage's quote, and `notes`: a few lines that read like one."""
    notes = [f"data: {', '.join(_source(s) for s in stage.data.train)}"] if stage.data.train else []
    if order := describe_order(stage.data):
        notes[0] += f"; {order}"
    if stage.adapter:
        notes.append(f"adapter: {describe(stage.adapter)}")
    if not stage.type.trainer:
        return {"notes": notes}
    try:
        quote = quote_stage(recipe, stage, run, devices)
        warnings = advise(recipe, stage, quote)
    except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
        # What upstream makes of such values is told when the model is made; here they are no reason to stop.
        return {"notes": [*notes, f"unknown: no quote can be made of these values ({type(error).__name__}: {error})"]}
    notes += _lines(stage, quote)
    notes += [f"warning: {told.text} [{told.name}]" for told in warnings]
    told = [{"name": warning.name, "text": warning.text} for warning in warnings]
    return {**as_json(quote), "warnings": told, "learning_rate": stage.trainer.get("learning_rate"), "notes": notes}


def warn(recipe: Recipe, stage: Stage, run: Path) -> list[str]:
    """The warnings of a stage that is about to run."""
    return [note for note in describe_stage(recipe, stage, run)["notes"] if note.startswith("warning: ")]


def _lines(stage: Stage, quote: Quote) -> list[str]:
    work, shape, about = quote.work, quote.shape, "" if quote.work.exact else "about "
    lines = []
    if shape:
        told = f"model: {shape.model_type}, {quantity(shape.total)} parameters, {quantity(shape.embedding)} of them embeddings"
        if quote.trained and quote.trained.count(shape) != shape.total:
            told += f"; {quantity(quote.trained.count(shape))} train"
        lines.append(told)
    unit = "completions" if stage.type.rows == "prompt" else "pairs" if stage.type.rows == "preference" else "rows"
    rate = stage.trainer.get("learning_rate") or "of upstream"
    if annealing := anneals(stage):
        rate = f"from where that of {stage.model.from_} stood, {schedule_of(stage)[0]}"
        lines.append(f"anneal: {annealing.share:.3g} of the tokens that {stage.model.from_} trains on")
    parts = [f"{about}{work.steps:,} steps" if work.steps else "steps unknown"]
    parts[0] += f" of {work.rows_per_step} {unit}, at most {work.length} tokens each; learning_rate {rate}"
    if work.tokens:
        parts.append(f"{about}{quantity(work.tokens)} tokens")
    if quote.flops:
        parts.append(f"{sum(quote.flops.values()):.2g} FLOPs")
    lines.append(f"work: {', '.join(parts)}")
    if quote.seconds is not None:
        lines.append(f"time: {_time(quote)}")
    if quote.memory:
        lines.append(f"memory: {_memory(quote)}")
    return lines + [f"unknown: {reason}" for reason in quote.unknown]


def _time(quote: Quote) -> str:
    devices = quote.devices
    cost = devices.cost(quote.seconds)
    told = f"about {duration(max(quote.seconds, 1))}"
    if cost is not None:
        told += f" and {money(cost)}"
    elif devices.key != "cpu":
        told += " (no price is known: --price)"
    peak = "fp32" if getattr(devices, quote.dtype) is None else quote.dtype
    told += f" on {devices.label}, at {devices.utilisation:.0%} of its {peak} peak"
    each = quote.seconds / quote.work.steps
    if devices.key != "cpu" and each < _LAUNCHES_S:
        told += f"; at {1000 * each:.2g} ms a step it takes longer: launching the kernels does"
    return told


def _memory(quote: Quote) -> str:
    memory, devices = quote.memory, quote.devices
    parts = {"weights": memory.weights, "gradients": memory.gradients, "optimizer": memory.optimizer}
    parts |= {"activations": memory.activations + memory.copies, "logits": memory.logits, **memory.others}
    told = ", ".join(
        f"{name.replace('_', ' ')} {_size(n)}"
        for name, n in parts.items()
        if n >= 0.01 * memory.peak or name == "weights"
    )
    fits = (
        "not one row fits"
        if quote.largest == 0
        else f"up to {quote.largest:,} rows a pass fit into {devices.memory:.0f} GB"
    )
    if quote.largest and quote.largest < quote.work.per_device:
        fits = f"too much for {devices.memory:.0f} GB: lower per_device_train_batch_size to {quote.largest}"
    return f"{_size(memory.peak)} ({told}); {fits}; disk {_size(quote.disk)}"


def _size(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def _source(source: Any) -> str:
    return source.path if source.weight is None else f"{source.path} ({source.weight:g})"
