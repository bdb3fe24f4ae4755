"""A scaling law of one's own, fitted to finished runs, with intervals; and which of its constants the runs can tell apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hfpipe import artifact
from hfpipe.errors import UserError
from hfpipe.plan.scaling import CHINCHILLA, Law
from hfpipe.plan.shapes import read_config, read_shape

_DRAWS = 200  # of the bootstrap
_EXPONENTS = (0.02, 1.5)  # searched
_STEPS, _ZOOMS = 24, 7  # points along each exponent, and how often the grid is laid anew around the best of them


class Point(NamedTuple):
    """One finished training: parameters, tokens, held-out loss in nats a token."""

    params: float
    tokens: float
    loss: float
    run: str


@dataclass(frozen=True)
class Fit:
    law: Law
    intervals: dict[str, tuple[float, float]]  # 95%, of the constants that were fitted, by resampling the runs
    free: tuple[str, ...]  # the constants that were fitted; the others stand for what cannot be told from these runs
    why: str  # why these
    error: float  # root mean square of the relative error
    points: tuple[Point, ...]
    notes: tuple[str, ...] = ()


def read_points(runs: Sequence[Path]) -> tuple[list[Point], list[str]]:
    """The pretraining of each finished run, and what makes their losses hard to compare.

    Raises:
        UserError: a folder that is no run, or one without a finished pretraining.
    """
    points, texts, tokenizers = [], set(), set()
    for run in runs:
        folders = [run, *sorted(path.parent for path in run.glob(f"*/{artifact.STAGE_FILE}"))]
        records = [(folder, artifact.read_record(folder / artifact.STAGE_FILE) or {}) for folder in folders]
        found = [(folder, record) for folder, record in records if record.get("type") == "pretrain"]
        if not found:
            raise UserError(f"{run} holds no finished pretrain stage: give folders of runs, such as runs/*.")
        for folder, record in found:
            metrics = record["metrics"]
            loss = (metrics.get("held_out_text") or metrics.get("validation") or {}).get("loss")
            config = read_config(folder)
            shape = read_shape(config) if config else None
            if loss is None or not metrics.get("tokens") or shape is None:
                missing = "held-out loss (data.eval)" if loss is None else "model type that is known here"
                raise UserError(f"{folder} has no {missing}, so it is no point of a scaling law. Leave it out.")
            points.append(Point(shape.total, metrics["tokens"], loss, str(folder)))
            texts.add(tuple(h for name, h in sorted(record["data"].items()) if name.startswith("eval")))
            tokenizers.add((record.get("parent") or {}).get("fingerprint"))
    notes = []
    if len(tokenizers) > 1:
        notes.append("The runs have different tokenizers, so their losses a token are not of the same tokens.")
    if len(texts) > 1:
        notes.append("The runs were scored on different held-out text.")
    return points, notes


def choose_free(points: Sequence[Point]) -> tuple[tuple[str, ...], str]:
    """The constants that these runs can tell apart, and why those.

    Raises:
        UserError: too few runs for any.
    """
    sizes, lengths = len({p.params for p in points}), len({p.tokens for p in points})
    pairs = {(p.params, p.tokens) for p in points}
    across = len(pairs) > max(sizes, lengths)  # some size was trained on two lengths, or the other way round
    if sizes >= 3 and lengths >= 3 and len(points) >= 6 and across:
        return ("E", "A", "B", "a", "b"), f"{sizes} sizes and {lengths} lengths tell all five apart"
    if sizes >= 2 and lengths >= 2 and len(points) >= 4 and across:
        return (
            ("E", "A", "B"),
            f"{len(points)} runs of {sizes} sizes and {lengths} lengths tell no exponents apart: a and b are "
            "Chinchilla's. All five take 6 runs of 3 sizes and 3 lengths",
        )
    if lengths >= 3 and sizes == 1 and len(points) >= 4:
        return ("E", "B", "b"), "all runs have one size: what the model's finiteness costs is within E"
    if sizes >= 3 and lengths == 1 and len(points) >= 4:
        return ("E", "A", "a"), "all runs have one length: what the data's finiteness costs is within E"
    raise UserError(
        f"These {len(points)} points (sizes: {sizes}, lengths: {lengths}) tell no law apart. It takes 4: 2 sizes with 2 "
        "lengths of training each, or 3 lengths of one size; for all five constants 6, of 3 sizes and 3 lengths, not all on "
        "one line."
    )


def fit(points: Sequence[Point], notes: Sequence[str] = (), seed: int = 0) -> Fit:
    """Least squares of the relative error, (law - loss) / loss, all terms at least 0.

    For each pair of exponents the best E, A and B follow by linear algebra (variable projection), so that only the
    exponents are searched: on a grid that is laid anew, finer, around its best point.
    """
    import numpy as np

    free, why = choose_free(points)
    law, error = _solve(points, free)
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(_DRAWS):
        drawn = [points[i] for i in rng.integers(len(points), size=len(points))]
        try:
            if choose_free(drawn)[0] == free:
                draws.append(_solve(drawn, free, zooms=3)[0])
        except UserError:
            continue
    intervals = {}
    for name in free if len(draws) >= _DRAWS // 4 else ():
        low, high = np.quantile([getattr(draw, name) for draw in draws], [0.025, 0.975])
        intervals[name] = (float(low), float(high))
    told = [*notes]
    if not intervals:
        told.append("Too few runs for intervals: resampled, they seldom still tell the constants apart.")
    return Fit(law, intervals, free, why, error, tuple(points), tuple(told))


def _solve(points: Sequence[Point], free: tuple[str, ...], zooms: int = _ZOOMS) -> tuple[Law, float]:
    import numpy as np

    low, high = np.log(_EXPONENTS)
    fixed = {"a": np.array([CHINCHILLA.a]), "b": np.array([CHINCHILLA.b])}
    best: dict[str, Any] = {}
    for zoom in range(zooms):
        width = (high - low) * 0.3**zoom
        axes = []
        for name in ("a", "b"):
            middle = np.log(best[name]) if best else (low + high) / 2
            span = np.linspace(max(middle - width / 2, low), min(middle + width / 2, high), _STEPS)
            axes.append(np.exp(span) if name in free else fixed[name])
        a, b = (axis.ravel() for axis in np.meshgrid(*axes, indexing="ij"))
        coefficients, errors = _project(points, a, b, free)
        i = int(np.argmin(errors))
        if not best or errors[i] <= best["error"]:
            E, A, B = coefficients[i]
            best = {"E": E, "A": A, "B": B, "a": a[i], "b": b[i], "error": errors[i]}
    error = float(np.sqrt(best.pop("error") / len(points)))
    return Law(**{name: float(value) for name, value in best.items()}), error


def _project(points: Sequence[Point], a: Any, b: Any, free: tuple[str, ...]) -> tuple[Any, Any]:
    """The best non-negative E, A, B for each pair of exponents, (pairs, 3), and the sums of squared relative errors."""
    import itertools

    import numpy as np

    losses = np.array([p.loss for p in points])
    # Columns near 1 whatever the exponents: A and B are scaled back at the end.
    sizes = np.array([p.params for p in points])
    lengths = np.array([p.tokens for p in points])
    n0, d0 = np.exp(np.log(sizes).mean()), np.exp(np.log(lengths).mean())
    columns = np.stack(
        [
            np.broadcast_to(1 / losses, (len(a), len(points))),
            (sizes / n0)[None] ** -a[:, None] / losses,
            (lengths / d0)[None] ** -b[:, None] / losses,
        ],
        axis=-1,
    )  # (pairs, points, 3)
    used = [i for i, name in enumerate(("E", "A", "B")) if name in free]
    found, errors = np.zeros((len(a), 3)), np.full(len(a), np.inf)
    for size in range(1, len(used) + 1):
        for subset in itertools.combinations(used, size):
            x = columns[:, :, subset]
            gram = np.einsum("kpi,kpj->kij", x, x) + 1e-13 * np.eye(size)
            right = np.einsum("kpi->ki", x)
            solved = np.linalg.solve(gram, right[..., None])[..., 0]
            error = ((np.einsum("kpi,ki->kp", x, solved) - 1) ** 2).sum(axis=1)
            better = (solved >= 0).all(axis=1) & (error < errors)
            errors = np.where(better, error, errors)
            whole = np.zeros((len(a), 3))
            whole[:, subset] = solved
            found = np.where(better[:, None], whole, found)
    scale = np.stack([np.ones_like(a), n0**a, d0**b], axis=-1)
    return found * scale, errors
