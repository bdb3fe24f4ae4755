"""A needle in a haystack: a fact hidden in held-out text of a length, at a depth, to be gone on with at the text's end.

After Kamradt's probe (2023). Prompts have the length asked for to the token, and are asked past the model's positions too.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import sys
from random import Random
from typing import TYPE_CHECKING, Any

from hfpipe.data.sources import load_source
from hfpipe.data.tinyworld.needles import FIRST, passwords
from hfpipe.errors import UserError
from hfpipe.evaluation.answers import Answer, generate_all, positions
from hfpipe.evaluation.checks import check
from hfpipe.evaluation.probes import summary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hfpipe.sections import Recipe

CAPABILITY = "long_context"
_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_WITHIN = re.compile(r"(?<=[。！？])|(?=\n)")
_MISS = 0.05  # of the room: no sentence may end nearer to the depth asked, or one is cut
_LEAST_MISS = 16  # tokens; shorter rooms are let off, where ordinary sentences are longer than that share
_WORD_BEGINS = ("Ġ", "▁", "Ċ", " ", "\n")


def build_needles(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Probe rows with `ids`, `length` and `depth`: the same for the same recipe and tokenizer.

    The text around a needle is any part of the held-out text, which is taken again where it is shorter, without the
    sentences that hold the needle's name or begin as the fact does. UserError where a length has no room for the fact and the question.
    """
    from hfpipe.training.tokenizers import encode_text

    evaluate, section = recipe.pipeline.evaluate, recipe.pipeline.evaluate.needle
    where = f"{recipe.folder / 'pipeline.yaml'}: evaluate"
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

    def encode(texts: list[str]) -> list[list[int]]:
        return [ids[len(begin) :] for ids in encode_text(tokenizer, texts)]

    sentences = []
    for source in evaluate.text:
        source = dataclasses.replace(source, limit=source.limit or evaluate.max_rows)
        split, seed = source.split or "validation", recipe.pipeline.seed
        for row in load_source(source, wanted="text", split=split, seed=seed, where=where).rows():
            for sentence in filter(None, _SENTENCE.split(row["text"])):
                sentences += filter(None, _WITHIN.split(f" {sentence}"))
    opening = section.fact.partition("{name}")[0].strip()
    sentences = [sentence for sentence in sentences if not opening or not sentence.lstrip().startswith(opening)]
    encoded = list(zip(sentences, encode(sentences), strict=True))
    rows = []
    for length, depth, number in itertools.product(section.lengths, section.depths, range(section.per_cell)):
        rng = Random(f"needle {recipe.pipeline.seed} {length} {depth} {number}")
        name = rng.choice(FIRST)
        word = rng.choice(passwords("test")[name])
        question = section.fact.partition("{word}")[0].format(name=name).rstrip()
        fact, asked = encode([f" {section.fact.format(name=name, word=word)}", f" {question}"])
        room = left = length - len(fact) - len(asked) - len(begin)
        usable = [ids for sentence, ids in encoded if name not in sentence]
        if room < 0 or not usable:
            raise UserError(
                f"{where}.needle: no prompt of {length} tokens can be made of {len(sentences)} sentences of evaluate.text "
                f"and {section.fact!r} with its question. Give longer lengths, or more text."
            )
        hay: list[list[int]] = []
        at = rng.randrange(len(usable))
        while left:
            hay.insert(0, usable[at % len(usable)][-left:])  # the text begins within a sentence, to have its length
            at, left = at - 1, left - len(hay[0])
        hay = _hide(fact, hay, depth * room, room, tokenizer)
        row = {"capability": CAPABILITY, "kind": f"{length} tokens", "length": length, "depth": depth}
        row |= {"prompt": question, "check": {"type": "starts", "value": word}}
        rows.append(row | {"ids": [*begin, *itertools.chain(*hay), *asked]})
    return rows


def _hide(
    fact: list[int], hay: list[list[int]], wanted: float, room: int, tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """The hay with the fact where the sentence ends that is nearest to token `wanted`; within one where none is near."""
    ends = [0, *itertools.accumulate(map(len, hay))]
    nearest = min(range(len(ends)), key=lambda i: abs(ends[i] - wanted))
    if abs(ends[nearest] - wanted) <= max(_MISS * room, _LEAST_MISS):
        return [*hay[:nearest], fact, *hay[nearest:]]
    ids = list(itertools.chain(*hay))
    at = _cut(ids, round(wanted), tokenizer)
    return [ids[:at], fact, ids[at:]]


def _cut(ids: list[int], wanted: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """The place nearest to `wanted` where a word begins, else a character: of some that have several tokens."""
    near = sorted(
        range(max(wanted - _LEAST_MISS, 1), min(wanted + _LEAST_MISS, len(ids))), key=lambda k: abs(k - wanted)
    )
    words = (k for k in near if tokenizer.convert_ids_to_tokens(ids[k]).startswith(_WORD_BEGINS))
    whole = (k for k in near if not tokenizer.decode(ids[k : k + 4]).startswith("\ufffd"))
    return next(words, next(whole, wanted))


def ask_needles(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows that the model can read, with answers and scores, and `{"lengths", "depths", "cells"}`.

    `cells`, depths down and lengths across, are `{"score", "n", "low", "high"}`, or None for a length that it cannot read:
    beyond its positions, where those are learnt.
    """
    config = model.config.get_text_config()
    longest = sys.maxsize if getattr(config, "rope_parameters", None) else positions(model)
    words = tokenizer([f" {row['check']['value']}" for row in rows], add_special_tokens=False)["input_ids"]
    budget = 2 + max(map(len, words))
    readable = [row for row in rows if len(row["ids"]) + budget <= longest]
    answers = generate_all(model, tokenizer, [row["ids"] for row in readable], budget, beyond=True)
    told = []
    cells: dict[tuple[float, int], list[float]] = {(row["depth"], row["length"]): [] for row in rows}
    for row, ids in zip(readable, answers, strict=True):
        text = tokenizer.decode(ids, skip_special_tokens=True).strip()
        score = check(row, Answer(messages=[{"role": "assistant", "content": text}]))
        cells[row["depth"], row["length"]].append(score)
        kept = {key: value for key, value in row.items() if key != "ids"}
        told.append(kept | {"answer": text, "raw": tokenizer.decode(ids), "score": score})
    depths, lengths = (list(dict.fromkeys(axis)) for axis in zip(*cells, strict=True))
    grid = [[cells[depth, length] for length in lengths] for depth in depths]
    return told, {
        "lengths": lengths,
        "depths": depths,
        "cells": [[summary(c) if c else None for c in row] for row in grid],
    }
