"""Several tool calls in a turn: rendered, masked, parsed back by plain transformers, learnt by Hub models and carried out."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfpipe.evaluation.answers import Question, answer_all
from hfpipe.training.templates import encode_messages, encode_prompts, load_chat_template, neutralise_row
from hfpipe.training.tokenizers import SPECIAL_TOKENS, extend_tokenizer, train_tokenizer

from .conftest import hfpipe

TEXTS = ["What is 12 * 3, and 4 + 5? They are 36 and 9. The weather in Oslo is nice."] * 20


def user(text):
    return {"role": "user", "content": text}


def says(text, *calls):
    message = {"role": "assistant", "content": text}
    told = [{"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    return message | ({"tool_calls": told} if told else {})


@pytest.fixture(scope="module", params=["hfpipe", "chatml"])
def tokenizer(request, tmp_path_factory):
    """Saved and loaded again by plain transformers."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp(request.param)
    made = train_tokenizer(TEXTS, type="bpe", vocab_size=320, chat_template=load_chat_template("hfpipe"))
    if request.param == "chatml":
        extend_tokenizer(made, load_chat_template("chatml"))
    made.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


# --- the mask ---

SCHEMA = {"type": "function", "function": {"name": "calculator", "parameters": {"type": "object", "properties": {}}}}
TWO_CALLS = [
    user("Go"),
    says("So:", ("calculator", "1 + 2"), ("calculator", {"expression": "4"})),
    {"role": "tool", "content": "3"},
    {"role": "tool", "content": "4"},
    says("3, 4"),
]
OURS = [  # in order: text, and whether it is trained
    ("<|begin|>", 0), ("<|system|>", 0), ("Tools:\n" + json.dumps(SCHEMA), 0), ("<|end_system|>", 0),
    ("<|user|>", 0), ("Go", 0), ("<|end_user|>", 0),
    ("<|assistant|>", 1), ("So:", 1),
    ("<|tool_call|>", 1), ("calculator(1 + 2)", 1),
    ("<|tool_call|>", 1), ('calculator({"expression": "4"})', 1), ("<|end_tool_call|>", 1),
    ("<|tool_result|>", 0), ("3", 0), ("<|end_tool_result|>", 0),
    ("<|tool_result|>", 0), ("4", 0), ("<|end_tool_result|>", 0),
    ("<|assistant|>", 1), ("3, 4", 1), ("<|end_assistant|>", 1), ("<|end|>", 0),
]  # fmt: skip


def test_two_calls_and_two_results_token_by_token():
    tokenizer = train_tokenizer(TEXTS, type="bpe", vocab_size=320, chat_template=load_chat_template("hfpipe"))
    ids, mask = [], []
    for text, trained in OURS:
        own = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(own) == 1 or text not in SPECIAL_TOKENS
        ids, mask = ids + own, mask + [trained] * len(own)
    assert encode_messages(tokenizer, TWO_CALLS, [SCHEMA]) == (ids, mask)
    # Generation that stops at the first of its stop tokens has written both calls.
    written = tokenizer.decode([i for i, trained in zip(ids, mask, strict=True) if trained])
    assert written.partition("<|end_tool_call|>")[0].count("<|tool_call|>") == 2


def test_a_function_of_python_is_declared_by_its_schema(tokenizer):
    """As TRL and `apply_chat_template(tools=...)` give them."""
    from transformers.utils import get_json_schema

    def add(a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: one of them
            b: the other
        """
        return a + b

    rendered = tokenizer.apply_chat_template([user("Go")], tools=[add], tokenize=False)
    assert json.dumps(get_json_schema(add)) in rendered
    answer = says("", ("add", {"a": 1, "b": 2}))
    assert parsed(tokenizer, answer, tools=[get_json_schema(add)]) == answer


# --- the round trip ---


def parsed(tokenizer, message, tools=None):
    """What upstream makes of the tokens that the template gives a message."""
    prompt = encode_prompts(tokenizer, [{"prompt": [user("Go")], "tools": tools}])[0]
    ids = encode_messages(tokenizer, [user("Go"), message], tools).input_ids
    assert ids[: len(prompt)] == prompt
    from_ids = tokenizer.parse_response(ids[len(prompt) :], prefix=prompt, tools=tools)
    text = tokenizer.decode(ids[len(prompt) :])
    assert tokenizer.parse_response(text, prefix=tokenizer.decode(prompt), tools=tools) == from_ids
    return from_ids


def is_json(text):
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


PARTS = st.sampled_from(
    [
        "(",
        ")",
        ")(",
        "\n",
        " ",
        '"',
        "\\",
        "{",
        "}",
        "é",
        "😀",
        "12 * 3",
        "calculator(",
        "</s>",
        "<|",
        "|>",
        *SPECIAL_TOKENS,
    ]
)
TEXT = st.lists(PARTS | st.text(st.characters(codec="utf-8"), max_size=6), max_size=6).map("".join)
NAMES = st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_.-]{0,12}", fullmatch=True)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
ARGUMENTS = TEXT.filter(lambda text: not is_json(text)) | st.dictionaries(TEXT, JSON, max_size=3)
CALLS = st.lists(st.tuples(NAMES, ARGUMENTS), max_size=4)


@given(text=TEXT, calls=CALLS)
@settings(max_examples=100, deadline=None)
def test_what_a_message_says_comes_back(tokenizer, text, calls):
    # As rows are read: no text spells a control token.
    row, _ = neutralise_row({"messages": [says(text, *calls)]}, (*SPECIAL_TOKENS, "<|im_start|>", "<|im_end|>"))
    (message,) = row["messages"]
    assert parsed(tokenizer, message) == message


# --- models of the Hub without control tokens ---

QUESTION = "What is 12 * 3, and 4 + 5?"
ANSWER = "They are 36 and 9."
TALK = [
    user(QUESTION),
    says("", ("calculator", "12 * 3"), ("calculator", {"expression": "4 + 5"})),
    {"role": "tool", "content": "36"},
    {"role": "tool", "content": "9"},
    says(ANSWER),
]
MIDTRAIN = """
stage: midtrain
model: {{from: {folder}}}
tokenizer: {{chat_template: hfpipe}}
data: {{train: [{{path: {data}, split: all}}]}}
trainer: {{learning_rate: 5.0e-3, max_steps: 60, per_device_train_batch_size: 2, max_length: 256, save_strategy: "no",
  activation_checkpointing: false}}
"""


def write_hub_model(folder, kind):
    """A model with random weights and a byte-level tokenizer that knows one special token; GPT-2's has spare rows."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    shapes = {
        "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 256, "vocab_size": len(tokenizer) + 40},
        "qwen3": {
            "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
            "intermediate_size": 128, "vocab_size": len(tokenizer), "tie_word_embeddings": False,
        },
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **shapes[kind], eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def calling(tmp_path_factory):
    """A run's folder with two models of the Hub that have learnt one conversation by heart."""
    folder = tmp_path_factory.mktemp("calling")
    (folder / "talk.jsonl").write_text(json.dumps({"messages": TALK}) + "\n")
    (folder / "pipeline.yaml").write_text("name: calls\nstages: [gpt2, qwen3]\nevaluate: {samples: 0}\n")
    for kind in ("gpt2", "qwen3"):
        write_hub_model(folder / "hub" / kind, kind)
        stage = MIDTRAIN.format(folder=folder / "hub" / kind, data=folder / "talk.jsonl")
        (folder / f"{kind}.yaml").write_text(stage)
    hfpipe("run", folder, "--out", folder / "run")
    return folder / "run"


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_a_hub_model_learns_to_call_twice_in_a_turn(calling, kind):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hfpipe import load_model

    folder = calling / kind
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer.apply_chat_template([user(QUESTION)], add_generation_prompt=True, return_tensors="pt")["input_ids"]
    written = model.generate(ids, max_new_tokens=80, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.parse_response(written, prefix=ids[0]) == TALK[1]

    answer = load_model(str(folder)).chat(QUESTION, max_new_tokens=80)
    assert str(answer) == ANSWER
    # The same where a scorecard's questions are asked: both calls are carried out, in their order.
    (told,) = answer_all(model, tokenizer, [Question([user(QUESTION)])], max_new_tokens=80)
    assert told.messages[:3] == [TALK[1], *({**m, "name": "calculator"} for m in TALK[2:4])]
    assert told.stopped
    assert told.text == ANSWER
