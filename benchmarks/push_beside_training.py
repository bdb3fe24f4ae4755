"""How much a stage's training is held up while the stages before it are published: sft of `tiny`, with and without, in turns.

    python benchmarks/push_beside_training.py runs/tiny [--pairs 5] [--xet] [--megabytes 200]

Copies the stages before sft from a finished run and runs sft alone, once publishing them to a Hub on this machine (the
tests' own, in a process of its own at the lowest priority, since a real one costs other machines' time) and once not.
`--megabytes` is put beside pretrain's weights, so that there is something to send. Prints a ratio for each pair.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from hfpipe import artifact

ROOT = Path(__file__).parent.parent


def prepare(finished: Path, run: Path, megabytes: int, number: int) -> None:
    for stage in ("tokenizer", "pretrain", "midtrain"):
        shutil.copytree(finished / stage, run / stage)
    shutil.copy(finished / "run.json", run)
    ballast = run / "pretrain" / "ballast.safetensors"
    ballast.write_bytes(os.urandom(megabytes * 10**6))  # other bytes each time: a Hub takes the same ones only once
    record = artifact.read_record(run / "pretrain" / artifact.STAGE_FILE) or {}
    record["files"] |= artifact.checksums(run / "pretrain", [ballast.name])
    artifact.write_record(run / "pretrain" / artifact.STAGE_FILE, record)


def train(run: Path, env: dict[str, str], *settings: str) -> float:
    command = [sys.executable, "-m", "hfpipe", "run", "tiny", "--out", str(run), "--only", "sft", *settings]
    subprocess.run(command, cwd=ROOT, env=os.environ | env, check=True, stdout=subprocess.DEVNULL)
    return json.loads((run / "sft" / artifact.STAGE_FILE).read_text())["metrics"]["train_runtime_s"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--xet", action="store_true")
    parser.add_argument("--megabytes", type=int, default=200)
    options = parser.parse_args()
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        hub = [sys.executable, "-m", "tests.localhub", "--root", f"{folder}/hub", *(["--xet"] if options.xet else [])]
        server = subprocess.Popen(hub, cwd=ROOT, stdout=subprocess.PIPE, text=True, preexec_fn=lambda: os.nice(19))
        try:
            env = {"HF_HOME": f"{folder}/home"}
            for line in server.stdout:
                name, equals, value = line.strip().removeprefix("export ").partition("=")
                if not equals:
                    break
                env[name] = value.strip("'\"")
                if name == "no_proxy":
                    break
            for number in range(options.pairs):
                took = {}
                for way in ("without", "with") if number % 2 else ("with", "without"):
                    run = Path(folder) / f"{way}-{number}"
                    run.mkdir()
                    prepare(options.run, run, options.megabytes, number)
                    settings = ["--set", f"hub.repo_id=alice/run{number}"] if way == "with" else []
                    took[way] = train(run, env, *settings)
                    shutil.rmtree(run)
                ratios.append(took["with"] / took["without"])
                print(f"with {took['with']:.2f} s, without {took['without']:.2f} s, ratio {ratios[-1]:.3f}", flush=True)
        finally:
            server.terminate()
    print(f"median of {len(ratios)}: {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
