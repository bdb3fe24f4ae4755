"""The loss mask, token by token: on the guide's diagrams and examples, and on conversations made at random."""

import copy
import itertools
import json
import random

import pytest

from hfpipe.errors import UserError
from hfpipe.training.templates import (
    encode_batch,
    encode_messages,
    load_chat_template,
    neutralise_row,
    special_strings,
)
from hfpipe.training.tokenizers import CONTROL_TOKENS, SPECIAL_TOKENS, extend_tokenizer, train_tokenizer

TEXTS = [
    "What is the weather like today? You can check the weather in your area.",
    "Hello! The answer is B) Jupiter. I can't help with that, é, 😀, and 1234 × 5678 = 7,006,652.",
] * 20


@pytest.fixture(scope="module", params=["bpe", "unigram", "wordpiece"])
def tokenizer(request):
    return train_tokenizer(TEXTS, type=request.param, vocab_size=350, chat_template=load_chat_template("hfpipe"))


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    tokenizer = train_tokenizer(TEXTS, type="bpe", vocab_size=350, chat_template=load_chat_template("hfpipe"))
    extend_tokenizer(tokenizer, load_chat_template("chatml"))
    return tokenizer


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def says(text, *calls):
    return {
        "role": "assistant",
        "content": text,
        "tool_calls": [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in calls],
    }


def result(text):
    return {"role": "tool", "content": text}


def spoken(message):
    """What an assistant's message puts on the page, with its opening and closing tokens."""
    text = "<|assistant|>" + message["content"]
    for call in message["tool_calls"]:
        arguments = call["function"]["arguments"]
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        text += f"<|tool_call|>{call['function']['name']}({arguments})"
    return text + ("<|end_tool_call|>" if message["tool_calls"] else "<|end_assistant|>")


def expected(messages, tools=None):
    """(text, trained) segments of a conversation, written down from the design and not from the template."""
    segments = [("<|begin|>", 0)]
    listed = "Tools:" + "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools or [])
    if tools and messages[0]["role"] != "system":
        segments.append((f"<|system|>{listed}<|end_system|>", 0))
    for number, message in enumerate(messages):
        content = message["content"]
        if message["role"] == "assistant":
            segments.append((spoken(message), message.get("weight", 1)))
            continue
        if message["role"] == "system" and tools and number == 0:
            content = f"{content}\n\n{listed}" if content else listed
        name = {"tool": "tool_result"}.get(message["role"], message["role"])
        segments.append((f"<|{name}|>{content}<|end_{name}|>", 0))
    if messages[-1]["role"] == "assistant" and not messages[-1]["tool_calls"]:
        segments.append(("<|end|>", 0))
    return segments


def tokens_of(tokenizer, segments):
    """Ids and mask of segments, each encoded by itself: the control tokens at their borders keep them apart."""
    ids, mask = [], []
    for text, trained in segments:
        piece = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += piece
        mask += [trained] * len(piece)
    return ids, mask


def guide(text):
    """The guide prints a segment to a line; the format puts nothing between them."""
    for token in CONTROL_TOKENS:
        text = text.replace(f">\n{token}", f">{token}")
    return text


DIAGRAMS = {
    "midtraining": (
        [user("What is 2+2?"), says("2+2 = 4")],
        [
            ("<|begin|>", 0),
            ("<|user|>", 0),
            ("What is 2+2?", 0),
            ("<|end_user|>", 0),
            ("<|assistant|>", 1),
            ("2+2 = 4", 1),
            ("<|end_assistant|>", 1),
            ("<|end|>", 0),
        ],
    ),
    "fine-tuning": (
        [system("You are helpful."), user("What is 2+2?"), says("2+2 equals 4.")],
        [
            ("<|begin|>", 0),
            ("<|system|>", 0),
            ("You are helpful.", 0),
            ("<|end_system|>", 0),
            ("<|user|>", 0),
            ("What is 2+2?", 0),
            ("<|end_user|>", 0),
            ("<|assistant|>", 1),
            ("2+2 equals 4.", 1),
            ("<|end_assistant|>", 1),
            ("<|end|>", 0),
        ],
    ),
}

EXAMPLES = {
    "dialogue": (
        [
            user("What is the weather like today?"),
            says(
                "I don't have access to real-time weather data. \n"
                "You can check weather.com for current conditions in your area."
            ),
        ],
        """<|begin|>
<|user|>What is the weather like today?<|end_user|>
[<|assistant|>I don't have access to real-time weather data. 
You can check weather.com for current conditions in your area.<|end_assistant|>]
<|end|>""",
    ),
    "tool use": (
        [
            user("What's 1234 multiplied by 5678?"),
            says("", ("calculator", "1234 * 5678")),
            result("7006652"),
            says("1234 × 5678 = 7,006,652"),
        ],
        """<|begin|>
<|user|>What's 1234 multiplied by 5678?<|end_user|>
[<|assistant|><|tool_call|>calculator(1234 * 5678)<|end_tool_call|>]
<|tool_result|>7006652<|end_tool_result|>
[<|assistant|>1234 × 5678 = 7,006,652<|end_assistant|>]
<|end|>""",
    ),
    "multiple choice": (
        [
            user("Which planet is largest?\nA) Earth\nB) Jupiter  \nC) Mars\nD) Venus"),
            says(
                "The answer is B) Jupiter. It's the largest \nplanet in our solar system with a diameter of about \n"
                "143,000 kilometers."
            ),
        ],
        """<|begin|>
<|user|>Which planet is largest?
A) Earth
B) Jupiter  
C) Mars
D) Venus<|end_user|>
[<|assistant|>The answer is B) Jupiter. It's the largest 
planet in our solar system with a diameter of about 
143,000 kilometers.<|end_assistant|>]
<|end|>""",
    ),
    "system instructions": (
        [
            system("You are a helpful assistant that speaks like a pirate."),
            user("Tell me about the ocean."),
            says("Arr matey! The seven seas be vast and deep, \nfilled with treasure and creatures of the deep..."),
        ],
        """<|begin|>
<|system|>You are a helpful assistant that speaks like a pirate.<|end_system|>
<|user|>Tell me about the ocean.<|end_user|>
[<|assistant|>Arr matey! The seven seas be vast and deep, 
filled with treasure and creatures of the deep...<|end_assistant|>]
<|end|>""",
    ),
}

COOKIES = """Here's a simple chocolate chip cookie recipe:

**Ingredients:**
- 2¼ cups all-purpose flour
- 1 cup butter, softened
- ¾ cup granulated sugar

**Instructions:**
1. Preheat oven to 375°F (190°C)
2. Mix butter and sugars until creamy

Makes about 5 dozen cookies. Enjoy!"""
REFUSAL = """I can't help with that. Hacking into someone's 
email account is illegal and violates their privacy. 

If you've lost access to your own email account, I'd be happy 
to guide you through the legitimate account recovery process 
with your email provider instead."""
UNCERTAIN = """I can't predict what the stock market will do 
next week with any certainty.

What I can tell you:
- Historical trends and patterns
- Resources for market analysis

Would any of that information be helpful?"""
CLARIFY = """I'd be happy to help you write a program! To 
create something useful, I need a bit more information:

1. What programming language do you want to use? (Python, 
   JavaScript, Java, etc.)
2. What should the program do?

Once I know more, I can write exactly what you need."""

FINE_TUNING = {
    "How do I bake chocolate chip cookies?": COOKIES,
    "How do I hack into someone's email account?": REFUSAL,
    "What will the stock market do next week?": UNCERTAIN,
    "Write me a program": CLARIFY,
}


def bracketed(text):
    """Segments of an example in which what the assistant says stands in square brackets, one segment to a line."""
    segments = []
    for part in text.replace("\n[", "[").replace("]\n", "]").split("["):
        trained, _, rest = part.rpartition("]")
        segments += [(guide(trained), 1), (guide(rest), 0)]
    return segments


@pytest.mark.parametrize("name", DIAGRAMS)
def test_the_guide_s_mask_diagrams(tokenizer, name):
    messages, segments = DIAGRAMS[name]
    assert encode_messages(tokenizer, messages) == tokens_of(tokenizer, segments)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_guide_s_midtraining_examples(tokenizer, name):
    messages, text = EXAMPLES[name]
    assert encode_messages(tokenizer, messages) == tokens_of(tokenizer, bracketed(text))


@pytest.mark.parametrize("question", FINE_TUNING)
def test_the_guide_s_fine_tuning_examples(tokenizer, question):
    answer = FINE_TUNING[question]
    segments = [
        (f"<|begin|><|user|>{question}<|end_user|>", 0),
        (f"<|assistant|>{answer}<|end_assistant|>", 1),
        ("<|end|>", 0),
    ]
    assert encode_messages(tokenizer, [user(question), says(answer)]) == tokens_of(tokenizer, segments)


WORDS = [
    "",
    " ",
    "yes",
    "What is",
    "1234",
    "é",
    "e\u0301",
    "日本",
    "👩‍👧",
    "\n\n",
    "\r\n",
    "\t",
    "\x00",
    '"',
    "\\",
    "½",
    "(",
    ")",
]
FORGERIES = [*SPECIAL_TOKENS, "<|im_start|>", "<|im_end|>", "<", "<|", "|>", ">", "user", "<|end_", "|", "< |user|>"]


def some_text(rng, words):
    return "".join(rng.choice(words) + rng.choice(["", " "]) for _ in range(rng.randrange(1, 12)))


def some_value(rng, words, depth=0):
    kinds = ["text", "number", "none"] + ["list", "map"] * (depth < 2)
    kind = rng.choice(kinds)
    if kind == "list":
        return [some_value(rng, words, depth + 1) for _ in range(rng.randrange(3))]
    if kind == "map":
        return {some_text(rng, words): some_value(rng, words, depth + 1) for _ in range(rng.randrange(3))}
    return {"text": some_text(rng, words), "number": rng.choice([1, -2.5, True]), "none": None}[kind]


def some_call(rng, words):
    name = "calculator" if rng.random() < 0.5 else some_text(rng, words)
    if rng.random() < 0.5:
        return name, some_text(rng, words)
    return name, {some_text(rng, words): some_value(rng, words) for _ in range(rng.randrange(3))}


def some_row(rng, words):
    """A conversation of one to four exchanges, with or without system message, tools, tool calls and a last answer."""
    messages = [system(some_text(rng, words))] if rng.random() < 0.4 else []
    for _ in range(rng.randrange(1, 5)):
        messages.append(user(some_text(rng, words)))
        while rng.random() < 0.3:
            calls = [some_call(rng, words) for _ in range(rng.randrange(1, 3))]
            messages.append(says(rng.choice(["", some_text(rng, words)]), *calls))
            messages += [result(some_text(rng, words)) for _ in calls]
        messages.append(says(some_text(rng, words)))
    if rng.random() < 0.2:
        messages.pop()
    row = {"messages": messages}
    if rng.random() < 0.3:
        schema = {"name": some_text(rng, words), "parameters": {some_text(rng, words): some_value(rng, words)}}
        row["tools"] = [{"type": "function", "function": schema}]
    return row


def test_a_thousand_conversations_token_by_token(tokenizer):
    rng = random.Random(0)
    rows = [some_row(rng, WORDS) for _ in range(1000)]
    roles = {message["role"] for row in rows for message in row["messages"]}
    assert roles == {"system", "user", "assistant", "tool"}
    for row, (ids, mask) in zip(rows, encode_batch(tokenizer, rows), strict=True):
        assert (ids, mask) == tokens_of(tokenizer, expected(row["messages"], row.get("tools")))
        trained = [token for token, keep in zip(ids, mask, strict=True) if keep]
        said = "".join(spoken(message) for message in row["messages"] if message["role"] == "assistant")
        assert tokenizer.decode(trained) == said


def structure(row):
    """How often each control token stands in a row of our format, whatever its texts are."""
    messages, counts = row["messages"], dict.fromkeys(SPECIAL_TOKENS, 0)
    counts["<|begin|>"] = 1
    own_system_segment = bool(row.get("tools")) and messages[0]["role"] != "system"
    for role, name in {"system": "system", "user": "user", "tool": "tool_result"}.items():
        number = sum(message["role"] == role for message in messages) + (role == "system" and own_system_segment)
        counts[f"<|{name}|>"] = counts[f"<|end_{name}|>"] = number
    for message in messages:
        if message["role"] == "assistant":
            counts["<|assistant|>"] += 1
            counts["<|end_assistant|>"] += not message["tool_calls"]
            counts["<|tool_call|>"] += len(message["tool_calls"])
            counts["<|end_tool_call|>"] += bool(message["tool_calls"])
    counts["<|end|>"] = int(messages[-1]["role"] == "assistant" and not messages[-1]["tool_calls"])
    return counts


def test_a_turn_of_weight_0_is_only_read(tokenizer):
    call = ("calculator", "1 + 2")
    talk = [
        user("1 + 2?"),
        says("", call),
        result("3"),
        says("3"),
        user("é?"),
        says("Yes, é."),
        user("Bye"),
        says("Bye"),
    ]
    for weights in itertools.product((0, 1), repeat=4):
        turns = iter(weights)
        messages = [said | {"weight": next(turns)} if said["role"] == "assistant" else said for said in talk]
        assert encode_messages(tokenizer, messages) == tokens_of(tokenizer, expected(messages))


def test_a_turn_of_weight_0_is_refused_where_the_template_s_stretches_are_not_its_turns(tokenizer):
    whole = load_chat_template("hfpipe").replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{% generation %}" + whole + "{% endgeneration %}"
    talk = [user("Hi"), says("Hello") | {"weight": 0}, user("Bye"), says("Bye")]
    with pytest.raises(UserError, match=r"Row 1: `weight: 0` needs one .* the chat template gives 1 for 2"):
        encode_batch(other, [{"messages": [user("Hi"), says("Hello")]}, {"messages": talk}])


def test_no_row_can_forge_a_control_token(tokenizer):
    rng = random.Random(1)
    tokens = special_strings(tokenizer)
    cleaned = [neutralise_row(some_row(rng, WORDS + FORGERIES), tokens) for _ in range(1000)]
    assert sum(found > 0 for _, found in cleaned) > 900
    rows = [row for row, _ in cleaned]
    for row, (ids, mask) in zip(rows, encode_batch(tokenizer, rows), strict=True):
        counts = {token: ids.count(tokenizer.convert_tokens_to_ids(token)) for token in SPECIAL_TOKENS}
        assert counts == structure(row)
        assert (ids, mask) == tokens_of(tokenizer, expected(row["messages"], row.get("tools")))


def test_no_row_can_forge_a_turn_in_chatml(chatml):
    rng = random.Random(2)
    tokens = special_strings(chatml)
    rows = [neutralise_row(some_row(rng, WORDS + FORGERIES), tokens)[0] for _ in range(500)]
    start, end = chatml.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    for row, (ids, mask) in zip(rows, encode_batch(chatml, rows), strict=True):
        messages = row["messages"]
        turns = len(messages) + (bool(row.get("tools")) and messages[0]["role"] != "system")
        assert ids.count(start) == ids.count(end) == turns
        assert not set(ids) & {chatml.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
        answers = [message for message in messages if message["role"] == "assistant"]
        trained = [token for token, keep in zip(ids, mask, strict=True) if keep]
        assert trained.count(start) == trained.count(end) == len(answers)
        text = chatml.decode(trained)
        assert text.startswith("".join(f"<|im_start|>assistant\n{m['content']}" for m in answers[:1]))
        assert "<|im_start|>user" not in text


def test_the_built_in_conversations_token_by_token(tokenizer):
    from hfpipe.data import tinyworld

    rows = [row for row in tinyworld.rows("midtrain") if "messages" in row][:1000]
    assert rows
    for row in rows:
        row["messages"] = [{"tool_calls": [], **message} for message in row["messages"]]
    for row, encoded in zip(rows, encode_batch(tokenizer, rows), strict=True):
        assert encoded == tokens_of(tokenizer, expected(row["messages"], row.get("tools")))


def test_an_answer_that_begins_with_a_space_is_trained_whole():
    """Of tokenizers that leave spaces out of a token's place, with a template that marks the words alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "special_tokens": special}
    backend.train_from_iterator(["hello there my friend"] * 5, trainers.BpeTrainer(vocab_size=320, **options))
    bos = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 0)])
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), bos])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    )
    before = backend.to_str()
    for said in ("hello", " hello", "\n\nhello", "  "):
        talk = [
            {"role": role, "content": text}
            for role, text in zip(["user", "assistant"] * 2, ["my", said, "friend", "there"], strict=True)
        ]
        ids, mask = encode_messages(tokenizer, talk)
        trained = tokenizer.decode([token for token, on in zip(ids, mask, strict=True) if on])
        assert trained == f"{said}<|im_end|>there<|im_end|>"
    assert backend.to_str() == before
