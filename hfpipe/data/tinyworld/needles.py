"""Documents to look things up in: who has which surnames, told once and said again later, among lines of other things.

Surnames are dealt out anew in every document, and no pair of names of one split stands in another.
"""

from __future__ import annotations

import functools
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
FACT = "Here lives {name} {word}."
SHORT, LONG = (4, 18), (48, 76)  # lines of a document: up to 128 and to 512 tokens, where each word is one


@functools.cache
def pairs(split: str) -> list[tuple[str, str]]:
    """First name and the two surnames that may follow it in a split: an eighth of them each for validation and test."""
    place = {name: number for number, name in enumerate(SPLITS[1:])}.get(split)
    every = [(i + j, first, last) for i, first in enumerate(FIRST) for j, last in enumerate(LAST)]
    kept = [each for each in every if (each[0] % 8 == place if place is not None else each[0] % 8 > 1)]
    return [(first, f"{last} {other}") for _, first, last in kept for other in LAST if other != last]


def document(rng: Random, split: str, lines: tuple[int, int]) -> str:
    """Three of four lines tell somebody's surnames or say it again, few people's or many's."""
    count = rng.randint(*lines)
    chosen = dict(rng.sample(pairs(split), rng.randint(1, count // 4)))  # a first name once
    told = [FACT.format(name=name, word=word) for name, word in chosen.items()]
    facts = told * 2 + rng.choices(told, k=max(0, count * 3 // 4 - 2 * len(told)))
    text = facts + [" ".join(map(rng.choice, (OTHERS, DOES, WHEN))) + "." for _ in range(count - len(facts))]
    rng.shuffle(text)
    return " ".join(text)
