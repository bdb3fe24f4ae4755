"""`model.share_prefixes`: what the two conversations of a pair begin with is read once, in training as in scoring.

TRL passes a batch of pairs as twice as many rows, first all chosen conversations, then all rejected ones. Here the chosen one and
what the rejected one has of its own make one row, where the latter sees the beginning and itself alone, at the positions that it
has in its own row (Wang and Hegde 2024, "Accelerating Direct Preference Optimization with Prefix Sharing", arXiv:2410.20305).
The hidden states come back in upstream's rows, so that heads, losses and gradients are what they were, up to rounding.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hfpipe.errors import UserError
from hfpipe.faults import no_memory

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from hfpipe.training.job import Job, Progress

# A pair's one row is longer than either of the two, and attention's work grows with its square: beyond this it is not worth it.
_LONGEST = 1.5
_ROUNDING = 0.03  # of the largest hidden state: bfloat16's, whatever the weights are kept in
_TRIED = 50  # batches of training, after which it is told that none of them was worth it
_FAILURES = (TypeError, ValueError, RuntimeError, IndexError)  # of a model that knows no positions, or no such mask
_MASKS = ("eager", "sdpa")  # attention that takes a mask of our own
_KEY = "model.share_prefixes"
_PLAIN = frozenset(["input_ids", "attention_mask", "use_cache", "return_dict"])


def share_prefixes(job: Job, model: PreTrainedModel, progress: Progress) -> None:
    """Have the model's backbone read batches of pairs so.

    Raises:
        UserError: its attention takes no mask of ours, or the model says something else with it.
    """
    if not job.stage.model.share_prefixes:
        return
    where = f"{job.stage.file}"
    check_shares(model.config, model.config.get_text_config()._attn_implementation, where)
    kind, why = model.config.model_type, ""
    try:
        off = _difference(model)
    except _FAILURES as error:
        if no_memory(error):
            raise
        off, why = float("inf"), f" ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
    if not off < _ROUNDING:
        raise UserError(
            f"{where}: {_KEY}: a {kind} model reads two conversations in one row otherwise than alone{why}. Leave it out."
        )
    install(model, progress.note)
    progress.note("what both sides of a pair begin with is read once (model.share_prefixes)")


def check_shares(config: PreTrainedConfig, attention: str | None, where: str) -> None:
    """UserError where a model of this configuration, with this implementation of attention, can't be given a mask of ours."""
    config = config.get_text_config()
    kinds, hint = set(getattr(config, "layer_types", None) or ()), "Leave it out."
    if attention not in (None, *_MASKS):
        why = f"attn_implementation {attention}"
        hint = f"Set model.attn_implementation: {' or '.join(_MASKS)}, or leave it out."
    elif hasattr(config, "output_router_logits") and getattr(config, "router_aux_loss_coef", 0):
        why = "experts, whose balance is learnt from upstream's rows"
    elif kinds - {"full_attention"}:
        why = f"layers of {', '.join(sorted(kinds - {'full_attention'}))}"
    elif not kinds and getattr(config, "sliding_window", None):
        why = f"a sliding window of {config.sliding_window} tokens"
    else:
        return
    raise UserError(
        f"{where}: {_KEY} needs attention that takes any mask over the whole row, and this model has {why}. {hint}"
    )


@dataclass
class _Folded:
    """How a batch of pairs lies in rows of one pair each; all (pairs, width) int64, where padding repeats what is there."""

    ids: torch.Tensor
    positions: torch.Tensor
    part: torch.Tensor  # 0 for what both begin with, 1 for the chosen rest, 2 for the rejected rest
    back: torch.Tensor  # (2 * pairs, length): the place in its pair's row of each token of upstream's rows

    def mask(self) -> torch.Tensor:
        """(pairs, 1, width, width) bool: who sees whom."""
        places = torch.arange(self.part.size(1), device=self.part.device)
        earlier = places[None, :] <= places[:, None]
        own = (self.part[:, None, :] == 0) | (self.part[:, None, :] == self.part[:, :, None])
        return (earlier & own)[:, None]


def fold(ids: torch.Tensor, mask: torch.Tensor) -> _Folded | None:
    """One row for each pair, of (2 * pairs, length) token ids padded on the right; None where it would not pay."""
    if len(ids) % 2 or not torch.equal(mask, mask.cumprod(1)):
        return None
    chosen, rejected = ids.chunk(2)
    (of_chosen, of_rejected), length = mask.sum(1).chunk(2), ids.size(1)
    same = (chosen == rejected) & mask.chunk(2)[0].bool() & mask.chunk(2)[1].bool()
    shared = same.long().cumprod(1).sum(1)
    width = int((of_chosen + of_rejected - shared).max())
    if width > _LONGEST * length:
        return None
    places = torch.arange(width, device=ids.device).expand(len(chosen), width)
    own = places >= of_chosen[:, None]  # the rejected one's
    positions = torch.where(own, places - (of_chosen - shared)[:, None], places).clamp(max=length - 1)
    tokens = torch.arange(length, device=ids.device).expand(len(chosen), length)
    after = torch.where(tokens < shared[:, None], tokens, tokens + (of_chosen - shared)[:, None])
    return _Folded(
        ids=torch.where(own, rejected.gather(1, positions), chosen.gather(1, positions)),
        positions=positions,
        part=(places >= shared[:, None]).long() + own.long(),
        back=torch.cat([tokens, after]).clamp(max=width - 1),
    )


_apart = False


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Leave batches in upstream's rows, which take the most memory: not all of a training need be worth sharing."""
    global _apart
    _apart = True
    try:
        yield
    finally:
        _apart = False


class _Fold:
    """Hooks of a backbone: its inputs in rows of pairs, its hidden states in upstream's rows again."""

    def __init__(self, note: Callable[[str], None] | None):
        self.note, self.tried = note, 0
        self.folded: _Folded | None = None

    def before(self, backbone: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = self._fold(backbone, args, kwargs)
        if self.note and torch.is_grad_enabled() and not _apart:
            self.tried += 1
            if given is not None:
                self.note = None
            elif self.tried == _TRIED:
                self.note(
                    f"model.share_prefixes saves nothing: in {_TRIED} batches pairs had too little in common, or another form"
                )
        return given

    def _fold(self, backbone: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kwargs = dict(zip(inspect.signature(backbone.forward).parameters, args, strict=False)) | kwargs
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        others = [name for name in kwargs.keys() - _PLAIN if kwargs[name] is not None and kwargs[name] is not False]
        self.folded = None
        if _apart:
            return None
        # With a cache it answers rows that are no pairs.
        if others or ids is None or mask is None or mask.dim() != 2 or kwargs.get("use_cache") is not False:
            return None
        self.folded = fold(ids, mask)
        if self.folded is None:
            return None
        seen = self.folded.mask()
        if backbone.config.get_text_config()._attn_implementation == "eager":
            none = torch.finfo(backbone.dtype).min
            seen = torch.zeros(seen.shape, dtype=backbone.dtype, device=seen.device).masked_fill(~seen, none)
        ours = {"input_ids": self.folded.ids, "attention_mask": seen, "position_ids": self.folded.positions}
        return (), kwargs | ours

    def after(self, backbone: PreTrainedModel, args: tuple[Any, ...], output: Any) -> Any:
        folded, self.folded = self.folded, None
        if folded is None:
            return output
        hidden = output.last_hidden_state
        places = folded.back[..., None].expand(-1, -1, hidden.size(-1))
        output.last_hidden_state = torch.cat([hidden.gather(1, half) for half in places.chunk(2)])
        return output


def install(model: PreTrainedModel, note: Callable[[str], None] | None = None) -> list[Any]:
    """Put the hooks on the model's backbone, and have it noted where they turn out to be of no use; returns their handles."""
    hooks, backbone = _Fold(note), model.base_model
    return [
        backbone.register_forward_pre_hook(hooks.before, with_kwargs=True),
        backbone.register_forward_hook(hooks.after),
    ]


@torch.no_grad()
def _difference(model: PreTrainedModel) -> float:
    """By how much the hidden states of a short pair differ so, as a share of the largest of them."""
    training, backbone = model.training, model.base_model
    model.eval()
    vocab = model.get_input_embeddings().num_embeddings
    ids = torch.arange(8, device=model.device) + torch.tensor([[vocab // 3], [vocab // 3]], device=model.device)
    ids[1, 5:] += vocab // 7 + 1
    inputs = {"input_ids": ids % vocab, "attention_mask": torch.ones_like(ids), "use_cache": False}
    alone = backbone(**inputs).last_hidden_state
    hooks = install(model)
    shared = backbone(**inputs).last_hidden_state
    for hook in hooks:
        hook.remove()
    model.train(training)
    return float((shared - alone).abs().max() / alone.abs().max())
