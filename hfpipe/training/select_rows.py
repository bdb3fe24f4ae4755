"""Which rows a stage trains on and how often: `decontaminate`, `balance`, and weights of a mixture."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from hfpipe.data.report import SourceReport
from hfpipe.errors import UserError, nearest
from hfpipe.sections import Source
from hfpipe.training.encode import count_tokens, count_trained

if TYPE_CHECKING:
    from datasets import Dataset

    from hfpipe.data.held_out import HeldOut
    from hfpipe.training.job import Job

MOST_REPEATS = 10  # of a row, however rare its value is
_CHUNK = 1000


def without_held_out(
    rows: Iterable[tuple[str, dict[str, Any]]], held_out: HeldOut, report: SourceReport, removed: Path
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows that show nothing held out; the others are counted and written to `removed`, personal data masked."""
    from hfpipe.data.personal import masked

    rows = iter(rows)
    with removed.open("a", encoding="utf-8") as file:
        while chunk := list(itertools.islice(rows, _CHUNK)):
            shown = {}
            for match in held_out.find([row for _, row in chunk]):
                shown.setdefault(match.row, match)
            for number, (place, row) in enumerate(chunk):
                if number not in shown:
                    yield place, row
                    continue
                report.contaminated += 1
                item, share = shown[number].item, shown[number].share
                told = {"source": report.path, "place": place, "held_out": held_out.label(item)}
                told |= {"held_out_place": held_out.places[item], "share": round(share, 3), "row": row}
                file.write(json.dumps(masked(told), ensure_ascii=False, default=str) + "\n")


class Balance:
    """Repeats rows whose value in a column is rarer, until every value has as many rows as the commonest, or 10 times."""

    def __init__(self, column: str, where: str):
        self._column, self._where = column, where
        self._values: list[str] = []
        self._tokens: list[tuple[int, int]] = []
        self._columns: dict[str, None] = {}
        self._found = False

    def note(self, encoded: Iterable[tuple[dict, dict]]) -> Iterator[tuple[dict, dict]]:
        """Pass rows and their encodings through, and remember what they are."""
        known: dict[str, str] = {}
        for row, ids in encoded:
            self._found = self._found or self._column in row
            if not self._found:
                self._columns.update(dict.fromkeys(row))
            value = str(row.get(self._column))
            self._values.append(known.setdefault(value, value))
            self._tokens.append((count_tokens(ids), count_trained(ids)))
            yield row, ids

    def repeat(self, part: Dataset, report: SourceReport, seed: int) -> Dataset:
        """`part`, whose rows were noted, and the repeats after them: the same ones for the same seed.

        Raises:
            UserError: no row has the column.
        """
        if not self._found:
            known = ", ".join(self._columns)
            raise UserError(
                f"{self._where}: balance: no row has a column `{self._column}`; found {known}.{nearest(self._column, self._columns)}"
            )
        indices = self._repeats(Random(f"balance {self._column} {seed}"))
        report.repeated = len(indices)
        report.tokens += sum(self._tokens[i][0] for i in indices)
        report.trained_tokens += sum(self._tokens[i][1] for i in indices)
        return part.select([*range(len(part)), *indices])

    def _repeats(self, rng: Random) -> list[int]:
        counts = Counter(self._values)
        most = max(counts.values())
        rows: dict[str, list[int]] = {}
        for number, value in enumerate(self._values):
            if counts[value] < most:
                rows.setdefault(value, []).append(number)
        repeats = []
        for own in rows.values():
            missing = min(most, MOST_REPEATS * len(own)) - len(own)
            repeats += own * (missing // len(own)) + sorted(rng.sample(own, missing % len(own)))
        return repeats


def concatenate(parts: list[Dataset]) -> Dataset:
    from datasets import concatenate_datasets

    return concatenate_datasets(parts)


def mix(parts: list[Dataset], sources: tuple[Source, ...], reports: list[SourceReport], job: Job) -> Dataset:
    """All of every source, or, with weights, as much of each as the scarcest allows without repeating a row.

    Weights are shares of tokens, for preferences, judged answers and prompts of rows.
    """
    seed, weights = job.recipe.pipeline.seed, shares(sources)
    if weights:
        counted = job.stage.type.rows in ("preference", "unpaired", "prompt")
        sizes = [len(part) if counted else report.tokens for part, report in zip(parts, reports, strict=True)]
        total = min(size / weight for size, weight in zip(sizes, weights, strict=True))
        for i, weight in enumerate(weights):
            reports[i].taken = min(1.0, total * weight / sizes[i])
            if reports[i].taken < 1:
                keep = max(1, round(len(parts[i]) * reports[i].taken))
                parts[i] = parts[i].shuffle(seed=seed).select(range(keep))
    return concatenate(parts).shuffle(seed=seed)


def shares(sources: tuple[Source, ...]) -> list[float] | None:
    """The sources' weights as shares of 1, or None where none has one (`contradictions` refuses some of both)."""
    given = [source.weight for source in sources if source.weight is not None]
    return [weight / sum(given) for weight in given] or None
