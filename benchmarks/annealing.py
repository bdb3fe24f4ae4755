"""What annealing gains on held-out quality text, and how much of it is the falling rate's and how much the better mixture's.

    python benchmarks/annealing.py OUT [--real web.jsonl quality.txt] [--seeds 0 1 2] [--short]

The recipe `anneal` on tinyworld and, with --real, on two files of one's own, once for each seed. What was stopped goes on.
Differences are to `neither`, which goes on as the parent did on as many tokens.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

from hfpipe import artifact

STAGES = {
    "pretrain": "the parent",
    "neither": "neither: goes on as before",
    "only_quality": "quality text alone",
    "only_decay": "falling rate alone",
    "anneal": "annealed: both",
}
# Less text than tinyworld has: read four times by the parent.
REAL = ["pretrain.trainer.num_train_epochs=4", "tokenizer.tokenizer.vocab_size=2048"]
SHORT = [
    "pretrain.trainer.max_steps=60",
    "pretrain.trainer.warmup_steps=10",
    "pretrain.model.config.hidden_size=32",
    "pretrain.model.config.num_hidden_layers=1",
    *(f"{stage}.data.batch_tokens=128" for stage in STAGES),
]


def losses(run: Path, seed: int, settings: list[str]) -> dict[str, float]:
    """Stage -> loss on held-out quality text, nats a token, after a run of the recipe."""
    options = [a for text in (f"seed={seed}", *settings) for a in ("--set", text)]
    subprocess.run([sys.executable, "-m", "hfpipe", "run", "anneal", "--out", str(run), *options], check=True)
    records = {stage: artifact.read_record(run / stage / artifact.STAGE_FILE) for stage in STAGES}
    return {stage: record["metrics"]["held_out_text"]["loss"] for stage, record in records.items()}


def table(title: str, runs: list[dict[str, float]]) -> None:
    """A row a stage: the mean loss, lowest and highest of the seeds, and the difference from `neither` seed by seed."""
    print(f"| {title} | loss, mean of {len(runs)} | lowest to highest | against neither | lower on |")
    print("|---|---|---|---|---|")
    for stage, label in STAGES.items():
        found = [run[stage] for run in runs]
        told = f"| {label} | {mean(found):.3f} | {min(found):.3f} to {max(found):.3f} |"
        gains = [run[stage] - run["neither"] for run in runs]
        lower = f"{sum(gain < 0 for gain in gains)} of {len(gains)}"
        print(told, "- | - |" if stage == "neither" else f"{mean(gains):+.3f} | {lower} |")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--real", nargs=2, metavar=("WEB", "QUALITY"), help="files of text")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--short", action="store_true", help="60 small steps: to see that it runs; its figures say nothing"
    )
    options = parser.parse_args()
    kinds = {"tinyworld": []}
    if options.real:
        web, quality = options.real
        kinds["real text"] = [f"web={web}", f"quality={quality}", *REAL]
    began, found = time.monotonic(), {}
    for kind, settings in kinds.items():
        settings = [*settings, *(SHORT if options.short else [])]
        runs = ((options.out / f"{kind.split()[0]}-{seed}", seed) for seed in options.seeds)
        found[kind] = [losses(run, seed, settings) for run, seed in runs]
    print()
    for kind, runs in found.items():
        table(kind, runs)
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
