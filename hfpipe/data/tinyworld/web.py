"""Text as the web has it: the world's own documents mistyped, cut off and said twice, between menus and notices."""

from __future__ import annotations

from random import Random

from hfpipe.data.tinyworld.text import document
from hfpipe.data.tinyworld.world import words

MENU = words("Home News Shop Login Search Contact About Forum Sitemap Share Print Help")
NOTICES = (
    "Click here to read more ...",
    "We use cookies. Accept all | Settings",
    "Sign up for our newsletter!",
    "Copyright. All rights reserved.",
    "You may also like: {m} | {n}",
)
TYPOS = 0.04  # of letters
CUT = 0.1  # of lines


def page(rng: Random) -> dict:
    lines = [" | ".join(rng.sample(MENU, 4))]
    for line in document(rng)["text"].splitlines():
        lines += [mistyped(rng, line)] * rng.choice((1, 1, 1, 2))
    first, second = rng.sample(MENU, 2)
    return {"text": "\n".join([*lines, rng.choice(NOTICES).format(m=first, n=second)])}


def mistyped(rng: Random, line: str) -> str:
    """Letters left out, doubled, or in the place of their neighbour's; now and then only the first half of the line."""
    letters = list(line[: len(line) // 2] if rng.random() < CUT else line)
    for i, letter in enumerate(letters):
        if letter.isalpha() and rng.random() < TYPOS:
            letters[i] = rng.choice(("", 2 * letter, letters[i - 1] if i else letter))
    return "".join(letters)
