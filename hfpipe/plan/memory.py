"""Memory of training on one device, part by part, from what autograd keeps of transformers' and TRL's own code.

The formulae were read off the tensors that torch saves (tests/test_plan_memory.py asks it) and held against the peak of
whole trainings (benchmarks/memory_of_training.py; the table is in benchmarks/RESULTS.md). Bytes throughout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from hfpipe.plan.activations import blocks_bytes, outer_bytes, transient_bytes
from hfpipe.plan.shapes import Shape
from hfpipe.plan.trained import Trained

_TILE_TOKENS, _TILE_WORDS = 4096, 32768  # of TRL 1.16's fused head (trl.kernels.chunked_logprob, trl.trainer.utils)
KEPT = 1 << 25  # positions times words whose logits `hfpipe.training.head` keeps on a CPU
FOUR_BIT = 0.5 + 1 / 64 * (1 + 4 / 256)  # nf4: a byte for 64 weights' constant, and float32 for 256 of those
_TOGETHER = 1 << 24  # elements that hfpipe's Muon orthogonalises at once
_SAVED_SCALE = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Setting:
    """How a pass is made: what of it stays in memory depends on nothing else."""

    rows: int  # sequences in one forward pass of one device (for pairs two of each)
    length: int  # tokens of each
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"  # of the products, under autocast where the weights have another
    stored: int = 4  # bytes of one of the base's parameters
    four_bit: bool = False  # the matrices in its blocks are in nf4
    attention: str = "sdpa"
    masked: bool = True  # packed or padded rows: sdpa gets a mask, and keys and values repeated for every head
    checkpointing: bool = False
    accumulates: bool = False  # gradients of earlier passes are there while the next one runs
    head: Literal["logits", "tiles", "score"] = "logits"
    optimizer: str = "adamw"
    on_cpu: bool = False
    ranks: int = 1
    sharding: Literal["ddp", "zero1", "zero2", "full"] = "ddp"  # full: FSDP and ZeRO-3

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def width(self) -> int:
        """Bytes of what goes into and comes out of a product."""
        return _SAVED_SCALE[self.dtype]

    @property
    def residual(self) -> int:
        """Bytes of the stream between blocks: the weights' type, since autocast leaves sums as they are."""
        return 4 if self.stored == 4 else 2

    @property
    def casts(self) -> bool:
        """Whether autocast makes a copy of every matrix, and of every product's input."""
        return self.width < 4 == self.stored and not self.four_bit


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. `peak` is no plain sum: not all parts are at their height together."""

    weights: float
    copies: float  # of the matrices in the products' type, by autocast
    gradients: float
    optimizer: float
    activations: float
    logits: float
    peak: float
    others: dict[str, float]  # reference, reward model, critic, kv cache: what lies beside the training itself

    def as_json(self) -> dict[str, float]:
        named = ("weights", "copies", "gradients", "optimizer", "activations", "logits", "peak")
        return {name: round(getattr(self, name)) for name in named} | {n: round(b) for n, b in self.others.items()}


def plan_memory(shape: Shape, trained: Trained, setting: Setting, others: dict[str, float] | None = None) -> Memory:
    """Memory of one device.

    The peak is the highest of: the end of the forward pass, the start of the backward one (all activations and the
    logits' gradients), its end (all gradients, the first block's activations), and the optimizer's step.
    """
    tokens = setting.tokens
    held, added = trained.held(shape), sum(weight.numel for weight in trained.added)
    quantised = shape.block_matrices if setting.four_bit else 0
    weights = setting.stored * (shape.total - quantised) + FOUR_BIT * quantised + 4 * added
    scale = 2 if setting.stored == 2 and not added else 4  # an adapter's weights are float32
    gradients, optimizer = scale * held, optimizer_bytes(shape, trained, setting.optimizer) * scale / 4
    matrices = shape.block_matrices + (0 if shape.scores else shape.head_matrix)
    copies = (2 * matrices if setting.casts else 0) + (2 * added if setting.width == 2 else 0)
    step = step_bytes(shape, trained, setting.optimizer, setting.width)
    if setting.ranks > 1:
        n = setting.ranks
        if setting.sharding == "ddp":
            gradients *= 2  # the buckets hold them once more
        else:
            gradients, optimizer, step = gradients / (1 if setting.sharding == "zero1" else n), optimizer / n, step / n
        if setting.sharding == "full":
            weights = weights / n + 2 * _largest_unit(shape) * (setting.width if setting.casts else setting.stored)
            copies = 0  # what is gathered is in the products' type: the block at work, and the next one
    blocks = [each * tokens for each in blocks_bytes(shape, trained, setting)]
    outer = outer_bytes(shape, trained, setting) * tokens
    passing = transient_bytes(shape, setting) * tokens
    forward_head, backward_head = head_bytes(shape, setting)
    largest, first = max(blocks, default=0), (blocks or [0])[0]
    activations = sum(blocks) + outer
    lasting, again = copies, 0.0
    if setting.checkpointing:
        # A block's input is kept, the rest made anew in the backward pass, its copies too, and dropped after it.
        activations = len(blocks) * setting.residual * shape.hidden_size * tokens + outer
        lasting, again = 0, largest
    there = gradients if setting.accumulates else 0
    twice = 4 * shape.vocab_size * shape.hidden_size if shape.tied and trained.trains_embedding(shape) else 0
    moments = (
        activations + there + (lasting if trained.added else copies) + forward_head,
        activations + there + lasting + backward_head,
        activations + there + lasting + passing + again,
        first + gradients + passing + twice,
        gradients + step,
    )
    others = others or {}
    peak = weights + optimizer + sum(others.values()) + max(moments)
    logits = max(forward_head, backward_head)
    return Memory(weights, copies, gradients, optimizer, activations, logits, peak, others)


def head_bytes(shape: Shape, setting: Setting) -> tuple[float, float]:
    """What the logits take at the end of the forward pass, and at the start of the backward one.

    `logits`: all of them in the products' type, in float32, and their log-softmax; then that, its gradient and the logits'.
    `tiles`: TRL's fused head never has more than one tile; its kernel works in place, its plain torch form (on a CPU) on
    seven float32 copies. Small ones are whole on a CPU: logits, log-softmax, and two of their size for the entropy; then
    that, two gradients, and one in the products' type. All positions are taken to be scored.
    """
    tokens = setting.tokens
    words = shape.vocab_size * tokens
    if setting.head == "score":
        return 0.0, 0.0
    if setting.head == "tiles":
        tile = min(tokens, _TILE_TOKENS) * min(shape.vocab_size, _TILE_WORDS)
        if not setting.on_cpu:
            tile = min(tokens, _TILE_TOKENS) * _TILE_WORDS
            return tile * setting.width, tile * setting.width + 4 * shape.hidden_size * tokens
        if words <= KEPT:
            return 16 * words, (setting.width + 12) * words
        return tile * (setting.width + 16), tile * (setting.width + 29) + 4 * shape.hidden_size * tokens
    return (8 if setting.width == 4 else setting.width + 8) * words, 12 * words


def optimizer_bytes(shape: Shape, trained: Trained, optimizer: str) -> float:
    """State of an optimizer, by `trainer.optim`'s names and `muon`, for float32 weights."""
    tensors = list(trained.tensors(shape))
    total = sum(weight.numel for weight in tensors)
    if optimizer == "muon":
        hidden = sum(w.numel for w in tensors if _is_hidden(w))
        return 4 * hidden + 8 * (total - hidden)
    if "adafactor" in optimizer:
        return 4 * sum(sum(w.size) if len(w.size) > 1 else w.numel for w in tensors)
    if "8bit" in optimizer:
        small = sum(w.numel for w in tensors if w.numel < 4096)
        moments = 1 if "lion" in optimizer else 2
        return moments * (total - small) + 4 * moments * small
    if "sgd" in optimizer:
        return 0.0
    return (4 if "lion" in optimizer or "adagrad" in optimizer else 8) * total


def step_bytes(shape: Shape, trained: Trained, optimizer: str, width: int = 2) -> float:
    """What a step of the optimizer takes for itself for a moment; products have `width` bytes a number."""
    tensors = list(trained.tensors(shape))
    if optimizer == "muon":
        sizes: dict[tuple[int, ...], int] = {}
        for weight in tensors:
            if _is_hidden(weight):
                sizes[weight.size] = sizes.get(weight.size, 0) + weight.numel
        together = [min(total, max(_TOGETHER // (a * b), 1) * a * b) for (a, b), total in sizes.items()]
        return (4 + 5 * width) * max(together, default=0)  # the update in float32, five more as products are
    if "adafactor" in optimizer:
        return 8 * max((w.numel for w in tensors), default=0)
    return 0.0


def largest_batch(
    shape: Shape, trained: Trained, setting: Setting, limit: float, others=None, step: int = 1
) -> int | None:
    """The most rows of a pass that fit into `limit` bytes, a multiple of `step`; 0 where not even the least does.

    None where they are without bound: nothing grows with the batch.
    """

    def fits(rows: int) -> bool:
        return plan_memory(shape, trained, replace(setting, rows=rows * step), others).peak <= limit

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
        if high > 1 << 24:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def kv_cache(shape: Shape, rows: int, length: int, width: int = 2) -> float:
    """Keys and values of `rows` sequences of `length` tokens."""
    context = sum(min(length, window or length) for window in shape.windows)
    return 2.0 * rows * context * shape.kv_heads * shape.head_dim * width


def disk_bytes(shape: Shape, trained: Trained, optimizer: str, checkpoints: int, merged: bool = True) -> float:
    """Weights left at the end, and `checkpoints` that hold what trains with the optimizer's state, all in float32."""
    added = sum(weight.numel for weight in trained.added)
    saved = 4 * (added or shape.total)
    left = 4 * ((shape.total if merged else 0) + added) if added else 4 * shape.total
    return left + checkpoints * (saved + optimizer_bytes(shape, trained, optimizer))


def _is_hidden(weight) -> bool:
    return weight.block is not None and len(weight.size) == 2


def _largest_unit(shape: Shape) -> int:
    """Parameters of the largest piece that is gathered at once: a block, or what lies outside the blocks."""
    blocks = [0] * shape.layers
    outside = 0
    for weight in shape.weights.values():
        if weight.block is None:
            outside += weight.numel
        else:
            blocks[weight.block] += weight.numel
    return max([outside, *blocks])
