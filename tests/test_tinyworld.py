"""tinyworld: the same bytes for a seed, splits with no common entity or wording, checks that tell right from wrong."""

import contextlib
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from random import Random

import pytest

from hfpipe.data import tinyworld
from hfpipe.data.tinyworld import behaviour, chat, facts, preferences, text, wordings, world
from hfpipe.data.tinyworld.probes import PROBES
from hfpipe.errors import UserError
from hfpipe.evaluation.answers import Answer
from hfpipe.evaluation.checks import CHECKS, check
from hfpipe.evaluation.tools import calculate

CAPABILITIES = {
    "stopping", "turn_taking", "tools", "format", "instructions", "helpfulness", "safety", "honesty", "tone", "detail",
    "clarification", "knowledge", "robustness",
}  # fmt: skip
CHAT = ("midtrain", "sft", "preferences", "decoys")


def talk_of(row):
    return row["messages"] if "messages" in row else row["prompt"] + row["chosen"] + row["rejected"]


def text_of(row):
    calls = [c["function"]["arguments"] for m in talk_of(row) for c in m.get("tool_calls", ())]
    return "\n".join([m["content"] for m in talk_of(row)] + calls)


@pytest.fixture(scope="module")
def pretraining():
    return "\n".join(row["text"] for row in tinyworld.rows("pretrain", size=12_000))


@pytest.fixture(scope="module")
def train_chat():
    rows = (row for name in CHAT for row in tinyworld.rows(name, size=6_000))
    # A slip may spell any word.
    return "\n".join(text_of({**row, "rejected": []} if row["kind"] == "garbled" else row) for row in rows)


@pytest.fixture(scope="module")
def probe_rows():
    return {split: list(tinyworld.rows("probes", split)) for split in ("validation", "test")}


def has_word(text, words):
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text, re.IGNORECASE) is not None


def held_out(items, every=8):
    return [item for split in ("validation", "test") for item in world.part(items, split, every)]


def test_same_seed_same_bytes_in_any_process():
    code = (
        "import hashlib, json; from hfpipe.data import tinyworld as tw\n"
        "h = hashlib.sha256()\n"
        "for n in tw.NAMES:\n"
        "    for s in ('train', 'validation', 'test'):\n"
        "        for r in tw.rows(n, s, seed=3, size=120): h.update(json.dumps(r).encode())\n"
        "print(h.hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_seeds_and_splits_differ_and_a_shorter_list_begins_a_longer_one():
    def digest(**args):
        return hashlib.sha256(json.dumps(list(tinyworld.rows(**args))).encode()).hexdigest()

    for name in tinyworld.NAMES:
        assert digest(name=name, size=50) != digest(name=name, size=50, seed=1)
        assert digest(name=name, split="validation", size=50) != digest(name=name, split="test", size=50)
        assert list(tinyworld.rows(name, size=20)) == list(tinyworld.rows(name, size=50))[:20]


def test_sizes():
    for name in tinyworld.NAMES:
        assert len(list(tinyworld.rows(name, size=37))) == 37
        assert len(list(tinyworld.rows(name, "test"))) == tinyworld.HELD_OUT_SIZES[name]


@pytest.mark.parametrize(
    ("args", "said"),
    [(("pretrian",), "pretrain"), (("sft", "vaildation"), "validation"), (("sft", "train", 0, 0), "1 or more")],
)
def test_a_wrong_request_is_told(args, said):
    with pytest.raises(UserError, match=said):
        tinyworld.rows(*args)


def entities_of(split):
    """All that belongs to one split alone; planets, days and colours are asked for in no conversation."""
    tables = (world.COUNTRIES, world.ANIMALS, world.THINGS, world.JOBS)
    entities = [row[0] for table in tables for row in world.part(table, split)]
    entities += [word for pair in world.part(world.OPPOSITES, split) for word in pair]
    entities += [row[1] for row in world.part(world.COUNTRIES, split)]
    for items in (world.NAMES, world.BELONGINGS, world.WRITINGS, world.BOOKINGS):
        entities += world.part(items, split)
    entities += [
        act for table in (world.HARM, world.LOOKALIKES, world.TASKS) for act in world.part(acts_of(table), split)
    ]
    return entities + world.made_up_countries(split)


def test_train_conversations_name_no_held_out_entity(train_chat):
    entities = entities_of("validation") + entities_of("test")
    assert len(entities) > 150
    assert [entity for entity in entities if has_word(train_chat, entity)] == []


@pytest.mark.parametrize(("split", "other"), [("validation", "test"), ("test", "validation")])
def test_validation_and_test_name_nothing_of_each_other(split, other, probe_rows):
    rows = [row for name in CHAT for row in tinyworld.rows(name, split, size=3_000)]
    said = "\n".join(text_of({**row, "rejected": []} if row["kind"] == "garbled" else row) for row in rows)
    said += "\n".join(m["content"] for row in probe_rows[split] for m in row.get("messages", ()))
    for act in entities_of(split):  # is one as a whole: who robs a hen of its egg here says nothing of what hens eat
        said = said.replace(act, "it") if " of its " in act else said
    assert [entity for entity in entities_of(other) if has_word(said, entity)] == []
    assert sum(has_word(said, entity) for entity in entities_of(split)) > 75


def test_no_conversation_speaks_of_planets_or_of_what_day_comes_next(train_chat):
    """So the wording alone makes a probe of them new: pretraining states them, and nothing else does."""
    assert [planet for planet in world.PLANETS if has_word(train_chat, planet)] == []
    assert [day for day in world.DAYS if has_word(train_chat, f"after {day}")] == []


def acts_of(table):
    return [f"{verb} {thing}" for verb, things in table.items() for thing in things]


def test_train_conversations_hold_no_held_out_number():
    for name in CHAT:
        for row in tinyworld.rows(name, size=4_000):
            for message in talk_of(row):
                for made in message.get("tool_calls", ()):
                    numbers = re.findall(r"\d\d+", made["function"]["arguments"])  # one digit: a small sum
                    assert all(world.split_of_text(n) == "train" for n in numbers), row


# The wordings that each kind's user messages may take.
QUESTIONS = (wordings.ASKS, *(relation.questions for relation in facts.ASKED))
KIND_WORDINGS = {
    "question": QUESTIONS,
    "told": QUESTIONS,
    "follow_up": (*QUESTIONS, wordings.FOLLOW_UPS),
    "belonging": (wordings.OWNING, wordings.OWNING_QUESTIONS),
    "greeting": (*QUESTIONS, wordings.GREETINGS, wordings.THANKS),
    "name": (wordings.INTRODUCTIONS, wordings.NAME_QUESTIONS),
    "small_sum": (wordings.SUMS,),
    "calculation": (wordings.CALCULATIONS,),
    "choice": (wordings.CHOICES,),
    "letters": (wordings.CHOICES, wordings.LETTERS),
    "json_object": (wordings.JSON_REQUESTS,),
    "plain_system": (wordings.PLAIN_SYSTEMS,),
    "pirate": (wordings.PIRATE_SYSTEMS,),
    "echo": (wordings.ECHOES,),
    "how_to": (wordings.HOW_TO,),
    "refusal": (wordings.HOW_TO,),
    "future": (wordings.FUTURE,),
    "unseen_now": (wordings.NOW,),
    "made_up": QUESTIONS,
    "real": QUESTIONS,
    "clarify": (wordings.WRITE, wordings.BOOK, wordings.VAGUE),
    "clear_request": (wordings.WRITE,),
    "short": (wordings.SHORT,),
    "long": (wordings.TELL,),
    "rude_user": (wordings.RUDE,),
    # of pairs
    "harm": (wordings.HOW_TO,),
    "lookalike": (wordings.HOW_TO,),
    "helpful": (wordings.HOW_TO,),
    "wrong_fact": QUESTIONS,
    "false_doubt": QUESTIONS,
    "missing_question": (wordings.WRITE, wordings.BOOK, wordings.VAGUE),
    "needless_question": (wordings.WRITE,),
    "rude": (wordings.RUDE,),
    "too_long": (wordings.SHORT,),
    "too_short": (wordings.TELL,),
    "broken_json": (wordings.JSON_REQUESTS,),
    "wrong_letter": (wordings.CHOICES, wordings.LETTERS),
    "voice": (wordings.PIRATE_SYSTEMS,),
    "wrong_colour": (wordings.OWNING, wordings.OWNING_QUESTIONS),
    "wrong_sum": (wordings.SUMS,),
    "missing_call": (wordings.CALCULATIONS,),
    "wrong_result": (wordings.CALCULATIONS,),
}
MIXED = {"off_topic", "garbled"}  # pairs of conversations of the kinds above


def pattern_of(wording):
    return re.sub(r"\\\{\w*\\\}", r"[^\\n]+", re.escape(wording))


def test_train_conversations_hold_no_held_out_wording():
    said = {kind: set() for kind in {*KIND_WORDINGS, *MIXED}}
    for row in (row for name in CHAT for row in tinyworld.rows(name, size=4_000)):
        asking = -1 if row["kind"] == "told" else 0  # the line that asks
        said[row["kind"]] |= {m["content"].split("\n")[asking] for m in talk_of(row) if m["role"] in ("user", "system")}
    for kind, lists in KIND_WORDINGS.items():
        held = [pattern_of(wording) for items in lists for wording in held_out(items, 6)]
        assert len(held) >= 2
        found = [text for text in said[kind] for pattern in held if re.fullmatch(pattern, text, re.IGNORECASE)]
        assert found == [], kind


def test_no_training_prompt_is_a_probe_s(probe_rows):
    """Whatever their kinds; a carrier such as "What's {}?" may be one kind's in training and another's in the test."""
    trained = {
        m["content"].casefold()
        for name in CHAT
        for row in tinyworld.rows(name)
        for m in talk_of(row)
        if m["role"] == "user"
    }
    asked = [
        row["messages"][-1]["content"].casefold() for rows in probe_rows.values() for row in rows if "messages" in row
    ]
    assert len(asked) > 900
    assert [text for text in asked if text in trained] == []


def test_each_list_of_wordings_is_long_enough():
    lists = {name: value for name, value in vars(wordings).items() if isinstance(value, tuple)}
    assert len(lists) == 26
    for name, items in lists.items():
        assert len(set(world.phrases(items, "train"))) >= (4 if name == "THANKS" else 8), name
        for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
            assert not set(world.phrases(items, one)) & set(world.phrases(items, other)), name


def test_cloze_wordings_are_new(pretraining, train_chat):
    for relation in facts.RELATIONS:
        for open_sentence in relation.cloze.values():
            for fact in relation.pairs:
                assert facts.sentence(open_sentence, fact) not in pretraining


def test_pretraining_states_every_fact(pretraining):
    for relation in facts.RELATIONS:
        for fact in relation.pairs:
            assert any(facts.sentence(s, fact) in pretraining for s in relation.statements), fact
        if relation.asked:
            assert {fact for split in world.SPLITS for fact in relation.facts(split)} == set(relation.pairs)


def test_every_kind_is_there_and_short():
    wanted = {
        "midtrain": {make.__name__ for _, make in chat.KINDS},
        "sft": {make.__name__ for _, make in (*chat.KINDS, *behaviour.KINDS)},
        "preferences": {make.__name__ for _, make in preferences.KINDS},
        "decoys": {make.__name__ for _, make in preferences.DECOYS},
    }
    for name, kinds in wanted.items():
        for split in world.SPLITS:
            rows = list(tinyworld.rows(name, split, size=1_500))
            assert {row["kind"] for row in rows} == kinds
            assert max(len(text_of(row)) for row in rows) < (900 if name == "decoys" else 600)
            assert all(m["content"] or m.get("tool_calls") for row in rows for m in talk_of(row))
    midtrain = "\n".join(text_of(row) for row in tinyworld.rows("midtrain", size=3_000))
    assert behaviour.REFUSAL not in midtrain
    assert "don't know" not in midtrain


def test_roles_alternate_and_the_assistant_speaks_last():
    after = {"system": {"user"}, "user": {"assistant"}, "assistant": {"user", "tool"}, "tool": {"assistant"}}
    for name in ("midtrain", "sft"):
        for row in tinyworld.rows(name, size=2_000):
            roles = [m["role"] for m in row["messages"]]
            assert roles[0] in ("system", "user")
            assert roles[-1] == "assistant"
            assert all(b in after[a] for a, b in pairwise(roles))


def test_arithmetic_is_right():
    counted = 0
    for row in tinyworld.rows("midtrain", size=3_000):
        last = row["messages"][-1]["content"]
        if row["kind"] == "calculation":
            call, result = row["messages"][1]["tool_calls"][0]["function"]["arguments"], row["messages"][2]["content"]
            assert calculate(call) == int(result) == int(last.split(" = ")[1])
        elif row["kind"] == "small_sum":
            left, right = last.rstrip(".").split(" equals ")
            assert calculate(left) == int(right)
        else:
            continue
        counted += 1
    assert counted > 400


def test_stories_are_true_and_code_runs(pretraining):
    for opening in ("They went to the", "Nice to meet you,", "def add(a, b):", "for i in range(", 'colour = "'):
        assert pretraining.count(opening) > 5
    rng, answered = Random(0), 0
    for _ in range(200):
        told = text.story(rng)
        owned = {(name, thing): colour for name, colour, thing in re.findall(r"(\w+) has a (\w+) (\w+)\.", told)}
        assert len(owned) == 2
        for thing, name, colour in re.findall(r"What colour is the (\w+) of (\w+)\? The \1 of \2 is (\w+)\.", told):
            assert owned[name, thing] == colour
            answered += 1
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(text.code(rng), "code", "exec"), {})
    assert answered > 100


@pytest.mark.parametrize("text", ["__import__('os')", "2 ** 99", "a + 1", "1 +", "1 / 0", "print(1)", "(" * 500])
def test_the_calculator_takes_arithmetic_only(text):
    with pytest.raises(ValueError, match="not arithmetic"):
        calculate(text)


def test_pairs_differ_and_answer_the_same_prompt():
    for row in (row for name in ("preferences", "decoys") for row in tinyworld.rows(name, size=3_000)):
        assert [m["role"] for m in row["chosen"]] == [m["role"] for m in row["rejected"]] == ["assistant"]
        assert row["chosen"] != row["rejected"], row
        assert row["prompt"][-1]["role"] in ("user", "tool")


def test_the_world_has_every_kind_that_it_is_to_have():
    assert {make.__name__ for _, make in chat.KINDS} >= {
        "question", "follow_up", "belonging", "greeting", "name", "small_sum", "calculation", "choice", "json_object", "pirate",
    }  # fmt: skip
    assert {make.__name__ for _, make in behaviour.KINDS} >= {"how_to", "refusal", "future", "made_up", "clarify"}
    assert "build a bath bomb" in acts_of(world.LOOKALIKES)
    shown = [row for row in tinyworld.rows("preferences", size=4_000) if has_word(text_of(row), "bath bomb")]
    assert shown
    assert all(row["rejected"][0]["content"] == behaviour.REFUSAL != row["chosen"][0]["content"] for row in shown)


def test_lookalikes_are_left_to_the_preferences():
    sft = "\n".join(text_of(row) for row in tinyworld.rows("sft", size=6_000))
    assert not any(has_word(sft, act) for act in acts_of(world.LOOKALIKES))


def test_probes_cover_every_capability_and_never_repeat(probe_rows):
    for rows in probe_rows.values():
        assert {row["capability"] for row in rows} == CAPABILITIES
        assert {row["kind"] for row in rows} == {kind for _, kind, _ in PROBES} | {"same_sum"}
        keys = [row["kind"] + json.dumps(row.get("messages", row.get("prompt"))) for row in rows]
        assert len(keys) == len(set(keys))
        assert all(row["check"]["type"] in CHECKS for row in rows)
    asked = [{json.dumps(r.get("messages", r.get("prompt"))) for r in rows} for rows in probe_rows.values()]
    assert not asked[0] & asked[1]


CALL = "<|tool_call|>calculator(2 * 3)<|end_tool_call|>"
# For each check a right and a wrong text, made from the probe's value.
REFERENCES = {
    "stops": (lambda v: "Hello!<|end_assistant|>", lambda v: "Hello! Hello! Hello!"),
    "opens_turn": (lambda v: "<|assistant|>Hi<|end_assistant|>", lambda v: " and then"),
    "contains": (lambda v: f"It is {v}.<|end_assistant|>", lambda v: "It is so."),
    "starts": (lambda v: f" {v}.", lambda v: f" not {v}"),
    "number": (lambda v: f"1 × 2 = {v:,}<|end_assistant|>", lambda v: f"{v} = {v + 1}"),
    "tool_call": (
        lambda v: f"<|tool_call|>calculator({v['arguments']})<|end_tool_call|>",
        lambda v: f"<|tool_call|>calculator({v['arguments']}1)<|end_tool_call|>",
    ),
    "tool_format": (lambda v: CALL, lambda v: CALL.replace(" 3", "")),
    "no_tool": (lambda v: "It is Paris.", lambda v: CALL),
    "choice_format": (lambda v: "So. The answer is C) red.", lambda v: "red"),
    "choice": (lambda v: f"The answer is {v['text']} {v['letter']}.", lambda v: f"The answer is no {v['letter']}."),
    "json": (lambda v: json.dumps(dict.fromkeys(v, "x")), lambda v: json.dumps(dict.fromkeys(v, "x"))[:-1]),
    "json_equals": (lambda v: json.dumps(v), lambda v: json.dumps({**v, "country": "x"})),
    "refuses": (lambda v: behaviour.REFUSAL, lambda v: "Sure! To do it:\n1. Go."),
    "does_not_refuse": (lambda v: "Sure! To do it:\n1. Go.", lambda v: behaviour.REFUSAL),
    "helps": (behaviour.help_with, lambda v: behaviour.REFUSAL),
    "uncertain": (lambda v: behaviour.unknown("Zorland"), lambda v: "It is Paris."),
    "certain": (lambda v: "It is Paris.", lambda v: behaviour.FUTURE_DOUBT),
    "pirate": (lambda v: "Arr matey! Paris. Yo ho ho!", lambda v: "Paris."),
    "not_pirate": (lambda v: "Paris.", lambda v: "Arr matey! Paris. Yo ho ho!"),
    "polite": (lambda v: f"It is {v}.", lambda v: f"What a silly question! It is {v}."),
    "max_words": (lambda v: f"{v['text']}.", lambda v: f"The answer to it is {v['text']}."),
    "contains_all": (lambda v: ". ".join(v) + ".", lambda v: v[0] + "."),
    "asks": (lambda v: "Sure! About what?", lambda v: "Sure! Done."),
    "does_not_ask": (lambda v: "Sure! Done.", lambda v: "Sure! About what?"),
}  # fmt: skip


def answer(raw: str) -> Answer:
    """What a model wrote, read as the shipped template's tokenizer would."""
    text = re.sub(r"<\|\w+\|>", "", raw)
    call = re.fullmatch(r"<\|tool_call\|>(\w+)\((.*)\)<\|end_tool_call\|>", raw)
    function = {"function": {"name": call[1], "arguments": call[2]}} if call else None
    message = {"content": "", "tool_calls": [function]} if call else {"content": text}
    stopped = raw.endswith(("<|end_assistant|>", "<|end_tool_call|>"))
    return Answer(raw, [message] if raw else [], stopped, opened=raw.startswith("<|assistant|>"))


def test_checks_tell_right_from_wrong(probe_rows):
    seen = set()
    for row in (row for rows in probe_rows.values() for row in rows):
        kind, value = row["check"]["type"], row["check"]["value"]
        right, wrong = REFERENCES[kind]
        assert check(row, answer(right(value))), row
        assert not check(row, answer(wrong(value))), row
        assert not check(row, answer("")), row
        seen.add(kind)
    assert seen == set(REFERENCES)


def test_source_hash_is_stable():
    assert re.fullmatch(r"[0-9a-f]{64}", tinyworld.source_hash())
    assert tinyworld.source_hash() == tinyworld.source_hash()


def test_no_persona_of_training_is_a_wording_of_another_split():
    held_out = {text for kind in (wordings.PLAIN_SYSTEMS, wordings.PIRATE_SYSTEMS) for text in kind}
    held_out -= {
        text for kind in (wordings.PLAIN_SYSTEMS, wordings.PIRATE_SYSTEMS) for text in world.phrases(kind, "train")
    }
    for make in (chat.plain_persona, chat.pirate_persona):
        assert not held_out & {make(Random(number), "train") for number in range(20_000)}
