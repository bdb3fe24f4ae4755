"""What in a recipe looks wrong for its size and data: each with its reason, none of them an error, each silenced by its name.

    plan: {silence: [tokens_per_parameter]}   # in pipeline.yaml

The ranges of learning rates are those of the field, scaled for size: the peak of pretraining falls with the cube root of the
parameters, 6e-4 at 125M (Brown et al. 2020, arXiv:2005.14165, table 2.1: 6e-4 at 125M, 2e-4 at 1.3B, 6e-5 at 175B), and each
later stage has a range as a share of it. An adapter takes ten times what whole training does (Schulman et al. 2025).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from hfpipe.annealing import anneals, schedule_of
from hfpipe.plan.quote import Quote
from hfpipe.plan.scaling import TOKENS_PER_PARAMETER
from hfpipe.plan.workload import option
from hfpipe.progress import quantity
from hfpipe.sections import Recipe, Stage

# Of the peak of pretraining at this size. Midtraining 1e-5 to 1e-4, fine-tuning 1e-6 to 1e-5 are what is common from 1B to 7B.
_RATES = {
    "pretrain": (0.1, 3.0),
    "midtrain": (0.03, 1.0),
    "sft": (0.003, 0.5),
    "reward": (0.003, 0.5),
    "kto": (0.0003, 0.3),
    "dpo": (0.0003, 0.3),
    "ppo": (0.0001, 0.1),
    "grpo": (0.0001, 0.1),
    "rloo": (0.0001, 0.1),
}
_EPOCHS = {"pretrain": 4, "midtrain": 3}  # others 5. Up to 4 are nearly as good as new text: arXiv:2305.16264
_FEW_ROWS, _FEWEST = (
    1000,
    100,
)  # of 125M parameters and more; fewer for smaller models, with the square root of the size
_FEW_STEPS = 10
_REPEATS = 4
_FAR = (
    5  # times fewer or more tokens a parameter than 20; a longer training than that is often meant, for use is cheaper
)
_FAR_MORE = 100


class Advice(NamedTuple):
    """One piece of advice: the name that silences it, the stage, the words."""

    name: str
    stage: str
    text: str


def usual_peak(params: float) -> float:
    """The peak learning rate of pretraining, AdamW, that is usual for a model of so many parameters."""
    return 6e-4 * (params / 125e6) ** (-1 / 3)


def advise(recipe: Recipe, stage: Stage, quote: Quote) -> list[Advice]:
    """All that is not silenced."""
    silenced = recipe.pipeline.plan.silence
    checks = ((name, check) for name, check in _CHECKS.items() if name not in silenced)
    return [Advice(name, stage.name, text) for name, check in checks for text in check(recipe, stage, quote)]


def _whole_rate(stage: Stage) -> float | None:
    """The learning rate, an adapter's as that of whole training."""
    rate = option(stage, "learning_rate")
    return None if not isinstance(rate, int | float) else rate / (10 if stage.adapter else 1)


def _rate(recipe: Recipe, stage: Stage, quote: Quote) -> Iterator[str]:
    rate, shares = _whole_rate(stage), _RATES.get(stage.type.name)
    if quote.shape is None or shares is None or not rate or anneals(stage):
        return
    times = 10 if stage.adapter else 1
    low, high = (usual_peak(quote.shape.total) * share * times for share in shares)
    if not low <= rate * times <= high:
        wrong = (
            "so low that little is learnt"
            if rate * times < low
            else "so high that it may diverge, or overwrite what was learnt"
        )
        yield (
            f"learning_rate {rate * times:.2g} is {wrong}: {low:.1g} to {high:.1g} is usual for {stage.type.name} at "
            f"{quantity(quote.shape.total)} parameters{' under an adapter' if stage.adapter else ''}"
        )


def _order(recipe: Recipe, stage: Stage, quote: Quote) -> Iterator[str]:
    parent = recipe.parent(stage)
    if parent is None or parent.type.trainer is None or anneals(stage) or anneals(parent):
        return
    rate, before = _whole_rate(stage), _whole_rate(parent)
    if rate and before and rate > before:
        adapted = " (an adapter's rate counts a tenth)" if stage.adapter or parent.adapter else ""
        yield f"learning_rate {rate:.2g} is above `{parent.name}`'s {before:.2g}{adapted}: rates fall from stage to stage, or the later forgets the earlier"


def _rows(recipe: Recipe, stage: Stage, quote: Quote) -> Iterator[str]:
    rows = None if any(size.rows is None for size in quote.sizes) else sum(size.rows for size in quote.sizes)
    if quote.shape is None or rows is None or stage.type.rows == "text":
        return
    needed = max(_FEWEST, min(_FEW_ROWS, _FEW_ROWS * (quote.shape.total / 125e6) ** 0.5))
    if rows < needed:
        yield f"{rows} examples are few for {quantity(quote.shape.total)} parameters: below some {needed:.0f} they are learnt by heart"


def _epochs(recipe: Recipe, stage: Stage, quote: Quote) -> Iterator[str]:
    work, most = quote.work, _EPOCHS.get(stage.type.name, 5)
    if not work.rows or not work.steps or stage.type.rows == "prompt":
        return
    passes = work.steps * work.rows_per_step / work.rows
    if passes > most + 0.5:
        yield f"every row is seen {passes:.0f} times: beyond {most} epochs a {stage.type.name} stage learns by heart. Give more rows, or train less"


def _replay(recipe: Recipe, stage: Stage, quote: Quote) -> Iterator[str]:
    section = stage.sections.get("regularize")
    held = section and (section.l2_to_parent or section.average_with_parent or section.freeze_layers)
    if stage.type.name not in ("midtrain", "sft") or stage.adapter or held:
        return
    if not any(source.as_ == "text" for source in stage.data.train):
        yield "nothing holds what earlier stages taught: add a source of their text (as: text), or regularize.l2_to_parent"


def _batch(recipe: Recipe, stage: Stage, quote: Quote) -> Iterator[str]:
    work = quote.work
    if work.steps and work.rows and work.steps < _FEW_STEPS and work.epochs:
        yield f"{work.steps} steps in all: a batch of {work.rows_per_step} is large for {work.rows} rows"


def _context(recipe: Recipe, stage: Stage, quote: Quote) -> Iterator[str]:
    longest = quote.shape and quote.shape.max_positions
    if longest and quote.work.length > longest:
        yield f"rows may have {quote.work.length} tokens, but the model was made for {longest}: model.max_position_embeddings and rope_parameters make it longer"


def _decay(recipe: Recipe, stage: Stage, quote: Quote) -> Iterator[str]:
    """Upstream reckons where it begins back from the end."""
    (kind, options), steps = schedule_of(stage), quote.work.steps
    if kind != "warmup_stable_decay" or "num_stable_steps" in options or anneals(stage) or not steps:
        return
    decay, warmup = options.get("num_decay_steps") or 0, option(stage, "warmup_steps") or 0
    warmup = round(warmup * steps) if warmup < 1 else warmup
    if warmup + decay > steps:
        yield (
            f"num_decay_steps = {decay} after {warmup:g} of warm-up, and {steps} steps in all: learning_rate would jump down as soon as it is warmed up. "
            "Give trainer.lr_scheduler_kwargs.num_decay_steps a part of the steps, such as two fifths"
        )


def _tokens(recipe: Recipe, stage: Stage, quote: Quote) -> Iterator[str]:
    if not stage.model.config or quote.shape is None or not quote.work.tokens:
        return
    ratio = quote.work.tokens / quote.shape.total
    if ratio < TOKENS_PER_PARAMETER / _FAR:
        yield f"{ratio:.2g} tokens a parameter, where about {TOKENS_PER_PARAMETER} are best for the cost: a smaller model would learn more from the same work"
    elif ratio > TOKENS_PER_PARAMETER * _FAR_MORE:
        yield f"{ratio:.2g} tokens a parameter, where about {TOKENS_PER_PARAMETER} are best for the cost: a larger model would learn more from the same work"


def _repeats(recipe: Recipe, stage: Stage, quote: Quote) -> Iterator[str]:
    """Only a stream repeats a source for its weight; else as much is taken as the scarcest allows."""
    if not getattr(stage.data, "streaming", False) or not quote.work.tokens or any(s.rows is None for s in quote.sizes):
        return
    weights = [source.weight or 1.0 for source in stage.data.train]
    for source, size, weight in zip(stage.data.train, quote.sizes, weights, strict=True):
        share = weight / sum(weights)
        passes = quote.work.tokens * share / max(size.rows * size.bytes_per_row / quote.bytes_per_token, 1)
        if passes > _REPEATS:
            yield f"{source.path} is read {passes:.0f} times over for its weight of {share:.0%}: beyond {_REPEATS} it is learnt by heart"


_CHECKS = {
    "learning_rate": _rate,
    "learning_rate_order": _order,
    "few_examples": _rows,
    "many_epochs": _epochs,
    "no_replay": _replay,
    "large_batch": _batch,
    "context": _context,
    "long_decay": _decay,
    "tokens_per_parameter": _tokens,
    "repeated_source": _repeats,
}
