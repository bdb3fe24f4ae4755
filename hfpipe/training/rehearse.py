"""A rehearsal before a stage trains: a step, an evaluation and a save at their largest, so that memory runs out at once or not at all."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hfpipe.errors import UserError
from hfpipe.faults import LESS_MEMORY, no_memory
from hfpipe.training.hardware import give_back_freed_memory
from hfpipe.training.prefixes import apart

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import Trainer

    from hfpipe.training.job import Job, Progress

_LOGS = ("_metrics", "_total_train_tokens")  # what TRL's trainers count of the batches that they see


def rehearse(job: Job, trainer: Trainer, progress: Progress) -> None:
    """Train and evaluate on the longest rows and write the weights, to no effect: the results are the same bits without it.

    Raises:
        UserError: memory does not suffice; names the largest batch that would fit, found by trying (half, in several processes).
    """
    args, scratch = trainer.args, job.checkpoints / "rehearsal"
    if trainer.is_deepspeed_enabled or "lomo" in args.optim or args.optim.endswith("layerwise"):
        progress.note("no rehearsal: here the optimizer steps inside the backward pass")
        return
    progress.tell("doing", text="rehearsing: a step, an evaluation and a save at the largest batch")
    with _to_no_effect(trainer, scratch), apart():
        given, state = args.per_device_train_batch_size, _optimizer_state(trainer)
        rows = longest_rows(trainer.train_dataset, args.train_batch_size)
        step = args.gradient_accumulation_steps * given
        smaller = [n for n in range(given - 1, 0, -1) if step % n == 0]  # with as many rows in an optimizer step
        _try(job, trainer, "per_device_train_batch_size", lambda size: _train(trainer, rows[:size], step), smaller)
        del state
        if trainer.eval_dataset is not None:
            given, held_out = args.per_device_eval_batch_size, longest_rows(trainer.eval_dataset, args.eval_batch_size)
            smaller = [given >> n for n in range(1, given.bit_length())]
            _try(job, trainer, "per_device_eval_batch_size", lambda size: _evaluate(trainer, held_out[:size]), smaller)
        _try(job, trainer, None, lambda _: trainer.save_model(str(scratch), _internal_call=True), [])


def pass_longest(job: Job, trainer: Trainer) -> None:
    """The training passes of a rehearsal alone, to no effect."""
    args = trainer.args
    with _to_no_effect(trainer, job.checkpoints / "rehearsal"):
        given = args.per_device_train_batch_size
        rows = longest_rows(trainer.train_dataset, args.train_batch_size)[:given]
        _train(trainer, rows, args.gradient_accumulation_steps * given)
        trainer.model_wrapped.zero_grad()


@contextlib.contextmanager
def _to_no_effect(trainer: Trainer, scratch: Path) -> Iterator[None]:
    """Random states and what trainers count are as before, and `scratch`, a folder for what is written, is gone."""
    if trainer.is_world_process_zero():
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    trainer.accelerator.wait_for_everyone()
    trainer._save_rng_state(str(scratch))
    kept = copy.deepcopy({name: value for name, value in vars(trainer).items() if name in _LOGS})
    try:
        yield
    finally:
        vars(trainer).update(kept)
        trainer._load_rng_state(str(scratch))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        shutil.rmtree(scratch)


def longest_rows(rows: Dataset | IterableDataset, count: int) -> list[dict[str, Any]]:
    """The rows with the most tokens, some of them twice where there are too few; of a stream the first ones."""
    from datasets import Dataset

    if isinstance(rows, Dataset):
        names = [name for name in rows.column_names if name == "input_ids" or name.endswith(("_ids", "_end"))]
        parts = rows.select_columns(names).with_format("arrow").iter(10_000)
        lengths = [sum(part[name].combine_chunks().value_lengths().to_numpy() for name in names) for part in parts]
        found = [rows[int(place)] for place in np.argsort(-np.concatenate(lengths), kind="stable")[:count]]
    else:
        found = list(itertools.islice(rows, count))
    return list(itertools.islice(itertools.cycle(found), count))


def _train(trainer: Trainer, rows: list[dict[str, Any]], step: int) -> None:
    """The passes of an optimizer step of `step` rows: the second one runs while the first one's gradients are held."""
    trainer.current_gradient_accumulation_steps = passes = 1 if len(rows) == step else 2
    trainer.accelerator.gradient_state._set_sync_gradients(True)
    for _ in range(passes):
        batch = trainer.data_collator(rows)
        items = trainer._get_num_items_in_batch([batch], trainer.args.device)
        # The class's own: the guards and the pull to the parent, which wrap it, see nothing of this.
        type(trainer).training_step(trainer, trainer.model_wrapped, batch, items)


def _evaluate(trainer: Trainer, rows: list[dict[str, Any]]) -> None:
    trainer.model_wrapped.eval()
    trainer.prediction_step(trainer.model_wrapped, trainer.data_collator(rows), prediction_loss_only=True)


def _optimizer_state(trainer: Trainer) -> list[torch.Tensor]:
    """Room for the state that the optimizer will hold, by what its groups say of themselves."""
    held = []
    for group in trainer.optimizer.param_groups:
        moments = 2 if "betas" in group else 1 if group.get("momentum") else 0
        for parameter in group["params"]:
            dtype = torch.uint8 if "8bit" in trainer.args.optim else parameter.dtype
            held += [torch.empty_like(parameter, dtype=dtype, requires_grad=False) for _ in range(moments)]
    return held


def _try(job: Job, trainer: Trainer, key: str | None, act: Callable[[int], Any], smaller: list[int]) -> None:
    """Run `act` at the recipe's size; where memory runs out, find the largest of the `smaller` ones that fits and say so."""
    args, given = trainer.args, getattr(trainer.args, key) if key else 0
    if (problem := _attempt(trainer, act, given)) is None:
        return
    told = f"{job.stage.file}: there is not enough memory, as a rehearsal before training has found ({problem}): "
    if key is None:
        raise UserError(f"{told}the weights cannot be gathered and written. {LESS_MEMORY}")
    told += f"trainer.{key} = {given} rows of this stage's longest do not fit. "
    alone = args.world_size == 1  # one process of several cannot try by itself: the others would wait for it
    # With room to spare: a process that begins anew lays its memory out otherwise, on a CPU by up to a quarter (measured).
    spare = 4 if torch.cuda.is_available() else 2
    spared = (n for n in smaller if _attempt(trainer, act, n + n // spare) is None)
    fitting = next(spared, None) if alone else next((n for n in smaller if n <= given // 2), 1)
    if fitting is None:
        raise UserError(f"{told}Not even one row does. Lower max_length, or set trainer.gradient_checkpointing: true.")
    told += f"trainer.{key}: {fitting} {'fits' if alone else 'may fit'}"
    if "train" in key and not getattr(job.stage.data, "batch_tokens", None):
        steps = args.gradient_accumulation_steps * given // fitting
        told += f", with trainer.gradient_accumulation_steps: {steps} for as many rows a step as now"
    raise UserError(f"{told}.")


def _attempt(trainer: Trainer, act: Callable[[int], Any], size: int) -> str | None:
    """What memory ran out on, in a few words; None where it did not. Other faults are raised."""
    problem = None
    try:
        act(size)
    except Exception as error:
        if trainer.args.auto_find_batch_size or not no_memory(error):
            raise  # upstream lowers the batch itself
        problem = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    finally:
        trainer.model_wrapped.zero_grad()
    if problem:
        gc.collect()
        give_back_freed_memory()
    return problem
