"""Whether verified synthetic rows teach anything: the recipe `synth`, three seeds, as the README's table.

    python benchmarks/synthetic.py [--out runs/synthetic] [--seeds 0 1 2] [--pretrained FOLDER] [--set KEY=VALUE ...]

`sft_more` and `sft_synth` go on from the same `sft` with equal steps and batches, the one on its demonstrations again, the
other with the stage's own verified answers among them. The seeds share the pretrained model and differ in demonstrations,
prompts, sampling and order. Asked are numbers and wordings of the test split: the recipe's own 200, by which its setting was
chosen, and then 1,000 others, the same to both models, which are compared question by question. What was stopped goes on by
the same command.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from hfpipe.apps.chat import load
from hfpipe.data import tinyworld
from hfpipe.evaluation.checks import score_answer
from hfpipe.evaluation.compare import paired
from hfpipe.evaluation.probes import ask, load_probes
from hfpipe.sections import Probe

FRESH = 1000
STAGES = ("sft", "sft_more", "sft_synth")
ASKED = {"sums": "sums, answer exact", "calls": "sums, call exact", "knowledge": "facts", "instructions": "instructions", "format": "formats"}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/synthetic"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pretrained", type=Path, help="`pretrain` of a run of tiny, in place of the recipe's own")
    parser.add_argument("--recipe", default="synth", help="the recipe, or a copy of it")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for hfpipe run")
    options = parser.parse_args()
    for seed in options.seeds:
        run_seed(options, seed)
    print("\n".join(table(options.out, options.seeds)))
    questions = fresh_sums(options.out / "fresh.jsonl")
    print("\n".join(paired_table([fresh_scores(options.out / f"seed-{seed}", questions) for seed in options.seeds])))


def run_seed(options: argparse.Namespace, seed: int) -> None:
    """One run of the recipe; seeds after the first start from the first one's pretrained model."""
    pretrained = options.pretrained or options.out / f"seed-{options.seeds[0]}" / "pretrain"
    settings = [f"seed={seed}", f"synth.sums.seed={1000 * seed}", *options.set]
    command = [sys.executable, "-m", "hfpipe", "run", options.recipe, "--out", str(options.out / f"seed-{seed}")]
    if options.pretrained or seed != options.seeds[0]:
        settings.append(f"sft.model.from={pretrained}")
        command += ["--from", "sft"]
    subprocess.run([*command, *(word for setting in settings for word in ("--set", setting))], check=True)


def fresh_sums(file: Path) -> dict[str, list[dict]]:
    """By the check, 1,000 sums of the test split that are not among those that the recipe asks."""
    seen = {row["messages"][0]["content"] for row in tinyworld.rows("sums", "test")}
    lines: list[str] = []
    for row in tinyworld.rows("sums", "test", seed=1, size=10 * FRESH):
        if row["messages"][0]["content"] not in seen and len(lines) < FRESH:
            seen.add(row["messages"][0]["content"])
            lines.append(json.dumps(row, ensure_ascii=False))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    checks = {"answer": "exact", "call": "tool_call"}
    return {
        name: load_probes([Probe(path=str(file), split="all", capability=name, check=check)], "fresh")
        for name, check in checks.items()
    }


def fresh_scores(run: Path, questions: dict[str, list[dict]]) -> dict[str, dict[str, list[float]]]:
    """stage -> what is asked for -> a score a question.

    `answer` is what it says to the result of the right call, as the recipe asks; `call` what it asks the calculator; `both`
    what it says in the end when its own call is carried out.
    """
    kept = run / "fresh.json"
    if not kept.is_file():
        scores: dict[str, dict[str, list[float]]] = {}
        for stage in STAGES:
            model = load(str(run / stage))
            from_result, from_question = (ask(*model, questions[name], 48) for name in ("answer", "call"))
            scores[stage] = {
                "answer": [*map(score_answer, questions["answer"], from_result)],
                "call": [*map(score_answer, questions["call"], from_question)],
                "both": [*map(score_answer, questions["answer"], from_question)],
            }
        kept.write_text(json.dumps(scores))
    return json.loads(kept.read_text())


def paired_table(seeds: list[dict[str, dict[str, list[float]]]]) -> list[str]:
    """Each seed's `sft_synth` against its `sft_more` on the same questions."""
    lines = [
        "",
        "| right | " + " | ".join(f"`{stage}`" for stage in STAGES) + " | beyond `sft_more`, 95% | win, loss | p |",
    ]
    lines.append("|---|" + "---|" * (len(STAGES) + 3))
    for name in seeds[0]["sft"]:
        for scores in seeds:
            means = [f"{sum(scores[stage][name]) / len(scores[stage][name]):.3f}" for stage in STAGES]
            found = paired(scores["sft_more"][name], scores["sft_synth"][name])
            gain = f"{found['difference']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"
            cells = [
                f"{name}, n {found['n']}",
                *means,
                gain,
                f"{found['win']}, {found['loss']}",
                f"{found['p']:.2g}" if found["p"] else "< 1e-6",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


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
