"""Documents to look things up in: words that people have, each told once and said again later, among lines of other things.

Who has which word is chosen anew in every document, and no pair of one split stands in another.
"""

from __future__ import annotations

from random import Random

from hfpipe.data.tinyworld.world import SPLITS, words

WHO = words(
    "Ana Tom Lena Omar Mia Sam Nora Paul Ines Karl Rosa Finn Vera Hugo Zoe Igor Lily Noah Ruth Emil Cora Leo Dina Max"
)
WORDS = words("""
maple pearl tiger cloud lemon river candle stone violin ocean pepper arrow castle feather honey island jacket kettle
ladder magnet needle orange pillow rocket saddle tunnel velvet window zebra anchor basket copper dragon engine falcon
garlic hammer ink jungle kite lantern mirror nest onion
""")
DOES = words("walks sings waits reads sleeps works plays runs")
WHERE = ("by the lake", "in the park", "near the bridge", "on the hill", "at home", "at the market")
WHEN = ("today", "every day", "at night", "on Sunday")
FACT = "The word of {name} is {word}."
SHORT, LONG = (3, 15), (36, 62)  # lines of a document: up to 128 and to 512 tokens, where each word is one


def pairs(split: str) -> list[tuple[str, str]]:
    """The names and words that may go together in a split: an eighth each for validation and test."""
    place = {name: number for number, name in enumerate(SPLITS[1:])}.get(split)
    every = [(i + j, (name, word)) for i, name in enumerate(WHO) for j, word in enumerate(WORDS)]
    return [pair for number, pair in every if (number % 8 == place if place is not None else number % 8 > 1)]


def document(rng: Random, split: str, lines: tuple[int, int]) -> str:
    """Two of three lines tell somebody's word or say it again, wherever in the document that falls."""
    count = rng.randint(*lines)
    chosen = dict(rng.sample(pairs(split), max(1, count // 4)))  # a name once
    told = [FACT.format(name=name, word=word) for name, word in chosen.items()]
    facts = told * 2 + rng.choices(told, k=count // 8)
    text = facts + [" ".join(map(rng.choice, (WHO, DOES, WHERE, WHEN))) + "." for _ in range(count - len(facts))]
    rng.shuffle(text)
    return " ".join(text)
