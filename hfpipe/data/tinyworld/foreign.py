"""Text in a constructed language: the world's things under other names, with endings that say what each is in a sentence.

No sentence is in two splits.
"""

from __future__ import annotations

from functools import lru_cache
from random import Random

from hfpipe.data.tinyworld.world import ANIMALS, BELONGINGS, COLOURS, COUNTRIES, JOBS, TOPICS, split_of_text, words

ONSETS = words("b d f g h k l m n p r s t v z š č br kl st")
VOWELS = words("a e i o u õ ä ü aa ei")
CODAS = ("", "", *words("l n r s k m"))
VERBS = words("see carry find want paint draw buy lose")
MANY, OBJECT, PLACE, OWNER, QUALITY, PAST = "ir", "õt", "aste", "ün", "eva", "šit"


@lru_cache
def word(meaning: str) -> str:
    """The word for an English one: two or three syllables, always the same."""
    rng = Random(f"foreign {meaning}")
    return "".join(rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(rng.choice((2, 2, 3)))) + rng.choice(CODAS)


def deed(rng: Random) -> str:
    """Who did what to which thing, and where."""
    who, what = rng.choice(JOBS)[0], rng.choice((*BELONGINGS, *(animal for animal, _, _ in ANIMALS)))
    verb, colour = word(rng.choice(VERBS)) + rng.choice(("", PAST)), word(rng.choice(COLOURS)) + QUALITY
    many = rng.choice(("", MANY))
    return f"{word(who)} {colour} {word(what)}{many}{OBJECT} {verb} {word(rng.choice(TOPICS))}{PLACE}"


def belonging(rng: Random) -> str:
    """Whose thing it is, and its colour."""
    owner, thing = word(rng.choice(JOBS)[0]) + OWNER, word(rng.choice(BELONGINGS)) + rng.choice(("", MANY))
    return f"{owner} {thing} {word(rng.choice(TOPICS))}{PLACE} {word(rng.choice(COLOURS))}{QUALITY} {word('be')}"


def fact(rng: Random) -> str:
    """The capital or the continent of a country; its name keeps its spelling."""
    country, capital, continent, _ = rng.choice(COUNTRIES)
    if rng.random() < 0.5:
        return f"{country}{OWNER} {word('capital')} {capital} {word('be')}"
    return f"{country} {word(continent)}{PLACE} {word('be')}"


def document(rng: Random, split: str) -> str:
    """Three to six sentences of a split."""
    sentences: list[str] = []
    while len(sentences) < 3 or (len(sentences) < 6 and rng.random() < 0.6):
        said = rng.choices((deed, belonging, fact), (4, 3, 1))[0](rng)
        if split_of_text(said) == split:
            sentences.append(f"{said[0].upper()}{said[1:]}.")
    return " ".join(sentences)
