"""How much a stage's training is held up while the stages before it are published: sft of `tiny`, with and without, in turns.

    python benchmarks/push_beside_training.py runs/tiny [--pairs 5] [--xet] [--megabytes 200] [--steps 150] [--alone]

Copies the stages before sft from a finished run and runs sft alone, once publishing them to a Hub on this machine (the
tests' own, in a process of its own that gets only what is idle, since a real one costs other machines' time) and once not.
`--megabytes` is put beside midtrain's weights. Prints for each pair the seconds of training and their ratio, and how many
seconds of a processor the pushing process took before sft's stage began, its own start among them, and from then until
sft was trained; and for how long the threads of sft's process were ready and had no processor, each, by Linux' own count, until it was
done: the difference is what the push held them up, which a machine's changing speed does not touch. With `--alone` nothing trains:
the pushing process is given one stage after the other, and says what its start and each push took of a processor, which
other work on the machine hardly changes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hfpipe import artifact
from hfpipe.publishing.publisher import Pusher

ROOT = Path(__file__).parent.parent
TICKS = os.sysconf("SC_CLK_TCK")


def prepare(finished: Path, run: Path, megabytes: int) -> None:
    for stage in ("tokenizer", "pretrain", "midtrain"):
        shutil.copytree(finished / stage, run / stage)
    shutil.copy(finished / "run.json", run)
    ballast = run / "midtrain" / "ballast.safetensors"
    ballast.write_bytes(os.urandom(megabytes * 10**6))  # other bytes each time: a Hub takes the same ones only once
    record = artifact.read_record(run / "midtrain" / artifact.STAGE_FILE) or {}
    record["files"] |= artifact.checksums(run / "midtrain", [ballast.name])
    artifact.write_record(run / "midtrain" / artifact.STAGE_FILE, record)


def train(run: Path, env: dict[str, str], *settings: str) -> tuple[float, float, float, float]:
    """Seconds of training, for how many its threads waited, and the pushing processes' seconds of a processor, before and beside it."""
    command = [sys.executable, "-m", "hfpipe", "run", "tiny", "--out", str(run), "--only", "sft", *settings]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | env, stdout=subprocess.DEVNULL)
    before, pushed, waited = 0.0, {}, 0.0
    while process.poll() is None:
        if not (run / "sft").is_dir():  # what is sent afterwards holds nothing up
            pushed |= pushing(run)
            waited = max(waited, waiting(run / "logs" / "sft.jsonl"))
        if not (run / "sft.partial").is_dir() and not (run / "sft").is_dir():
            before = sum(pushed.values())
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(process.returncode)
    took = json.loads((run / "sft" / artifact.STAGE_FILE).read_text())["metrics"]["train_runtime_s"]
    return took, waited, before, sum(pushed.values()) - before


def waiting(events: Path) -> float:
    """For how long the threads of a stage's process have been ready and had no processor, the mean of those that compute."""
    try:
        pid = json.loads(events.read_text().splitlines()[0])["pid"]
        told = [line.read_text().split() for line in Path(f"/proc/{pid}/task").glob("*/schedstat")]
    except (OSError, IndexError, ValueError, KeyError):  # it has not begun, or ended
        return 0.0
    worked = sorted(((int(ran), int(delay)) for ran, delay, _ in told), reverse=True)[: os.cpu_count()]
    return sum(delay for _, delay in worked) / len(worked) / 1e9


def pushing(run: Path) -> dict[int, float]:
    """By Linux' own count: process -> its seconds of a processor until now."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"\0hfpipe.publishing.pusher\0{run}\0" in (folder / "cmdline").read_text():
                told = (folder / "stat").read_text().rpartition(")")[2].split()
                found[int(folder.name)] = (int(told[11]) + int(told[12])) / TICKS
        except (OSError, UnicodeDecodeError):  # it has ended
            continue
    return found


def push(run: Path, repo_id: str) -> list[str]:
    """Seconds of a processor that the pushing process says it took: its start, and a push of each stage."""
    record = artifact.read_json(run / "run.json") or {}
    artifact.write_json(run / "run.json", {**record, "hub": {"repo_id": repo_id}})
    stages, log = ["tokenizer", "pretrain", "midtrain"], run.with_suffix(".log")
    pusher = Pusher(run, log, beside=False)  # else it waits for whatever else computes here
    for number in range(len(stages)):
        pusher.send(stages[: number + 1])
        pusher.wait()
    pusher.end()
    return re.findall(r"^hfpipe: .* ([\d.]+) s of a processor", log.read_text(), re.MULTILINE)


def _stand_back() -> None:
    """Of what the Hub itself computes next to nothing is to be seen in the figures."""
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def serve(folder: str, xet: bool) -> tuple[subprocess.Popen[str], dict[str, str]]:
    command = [sys.executable, "-m", "tests.localhub", "--root", f"{folder}/hub", *(["--xet"] if xet else [])]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, preexec_fn=_stand_back)
    env, last = {"HF_HOME": f"{folder}/home"}, "HF_XET_XORB_COMPRESSION_POLICY" if xet else "no_proxy"
    while last not in env:
        name, _, value = server.stdout.readline().strip().removeprefix("export ").partition("=")
        env[name] = value.strip("'\"")
    return server, env


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--xet", action="store_true")
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--steps", type=int, help="of sft; by default all of the recipe's")
    parser.add_argument("--alone", action="store_true")
    options = parser.parse_args()
    common = ["--set", "evaluate={samples: 0}"]  # what comes after the training is not measured
    common += ["--set", f"sft.trainer.max_steps={options.steps}"] if options.steps else []
    ratios, shares, delays = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        server, env = serve(folder, options.xet)
        try:
            for number in range(options.pairs):
                if options.alone:
                    os.environ.update(env)
                    run = Path(folder) / f"alone-{number}"
                    run.mkdir()
                    prepare(options.run, run, options.megabytes)
                    start, *pushes = push(run, f"alice/run{number}")
                    print(f"start {start} s, pushes {', '.join(pushes)} s of a processor", flush=True)
                    continue
                took, waited = {}, {}
                for way in ("without", "with") if number % 2 else ("with", "without"):
                    run = Path(folder) / f"{way}-{number}"
                    run.mkdir()
                    prepare(options.run, run, options.megabytes)
                    publish = ["--set", f"hub.repo_id=alice/run{number}"] if way == "with" else []
                    took[way], waited[way], *spent = train(run, env, *common, *publish)
                    if publish:
                        before, beside = spent
                    shutil.rmtree(run)
                assert before + beside > 0, "nothing was pushed beside the training"
                ratios.append(took["with"] / took["without"])
                shares.append(beside / took["without"])
                delays.append((waited["with"] - waited["without"]) / took["without"])
                print(
                    f"with {took['with']:.2f} s, without {took['without']:.2f} s, ratio {ratios[-1]:.3f}; the push took "
                    f"{before:.2f} s of a processor before it, {beside:.2f} s beside it, {shares[-1]:.1%}; the training's "
                    f"threads waited {waited['with']:.2f} s with, {waited['without']:.2f} s without, {delays[-1]:.1%} more",
                    flush=True,
                )
        finally:
            server.terminate()
    if options.alone:
        return
    print(
        f"median of {len(ratios)}: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}); the push's "
        f"seconds of a processor beside it are {statistics.median(shares):.1%} of the training's ({max(shares):.1%} at most), "
        f"its threads waited {statistics.median(delays):.1%} of it more ({max(delays):.1%} at most)"
    )


if __name__ == "__main__":
    main()
