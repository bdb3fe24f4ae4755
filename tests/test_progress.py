"""What a person sees while a run goes on, on a terminal and elsewhere; Ctrl-C, and the same command goes on."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

from hfpipe.progress import Display, describe

from .conftest import ROOT, stage_json

WIDTH = 100
STEP = re.compile(r"sft +step (\d+)/(\d+)  loss \d+\.\d{3}  [\d.]+k? tokens/s  \d+ (s|min \d\d s) left")


def on_a_terminal(command: list[str], press: Callable[[str], bytes | None]) -> tuple[int, str]:
    """Run a command on a terminal of its own; `press` sees all that was written so far and says which keys to press now."""
    keys, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, WIDTH, 0, 0))
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
        preexec_fn=of_this_terminal,
    )  # fmt: skip
    os.close(terminal)
    written, deadline = b"", time.monotonic() + 900
    while time.monotonic() < deadline:
        if not select.select([keys], [], [], 1)[0]:
            continue
        try:
            new = os.read(keys, 1 << 16)
        except OSError:  # the terminal's other end is closed: the command has ended
            break
        written += new
        if pressed := press(written.decode(errors="replace")):
            os.write(keys, pressed)
    os.close(keys)
    return process.wait(30), written.decode()


def of_this_terminal() -> None:
    """So that Ctrl-C is a signal to all of them, also where the tests are a shell's background job, which ignores it."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def screen(written: str) -> list[str]:
    """The lines that a terminal shows in the end."""
    shown = []
    for line in written.replace("\r\n", "\n").split("\n"):
        cells: list[str] = []
        for part in line.split("\r"):
            cells[: len(part)] = part
        shown.append("".join(cells).rstrip())
    return shown


def test_one_live_line_and_ctrl_c_and_the_same_command_goes_on(micro_run, tmp_path):
    run, pressed = tmp_path / "micro", []
    for name in ("tokenizer", "pretrain", "midtrain"):
        shutil.copytree(micro_run / name, run / name)
    command = [sys.executable, "-m", "hfpipe", "run", "micro", "--out", str(run), "--to", "sft"]
    command += ["--set", "sft.trainer.save_steps=5", "--set", "sft.trainer.logging_steps=1"]

    def interrupt(written: str) -> bytes | None:
        if pressed or not any(int(step) >= 7 for step, _, _ in STEP.findall(written)):
            return None
        pressed.append(True)
        return b"\x03"

    code, written = on_a_terminal(command, interrupt)
    assert code == 130, written
    assert "interrupted; the same command goes on from what is on disk." in written
    assert "Traceback" not in written
    assert not (run / "sft").exists()

    code, again = on_a_terminal(command, lambda written: None)
    assert code == 0, again
    goes_on = re.search(r"resumed from checkpoint-(\d+)", again)
    assert goes_on, again
    assert int(goes_on[1]) >= 5
    assert stage_json(run / "sft")["weights"] == stage_json(micro_run / "sft")["weights"]

    steps = [(int(step), int(total)) for step, total, _ in STEP.findall(written) + STEP.findall(again)]
    assert len({total for _, total in steps}) == 1
    assert len(steps) >= 3
    assert all(int(step) > int(goes_on[1]) for step, _, _ in STEP.findall(again))
    for drawn in re.split(r"[\r\n]+", written + again):
        assert not STEP.match(drawn) or len(drawn.rstrip()) < WIDTH
    left = [[line for line in screen(text) if STEP.search(line)] for text in (written, again)]
    assert [len(lines) for lines in left] == [1, 0], left  # where it was interrupted
    assert any(re.match(r"sft +\d+ steps, validation loss", line) for line in screen(again))


def test_elsewhere_a_plain_log(micro_run):
    told = (micro_run / "stdout.txt").read_text()
    assert "\r" not in told
    assert "\x1b" not in told
    written = io.StringIO()
    step = {"event": "step", "step": 7, "total": 38, "loss": 3.21, "tokens_per_s": 6_120.0, "left_s": 65.0}
    Display(written, every_s=0).status("sft", describe(step))
    assert written.getvalue() == "sft        step 7/38  loss 3.210  6.12k tokens/s  1 min 05 s left\n"


def test_every_stage_says_in_which_numbers_it_trains_and_why(micro_run):
    import torch

    flags = set(Path("/proc/cpuinfo").read_text().split())
    native = sorted(flags & {"avx512_bf16", "amx_bf16", "bf16", "sve_bf16"})
    why = f"bf16: the CPU has {', '.join(native)}" if native else "fp32: the CPU has no bf16 instructions"
    if torch.accelerator.is_available():
        why = str(
            torch.cuda.get_device_name() if torch.cuda.is_available() else torch.accelerator.current_accelerator()
        )
    told = (micro_run / "stdout.txt").read_text().splitlines()
    for name in ("pretrain", "midtrain", "sft", "dpo"):
        line = next(line for line in told if re.match(rf"{name} +(bf16|fp32): ", line))
        assert why in line
