"""In which order a stage's rows are trained, by arithmetic on their number alone; upstream then reads one after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

from hfpipe.sections import Curriculum, Data, Phase


def describe_order(data: Data) -> str:
    """The curriculum or the phases in a few words; nothing where the rows are shuffled."""
    if given := data.curriculum:
        by = "the parent's loss" if given.by == "parent_loss" else given.by
        pace = f"the easiest {given.start:.0%} at first" if given.pace == "growing" else "in each epoch"
        return f"from easy to hard by {by}, {pace}"
    return "; ".join(f"phase {number}: {_phase(phase)}" for number, phase in enumerate(data.phases, 1))


def _phase(phase: Phase) -> str:
    named = phase.weights.items() if isinstance(phase.weights, dict) else [("", weight) for weight in phase.weights]
    weights = " / ".join(f"{path} {weight:g}".strip() for path, weight in named)
    length = f"at most {phase.max_length} tokens" if phase.max_length else ""
    return ", ".join(part for part in (f"{phase.share:.0%} of the steps", weights, length) if part)


def lay_out(
    data: Data, counts: Sequence[int], *, batch: int, max_steps: int, epochs: float, seed: int
) -> list[int] | None:
    """The number of each row in the order in which a whole training sees them, whole steps of `batch` rows.

    None where they are seen as they lie, over again in each epoch. Growing and shuffled, the steps are those that the same
    rows have without a curriculum; phases drop what fills no step.

    Args:
        counts: rows of each phase, one phase after the other; of a curriculum their number alone.
        batch: rows of one step, of all processes together.
        max_steps: steps of the stage; 0 or less: `epochs` passes over the rows.

    Raises:
        ValueError: a phase fills no step.
    """
    if data.phases:
        return _lay_phases(data.phases, counts, batch, max_steps, epochs, seed)
    if data.curriculum and data.curriculum.pace == "growing":
        steps = max_steps if max_steps > 0 else math.ceil(epochs * math.ceil(counts[0] / batch))
        return _draw_growing(data.curriculum, counts[0], steps * batch, seed)
    return None


def may_be_drawn(curriculum: Curriculum, rows: int, progress: float) -> int:
    """How many of the easiest rows may be drawn when a share `progress` of the training is over."""
    share = curriculum.start + (1 - curriculum.start) * progress
    return min(rows, max(1, math.ceil(rows * share - 1e-9)))


def _draw_growing(curriculum: Curriculum, rows: int, draws: int, seed: int) -> list[int]:
    """At random from a bag that rows join as they are admitted; empty, it is filled with all that have been.

    So no row comes again before every other that may be drawn (unlike Platanios et al. 2019, arXiv:1903.09848, who draw
    with replacement), and in one epoch each comes once.
    """
    rng = Random(f"curriculum {seed}")
    bag: list[int] = []
    order: list[int] = []
    admitted = 0
    for drawn in range(draws):
        allowed = may_be_drawn(curriculum, rows, drawn / max(draws - 1, 1))
        bag += range(admitted, allowed)
        bag = bag or list(range(allowed))
        admitted = allowed
        place = rng.randrange(len(bag))
        bag[place], bag[-1] = bag[-1], bag[place]
        order.append(bag.pop())
    return order


def _lay_phases(
    phases: Sequence[Phase], counts: Sequence[int], batch: int, max_steps: int, epochs: float, seed: int
) -> list[int]:
    ends = [round(max_steps * sum(phase.share for phase in phases[: n + 1])) for n in range(len(phases))]
    order: list[int] = []
    for number, count in enumerate(counts):
        steps = ends[number] - ([0, *ends][number]) if max_steps > 0 else int(epochs * count // batch)
        if steps < 1:
            raise ValueError(f"phase {number + 1} has {count} rows and no step of {batch} rows")
        rng, first, rows = Random(f"phase {number} {seed}"), sum(counts[:number]), []
        while len(rows) < steps * batch:
            rows += rng.sample(range(first, first + count), count)
        order += rows[: steps * batch]
    return order
