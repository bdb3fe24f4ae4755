"""Annealing while it runs: from the parent's last learning rate to zero, with its optimizer's state where that was kept."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hfpipe import artifact
from hfpipe.annealing import LEAST, OPTIMIZER_FILE, annealing_steps, anneals, has_decayed, no_state, other_optimizer
from hfpipe.errors import UserError
from hfpipe.progress import quantity
from hfpipe.training.optim import MuonWithAdamW

if TYPE_CHECKING:
    from transformers import Trainer

    from hfpipe.sections import Optimizer
    from hfpipe.training.job import Job, Progress
    from hfpipe.training.prepare import Prepared

_STATE = {True: {"momentum_buffer"}, False: {"step", "exp_avg", "exp_avg_sq"}}  # of Muon, of AdamW


def begin_where_parent_stood(job: Job, args: Any, data: Prepared, progress: Progress) -> None:
    """Give an annealing stage's arguments their learning rate, schedule and steps; others are left as they are.

    Raises:
        UserError: the parent left no learning rate, has decayed already, or was trained with another optimizer.
    """
    section = anneals(job.stage)
    if section is None or job.rehearsal:  # there the parent may not have been trained yet
        return
    metrics = _parent_metrics(job)
    rate, tokens = metrics["last_rate"], metrics["tokens"]
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    args.max_steps = annealing_steps(section.share, tokens, data.tokens_per_row * rows)
    args.learning_rate = rate["learning_rate"]
    set_schedule(args, args.max_steps)
    progress.note(
        f"anneal: {args.max_steps} steps, {section.share:.3g} of the {quantity(tokens)} tokens of {job.stage.model.from_}; "
        f"learning_rate {rate['learning_rate']:.3g}{_muon(rate)}, where its schedule stood, {args.lr_scheduler_type.value}"
    )


def _muon(rate: dict[str, float]) -> str:
    return f", Muon's lr {rate['lr']:.3g}" if "lr" in rate else ""


def set_schedule(args: Any, steps: int) -> None:
    """Have `warmup_stable_decay` decay over all of the steps."""
    if args.lr_scheduler_type == "warmup_stable_decay":
        args.lr_scheduler_kwargs = {**(args.lr_scheduler_kwargs or {}), "num_decay_steps": steps}


def optimizer_section(job: Job) -> Optimizer | None:
    """The stage's section, in an annealing with the learning rate at which the parent's Muon stood."""
    section = job.stage.sections.get("optimizer")
    if section is None or section.type is None or anneals(job.stage) is None or job.rehearsal:
        return section
    return dataclasses.replace(section, lr=_parent_metrics(job)["last_rate"]["lr"])


def last_rate(trainer: Trainer, section: Optimizer | None) -> dict[str, float] | None:
    """The learning rates of the last step, and the share of the schedule's peak that they are."""
    logged = [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]
    given = trainer.args.learning_rate
    peak = trainer.optimizer.param_groups[0].get("initial_lr", given)  # of the group whose rate is logged
    if not logged or not peak:
        return None
    share = logged[-1] / peak
    muon = {"lr": section.lr * share} if section is not None and section.type is not None else {}
    return {"learning_rate": given * share, "of_peak": share} | muon


def _parent_metrics(job: Job) -> dict[str, Any]:
    """The parent's metrics, with a `last_rate` that can be gone on from."""
    where, parent = f"{job.stage.file}: ", str(job.stage.model.from_)
    record = artifact.read_record(Path(job.parent_path) / artifact.STAGE_FILE) or {}
    metrics = record.get("metrics", {})
    rate = metrics.get("last_rate")
    if not rate or not metrics.get("tokens"):
        raise UserError(
            f"{where}anneal: {parent} does not say how it was trained: its {artifact.STAGE_FILE} is missing or names no "
            "learning rate. Start from a stage that hfpipe has trained, or set max_steps and learning_rate instead."
        )
    if rate["of_peak"] < LEAST:
        raise UserError(where + has_decayed(parent, f"to {rate['of_peak']:.2g} of its peak"))
    ours = job.stage.sections["optimizer"].type
    if ("lr" in rate) != (ours is not None):
        raise UserError(where + other_optimizer(parent, "muon" if "lr" in rate else None, ours))
    return metrics


# --- the optimizer's state ---


def keep_state(trainer: Trainer, folder: Path) -> None:
    """Write the optimizer's state by parameter, `model.norm.weight/exp_avg`, for a stage that carries it on."""
    from safetensors.torch import save_file

    state, model = trainer.optimizer.state, trainer.accelerator.unwrap_model(trainer.model)
    save_file(
        {
            f"{name}/{kind}": tensor.detach().cpu().contiguous()
            for name, parameter in model.named_parameters()
            for kind, tensor in state.get(parameter, {}).items()
        },
        folder / OPTIMIZER_FILE,
    )


def carry_state(job: Job, trainer: Trainer, progress: Progress) -> None:
    """Give the trainer's optimizer the parent's state of every parameter of the same name and shape.

    Raises:
        UserError: the parent has kept none.
    """
    from safetensors.torch import load_file

    file = Path(job.parent_path) / OPTIMIZER_FILE
    if not file.is_file():
        raise UserError(f"{job.stage.file}: {no_state(str(job.stage.model.from_))}")
    kept: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, tensor in load_file(file).items():
        name, _, kind = key.rpartition("/")
        kept[name][kind] = tensor
    whole = trainer.optimizer
    parts = whole.parts if isinstance(whole, MuonWithAdamW) else [whole]
    owner = {id(p): part for part in parts for group in part.param_groups for p in group["params"]}
    trained = [(name, p) for name, p in trainer.model.named_parameters() if p.requires_grad]
    anew = []
    for name, p in trained:
        state, part = kept.get(name, {}), owner[id(p)]
        same = all(tensor.shape in (p.shape, ()) for tensor in state.values())
        if same and state.keys() == _STATE[isinstance(part, torch.optim.Muon)]:
            part.state[p] = state
        else:
            anew.append(name)
    told = f"; {', '.join(anew[:3])} begin anew" if anew else ""
    progress.note(f"optimizer: the parent's state of {len(trained) - len(anew)} of {len(trained)} parameters{told}")
