"""Score every stage of a run, or of several with different seeds, on tinyworld's held-out questions, a column a stage.

    python benchmarks/tinyworld_probes.py runs/tiny [runs/tiny-1 ...] [--split test] [--size 2400]

Use `--split validation` while tuning; `test` is for the figures that are reported.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from hfpipe import artifact
from hfpipe.data import tinyworld
from hfpipe.evaluation.intervals import wilson
from hfpipe.evaluation.probes import score_probes


def paired(kinds: Iterable[dict[str, list[bool]]], before: str, after: str) -> tuple[int, int]:
    """How many of the same questions `after` alone answers rightly, and how many `before` alone."""
    both = [pair for by_stage in kinds for pair in zip(by_stage[before], by_stage[after], strict=True)]
    return both.count((False, True)), both.count((True, False))


Scores = dict[tuple[str, str], dict[str, list[bool]]]  # (capability, kind) -> stage -> whether each answer was right


def score(run: Path, stages: list[str], rows: list[dict], show: str | None) -> Scores:
    scores: Scores = defaultdict(lambda: defaultdict(list))
    for stage in stages:
        folder = run / stage
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        _, told = score_probes(model, AutoTokenizer.from_pretrained(folder), rows, max_new_tokens=64)
        for row in told:
            scores[row["capability"], row["kind"]][stage].append(row["score"] == 1)
            if row["kind"] == show:
                asked = row.get("prompt") or row["messages"][-1]["content"]
                print(stage, "ok " if row["score"] else "BAD", repr(asked), "->", repr(row["raw"]), row["check"])
    return scores


def stages_of(run: Path) -> list[str]:
    """The stages that left a language model."""
    stages = (artifact.read_json(run / "run.json") or {}).get("stages", [])
    return [s for s in stages if (run / s / "generation_config.json").is_file()]


def branches_of(run: Path, stages: list[str]) -> list[tuple[str, str]]:
    """(a stage that starts from one of these, where it starts from)."""
    records = {stage: artifact.read_json(run / stage / artifact.STAGE_FILE) or {} for stage in stages}
    starts = {stage: str((record.get("parent") or {}).get("from")) for stage, record in records.items()}
    return [(stage, Path(start).name) for stage, start in starts.items() if Path(start).name in stages]


def cell(shares: list[float]) -> str:
    low, high = f"{min(shares):.2f}", f"{max(shares):.2f}"
    return low if low == high else f"{low}-{high}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="of several runs, the lowest and the highest are printed")
    parser.add_argument("--split", default="test", choices=["validation", "test"])
    parser.add_argument("--size", type=int, default=2400)
    parser.add_argument("--show", metavar="KIND", help="print the answers of one kind")
    options = parser.parse_args()
    rows = list(tinyworld.rows("probes", options.split, size=options.size))
    stages = [stage for stage in stages_of(options.runs[0]) if all(stage in stages_of(run) for run in options.runs)]
    if not stages:
        raise SystemExit(f"No stage that left a model is finished in every one of {', '.join(map(str, options.runs))}.")
    found = [score(run, stages, rows, options.show) for run in options.runs]
    for after, before in branches_of(options.runs[0], stages):
        for run, scores in zip(options.runs, found, strict=True):
            better, worse = paired(scores.values(), before, after)
            low, high = wilson(better, better + worse)
            print(f"{run}: {after} against {before}: {better} better, {worse} worse, wins {low:.2f} to {high:.2f}")
    print(f"| capability | kind | n | {' | '.join(stages)} |")
    print(f"|---|---|---|{'---|' * len(stages)}")
    for (capability, kind), by_stage in sorted(found[0].items()):
        n = len(by_stage[stages[0]])
        cells = [cell([sum(scores[capability, kind][s]) / n for scores in found]) for s in stages]
        print(f"| {capability} | {kind} | {n} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
