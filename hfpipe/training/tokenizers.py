"""Tokenizers: train one, give a Hub model's tokenizer what a chat template needs, encode documents."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from hfpipe.errors import UserError, nearest
from hfpipe.training.templates import set_chat_template, stop_token_ids, turn_end_token

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
SEGMENTS = ("user", "assistant", "system", "tool_call", "tool_result")
CONTROL_TOKENS = (BEGIN, END, *(token for name in SEGMENTS for token in (f"<|{name}|>", f"<|end_{name}|>")))
SPECIAL_TOKENS = (*CONTROL_TOKENS, PAD)  # the first ids of a trained tokenizer, in this order

BYTES = 256
# Unigram's trainer ignores a vocabulary that leaves no room for one piece beyond the bytes.
SMALLEST_VOCAB = {
    "bpe": len(SPECIAL_TOKENS) + BYTES,
    "wordpiece": len(SPECIAL_TOKENS) + BYTES,
    "unigram": len(SPECIAL_TOKENS) + BYTES + 1,
}


def train_tokenizer(
    texts: Iterable[str],
    *,
    type: str,
    vocab_size: int,
    chat_template: str,
    min_frequency: int = 2,
    model_max_length: int | None = None,
) -> PreTrainedTokenizerFast:
    """Train a byte-level tokenizer on `texts`: any Unicode text survives encoding and decoding unchanged.

    `type` is bpe, unigram or wordpiece. All three see bytes as letters (the alphabet of GPT-2) with each digit on its
    own, so none has an unknown token; WordPiece marks the start of a word by its space, as byte-level BPE does, rather
    than its inside by `##`. `vocab_size` counts the special tokens, which take the first 13 ids. `min_frequency` is
    the least count of a merge (bpe, wordpiece); Unigram prunes by likelihood and has no such threshold.
    `chat_template` is Jinja text; `model_max_length` is in tokens.

    bos is `<|begin|>` and is added to plain text, because every document was trained with it. eos is
    `<|end_assistant|>`, because eos is where generation must stop and that is where an answer ends. pad is its own
    token, so that masking it out never hides an end.

    Raises UserError where `type` is unknown, `vocab_size` too small or there is no text.
    """
    from transformers import PreTrainedTokenizerFast

    if type not in SMALLEST_VOCAB:
        raise UserError(
            f"A tokenizer's type is bpe, unigram or wordpiece, not `{type}`.{nearest(type, SMALLEST_VOCAB)}"
        )
    if vocab_size < SMALLEST_VOCAB[type]:
        raise UserError(
            f"vocab_size {vocab_size} is too small for a {type} tokenizer: {len(SPECIAL_TOKENS)} special tokens and "
            f"the {BYTES} bytes come first. Set it to {SMALLEST_VOCAB[type]} or more."
        )
    texts = iter(texts)
    first = next(texts, None)
    if first is None:
        raise UserError("There is no text to train a tokenizer on: the sources have no rows.")

    backend = _train_backend(itertools.chain([first], texts), type, vocab_size, min_frequency)
    named = {"bos_token": BEGIN, "eos_token": "<|end_assistant|>", "pad_token": PAD}
    limit = {} if model_max_length is None else {"model_max_length": model_max_length}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        extra_special_tokens=[token for token in SPECIAL_TOKENS if token not in named.values()],
        clean_up_tokenization_spaces=False,
        **named,
        **limit,
    )
    set_chat_template(tokenizer, chat_template)
    return tokenizer


def _train_backend(texts: Iterable[str], type: str, vocab_size: int, min_frequency: int) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    shared = {
        "vocab_size": vocab_size,
        "special_tokens": list(SPECIAL_TOKENS),
        "initial_alphabet": pre_tokenizers.ByteLevel.alphabet(),
        "show_progress": False,
    }
    words = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if type == "bpe":
        model, trainer = models.BPE(), trainers.BpeTrainer(min_frequency=min_frequency, **shared)
    elif type == "unigram":
        model, trainer = models.Unigram(), trainers.UnigramTrainer(**shared)
    else:
        model = models.WordPiece(continuing_subword_prefix="")
        trainer = trainers.WordPieceTrainer(min_frequency=min_frequency, continuing_subword_prefix="", **shared)
        # WordPiece gives up on a word of more than 100 letters.
        words.append(pre_tokenizers.Split(Regex(".{1,100}"), "isolated"))

    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence(words)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(texts, trainer)
    if type == "unigram":
        _settle_unigram(backend)
    # No ByteLevel post-processor: it trims the spaces from the offsets that the assistant's mask is read from.
    begin = (BEGIN, backend.token_to_id(BEGIN))
    backend.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[begin])
    return backend


def _settle_unigram(backend: Tokenizer) -> None:
    """Make equal texts give equal tokenizers, which Unigram's trainer does not.

    It sums in parallel, so the last digits vary, and gives the bytes it never saw the lowest score plus 0.0001, 0.0002
    and so on in random order. The scores are rounded, those bytes get the lowest one, and ties go by spelling.
    """
    import json

    from tokenizers import models

    pieces = json.loads(backend.to_str())["model"]["vocab"]
    special, learnt = pieces[: len(SPECIAL_TOKENS)], pieces[len(SPECIAL_TOKENS) :]
    lowest = min(score for _, score in learnt)
    unseen = lowest + BYTES * 0.0001
    settled = [(piece, round(lowest if len(piece) == 1 and score <= unseen else score, 6)) for piece, score in learnt]
    settled.sort(key=lambda item: (-item[1], item[0]))
    backend.model = models.Unigram([*map(tuple, special), *settled])


def encode_text(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Encode documents for pretraining: the tokenizer's begin token, then the text, and nothing after it.

    No token closes a document, so a base model never learns to stop: stopping is what the chat stages teach. A control
    token spelt out in a text is encoded as ordinary text.
    """
    if not texts:
        return []
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [begin + ids for ids in encoded]


def extend_tokenizer(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> int:
    """Set `chat_template` (Jinja text) on a Hub model's tokenizer, with the tokens it needs; the number added.

    Every `<|name|>` that the template writes becomes one special token, eos becomes the token that closes an
    assistant's turn, and pad becomes a token of its own where there was none or generation stops at it. bos stays the
    model's own: its documents began with it. Call `resize_embeddings` next.
    """
    from tokenizers import AddedToken

    before = len(tokenizer)
    written = re.findall(r"<\|\w+\|>", re.sub(r"\{#.*?#\}", "", chat_template, flags=re.DOTALL))
    known = tokenizer.get_added_vocab()
    missing = [token for token in dict.fromkeys(written) if token not in known]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in missing])
    set_chat_template(tokenizer, chat_template)
    old_eos = tokenizer.eos_token_id
    tokenizer.eos_token = turn_end_token(tokenizer)
    if tokenizer.pad_token_id in {None, old_eos, *stop_token_ids(tokenizer)}:
        tokenizer.add_special_tokens({"pad_token": AddedToken(PAD, special=True, normalized=False)})
    return len(tokenizer) - before


def resize_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, added: int) -> None:
    """Give the last `added` tokens rows in the input and output embeddings, each the mean of the rows before them.

    The matrices grow to the tokenizer's size and no further: a row without a token could be generated, which costs
    more than the tensor cores' multiple of 64 gains. A model that came with spare rows keeps its size.
    """
    import torch

    size = len(tokenizer)
    old = size - added
    rows = max(size, model.get_input_embeddings().num_embeddings)
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for values in embedding_values(model):
            values[old:size] = values[:old].float().mean(0).to(values.dtype)


def embedding_values(model: PreTrainedModel) -> list[Tensor]:
    """What holds one row for each token: weights and biases of the input and output embeddings that there are."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())  # a reward model has no second one
    found = [getattr(end, name, None) for end in ends for name in ("weight", "bias")]
    return [values for values in found if values is not None]
