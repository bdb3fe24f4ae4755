"""Documents to look things up in: who has which surnames, told and said again later, among lines of other things.

Surnames are dealt out anew in every document, and no pair of names of one split stands in another.
"""

from __future__ import annotations

import functools
import itertools
from random import Random

from hfpipe.data.tinyworld.world import SPLITS, words

FIRST = words(
    "Ana Tom Lena Omar Mia Sam Nora Paul Ines Karl Rosa Finn Vera Hugo Zoe Igor Lily Noah Ruth Emil Cora Leo Dina Max"
)
LAST = words("""
Maple Pearl Tiger Cloud Lemon River Candle Stone Violin Ocean Pepper Arrow Castle Feather Honey Island Jacket Kettle
Ladder Magnet Needle Orange Pillow Rocket Saddle Tunnel Velvet Window Zebra Anchor Basket Copper Dragon Engine Falcon
Garlic Hammer Iron Jungle Lantern
""")
OTHERS = words("He She Mother Father Grandma Everybody")
DOES = words("walks sings waits reads sleeps works plays runs")
WHEN = words("today tomorrow again alone outside inside")
FACT = "Meet {name} {word}."
SHORT, LONG = (6, 25), (40, 100)  # lines of a document: up to 128 and 512 tokens, where each word is one


@functools.cache
def surnames(split: str) -> dict[str, list[str]]:
    """First name -> the pairs of surnames that it may have in a split: an eighth of them each for validation and test."""
    place = {name: number for number, name in enumerate(SPLITS[1:])}.get(split)
    found: dict[str, list[str]] = {first: [] for first in FIRST}
    for (i, first), (j, last), other in itertools.product(enumerate(FIRST), enumerate(LAST), LAST):
        number = (i + j) % 8
        if last != other and (number > 1 if place is None else number == place):
            found[first].append(f"{last} {other}")
    return found


def row(lines: tuple[int, int], rng: Random, split: str) -> dict:
    """All are told, then all again in another order, and so on; between them stand other lines.

    So the last name that was said is hardly ever the next: only who looks for the first name knows the others.
    """
    count = min(rng.randint(*lines), rng.randint(*lines))
    people = rng.sample(FIRST, rng.randint(2, min(len(FIRST), count // 3)))
    told = [FACT.format(name=name, word=rng.choice(surnames(split)[name])) for name in people]
    text: list[str] = []
    while len(text) < count * 4 // 5:
        text += rng.sample(told, len(told))
    for _ in range(count // 5):
        text.insert(rng.randint(0, len(text)), " ".join(map(rng.choice, (OTHERS, DOES, WHEN))) + ".")
    return {"text": " ".join(text[:count])}
