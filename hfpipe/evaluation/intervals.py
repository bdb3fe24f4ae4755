"""95% intervals: Wilson's for shares, the bootstrap's for means, Newcombe's for the difference of two shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

_Z = 1.959964


def wilson(right: float, n: int) -> tuple[float, float]:
    """The interval of a share, `right` of `n` (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    share = right / n
    middle = share + _Z**2 / n / 2
    spread = _Z * math.sqrt(share * (1 - share) / n + _Z**2 / n**2 / 4)
    return max(0.0, (middle - spread) / (1 + _Z**2 / n)), min(1.0, (middle + spread) / (1 + _Z**2 / n))


def bootstrap(values: Sequence[float], rounds: int = 2000) -> tuple[float, float]:
    """The percentile interval of a mean; the same values give the same interval."""
    if not values:
        return 0.0, 1.0
    rng = Random(0)
    means = sorted(sum(rng.choices(values, k=len(values))) / len(values) for _ in range(rounds))
    return means[round(0.025 * rounds)], means[round(0.975 * rounds) - 1]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Wilson's for values that are all 0 or 1, else the bootstrap's."""
    return wilson(sum(values), len(values)) if set(values) <= {0, 1} else bootstrap(values)


def difference(before: tuple[float, float, float], after: tuple[float, float, float]) -> tuple[float, float]:
    """The interval of `after - before`, each (score, low, high) of its own (Newcombe 1998, method 10)."""
    (p, p_low, p_high), (q, q_low, q_high) = before, after
    return q - p - math.hypot(q - q_low, p_high - p), q - p + math.hypot(q_high - q, p - p_low)
