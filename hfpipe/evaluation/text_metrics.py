"""Metrics of text against a reference through `evaluate`, from local modules: `evaluate.load("bleu")` would fetch a script."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hfpipe.errors import UserError

_FOLDER = Path(__file__).parent / "metrics"


def load_metrics(names: Sequence[str]) -> list[Any]:
    """The `evaluate` modules of these names; UserError where the packages behind them are missing."""
    if not names:
        return []
    try:
        import evaluate

        return [evaluate.load(str(_FOLDER / f"{name}.py")) for name in names]
    except ImportError as error:
        raise UserError(
            f"evaluate.metrics = {list(names)} needs packages that are not here ({error}). "
            'Install them: pip install -c constraints.txt "hfpipe[metrics]".'
        ) from None


def text_metrics(names: Sequence[str], answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """What the metrics say of `answers` held against `references`, and `n`, how many there are; all in 0..1."""
    found: dict[str, float] = {"n": len(answers)}
    if answers:
        for metric in load_metrics(names):
            found |= metric.compute(predictions=list(answers), references=list(references))
    return {name: value if name == "n" else round(float(value), 4) for name, value in found.items()}
