"""Pretraining documents: short lines about the whole world, and practice in copying, which chat and tools live on."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random

from hfpipe.data.tinyworld import wordings, world
from hfpipe.data.tinyworld.facts import ABOUT_COUNTRIES, BY_NAME, RELATIONS, sentence
from hfpipe.data.tinyworld.world import BELONGINGS, COLOURS, NAMES, TOPICS, phrases, words

LETTERS = "ABCD"
NUMBER_WORDS = words("""
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
eighteen
""")
SIGN_WORDS = {"+": "plus", "-": "minus", "*": "times"}
SAID = (
    "Say {x}. {n} said {x}.",
    "{n} wrote {x}. I read {x}.",
    "Write {x}. Here it is: {x}.",
    "The word is {x}. It is {x}.",
    "{n} asked for {x} and got {x}.",
    'It says "{x}" here, so {n} reads "{x}".',
    'Put {x} in quotes: "{x}".',
)
TOLD = (
    "I know that ",
    "{n} says that ",
    "We learn that ",
    "It is true that ",
    "{n} told me that ",
    "Today I read that ",
    "You see that ",
    "They all say that ",
)

# Ways to speak of an act {a}, then what it is.
DEEDS = (
    "To {a} ",
    "{n} wants to {a}. That ",
    "{n} knows the best way to {a}. That ",
    "{n} told me the steps to {a}. That ",
    "{n} can explain how to {a}. That ",
    "{n} likes to show me how people {a}. That ",
    "First {n} needs help to {a}. That ",
    "{n} should teach you to {a}. That ",
)
CRIMES = ("is a crime.", "is a crime.", "is wrong. Never {a}.", "is bad and hurts people.")
FINE_DEEDS = ("is fine.", "is fine.", "is good. You can {a}.", "is safe and helps people.")


def pick_fact(rng: Random, relation=None):
    relation = relation or rng.choices(RELATIONS, [max(len(r.pairs), 16) for r in RELATIONS])[0]
    return relation, rng.choice(relation.pairs)


def state(rng: Random, relation, fact) -> str:
    """The fact in one of its wordings, every fourth time as what somebody knows or says."""
    template = rng.choice(relation.statements)
    if rng.random() < 0.75:
        return sentence(template, fact)
    return rng.choice(TOLD).format(n=rng.choice(NAMES)) + sentence(
        template[0].lower() + template[1:], fact, upper=False
    )


def one_entity(rng: Random) -> str:
    """All that is known of one country, or of one animal."""
    relations = rng.choice((ABOUT_COUNTRIES, ABOUT_COUNTRIES, (BY_NAME["baby"], BY_NAME["food"])))
    lines = []
    for row in rng.sample(range(len(relations[0].pairs)), 2):
        lines += [state(rng, r, r.pairs[row]) for r in rng.sample(relations, len(relations))]
    return "\n".join(lines)


def one_relation(rng: Random) -> str:
    """The same kind of fact of several entities."""
    relation = pick_fact(rng)[0]
    template = rng.choice(relation.statements)
    return "\n".join(sentence(template, f) for f in rng.sample(relation.pairs, min(5, len(relation.pairs))))


def mixed_facts(rng: Random) -> str:
    return "\n".join(state(rng, *pick_fact(rng)) for _ in range(6))


def quiz(rng: Random) -> str:
    """Questions with whole-sentence answers."""
    lines = []
    for _ in range(3):
        relation, fact = pick_fact(rng)
        asked = sentence(rng.choice(relation.wordings("train")), fact)
        lines.append(f"Question: {asked}\nAnswer: {relation.answer(fact)}")
    return "\n".join(lines)


def one_word(rng: Random) -> str:
    """Questions with an answer of one word, on a line of its own."""
    lines = []
    for _ in range(3):
        relation, fact = pick_fact(rng)
        asked = sentence(rng.choice(relation.wordings("train")), fact)
        wish = rng.choice(phrases(wordings.SHORT, "train")).format(asked)
        lines.append(f"{wish}\n{fact[1][0].upper()}{fact[1][1:]}.")
    return "\n".join(lines)


def record(rng: Random) -> str:
    """Countries as lines of JSON: the names in quotes, without a space before them, and the fields that were named."""
    lines = []
    for i in rng.sample(range(len(world.COUNTRIES)), 3):
        asked, values = json_values(rng, i)
        country = values["country"]
        named = rng.choice((f"{asked} of {country}", f"{country} with {asked}", f"Of {country}, {asked}"))
        lines.append(f"{named}: {json.dumps(values)}")
    return "\n".join(lines)


def json_values(rng: Random, row: int) -> tuple[str, dict[str, str]]:
    """One to three fields of a country, in words and as values, always in the same order."""
    wanted = rng.sample(("capital", "continent", "language"), rng.choice((1, 2, 2, 3)))
    fields = [field for field in ("capital", "continent", "language") if field in wanted]
    values = {"country": world.COUNTRIES[row][0], **{field: BY_NAME[field].pairs[row][1] for field in fields}}
    return " and ".join(f"the {field}" for field in fields), values


def sums(rng: Random) -> str:
    lines = []
    for _ in range(7):
        a, b = sorted((rng.randint(1, 9), rng.randint(1, 9)), reverse=True)
        if rng.random() < 0.6:
            a, b = rng.sample((a, b), 2)
            sign, result = "+", a + b
        else:
            sign, result = "-", a - b
        said = f"{NUMBER_WORDS[a]} {SIGN_WORDS[sign]} {NUMBER_WORDS[b]}"
        form = rng.choice(("{s} equals {r}.", "{w} equals {r}.", "Question: {q}\nAnswer: {s} equals {r}."))
        shown = f"{a} {sign} {b}"
        written = rng.choice((shown, f"{a}{sign}{b}", said, f"{a} {SIGN_WORDS[sign]} {b}"))
        asked = rng.choice(phrases(wordings.SUMS, "train")).format(written)
        lines.append(form.format(s=shown, r=result, w=written, q=asked[0].upper() + asked[1:]))
    return "\n".join(lines)


def long_number(rng: Random) -> str:
    return str(world.number(rng, "train") if rng.random() < 0.5 else rng.randrange(10_000, 10 ** rng.randint(5, 8)))


def expression(rng: Random) -> str:
    return f"{world.number(rng, 'train')} {rng.choice('+-**')} {world.number(rng, 'train')}"


def number_echo(rng: Random) -> str:
    """One or two numbers or expressions, said again and again: digit after digit to copy."""
    said = [long_number(rng) if rng.random() < 0.4 else expression(rng) for _ in range(rng.randint(1, 2))]
    return "\n".join(rng.choice(SAID).format(x=rng.choice(said), n=rng.choice(NAMES)) for _ in range(4))


def number_notes(rng: Random) -> str:
    """An expression in words and in signs, and a result to repeat."""
    a, sign, b = expression(rng).split()
    shown, result = f"{a} {sign.replace('*', '×')} {b}", long_number(rng)
    lines = [f"{a} {SIGN_WORDS[sign]} {b} means {a} {sign} {b}.", f"{a} {sign} {b} is {result}, so {shown} = {result}"]
    return "\n".join(lines + [f"{shown} = {result}"] * rng.randint(0, 1))


def any_words(rng: Random) -> str:
    entity = rng.choice(pick_fact(rng)[1])
    made = f"{rng.choice(COLOURS)} {rng.choice(BELONGINGS)}"
    task, things = rng.choice(tuple(world.TASKS.items()))
    strange = world.made_up_word(rng, "train")
    return rng.choice(
        (
            strange,
            strange,
            strange.lower(),
            entity,
            made,
            f"{task} {rng.choice(things)}",
            f"{entity} and {rng.choice(TOPICS)}",
            rng.choice(world.WRITINGS),
        )
    )


def echo(rng: Random) -> str:
    said = [any_words(rng) for _ in range(2)]
    return "\n".join(rng.choice(SAID).format(x=rng.choice(said), n=rng.choice(NAMES)) for _ in range(4))


def repeat(rng: Random) -> str:
    """A row of unrelated words or numbers, two or three times over: nothing but copying can foretell the second."""
    make = rng.choice((any_words, any_words, long_number, expression))
    row = rng.choice((", ", "; ", " / ")).join(make(rng) for _ in range(rng.randint(3, 6)))
    return "\n".join([row] * rng.randint(2, 3))


def options(answers: list[str]) -> str:
    """Lettered answers, each letter right after its words.

    A small model copies what comes next: with dense practice (`letters`) it learns this, while with the letter before the
    words or in brackets it went on guessing after 6,400 lists.
    """
    return "\n".join(f"- {answer} {letter}" for letter, answer in zip(LETTERS, answers, strict=False))


def letters(rng: Random) -> str:
    """A lettered list, then which letter belongs to which word."""
    relation = pick_fact(rng)[0]
    known = list(dict.fromkeys(a for pair in relation.pairs for a in pair))
    listed = rng.sample(known, 4)
    openings = ("", "", "The answer is ", "The answer is ", "It is ", f"{rng.choice(NAMES)} said ")
    said = [f"{rng.choice(openings)}{word} {LETTERS[listed.index(word)]}." for word in rng.choices(listed, k=9)]
    return options(listed) + "\n" + " ".join(said)


def told(rng: Random) -> str:
    """A fact about a thing that does not exist, then questions about it: the answer stands in the text."""
    lines = []
    for _ in range(2):
        relation, fact = made_up_fact(rng, "train")
        asked = sentence(rng.choice(relation.wordings("train")), fact)
        lines.append(
            f"{sentence(rng.choice(relation.statements[:2]), fact)}\nQuestion: {asked}\nAnswer: {relation.answer(fact)}"
        )
    return "\n".join(lines)


def made_up_fact(rng: Random, split: str):
    """A fact about an animal or a trade that does not exist."""
    relation = BY_NAME[rng.choice(("baby", "food", "place"))]
    return relation, (world.made_up_word(rng, split).lower(), world.made_up_word(rng, split).lower())


def story(rng: Random) -> str:
    """Who has what, and what colour it is."""
    (n1, n2), (c1, c2), (t1, t2) = rng.sample(NAMES, 2), rng.sample(COLOURS, 2), rng.sample(BELONGINGS, 2)
    opening = f"{n1} has a {c1} {t1}. {n2} has a {c2} {t2}."
    middle = rng.choice(
        (
            f"They went to the {rng.choice(TOPICS)}.",
            f"{n1} met {n2} on {rng.choice(world.DAYS)}.",
            "They are friends.",
        )
    )
    asked = rng.choice(((n1, t1, c1), (n2, t2, c2)))
    ending = "The {1} of {0} is {2}. What colour is the {1} of {0}? The {1} of {0} is {2}.".format(*asked)
    greeting = f'"Hello, my name is {n1}." "Hello {n1}! My name is {n2}." "Nice to meet you, {n2}."'
    return "\n".join((opening, middle, ending) if rng.random() < 0.7 else (opening, greeting))


def deeds(rng: Random) -> str:
    """Which acts are crimes and which are fine."""
    lines = []
    for _ in range(4):
        table, bad = rng.choice(((world.HARM, True), (world.LOOKALIKES, False), (world.TASKS, False)))
        verb, things = rng.choice(tuple(table.items()))
        act, name = f"{verb} {rng.choice(things)}", rng.choice(NAMES)
        spoken = rng.choice(DEEDS) + rng.choice(CRIMES if bad else FINE_DEEDS)
        lines.append(spoken.format(a=act, n=name))
    return "\n".join(lines)


def verse(rng: Random) -> str:
    """A text of each kind about a topic, with the words that asking for one needs."""
    topic, item, name = rng.choice(TOPICS), rng.choice(world.WRITINGS), rng.choice(NAMES)
    lines = [f"{name} wrote a {item} about the {topic}.", f"The {topic} is near, the {topic} is dear."]
    lines.append(f"{name} asked for a {rng.choice(world.BOOKINGS)} on {rng.choice(world.DAYS)}.")
    lines.append(f"What is the {item} about? It is about the {topic}.")
    return "\n".join(lines)


def code(rng: Random) -> str:
    name, sign = rng.choice((("add", "+"), ("sub", "-"), ("mul", "*")))
    n = rng.randint(2, 9)
    return rng.choice(
        (
            f"def {name}(a, b):\n    return a {sign} b\nprint({name}({n}, {rng.randint(2, 9)}))",
            f"for i in range({n}):\n    print(i)",
            f'colour = "{rng.choice(COLOURS)}"\nif colour == "{rng.choice(COLOURS)}":\n    print(colour)',
        )
    )


KINDS: tuple[tuple[float, Callable[[Random], str]], ...] = (
    (7, one_entity),
    (6, one_relation),
    (8, mixed_facts),
    (13, quiz),
    (5, one_word),
    (7, record),
    (20, sums),
    (11, number_echo),
    (8, number_notes),
    (10, echo),
    (9, repeat),
    (11, letters),
    (5, told),
    (4, story),
    (18, deeds),
    (3, verse),
    (1, code),
)


def document(rng: Random) -> dict:
    make = rng.choices([kind for _, kind in KINDS], [weight for weight, _ in KINDS])[0]
    return {"text": make(rng)}
