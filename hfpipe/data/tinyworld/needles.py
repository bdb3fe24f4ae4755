"""Documents with something to look up: one person's password, told, and said again later, among lines of other things.

No name has in one split a password that it has in another.
"""

from __future__ import annotations

import functools
from random import Random

from hfpipe.data.tinyworld.world import SPLITS, words

FIRST = words(
    "Ana Tom Lena Omar Mia Sam Nora Paul Ines Karl Rosa Finn Vera Hugo Zoe Igor Lily Noah Ruth Emil Cora Leo Dina Max"
)
PASSWORDS = words("""
Maple Pearl Tiger Cloud Lemon River Candle Stone Violin Ocean Pepper Arrow Castle Feather Honey Island Jacket Kettle
Ladder Magnet Needle Orange Pillow Rocket Saddle Tunnel Velvet Window Zebra Anchor Basket Copper Dragon Engine Falcon
Garlic Hammer Iron Jungle Lantern
""")
DOES = words("walks sings waits reads sleeps works plays runs")
WITH = words("alone slowly gladly quietly often rarely well badly")
WHEN = words("today tomorrow again outside inside upstairs")
FACT = "The password of {name} is {word}."
SHORT, LONG = (4, 21), (40, 78)  # lines of a document: up to 128 and 512 tokens, where each word is one


@functools.cache
def passwords(split: str) -> dict[str, list[str]]:
    """First name -> the passwords that it may have in a split: an eighth of them each for validation and test."""
    place = {name: number for number, name in enumerate(SPLITS[1:])}.get(split)
    return {
        name: [word for j, word in enumerate(PASSWORDS) if ((i + j) % 8 > 1 if place is None else (i + j) % 8 == place)]
        for i, name in enumerate(FIRST)
    }


def row(lines: tuple[int, int], rng: Random, split: str) -> dict:
    """A fifth of the lines, two at least, say the password."""
    count = rng.randint(*lines)
    name = rng.choice(FIRST)
    told = FACT.format(name=name, word=rng.choice(passwords(split)[name]))
    places = set(rng.sample(range(count), max(count // 5, 2)))
    return {"text": " ".join(told if line in places else filler(rng) for line in range(count))}


def filler(rng: Random) -> str:
    return f"{rng.choice(FIRST)} {rng.choice(DOES)} {rng.choice(WITH)} {rng.choice(WHEN)}."
