"""The data of all stages, before the first of them trains, by two processes that meet halfway."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

from hfpipe.adapter_types import find_kind
from hfpipe.sections import Recipe, Stage
from hfpipe.stages import stage_module
from hfpipe.training.job import Progress, make_job


def prepare_all(recipe: Recipe, run: Path, stages: list[str], progress: Progress) -> None:
    """Check the stages one after the other, and put their rows into the store.

    Raises:
        UserError: upstream refuses a value, or rows are at fault.
    """
    from hfpipe.evaluation.basics import prepare_held_out
    from hfpipe.evaluation.needle import build_needles
    from hfpipe.evaluation.text_metrics import load_metrics
    from hfpipe.training.models import load_tokenizer, try_regularize, try_scaling
    from hfpipe.training.order import find_order

    load_metrics(recipe.pipeline.evaluate.metrics)
    for name in stages:
        stage = recipe.stages[name]
        module = stage_module(stage.type.name)
        check_trainer(stage)
        if not hasattr(module, "prepare"):
            continue
        job = make_job(recipe, stage, run, parent_fingerprint="")  # the data does not depend on the parent's weights
        if "regularize" in stage.sections:
            try_regularize(job, about_to_run=stages)
        try_scaling(job, about_to_run=stages)
        tokenizer = load_tokenizer(job, about_to_run=stages)
        progress.tell("doing", text="preparing data", stage=name)
        prepared = module.prepare(job, tokenizer)
        find_order(job, prepared)
        for source in prepared.report["sources"]:
            progress.tell("data", text=source["text"], stage=name)
        prepare_held_out(job, tokenizer)
        if recipe.pipeline.evaluate.needle:
            build_needles(recipe, tokenizer)  # what is wrong with them is told before anything trains


def prepare_backwards(recipe: Recipe, run: Path, stages: list[str]) -> None:
    """Put the rows of the last stage into the store, then those of the one before it: what one process has made the other finds."""
    from hfpipe.training.models import load_tokenizer

    for name in reversed(stages):
        stage = recipe.stages[name]
        module = stage_module(stage.type.name)
        if hasattr(module, "prepare"):
            with contextlib.suppress(Exception):  # the other process comes to it too, and tells it in its order
                job = make_job(recipe, stage, run, parent_fingerprint="")
                module.prepare(job, load_tokenizer(job, about_to_run=stages))


def check_trainer(stage: Stage) -> None:
    """Let upstream's own class check the values of a `trainer` section, before any stage is trained."""
    if stage.type.trainer is None:
        return
    from hfpipe.training.adapters import build_adapter
    from hfpipe.training.fit import construct_args, try_optimizer, try_passes
    from hfpipe.training.quantised import try_out

    build_adapter(stage)
    if stage.adapter and find_kind(stage.adapter.type).four_bit:
        try_out()
    with tempfile.TemporaryDirectory() as folder:
        args = construct_args(stage, folder, seed=0)
    try_optimizer(stage, args)
    try_passes(stage, args)
