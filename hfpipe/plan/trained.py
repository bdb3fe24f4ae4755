"""What of a model trains: all of it, what `regularize` leaves free, or what an adapter adds (by PEFT 0.21's own rules)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from hfpipe import upstream
from hfpipe.adapter_types import find_kind
from hfpipe.plan.shapes import EMBEDDING, HEAD, Shape, Weight
from hfpipe.sections import Adapter, Regularize

# Options of LoRA that add or share weights in ways that are not counted here.
_NOT_COUNTED = ("layer_replication", "target_parameters", "alora_invocation_tokens", "arrow_config", "use_bdlora",
                "use_qalora", "velora_config", "kasa_config", "monteclora_config", "corda_config")  # fmt: skip
# As hfpipe.training.bottleneck has them.
_LAST_LAYERS = (("o_proj", "down_proj"), ("attn.c_proj", "mlp.c_proj"), ("dense", "dense_4h_to_h"))


@dataclass(frozen=True)
class Trained:
    """The tensors that get a gradient and optimizer state."""

    base: frozenset[str]  # names of the model's own weights
    added: tuple[Weight, ...] = ()  # an adapter's
    frozen_rows: int = 0  # parameters whose gradient is set to zero: memory is taken for them, nothing is learnt
    adapter: str | None = None  # PEFT's method
    four_bit: bool = False
    targets: tuple[str, ...] = field(default=(), repr=False)  # modules that the adapter changes

    def tensors(self, shape: Shape) -> Iterator[Weight]:
        yield from (shape.weights[name] for name in self.base)
        yield from self.added

    def held(self, shape: Shape) -> int:
        """Parameters with a gradient and optimizer state."""
        return sum(weight.numel for weight in self.tensors(shape))

    def count(self, shape: Shape) -> int:
        """Parameters that change in training."""
        return self.held(shape) - self.frozen_rows

    def trains_embedding(self, shape: Shape) -> bool:
        """Whether the table of tokens itself gets a gradient."""
        return any(shape.weights[name].part == EMBEDDING for name in self.base)

    def first_block(self, shape: Shape) -> int | None:
        """The lowest block that a gradient has to reach: 0 where something before the blocks trains, None where none does."""
        if self.adapter in ("prompt_tuning", "p_tuning", "prefix_tuning", "multitask_prompt_tuning"):
            return 0
        blocks = [weight.block for weight in self.tensors(shape)]
        if self.trains_embedding(shape):
            return 0
        return min((block for block in blocks if block is not None), default=None)


def read_trained(
    shape: Shape, regularize: Regularize | None, adapter: Adapter | None, special_tokens: int = 0
) -> Trained | None:
    """What a stage trains of a model; None for an adapter whose weights are not counted here.

    Args:
        special_tokens: rows of the embeddings that go on training under `freeze_embeddings`.
    """
    if adapter is not None:
        return _adapted(shape, adapter)
    layers = regularize.freeze_layers if regularize else 0
    base = frozenset(shape.weights) - frozenset(_frozen(shape, layers))
    rows = 0
    if regularize and regularize.freeze_embeddings:
        ends = {name for name in base if shape.weights[name].part in (EMBEDDING, HEAD) and not shape.scores}
        ends |= {name for name in base if shape.weights[name].part == EMBEDDING}
        ordinary = shape.vocab_size - special_tokens
        rows = sum(ordinary * shape.hidden_size for name in ends if shape.weights[name].size[0] == shape.vocab_size)
    return Trained(base, frozen_rows=rows)


def _frozen(shape: Shape, layers: int | tuple[str, ...]) -> Iterator[str]:
    if isinstance(layers, int):
        blocks = range(layers) if layers >= 0 else range(shape.layers + layers, shape.layers)
        yield from (name for name, weight in shape.weights.items() if weight.block in blocks)
        return
    aliases = {name: name for name in shape.weights}
    if shape.tied:
        aliases["lm_head.weight"] = next(iter(shape.weights))
    for alias, name in aliases.items():
        parts = alias.split(".")
        owners = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
        if any(fnmatchcase(owner, p) or fnmatchcase(owner, f"*.{p}") for owner in owners for p in layers):
            yield name


# --- adapters ---


def _adapted(shape: Shape, adapter: Adapter) -> Trained | None:
    kind = find_kind(adapter.type)
    count = _METHODS.get(kind.method)
    fields = upstream.fields(kind.config)
    options = {name: item.default for name, item in fields.items()} | adapter.options
    if count is None or any(options.get(name) for name in _NOT_COUNTED):
        return None
    found = count(shape, options)
    if found is None:
        return None
    added, targets = found
    base: set[str] = set()
    if options.get("bias") == "all":
        base |= {name for name in shape.weights if name.endswith(".bias")}
    elif options.get("bias") == "lora_only":
        base |= {f"{target}.bias" for target in targets if f"{target}.bias" in shape.weights}
    saved = options.get("modules_to_save") or []
    saved = [saved] if isinstance(saved, str) else list(saved)
    if shape.scores and "modules_to_save" in fields:
        saved.append("score")  # PEFT adds the head that is new
    added += [*_copies(shape, saved), *_rows(shape, options.get("trainable_token_indices"))]
    return Trained(frozenset(base), tuple(added), 0, kind.method, kind.four_bit, tuple(targets))


def _copies(shape: Shape, modules: Iterable[str]) -> Iterator[Weight]:
    """Modules that are trained whole, as copies of themselves."""
    names = dict(shape.weights)
    if shape.tied:
        names["lm_head.weight"] = next(iter(shape.weights.values()))
    for name, weight in names.items():
        if any(owner.endswith(module) for module in modules for owner in _owners(name)):
            yield weight


def _owners(name: str) -> Iterator[str]:
    parts = name.split(".")
    yield from (".".join(parts[:n]) for n in range(1, len(parts)))


def _rows(shape: Shape, indices: Any) -> Iterator[Weight]:
    lists = indices.values() if isinstance(indices, dict) else [indices] if indices else []
    yield from (Weight((len(rows), shape.hidden_size), EMBEDDING) for rows in lists)


def _targets(shape: Shape, options: dict[str, Any], default: list[str] | str | None) -> list[str] | None:
    """Names of the modules that an adapter changes: matrices in the blocks, and head or embeddings where they are named."""
    wanted = options.get("target_modules") or default
    if wanted is None:
        return None
    modules = [name.removesuffix(".weight") for name, w in shape.weights.items() if len(w.size) == 2]
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        found = [m for m in modules if shape.weights[f"{m}.weight"].block is not None]
    elif isinstance(wanted, str):
        found = [m for m in modules if re.fullmatch(wanted, m)]
    else:
        found = [m for m in modules if any(m == w or m.endswith(f".{w}") for w in wanted)]
        layers = options.get("layers_to_transform")
        if layers is not None and layers != []:
            layers = [layers] if isinstance(layers, int) else layers
            found = [m for m in found if shape.weights[f"{m}.weight"].block in layers]
    excluded = options.get("exclude_modules") or []
    if isinstance(excluded, str):
        return [m for m in found if not re.fullmatch(excluded, m)]
    saved = options.get("modules_to_save") or []
    found = [m for m in found if not any(m == e or m.endswith(f".{e}") for e in excluded)]
    return [m for m in found if not any(re.match(rf"(^|.*\.){s}($|\..*)", m) for s in saved)]


def _ends(shape: Shape, module: str) -> tuple[int, int, int | None]:
    """(inputs, outputs, block) of a linear layer."""
    weight = shape.weights[f"{module}.weight"]
    first, second = weight.size
    swapped = shape.model_type == "gpt2" and weight.block is not None
    return (first, second, weight.block) if swapped else (second, first, weight.block)


def _lora(shape: Shape, options: dict[str, Any]) -> tuple[list[Weight], list[str]] | None:
    targets = _targets(shape, options, upstream.peft_targets("LORA").get(shape.model_type))
    if targets is None:
        return None
    added = []
    for module in targets:
        inputs, outputs, block = _ends(shape, module)
        patterns = options.get("rank_pattern") or {}
        r = next((rank for p, rank in patterns.items() if re.match(rf"(.*\.)?({p})$", module)), options["r"])
        added += [Weight((r, inputs), "adapter", block), Weight((outputs, r), "adapter", block)]
        if options.get("use_dora"):
            added.append(Weight((outputs,), "adapter", block))
        if options.get("lora_bias"):
            added.append(Weight((outputs,), "adapter", block))
    return added, targets


def _ia3(shape: Shape, options: dict[str, Any]) -> tuple[list[Weight], list[str]] | None:
    targets = _targets(shape, options, upstream.peft_targets("IA3").get(shape.model_type))
    if targets is None:
        return None
    inner = options.get("feedforward_modules")
    if inner is None:
        inner = upstream.peft_targets("IA3", "FEEDFORWARD").get(shape.model_type, [])
    added = []
    for module in targets:
        inputs, outputs, block = _ends(shape, module)
        scaled = re.fullmatch(inner, module) if isinstance(inner, str) else any(module.endswith(i) for i in inner)
        added.append(Weight((inputs if scaled else outputs,), "adapter", block))
    return added, targets


def _bottleneck(shape: Shape, options: dict[str, Any]) -> tuple[list[Weight], list[str]] | None:
    names = {name.removesuffix(".weight") for name in shape.weights}
    known = (pair for pair in _LAST_LAYERS if all(any(n.endswith(f".{end}") for n in names) for end in pair))
    targets = _targets(shape, options, next((list(pair) for pair in known), None))
    if targets is None:
        return None
    added = []
    for module in targets:
        _, width, block = _ends(shape, module)
        r = options["r"]
        added += [Weight(size, "adapter", block) for size in ((r, width), (r,), (width, r), (width,))]
    return added, targets


def _prompt(shape: Shape, options: dict[str, Any]) -> tuple[list[Weight], list[str]]:
    return [Weight((options["num_virtual_tokens"], shape.hidden_size), "adapter")], []


def _p_tuning(shape: Shape, options: dict[str, Any]) -> tuple[list[Weight], list[str]] | None:
    if options.get("encoder_reparameterization_type") not in (None, "MLP"):
        return None
    width = options.get("token_dim") or shape.hidden_size
    inner = options.get("encoder_hidden_size") or width
    sizes = [(options["num_virtual_tokens"], width), (inner, width), (inner,), (inner, inner), (inner,)]
    return [Weight(size, "adapter") for size in (*sizes, (width, inner), (width,))], []


def _prefix(shape: Shape, options: dict[str, Any]) -> tuple[list[Weight], list[str]]:
    tokens, width = options["num_virtual_tokens"], shape.kv_heads * shape.head_dim
    whole = (options.get("num_layers") or shape.layers) * 2 * width
    if not options.get("prefix_projection"):
        return [Weight((tokens, whole), "adapter")], []
    inner = options.get("encoder_hidden_size") or width
    sizes = ((tokens, width), (inner, width), (inner,), (whole, inner), (whole,))
    return [Weight(size, "adapter") for size in sizes], []


def _llama_adapter(shape: Shape, options: dict[str, Any]) -> tuple[list[Weight], list[str]]:
    last = range(shape.layers - options["adapter_layers"], shape.layers)
    sizes = ((options["adapter_len"], shape.hidden_size), (1,))
    return [Weight(size, "adapter", block) for block in last for size in sizes], []


_METHODS = {
    "lora": _lora,
    "ia3": _ia3,
    "bottleneck": _bottleneck,
    "prompt_tuning": _prompt,
    "p_tuning": _p_tuning,
    "prefix_tuning": _prefix,
    "adaption_prompt": _llama_adapter,
}
