"""The weights of a model, name by name, from its configuration alone: no torch, nothing loaded.

The names are those of `state_dict`, so that what freezes or adapts modules by name can be counted exactly. What a
configuration leaves out is filled in from the defaults of its class in transformers, read from the installed source.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from hfpipe import upstream
from hfpipe.errors import UserError

# Types whose blocks are a Llama's: separate projections, a gated MLP, RMS norms.
_LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3")
KNOWN = (*_LIKE_LLAMA, "phi3", "gpt2", "gpt_neox")
_FOUR_NORMS = ("gemma2", "gemma3_text")
_NORMS_ON_HEADS = ("qwen3", "gemma3_text")  # queries and keys, each with a norm of head_dim
_SAME = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
         "max_position_embeddings": "n_positions", "intermediate_size": "n_inner"}  # fmt: skip
NOT_TEXT = ("vision_config", "audio_config")  # beside `text_config`: parts that are not counted here
_BIASES = ("attention_bias", "mlp_bias")
EMBEDDING, HEAD, ATTENTION, MLP, NORM = "embedding", "head", "attention", "mlp", "norm"


@dataclass(frozen=True)
class Weight:
    """One parameter tensor: its sizes, the part of the model that it belongs to, its block where it is in one."""

    size: tuple[int, ...]  # of a linear layer (outputs, inputs), of GPT-2's (inputs, outputs), as they are stored
    part: str
    block: int | None = None

    @property
    def numel(self) -> int:
        return prod(self.size)


@dataclass(frozen=True)
class Shape:
    """A causal language model, or with `scores` a model that gives one number in place of the vocabulary's logits."""

    model_type: str
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int | None  # tokens that the configuration says the model reads
    windows: tuple[int | None, ...]  # tokens that each block's attention looks back; None: all
    tied: bool
    weights: dict[str, Weight]  # by name; tied weights once
    scores: bool = False
    dropout: bool = False  # in attention

    @property
    def total(self) -> int:
        """Parameters, tied ones once."""
        return sum(w.numel for w in self.weights.values())

    @property
    def embedding(self) -> int:
        """Parameters of the token table, of learned positions and of a head of its own: what is not in a block or a norm."""
        return sum(w.numel for w in self.weights.values() if w.part in (EMBEDDING, HEAD))

    @property
    def block_matrices(self) -> int:
        """Parameters of the matrices inside the blocks: each costs two FLOPs a token and pass."""
        return sum(w.numel for w in self.weights.values() if w.block is not None and len(w.size) == 2)

    @property
    def head_matrix(self) -> int:
        """Parameters of the matrix that gives the logits, or the score, whether or not it is the token table again."""
        return self.hidden_size * (1 if self.scores else self.vocab_size)

    def parts(self) -> dict[str, int]:
        """Parameters by part: embedding, head, attention, mlp, norm."""
        found = dict.fromkeys((EMBEDDING, HEAD, ATTENTION, MLP, NORM), 0)
        for weight in self.weights.values():
            found[weight.part] += weight.numel
        return found


def fill_in(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with its class's defaults for what it leaves out, under Llama's names; KeyError for an unknown type."""
    fields = upstream.model_config_fields(str(config["model_type"]))
    # Biases that the class has no field for it has not, whatever the file says.
    given = {name: value for name, value in config.items() if name in fields or name not in _BIASES}
    full = {name: field.default for name, field in fields.items()} | given
    for name, other in _SAME.items():
        full.setdefault(name, full.get(other))
    if full.get("intermediate_size") is None:
        full["intermediate_size"] = 4 * full["hidden_size"]  # GPT-2's rule, the only one that has no size of its own
    full["num_key_value_heads"] = full.get("num_key_value_heads") or full["num_attention_heads"]
    full["head_dim"] = full.get("head_dim") or full["hidden_size"] // full["num_attention_heads"]
    return full


def read_shape(config: dict[str, Any], vocab_size: int | None = None, scores: bool = False) -> Shape | None:
    """The model that transformers makes of a configuration; None for a type that is not `KNOWN`, or no size at all.

    Args:
        config: fields as in a recipe's `model.config` or in a `config.json`.
        vocab_size: the tokenizer's, in place of the configuration's.
        scores: with a head of one number, as `AutoModelForSequenceClassification` with `num_labels=1` makes it.
    """
    kind = config.get("model_type")
    if kind not in KNOWN or (kind == "gpt2" and config.get("add_cross_attention")):
        return None
    full = fill_in(config)
    full["vocab_size"] = vocab_size or full["vocab_size"]
    weights = {"gpt2": _gpt2, "gpt_neox": _gpt_neox}.get(full["model_type"], _llama)(full)
    hidden, tied = full["hidden_size"], bool(full["tie_word_embeddings"])
    if scores:
        weights["score.weight"] = Weight((1, hidden), HEAD)
    elif not tied:
        weights["lm_head.weight"] = Weight((full["vocab_size"], hidden), HEAD)
    return Shape(
        model_type=full["model_type"],
        vocab_size=full["vocab_size"],
        hidden_size=hidden,
        layers=full["num_hidden_layers"],
        heads=full["num_attention_heads"],
        kv_heads=full["num_key_value_heads"],
        head_dim=full["head_dim"],
        intermediate_size=full["intermediate_size"],
        max_positions=full.get("max_position_embeddings"),
        windows=_windows(full),
        tied=tied and not scores,
        weights=weights,
        scores=scores,
        dropout=any(full.get(name) for name in ("attn_pdrop", "attention_dropout")),
    )


def read_config(folder: Path) -> dict[str, Any] | None:
    """The `config.json` of a model's folder, of a model with images that of its text part, with `NOT_TEXT`; None where there is none.

    Raises:
        UserError: it holds no JSON, or no mapping.
    """
    file = folder / "config.json"
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not readable as JSON: {error}. Fetch or save the model again.") from None
    if isinstance(found, dict) and found.get("text_config"):
        found = {**found["text_config"], **{name: found[name] for name in NOT_TEXT if name in found}}
    if not isinstance(found, dict):
        raise UserError(f"{file}: expected a mapping with model_type, found {type(found).__name__}.")
    return found


def _windows(full: dict[str, Any]) -> tuple[int | None, ...]:
    layers, window = full["num_hidden_layers"], full.get("sliding_window")
    if not full.get("use_sliding_window", True) or not window:
        return (None,) * layers
    kinds = full.get("layer_types")
    if kinds is None:
        every = {"gemma2": 2, "gemma3_text": full.get("sliding_window_pattern", 6)}.get(full["model_type"])
        from_layer = full.get("max_window_layers", 0) if full["model_type"].startswith("qwen") else 0
        kinds = [
            "sliding_attention" if ((i + 1) % every if every else i >= from_layer) else "full_attention"
            for i in range(layers)
        ]
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _llama(full: dict[str, Any]) -> dict[str, Weight]:
    kind, hidden, ffn = full["model_type"], full["hidden_size"], full["intermediate_size"]
    dim = full["head_dim"]
    q, kv = full["num_attention_heads"] * dim, full["num_key_value_heads"] * dim
    attention = bool(full.get("attention_bias"))
    weights = {"model.embed_tokens.weight": Weight((full["vocab_size"], hidden), EMBEDDING)}
    for i in range(full["num_hidden_layers"]):
        block = f"model.layers.{i}"
        if kind == "phi3":
            linears = [("self_attn.qkv_proj", q + 2 * kv, hidden, False), ("self_attn.o_proj", hidden, q, False),
                       ("mlp.gate_up_proj", 2 * ffn, hidden, False), ("mlp.down_proj", hidden, ffn, False)]  # fmt: skip
        else:
            bias, mlp = attention or kind == "qwen2", bool(full.get("mlp_bias"))
            linears = [("self_attn.q_proj", q, hidden, bias), ("self_attn.k_proj", kv, hidden, bias),
                       ("self_attn.v_proj", kv, hidden, bias), ("self_attn.o_proj", hidden, q, attention),
                       ("mlp.gate_proj", ffn, hidden, mlp), ("mlp.up_proj", ffn, hidden, mlp),
                       ("mlp.down_proj", hidden, ffn, mlp)]  # fmt: skip
        weights |= _linears(block, i, linears)
        names = ["input_layernorm", "post_attention_layernorm"]
        if kind in _FOUR_NORMS:
            names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        weights |= {f"{block}.{name}.weight": Weight((hidden,), NORM, i) for name in names}
        if kind in _NORMS_ON_HEADS:
            weights |= {f"{block}.self_attn.{n}_norm.weight": Weight((dim,), NORM, i) for n in ("q", "k")}
    return weights | {"model.norm.weight": Weight((hidden,), NORM)}


def _gpt2(full: dict[str, Any]) -> dict[str, Weight]:
    hidden, ffn = full["hidden_size"], full["intermediate_size"]
    weights = {
        "transformer.wte.weight": Weight((full["vocab_size"], hidden), EMBEDDING),
        "transformer.wpe.weight": Weight((full["max_position_embeddings"], hidden), EMBEDDING),
    }
    linears = [("attn.c_attn", 3 * hidden, hidden, True), ("attn.c_proj", hidden, hidden, True),
               ("mlp.c_fc", ffn, hidden, True), ("mlp.c_proj", hidden, ffn, True)]  # fmt: skip
    for i in range(full["num_hidden_layers"]):
        weights |= _linears(f"transformer.h.{i}", i, linears, transposed=True)
        weights |= _layer_norms(f"transformer.h.{i}", ("ln_1", "ln_2"), hidden, i)
    return weights | _layer_norms("transformer", ("ln_f",), hidden, None)


def _gpt_neox(full: dict[str, Any]) -> dict[str, Weight]:
    hidden, ffn, bias = full["hidden_size"], full["intermediate_size"], bool(full["attention_bias"])
    weights = {"gpt_neox.embed_in.weight": Weight((full["vocab_size"], hidden), EMBEDDING)}
    linears = [("attention.query_key_value", 3 * hidden, hidden, bias), ("attention.dense", hidden, hidden, bias),
               ("mlp.dense_h_to_4h", ffn, hidden, True), ("mlp.dense_4h_to_h", hidden, ffn, True)]  # fmt: skip
    for i in range(full["num_hidden_layers"]):
        weights |= _linears(f"gpt_neox.layers.{i}", i, linears)
        weights |= _layer_norms(f"gpt_neox.layers.{i}", ("input_layernorm", "post_attention_layernorm"), hidden, i)
    return weights | _layer_norms("gpt_neox", ("final_layer_norm",), hidden, None)


def _linears(
    block: str, number: int, linears: list[tuple[str, int, int, bool]], transposed: bool = False
) -> dict[str, Weight]:
    found = {}
    for name, outputs, inputs, bias in linears:
        part = MLP if name.startswith("mlp") else ATTENTION
        found[f"{block}.{name}.weight"] = Weight((inputs, outputs) if transposed else (outputs, inputs), part, number)
        if bias:
            found[f"{block}.{name}.bias"] = Weight((outputs,), part, number)
    return found


def _layer_norms(block: str, names: tuple[str, ...], hidden: int, number: int | None) -> dict[str, Weight]:
    return {f"{block}.{n}.{part}": Weight((hidden,), NORM, number) for n in names for part in ("weight", "bias")}
