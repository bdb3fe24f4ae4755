"""A needle in a haystack: a fact hidden in held-out text of a length, at a depth, to be gone on with at the text's end.

After Kamradt's probe (2023). Prompts have the length asked for to the token, and are asked past the model's positions too.
"""

from __future__ import annotations

import itertools
import re
import sys
from random import Random
from typing import TYPE_CHECKING, Any

from hfpipe.data.sources import load_source
from hfpipe.data.tinyworld.needles import pairs
from hfpipe.errors import UserError
from hfpipe.evaluation.answers import Answer, generate_all, positions
from hfpipe.evaluation.checks import check
from hfpipe.evaluation.intervals import interval

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hfpipe.sections import Recipe

CAPABILITY = "long_context"


def build_needles(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Probe rows with `ids`, `length` and `depth`: the same for the same recipe and tokenizer.

    The text is any part of the held-out text, which is taken again where it is shorter, without the sentences that hold
    the needle's name.

    Raises:
        UserError: a length has no room for the fact and the question, or there is no text.
    """
    from hfpipe.training.tokenizers import encode_text

    section = recipe.pipeline.evaluate.needle
    where = f"{recipe.folder / 'pipeline.yaml'}: evaluate"
    skip = 0 if tokenizer.bos_token_id is None else 1

    def encode(texts: list[str]) -> list[list[int]]:
        return [ids[skip:] for ids in encode_text(tokenizer, [f" {text}" for text in texts])]

    texts = [row["text"] for s in recipe.pipeline.evaluate.text for row in load_source(s, wanted="text", split=s.split or "validation", where=f"{where}.text").rows()]  # fmt: skip
    sentences = [sentence for text in texts for sentence in re.split(r"(?<=[.!?])\s+", text) if sentence]
    encoded = list(zip(sentences, encode(sentences), strict=True))
    rows = []
    for length, depth, number in itertools.product(section.lengths, section.depths, range(section.per_cell)):
        rng = Random(f"needle {recipe.pipeline.seed} {length} {depth} {number}")
        name, word = rng.choice(pairs("test"))
        question = section.fact.partition("{word}")[0].format(name=name).rstrip()
        fact, asked = encode([section.fact.format(name=name, word=word), question])
        room = left = length - len(fact) - len(asked) - skip
        usable = [ids for sentence, ids in encoded if name not in sentence]
        if room < 0 or not usable:
            raise UserError(
                f"{where}: needle: no prompt of {length} tokens can be made of {len(sentences)} sentences of evaluate.text "
                f"and {section.fact!r} with its question. Give longer lengths, or more text."
            )
        hay: list[list[int]] = []
        for at in itertools.count(rng.randrange(len(usable)), -1):
            if left <= 0:
                break
            hay.insert(0, usable[at % len(usable)][-left:])  # the text begins within a sentence, to have its length
            left -= len(hay[0])
        before = [0, *itertools.accumulate(map(len, hay))]
        hay.insert(min(range(len(before)), key=lambda i: abs(before[i] - depth * room)), fact)
        rows.append({
            "capability": CAPABILITY, "kind": f"{length} tokens", "length": length, "depth": depth, "prompt": question,
            "ids": [*[tokenizer.bos_token_id] * skip, *itertools.chain(*hay), *asked],
            "check": {"type": "starts", "value": word},
        })  # fmt: skip
    return rows


def ask_needles(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows that the model can read, with answers and scores, and `{"lengths", "depths", "cells"}`.

    `cells`, depths down and lengths across, are `{"score", "n", "low", "high"}`, or None for a length that it cannot read:
    beyond its positions, where those are learnt.
    """
    config = model.config.get_text_config()
    longest = sys.maxsize if getattr(config, "rope_parameters", None) else positions(model)
    budget = 2 + max(len(tokenizer(f" {row['check']['value']}", add_special_tokens=False)["input_ids"]) for row in rows)
    read = [row for row in rows if len(row["ids"]) + budget <= longest]
    answers = generate_all(model, tokenizer, [row["ids"] for row in read], budget, beyond=True)
    told = []
    for row, ids in zip(read, answers, strict=True):
        text = tokenizer.decode(ids, skip_special_tokens=True).strip()
        score = check(row, Answer(messages=[{"role": "assistant", "content": text}]))
        told.append({k: v for k, v in row.items() if k != "ids"} | {"answer": text, "raw": tokenizer.decode(ids), "score": score})  # fmt: skip
    lengths, depths = (list(dict.fromkeys(row[key] for row in rows)) for key in ("length", "depth"))
    cells = [[_cell([t["score"] for t in told if (t["length"], t["depth"]) == (length, depth)]) for length in lengths] for depth in depths]  # fmt: skip
    return told, {"lengths": lengths, "depths": depths, "cells": cells}


def _cell(scores: list[float]) -> dict[str, Any] | None:
    if not scores:
        return None
    low, high = interval(scores)
    return {"score": sum(scores) / len(scores), "n": len(scores), "low": round(low, 4), "high": round(high, 4)}
