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
_NEAR = 2  # a resampled exponent is searched from the fitted one divided by this to the fitted one times this


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
    low, high = np.log(_EXPONENTS)
    whole = {"middle": [(low + high) / 2] * 2, "width": high - low, "steps": 24, "shrink": 0.3, "zooms": 9}
    law, error = _solve(points, free, np.ones((1, len(points))), **whole)
    rng = np.random.default_rng(seed)
    counts = []
    for _ in range(_DRAWS):
        drawn = rng.integers(len(points), size=len(points))
        try:
            if choose_free([points[i] for i in drawn])[0] == free:
                counts.append(np.bincount(drawn, minlength=len(points)))
        except UserError:
            continue
    intervals = {}
    if len(counts) >= _DRAWS // 4:
        middle = np.log([law["a"][0], law["b"][0]])
        near = {"middle": middle, "width": 2 * np.log(_NEAR), "steps": 7, "shrink": 0.6, "zooms": 20}
        draws, _ = _solve(points, free, np.array(counts, float), **near)
        for name in free:
            # Of exact points all draws are the estimate, to the search's own grain: that is no error of sampling.
            least, most = np.quantile(draws[name], [0.025, 0.975])
            intervals[name] = (float(min(least, law[name][0])), float(max(most, law[name][0])))
    told = [*notes]
    if not intervals:
        told.append("Too few runs for intervals: resampled, they seldom still tell the constants apart.")
    found = Law(**{name: float(value[0]) for name, value in law.items()})
    return Fit(found, intervals, free, why, float(np.sqrt(error[0] / len(points))), tuple(points), tuple(told))


def _solve(
    points: Sequence[Point],
    free: tuple[str, ...],
    counts: Any,
    *,
    middle: Any,
    width: float,
    steps: int,
    shrink: float,
    zooms: int,
) -> tuple[dict[str, Any], Any]:
    """The constants, (draws,) each, and the sums of squared relative errors.

    Args:
        counts: (draws, points), how often each point counts.
        middle: logarithms of a and b that the first grid lies around.
        width: of that grid, in the logarithm; each further one is `shrink` times as wide and lies around the best so far.
        steps: points of a grid along each exponent.
    """
    import numpy as np

    rows, grid = len(counts), np.linspace(-0.5, 0.5, steps)
    best: dict[str, Any] = {"error": np.full(rows, np.inf)}
    middles = {name: np.full(rows, value) for name, value in zip(("a", "b"), middle, strict=True)}
    for zoom in range(zooms):
        axes = []
        for name in ("a", "b"):
            axis = np.exp(np.clip(middles[name][:, None] + width * shrink**zoom * grid, *np.log(_EXPONENTS)))
            axes.append(axis if name in free else np.full((rows, 1), getattr(CHINCHILLA, name)))
        a, b = (np.repeat(axes[0], axes[1].shape[1], axis=1), np.tile(axes[1], axes[0].shape[1]))
        pairs = a.shape[1]
        coefficients, errors = _project(points, a.ravel(), b.ravel(), free, np.repeat(counts, pairs, axis=0))
        chosen = np.arange(rows) * pairs + np.argmin(errors.reshape(rows, pairs), axis=1)
        better = errors[chosen] <= best["error"]
        now = dict(zip(("E", "A", "B"), coefficients[chosen].T, strict=True))
        now |= {"a": a.ravel()[chosen], "b": b.ravel()[chosen], "error": errors[chosen]}
        best = {name: np.where(better, value, best.get(name, value)) for name, value in now.items()}
        middles = {name: np.log(best[name]) for name in ("a", "b")}
    error = best.pop("error")
    return best, error


def _project(points: Sequence[Point], a: Any, b: Any, free: tuple[str, ...], counts: Any) -> tuple[Any, Any]:
    """The best non-negative E, A, B for each pair of exponents, (pairs, 3), and the sums of squared relative errors."""
    import itertools

    import numpy as np

    losses = np.array([p.loss for p in points])
    # Columns near 1 whatever the exponents: A and B are scaled back at the end.
    sizes = np.log([p.params for p in points])
    lengths = np.log([p.tokens for p in points])
    n0, d0 = sizes.mean(), lengths.mean()
    columns = np.stack(
        [
            np.broadcast_to(1 / losses, (len(a), len(points))),
            np.exp(-a[:, None] * (sizes - n0)) / losses,
            np.exp(-b[:, None] * (lengths - d0)) / losses,
        ],
        axis=-1,
    )  # (pairs, points, 3)
    weights = np.sqrt(counts)
    columns *= weights[..., None]
    used = [i for i, name in enumerate(("E", "A", "B")) if name in free]
    found, errors = np.zeros((len(a), 3)), np.full(len(a), np.inf)
    left = np.arange(len(a))
    for size in range(len(used), 0, -1):
        for subset in map(list, itertools.combinations(used, size)):
            x, y = columns[left][:, :, subset], weights[left]
            gram = np.einsum("kpi,kpj->kij", x, x) + 1e-13 * np.eye(size)
            solved = np.linalg.solve(gram, np.einsum("kpi,kp->ki", x, y)[..., None])[..., 0]
            error = ((np.einsum("kpi,ki->kp", x, solved) - y) ** 2).sum(axis=1)
            better = (solved >= 0).all(axis=1) & (error < errors[left])
            changed = left[better]
            errors[changed] = error[better]
            found[changed] = 0
            found[np.ix_(changed, subset)] = solved[better]
        if size == len(used):  # where all terms are at least 0 anyway, no fewer do better
            left = left[np.isinf(errors)]
    scale = np.stack([np.ones_like(a), np.exp(a * n0), np.exp(b * d0)], axis=-1)
    return found * scale, errors
