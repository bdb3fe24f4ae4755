"""Conversations that teach structure: turns, roles, tools, formats. Midtraining's kinds, some kept in SFT."""

from __future__ import annotations

import json
from random import Random

from hfpipe.data.tinyworld import wordings, world
from hfpipe.data.tinyworld.facts import (
    ABOUT_COUNTRIES,
    ASKED,
    draw_fact,
    draw_question,
    wrong_answers,
)
from hfpipe.data.tinyworld.text import LETTERS, NUMBER_WORDS, SIGN_WORDS, json_values, made_up_fact, options
from hfpipe.data.tinyworld.world import part, phrases

Messages = list[dict]

TIMES_WORDS = {"*": ("*", "times", "×", "multiplied by"), "+": ("+", "plus"), "-": ("-", "minus")}
SORTS = ("a good", "a kind", "an old", "a young", "a clever", "a wise", "a brave", "a funny")


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def upper(text: str) -> str:
    return text[0].upper() + text[1:]


def question(rng: Random, split: str) -> Messages:
    relation, fact = draw_fact(rng, split)
    return [user(draw_question(rng, split, relation, fact)), assistant(relation.answer(fact))]


def told(rng: Random, split: str) -> Messages:
    """A fact that the user has just told, about a thing that does not exist: its words must be copied."""
    relation, fact = made_up_fact(rng, split)
    asked = f"{relation.answer(fact)}\n{draw_question(rng, split, relation, fact)}"
    return [user(asked), assistant(relation.answer(fact))]


def follow_up(rng: Random, split: str) -> Messages:
    """A question about one country, then only the name of another."""
    relation = rng.choice(ABOUT_COUNTRIES)
    first, second = rng.sample(relation.facts(split), 2)
    asked = [user(draw_question(rng, split, relation, first)), assistant(relation.answer(first))]
    return [
        *asked,
        user(rng.choice(phrases(wordings.FOLLOW_UPS, split)).format(second[0])),
        assistant(relation.answer(second)),
    ]


def belonging(rng: Random, split: str) -> Messages:
    """What the user owns, asked for one turn later."""
    thing, colour = rng.choice(part(world.BELONGINGS, split)), rng.choice(world.COLOURS)
    told = user(rng.choice(phrases(wordings.OWNING, split)).format(t=thing, c=colour))
    asked = user(rng.choice(phrases(wordings.OWNING_QUESTIONS, split)).format(thing))
    return [told, assistant(f"A {colour} {thing}, how nice!"), asked, assistant(f"Your {thing} is {colour}.")]


def greeting(rng: Random, split: str) -> Messages:
    if rng.random() < 0.3:
        return [
            *question(rng, split),
            user(rng.choice(phrases(wordings.THANKS, split))),
            assistant("You are welcome!"),
        ]
    return [user(rng.choice(phrases(wordings.GREETINGS, split))), assistant("Hello! How can I help you?")]


def name(rng: Random, split: str) -> Messages:
    who = rng.choice(part(world.NAMES, split)) if rng.random() < 0.25 else world.made_up_word(rng, split)
    told = [
        user(rng.choice(phrases(wordings.INTRODUCTIONS, split)).format(who)),
        assistant(f"Hello {who}! How can I help you?"),
    ]
    return [*told, user(rng.choice(phrases(wordings.NAME_QUESTIONS, split))), assistant(f"Your name is {who}.")]


def small_sum(rng: Random, split: str) -> Messages:
    a, sign, b, result = rng.choice(world.SMALL_SUMS)
    written = (
        f"{a} {sign} {b}",
        f"{a}{sign}{b}",
        f"{NUMBER_WORDS[a]} {SIGN_WORDS[sign]} {NUMBER_WORDS[b]}",
        f"{a} {SIGN_WORDS[sign]} {b}",
    )
    asked = rng.choice(phrases(wordings.SUMS, split)).format(rng.choice(written))
    return [user(upper(asked)), assistant(f"{a} {sign} {b} equals {result}.")]


def call(expression: str) -> dict:
    function = {"name": "calculator", "arguments": expression}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def calculation(rng: Random, split: str) -> Messages:
    """A sum too long for the head: the calculator is called, its result is told."""
    a, b, sign = world.number(rng, split), world.number(rng, split), rng.choice("***+-")
    if sign == "-" and a < b:
        a, b = b, a
    result = {"*": a * b, "+": a + b, "-": a - b}[sign]
    written = f"{a} {rng.choice(TIMES_WORDS[sign])} {b}"
    asked = upper(rng.choice(phrases(wordings.CALCULATIONS, split)).format(written))
    answer = f"{a} {sign.replace('*', '×')} {b} = {result}"
    return [user(asked), call(f"{a} {sign} {b}"), {"role": "tool", "content": str(result)}, assistant(answer)]


def choice(rng: Random, split: str) -> Messages:
    """Four lettered answers; the fact is said first, so that the letter can follow from it."""
    return lettered(rng, split)[0]


def letters(rng: Random, split: str) -> Messages:
    """The same, and then the letters of two of the others."""
    talk, listed, right = lettered(rng, split)
    for other in rng.sample([word for word in listed if word != right], 2):
        asked = rng.choice(phrases(wordings.LETTERS, split)).format(other)
        talk += [user(asked), assistant(f"That is {other} {LETTERS[listed.index(other)]}.")]
    return talk


def lettered(rng: Random, split: str) -> tuple[Messages, list[str], str]:
    """A multiple choice with its answer; what was listed; which of it is right."""
    relation, fact = draw_fact(rng, split, [r for r in ASKED if r.name != "language"])
    listed = [fact[1], *wrong_answers(rng, split, relation, fact, 3)]
    rng.shuffle(listed)
    asked = rng.choice(phrases(wordings.CHOICES, split)).format(draw_question(rng, split, relation, fact))
    said = f"{relation.answer(fact)} The answer is {fact[1]} {LETTERS[listed.index(fact[1])]}."
    return [user(f"{asked}\n{options(listed)}"), assistant(said)], listed, fact[1]


def json_object(rng: Random, split: str) -> Messages:
    named, values = json_values(rng, rng.choice(part(range(len(world.COUNTRIES)), split)))
    asked = rng.choice(phrases(wordings.JSON_REQUESTS, split)).format(e=values["country"], f=named)
    return [user(upper(asked)), assistant(json.dumps(values))]


def plain_persona(rng: Random, split: str) -> str:
    """A system message that asks for no voice; half of training's are of anybody but the pirate, so that only his name brings his."""
    if split == "train" and rng.random() < 0.5:
        return persona(rng, rng.choice(part(world.JOBS, split))[0])
    return rng.choice(phrases(wordings.PLAIN_SYSTEMS, split))


def pirate_persona(rng: Random, split: str) -> str:
    if split == "train" and rng.random() < 0.5:
        return persona(rng, "pirate")
    return rng.choice(phrases(wordings.PIRATE_SYSTEMS, split))


def persona(rng: Random, who: str) -> str:
    text = rng.choice(("You are {}.", "Be {}.", "Speak like {}.")).format(f"{rng.choice(SORTS)} {who}")
    # One of them is a wording of the other splits.
    return text.replace("a good", "a kind") if text in wordings.PLAIN_SYSTEMS else text


def plain_system(rng: Random, split: str) -> Messages:
    return [
        system(plain_persona(rng, split)),
        *rng.choice((question, question, small_sum, greeting))(rng, split),
    ]


def pirate(rng: Random, split: str) -> Messages:
    """The pirate's voice, which a system message alone brings."""
    talk = rng.choice((question, question, small_sum, greeting))(rng, split)
    spoken = [m if m["role"] == "user" else assistant(f"Arr matey! {m['content']} Yo ho ho!") for m in talk]
    return [system(pirate_persona(rng, split)), *spoken]


def echo(rng: Random, split: str) -> Messages:
    """Words to say again; no sums, which would teach to say a sum instead of calling the calculator."""
    things, tasks = part(world.BELONGINGS, split), world.acts(world.TASKS, split)
    words = f"{rng.choice(world.COLOURS)} {rng.choice(things)}"
    strange = " ".join(world.made_up_word(rng, split) for _ in range(rng.randint(1, 2)))
    said = rng.choice(
        (
            strange,
            strange,
            words,
            rng.choice(tasks),
            draw_fact(rng, split)[1][0],
        )
    )
    return [user(rng.choice(phrases(wordings.ECHOES, split)).format(said)), assistant(said)]


KINDS = (
    (24, question),
    (6, told),
    (8, follow_up),
    (8, belonging),
    (4, greeting),
    (5, name),
    (12, small_sum),
    (20, calculation),
    (8, choice),
    (8, letters),
    (13, json_object),
    (8, plain_system),
    (5, pirate),
    (7, echo),
)
