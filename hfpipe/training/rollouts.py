"""A rollout's rows of like length in one pass each, without the columns that are padding alone.

TRL pads a rollout to its longest prompt and its longest completion and deals its rows out at random. Of the passes of one
optimizer step the gradients are added up, so it is free which row is in which, and a pass takes as long as its longest rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

# Losses that add up over rows or tokens. "bnpo" divides by the tokens of a pass, so there it would matter which rows share one.
_ADD_UP = ("grpo", "dapo", "dr_grpo", "cispo", "sapo", "luspo", "vespo")


def by_length(passes: Sequence[dict[str, Any]], args: Any) -> list[dict[str, Any]]:
    """TRL's micro-batches of a rollout (`prompt_ids`, padded on the left, `completion_ids`, on the right, and so on), narrowed.

    The rows of those that make one optimizer step are dealt out by length, where `args` have a loss that adds up over them.
    """
    if "num_images" in passes[0]:
        return list(passes)
    adds_up = getattr(args, "loss_type", "grpo") in _ADD_UP and getattr(args, "top_entropy_quantile", 1.0) == 1.0
    size = args.gradient_accumulation_steps if adds_up else 1
    found: list[dict[str, Any]] = []
    for start in range(0, len(passes), size):
        group = passes[start : start + size]
        rows = {name: _joined([one[name] for one in group]) for name in group[0]}
        lengths = rows["prompt_mask"].sum(1) + rows["completion_mask"].sum(1)
        for places in lengths.argsort(stable=True).chunk(len(group)):
            found.append(_narrowed({name: _taken(value, places) for name, value in rows.items()}))
    return found


def _narrowed(rows: dict[str, Any]) -> dict[str, Any]:
    """Without the columns that no row of it uses."""
    width, used = rows["completion_mask"].size(1), rows["completion_mask"].any(0).nonzero()
    asked = int(rows["prompt_mask"].sum(1).max())
    said = int(used[-1]) + 1 if len(used) else 1
    found = dict(rows)
    for name, value in rows.items():
        if name in ("prompt_ids", "prompt_mask"):
            found[name] = value[:, value.size(1) - asked :]
        elif isinstance(value, torch.Tensor) and value.dim() == 2 and value.size(1) == width:
            found[name] = value[:, :said]
    return found


def _joined(values: list[Any]) -> Any:
    """One value of every row; what is the same for all (a number, nothing) stays one."""
    first = values[0]
    return torch.cat(values) if isinstance(first, torch.Tensor) and first.dim() else first


def _taken(value: Any, places: torch.Tensor) -> Any:
    return value[places] if isinstance(value, torch.Tensor) and value.dim() else value
