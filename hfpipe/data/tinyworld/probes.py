"""Probes: questions with a check, on entities and wordings that the train split does not hold.

A row asks by `prompt` (plain text to go on from) or by `messages`; `add_generation_prompt` is false where the model
itself must open the assistant's turn. Rows of one `group` ask the same thing in several wordings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from random import Random

from hfpipe.data.tinyworld import behaviour, chat, wordings, world
from hfpipe.data.tinyworld.chat import user
from hfpipe.data.tinyworld.facts import RELATIONS, sentence
from hfpipe.data.tinyworld.text import NUMBER_WORDS, SIGN_WORDS
from hfpipe.data.tinyworld.world import phrases


def from_talk(make: Callable, kind: str, value: Callable | object = None, prompt_turns: int = -1) -> Callable:
    """A probe out of a conversation: its first `prompt_turns` messages, checked by `kind` with `value(talk)`."""

    def probe(rng: Random, split: str) -> dict:
        talk = make(rng, split)
        wanted = value(talk) if callable(value) else value
        return {"messages": talk[:prompt_turns], "check": {"type": kind, "value": wanted}}

    return probe


def last(talk) -> str:
    return talk[-1]["content"]


def last_number(talk) -> int:
    return int(last(talk).rstrip(".").split()[-1])


def cloze(rng: Random, split: str) -> dict:
    """A fact of the whole world, left open; on validation and test in a wording that pretraining never used."""
    relation = rng.choices(RELATIONS, [len(r.pairs) for r in RELATIONS])[0]
    entity, answer = rng.choice(relation.pairs)
    open_sentence = relation.cloze.get(split, relation.statements[0].removesuffix(" {a}."))
    prompt = sentence(open_sentence, (entity, ""))
    return {"prompt": prompt, "check": {"type": "starts", "value": answer}}


def any_talk(rng: Random, split: str) -> list[dict]:
    return rng.choice((chat.question, chat.small_sum, chat.calculation, chat.name, behaviour.how_to, chat.json_object))(
        rng, split
    )


def opens_turn(rng: Random, split: str) -> dict:
    row = from_talk(any_talk, "opens_turn")(rng, split)
    first_user = next(i for i, m in enumerate(row["messages"]) if m["role"] == "user")
    return {**row, "messages": row["messages"][: first_user + 1], "add_generation_prompt": False}


def stops(rng: Random, split: str) -> dict:
    talk = any_talk(rng, split)
    return {"messages": talk[:1], "check": {"type": "stops", "value": None}}


def tool_call(talk) -> dict:
    return talk[1]["tool_calls"][0]["function"]


def letter_and_text(talk) -> dict:
    text, letter = last(talk).removesuffix(".").rsplit("The answer is ", 1)[1].rsplit(" ", 1)
    return {"letter": letter, "text": text}


def fact_answer(talk) -> str:
    """The answer in the last sentence of a fact: its last word or words after the last small word."""
    return (
        last(talk)
        .rstrip(".")
        .rsplit(" is the ", 1)[-1]
        .rsplit(" is ", 1)[-1]
        .rsplit(" in the ", 1)[-1]
        .rsplit(" country in ", 1)[-1]
    )


def fact_probe(ask: Callable[[str], list[dict]], kind: str) -> Callable:
    """A question about a held-out fact, put as `ask(rng, split, question)` says."""

    def probe(rng: Random, split: str) -> dict:
        relation, fact = chat.draw_fact(rng, split)
        asked = ask(rng, split, chat.draw_question(rng, split, relation, fact))
        value = {"words": 3, "text": fact[1]} if kind == "max_words" else fact[1]
        return {"messages": asked, "check": {"type": kind, "value": value}}

    return probe


def plainly(rng: Random, split: str, question: str) -> list[dict]:
    return [user(question)]


def rudely(rng: Random, split: str, question: str) -> list[dict]:
    return [user(rng.choice(phrases(wordings.RUDE, split)).format(question))]


def shortly(rng: Random, split: str, question: str) -> list[dict]:
    return [user(rng.choice(phrases(wordings.SHORT, split)).format(question))]


def and_another(rng: Random, split: str) -> dict:
    """A second country by name only; the answer must be of the first question's kind."""
    talk = chat.follow_up(rng, split)
    return {"messages": talk[:-1], "check": {"type": "contains", "value": fact_answer(talk)}}


def helps(rng: Random, split: str) -> dict:
    act = rng.choice(world.acts(world.TASKS, split))
    asked = rng.choice(phrases(wordings.HOW_TO, split)).format(act)
    return {"messages": [user(asked)], "check": {"type": "helps", "value": act}}


def one_sum(rng: Random, split: str) -> list[dict]:
    """The same small sum in four wordings of `split`, in digits and in words: one group."""
    a, sign, b, result = rng.choice(world.SMALL_SUMS)
    written = (f"{a} {sign} {b}", f"{a}{sign}{b}", f"{NUMBER_WORDS[a]} {SIGN_WORDS[sign]} {NUMBER_WORDS[b]}")
    asked = [wording.format(form) for wording in phrases(wordings.SUMS, split) for form in written]
    check = {"type": "number", "value": result}
    return [
        {"messages": [user(chat.upper(q))], "check": check, "group": f"{a} {sign} {b}"} for q in rng.sample(asked, 4)
    ]


PROBES: tuple[tuple[str, str, Callable], ...] = (
    ("knowledge", "cloze", cloze),
    ("stopping", "stops", stops),
    ("turn_taking", "opens_turn", opens_turn),
    ("tools", "tool_format", from_talk(chat.calculation, "tool_format", "calculator", 1)),
    ("tools", "tool_exact", from_talk(chat.calculation, "tool_call", tool_call, 1)),
    ("tools", "tool_answer", from_talk(chat.calculation, "number", last_number, 1)),
    ("tools", "no_tool", from_talk(chat.question, "no_tool")),
    ("format", "choice_format", from_talk(chat.choice, "choice_format")),
    ("format", "choice_right", from_talk(chat.choice, "choice", letter_and_text)),
    ("format", "json", from_talk(chat.json_object, "json", lambda talk: list(json.loads(last(talk))))),
    (
        "format",
        "json_values",
        from_talk(chat.json_object, "json_equals", lambda talk: json.loads(last(talk))),
    ),
    ("instructions", "question", fact_probe(plainly, "contains")),
    ("instructions", "small_sum", from_talk(chat.small_sum, "number", last_number)),
    (
        "instructions",
        "belonging",
        from_talk(chat.belonging, "contains", lambda talk: last(talk).rstrip(".").split()[-1]),
    ),
    ("instructions", "follow_up", and_another),
    ("instructions", "echo", from_talk(chat.echo, "contains", last)),
    ("helpfulness", "how_to", helps),
    (
        "helpfulness",
        "name",
        from_talk(chat.name, "contains", lambda talk: last(talk).rstrip(".").split()[-1]),
    ),
    ("safety", "harm", from_talk(behaviour.refusal, "refuses")),
    ("safety", "lookalike", from_talk(behaviour.lookalike, "does_not_refuse")),
    ("honesty", "future", from_talk(behaviour.future, "uncertain")),
    ("honesty", "made_up", from_talk(behaviour.made_up, "uncertain")),
    ("honesty", "real_fact", from_talk(chat.question, "certain")),
    ("tone", "pirate", from_talk(chat.pirate, "pirate")),
    ("tone", "not_pirate", from_talk(chat.plain_system, "not_pirate")),
    ("tone", "polite", fact_probe(rudely, "polite")),
    ("detail", "short", fact_probe(shortly, "max_words")),
    ("detail", "long", from_talk(behaviour.long, "contains_all", lambda talk: last(talk).rstrip(".").split(". "))),
    ("clarification", "asks", from_talk(behaviour.clarify, "asks")),
    ("clarification", "clear", from_talk(behaviour.clear_request, "does_not_ask")),
)


def probes(split: str, rng: Random, size: int) -> Iterator[dict]:
    """At most `size` different rows, every kind in turn, so that a shorter list is as balanced as a longer one."""
    seen: set[str] = set()
    groups = (row for _ in range(100) for row in one_sum(rng, split))
    makers = [(capability, kind, make) for capability, kind, make in PROBES]
    makers.append(("robustness", "same_sum", lambda rng, split: next(groups, None)))
    given = 0
    while makers and given < size:
        for entry in tuple(makers):
            capability, kind, make = entry
            row = fresh(make, kind, rng, split, seen)
            if row is None:
                makers.remove(entry)
                continue
            yield {"capability": capability, "kind": kind, **row}
            given += 1
            if given == size:
                return


def fresh(make: Callable, kind: str, rng: Random, split: str, seen: set[str]) -> dict | None:
    """A row that this kind has not asked yet; None when it has no more to ask."""
    for _ in range(60):
        row = make(rng, split)
        if row is None:
            return None
        key = kind + json.dumps(row.get("messages", row.get("prompt")))
        if key not in seen:
            seen.add(key)
            return row
    return None
