"""What the weights themselves say after a stage: effective rank, and the local learning coefficient by devinterp."""

from __future__ import annotations

import importlib.util
import itertools
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfpipe.errors import UserError
from hfpipe.sections import LLC, Evaluate, Recipe

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_LENGTH, _ROWS = 64, 256  # tokens of a row that the LLC is sampled on, and rows at the most


def check_diagnostics(recipe: Recipe) -> None:
    """UserError where a diagnostic needs a package or rows that are not here; imports none."""
    if "llc" not in recipe.pipeline.evaluate.diagnostics:
        return
    for stage in recipe.stages.values():
        if stage.type.leaves == "model" and stage.type.rows != "prompt" and not stage.data.eval:
            raise UserError(f"{stage.file}: evaluate.diagnostics: llc is sampled on held-out rows: give data.eval.")
    if importlib.util.find_spec("devinterp") is None:
        raise UserError(
            f"{recipe.folder / 'pipeline.yaml'}: evaluate.diagnostics: llc needs devinterp, which is not here. "
            'Install it: pip install -c constraints.txt "hfpipe[diagnostics]".'
        )


def diagnose(wanted: Evaluate, model: PreTrainedModel, documents: Iterable[list[int]]) -> dict[str, Any]:
    """`effective_rank` and `llc`, those of them that the recipe wants; `documents`: held-out token ids, none for prompts."""
    found: dict[str, Any] = {}
    if "effective_rank" in wanted.diagnostics:
        found["effective_rank"] = effective_ranks(model)
    if "llc" in wanted.diagnostics and (rows := _rows(documents, wanted.llc.batch_size)):
        found["llc"] = local_learning_coefficient(wanted.llc, model, rows)
    return found


def effective_rank(matrix: torch.Tensor) -> float:
    """exp of the entropy of the normalised singular values, from 1 to the smaller side (Roy and Vetterli 2007)."""
    import torch

    values = torch.linalg.svdvals(matrix.detach().float().cpu())
    return torch.special.entr(values / values.sum()).sum().exp().item()


def effective_ranks(model: PreTrainedModel) -> dict[str, float]:
    """The mean over the hidden matrices of the blocks, and over those of each kind: `q_proj`, `down_proj` ..."""
    from hfpipe.training.regularize import blocks_of

    ranks: dict[str, list[float]] = {}
    for name, weight in blocks_of(model, "evaluate.diagnostics").named_parameters():
        if weight.ndim == 2:
            ranks.setdefault(name.removesuffix(".weight").rpartition(".")[2], []).append(effective_rank(weight))
    everything = [rank for own in ranks.values() for rank in own]
    return {kind: round(sum(own) / len(own), 3) for kind, own in [("mean", everything), *ranks.items()]}


def local_learning_coefficient(settings: LLC, model: PreTrainedModel, rows: list[list[int]]) -> dict[str, float]:
    """Mean and deviation over the chains of SGLD around the weights (Lau et al. 2023); the same for the same rows."""
    import torch
    from datasets import Dataset
    from devinterp.slt.llc import llc

    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]), torch.enable_grad():
        found = llc(
            model,
            Dataset.from_dict({"input_ids": rows}).with_format("torch"),
            {},
            lr=settings.lr,
            n_beta=settings.n_beta,
            num_chains=settings.num_chains,
            num_draws=settings.num_draws,
            num_burnin_steps=settings.num_burnin_steps,
            batch_size=min(settings.batch_size, len(rows)),
            localization=settings.localization,
            device=str(model.device),
            output_path=Path(folder) / "samples.zarr",
        )
        scores = {"mean": found.llc_mean.item(), "std": found.llc_std.item(), "rows": len(rows)}
    model.eval()  # upstream leaves it training
    return {name: round(value, 4) for name, value in scores.items()}


def _rows(documents: Iterable[list[int]], at_least: int) -> list[list[int]]:
    """Documents one after the other, cut to rows of one length: shorter ones where there is little of them."""
    ids = list(itertools.islice(itertools.chain.from_iterable(documents), _LENGTH * _ROWS))
    length = max(2, min(_LENGTH, len(ids) // at_least))
    return [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
