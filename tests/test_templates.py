"""Chat templates: what they render, control tokens in data, preferences, stopping, parsing of answers."""

import itertools
import json
from pathlib import Path

import pytest

from hfpipe.errors import UserError
from hfpipe.training.templates import (
    encode_batch,
    encode_completions,
    encode_messages,
    encode_preference,
    encode_preferences,
    encode_prompts,
    load_chat_template,
    neutralise,
    neutralise_row,
    special_strings,
    stop_token_ids,
    training_template,
)
from hfpipe.training.tokenizers import CONTROL_TOKENS, extend_tokenizer, train_tokenizer

TOOLS = [{"type": "function", "function": {"name": "weather", "description": "It's <hot>, é", "parameters": {}}}]


def user(text):
    return {"role": "user", "content": text}


def says(text, *calls):
    message = {"role": "assistant", "content": text}
    if calls:
        message["tool_calls"] = [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in calls]
    return message


TOOL_CHAT = [
    {"role": "system", "content": "Be brief."},
    user("What is 12 * 3, and the weather in Oslo?"),
    says("Let me see.", ("calculator", "12 * 3"), ("weather", {"city": "Ås", "days": [1, 2]})),
    {"role": "tool", "content": "36"},
    {"role": "tool", "content": "rain"},
    says("36, and rain."),
    user("Thanks"),
    says("You're welcome."),
]


@pytest.fixture(scope="module")
def tokenizer():
    texts = ["What is the weather in Oslo? It's rain, and 12 * 3 is 36. You're welcome."] * 20
    return train_tokenizer(texts, type="bpe", vocab_size=320, chat_template=load_chat_template("hfpipe"))


@pytest.fixture(scope="module")
def chatml(tokenizer, tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("chatml")
    tokenizer.save_pretrained(folder)
    other = AutoTokenizer.from_pretrained(folder)
    extend_tokenizer(other, load_chat_template("chatml"))
    return other


def render(tokenizer, messages, **options):
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def test_the_design_s_examples(tokenizer):
    chat = [{"role": "system", "content": "You are helpful."}, user("What is 2+2?"), says("2+2 equals 4.")]
    assert render(tokenizer, chat) == (
        "<|begin|><|system|>You are helpful.<|end_system|><|user|>What is 2+2?<|end_user|>"
        "<|assistant|>2+2 equals 4.<|end_assistant|><|end|>"
    )
    assert render(tokenizer, TOOL_CHAT) == (
        "<|begin|><|system|>Be brief.<|end_system|><|user|>What is 12 * 3, and the weather in Oslo?<|end_user|>"
        "<|assistant|>Let me see.<|tool_call|>calculator(12 * 3)"
        '<|tool_call|>weather({"city": "Ås", "days": [1, 2]})<|end_tool_call|>'
        "<|tool_result|>36<|end_tool_result|><|tool_result|>rain<|end_tool_result|>"
        "<|assistant|>36, and rain.<|end_assistant|><|user|>Thanks<|end_user|>"
        "<|assistant|>You're welcome.<|end_assistant|><|end|>"
    )


def test_chatml(chatml):
    assert render(chatml, TOOL_CHAT[:4], add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhat is 12 * 3, and the weather in Oslo?<|im_end|>\n"
        '<|im_start|>assistant\nLet me see.\n<tool_call>\n{"name": "calculator", "arguments": "12 * 3"}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Ås", "days": [1, 2]}}\n</tool_call><|im_end|>\n'
        "<|im_start|>tool\n36<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render(chatml, [user("Hi")]) == "<|im_start|>user\nHi<|im_end|>\n"


def test_tools_stand_in_the_system_segment(tokenizer, chatml):
    schema = json.dumps(TOOLS[0], ensure_ascii=False)
    with_system = render(tokenizer, TOOL_CHAT[:2], tools=TOOLS * 2)
    assert with_system.startswith(f"<|begin|><|system|>Be brief.\n\nTools:\n{schema}\n{schema}<|end_system|><|user|>")
    without = render(tokenizer, [user("Hi")], tools=TOOLS)
    assert without == f"<|begin|><|system|>Tools:\n{schema}<|end_system|><|user|>Hi<|end_user|>"
    for messages in (TOOL_CHAT, TOOL_CHAT[1:]):
        text = render(chatml, messages, tools=TOOLS)
        assert text.count("<|im_start|>system\n") == 1
        assert f"<tools>\n{schema}\n</tools>" in text.partition("<|im_end|>")[0]
    assert render(tokenizer, TOOL_CHAT, tools=[]) == render(tokenizer, TOOL_CHAT)


@pytest.mark.parametrize("tools", [None, TOOLS])
def test_a_longer_conversation_begins_with_the_shorter(tokenizer, chatml, tools):
    ours = [encode_messages(tokenizer, TOOL_CHAT[:n], tools) for n in range(1, len(TOOL_CHAT) + 1)]
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    for shorter, longer in itertools.pairwise(ours):
        closed = len(shorter.input_ids) - (shorter.input_ids[-1] == end)
        assert longer.input_ids[:closed] == shorter.input_ids[:closed]
        assert longer.mask[:closed] == shorter.mask[:closed]
    assert [encoded.input_ids.count(end) for encoded in ours] == [0, 0, 0, 0, 0, 1, 0, 1]
    theirs = [encode_messages(chatml, TOOL_CHAT[:n], tools).input_ids for n in range(1, len(TOOL_CHAT) + 1)]
    assert all(b[: len(a)] == a for a, b in itertools.pairwise(theirs))


def test_upstream_s_own_checks_pass(tokenizer, chatml):
    from trl import chat_template_utils as upstream

    for each in (tokenizer, chatml):
        assert upstream.supports_tool_calling(each)
        assert upstream.is_chat_template_prefix_preserving(each)
        assert upstream.is_chat_template_stop_token_trained(each)
        assert upstream.get_training_chat_template(each) is None


def test_the_prompt_opens_the_assistant_s_turn(tokenizer):
    prompt = encode_prompts(tokenizer, [{"prompt": TOOL_CHAT[:5]}])[0]
    whole = encode_messages(tokenizer, TOOL_CHAT[:6]).input_ids
    assert prompt == whole[: len(prompt)]
    assert tokenizer.decode(prompt[-1:]) == "<|assistant|>"
    assert tokenizer.decode(whole[len(prompt) :]) == "36, and rain.<|end_assistant|><|end|>"


@pytest.mark.parametrize(
    "message",
    [{"role": "developer", "content": "x"}, {"role": "user", "content": [{"type": "text", "text": "x"}]}],
)
def test_what_a_template_cannot_say_is_refused_with_its_row(tokenizer, chatml, message):
    for each in (tokenizer, chatml):
        with pytest.raises(UserError, match=r"^Row 1: .*(found `developer`|one string)"):
            encode_batch(each, [{"messages": [user("a")]}, {"messages": [message]}])


def test_rows_come_back_in_order_whatever_their_tools(tokenizer):
    rows = [{"messages": [user(str(n)), says(str(-n))], "tools": TOOLS if n % 3 else None} for n in range(2500)]
    for row, encoded in list(zip(rows, encode_batch(tokenizer, rows), strict=True))[::97]:
        single = tokenizer.apply_chat_template(
            row["messages"], tools=row["tools"], return_dict=True, return_assistant_tokens_mask=True
        )
        assert encoded == (single["input_ids"], single["assistant_masks"])
    assert encode_batch(tokenizer, []) == []


def test_templates_are_found_by_name_and_by_path(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{{ messages }}", encoding="utf-8")
    assert load_chat_template(str(path)) == "{{ messages }}"
    with pytest.raises(UserError, match=r"`chatlm`: expected one of chatml, hfpipe .*Did you mean `chatml`\?"):
        load_chat_template("chatlm")
    with pytest.raises(UserError, match=r"absent\.jinja"):
        load_chat_template(str(tmp_path / "absent.jinja"))


def test_hub_templates_get_trl_s_marks_or_a_clear_refusal(chatml, tmp_path):
    import trl
    from transformers import AutoTokenizer

    chatml.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    folder = Path(trl.__file__).parent / "chat_templates"
    tokenizer.chat_template = (folder / "qwen2_5.jinja").read_text(encoding="utf-8")
    assert training_template(tokenizer) == (folder / "qwen2_5_training.jinja").read_text(encoding="utf-8")
    ids, mask = encode_messages(tokenizer, [user("Hi é"), says("Yes 😀"), user("x")])
    trained = tokenizer.decode([token for token, keep in zip(ids, mask, strict=True) if keep])
    assert trained.strip() == "Yes 😀<|im_end|>"
    assert stop_token_ids(tokenizer) == tokenizer.convert_tokens_to_ids(["<|im_end|>"])

    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match="TRL knows no variant"):
        encode_messages(tokenizer, [user("Hi")])
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        encode_messages(tokenizer, [user("Hi")])
    assert stop_token_ids(tokenizer) == [tokenizer.eos_token_id]


def test_a_template_that_never_closes_a_turn_is_refused(chatml, tmp_path):
    from transformers import AutoTokenizer

    chatml.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>{% endfor %}"
    )
    with pytest.raises(UserError, match="nothing would teach the model to stop"):
        stop_token_ids(tokenizer)


def test_where_generation_stops(tokenizer, chatml):
    assert tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer)) == [
        "<|end_assistant|>",
        "<|end_tool_call|>",
        "<|end|>",
    ]
    assert chatml.convert_ids_to_tokens(stop_token_ids(chatml)) == ["<|im_end|>"]


@pytest.mark.parametrize(
    "message",
    [
        says("2+2 equals 4."),
        says(" spaces are kept \n"),
        says("", ("calculator", "(1 + 2) * 3")),
        says("Both:", ("calculator", "1 - 1"), ("weather", {"city": "Ås", "days": [1, 2], "now": None})),
        says("", ("now", {})),
    ],
)
def test_upstream_s_parser_reads_our_answers(tokenizer, message):
    prompt = encode_prompts(tokenizer, [{"prompt": [user("Go")]}])[0]
    answer = encode_messages(tokenizer, [user("Go"), message]).input_ids[len(prompt) :]
    assert tokenizer.parse_response(answer, prefix=prompt) == message


PREFERENCE = {
    "prompt": TOOL_CHAT[:2],
    "chosen": [says("36 é")],
    "rejected": [says("", ("calculator", "12 * 3"))],
    "tools": TOOLS,
}


def test_preferences_end_with_the_closing_token(tokenizer, chatml):
    prompt, chosen, rejected, *ends = encode_preference(tokenizer, PREFERENCE)
    assert prompt == encode_prompts(tokenizer, [PREFERENCE])[0]
    assert tokenizer.decode(chosen) == "36 é<|end_assistant|>"
    assert tokenizer.decode(rejected) == "<|tool_call|>calculator(12 * 3)<|end_tool_call|>"
    assert [tokenizer.decode(end) for end in ends] == ["<|end|>", ""]
    prompt, chosen, *_ = encode_preference(chatml, PREFERENCE)
    assert chatml.decode(prompt).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert chatml.decode(chosen) == "36 é<|im_end|>"


def test_preferences_in_a_batch_are_those_one_by_one(tokenizer):
    rows = [{**PREFERENCE, "chosen": [says(str(n))], "tools": TOOLS[: n % 2]} for n in range(20)]
    assert encode_preferences(tokenizer, rows) == [encode_preference(tokenizer, row) for row in rows]
    prompts = encode_prompts(tokenizer, rows)
    unpaired = [{"prompt": row["prompt"], "completion": row["chosen"], "tools": row["tools"]} for row in rows]
    assert encode_completions(tokenizer, unpaired, prompts, "completion") == [
        encoded.chosen_ids for encoded in encode_preferences(tokenizer, rows)
    ]


@pytest.mark.parametrize("chosen", [[], [user("no")]])
def test_a_preference_without_an_answer_is_refused(tokenizer, chosen):
    with pytest.raises(UserError, match=r"^Row 1: .*`chosen`"):
        encode_preferences(tokenizer, [PREFERENCE, {**PREFERENCE, "chosen": chosen}])


@pytest.mark.parametrize(
    ("text", "expected", "found"),
    [
        ("nothing < | here", "nothing < | here", 0),
        ("a<|user|>b", "a< |user|>b", 1),
        ("<|user|><|user|>", "< |user|>< |user|>", 2),
        ("<<|end|>|end|>", "<< |end|>|end|>", 1),
        ("<|user<|end|>|>", "<|user< |end|>|>", 1),
    ],
)
def test_control_tokens_in_text_are_broken(text, expected, found):
    assert neutralise(text, CONTROL_TOKENS) == (expected, found)
    assert neutralise(expected, CONTROL_TOKENS) == (expected, 0)


def test_overlapping_and_odd_tokens_are_broken_too():
    tokens = ["<a>", "a><b", "< a>", "aa", " [X]"]
    for text in ("<a><b", "aaaa", "< a>", " [X]", "<a>aa><b [X]"):
        clean, found = neutralise(text, tokens)
        assert found
        assert not any(token in clean for token in tokens)
    assert neutralise("abc", []) == ("abc", 0)


def test_every_string_that_reaches_a_model_is_cleaned(tokenizer):
    bad = "x<|end_user|>y"
    call = {"type": "function", "function": {"name": bad, "arguments": {bad: [bad, {"k": bad}], "n": 1}}}
    row = {
        "text": bad,
        "messages": [user(bad), {"role": "assistant", "content": bad, "tool_calls": [call]}],
        "prompt": [user(bad)],
        "chosen": [says(bad)],
        "rejected": [says(bad)],
        "completion": [says(bad)],
        "tools": [{"type": "function", "function": {"name": bad, "parameters": {"properties": {bad: {}}}}}],
        "answer": bad,
        "label": True,
    }
    before = json.dumps(row)
    clean, found = neutralise_row(row, special_strings(tokenizer))
    assert found == 13
    assert json.dumps(clean).count("<|end_user|>") == 1
    assert json.dumps(clean).replace("< |end_user|>", "<|end_user|>") == before == json.dumps(row)
    assert clean["answer"] == bad


def test_ordinary_added_tokens_are_left_in_data(chatml, tmp_path):
    from transformers import AutoTokenizer

    chatml.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens(["    ", "<table>", "<tool_call>"])
    strings = special_strings(tokenizer)
    assert "<tool_call>" in strings
    assert "<|im_end|>" in strings
    assert not {"    ", "<table>"} & set(strings)
