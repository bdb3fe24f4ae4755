"""Kills, damage and changes at random (tests/sequences.py), many times over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from .conftest import ROOT


def sequences(folder: Path, count: int, workers: int = 2) -> dict[str, int]:
    """`count` random sequences, shared by some processes; the sum of what they counted."""
    seed = int(os.environ.get("HFPIPE_TEST_SEED", 0))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    started = []
    for number in range(workers):
        command = [sys.executable, "-m", "tests.sequences"]
        command += [str(folder / str(number)), str(seed + number), str(count // workers)]
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        started.append(subprocess.Popen(command, env=environment, cwd=ROOT, text=True, **pipe))
    outputs = [process.communicate()[0] for process in started]
    total: dict[str, int] = {}
    for process, output in zip(started, outputs, strict=True):
        print(output)
        assert process.returncode == 0, output[-4000:]
        for name, value in json.loads(output.splitlines()[-1]).items():
            total[name] = total.get(name, 0) + value
    return total


def test_random_sequences_end_as_a_clean_run_does(tmp_path):
    total = sequences(tmp_path, 200)
    assert total["sequences"] >= 200
    assert total["kills"] > 20
    assert total["corruptions"] > 20
    assert total["resumed"] > 0
