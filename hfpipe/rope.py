"""A parent's context made longer: RoPE scaling by transformers' own names, checked against its source. No torch.

    model: {from: pretrain, rope_parameters: {rope_type: yarn, factor: 4.0}, max_position_embeddings: 512}

What is given stands over the parent's own. In a model whose layer types have parameters of their own it is for
`full_attention`, unless it is given by layer type: a sliding window never sees farther than it has learnt.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hfpipe import upstream
from hfpipe.errors import nearest
from hfpipe.sections import Model, Stage

TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
_FULL = "full_attention"
_BY_PARENT = {"rope_type", "rope_theta", "original_max_position_embeddings"}
_ANY = {"partial_rotary_factor"}


def scales(section: Model) -> bool:
    return bool(section.rope_parameters or section.max_position_embeddings)


def positions(stages: dict[str, Stage], stage: Stage) -> int | None:
    """Tokens that the stage's model is made for, where its recipe says so; it has no cycles."""
    given = stage.model.max_position_embeddings or stage.model.config.get("max_position_embeddings")
    parent = stages.get(stage.model.from_ or "")
    return given or (positions(stages, parent) if parent else None)


def is_dynamic(config: dict[str, Any]) -> bool:
    """Whether any layer's RoPE depends on the longest row that was met."""
    parameters = config.get("rope_parameters") or {}
    return any(one.get("rope_type") == "dynamic" for one in (parameters, *parameters.values()) if isinstance(one, dict))


def changes(section: Model, parent: dict[str, Any]) -> dict[str, Any]:
    """The fields of the parent's configuration that the section sets, as they will stand."""
    found: dict[str, Any] = {}
    if given := section.rope_parameters:
        old = parent.get("rope_parameters") or {}
        by_layer = _by_layer(given) if _is_by_layer(old) else {}
        found["rope_parameters"] = (
            old | {kind: _over(old.get(kind) or {}, own, parent) for kind, own in by_layer.items()}
            if by_layer
            else _over(old, given, parent)
        )
    if section.max_position_embeddings:
        found["max_position_embeddings"] = section.max_position_embeddings
    return found


def unread(section: Model, parent: dict[str, Any]) -> str | None:
    """What of the section transformers would read past, since the parent's own parameters are laid out otherwise."""
    given, old = section.rope_parameters, parent.get("rope_parameters") or {}
    if given and not _is_by_layer(old):
        if _is_by_layer(given):
            return (
                f"model.rope_parameters.{next(iter(given))}: a {parent['model_type']} has one RoPE for all its layers, and "
                "would not read it. Give rope_type, factor and the like without a layer type."
            )
    elif given and (unknown := [kind for kind in _by_layer(given) if kind not in old]):
        return (
            f"model.rope_parameters is for {unknown[0]}, of which a {parent['model_type']} has no RoPE: give it by layer "
            f"type: {', '.join(map(str, old))}."
        )
    return None


def misread(config: dict[str, Any], default: dict[str, Any]) -> str | None:
    """What transformers reads past in a new model's own parameters, laid out otherwise than its type's `default` ones."""
    given, usual = config.get("rope_parameters") or {}, default.get("rope_parameters") or {}
    by_layer = [kind for kind, one in given.items() if isinstance(one, dict)]
    if not by_layer or len(by_layer) == len(given):
        return None
    expected = (
        f"by layer type: {', '.join(sorted(usual))}" if _is_by_layer(usual) else "without layer types: it has one RoPE"
    )
    return f"model.config.rope_parameters: give them to a {config['model_type']} {expected}."


def _is_by_layer(parameters: dict[str, Any]) -> bool:
    return any(isinstance(one, dict) or str(kind).endswith("_attention") for kind, one in parameters.items())


def _by_layer(given: dict[str, Any]) -> dict[str, Any]:
    return given if _is_by_layer(given) else {_FULL: given}


def _over(old: dict[str, Any], given: dict[str, Any], parent: dict[str, Any]) -> dict[str, Any]:
    """`given` over what the parent has of the keys that the type takes; its first length is the parent's, if no other."""
    kind = given.get("rope_type", old.get("rope_type", "default"))
    known = {"original_max_position_embeddings": parent["max_position_embeddings"]} | old
    taken = frozenset.union(*upstream.rope_keys(kind)) | _ANY
    return {key: value for key, value in known.items() if key in taken} | given | {"rope_type": kind}


def problems(section: Model, model_type: str | None, adapter_alone: bool) -> Iterator[str]:
    """What is wrong with a stage's scaling of a model of that type (None: not known before it is loaded)."""
    if not scales(section):
        return
    name = "rope_parameters" if section.rope_parameters else "max_position_embeddings"
    if section.config:
        yield f"model.{name} changes a parent's model, and model.config makes a new one: put {name} into model.config."
    elif model_type in upstream.model_types() and "rope_parameters" not in upstream.model_config_fields(model_type):
        yield f"model.{name}: a {model_type} has no RoPE, so its positions can't be scaled."
    if adapter_alone:
        yield f"model.{name} beside an adapter that is not merged: its folder could not say so. Take one that is (lora)."
    for kind, given in _by_layer(section.rope_parameters).items() if section.rope_parameters else ():
        where = "model.rope_parameters" + ("" if given is section.rope_parameters else f".{kind}")
        yield from _problems(given, where) if isinstance(given, dict) else [f"{where} = {given!r}: expected a mapping."]


def _problems(given: dict[str, Any], where: str) -> Iterator[str]:
    known, kind = upstream.rope_fields(), given.get("rope_type", "default")
    yield from upstream.check(given, known, "transformers' RopeParameters", where)
    if kind not in TYPES:
        yield f"{where}.rope_type = {kind!r}: expected one of {', '.join(TYPES)}.{nearest(kind, TYPES)}"
        return
    required, optional = upstream.rope_keys(kind)
    for key in sorted(required - given.keys() - _BY_PARENT):
        yield f"{where}.{key} is missing: rope_type {kind} needs it."
    for key in sorted(given.keys() & known.keys() - required - optional - _ANY):
        yield f"{where}.{key} = {given[key]!r} has no meaning for rope_type {kind}."
    if isinstance(factor := given.get("factor"), int | float) and factor < 1:
        yield f"{where}.factor = {factor}: expected 1 or more: the context's length against the original one."
