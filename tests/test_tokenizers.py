"""Tokenizers: lossless, one id per control token, the same after a reload; Hub tokenizers extended, models resized."""

import random

import pytest

from hfpipe.errors import UserError
from hfpipe.training.templates import load_chat_template, special_strings, stop_token_ids
from hfpipe.training.tokenizers import (
    CONTROL_TOKENS,
    SPECIAL_TOKENS,
    encode_text,
    extend_tokenizer,
    resize_embeddings,
    train_tokenizer,
)

TYPES = ("bpe", "unigram", "wordpiece")
_rng = random.Random(0)
SYLLABLES = ["ca", "pi", "tal", "fran", "ce", "mon", "der", "ü", "it", "s", "wa", "ter", "lo", "qu", "ing"]
WORDS = ["".join(_rng.choices(SYLLABLES, k=_rng.randrange(1, 5))) for _ in range(300)] + ["France", "capital"] * 9
TEXTS = [" ".join(_rng.choices(WORDS, k=12)) + f", and {n} plus {n} is {n + n}.\n" for n in range(300)]


def train(type, vocab_size=400, **options):
    return train_tokenizer(
        TEXTS, type=type, vocab_size=vocab_size, chat_template=load_chat_template("hfpipe"), **options
    )


@pytest.fixture(scope="module", params=TYPES)
def tokenizer(request):
    return train(request.param)


def hub_tokenizer():
    """A stand-in for GPT-2's: one end-of-text token, no pad, no template, offsets without leading spaces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    end = "<|endoftext|>"
    backend.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=320, special_tokens=[end], initial_alphabet=alphabet, show_progress=False),
    )
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=end, eos_token=end)


def random_text(rng):
    ranges = (0x80, 0x80, 0x800, 0x110000)
    points = (rng.randrange(rng.choice(ranges)) for _ in range(rng.randrange(200)))
    return "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)


def test_any_text_comes_back_unchanged(tokenizer):
    rng = random.Random(0)
    chosen = [
        "",
        " ",
        "  two spaces at both ends  ",
        "\x00NUL\x00",
        "a\r\nb\rc\n\n\n",
        "\t\tx = 10_000",
        "e\u0301 and é, ﬁ, Å, Ⅻ, ½, ٣",
        "👩‍👩‍👧‍👦 🇳🇴 \ufeff\u200b\u202e",
        "日本語 हिन्दी العربية",
        "x" * 5000,
        "7" * 300,
        " ".join(CONTROL_TOKENS),
    ]
    texts = chosen + [random_text(rng) for _ in range(1000)]
    begin = tokenizer.bos_token_id
    for text, ids in zip(texts, encode_text(tokenizer, texts), strict=True):
        assert ids[0] == begin
        assert not set(ids[1:]) & set(range(len(SPECIAL_TOKENS)))
        assert tokenizer.decode(ids[1:]) == text


def test_special_tokens_are_one_id_each_and_come_first(tokenizer):
    assert len(SPECIAL_TOKENS) == 13
    for number, token in enumerate(SPECIAL_TOKENS):
        assert tokenizer(token, add_special_tokens=False)["input_ids"] == [number]
    assert tokenizer.decode(range(13), skip_special_tokens=True) == ""
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|begin|>",
        "<|end_assistant|>",
        "<|pad|>",
    )
    assert tokenizer.pad_token_id not in stop_token_ids(tokenizer)
    assert set(special_strings(tokenizer)) == set(SPECIAL_TOKENS)


def test_each_digit_is_its_own_token(tokenizer):
    tokens = [tokenizer.decode([i]) for i in tokenizer("it is 1234.5678", add_special_tokens=False)["input_ids"]]
    assert [token for token in tokens if any(c.isdigit() for c in token)] == list("12345678")


def test_frequent_words_take_few_tokens(tokenizer):
    assert len(tokenizer) == 400
    assert len(tokenizer(" France capital", add_special_tokens=False)["input_ids"]) < 8


def test_plain_text_begins_with_the_begin_token(tokenizer):
    assert tokenizer("Paris")["input_ids"] == encode_text(tokenizer, ["Paris"])[0]


def test_no_end_token_follows_a_document(tokenizer):
    ends = {tokenizer.pad_token_id, *stop_token_ids(tokenizer)}
    assert not any(ends & set(ids) for ids in encode_text(tokenizer, TEXTS))


def test_encode_text_takes_no_texts_and_no_begin_token(tokenizer):
    assert encode_text(tokenizer, []) == []
    assert encode_text(tokenizer, ["", ""]) == [[tokenizer.bos_token_id]] * 2
    plain = hub_tokenizer()
    plain.bos_token = None
    assert plain.decode(encode_text(plain, [" Paris"])[0]) == " Paris"


@pytest.mark.parametrize("type", TYPES)
def test_equal_texts_give_equal_tokenizers(type):
    assert train(type).backend_tokenizer.to_str() == train(type).backend_tokenizer.to_str()


def test_reloaded_tokenizer_is_the_same(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    rng = random.Random(1)
    texts = [random_text(rng) for _ in range(200)] + ["<|begin|><|user|>x<|end_user|>"]
    assert again(texts)["input_ids"] == tokenizer(texts)["input_ids"]
    assert encode_text(again, texts) == encode_text(tokenizer, texts)
    for name in ("chat_template", "response_template", "pad_token_id", "eos_token_id", "model_max_length"):
        assert getattr(again, name) == getattr(tokenizer, name), name


def test_model_max_length_is_kept(tmp_path):
    from transformers import AutoTokenizer

    train("bpe", model_max_length=512).save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == 512


def test_min_frequency_limits_the_vocabulary():
    assert len(train("bpe", 2000, min_frequency=100)) < len(train("bpe", 2000, min_frequency=2))


@pytest.mark.parametrize(("type", "smallest"), [("bpe", 269), ("unigram", 270), ("wordpiece", 269)])
def test_the_smallest_vocabulary(type, smallest):
    assert len(train(type, smallest)) == smallest
    with pytest.raises(UserError, match=f"{smallest - 1} is too small.*{smallest} or more"):
        train(type, smallest - 1)


def test_bad_input_is_refused():
    with pytest.raises(UserError, match=r"not `wordpeice`\. Did you mean `wordpiece`\?"):
        train("wordpeice")
    with pytest.raises(UserError, match="no text"):
        train_tokenizer([], type="bpe", vocab_size=400, chat_template=load_chat_template("hfpipe"))


@pytest.mark.parametrize(("name", "added", "end"), [("hfpipe", 13, "<|end_assistant|>"), ("chatml", 3, "<|im_end|>")])
def test_a_hub_tokenizer_is_extended_once(name, added, end, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = hub_tokenizer()
    before, old = tokenizer(TEXTS)["input_ids"], len(tokenizer)
    template = load_chat_template(name)
    assert extend_tokenizer(tokenizer, template) == added
    assert extend_tokenizer(tokenizer, template) == 0
    assert len(tokenizer) == old + added
    assert tokenizer(TEXTS)["input_ids"] == before
    assert tokenizer.eos_token == end
    assert tokenizer.bos_token == "<|endoftext|>"
    assert tokenizer.pad_token == "<|pad|>"
    assert tokenizer.pad_token_id not in stop_token_ids(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": " 1 😀"}, {"role": "assistant", "content": " two"}]
    assert again.apply_chat_template(chat) == tokenizer.apply_chat_template(chat)
    assert stop_token_ids(again) == stop_token_ids(tokenizer)


def test_a_pad_token_that_is_an_end_is_replaced():
    tokenizer = hub_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    assert extend_tokenizer(tokenizer, load_chat_template("chatml")) == 3
    assert tokenizer.pad_token == "<|pad|>"


def test_normalised_text_cannot_become_an_added_token():
    from tokenizers import normalizers

    tokenizer = hub_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    extend_tokenizer(tokenizer, load_chat_template("chatml"))
    ids = tokenizer("full-width: ＜|im_end|＞")["input_ids"]
    assert tokenizer.decode(ids) == "full-width: <|im_end|>"
    assert tokenizer.eos_token_id not in ids


def test_a_pad_token_of_its_own_is_kept():
    tokenizer = hub_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert extend_tokenizer(tokenizer, load_chat_template("chatml")) == 2
    assert tokenizer.pad_token == "[PAD]"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spare", [0, 64])
def test_resized_model_keeps_its_logits_and_reloads(tied, spare, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    tokenizer = hub_tokenizer()
    old = len(tokenizer)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=old + spare,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.tensor(encode_text(tokenizer, TEXTS[:1]))
    with torch.no_grad():
        before = model(ids).logits[..., :old]
    means = [m.weight[:old].mean(0) for m in (model.get_input_embeddings(), model.get_output_embeddings())]

    resize_embeddings(model, tokenizer, extend_tokenizer(tokenizer, load_chat_template("hfpipe")))

    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[..., :old], before)
    assert model.config.vocab_size == old + max(spare, 13)
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    for module, mean in zip(embeddings, means, strict=True):
        assert module.weight.shape[0] == model.config.vocab_size
        torch.testing.assert_close(module.weight[old : old + 13], mean.expand(13, -1))
    assert (embeddings[0].weight is embeddings[1].weight) == tied

    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    chat = torch.tensor([[*range(old, old + 13)]])
    with torch.no_grad():
        assert torch.equal(again(chat).logits, model(chat).logits)
