"""tinyworld: a seeded world in which everything can be checked, for every stage from raw text to preferences."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from random import Random

from hfpipe.data.tinyworld import behaviour, chat, foreign, needles, preferences, probes, text, web, world
from hfpipe.errors import UserError, nearest

NAMES = (
    *("pretrain", "web", "letters", "needles", "long_needles", "foreign"),
    *("midtrain", "sft", "sums", "preferences", "decoys", "probes"),
)
TRAIN_SIZES = {
    "pretrain": 26_000,
    "web": 34_000,
    "letters": 6_000,
    "needles": 24_000,
    "long_needles": 1_600,
    "midtrain": 12_000,
    "sft": 6_600,
    "sums": 4_000,
    "preferences": 6_000,
    "decoys": 6_000,
    "foreign": 6_000,
    "probes": 600,
}
HELD_OUT_SIZES = {
    "pretrain": 300,
    "web": 300,
    "letters": 300,
    "needles": 300,
    "long_needles": 100,
    "midtrain": 300,
    "sft": 300,
    "sums": 300,
    "preferences": 300,
    "decoys": 300,
    "foreign": 300,
    "probes": 600,
}
# Conversations of midtraining's kinds among SFT's, so that structure is kept.
KEPT_STRUCTURE = 0.5


def rows(name: str, split: str = "train", seed: int = 0, size: int | None = None) -> Iterator[dict]:
    """The rows of one data set of the world; the same arguments give the same rows.

    Args:
        name: one of `NAMES`.
        split: train, validation or test. Conversations and probes of the three share no entity and no wording.
        size: number of rows; by default enough for a model of two million parameters.
    Raises:
        UserError: unknown name or split, or a size below 1.
    """
    if name not in NAMES:
        raise UserError(
            f"tinyworld/{name}: no such data set; expected one of {', '.join(NAMES)}.{nearest(name, NAMES)}"
        )
    if split not in world.SPLITS:
        raise UserError(
            f"tinyworld/{name}: no split {split!r}; expected train, validation or test.{nearest(split, world.SPLITS)}"
        )
    if size is None:
        size = (TRAIN_SIZES if split == "train" else HELD_OUT_SIZES)[name]
    if size < 1:
        raise UserError(f"tinyworld/{name}: size is {size}; expected 1 or more.")
    rng = Random(f"tinyworld {name} {split} {seed}")
    if name == "probes":
        return probes.probes(split, rng, size)
    return (MAKERS[name](rng, split) for _ in range(size))


def pretrain_row(rng: Random, split: str) -> dict:
    return text.document(rng)


def web_row(rng: Random, split: str) -> dict:
    return web.page(rng)


def letters_row(rng: Random, split: str) -> dict:
    return {"text": text.letters(rng)}


def midtrain_row(rng: Random, split: str) -> dict:
    return conversation(chat.KINDS, rng, split)


def sft_row(rng: Random, split: str) -> dict:
    return conversation(chat.KINDS if rng.random() < KEPT_STRUCTURE else behaviour.KINDS, rng, split)


def sums_row(rng: Random, split: str) -> dict:
    return conversation(((1, chat.calculation),), rng, split)


def preference_row(rng: Random, split: str) -> dict:
    return pair(preferences.KINDS, rng, split)


def decoy_row(rng: Random, split: str) -> dict:
    return pair(preferences.DECOYS, rng, split)


def foreign_row(rng: Random, split: str) -> dict:
    return {"text": foreign.document(rng, split)}


def pair(kinds, rng: Random, split: str) -> dict:
    make = pick(kinds, rng)
    return {**make(rng, split), "kind": make.__name__}


def conversation(kinds, rng: Random, split: str) -> dict:
    make = pick(kinds, rng)
    return {"messages": make(rng, split), "kind": make.__name__}


def pick(kinds, rng: Random):
    return rng.choices([make for _, make in kinds], [weight for weight, _ in kinds])[0]


MAKERS = {
    "pretrain": pretrain_row,
    "web": web_row,
    "letters": letters_row,
    "needles": functools.partial(needles.row, needles.SHORT),
    "long_needles": functools.partial(needles.row, needles.LONG),
    "midtrain": midtrain_row,
    "sft": sft_row,
    "sums": sums_row,
    "preferences": preference_row,
    "decoys": decoy_row,
    "foreign": foreign_row,
}


def source_hash() -> str:
    """sha256 over the package's own source: another generator is another data set."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
