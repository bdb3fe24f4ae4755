"""`hfpipe plan --rehearse`, in the child: some real steps of a stage's own training, timed; nothing of it is kept.

The stage's file builds and trains as in a run; where its parent or its data is not there yet, `hfpipe.training.stand_ins` are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any

from hfpipe import artifact
from hfpipe.errors import UserError
from hfpipe.faults import explain
from hfpipe.plan.quote import Quote, read_origin
from hfpipe.plan.workload import packs
from hfpipe.sections import Recipe, Stage
from hfpipe.stages import stage_module
from hfpipe.stages._run import quiet_environment

MOST_PASSES = 4  # of a step: more of them are the same again
_KEPT_FROM = {"save_strategy": "no", "eval_strategy": "no", "load_best_model_at_end": False, "max_steps": 1_000_000}


def measure(recipe: Recipe, run: Path, name: str, quote: Quote, answers: Any, log: Path) -> None:
    """Send what was measured through the pipe `answers`, or `failed` with the reason."""
    stream = os.open(log, os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    quiet_environment()
    try:
        answers.send(_measure(recipe, run, recipe.stages[name], quote))
    except UserError as error:
        answers.send({"failed": str(error)})
    except BaseException as error:
        answers.send({"failed": explain(error)})


def _measure(recipe: Recipe, run: Path, stage: Stage, quote: Quote) -> dict[str, Any]:
    from hfpipe.training.hardware import describe_machine, keep_freed_memory, memory_meter
    from hfpipe.training.job import Progress, make_job
    from hfpipe.training.stand_ins import STEPS, WARM_UP, Over, Rehearsal

    keep_freed_memory()
    work = quote.work
    passes = min(work.accumulation, MOST_PASSES)
    each = work.length if work.tokens is None else work.places / work.steps / work.rows_per_step
    rehearsal = Rehearsal(
        config=_origin_config(recipe, stage),
        vocab_size=quote.shape.vocab_size if quote.shape else 32_768,
        rows=work.per_device * passes * (WARM_UP + STEPS),
        tokens=round(each),
        packed=packs(stage),
    )
    job = make_job(recipe, _shortened(stage, work, passes), run, parent_fingerprint="")
    with tempfile.TemporaryDirectory() as scratch:
        for folder in run.glob(f"*/{artifact.STAGE_FILE}"):  # finished stages are read where they are
            (Path(scratch) / folder.parent.name).symlink_to(folder.parent.resolve())
        (Path(scratch) / stage.name).unlink(missing_ok=True)
        job = dataclasses.replace(job, run=Path(scratch), rehearsal=rehearsal)
        taken = memory_meter()
        with contextlib.suppress(Over):
            stage_module(stage.type.name).train(job, Progress(None))
        memory = taken()
    seconds, measured = rehearsal.seconds()
    seconds *= work.accumulation / passes
    tokens = rehearsal.tokens_per_row * work.per_device * work.accumulation
    return {
        "device": " and ".join(describe_machine().get("names", ["cpu"])),
        "steps": measured,
        "seconds_per_step": seconds,
        "tokens_per_s": tokens / seconds,
        "memory": memory,
        "made_up": sorted(rehearsal.made_up),
        "passes_of_a_step": f"{passes} of {work.accumulation}",
    }


def _shortened(stage: Stage, work: Any, passes: int) -> Stage:
    """The stage with fewer passes to a step, without an end, and with nothing to save on the way."""
    trainer, sections = {**stage.trainer, **_KEPT_FROM}, dict(stage.sections)
    if getattr(stage.data, "batch_tokens", None):
        sections["data"] = dataclasses.replace(stage.data, batch_tokens=work.per_device * passes * work.length)
        trainer["per_device_train_batch_size"] = work.per_device
    else:
        trainer["gradient_accumulation_steps"] = passes
    return dataclasses.replace(stage, trainer=trainer, sections=sections)


def _origin_config(recipe: Recipe, stage: Stage) -> dict[str, Any]:
    while not stage.model.config and (parent := recipe.parent(stage)):
        stage = parent
    return stage.model.config or read_origin(stage.model.from_ or "")
