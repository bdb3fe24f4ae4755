"""The stages: one file each, found by listing this folder."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from hfpipe.sections import StageType


def stage_module(name: str) -> ModuleType:
    return importlib.import_module(f"hfpipe.stages.{name}")


def stage_types() -> dict[str, StageType]:
    """Every stage's declaration by name, without importing torch."""
    names = sorted(p.stem for p in Path(__file__).parent.glob("[a-z]*.py"))
    return {name: stage_module(name).TYPE for name in names}
