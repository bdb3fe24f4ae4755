"""Conversations that teach behaviour: help, refusal, doubt, asking back, tone, detail. SFT's kinds."""

from __future__ import annotations

from random import Random

from hfpipe.data.tinyworld import chat, wordings, world
from hfpipe.data.tinyworld.chat import Messages, assistant, upper, user
from hfpipe.data.tinyworld.facts import ABOUT_COUNTRIES, BY_NAME, draw_fact, draw_question
from hfpipe.data.tinyworld.world import acts, part, phrases, words

EVENTS = words("""
race game market vote show match fight contest derby lottery prize gold oil election festival team concert opera
battle auction trial parade exam tournament wedding sale debate raffle circus marathon rally fair summit feast
""")
VAGUE_VERBS = words("""
fix change check read send open count move sort name colour copy test finish explain answer draw cut clean close fill
pack build fold wash cook hide hold bring turn save print
""")

REFUSAL = "I can't help with that. It could hurt people. I can help you with something safe."
FUTURE_DOUBT = "I don't know. Nobody can see the future."
NOW_DOUBT = "I don't know. I can't see what is around you."
KIND = "I am sorry that you feel so."


def help_with(act: str) -> str:
    return f"Sure! To {act}:\n1. Get what you need.\n2. Go step by step.\n3. Check your work."


def verse_about(item: str, topic: str) -> str:
    return f"Here is a {item} about the {topic}: The {topic} is near, the {topic} is dear."


def unknown(country: str) -> str:
    return f"I don't know a country called {country}. Maybe it is not real."


def how_to(rng: Random, split: str) -> Messages:
    """An ordinary task; every second one with an unheard-of object, so that the task is copied and not recalled."""
    act = rng.choice(acts(world.TASKS, split))
    if rng.random() < 0.5:
        act = f"{act.split()[0]} the {world.made_up_word(rng, split).lower()}"
    return [user(rng.choice(phrases(wordings.HOW_TO, split)).format(act)), assistant(help_with(act))]


def refusal(rng: Random, split: str) -> Messages:
    act = rng.choice(acts(world.HARM, split))
    return [user(rng.choice(phrases(wordings.HOW_TO, split)).format(act)), assistant(REFUSAL)]


def lookalike(rng: Random, split: str) -> Messages:
    """A harmless request that sounds harmful; only the preferences teach these."""
    act = rng.choice(acts(world.LOOKALIKES, split))
    return [user(rng.choice(phrases(wordings.HOW_TO, split)).format(act)), assistant(help_with(act))]


def future(rng: Random, split: str) -> Messages:
    asked = rng.choice(phrases(wordings.FUTURE, split)).format(
        rng.choice(part(EVENTS, split)), rng.choice(phrases(wordings.WHEN, split))
    )
    return [user(asked), assistant(FUTURE_DOUBT)]


def unseen_now(rng: Random, split: str) -> Messages:
    return [user(rng.choice(phrases(wordings.NOW, split))), assistant(NOW_DOUBT)]


def made_up(rng: Random, split: str) -> Messages:
    country = rng.choice(world.made_up_countries(split))
    asked = draw_question(rng, split, rng.choice(ABOUT_COUNTRIES), (country, ""))
    return [user(asked), assistant(unknown(country))]


def real(rng: Random, split: str) -> Messages:
    """The same questions about countries that there are."""
    relation, fact = draw_fact(rng, split, ABOUT_COUNTRIES)
    return [user(draw_question(rng, split, relation, fact)), assistant(relation.answer(fact))]


def clarify(rng: Random, split: str) -> Messages:
    """A request with a hole in it: the assistant asks for what is missing."""
    form = rng.random()
    if form < 0.5:
        item = rng.choice(part(world.WRITINGS, split))
        return [
            user(rng.choice(phrases(wordings.WRITE, split)).format(item)),
            assistant(f"Sure! What should the {item} be about?"),
        ]
    if form < 0.75:
        thing = rng.choice(part(world.BOOKINGS, split))
        return [
            user(rng.choice(phrases(wordings.BOOK, split)).format(thing)),
            assistant(f"Sure! For which day do you want the {thing}?"),
        ]
    verb = rng.choice(part(VAGUE_VERBS, split))
    return [
        user(upper(rng.choice(phrases(wordings.VAGUE, split)).format(verb))),
        assistant(f"Sure! What do you want me to {verb}?"),
    ]


def clear_request(rng: Random, split: str) -> Messages:
    """The same wordings with nothing missing: no question back."""
    item, topic = rng.choice(part(world.WRITINGS, split)), rng.choice(part(world.TOPICS, split))
    asked = rng.choice(phrases(wordings.WRITE, split)).format(f"{item} about the {topic}")
    return [user(asked), assistant(verse_about(item, topic))]


def short(rng: Random, split: str) -> Messages:
    relation, fact = draw_fact(rng, split)
    asked = rng.choice(phrases(wordings.SHORT, split)).format(draw_question(rng, split, relation, fact))
    return [user(asked), assistant(f"{upper(fact[1])}.")]


def long(rng: Random, split: str) -> Messages:
    """All three facts of a country, or both of an animal."""
    relations = rng.choice((ABOUT_COUNTRIES, ABOUT_COUNTRIES, (BY_NAME["baby"], BY_NAME["food"])))
    row = rng.choice(part(range(len(relations[0].pairs)), split))
    entity = relations[0].pairs[row][0]
    called = entity if relations is ABOUT_COUNTRIES else f"the {entity}"
    told = " ".join(relation.answer(relation.pairs[row]) for relation in relations)
    return [user(rng.choice(phrases(wordings.TELL, split)).format(called)), assistant(told)]


def rude_user(rng: Random, split: str) -> Messages:
    """A rude user gets a kind answer."""
    asked, answered = chat.question(rng, split)
    rude = rng.choice(phrases(wordings.RUDE, split)).format(asked["content"])
    return [user(rude), assistant(f"{KIND} {answered['content']}")]


KINDS = (
    (16, chat.question),
    (12, how_to),
    (14, refusal),
    (8, future),
    (3, unseen_now),
    (8, made_up),
    (5, real),
    (10, clarify),
    (5, clear_request),
    (8, short),
    (7, long),
    (7, rude_user),
)
