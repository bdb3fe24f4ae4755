"""What autograd keeps of a forward pass, in bytes a token, for the blocks that transformers 5.23 has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfpipe.plan.shapes import NORM, Shape
from hfpipe.plan.trained import Trained

if TYPE_CHECKING:
    from hfpipe.plan.memory import Setting

# Linear layers that read the same input, by the end of their names; with the size of that input.
_READS = (
    (("q_proj", "k_proj", "v_proj", "qkv_proj", "attn.c_attn", "query_key_value"), "hidden"),
    (("o_proj", "attn.c_proj", "attention.dense"), "attention"),
    (("gate_proj", "up_proj", "gate_up_proj", "mlp.c_fc", "dense_h_to_4h"), "hidden"),
    (("down_proj", "mlp.c_proj", "dense_4h_to_h"), "inner"),
)
_LAYER_NORMS = ("gpt2", "gpt_neox")
_FUSED = ("phi3", "gpt2", "gpt_neox")
_SANDWICHED = ("gemma2", "gemma3_text")  # norms after attention and MLP as well
_NORMS_ON_HEADS = ("qwen3", "gemma3_text")
_ONE_PLUS = ("gemma", "gemma2", "gemma3_text")  # norms that multiply in float32, by 1 + weight


def blocks_bytes(shape: Shape, trained: Trained, setting: Setting) -> list[float]:
    """Of each block, from the first one that a gradient has to reach; none where none trains."""
    first = trained.first_block(shape)
    if first is None:
        return []
    blocks: dict[int, list[str]] = {}
    for name, weight in shape.weights.items():
        if weight.block is not None and weight.block >= first:
            blocks.setdefault(weight.block, []).append(name)
    known: dict[tuple[bool, ...], float] = {}
    found = []
    for names in blocks.values():
        like = tuple(name in trained.base or name.removesuffix(".weight") in trained.targets for name in names)
        if like not in known:
            known[like] = _block_bytes(shape, trained, setting, names)
        found.append(known[like])
    return found


def _block_bytes(shape: Shape, trained: Trained, setting: Setting, weights: list[str]) -> float:
    h, q, kv, f = (
        shape.hidden_size,
        shape.heads * shape.head_dim,
        shape.kv_heads * shape.head_dim,
        shape.intermediate_size,
    )
    w = setting.width
    sizes = {"hidden": h, "attention": q, "inner": f}
    names = [name.removesuffix(".weight") for name in weights if len(shape.weights[name].size) == 2]
    trains = any(shape.weights[name].part == NORM and name in trained.base for name in weights)
    kept = 0.0
    for ends, source in _READS:
        readers = [n for n in names if n.endswith(ends)]
        saving = [n for n in readers if _asks(n, trained)]
        if not saving:
            continue
        adapted = bool(trained.added) and w == 2  # the adapter is float32: what it reads is cast there and back
        if source == "attention" and not _own_output(shape, setting) and not adapted:
            continue  # attention's own output, which its backward pass keeps in any case
        each = adapted or (setting.casts and source == "hidden")  # a copy for each
        kept += w * sizes[source] * (len(saving) if each else 1)
    kept += _ranks(shape, trained) * w
    kept += _norms(shape, trains, setting, h, q, kv)
    kept += _attention(shape, setting, q, kv)
    kept += _activation(shape, setting, f)
    return kept


def _own_output(shape: Shape, setting: Setting) -> bool:
    """Whether what the last layer of the attention reads is another tensor than what attention itself keeps."""
    if shape.model_type == "gpt2" and not shape.dropout:
        return setting.attention == "eager"
    return setting.attention == "eager" or shape.model_type in _FUSED


def outer_bytes(shape: Shape, trained: Trained, setting: Setting) -> float:
    """Outside the blocks: the last norm, the head's input, the token ids."""
    h = shape.hidden_size
    trains = any(
        weight.part == NORM and weight.block is None and name in trained.base for name, weight in shape.weights.items()
    )
    return 4 * h * (2 if trains else 1) + (setting.width * h if setting.casts else 0) + 8 * 3


def transient_bytes(shape: Shape, setting: Setting) -> float:
    """What the backward pass of one block takes beside what is kept: gradients of what it made."""
    f, h, w = shape.intermediate_size, shape.hidden_size, setting.width
    mlp = 3 * f * w + 2 * h * 4
    if setting.attention == "eager":
        scores = shape.heads * setting.length
        return max(mlp, scores * (4 + 4 + w))
    return mlp


def _asks(name: str, trained: Trained) -> bool:
    """Whether a layer's weight gets a gradient, so that its input is kept."""
    return f"{name}.weight" in trained.base or name in trained.targets


def _ranks(shape: Shape, trained: Trained) -> float:
    """What lies between the two matrices of an adapter, in the mean of the blocks."""
    if trained.adapter not in ("lora", "bottleneck"):
        return 0.0
    inner = [w.size[0] for w in trained.added if len(w.size) == 2 and w.block is not None]
    return sum(inner[::2]) / shape.layers * (3 if trained.adapter == "bottleneck" else 1)


def _norms(shape: Shape, trains: bool, setting: Setting, h: int, q: int, kv: int) -> float:
    if shape.model_type in _LAYER_NORMS:
        # GPT-NeoX's two norms read the same sum.
        return (1 if shape.model_type == "gpt_neox" else 2) * setting.residual * h + 16
    whole = shape.model_type in _ONE_PLUS
    norms = 4 if shape.model_type in _SANDWICHED else 2
    kept = norms * h * (4 + (4 if whole or setting.residual == 4 else 2) * trains) + 4 * norms
    if shape.model_type in _NORMS_ON_HEADS:
        kept += (q + kv) * (4 + (4 if whole else setting.width) * trains) + 4 * (shape.heads + shape.kv_heads)
    return kept


def _attention(shape: Shape, setting: Setting, q: int, kv: int) -> float:
    w, scores = setting.width, shape.heads * setting.length
    fused = shape.model_type in _FUSED  # queries, keys and values are views of one tensor, which values keep whole
    # With dropout sdpa has no fused kernel on a CPU, and there as elsewhere its noise is kept.
    if setting.attention == "eager" or (shape.dropout and setting.on_cpu):
        kept = w * 3 * q + scores * (4 + (w if w == 2 else 0))
        if shape.model_type == "gemma2":
            kept += w * scores  # the tanh of its soft cap
        if shape.dropout:
            kept += 2 * w * shape.hidden_size + (8 if w == 4 else 2) * scores
            kept += 4 * scores + 6 * q if w == 2 and setting.attention != "eager" else 0
        return kept
    expanded = setting.masked and setting.attention == "sdpa"
    if shape.model_type == "gpt2":
        return w * (4 * q + (setting.length if expanded else 0)) + 4 * shape.heads
    values = (q if kv < q else q + 2 * kv if fused else q) if expanded else (q + 2 * kv if fused else kv)
    keys = q if expanded else kv
    kept = w * (2 * q + keys + values) + 4 * shape.heads
    return kept + (w * setting.length if expanded else 0)


def _activation(shape: Shape, setting: Setting, f: int) -> float:
    """The MLP's own function: its input, its output and, where it is gated, the other factor."""
    # bitsandbytes gives back what it was given: float32, unless the model was stored in bfloat16.
    w = 4 if setting.four_bit and setting.stored == 4 else setting.width
    if shape.model_type == "gpt2":
        return w * 4 * f  # gelu_new, written out
    if shape.model_type == "gpt_neox":
        return w * f
    return w * 3 * f
