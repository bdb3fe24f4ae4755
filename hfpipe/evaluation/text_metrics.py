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


def text_metrics(
    names: Sequence[str],
    answers: Sequence[str],
    references: Sequence[str],
    log_likelihoods: Sequence[Sequence[float]] = (),
) -> dict[str, float]:
    """What the metrics say of `answers` held against `references`, in 0..1, and `n`, how many there are.

    `perplexity` is that of the references: `log_likelihoods` has, in nats, what the model gives to each one's tokens.
    """
    found: dict[str, float] = {"n": len(answers)}
    if answers:
        for name, metric in zip(names, load_metrics(names), strict=True):
            if name == "perplexity":
                found |= metric.compute(predictions=[list(text) for text in log_likelihoods])
            else:
                found |= metric.compute(predictions=list(answers), references=list(references))
    return {name: value if name == "n" else round(float(value), 4) for name, value in found.items()}
