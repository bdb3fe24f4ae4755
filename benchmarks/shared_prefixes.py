"""What `model.share_prefixes` saves of a reward model's passes, forwards and backwards, with and without, in turns.

    python benchmarks/shared_prefixes.py runs/tiny/sft [--pairs 16] [--rounds 5] [--rows FILE]

Pairs are tinyworld's, of preferences and decoys, or those of a file in any form that a reward stage reads; those of a step
are of about one length (`group_by_length`), by what each way takes for it. Prints the tokens of a step and its seconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hfpipe.data.sources import load_source
from hfpipe.data.tinyworld import rows
from hfpipe.plan.ordering import group_by_length
from hfpipe.sections import Source
from hfpipe.training.collate import PairCollator
from hfpipe.training.order import lengths
from hfpipe.training.prefixes import fold, install
from hfpipe.training.templates import encode_preference

STEPS = 30


def read(path: Path | None) -> list[dict[str, Any]]:
    if path is None:
        return list(chain(rows("preferences", "train", seed=0, size=1500), rows("decoys", "train", seed=0, size=1800)))
    source = load_source(Source(path=str(path)), wanted="preference", split="train", seed=0, where=str(path))
    return [row for _, row in source.located_rows()]


def train(model: Any, batches: list[dict[str, torch.Tensor]]) -> float:
    """Seconds of a step, forwards and backwards, in bfloat16 where a run would be."""
    began = time.perf_counter()
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16):
            chosen, rejected = model(**batch, use_cache=False).logits.squeeze(-1).chunk(2)
            loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
        loss.backward()
    return (time.perf_counter() - began) / len(batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--max_length", type=int, default=512)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForSequenceClassification.from_pretrained(
        options.model, num_labels=1, attn_implementation="eager"
    ).train()
    encoded = [encode_preference(tokenizer, row)._asdict() for row in read(options.rows)]
    sides = ("chosen_ids", "rejected_ids")
    data = Dataset.from_list(
        [row for row in encoded if len(row["prompt_ids"]) + max(len(row[side]) for side in sides) <= options.max_length]
    )
    collate, batches = PairCollator(tokenizer.pad_token_id), {}
    for way in ("plain", "shared"):
        order = group_by_length(lengths(data, way == "shared"), options.pairs, 0, 0)[: STEPS * options.pairs]
        batches[way] = [
            collate([data[n] for n in order[at : at + options.pairs]]) for at in range(0, len(order), options.pairs)
        ]
    folded = [(fold(one["input_ids"], one["attention_mask"]), one) for one in batches["shared"]]
    tokens = {
        "plain": [one["input_ids"].numel() for one in batches["plain"]],
        "shared": [(pair.ids if pair else one["input_ids"]).numel() for pair, one in folded],
    }
    took: dict[str, list[float]] = {"plain": [], "shared": []}
    for number in range(options.rounds + 1):
        for way in ("plain", "shared"):
            hooks = install(model) if way == "shared" else []
            seconds = train(model, batches[way])
            for hook in hooks:
                hook.remove()
            if number:  # the first round warms up
                took[way].append(seconds)
    ratios = [shared / plain for plain, shared in zip(took["plain"], took["shared"], strict=True)]
    for way in ("plain", "shared"):
        print(
            f"{way:<7} {statistics.mean(tokens[way]):6.0f} tokens a step, {statistics.median(took[way]) * 1000:6.1f} ms"
        )
    print(
        f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
