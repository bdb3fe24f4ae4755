"""Every form that rows come in, on hand-written rows, and what is found wrong with a row."""

import json

import pytest

from hfpipe.data.forms import FORMS, recognise, recognise_source
from hfpipe.data.messages import RowProblem, messages_of
from hfpipe.data.rows import as_form, kind_of, row_problem
from hfpipe.errors import UserError


def said(role, content, **more):
    return {"role": role, "content": content, **more}


def call(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def calling(*calls):
    return said("assistant", "", tool_calls=list(calls))


SYSTEM, HI, HELLO, BYE = (
    said("system", "Be kind."),
    said("user", "Hi"),
    said("assistant", "Hello"),
    said("assistant", "Bye"),
)
BOTH = calling({"id": "a", **call("f", {})}, {"id": "b", **call("g", {})})
MORE = [said("assistant", "What?"), said("user", "Go on")]
WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": WEATHER}]
human, gpt = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}

ROWS = {
    "text": ({"text": "Some words.", "url": "u"}, "text", {"text": "Some words.", "url": "u"}),
    "messages": ({"messages": [SYSTEM, HI, HELLO]}, "messages", {"messages": [SYSTEM, HI, HELLO]}),
    "messages with tools": (
        {"messages": [HI, calling(call("weather", '{"at": "Rome"}')), said("tool", "warm", name="weather"), HELLO]}
        | {"tools": TOOLS},
        "messages",
        {"messages": [HI, calling(call("weather", {"at": "Rome"})), said("tool", "warm", name="weather"), HELLO]}
        | {"tools": TOOLS},
    ),
    "a call of a function and its result": (
        {
            "messages": [
                HI,
                {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 1}'}},
                said("function", "3", name="add"),
                HELLO,
            ]
        },
        "messages",
        {"messages": [HI, calling(call("add", {"a": 1})), said("tool", "3", name="add"), HELLO]},
    ),
    "a call whose argument is one text": (
        {"messages": [HI, calling(call("calculator", "2 * 3"))]},
        "messages",
        {"messages": [HI, calling(call("calculator", "2 * 3"))]},
    ),
    "content in parts": (
        {"messages": [said("user", [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]), HELLO]},
        "messages",
        {"messages": [HI, HELLO]},
    ),
    "turns that are not trained": (
        {
            "messages": [
                HI,
                {**HELLO, "weight": 0},
                HI,
                {**BYE, "train": False},
                HI,
                {**HELLO, "weight": 1, "train": True},
            ]
        },
        "messages",
        {"messages": [HI, {**HELLO, "weight": 0}, HI, {**BYE, "weight": 0}, HI, HELLO]},
    ),
    "results in another order than their calls": (
        {"messages": [HI, BOTH, said("tool", "2", tool_call_id="b"), said("tool", "1", tool_call_id="a"), HELLO]},
        "messages",
        {"messages": [HI, BOTH, said("tool", "1", tool_call_id="a"), said("tool", "2", tool_call_id="b"), HELLO]},
    ),
    "results without ids": (
        {"messages": [HI, BOTH, said("tool", "2"), said("tool", "1", tool_call_id="a"), HELLO]},
        "messages",
        {"messages": [HI, BOTH, said("tool", "2"), said("tool", "1", tool_call_id="a"), HELLO]},
    ),
    "a developer's turn": (
        {"messages": [{"role": "developer", "content": "Be kind."}, HI, HELLO]},
        "messages",
        {"messages": [SYSTEM, HI, HELLO]},
    ),
    "columns that hold nothing": (
        {"messages": [{**HI, "tool_calls": None, "name": None}, HELLO], "prompt": None, "tools": None},
        "messages",
        {"messages": [HI, HELLO]},
    ),
    "conversation of role/content": (
        {"conversation": [HI, HELLO], "id": 7},
        "messages",
        {"messages": [HI, HELLO], "id": 7},
    ),
    "conversations of role/content": ({"conversations": [HI, HELLO]}, "messages", {"messages": [HI, HELLO]}),
    "messages in a cell of csv": (
        {"messages": json.dumps([SYSTEM, HI, HELLO])},
        "messages",
        {"messages": [SYSTEM, HI, HELLO]},
    ),
    "sharegpt in a cell of csv": (
        {"conversations": json.dumps([human, gpt]), "system": ""},
        "sharegpt",
        {"messages": [HI, HELLO]},
    ),
    "preference of messages in cells of csv": (
        {"prompt": json.dumps([SYSTEM, HI]), "chosen": json.dumps([HELLO]), "rejected": json.dumps([BYE])},
        "preference with a prompt",
        {"prompt": [SYSTEM, HI], "chosen": [HELLO], "rejected": [BYE]},
    ),
    "whole conversations in cells of csv": (
        {"chosen": json.dumps([HI, HELLO]), "rejected": json.dumps([HI, BYE])},
        "preference, conversations",
        {"prompt": [HI], "chosen": [HELLO], "rejected": [BYE]},
    ),
    "an answer that is JSON": (
        {"prompt": '["Hi"]', "completion": '[{"role": "cook", "name": "Amy"}]'},
        "prompt/completion",
        {"messages": [said("user", '["Hi"]'), said("assistant", '[{"role": "cook", "name": "Amy"}]')]},
    ),
    "an answer that is nearly JSON": (
        {"prompt": "Hi", "completion": '[{"role": "user", "content": "Hi"},'},
        "prompt/completion",
        {"messages": [HI, said("assistant", '[{"role": "user", "content": "Hi"},')]},
    ),
    "sharegpt": (
        {"conversations": [human, gpt], "system": "Be kind."},
        "sharegpt",
        {"messages": [SYSTEM, HI, HELLO]},
    ),
    "sharegpt, an empty system turn": (
        {"conversations": [{"from": "system", "value": ""}, human, gpt], "system": "", "tools": ""},
        "sharegpt",
        {"messages": [HI, HELLO]},
    ),
    "sharegpt with tools": (
        {
            "conversations": [
                human,
                {"from": "function_call", "value": '{"name": "weather", "arguments": {"at": "Rome"}}'},
                {"from": "observation", "value": '{"sky": "blue"}'},
                gpt,
            ],
            "tools": json.dumps([WEATHER]),
        },
        "sharegpt",
        {
            "messages": [HI, calling(call("weather", {"at": "Rome"})), said("tool", '{"sky": "blue"}'), HELLO],
            "tools": TOOLS,
        },
    ),
    "sharegpt, two calls at once": (
        {
            "conversations": [
                human,
                {
                    "from": "function_call",
                    "value": '[{"name": "a", "arguments": {}}, {"name": "b", "arguments": {"x": 1}}]',
                },
            ],
            "tools": [WEATHER],
        },
        "sharegpt",
        {"messages": [HI, calling(call("a", {}), call("b", {"x": 1}))], "tools": TOOLS},
    ),
    "alpaca": ({"instruction": "Hi", "input": "", "output": "Hello"}, "alpaca", {"messages": [HI, HELLO]}),
    "alpaca with all": (
        {"instruction": "Add", "input": "2 3", "output": "5", "system": "Be kind.", "history": [["Hi", "Hello"]]},
        "alpaca",
        {"messages": [SYSTEM, HI, HELLO, said("user", "Add\n\n2 3"), said("assistant", "5")]},
    ),
    "dolly": (
        {"instruction": "Add", "context": "2 3", "response": "5", "category": "sums"},
        "dolly",
        {"messages": [said("user", "Add\n\n2 3"), said("assistant", "5")]}
        | {"context": "2 3", "response": "5", "category": "sums"},
    ),
    "preference with a question": (
        {"system": "Be kind.", "question": "Hi", "chosen": "Hello", "rejected": "Bye"},
        "preference with a question",
        {"prompt": [SYSTEM, HI], "chosen": [HELLO], "rejected": [BYE]},
    ),
    "whole conversations and their question": (
        {"question": "Hi", "chosen": [SYSTEM, HI, HELLO], "rejected": [SYSTEM, HI, BYE]},
        "preference, conversations",
        {"prompt": [SYSTEM, HI], "chosen": [HELLO], "rejected": [BYE]},
    ),
    "prompt/completion": ({"prompt": "Hi", "completion": "Hello"}, "prompt/completion", {"messages": [HI, HELLO]}),
    "prompt/completion of messages": (
        {"prompt": [SYSTEM, HI], "completion": [HELLO]},
        "prompt/completion",
        {"messages": [SYSTEM, HI, HELLO]},
    ),
    "question/answer": (
        {"question": "Hi", "answer": "2+2 = <<2+2=4>>4.\n#### 4"},
        "question/answer",
        {"messages": [HI, said("assistant", "2+2 = 4.\n#### 4")], "answer": "2+2 = <<2+2=4>>4.\n#### 4"},
    ),
    "question/answer with code": (
        {"question": "Hi", "answer": "y = (a << 1) | (b >> 3); template<<T>>, <<2*500=1000>>1,000"},
        "question/answer",
        {
            "messages": [HI, said("assistant", "y = (a << 1) | (b >> 3); template<<T>>, 1,000")],
            "answer": "y = (a << 1) | (b >> 3); template<<T>>, <<2*500=1000>>1,000",
        },
    ),
    "preference with a prompt": (
        {"prompt": "Hi", "chosen": "Hello", "rejected": "Bye", "score": 2},
        "preference with a prompt",
        {"prompt": [HI], "chosen": [HELLO], "rejected": [BYE], "score": 2},
    ),
    "preference of messages": (
        {"prompt": [SYSTEM, HI], "chosen": [HELLO], "rejected": [BYE], "tools": [WEATHER]},
        "preference with a prompt",
        {"prompt": [SYSTEM, HI], "chosen": [HELLO], "rejected": [BYE], "tools": TOOLS},
    ),
    "preference that repeats the prompt": (
        {"prompt": "Hi", "chosen": [HI, HELLO], "rejected": [HI, BYE], "messages": [HI, HELLO]},
        "preference with a prompt",
        {"prompt": [HI], "chosen": [HELLO], "rejected": [BYE]},
    ),
    "preference whose prompt is a transcript": (
        {
            "prompt": "\n\nHuman: Hi\n\nAssistant: What?\n\nHuman: Go on\n\nAssistant:",
            "chosen": "Hello",
            "rejected": "Bye",
        },
        "preference with a prompt",
        {"prompt": [HI, *MORE], "chosen": [HELLO], "rejected": [BYE]},
    ),
    "preference with a conversation": (
        {"conversations": [human], "chosen": gpt, "rejected": {"from": "gpt", "value": "Bye"}, "system": "Be kind."},
        "preference with a conversation",
        {"prompt": [SYSTEM, HI], "chosen": [HELLO], "rejected": [BYE]},
    ),
    "preference with a conversation of role/content": (
        {"messages": [HI], "chosen": HELLO, "rejected": BYE},
        "preference with a conversation",
        {"prompt": [HI], "chosen": [HELLO], "rejected": [BYE]},
    ),
    "preference with an instruction": (
        {"instruction": "Hi", "input": "", "chosen": "Hello", "rejected": "Bye"},
        "preference with an instruction",
        {"prompt": [HI], "chosen": [HELLO], "rejected": [BYE]},
    ),
    "transcripts": (
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: What?\n\nHuman: Go on\n\nAssistant: Hello",
            "rejected": "\n\nHuman: Hi\n\nAssistant: What?\n\nHuman: Go on\n\nAssistant: Bye",
        },
        "preference, transcripts",
        {"prompt": [HI, *MORE], "chosen": [HELLO], "rejected": [BYE]},
    ),
    "whole conversations": (
        {"chosen": [SYSTEM, HI, *MORE, HELLO], "rejected": [SYSTEM, HI, *MORE, BYE]},
        "preference, conversations",
        {"prompt": [SYSTEM, HI, *MORE], "chosen": [HELLO], "rejected": [BYE]},
    ),
    "unpaired": (
        {"prompt": "Hi", "completion": "Hello", "label": False},
        "unpaired preference",
        {"prompt": [HI], "completion": [HELLO], "label": False},
    ),
    "unpaired, a label out of csv": (
        {"prompt": "Hi", "completion": "Hello", "label": "True"},
        "unpaired preference",
        {"prompt": [HI], "completion": [HELLO], "label": True},
    ),
    "unpaired, a label of 0": (
        {"prompt": "Hi", "completion": "Hello", "label": 0},
        "unpaired preference",
        {"prompt": [HI], "completion": [HELLO], "label": False},
    ),
    "unpaired, a label of 1 out of csv": (
        {"prompt": "Hi", "completion": "Hello", "label": "1"},
        "unpaired preference",
        {"prompt": [HI], "completion": [HELLO], "label": True},
    ),
    "prompt/completion, no label in its cell": (
        {"prompt": "Hi", "completion": "Hello", "label": ""},
        "prompt/completion",
        {"messages": [HI, HELLO]},
    ),
    "messages of a class": ({"messages": [HI, HELLO], "label": 1}, "messages", {"messages": [HI, HELLO]}),
    "unpaired conversation": (
        {"messages": [HI, *MORE, HELLO], "label": True},
        "unpaired preference, conversation",
        {"prompt": [HI, *MORE], "completion": [HELLO], "label": True},
    ),
    "prompt": (
        {"prompt": "Hi", "answer": 4},
        "prompt",
        {"prompt": [HI], "reference": [said("assistant", "4")], "answer": 4},
    ),
}


@pytest.mark.parametrize(("row", "form", "canonical"), ROWS.values(), ids=ROWS)
def test_a_form_is_recognised_and_converted_without_loss(row, form, canonical):
    found = recognise(row)
    assert found.name == form
    assert found.convert(row) == canonical
    assert kind_of(canonical) == found.gives
    assert row_problem(canonical) is None


@pytest.mark.parametrize("canonical", [canonical for _, _, canonical in ROWS.values()], ids=ROWS)
def test_a_canonical_row_converts_to_itself(canonical):
    assert recognise(canonical).convert(canonical) == canonical


def test_every_form_of_the_table_is_tried():
    assert {form for _, form, _ in ROWS.values()} == {form.name for form in FORMS}


UNFIT = {
    "no `output`": ({"instruction": "Hi", "output": "x"}, {"instruction": "Hi", "output": None}),
    "expected text, found int": ({"text": "x"}, {"text": 3}),
    "expected `weight` of an assistant's turn as 0 or 1": (
        {"messages": [HI]},
        {"messages": [HI, {**HELLO, "weight": 0.5}]},
    ),
    "expected `train` of an assistant's turn as true or false": (
        {"messages": [HI]},
        {"messages": [HI, {**HELLO, "train": "no"}]},
    ),
    "a tool's result for no call before it": (
        {"messages": [HI]},
        {"messages": [HI, BOTH, said("tool", "1", tool_call_id="a"), said("tool", "2", tool_call_id="c"), HELLO]},
    ),
    "expected a list of turns or its JSON text, found other text": (
        {"messages": [HI]},
        {"messages": "[{'role': 'user', 'content': 'Hi'}]"},
    ),
    "half of a surrogate pair in a text": ({"text": "x"}, {"text": "\ud800"}),
    "malformed tool call JSON": (
        {"conversations": [human, gpt]},
        {"conversations": [human, {"from": "function_call", "value": '{"name": "a", "arguments": {'}]},
    ),
    "a tool call without a name": (
        {"conversations": [human, gpt]},
        {"conversations": [human, {"from": "function_call", "value": '{"arguments": {}}'}]},
    ),
    "expected a tool call's arguments as an object or text, found list": (
        {"messages": [HI]},
        {"messages": [HI, calling(call("a", [1]))]},
    ),
    "malformed tools JSON": ({"messages": [HI]}, {"messages": [HI, HELLO], "tools": "[{"}),
    "a tool without a name": ({"messages": [HI]}, {"messages": [HI, HELLO], "tools": [{"parameters": {}}]}),
    "expected text, found a content part of type `image_url`": (
        {"messages": [HI]},
        {"messages": [said("user", [{"type": "image_url", "image_url": "x"}]), HELLO]},
    ),
    "expected a turn with role and content, found str": ({"messages": [HI]}, {"messages": ["Hi", "Hello"]}),
    "`chosen` neither starts with the assistant nor repeats the prompt": (
        {"prompt": "Hi", "chosen": "a", "rejected": "b"},
        {"prompt": "Hi", "chosen": [said("user", "Other"), HELLO], "rejected": [HI, BYE]},
    ),
    "`label` is neither true nor false": (
        {"prompt": "Hi", "completion": "a", "label": True},
        {"prompt": "Hi", "completion": "a", "label": "perhaps"},
    ),
    "expected `history` as pairs of instruction and output": (
        {"instruction": "Hi", "output": "a"},
        {"instruction": "Hi", "output": "a", "history": ["Hi", "Hello"]},
    ),
}


@pytest.mark.parametrize("reason", UNFIT)
def test_a_row_that_does_not_fit_its_form_says_why(reason):
    first, unfit = UNFIT[reason]
    with pytest.raises(RowProblem) as problem:
        recognise(first).convert(unfit)
    assert problem.value.reason == reason


UNSOUND = {
    "empty text": {"text": " \n"},
    "empty assistant turn": {"messages": [HI, said("assistant", " ")]},
    "empty user turn": {"messages": [said("user", ""), HELLO]},
    "unknown role `critic`, expected system, user, assistant or tool": {"messages": [HI, said("critic", "Bad")]},
    "starts with assistant": {"messages": [HELLO, HI, HELLO]},
    "roles out of order: user after user": {"messages": [HI, HI, HELLO]},
    "roles out of order: system after user": {"messages": [HI, SYSTEM, HELLO]},
    "roles out of order: system after system": {"messages": [SYSTEM, SYSTEM, HI, HELLO]},
    "roles out of order: tool after assistant": {"messages": [HI, HELLO, said("tool", "4")]},
    "roles out of order: user after tool call": {"messages": [HI, calling(call("a", {})), HI, HELLO]},
    "does not end with assistant": {"messages": [HI, HELLO, HI]},
    "does not end with user or tool": {"prompt": [HI, HELLO]},
    "`chosen` equals `rejected`": {"prompt": [HI], "chosen": [HELLO], "rejected": [HELLO]},
    "`chosen` does not start with the assistant": {"prompt": [HI], "chosen": [HI, HELLO], "rejected": [BYE]},
    "a user turn inside `rejected`": {"prompt": [HI], "chosen": [HELLO], "rejected": [BYE, HI, BYE]},
    "a turn of weight 0 inside `chosen`, which is compared whole": {
        "prompt": [HI],
        "chosen": [{**HELLO, "weight": 0}],
        "rejected": [BYE],
    },
    "roles out of order: assistant after assistant": {"prompt": [HI, HELLO], "chosen": [HELLO], "rejected": [BYE]},
    "`completion` does not start with the assistant": {"prompt": [HI], "completion": [], "label": True},
}


@pytest.mark.parametrize("problem", UNSOUND)
def test_an_unsound_row_says_why(problem):
    assert row_problem(UNSOUND[problem]) == problem


def test_two_equal_transcripts_are_a_pair_of_equal_answers():
    same = "\n\nHuman: Hi\n\nAssistant: Hello"
    row = recognise({"chosen": same, "rejected": same}).convert({"chosen": same, "rejected": same})
    assert row == {"prompt": [HI], "chosen": [HELLO], "rejected": [HELLO]}
    assert row_problem(row) == "`chosen` equals `rejected`"


def test_an_assistant_that_calls_two_tools_and_answers_is_sound():
    calls = calling(call("a", {}), call("b", {}))
    assert row_problem({"messages": [SYSTEM, HI, calls, said("tool", "1"), said("tool", "2"), HELLO]}) is None


def test_unknown_rows_are_refused_with_the_keys_found_and_the_forms_known():
    with pytest.raises(UserError) as error:
        recognise_source([{"premise": "a", "hypothesis": "b"}, {"gold": 1}], "nli.jsonl")
    message = str(error.value)
    assert message.startswith("nli.jsonl: rows in no known form. Keys found: premise, hypothesis, gold.")
    assert "Rename the columns to those of a form:" in message
    assert "alpaca: instruction, output" in message
    assert all(f"\n  {form.name}: " in message for form in FORMS)


def test_the_form_of_most_first_rows_is_the_source_s():
    rows = [{"text": "a"}, {"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    assert recognise_source(rows, "x.jsonl").name == "prompt/completion"


def test_rows_are_used_as_another_form_where_that_is_defined():
    pair = {"prompt": [SYSTEM, HI], "chosen": [HELLO], "rejected": [BYE], "tools": TOOLS, "kind": "greeting"}
    assert as_form(pair, "messages") == {"messages": [SYSTEM, HI, HELLO], "tools": TOOLS, "kind": "greeting"}
    asked = {"prompt": [SYSTEM, HI], "reference": [HELLO], "tools": TOOLS, "kind": "greeting"}
    assert as_form(pair, "prompt") == asked
    talk = {"messages": [SYSTEM, HI, calling(call("a", {})), said("tool", "4"), HELLO], "answer": "4"}
    assert as_form(talk, "prompt") == {"prompt": [SYSTEM, HI], "reference": talk["messages"][2:], "answer": "4"}
    assert as_form(talk, "messages") == talk


@pytest.mark.parametrize(
    ("row", "wanted"),
    [({"messages": [HI, HELLO]}, "text"), ({"text": "a"}, "messages"), ({"messages": [HI, HELLO]}, "preference")],
)
def test_rows_are_not_used_as_a_form_that_is_not_defined(row, wanted):
    with pytest.raises(UserError, match=f"not as `{wanted}`"):
        as_form(row, wanted)


@pytest.mark.parametrize(
    "said", ["<<1/2=.5>>0.5", "<<4*.5=2.0>>2", "<<10*100=1,000>>1,000", "<<2*3=6>>$6", "<<5+x=6>> 6"]
)
def test_gsm8k_s_calculations_go(said):
    row = {"question": "Hi", "answer": f"So {said} it is."}
    assert recognise(row).convert(row)["messages"][1]["content"] == f"So {said.partition('>>')[2]} it is."


def test_other_columns_are_left_alone():
    values = {"prompt": "Hi", "ground_truth": ["4", "four"]}
    assert recognise(values).convert(values) == {"prompt": [HI], "ground_truth": ["4", "four"]}
    row = {"prompt": "Hi", "completion": "Hello", "label": "greeting"}
    assert recognise(row).gives == "messages"
    empty = {"role": "assistant", "content": "Hello", "function_call": {"name": None, "arguments": None}}
    assert messages_of([HI, empty]) == [HI, HELLO]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}
    called = [HI, {"role": "assistant", "content": "", "tool_calls": [call]}]
    told = messages_of([*called, {"role": "tool", "content": "4", "tool_call_id": "f"}])
    assert told[-1]["content"] == "4"
