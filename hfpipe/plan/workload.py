"""What a stage's recipe asks for: rows, tokens and steps; what is known, what is reckoned, and what nobody knows yet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hfpipe import upstream
from hfpipe.adapter_types import checkpointing_off
from hfpipe.annealing import annealing_steps, anneals
from hfpipe.data.size import Size
from hfpipe.sections import Stage

PAIRS = ("dpo", "reward")
BY_REWARDS = ("grpo", "rloo", "ppo")


@dataclass(frozen=True)
class Work:
    """Of a whole stage, all devices together. None: not known before the data is prepared."""

    rows_per_step: int
    tokens_per_step: int  # at the most: rows of full length
    length: int  # tokens of a row at the most
    per_device: int  # rows of one pass of one device
    accumulation: int
    epochs: float | None
    steps: int | None
    rows: int | None  # of training, in one epoch; packed ones where the stage packs
    tokens: float | None  # of all epochs, answers of a pair both counted, completions at their longest
    places: float | None  # the same with the padding of packed rows: what is computed
    exact: bool
    why: str | None = None  # what is missing where steps or tokens are None


def option(stage: Stage, name: str) -> Any:
    """A field of the stage's `trainer`: the recipe's, else upstream's default."""
    if name in stage.trainer:
        return stage.trainer[name]
    field = upstream.fields(str(stage.type.trainer).rpartition(".")[2]).get(name)
    return field.default if field else None


def recomputes(stage: Stage) -> bool:
    """Whether activations are made anew in the backward pass."""
    if checkpointing_off(stage):
        return False
    new = option(stage, "activation_checkpointing")
    return bool(option(stage, "gradient_checkpointing") if new is None else new)


def rollout_rows(stage: Stage, work: Work) -> int:
    """Completions that one device samples before it learns from them."""
    if together := option(stage, "generation_batch_size"):
        return together * work.per_device * work.accumulation // work.rows_per_step
    return work.per_device * (option(stage, "steps_per_generation") or work.accumulation)


def packs(stage: Stage) -> bool:
    return stage.type.rows == "text" or bool(stage.trainer.get("packing"))


def row_length(stage: Stage) -> int:
    """Tokens of a row at the most."""
    if stage.type.rows == "prompt":
        return stage.data.max_prompt_length + (option(stage, "max_completion_length") or 256)
    return (
        stage.trainer.get("max_length")
        or getattr(stage.data, "max_length", None)
        or option(stage, "max_length")
        or 1024
    )


def rows_of_pass(stage: Stage, ranks: int) -> tuple[int, int]:
    """Rows of one pass of one device, and how many passes make a step."""
    per_device = option(stage, "per_device_train_batch_size") or 8
    accumulation = option(stage, "gradient_accumulation_steps") or 1
    if batch := getattr(stage.data, "batch_tokens", None):
        rows = max(batch // (row_length(stage) * ranks), 1)
        per_device = next(n for n in range(min(per_device, rows), 0, -1) if rows % n == 0)
        accumulation = rows // per_device
    return per_device, accumulation


def plan_work(
    stage: Stage,
    ranks: int,
    bytes_per_token: float,
    sizes: Sequence[Size],
    parent_tokens: float | None = None,
    full_rows: bool = False,
) -> Work:
    """Rows, tokens and steps of a stage.

    Args:
        ranks: devices that share a step.
        bytes_per_token: of the tokenizer, to reckon tokens with.
        sizes: what is known of each training source.
        parent_tokens: that the stage's parent trains on, of which an annealing takes its share.
        full_rows: where the rows' length is not known, take them to be as long as they may be.
    """
    length = row_length(stage)
    per_device, accumulation = rows_of_pass(stage, ranks)
    together = per_device * accumulation * ranks
    given = option(stage, "max_steps") or -1
    rows, mean, why = _rows(stage, sizes, length, bytes_per_token)
    if mean is None and full_rows:
        mean = float(length * (2 if stage.type.rows == "preference" else 1))
    annealing, exact = anneals(stage), given > 0
    if annealing and parent_tokens and mean:
        given = annealing_steps(annealing.share, parent_tokens, together * mean)
    elif annealing:
        rows, why = None, why or f"the tokens that {stage.model.from_} has trained on are not known yet"
    epochs = None if given > 0 else option(stage, "num_train_epochs")
    per_epoch = rows
    if rows and stage.type.rows == "prompt":
        per_epoch = rows * (option(stage, "num_generations") or 1) * (option(stage, "num_iterations") or 1)
    steps = given if given > 0 else None if rows is None else max(math.ceil(per_epoch / together), 1)
    if steps and given <= 0:
        steps = math.ceil(steps * epochs)
    tokens = places = None
    if steps and mean:
        by_steps = given > 0 or stage.type.rows == "prompt"
        seen = steps * together if by_steps else rows * epochs
        tokens, places = seen * mean, seen * (length if packs(stage) else mean)
    return Work(
        rows_per_step=together,
        tokens_per_step=together * length,
        length=length,
        per_device=per_device,
        accumulation=accumulation,
        epochs=epochs,
        steps=steps,
        rows=rows,
        tokens=tokens,
        places=places,
        exact=exact,
        why=why,
    )


def _rows(
    stage: Stage, sizes: Sequence[Size], length: int, bytes_per_token: float
) -> tuple[int | None, float | None, str | None]:
    """Rows of an epoch, tokens of one of them in the mean (a pair's answers together), what is missing."""
    unknown = [s.path for s, size in zip(stage.data.train, sizes, strict=True) if not (size.rows and size.sample)]
    if unknown:
        return None, float(length) if packs(stage) else None, f"the rows of {', '.join(unknown)} are not known yet"
    means = [_tokens(size.bytes_per_row, size.messages_per_row, size, bytes_per_token) for size in sizes]
    totals = [size.rows * tokens for size, tokens in zip(sizes, means, strict=True)]
    by_rows = stage.type.rows in ("preference", "unpaired", "prompt")
    counts = [float(size.rows) if by_rows else total for size, total in zip(sizes, totals, strict=True)]
    shares = [1.0] * len(sizes)
    weights = [source.weight for source in stage.data.train if source.weight is not None]
    if stage.data.phases:
        mixtures = [(phase.share, phase.mixture(stage.data.train, counts)) for phase in stage.data.phases]
        weights = [sum(share * mixture[i] for share, mixture in mixtures) for i in range(len(counts))]
    if weights:  # as much of each as the scarcest allows without repeating a row
        whole = min(count / weight for count, weight in zip(counts, weights, strict=True) if weight)
        shares = [min(1.0, whole * weight / count) for count, weight in zip(counts, weights, strict=True)]
    rows = sum(size.rows * share for size, share in zip(sizes, shares, strict=True))
    tokens = sum(total * share for total, share in zip(totals, shares, strict=True))
    if stage.type.rows == "prompt":
        return round(rows), float(tokens / rows + (option(stage, "max_completion_length") or 256)), None
    if packs(stage):
        filled = [_fill([_tokens(*row, size, bytes_per_token) for row in size.sample], length) for size in sizes]
        packed = sum(total * share / (length * fill) for total, share, fill in zip(totals, shares, filled, strict=True))
        return max(math.ceil(packed), 1), tokens / packed, None
    return round(rows), min(tokens / rows, length * sizes[0].answers_per_row), None


def _tokens(size: float, messages: float, source: Size, bytes_per_token: float) -> float:
    """Tokens of a row: what is said, and two control tokens for each message and for each conversation."""
    return size / bytes_per_token + 2 * messages + (2 * source.answers_per_row if messages else 1)


def _fill(tokens: list[float], length: int) -> float:
    """`_packed`, the mean over lengths a tenth shorter and longer: what is reckoned may fall just beside what fits."""
    return sum(_packed([n * scale for n in tokens], length) for scale in (0.9, 1.0, 1.1)) / 3


def _packed(tokens: list[float], length: int) -> float:
    """How full rows of `length` tokens become with documents like these: best fit decreasing, as TRL packs."""
    pieces = [min(length, left) for n in tokens for left in _cut(n, length)]
    room: list[float] = []
    for piece in sorted(pieces, reverse=True):
        fitting = [i for i, left in enumerate(room) if left >= piece]
        if fitting:
            best = min(fitting, key=lambda i: room[i])
            room[best] -= piece
        else:
            room.append(length - piece)
    return sum(pieces) / (length * len(room)) if room else 1.0


def _cut(tokens: float, length: int) -> list[float]:
    whole, rest = divmod(tokens, length)
    return [float(length)] * int(whole) + ([rest] if rest else [])


def guess_bytes_per_token(vocab_size: int) -> float:
    """Bytes of English text that a byte-level BPE of so many entries makes a token of, to about 15%.

    A line through our own tokenizers (768 entries 2.4, 1,536 2.8) and GPT-2's (50,257 entries, 4.5 on web text).
    """
    return min(max(0.36 * math.log2(max(vocab_size, 2)) - 1.05, 1.0), 4.8)
