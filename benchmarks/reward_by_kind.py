"""How often a reward model puts the better of two answers first, by kind of pair, on many pairs of tinyworld's held-out part.

    python benchmarks/reward_by_kind.py runs/tiny/reward [FOLDER ...] [--split test] [--size 200]

The recipe's own 400 held-out pairs hold some kinds ten times only. Use `--split validation` while tuning.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from random import Random

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hfpipe.data.tinyworld import preferences
from hfpipe.evaluation.intervals import wilson

KINDS = {make.__name__: make for _, make in (*preferences.KINDS, *preferences.DECOYS)}


@torch.no_grad()
def scores(folder: Path, talks: list[list[dict]], rows: int = 64) -> list[float]:
    """One number for each conversation, those of about one length together."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    ids = [tokenizer.apply_chat_template(talk, return_dict=True)["input_ids"] for talk in talks]
    order, found = sorted(range(len(ids)), key=lambda i: len(ids[i])), [0.0] * len(ids)
    for start in range(0, len(order), rows):
        some = order[start : start + rows]
        batch = tokenizer.pad({"input_ids": [ids[i] for i in some]}, return_tensors="pt", padding_side="right")
        for i, score in zip(some, model(**batch).logits[:, 0].tolist(), strict=True):
            found[i] = score
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--split", default="test", choices=["train", "validation", "test"])
    parser.add_argument("--size", type=int, default=200, help="pairs of each kind")
    options = parser.parse_args()
    rng = Random(0)
    pairs = [(kind, make(rng, options.split)) for kind, make in KINDS.items() for _ in range(options.size)]
    talks = [pair["prompt"] + pair[side] for _, pair in pairs for side in ("chosen", "rejected")]
    columns = []
    for folder in options.folders:
        found = scores(folder, talks)
        right = [better > worse for better, worse in zip(found[::2], found[1::2], strict=True)]
        columns.append({kind: sum(r for (k, _), r in zip(pairs, right, strict=True) if k == kind) for kind in KINDS})
    print(f"| kind, {options.size} of each | {' | '.join(map(str, options.folders))} |")
    print(f"|---|{'---|' * len(columns)}")
    for kind in KINDS:
        cells = []
        for column in columns:
            low, high = wilson(column[kind], options.size)
            cells.append(f"{column[kind] / options.size:.2f} ({low:.2f}-{high:.2f})")
        print(f"| {kind} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
