"""What holds a stage to its parent, against forgetting: frozen parts, lower rates for lower blocks, a pull to its weights, and
an average with them.

A stage's loss with `l2_to_parent` is its own loss + l2 * sum over the trained weights of (w - w_parent)^2, a sum and no
mean, as L2-SP (Li et al. 2018, arXiv:1802.01483) without its factor 1/2. Under LoRA it is the own loss + l2 * sum over the
adapted matrices of ||scaling * B A||^2 (Frobenius), the squared distance of the merged weights from the parent's. A new head
has no parent and is left free; so is PPO's critic. Rows of the embeddings that a stage adds are held to where they start.

With `average_with_parent` a stage leaves (1 - share) * trained + share * parent's weights, as WiSE-FT (Wortsman et al. 2021,
arXiv:2109.01903), which takes back more of what a stage does by chance than of what it learns; for preferences Lin et al. 2023
(arXiv:2309.06256). Under LoRA these are the merged weights, and a new head is left as trained. TRL's MergeModelCallback averages
folders on the disk, through mergekit, and knows no adapters.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback

from hfpipe.errors import UserError, nearest
from hfpipe.training.optim import MuonWithAdamW

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

    from hfpipe.training.job import Job, Progress

_SHOWN = 12  # names of modules in a message


# --- what does not train ---


def freeze(job: Job, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: Progress) -> None:
    """Freeze what the stage's `regularize` section says."""
    section = job.stage.sections["regularize"]
    freeze_layers(model, section.freeze_layers, f"{job.stage.file}")
    parameters = list(model.parameters())
    if section.freeze_layers:
        frozen, total = sum(p.numel() for p in parameters if not p.requires_grad), model.num_parameters()
        progress.note(f"frozen: {frozen:,} of {total:,} parameters, by regularize.freeze_layers")
    if section.freeze_embeddings and job.stage.adapter is None:  # an adapter leaves them alone in any case
        from hfpipe.training.models import added_tokens

        new = 0 if job.stage.model.config else added_tokens(job, tokenizer)
        special = _freeze_ordinary_rows(model, tokenizer, new)
        also = f", and those of the {new} tokens added here" if new else ""
        progress.note(f"frozen: embedding rows of ordinary tokens; {special} special tokens' rows train{also}")


def freeze_layers(model: nn.Module, layers: int | tuple[str, ...], where: str) -> None:
    """Freeze the first `layers` blocks, the last ones where it is negative, or the modules and weights that it names.

    A name may be the end of a longer one (`mlp` is every block's, `layers.0.mlp` the first block's), with `*` and `[01]` as in
    file names. Tied weights are frozen under either of their names.

    Raises:
        UserError: more blocks than there are, a name that nothing has, nothing left to train.
    """
    key = f"{where}: regularize.freeze_layers"
    if isinstance(layers, int):
        if layers == 0:
            return
        stack = blocks_of(model, where)
        if abs(layers) > len(stack):
            raise UserError(f"{key} = {layers}, but the model has {len(stack)} blocks.")
        chosen: list[Any] = list(stack)[:layers] if layers > 0 else list(stack)[layers:]
    else:
        chosen = [found for name in layers for found in _named(model, name, key)]
    for found in chosen:
        found.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"{key} = {layers if isinstance(layers, int) else list(layers)} freezes all there is to train.")


def _named(model: nn.Module, pattern: str, key: str) -> list[nn.Module | nn.Parameter]:
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    known = {**modules, **dict(model.named_parameters(remove_duplicate=False))}
    found = [known[name] for name in known if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")]
    if any(isinstance(part, nn.Parameter) or any(True for _ in part.parameters()) for part in found):
        return found
    if found:
        raise UserError(f"{key} names {pattern!r}, which has no weights.")
    ends = {name[start:] for name in known for start in (0, *(m.end() for m in re.finditer(r"\.", name)))}
    general = list(dict.fromkeys(re.sub(r"\.\d+\b", ".*", name) for name in modules))
    raise UserError(
        f"{key} names {pattern!r}, but the model has no module or weight of that name.{nearest(pattern, sorted(ends))} "
        f"It has {', '.join(general[:_SHOWN])}{' ...' if len(general) > _SHOWN else ''}"
    )


def find_blocks(model: nn.Module) -> nn.ModuleList | None:
    """The list of the model's transformer blocks, the first one first; None where it keeps them in no list."""
    count = model.config.get_text_config().num_hidden_layers
    return next((m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count), None)


def blocks_of(model: nn.Module, where: str) -> nn.ModuleList:
    """`find_blocks`, for what `regularize` says of them; UserError where there are none."""
    stack = find_blocks(model)
    if stack is None:
        config = model.config.get_text_config()
        raise UserError(
            f"{where}: regularize: a {config.model_type} model keeps its {config.num_hidden_layers} blocks in no list that "
            "hfpipe finds. Name modules in freeze_layers, and leave out layerwise_lr_decay."
        )
    return stack


def _freeze_ordinary_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, new: int) -> int:
    """Let only the special tokens' and the last `new` rows of embeddings and head train; returns how many are special."""
    special = sorted({i for i in tokenizer.added_tokens_decoder if i < len(tokenizer)})
    ends = (model.get_input_embeddings(), model.get_output_embeddings())  # a reward model has no second one
    for weight in {id(m.weight): m.weight for m in ends if m is not None}.values():
        if not weight.requires_grad:
            continue  # frozen whole
        keep = torch.zeros(weight.shape[0], 1)
        keep[special] = 1
        keep[len(tokenizer) - new : len(tokenizer)] = 1
        weight.register_hook(lambda grad, keep=keep: grad * keep.to(grad.device, grad.dtype))
    return len(special)


# --- learning rates ---


def spread_rates(optimizer: torch.optim.Optimizer, model: nn.Module, decay: float, where: str) -> None:
    """Give block i of n `decay ** (n - 1 - i)` times its group's rate, embeddings `decay ** n` times, all else the rate itself.

    All else: final norm and head (a tied head is an embedding), PPO's critic. Groups keep their weight decay, and schedules
    multiply the rates; the Trainer logs that of the first group, so the highest comes first.
    """
    stack = blocks_of(model, where)
    shares = {id(p): decay ** (len(stack) - 1 - i) for i, block in enumerate(stack) for p in block.parameters()}
    tables = [model.get_input_embeddings(), *(m for m in model.modules() if isinstance(m, nn.Embedding))]
    for parameter in (p for table in tables for p in table.parameters()):
        shares.setdefault(id(parameter), decay ** len(stack))
    parts = optimizer.parts if isinstance(optimizer, MuonWithAdamW) else [optimizer]
    for part in parts:
        split = []
        for group in part.param_groups:
            by_share = defaultdict(list)
            for parameter in group["params"]:
                by_share[shares.get(id(parameter), 1.0)].append(parameter)
            split += [(share, {**group, "params": ps, "lr": group["lr"] * share}) for share, ps in by_share.items()]
        part.param_groups = [group for _, group in sorted(split, key=lambda pair: -pair[0])]
    if isinstance(optimizer, MuonWithAdamW):
        optimizer.join_groups()


# --- the pull to the parent ---


class PullToParent(TrainerCallback):
    """The gradient of the penalty, added once an optimizer step, its value, logged as `l2_to_parent`, and the average at the end.

    Made before a checkpoint is loaded, so that the weights it copies are the parent's: one copy of the trained ones, in their
    type, on their device where the penalty takes it at every step, else in the host's memory; under LoRA none. The logged loss
    is the stage's own, without the penalty.
    """

    def __init__(self, model: nn.Module, l2: float):
        self.l2 = l2
        self.pairs = list(_lora_pairs(model))
        by_pair = {id(weight) for a, b, _ in self.pairs for weight in (a, b)}
        trained = (p for p in model.parameters() if p.requires_grad and id(p) not in by_pair)
        self.copies = [(p, p.detach().to(p.device if l2 else "cpu", copy=True)) for p in trained]

    @property
    def copied_bytes(self) -> int:
        return sum(copy.numel() * copy.element_size() for _, copy in self.copies)

    @torch.no_grad()
    def value(self) -> float:
        """l2 times the squared distance, of the weights as they are."""
        own = [(p.float() - copy.float()).square().sum() for p, copy in self.copies]
        adapted = [scaling**2 * ((b.T @ b) * (a @ a.T)).sum() for a, b, scaling in _floats(self.pairs)]
        return self.l2 * sum(part.item() for part in (*own, *adapted))

    @torch.no_grad()
    def add_gradient(self, loss_scale: float = 1.0) -> None:
        """Add 2 * l2 * (w - w_parent), for LoRA 2 * l2 * scaling^2 * (B A A^T for B, B^T B A for A), to what is there."""
        factor = 2 * self.l2 * loss_scale
        for parameter, copy in self.copies:
            if parameter.grad is not None:  # without one the optimizer leaves the weight where it is
                parameter.grad.add_(parameter - copy, alpha=factor)
        for (a, b, scaling), (low_a, low_b, _) in zip(_floats(self.pairs), self.pairs, strict=True):
            for weight, gradient in ((low_b, b @ (a @ a.T)), (low_a, (b.T @ b) @ a)):
                if weight.grad is not None:
                    weight.grad.add_(gradient.to(weight.grad.dtype), alpha=factor * scaling**2)

    @torch.no_grad()
    def average(self, share: float) -> None:
        """Leave (1 - share) * trained + share * parent's weights; for LoRA by its B, since the delta is scaling * B A."""
        for parameter, copy in self.copies:
            parameter.copy_(torch.lerp(parameter.float(), copy.to(parameter.device, torch.float32), share))
        for _, b, _ in self.pairs:
            b.mul_(1 - share)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            state.log_history[-1]["l2_to_parent"] = self.value()


def hold_to_parent(job: Job, trainer: Trainer, progress: Progress) -> PullToParent | None:
    """What holds the stage to its parent as `l2_to_parent` and `average_with_parent` say; None where neither is asked for."""
    section = job.stage.sections["regularize"]
    if not section.l2_to_parent and not section.average_with_parent:
        return None
    refuse_sharded(job, trainer)
    model = trainer.model if job.stage.adapter is None else trainer.model.get_base_model()
    with_parent = model.base_model if job.stage.type.leaves == "reward_model" else model  # not the new head
    pull = PullToParent(with_parent, section.l2_to_parent)
    kept = f"a copy of the trained weights takes {pull.copied_bytes / 1e6:.1f} MB" if pull.copies else "on LoRA's delta"
    if section.l2_to_parent:
        take_in(trainer, pull)
        progress.note(f"pull to the parent: l2 {section.l2_to_parent:g}, {kept}")
    if section.average_with_parent:
        share = section.average_with_parent
        progress.note(
            f"average with the parent at the end: {share:g} of its weights, {1 - share:g} of the trained; {kept}"
        )
    return pull


def take_in(trainer: Trainer, pull: PullToParent) -> None:
    """Have a trainer of upstream's add the penalty's gradient after a step's last backward pass, before it is clipped."""
    upstream_step, accelerator = trainer.training_step, trainer.accelerator

    # Upstream has no event between the two. The ranks' gradients are averaged by then, and every rank adds the same.
    def training_step(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = upstream_step(*args, **kwargs)
        if accelerator.sync_gradients:
            pull.add_gradient(accelerator.scaler.get_scale() if accelerator.scaler else 1.0)
        return loss

    trainer.training_step = training_step
    trainer.add_callback(pull)


def is_sharded(trainer: Trainer) -> bool:
    """Whether each process holds a part of the model alone."""
    return trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled


def refuse_sharded(job: Job, trainer: Trainer) -> None:
    """UserError where the weights of a model lie in parts on several devices."""
    if is_sharded(trainer):
        raise UserError(
            f"{job.stage.file}: regularize's l2_to_parent, average_with_parent and layerwise_lr_decay take a model that is whole on each device: one "
            "process, or several under DDP. Leave them out under FSDP and DeepSpeed."
        )


def _lora_pairs(model: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter, float]]:
    """(A, B, scaling) of every adapted matrix: A is (r, in), B (out, r)."""
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for name in layer.active_adapters:
                if name in layer.lora_A:
                    yield layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
                elif name in layer.lora_embedding_A:
                    yield layer.lora_embedding_A[name], layer.lora_embedding_B[name], layer.scaling[name]


def _floats(pairs: list[tuple[Any, Any, float]]) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
    return ((a.float(), b.float(), scaling) for a, b, scaling in pairs)
