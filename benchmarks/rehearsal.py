"""Whether ten steps foretell a stage: the time that `hfpipe plan --rehearse` names against what the run then takes.

    python benchmarks/rehearsal.py RECIPE [--rounds 2] [--set KEY=VALUE ...]

Rehearsed before the run, with random weights and tokens where there are none yet, and after it, on what it left. The time of a
stage is that of its training loop, `train_runtime_s` in `stage.json`: preparation and scoring are not in it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from hfpipe import artifact


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for hfpipe run")
    options = parser.parse_args()
    settings = [word for setting in options.set for word in ("--set", setting)]
    print("| round | stage | before | after | the run | before / run | after / run |\n|---|---|---|---|---|---|---|")
    for number in range(1, options.rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            command = [options.recipe, "--out", str(run), *settings]
            before = rehearsed(command)
            subprocess.run([sys.executable, "-m", "hfpipe", "run", *command], check=True, stdout=subprocess.DEVNULL)
            after = rehearsed([*command, "--set", "seed=1"])  # another fingerprint: else there would be nothing to plan
            for stage, seconds in before.items():
                took = artifact.read_record(run / stage / artifact.STAGE_FILE)["metrics"]["train_runtime_s"]
                told = " | ".join(f"{value:.1f} s" for value in (seconds, after[stage], took))
                print(f"| {number} | {stage} | {told} | {seconds / took:.2f} | {after[stage] / took:.2f} |", flush=True)


def rehearsed(command: list[str]) -> dict[str, float]:
    """Stage -> seconds, of the stages that were measured."""
    words = [sys.executable, "-m", "hfpipe", "plan", *command, "--rehearse", "--json"]
    told = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    return {row["stage"]: row["seconds"] for row in told["stages"] if "seconds_per_step" in (row.get("measured") or {})}


if __name__ == "__main__":
    main()
