"""Score every stage of a run on tinyworld's held-out questions, one column a stage.

    python benchmarks/tinyworld_probes.py runs/tiny [--split test] [--size 2400]

Use `--split validation` while tuning; `test` is for the figures that are reported.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfpipe import artifact
from hfpipe.data import tinyworld
from hfpipe.data.tinyworld.checks import check
from hfpipe.evaluation.basics import generate
from hfpipe.training.templates import encode_prompts
from hfpipe.training.tokenizers import encode_text


def answers(folder: Path, rows: list[dict]) -> list[str]:
    """The model's greedy answer to each probe, special tokens kept."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    prompts = [prompt_ids(tokenizer, row) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    found: dict[int, str] = {}
    for start in range(0, len(order), 128):
        batch = order[start : start + 128]
        for i, ids in zip(batch, generate(model, tokenizer, [prompts[i] for i in batch], 64), strict=True):
            found[i] = tokenizer.decode(ids)
    return [found[i] for i in range(len(rows))]


def prompt_ids(tokenizer, row: dict) -> list[int]:
    if "prompt" in row:
        return encode_text(tokenizer, [row["prompt"]])[0]
    ids = encode_prompts(tokenizer, [{"prompt": row["messages"]}])[0]
    return ids if row.get("add_generation_prompt", True) else ids[:-1]


def paired(kinds: Iterable[dict[str, list[bool]]], before: str, after: str) -> tuple[int, int]:
    """How many of the same questions `after` alone answers rightly, and how many `before` alone."""
    both = [pair for by_stage in kinds for pair in zip(by_stage[before], by_stage[after], strict=True)]
    return both.count((False, True)), both.count((True, False))


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% interval of a share."""
    if not n:
        return 0.0, 1.0
    share, spread = right / n, z * math.sqrt(right * (n - right) / n**3 + (z / n / 2) ** 2)
    middle, scale = share + z**2 / n / 2, 1 + z**2 / n
    return (middle - spread) / scale, (middle + spread) / scale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--split", default="test", choices=["validation", "test"])
    parser.add_argument("--size", type=int, default=2400)
    parser.add_argument("--show", metavar="KIND", help="print the answers of one kind")
    options = parser.parse_args()
    rows = list(tinyworld.rows("probes", options.split, size=options.size))
    stages = (artifact.read_json(options.run / "run.json") or {})["stages"]
    stages = [s for s in stages if (options.run / s / "model.safetensors").is_file()]
    scores: dict[tuple[str, str], dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for stage in stages:
        for row, answer in zip(rows, answers(options.run / stage, rows), strict=True):
            right = check(row, answer)
            scores[row["capability"], row["kind"]][stage].append(right)
            if row["kind"] == options.show:
                asked = row.get("prompt") or row["messages"][-1]["content"]
                print(stage, "ok " if right else "BAD", repr(asked), "->", repr(answer), row["check"])
    for before, after in pairwise(stages):
        better, worse = paired(scores.values(), before, after)
        low, high = wilson(better, better + worse)
        print(f"{after} against {before}: {better} questions better, {worse} worse; wins {low:.2f} to {high:.2f}")
    print(f"| capability | kind | n | {' | '.join(stages)} |")
    print(f"|---|---|---|{'---|' * len(stages)}")
    for (capability, kind), by_stage in sorted(scores.items()):
        shares = [sum(by_stage[s]) / len(by_stage[s]) for s in stages]
        print(f"| {capability} | {kind} | {len(by_stage[stages[0]])} | {' | '.join(f'{x:.2f}' for x in shares)} |")


if __name__ == "__main__":
    main()
