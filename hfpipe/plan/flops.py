"""FLOPs of training: 6ND and what it leaves out. A multiplication and an addition are two; norms, softmax and optimizer are left out.

For one token a matrix of m parameters takes 2m forward; backward 2m for the gradient of what went in and 2m for its own. So
training takes 6 for each parameter in a matrix and each token (the table of tokens is looked up, not multiplied; the head is),
and with frozen matrices 4: the gradient has to pass them, but they need none. Below the lowest block that trains there is
no backward pass at all.

Attention's own products, of queries with keys and of weights with values, take 4 s d forward for each layer and token (s tokens
of context, d = heads x head_dim), 12 s d in training: the convention of PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix
B), against which utilisations are published. It counts the whole s x s matrix, half of which a causal mask throws away; kernels
that skip that half (flash attention) do half of it: `causal=True`.

Recomputed activations (gradient checkpointing) take the blocks' forward pass a second time, but for the last matrix of
each, whose output nothing asks for.
"""

from __future__ import annotations

from hfpipe.plan.shapes import EMBEDDING, Shape
from hfpipe.plan.trained import Trained

_LAST = ("down_proj.weight", "mlp.c_proj.weight", "dense_4h_to_h.weight")  # of a block


def attention(shape: Shape, tokens: float, length: float, causal: bool = False, first: int = 0) -> float:
    """FLOPs of the forward products of queries, keys and values, in sequences of `length`, from block `first` on."""
    context = sum(min(length, window or length) for window in shape.windows[first:])
    return 4 * tokens * context * shape.heads * shape.head_dim / (2 if causal else 1)


def forward(
    shape: Shape, tokens: float, length: float, causal: bool = False, head_tokens: float | None = None
) -> float:
    """One pass without gradients; `head_tokens`: those of which logits are asked for, by default all."""
    head = 2 * shape.head_matrix * (tokens if head_tokens is None else head_tokens)
    return 2 * shape.block_matrices * tokens + head + attention(shape, tokens, length, causal)


def training(
    shape: Shape, trained: Trained, tokens: float, length: float, checkpointing: bool = False, causal: bool = False
) -> float:
    """Forward and backward of `tokens`, in sequences of `length`."""
    added = sum(w.numel for w in trained.added if len(w.size) == 2) if trained.targets else 0
    first = trained.first_block(shape)
    through = _matrices(shape, first) if first is not None else 0  # that the gradient passes
    own = sum(_multiplied(shape, name) for name in trained.base)
    passes = forward(shape, tokens, length, causal) + 2 * added * tokens
    back = 2 * tokens * (through + shape.head_matrix + own) + 4 * added * tokens
    back += 2 * attention(shape, tokens, length, causal, first) if first is not None else 0
    again = recomputed(shape, trained, tokens, length, causal) + 2 * added * tokens if checkpointing else 0
    return passes + back + again


def recomputed(shape: Shape, trained: Trained, tokens: float, length: float, causal: bool = False) -> float:
    """The second forward pass of every block, up to the input of its last matrix (through it, where that is adapted)."""
    unasked = sum(
        weight.numel
        for name, weight in shape.weights.items()
        if name.endswith(_LAST) and name.removesuffix(".weight") not in trained.targets
    )
    return 2 * tokens * (shape.block_matrices - unasked) + attention(shape, tokens, length, causal)


def generation(shape: Shape, prompt: float, completion: float, rows: float) -> float:
    """Sampling `rows` completions with a cache: each token once; logits of the prompt's last token and of the rest."""
    tokens = rows * (prompt + completion)
    return forward(shape, tokens, prompt + completion, causal=True, head_tokens=rows * completion)


def _matrices(shape: Shape, first: int) -> int:
    return sum(w.numel for w in shape.weights.values() if w.block is not None and w.block >= first and len(w.size) == 2)


def _multiplied(shape: Shape, name: str) -> int:
    """Parameters of a weight that the gradient of a product falls on."""
    weight = shape.weights[name]
    if len(weight.size) < 2:
        return 0
    if weight.part == EMBEDDING:
        return weight.numel if shape.tied and weight.size[0] == shape.vocab_size else 0
    return weight.numel
