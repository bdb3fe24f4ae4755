"""`hfpipe plan --rehearse`: real steps on this machine, by the stage's own training."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT, hfpipe
from .test_house import HEAVY

TRAINED = ("pretrain", "midtrain", "sft", "dpo")
# Of a finished run: one stage is to be made again, from a parent and on data that are there.
AGAIN = ("--rehearse", "--set", "dpo.trainer.learning_rate=5e-4")


def rehearsed(*arguments) -> dict[str, dict]:
    told = json.loads(hfpipe("plan", "micro", *arguments, "--json").stdout)
    return {row["stage"]: row for row in told["stages"]} | {"total": told["total"]}


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}


def test_what_was_measured_stands_in_the_quote(tmp_path):
    rows = rehearsed("--rehearse", "--price", "3600", "--out", tmp_path / "none")
    for name in TRAINED:
        row, found = rows[name], rows[name]["measured"]
        assert (found["steps"], found["device"]) == (10, "cpu")
        assert row["seconds"] >= 0.99 * found["seconds_per_step"] * row["steps"]
        assert row["dollars"] == pytest.approx(row["seconds"])
        assert row["flops_by_part"]["training"] / row["steps"] == pytest.approx(
            found["utilisation"] * found["seconds_per_step"] * peak(rows), rel=1e-3
        )
        assert 0 < found["memory"] < 3e9
    assert rows["pretrain"]["measured"]["tokens_per_s"] == pytest.approx(
        16 * 128 / rows["pretrain"]["measured"]["seconds_per_step"], rel=0.01
    )
    assert rows["pretrain"]["measured"]["made_up"] == ["random tokens"]
    assert rows["sft"]["measured"]["made_up"] == ["random tokens", "random weights"]
    assert rows["total"]["seconds"] == pytest.approx(sum(rows[name]["seconds"] for name in TRAINED))
    assert not (tmp_path / "none").exists()


def peak(rows: dict[str, dict]) -> float:
    """FLOP/s of this machine, from a plan without rehearsal."""
    row = rehearsed("--out", "none")["pretrain"]
    return row["flops"] / row["seconds"] / row["utilisation"]


def test_what_is_there_already_is_used_and_left_alone(micro_run):
    """And the command itself imports nothing heavy: its child does."""
    before, arguments = files_of(micro_run), ["plan", "micro", "--out", str(micro_run), *AGAIN]
    code = f"import sys\nfrom hfpipe.cli import main\nif __name__ == '__main__':\n    assert main({arguments!r}) == 0\n"
    code += f"    assert not {HEAVY!r} & set(sys.modules), {HEAVY!r} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert files_of(micro_run) == before
    times = [line for line in done.stdout.splitlines() if "time: " in line]
    assert len(times) == 4
    measured = [line for line in times if "measured" in line]
    assert len(measured) == 1
    assert "measured on this machine: 10 steps, " in measured[0]  # of the real rows, from the real weights
    assert "the reference's passes, reckoned, among it" in measured[0]
    assert "(1 of 1 stages measured)" in done.stdout


def test_what_cannot_be_rehearsed_says_why(micro_run, recipe):
    sampled = "stage: grpo\nmodel: {from: sft}\ndata: {train: [{path: tinyworld/sft, limit: 64}]}\n"
    sampled += "rewards: {functions: [{check: contains, value: a}]}\ntrainer: {max_steps: 2}\n"
    folder = recipe({"grpo": sampled})
    head = folder / "pipeline.yaml"
    head.write_text(head.read_text().replace("sft, dpo", "sft, dpo, grpo"))
    wrong = "dpo.adapter={type: lora, target_modules: [no_such_layer]}"
    done = hfpipe("plan", folder, "--out", micro_run, "--rehearse", "--set", wrong, "--set", "dpo.regularize=null")
    assert "not rehearsed: its steps wait for answers, whose length is the model's own" in done.stdout
    assert "dpo.yaml: adapter is refused upstream for this model" in done.stdout
    assert "(0 of 2 stages measured)" in done.stdout


def test_another_device_is_not_this_machine(micro_run):
    done = hfpipe("plan", "micro", "--out", micro_run, *AGAIN, "--device", "h100", check=2)
    assert done.stderr == "hfpipe: --rehearse measures this machine, which is no NVIDIA H100 SXM: leave --device out.\n"
