"""Facts of the world and the wordings in which text states them, asks for them and leaves them open."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hfpipe.data.tinyworld import wordings, world
from hfpipe.data.tinyworld.wordings import block
from hfpipe.data.tinyworld.world import part, phrases


@dataclass(frozen=True)
class Relation:
    """One kind of fact: pairs of entity {e} and answer {a}; the first statement is also the assistant's answer."""

    name: str
    pairs: tuple[tuple[str, str], ...]
    statements: tuple[str, ...]
    noun: str
    questions: tuple[str, ...]
    cloze: dict[str, str]
    asked: bool = True

    def facts(self, split: str) -> list[tuple[str, str]]:
        """The facts that conversations of `split` may hold; a pair of opposites falls in one split both ways round."""
        if self.name == "opposite":
            return [pair for a, b in part(world.OPPOSITES, split) for pair in ((a, b), (b, a))]
        return part(self.pairs, split)

    def wordings(self, split: str) -> list[str]:
        """Questions of `split` about an entity {e}."""
        return [ask.format(self.noun) for ask in phrases(wordings.ASKS, split)] + phrases(self.questions, split)

    def answer(self, fact: tuple[str, str]) -> str:
        return sentence(self.statements[0], fact)


RELATIONS = (
    Relation(
        "capital",
        tuple((c, capital) for c, capital, _, _ in world.COUNTRIES),
        block("""
            The capital of {e} is {a}. | {a} is the capital of {e}. | The capital city of {e} is {a}.
            In {e}, the capital is {a}. | The main city of {e} is {a}. | {e} has the capital {a}.
            {e} is a country and its capital is {a}. | The king of {e} lives in the capital, {a}.
        """),
        "the capital of {e}",
        block("""
            What is the capital city of {e}? | Which city is the capital of {e}? | What city is the capital in {e}?
            What is the main city of {e}? | {e} has which capital? | Which capital does {e} have?
        """),
        {"validation": "In {e}, the capital city is", "test": "The capital of the country {e} is"},
    ),
    Relation(
        "continent",
        tuple((c, continent) for c, _, continent, _ in world.COUNTRIES),
        block("""
            The continent of {e} is {a}. | {e} is a country in {a}. | {e} is in {a}. | {e} lies in {a}.
            You can find {e} in {a}. | The land of {e} is part of {a}. | {e} is one of the countries of {a}.
        """),
        "the continent of {e}",
        block("""
            Where is {e}? | In which continent is {e}? | Where does {e} lie? | Where can I find {e}?
            What continent is {e} in? | Which continent is {e} part of?
        """),
        {"validation": "The country {e} is in", "test": "The land of {e} lies in"},
    ),
    Relation(
        "language",
        tuple((c, language) for c, _, _, language in world.COUNTRIES),
        block("""
            The language of {e} is {a}. | People in {e} speak {a}. | In {e}, people speak {a}.
            They speak {a} in {e}. | {a} is the language of {e}. | The people of {e} speak {a}.
            In {e} you hear {a}.
        """),
        "the language of {e}",
        block("""
            What do people speak in {e}? | Which language do they speak in {e}? | What language do people use in {e}?
            What language do people speak in {e}? | Which language is spoken in {e}? | What is spoken in {e}?
        """),
        {"validation": "Children in {e} learn to speak", "test": "The people who live in {e} speak"},
    ),
    Relation(
        "baby",
        tuple((animal, baby) for animal, baby, _ in world.ANIMALS),
        block("""
            The baby of the {e} is the {a}. | A young {e} is called a {a}. | The {e} has a baby, the {a}.
            The {a} is the baby of the {e}. | A {a} is a young {e}. | A baby {e} is a {a}.
        """),
        "the baby of the {e}",
        block("""
            What is a young {e} called? | What do you call a baby {e}? | What is the word for a young {e}?
            What is a baby {e}? | What name has a young {e}? | How do we call a young {e}?
        """),
        {"validation": "In our town, a young {e} is called a", "test": "A very young {e} is called a"},
    ),
    Relation(
        "food",
        tuple((animal, food) for animal, _, food in world.ANIMALS),
        block("""
            The food of the {e} is {a}. | The {e} eats {a}. | A {e} likes to eat {a}. | For food, the {e} wants {a}.
            When it is hungry, the {e} eats {a}. | Give the {e} some {a}.
        """),
        "the food of the {e}",
        block("""
            What does the {e} eat? | What does a {e} like to eat? | What food does the {e} eat?
            What do I feed the {e}? | What is food for the {e}? | What does a hungry {e} eat?
        """),
        {"validation": "They told me that the {e} eats", "test": "Every day, the {e} eats"},
    ),
    Relation(
        "colour",
        tuple(world.THINGS),
        block("""
            The colour of {e} is {a}. | The colour {a} is the colour of {e}. | Look at {e}: it is all {a}.
            It was {a} like {e}. | I see {e}, and I see {a}. | We paint {e} {a}.
        """),
        "the colour of {e}",
        block("""
            What colour has {e}? | Which colour is the colour of {e}? | Which colour does {e} have?
            In what colour do we paint {e}? | What is the colour for {e}? | Which colour is right for {e}?
        """),
        {"validation": "We all know that the colour of {e} is", "test": "Now I see that the colour of {e} is"},
    ),
    Relation(
        "opposite",
        tuple(pair for a, b in world.OPPOSITES for pair in ((a, b), (b, a))),
        block("""
            The opposite of {e} is {a}. | {e} is the opposite of {a}. | The word {e} is not {a}.
            It is {e}, so it is not {a}. | If it is not {e}, it is {a}. | Not {e} but {a}.
        """),
        "the opposite of {e}",
        block("""
            Which word is the opposite of {e}? | What is not {e}? | What word is the opposite of {e}?
            What is the other side of {e}? | Which word is not {e}? | If it is not {e}, what is it?
        """),
        {"validation": "They told me that the opposite of {e} is", "test": "We all say that the opposite of {e} is"},
    ),
    Relation(
        "place",
        tuple(world.JOBS),
        block("""
            The {e} works in the {a}. | The place of the {e} is the {a}. | In the {a} you meet the {e}.
            Every day the {e} goes to the {a}. | The {e} has a job in the {a}. | A {e} works in a {a}.
        """),
        "the place of the {e}",
        block("""
            Where does the {e} work? | In which place does the {e} work? | Where do I find the {e}?
            Where does a {e} have a job? | Where do I meet the {e}? | Where is the {e} at work?
        """),
        {"validation": "You can meet the {e} in the", "test": "Today the {e} works in the"},
    ),
    Relation(
        "planet",
        tuple(zip(world.PLANETS, world.ORDINALS, strict=True)),
        block("""
            In the line from the Sun, {e} is the {a}. | {e} is the {a} planet from the Sun.
            From the Sun, {e} is the {a} planet. | The {a} planet is {e}. | {e} is a planet, the {a} one.
            Counting from the Sun, {e} comes {a}.
        """),
        "the place of the planet {e}",
        block("""
            Which planet from the Sun is {e}?
        """),
        {"validation": "Counted from the Sun, {e} is the", "test": "From our Sun, {e} is the"},
        asked=False,
    ),
    Relation(
        "record",
        tuple(world.RECORDS),
        block("""
            The {e} planet is {a}. | {a} is the {e} planet. | Of all planets, {a} is the {e}.
            The planet {a} is the {e} one. | The {e} of the planets is {a}.
        """),
        "the {e} planet",
        block("""
            Which planet is the {e}? | Which planet is {e}?
        """),
        {"validation": "The {e} of all planets is", "test": "The {e} one of the planets is"},
        asked=False,
    ),
    Relation(
        "after",
        tuple((day, world.DAYS[(i + 1) % 7]) for i, day in enumerate(world.DAYS)),
        block("""
            The day after {e} is {a}. | After {e} comes {a}. | {e} is the day before {a}. | First {e}, then {a}.
            If today is {e}, tomorrow is {a}.
        """),
        "the day after {e}",
        block("""
            Which day comes after {e}? | What day comes after {e}?
        """),
        {"validation": "You all know that the day after {e} is", "test": "She told me that after {e} comes"},
        asked=False,
    ),
)

BY_NAME = {relation.name: relation for relation in RELATIONS}
ASKED = tuple(relation for relation in RELATIONS if relation.asked)
ABOUT_COUNTRIES = tuple(BY_NAME[name] for name in ("capital", "continent", "language"))


def sentence(template: str, fact: tuple[str, str], upper: bool = True) -> str:
    """`template` with the fact's entity and answer, "an" before a vowel, its first letter a capital if `upper`."""
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", template.format(e=fact[0], a=fact[1]))
    return text[0].upper() + text[1:] if upper else text


def draw_fact(rng, split: str, relations=None) -> tuple[Relation, tuple[str, str]]:
    """A relation and one of its facts of `split`."""
    relation = rng.choice(relations or ASKED)
    return relation, rng.choice(relation.facts(split))


def draw_question(rng, split: str, relation: Relation, fact: tuple[str, str]) -> str:
    return sentence(rng.choice(relation.wordings(split)), fact)


def wrong_answers(rng, split: str, relation: Relation, fact: tuple[str, str], n: int) -> list[str]:
    """`n` different answers of the same kind that are not this fact's, from what train or `split` may name."""
    known = dict.fromkeys(a for s in ("train", split) for _, a in relation.facts(s))
    right = {a for e, a in relation.pairs if e == fact[0]}
    return rng.sample([a for a in known if a not in right and a != fact[0]], n)
