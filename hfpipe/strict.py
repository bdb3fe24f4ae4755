"""Frozen dataclasses from plain mappings: unknown keys, missing keys and wrong types are told, never guessed."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any

from hfpipe.errors import nearest


def build(cls: type, raw: dict[str, Any], where: str, problems: list[str]) -> Any | None:
    """An instance of a dataclass, or None with the reasons added to `problems`, each beginning with `where`."""
    hints = typing.get_type_hints(cls)
    names = {f.name.rstrip("_"): f for f in dataclasses.fields(cls)}
    values, fine = {}, True
    for key, value in raw.items():
        if key not in names:
            problems.append(
                f"{where}{key} = {value!r} is not a key here; known: {', '.join(names)}.{nearest(key, names)}"
            )
            fine = False
            continue
        before = len(problems)
        value = _coerce(value, hints[names[key].name], f"{where}{key}", problems)
        if isinstance(value, float) and (math.isinf(value) if names[key].metadata else math.isnan(value)):
            problems.append(f"{where}{key} = {value!r}: expected a finite number.")
        minimum = names[key].metadata.get("at_least")
        if minimum is not None and isinstance(value, int | float) and not value >= minimum:
            problems.append(f"{where}{key} = {value!r}: expected {minimum} or more.")
        limit = names[key].metadata.get("above")
        if limit is not None and isinstance(value, int | float) and not value > limit:
            problems.append(f"{where}{key} = {value!r}: expected more than {limit}.")
        maximum = names[key].metadata.get("at_most")
        if maximum is not None and isinstance(value, int | float) and not value <= maximum:
            problems.append(f"{where}{key} = {value!r}: expected at most {maximum}; it is a share.")
        values[names[key].name] = value
        fine = fine and len(problems) == before
    for key, item in names.items():
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and item.name not in values and key not in raw:
            problems.append(f"{where}{key} is missing.")
            fine = False
    return cls(**values) if fine else None


def _coerce(value: Any, hint: Any, where: str, problems: list[str]) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is typing.Literal:
        if value not in args:
            near = nearest(value, map(str, args))
            problems.append(f"{where} = {value!r}: expected {' or '.join(map(repr, args))}.{near}")
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        kinds = [a for a in args if a is not type(None)]
        if len(kinds) == 1:
            return _coerce(value, kinds[0], where, problems)
        for kind in kinds:
            found: list[str] = []
            coerced = _coerce(value, kind, where, found)
            if not found:
                return coerced
        problems.append(f"{where} = {value!r}: expected {' or '.join(_word(kind) for kind in kinds)}.")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            problems.append(f"{where} = {value!r}: expected a list.")
            return ()
        return tuple(_coerce(v, args[0], f"{where}[{i}]", problems) for i, v in enumerate(value))
    if dataclasses.is_dataclass(hint):
        value = {} if value is None else value
        if not isinstance(value, dict):
            needed = [
                f.name.rstrip("_")
                for f in dataclasses.fields(hint)
                if f.default is f.default_factory is dataclasses.MISSING
            ]
            such = f", such as {{{needed[0]}: {value}}}" if len(needed) == 1 and isinstance(value, str) else ""
            problems.append(f"{where} = {value!r}: expected a mapping with keys of its own{such}.")
            return None
        return build(hint, value, f"{where}.", problems)
    kind = origin or hint
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        problems.append(f"{where} = {value!r} is {type(value).__name__}; expected {kind.__name__}.")
    return value


def _word(hint: Any) -> str:
    """How an annotation is called in a message: `int`, `a list of str`."""
    if typing.get_origin(hint) is tuple:
        return f"a list of {_word(typing.get_args(hint)[0])}"
    return (typing.get_origin(hint) or hint).__name__
