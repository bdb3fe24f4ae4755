"""Preference pairs: one prompt, the better and the worse answer, for each behaviour."""

from __future__ import annotations

from random import Random

from hfpipe.data.tinyworld import behaviour, chat, wordings, world
from hfpipe.data.tinyworld.chat import Messages, assistant, system, user
from hfpipe.data.tinyworld.facts import draw_fact, draw_question, wrong_answers
from hfpipe.data.tinyworld.world import acts, part, phrases

GUESSES = ("That makes {}.", "It is {}.", "The answer is {}.", "{}.")
SLIPS = "abcdefghijklmnopqrstuvwxyz'{}\"?"


def pair(talk: Messages, rejected: str) -> dict:
    """The conversation's last message against `rejected`."""
    return {"prompt": talk[:-1], "chosen": talk[-1:], "rejected": [assistant(rejected)]}


def said(talk: Messages) -> str:
    return talk[-1]["content"]


def harm(rng: Random, split: str) -> dict:
    act = rng.choice(acts(world.HARM, split))
    asked = user(rng.choice(phrases(wordings.HOW_TO, split)).format(act))
    return pair([asked, assistant(behaviour.REFUSAL)], behaviour.help_with(act))


def lookalike(rng: Random, split: str) -> dict:
    return pair(behaviour.lookalike(rng, split), behaviour.REFUSAL)


def helpful(rng: Random, split: str) -> dict:
    talk = behaviour.how_to(rng, split)
    return pair(talk, rng.choice((behaviour.REFUSAL, "You can find that out.", "It is not so hard.")))


def wrong_fact(rng: Random, split: str) -> dict:
    relation, fact = draw_fact(rng, split)
    wrong = (fact[0], *wrong_answers(rng, split, relation, fact, 1))
    asked = user(draw_question(rng, split, relation, fact))
    return pair([asked, assistant(relation.answer(fact))], relation.answer(wrong))


def false_doubt(rng: Random, split: str) -> dict:
    relation, fact = draw_fact(rng, split)
    asked = user(draw_question(rng, split, relation, fact))
    doubt = rng.choice((behaviour.unknown(fact[0]), behaviour.FUTURE_DOUBT, "I don't know."))
    return pair([asked, assistant(relation.answer(fact))], doubt)


def future(rng: Random, split: str) -> dict:
    talk = rng.choice((behaviour.future, behaviour.future, behaviour.unseen_now))(rng, split)
    return pair(talk, rng.choice(("It will be good.", "Yes, I am sure.", f"It is {rng.choice(world.COLOURS)}.")))


def made_up(rng: Random, split: str) -> dict:
    country = rng.choice(world.made_up_countries(split))
    relation, fact = draw_fact(rng, split, behaviour.ABOUT_COUNTRIES)
    asked = user(draw_question(rng, split, relation, (country, "")))
    return pair([asked, assistant(behaviour.unknown(country))], relation.answer((country, fact[1])))


def missing_question(rng: Random, split: str) -> dict:
    """Asking back against going ahead on a guess."""
    talk = behaviour.clarify(rng, split)
    item, topic = rng.choice(part(world.WRITINGS, split)), rng.choice(part(world.TOPICS, split))
    guesses = (behaviour.verse_about(item, topic), behaviour.help_with(f"write a {item}"), "Sure! Done.")
    return pair(talk, rng.choice(guesses))


def needless_question(rng: Random, split: str) -> dict:
    talk = behaviour.clear_request(rng, split)
    return pair(talk, "Sure! What should it be about?")


def rude(rng: Random, split: str) -> dict:
    talk = rng.choice((behaviour.rude_user, chat.question))(rng, split)
    return pair(talk, f"What a silly question! {said(talk).removeprefix(behaviour.KIND).strip()}")


def too_long(rng: Random, split: str) -> dict:
    relation, fact = draw_fact(rng, split)
    asked = rng.choice(phrases(wordings.SHORT, split)).format(draw_question(rng, split, relation, fact))
    return pair(
        [user(asked), assistant(f"{chat.upper(fact[1])}.")],
        f"Sure! {relation.answer(fact)} I hope that helps you.",
    )


def too_short(rng: Random, split: str) -> dict:
    talk = behaviour.long(rng, split)
    return pair(talk, said(talk).split(". ")[0] + ".")


def broken_json(rng: Random, split: str) -> dict:
    talk = chat.json_object(rng, split)
    good = said(talk)
    return pair(talk, rng.choice((good[:-1], good.replace('"', ""), f"Sure! {good}", good.replace('": ', '" '))))


def wrong_letter(rng: Random, split: str) -> dict:
    talk = chat.choice(rng, split)
    start, answer = said(talk).removesuffix(".").split(" The answer is ")
    listed = [line.removeprefix("- ") for line in talk[0]["content"].splitlines() if line.startswith("- ")]
    wrong = rng.choice([line for line in listed if line != answer])
    if rng.random() < 0.5:  # the right words, another's letter
        wrong = f"{answer[:-1]}{wrong[-1]}"
    return pair(talk, f"{start} The answer is {wrong}.")


def voice(rng: Random, split: str) -> dict:
    """The pirate's voice with his system message, the plain one without."""
    talk = chat.pirate(rng, split)
    plain = said(talk).removeprefix("Arr matey! ").removesuffix(" Yo ho ho!")
    if rng.random() < 0.5:
        return pair(talk, plain)
    return pair([system(chat.plain_persona(rng, split)), *talk[1:-1], assistant(plain)], said(talk))


def wrong_colour(rng: Random, split: str) -> dict:
    """What the user said two turns ago against another colour."""
    talk = chat.belonging(rng, split)
    start, colour = said(talk).rstrip(".").rsplit(" ", 1)
    return pair(talk, f"{start} {rng.choice([c for c in world.COLOURS if c != colour])}.")


def wrong_sum(rng: Random, split: str) -> dict:
    """A small sum told, against a wrong one or a needless call of the calculator."""
    talk = chat.small_sum(rng, split)
    start, result = said(talk).rstrip(".").rsplit(" ", 1)
    if rng.random() < 0.4:
        return {**pair(talk, ""), "rejected": [chat.call(start.removesuffix(" equals"))]}
    return pair(talk, f"{start} {int(result) + rng.choice((1, 2, 3))}.")


def missing_call(rng: Random, split: str) -> dict:
    """The calculator called for a sum too long for the head, against a guess.

    No guess begins with the sum: who unlearns that unlearns to begin with the sum where it is small, too.
    """
    asked, called, _, _ = chat.calculation(rng, split)
    guess = rng.choice(GUESSES).format(world.number(rng, split))
    return {"prompt": [asked], "chosen": [called], "rejected": [assistant(guess)]}


def wrong_result(rng: Random, split: str) -> dict:
    """A number from the tool, told as it is, against another number."""
    talk = chat.calculation(rng, split)
    start, result = said(talk).rsplit(" ", 1)
    return pair(talk, f"{start} {int(result) + rng.choice((1, 10, 100, -1))}")


def off_topic(rng: Random, split: str) -> dict:
    """A good answer against a good answer to something else, such as a question back where nothing is missing."""
    kinds = (*behaviour.KINDS, *chat.KINDS)

    def talk() -> Messages:
        return rng.choices([make for _, make in kinds], [weight for weight, _ in kinds])[0](rng, split)

    right, other = talk(), talk()
    while right[-1] == other[-1] or "tool_calls" in right[-1] or "tool_calls" in other[-1]:
        right, other = talk(), talk()
    return pair(right, said(other))


def garbled(rng: Random, split: str) -> dict:
    """A good answer against the same with a slip in it: a letter lost, another in its place, or a word twice."""
    right = rng.choices([make for _, make in behaviour.KINDS], [weight for weight, _ in behaviour.KINDS])[0](rng, split)
    good, slip = said(right), rng.random()
    if slip < 0.3:
        told = good.split(" ")
        at = rng.randrange(len(told))
        return pair(right, " ".join([*told[: at + 1], *told[at:]]))
    at = rng.choice([i for i, letter in enumerate(good) if letter.isalpha() or letter == "'"])
    put = "" if slip < 0.6 else rng.choice([letter for letter in SLIPS if letter != good[at]])
    return pair(right, good[:at] + put + good[at + 1 :])


KINDS = (
    (22, harm),
    (22, lookalike),
    (5, helpful),
    (9, wrong_fact),
    (6, false_doubt),
    (12, future),
    (12, made_up),
    (11, missing_question),
    (4, needless_question),
    (4, rude),
    (4, too_long),
    (4, too_short),
    (13, broken_json),
    (4, wrong_letter),
    (3, voice),
    (4, wrong_colour),
    (8, wrong_sum),
    (15, missing_call),
    (8, wrong_result),
)

# What a reward model must tell apart besides, lest it be fooled: answers with one thing wrong in them or a slip,
# and good answers to something else.
DECOYS = (
    (8, off_topic),
    (6, garbled),
    (5, wrong_fact),
    (2, wrong_colour),
    (2, wrong_result),
    (5, wrong_letter),
    (2, wrong_sum),
)
