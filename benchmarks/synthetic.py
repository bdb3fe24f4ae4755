"""Whether verified synthetic rows teach anything: the recipe `synth`, three seeds, as the README's table.

    python benchmarks/synthetic.py [--out runs/synthetic] [--seeds 0 1 2] [--set KEY=VALUE ...]

`sft_more` and `sft_synth` go on from the same `sft` with equal steps and batches, the one on its demonstrations again, the
other with the stage's own verified answers among them. The seeds share the pretrained model and differ in demonstrations,
prompts, sampling and order. Asked are numbers and wordings of the test split. What was stopped goes on by the same command.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

STAGES = ("sft", "sft_more", "sft_synth")
ASKED = {"sums": "sums, answer exact", "calls": "sums, call exact", "knowledge": "facts", "instructions": "instructions", "format": "formats"}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/synthetic"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipe", default="synth", help="the recipe, or a copy of it")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for hfpipe run")
    options = parser.parse_args()
    for seed in options.seeds:
        run_seed(options, seed)
    print("\n".join(table(options.out, options.seeds)))


def run_seed(options: argparse.Namespace, seed: int) -> None:
    """One run of the recipe; seeds after the first start from the first one's pretrained model."""
    first = options.out / f"seed-{options.seeds[0]}"
    settings = [f"seed={seed}", f"synth.sums.seed={1000 * seed}", *options.set]
    command = [sys.executable, "-m", "hfpipe", "run", options.recipe, "--out", str(options.out / f"seed-{seed}")]
    if seed != options.seeds[0]:
        settings.append(f"sft.model.from={first / 'pretrain'}")
        command += ["--from", "sft"]
    subprocess.run([*command, *(word for setting in settings for word in ("--set", setting))], check=True)


def table(out: Path, seeds: list[int]) -> list[str]:
    """The lowest and the highest of the seeds, and what the verified rows give beyond the control, a seed at a time."""
    found = {
        stage: [json.loads((out / f"seed-{seed}" / stage / "eval.json").read_text())["capabilities"] for seed in seeds]
        for stage in STAGES
    }
    records = [json.loads((out / f"seed-{seed}" / "synth" / "sums.json").read_text()) for seed in seeds]
    lines = ["| held out | n | " + " | ".join(f"`{stage}`" for stage in STAGES) + " | gain beyond `sft_more` |"]
    lines.append("|---|---|" + "---|" * (len(STAGES) + 1))
    for key, words in ASKED.items():
        scores = {stage: [told[key]["score"] for told in found[stage]] for stage in STAGES}
        gains = [made - more for made, more in zip(scores["sft_synth"], scores["sft_more"], strict=True)]
        cells = [spread(scores[stage]) for stage in STAGES] + [", ".join(f"{gain:+.2f}" for gain in gains)]
        lines.append(f"| {words} | {found['sft'][0][key]['n']} | " + " | ".join(cells) + " |")
    kept = spread([record["kept"] / record["asked"] for record in records])
    cost = [record["cost"] for record in records]
    tokens = spread([one["prompt_tokens"] + one["completion_tokens"] for one in cost], "{:,.0f}")
    lines.append(f"\nOf {records[0]['asked']:,} answers {kept} were kept, {tokens} tokens read and written,")
    lines.append(f"{spread([one['seconds'] for one in cost], '{:.0f}')} s.")
    return lines


def spread(values: list[float], form: str = "{:.2f}") -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low}-{high}"


if __name__ == "__main__":
    main()
