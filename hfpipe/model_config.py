"""The configuration of a model that is made from scratch: fields of its type, and sizes that fit each other."""

from __future__ import annotations

from hfpipe import upstream
from hfpipe.errors import nearest

# Types of which transformers (5.23) wants heads that share the whole width; others leave some of it out.
_EXACT_HEADS = ("llama", "arcee", "aria_text", "bitnet", "hyperclovax", "jais2", "moshi", "olmoe", "stablelm")


def model_faults(config: dict, where: str) -> list[str]:
    """What is wrong with a stage's `model.config`, by the fields of its model type."""
    model_type = config.get("model_type")
    try:
        known = upstream.model_config_fields(str(model_type))
    except KeyError:
        near = nearest(model_type, upstream.model_types())
        return [
            f"{where}.model_type = {model_type!r} is not a model type with a causal language model in transformers.{near}"
        ]
    rest = {k: v for k, v in config.items() if k != "model_type"}
    return upstream.check(rest, known, f"the {model_type} configuration", where) or _heads(
        model_type, rest, known, where
    )


def _heads(model_type: str, config: dict, known: dict[str, upstream.Field], where: str) -> list[str]:
    """Sizes that attention's heads can't share: transformers tells of them when it makes the model, or when that trains."""
    width, heads = (
        ("n_embd", "n_head") if {"n_embd", "n_head"} <= known.keys() else ("hidden_size", "num_attention_heads")
    )
    usual = {name: field.default for name, field in known.items() if isinstance(field.default, int)}
    full = {name: value for name, value in (usual | config).items() if isinstance(value, int)}  # null: no such number
    if not {width, heads} <= full.keys():
        return []
    problems = []
    exact = width == "n_embd" or model_type in _EXACT_HEADS
    if exact and not any(name.endswith("head_dim") for name in full) and full[width] % full[heads]:
        problems.append(f"{where}.{width} = {full[width]} is not a multiple of {heads} = {full[heads]}.")
    shared = 1 if "kv_lora_rank" in known else full.get("num_key_value_heads", 1)
    if full[heads] % shared:
        problems.append(f"{where}.{heads} = {full[heads]} is not a multiple of num_key_value_heads = {shared}.")
    return problems
