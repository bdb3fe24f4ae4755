"""Two models, the same questions: wins, ties and losses, paired, with an interval and a sign test."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from hfpipe.evaluation.intervals import bootstrap


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p of the exact sign test; ties are left out."""
    n, fewer = wins + losses, min(wins, losses)
    if n == 0:
        return 1.0
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n)


def paired(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    """What the second model's scores are against the first's on the same questions.

    `difference` is the mean of second - first with its 95% bootstrap interval over questions.
    """
    gains = [b - a for a, b in zip(first, second, strict=True)]
    wins, losses = sum(g > 0 for g in gains), sum(g < 0 for g in gains)
    low, high = bootstrap(gains)
    return {
        "n": len(gains),
        "win": wins,
        "tie": len(gains) - wins - losses,
        "loss": losses,
        "difference": round(sum(gains) / max(len(gains), 1), 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "p": round(sign_test(wins, losses), 6),
    }


def compare_answers(first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`overall` and by `capabilities`, from the scored rows of two models (`hfpipe.evaluation.probes.score_probes`)."""
    groups: dict[tuple[str, Any], list[tuple[float, float]]] = defaultdict(list)
    for number, (a, b) in enumerate(zip(first, second, strict=True)):
        own = number if a.get("group") is None else (a["kind"], a["group"])  # wordings of one question count once
        groups[a["capability"], own].append((a["score"], b["score"]))
    scores: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for (capability, _), pairs in groups.items():
        scores[capability].append((min(a for a, _ in pairs), min(b for _, b in pairs)))
    everything = [pair for pairs in scores.values() for pair in pairs]
    return {
        "overall": paired(*zip(*everything, strict=True)),
        "capabilities": {name: paired(*zip(*pairs, strict=True)) for name, pairs in scores.items()},
    }


def table(found: dict[str, Any]) -> list[str]:
    """The comparison as lines of plain text."""
    lines = [f"{'':<16}{'win':>6}{'tie':>6}{'loss':>6}{'difference':>13}{'95% interval':>18}{'p':>9}"]
    for name, row in [("overall", found["overall"]), *found["capabilities"].items()]:
        interval = f"{row['low']:+.2f} to {row['high']:+.2f}"
        lines.append(
            f"{name:<16}{row['win']:>6}{row['tie']:>6}{row['loss']:>6}{row['difference']:>+13.2f}{interval:>18}{row['p']:>9.3f}"
        )
    return lines
