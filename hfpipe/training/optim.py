"""Muon on the hidden matrices with AdamW on the rest, as one optimizer that the Trainer can step, save and restore."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from hfpipe.sections import Optimizer
from hfpipe.training.hardware import choose_bf16

_TOGETHER = 1 << 24  # elements of the matrices that are orthogonalised at once


def split_parameters(model: torch.nn.Module) -> tuple[list[Any], list[Any], list[Any]]:
    """Trainable parameters as (hidden matrices, other matrices, vectors).

    Hidden matrices are the two-dimensional weights but embeddings, of tokens or positions, and the output head (Jordan et al.
    2024, "Muon: an optimizer for hidden layers in neural networks"). A reward model's new head, one row, is among them: its
    update is its gradient at unit length. Experts that are fused into one tensor of three dimensions are not.
    """
    outer = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    if (head := model.get_output_embeddings()) is not None:
        outer.add(id(head.weight))
    hidden, matrices, vectors = [], [], []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2:
            vectors.append(parameter)
        elif parameter.ndim == 2 and id(parameter) not in outer:
            hidden.append(parameter)
        else:
            matrices.append(parameter)
    return hidden, matrices, vectors


class BatchedMuon(torch.optim.Muon):
    """torch.optim.Muon (2.13) with matrices of one shape orthogonalised together; the upstream class takes them one by one.

    The update is the same up to the rounding of bfloat16; options, state and its names are upstream's. Where the hardware has no
    bfloat16 they are orthogonalised in float32: a CPU that has none takes thirty to sixty times as long for its products.
    """

    def __init__(self, params: Any, **options: Any):
        super().__init__(params, **options)
        self.dtype = torch.bfloat16 if choose_bf16()[0] else torch.float32

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure else None
        for group in self.param_groups:
            for params in _of_one_shape(group["params"]):
                self._step_together(params, group)
        return loss

    def _step_together(self, params: list[torch.Tensor], group: dict[str, Any]) -> None:
        grads = [p.grad for p in params]
        averages = []
        for p in params:
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p.grad)
            averages.append(state["momentum_buffer"])
        torch._foreach_lerp_(averages, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, averages, group["momentum"]) if group["nesterov"] else averages
        updates = orthogonalise(
            torch.stack([u.to(self.dtype) for u in updates]), group["ns_coefficients"], group["ns_steps"], group["eps"]
        )
        rows, columns = params[0].shape
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        for p, update in zip(params, updates, strict=True):
            p.add_(update, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonalise(
    matrices: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """Newton-Schulz iteration towards the nearest orthogonal matrix of each: (n, rows, columns) -> the same."""
    a, b, c = coefficients
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _of_one_shape(params: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The parameters that have a gradient, in groups of one shape that are not too large to be copied together."""
    groups: dict[torch.Size, list[torch.Tensor]] = {}
    for p in params:
        if p.grad is not None:
            groups.setdefault(p.shape, []).append(p)
    for shape, members in groups.items():
        together = max(_TOGETHER // shape.numel(), 1)
        for first in range(0, len(members), together):
            yield members[first : first + together]


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimizers seen as one: their param groups are shared, so one schedule drives both."""

    def __init__(self, parts: list[torch.optim.Optimizer]):
        self.parts = parts
        super().__init__([{"params": p} for part in parts for g in part.param_groups for p in g["params"]], {})
        self.join_groups()

    def join_groups(self) -> None:
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> dict[Any, Any]:
        return {p: s for part in self.parts for p, s in part.state.items()}

    @state.setter
    def state(self, value: Any) -> None:
        pass  # torch's base class assigns an empty one; the parts hold theirs

    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure else None
        for part in self.parts:
            part.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.join_groups()


def build_muon(model: torch.nn.Module, section: Optimizer, args: Any) -> torch.optim.Optimizer:
    """Muon with the section's options, `torch.optim.AdamW` with the trainer's, joined."""
    hidden, matrices, vectors = split_parameters(model)
    parts: list[torch.optim.Optimizer] = []
    if hidden:
        muon = BatchedMuon(
            hidden,
            lr=section.lr,
            momentum=section.momentum,
            nesterov=section.nesterov,
            weight_decay=section.weight_decay,
            ns_steps=section.ns_steps,
        )
        parts.append(muon)
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    if matrices or vectors:
        adamw = torch.optim.AdamW(
            [g for g in groups if g["params"]],
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            fused=True,
        )
        parts.append(adamw)
    return MuonWithAdamW(parts)
