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


def draw_growing(curriculum: Curriculum, rows: int, steps: int, batch: int, seed: int) -> list[int]:
    """Which of the rows, from the easiest on, each step of `batch` rows sees: drawn from a share that grows to all of them.

    From a bag that rows join as they are admitted; empty, it is filled with all that have been. So no row comes again before
    every other that may be drawn, and in one epoch each comes once (Platanios et al. 2019, arXiv:1903.09848, draw with
    replacement).
    """
    rng = Random(f"curriculum {seed}")
    bag: list[int] = []
    order: list[int] = []
    admitted = 0
    for drawn in range(steps * batch):
        share = curriculum.start + (1 - curriculum.start) * drawn / max(steps * batch - 1, 1)
        allowed = min(rows, max(1, math.ceil(rows * share - 1e-9)))
        bag += range(admitted, allowed)
        bag = bag or list(range(allowed))
        admitted = allowed
        place = rng.randrange(len(bag))
        bag[place], bag[-1] = bag[-1], bag[place]
        order.append(bag.pop())
    return order


def group_by_length(lengths: Sequence[int], batch: int, seed: int, epoch: int) -> list[int]:
    """All rows once, those of a step of `batch` rows of about the same length: little of what is trained is padding.

    Shuffled, sorted within each fifty steps, and the steps shuffled; the last one has the rows that fill no step.
    """
    rng = Random(f"length {seed} {epoch}")
    drawn = rng.sample(range(len(lengths)), len(lengths))
    whole = len(drawn) // batch * batch
    drawn, left = drawn[:whole], drawn[whole:]
    steps = []
    for start in range(0, whole, 50 * batch):
        rows = sorted(drawn[start : start + 50 * batch], key=lengths.__getitem__)
        steps += [rows[at : at + batch] for at in range(0, len(rows), batch)]
    rng.shuffle(steps)
    return [row for step in (*steps, left) for row in step]


def lay_phases(
    phases: Sequence[Phase], counts: Sequence[int], steps: int | None, batch: int, epochs: float, seed: int
) -> list[int]:
    """Which of the rows, one phase after the other, each step of `batch` rows sees; a step holds rows of one phase.

    Args:
        counts: rows of each phase.
        steps: of the whole training: rows are repeated where a phase has too few. None: the most that need no row more
            than `epochs` times.

    Raises:
        ValueError: a phase gets no step.
    """
    whole = steps or int(min(epochs * n / (batch * phase.share) for n, phase in zip(counts, phases, strict=True)))
    ends = [0, *(round(whole * sum(phase.share for phase in phases[: n + 1])) for n in range(len(phases)))]
    order: list[int] = []
    for number, count in enumerate(counts):
        wanted = (ends[number + 1] - ends[number]) * batch
        if steps is None:  # rounding may have given it a step too many
            wanted = min(wanted, int(epochs * count // batch) * batch)
        if not wanted or not count:
            raise ValueError(f"phase {number + 1} gets no step of {batch} rows: it has {count}")
        rng, first, rows = Random(f"phase {number} {seed}"), sum(counts[:number]), []
        while len(rows) < wanted:
            rows += rng.sample(range(first, first + count), count)
        order += rows[:wanted]
    return order
