"""A parent's context made longer: RoPE scaling by transformers' own names, checked against its source. No torch.

    model: {from: pretrain, rope_parameters: {rope_type: yarn, factor: 4.0}, max_position_embeddings: 512}

What is given stands over the parent's own `rope_parameters`. For a model whose layer types have their own, it is given by
layer type; given without, it is for `full_attention`: a sliding window never sees farther than it has learnt.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hfpipe import upstream
from hfpipe.errors import nearest
from hfpipe.sections import Model, Stage

TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
_FULL, _LAYER_TYPES = "full_attention", ("full_attention", "sliding_attention")
_FROM_PARENT = ("rope_theta", "original_max_position_embeddings")


def changes(section: Model, parent: dict[str, Any]) -> dict[str, Any]:
    """The fields of the parent's configuration that the section sets, as they will stand.

    `original_max_position_embeddings`, where the type needs it, is what the parent has, or has been scaled from.
    """
    found: dict[str, Any] = {}
    if section.rope_parameters:
        old = parent.get("rope_parameters") or {}
        nested = _FULL in old
        own = _by_layer_type(section.rope_parameters) if nested else {"": section.rope_parameters}
        merged = {kind: _over(old.get(kind, {}) if nested else old, given, parent) for kind, given in own.items()}
        found["rope_parameters"] = {**old, **merged} if nested else merged[""]
    if section.max_position_embeddings:
        found["max_position_embeddings"] = section.max_position_embeddings
    return found


def scales(section: Model) -> bool:
    return bool(section.rope_parameters or section.max_position_embeddings)


def is_dynamic(config: dict[str, Any]) -> bool:
    """Whether any layer's RoPE depends on the longest row that was met."""
    parameters = config.get("rope_parameters") or {}
    return any(one.get("rope_type") == "dynamic" for one in (parameters, *parameters.values()) if isinstance(one, dict))


def positions(stages: dict[str, Stage], stage: Stage) -> int | None:
    """Tokens that the stage's model is made for, where its recipe says so."""
    seen: set[str] = set()
    while stage.name not in seen:
        seen.add(stage.name)
        given = stage.model.max_position_embeddings or stage.model.config.get("max_position_embeddings")
        if given or (stage.model.from_ or "") not in stages:
            return given
        stage = stages[str(stage.model.from_)]
    return None


def _by_layer_type(given: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return given if given.keys() & set(_LAYER_TYPES) else {_FULL: given}


def _over(old: dict[str, Any], given: dict[str, Any], parent: dict[str, Any]) -> dict[str, Any]:
    """`given` over what the parent has: its base always, the rest only where the type stays."""
    kind = given.get("rope_type", old.get("rope_type", "default"))
    required, optional = upstream.rope_keys(kind)
    known = old | {"original_max_position_embeddings": old.get("original_max_position_embeddings") or parent["max_position_embeddings"]}  # fmt: skip
    kept = {
        key: value for key, value in known.items() if key in (required | optional) or key == "partial_rotary_factor"
    }
    return kept | given | {"rope_type": kind}


def problems(section: Model, model_type: str | None, adapter_alone: bool) -> Iterator[str]:
    """What is wrong with the section's scaling of a model of that type (None: not known before it is loaded)."""
    if not scales(section):
        return
    name = "rope_parameters" if section.rope_parameters else "max_position_embeddings"
    key = f"model.{name}"
    if section.config:
        yield f"{key} changes a parent's model, and model.config makes a new one: put {name} into model.config."
    elif model_type and model_type in upstream.model_types() and "rope_parameters" not in upstream.model_config_fields(model_type):  # fmt: skip
        yield f"{key}: a {model_type} has no RoPE: its positions are learnt or of another kind, and can't be scaled."
    if adapter_alone:
        yield f"{key} beside an adapter that is not merged: the adapter's folder could not say it. Set adapter.merge: true, or take lora."
    for kind, parameters in _by_layer_type(section.rope_parameters).items():
        yield from _problems(
            parameters, f"model.rope_parameters{f'.{kind}' if parameters is not section.rope_parameters else ''}"
        )


def _problems(given: Any, where: str) -> Iterator[str]:
    if not isinstance(given, dict):
        yield f"{where} = {given!r}: expected a mapping."
        return
    known = upstream.rope_fields()
    yield from upstream.check(given, known, "transformers' RopeParameters", where)
    kind = given.get("rope_type", "default")
    if kind not in TYPES:
        yield f"{where}.rope_type = {kind!r}: expected one of {', '.join(TYPES)}.{nearest(kind, TYPES)}"
        return
    required, optional = upstream.rope_keys(kind)
    for key in sorted(required - given.keys() - {"rope_type", *_FROM_PARENT}):
        yield f"{where}.{key} is missing: rope_type {kind} needs it."
    for key in given.keys() & known.keys() - required - optional - {"partial_rotary_factor"}:
        yield f"{where}.{key} = {given[key]!r} has no meaning for rope_type {kind}: it takes {', '.join(sorted(required | optional))}."
    factor = given.get("factor", 1)
    if isinstance(factor, int | float) and factor < 1:
        yield f"{where}.factor = {factor}: expected 1 or more: the context's length against the original one."
