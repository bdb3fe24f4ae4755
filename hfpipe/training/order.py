"""The rows of a stage in the order in which it sees them: from easy to hard, or in phases (`data.curriculum`, `data.phases`).

They are laid out once, before training, and read one after the other. So a step is a run of consecutive rows whatever the
number of processes, and a run that goes on skips exactly those that were seen.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch.utils.data import Sampler

from hfpipe.data.report import SourceReport
from hfpipe.errors import UserError, nearest
from hfpipe.plan.ordering import describe_order, draw_growing, group_by_length, lay_phases
from hfpipe.plan.workload import option, rows_of_pass
from hfpipe.sections import Curriculum, Data, Stage
from hfpipe.training.identity import processes_now
from hfpipe.training.select_rows import concatenate, mix

if TYPE_CHECKING:
    from datasets import Dataset

    from hfpipe.training.job import Job, Progress
    from hfpipe.training.prepare import Prepared

_IDS = ("input_ids", "prompt_ids", "chosen_ids", "rejected_ids", "completion_ids")
_SIDES = ("chosen_ids", "rejected_ids")
_BLOCK = 8  # packed rows' worth of documents that are packed together: neighbours by difficulty


def is_ordered(data: Data) -> bool:
    return bool(data.curriculum or data.phases)


def columns(data: Data) -> dict[str, str]:
    """What is kept beside a row's token ids, with its Arrow type: its tokens, and its difficulty where it tells it itself."""
    own = data.curriculum is not None and data.curriculum.by != "parent_loss"
    return {"tokens": "int32", **({"difficulty": "float64"} if own else {})} if is_ordered(data) else {}


def check_numbers(
    rows: Iterable[tuple[str, dict[str, Any]]], curriculum: Curriculum | None, where: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows with their places, as they come; UserError at the first whose difficulty is to be read and is no number."""
    column = curriculum.by if curriculum and curriculum.by not in ("length", "parent_loss") else None
    for place, row in rows:
        value = row.get(column) if column else 0
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            found = f"{value!r} there" if column in row else f"only {', '.join(row)}.{nearest(column, row)}"
            raise UserError(
                f"{where}: data.curriculum.by = {column!r}: expected a column with a number; {place} has {found} "
                "Give another column, `length` or `parent_loss`."
            )
        yield place, row


def measure(encoded: Iterable[tuple[dict, dict]], data: Data) -> Iterator[tuple[dict, dict]]:
    """Rows and their encodings with `columns`; of a preference the prompt and both answers count."""
    by = data.curriculum.by if data.curriculum else None
    for row, ids in encoded:
        tokens = sum(len(ids[name]) for name in _IDS if name in ids)
        told = {"tokens": tokens, "difficulty": float(tokens if by == "length" else row.get(by) or 0)}
        yield row, ids | {name: told[name] for name in columns(data)}


# --- what is stored ---


def store_ordered(
    parts: list[Dataset],
    reports: list[SourceReport],
    job: Job,
    data: Data,
    tokenizer: Any,
    max_length: int,
    packing: bool,
) -> Dataset:
    """The rows of all sources with `tokens`, and `difficulty`, sorted by it, or `phase`, one phase after the other.

    Packed, a row holds neighbours: some documents of about the same difficulty, and its own is their mean over tokens.
    """
    if data.phases:
        return _store_phases(parts, reports, job, data, max_length, packing)
    rows = mix(parts, data.train, reports, job)
    if data.curriculum.by == "parent_loss":
        from hfpipe.training.parent_loss import parent_losses

        rows = rows.add_column("difficulty", parent_losses(job, tokenizer, rows))
    rows = _sorted(rows)
    if packing:
        in_rows = sum(rows["tokens"]) / max_length
        block = math.ceil(_BLOCK * len(rows) / max(in_rows, 1))
        rows = rows.map(_spread, batched=True, remove_columns=["tokens"])
        rows = _sorted(pack(rows, max_length, block).map(_gather, batched=True))
    return rows


def _sorted(rows: Dataset) -> Dataset:
    difficulty = list(rows["difficulty"])
    return rows.select(sorted(range(len(rows)), key=difficulty.__getitem__))


def _spread(rows: dict[str, list]) -> dict[str, list]:
    """A document's difficulty beside each of its tokens: packing joins lists."""
    return {"difficulty": [[d] * len(ids) for d, ids in zip(rows["difficulty"], rows["input_ids"], strict=True)]}


def _gather(rows: dict[str, list]) -> dict[str, list]:
    lengths = [len(ids) for ids in rows["input_ids"]]
    means = [math.fsum(row) / n for row, n in zip(rows["difficulty"], lengths, strict=True)]
    return {"difficulty": means, "tokens": lengths}


def pack(rows: Dataset, max_length: int, block: int = 1000) -> Dataset:
    """Several documents or conversations in a row, none of them cut: TRL's best fit decreasing, within `block` documents."""
    from trl import pack_dataset

    return pack_dataset(rows.remove_columns("seq_lengths"), max_length, "bfd", map_kwargs={"batch_size": block})


def _store_phases(
    parts: list[Dataset], reports: list[SourceReport], job: Job, data: Data, max_length: int, packing: bool
) -> Dataset:
    """As many tokens in all as the scarcest source allows without a row in two phases or twice in one.

    A text that is longer than its phase's `max_length` is cut, a conversation comes in a phase that it fits into.
    """
    seed = job.recipe.pipeline.seed
    parts = [part.shuffle(seed=seed) for part in parts]
    tokens = [list(part["tokens"]) for part in parts]
    shares = [phase.mixture(data.train, [sum(own) for own in tokens]) for phase in data.phases]
    wanted = [[phase.share * share for share in own] for phase, own in zip(data.phases, shares, strict=True)]
    limits = [phase.max_length or max_length for phase in data.phases]
    is_text = [(source.as_ or job.stage.type.rows) == "text" for source in data.train]
    total = math.inf
    for s, source in enumerate(data.train):
        for limit in limits:
            asked = sum(own[s] for own, most in zip(wanted, limits, strict=True) if most <= limit)
            there = sum(n for n in tokens[s] if is_text[s] or n <= limit)
            if asked and not there:
                raise UserError(
                    f"{job.stage.file}: data.phases: no conversation of {source.path} has at most {limit} tokens. "
                    "Raise that phase's max_length, or give the source a weight of 0 there."
                )
            total = min(total, there / asked) if asked else total
    taken: list[list[list[int]]] = [[[] for _ in parts] for _ in data.phases]
    for s, own in enumerate(tokens):
        left = range(len(own))
        for p in sorted(range(len(limits)), key=limits.__getitem__):  # what is short goes where nothing else can
            quota, used, later = total * wanted[p][s], 0, []
            for row in left:
                if used + own[row] / 2 <= quota and (is_text[s] or own[row] <= limits[p]):
                    taken[p][s].append(row)
                    used += own[row]
                else:
                    later.append(row)
            left = later
        reports[s].phases = [sum(own[row] for row in rows[s]) / max(sum(own), 1) for rows in taken]
        reports[s].taken = sum(reports[s].phases)
    stored = []
    for p, rows in enumerate(taken):
        if not any(rows):
            raise UserError(
                f"{job.stage.file}: data.phases: phase {p + 1} gets no row: its share of what the sources hold is less than "
                "one. Give more data or a larger share."
            )
        phase = concatenate([part.select(own) for part, own in zip(parts, rows, strict=True)]).shuffle(seed=seed)
        if limits[p] < max_length:
            phase = phase.map(_cut, batched=True, fn_kwargs={"length": limits[p]}, features=phase.features)
        if packing:
            phase = pack(phase.remove_columns("tokens"), max_length)
            phase = phase.add_column("tokens", [sum(lengths) for lengths in phase["seq_lengths"]])
        stored.append(phase.add_column("phase", [p + 1] * len(phase)))
    return concatenate(stored)


def _cut(rows: dict[str, list], length: int) -> dict[str, list]:
    """Each row in pieces of at most `length` tokens."""
    pieces = [
        (ids[start : start + length], labels[start : start + length])
        for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True)
        for start in range(0, len(ids), length)
    ]
    sizes = [len(ids) for ids, _ in pieces]
    ids, labels = ([piece[side] for piece in pieces] for side in (0, 1))
    return {"input_ids": ids, "labels": labels, "seq_lengths": [[n] for n in sizes], "tokens": sizes}


# --- what is trained ---


def find_order(job: Job, prepared: Prepared, args: Any = None) -> list[int] | None:
    """Which prepared row is seen when, in the whole training; None: as they are stored, over again in each epoch.

    Args:
        args: upstream's; None: what the recipe says.

    Raises:
        UserError: a phase fills no step.
    """
    stage, data = job.stage, job.stage.data
    if not is_ordered(data):
        return None
    if args is None:
        per_device, accumulation = rows_of_pass(stage, processes_now(job.recipe))
        batch = per_device * accumulation * processes_now(job.recipe)
        steps, epochs = option(stage, "max_steps"), option(stage, "num_train_epochs")
    else:
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        steps, epochs = args.max_steps, args.num_train_epochs
    seed = job.recipe.pipeline.seed
    if data.phases:
        found = Counter(prepared.train["phase"])
        counts = [found[number] for number in range(1, len(data.phases) + 1)]
        try:
            return lay_phases(data.phases, counts, steps if steps > 0 else None, batch, epochs, seed)
        except ValueError as error:
            raise UserError(
                f"{stage.file}: data.phases: {error}. Give more data or steps, a larger share or a smaller batch."
            ) from None
    if data.curriculum.pace == "epoch":
        return None
    count = len(prepared.train)
    steps = steps if steps > 0 else math.ceil(epochs * math.ceil(count / batch))  # as upstream counts them
    return draw_growing(data.curriculum, count, steps, batch, seed)


def in_order(job: Job, prepared: Prepared, args: Any, progress: Progress) -> Prepared:
    """The rows as the stage is to see them, and upstream's `args` set to read them so."""
    data = job.stage.data
    if not is_ordered(data):
        return prepared
    order, train, turns = find_order(job, prepared, args), prepared.train, []
    if job.stage.type.rows == "prompt":
        args.shuffle_dataset = False
    else:
        args.train_sampling_strategy = "sequential"
    told = f"order: {describe_order(data)}; {len(train):,} rows"
    if "difficulty" in train.column_names:
        told += f" of {train[0]['difficulty']:.4g} to {train[-1]['difficulty']:.4g}"
    if order is not None:
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        args.max_steps = len(order) // batch
        train = train.select(order)
        told += f", laid out for {args.max_steps:,} steps of {batch}"
        phases = train["phase"][::batch] if data.phases else []
        turns = [step for step in range(1, len(phases)) if phases[step] != phases[step - 1]]
    stored = Counter(prepared.train["phase"]) if data.phases else {}
    for number, count in sorted(Counter(train["phase"]).items()) if data.phases else ():
        told += f"; phase {number}: {count // batch:,} steps, its {stored[number]:,} rows {count / stored[number]:.2f} times"
    progress.note(told)
    tokens_per_row = round(sum(train["tokens"]) / len(train), 2)
    kept = [name for name in train.column_names if name not in ("tokens", "difficulty", "phase")]
    report = {**prepared.report, "tokens_per_row": tokens_per_row, "turns": turns}
    return dataclasses.replace(prepared, train=train.select_columns(kept), report=report)


def groups_by_length(stage: Stage) -> bool:
    return stage.trainer.get("train_sampling_strategy") == "group_by_length"


def lengths(rows: Dataset, shared: bool) -> list[int]:
    """Tokens of each prepared row: of a pair the longer side, or both in one row where they share what they begin with."""
    names = [name for name in _IDS if name in rows.column_names]
    found: list[int] = []
    for part in rows.select_columns(names).iter(1000):
        for row in zip(*(part[name] for name in names), strict=True):
            sides = [ids for name, ids in zip(names, row, strict=True) if name in _SIDES]
            own = sum(map(len, row)) - sum(map(len, sides))
            if shared:
                differs = (a != b for a, b in zip(*sides, strict=False))
                begins = next((n for n, other in enumerate(differs) if other), min(map(len, sides)))
                found.append(own + sum(map(len, sides)) - begins)
            else:
                found.append(own + max(map(len, sides), default=0))
    return found


class ByLength(Sampler):
    """Rows of about one length in a step. In place of upstream's sampler, which knows lengths of `input_ids` alone, and draws
    from the process's random numbers, so that a run that goes on would see others.

    Args:
        sizes: `lengths` of the rows.
        batch: rows of a step, of all processes and passes.
    """

    def __init__(self, sizes: list[int], batch: int, seed: int):
        self.sizes, self.batch, self.seed, self.epoch = sizes, batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate as an epoch begins, also the one that a run goes on in."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[int]:
        return iter(group_by_length(self.sizes, self.batch, self.seed, self.epoch))
