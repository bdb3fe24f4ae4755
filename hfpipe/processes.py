"""The processes of a run: a fork server that has imported the stack once, `accelerate launch`, and what they tell."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hfpipe import artifact, upstream
from hfpipe.errors import StageFailed, UserError
from hfpipe.faults import ended, killed
from hfpipe.plan.devices import usable_cores
from hfpipe.progress import Display, describe, duration
from hfpipe.sections import Recipe, Stage
from hfpipe.stages._run import (
    PARENT_VARIABLE,
    child,
    prepare_ahead_child,
    prepare_child,
    quiet_environment,
    synth_child,
)

_START_S = 600  # until a child's first sign: importing the stack from a slow disk takes its time
_IMPORTED_ONCE = ["hfpipe.stages._stack"]


def start_server(log: Path) -> None:
    """Start importing the stack in the fork server while this process goes on; what it prints goes to `log`."""
    import multiprocessing
    import multiprocessing.forkserver

    before = dict(os.environ)
    quiet_environment()  # before huggingface_hub is imported there: it reads its switches once
    multiprocessing.set_forkserver_preload(_IMPORTED_ONCE)
    terminal = os.dup(2)  # bitsandbytes without its kernels
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(stream, 2)
    multiprocessing.forkserver.ensure_running()
    os.dup2(terminal, 2)
    os.close(terminal)
    os.close(stream)
    for name in os.environ.keys() - before.keys():  # a notebook keeps its own progress bars
        del os.environ[name]


def prepare_stages(recipe: Recipe, run: Path, stages: list[str], display: Display) -> None:
    """Prepare the data of `stages`, so that a bad row is told before anything trains."""
    events, log = logs(run, "data")
    ahead = ForkedProcess(prepare_ahead_child, (recipe, run, stages, events, log)) if _has_room(stages) else None
    try:
        process = ForkedProcess(prepare_child, (recipe, run, stages, events, log))
        _follow(process, "data", events, log, display, recipe.pipeline.launch.hang_minutes)
    finally:
        if ahead:
            _end(ahead)


def _has_room(stages: list[str]) -> bool:
    """Whether there is more than one stage, and more than one processor."""
    return min(len(stages), usable_cores()) > 1


def make_synth(recipe: Recipe, run: Path, name: str, display: Display) -> None:
    """Make the rows of a synth section in a process of their own."""
    section = f"synth/{name}"
    events, log = logs(run, f"synth-{name}")
    arguments = (recipe, run, name, events, log)
    _follow(ForkedProcess(synth_child, arguments), section, events, log, display, recipe.pipeline.launch.hang_minutes)


def run_stage_process(recipe: Recipe, run: Path, stage: Stage, display: Display) -> None:
    """Run one stage in a process of its own, or in several, until its folder is finished."""
    events, log = logs(run, stage.name)
    launch = recipe.pipeline.launch
    alone = launch.processes in (None, 1) and not launch.accelerate_config
    if alone or not stage.type.trainer:
        arguments = (recipe, run, stage.name, events, log)
        _follow(ForkedProcess(child, arguments), stage.name, events, log, display, launch.hang_minutes)
    else:
        with open(log, "ab") as stream:
            environment = {**os.environ, PARENT_VARIABLE: str(os.getpid())}
            command = launch_command(recipe, run, stage, events)
            process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)
            _follow(process, stage.name, events, log, display, launch.hang_minutes)
    if not (run / stage.name / artifact.STAGE_FILE).is_file():
        raise StageFailed(f"{stage.name} ended without its result; its output is in {log}.")


def launch_command(recipe: Recipe, run: Path, stage: Stage, events: Path) -> list[str]:
    """`accelerate launch` of one stage with the recipe's `launch` section."""
    launch = recipe.pipeline.launch
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    if launch.processes:
        command += ["--num_processes", str(launch.processes)]
    if launch.accelerate_config:
        shipped = upstream.accelerate_configs().get(launch.accelerate_config)
        command += ["--config_file", str(shipped or launch.accelerate_config)]
    elif (launch.processes or 1) > 1:
        command += ["--multi_gpu"]  # without it accelerate starts one process on a CPU
    command += ["-m", f"hfpipe.stages.{stage.type.name}", str(stage.file), "--out", str(run), "--progress", str(events)]
    for text in recipe.overrides:
        command += ["--set", text]
    return command


class ForkedProcess:
    """A multiprocessing child with the little of Popen's interface that `_follow` needs."""

    def __init__(self, target: Any, arguments: tuple[Any, ...]):
        import multiprocessing

        # The server may be as old as the notebook: what was set since then, such as HF_TOKEN, goes to the child.
        arguments = (dict(os.environ), target, arguments)
        self._process = multiprocessing.get_context("forkserver").Process(target=_with_environment, args=arguments)
        with _main_hidden():
            self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float) -> None:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("stage", timeout)

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()


def _with_environment(environment: dict[str, str], target: Any, arguments: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    target(*arguments)


@contextlib.contextmanager
def _main_hidden() -> Iterator[None]:
    """multiprocessing has a child import `__main__` first, and a script without a guard would start its run there again.

    Our children need nothing of it.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _follow(process: Any, name: str, events: Path, log: Path, display: Display, hang_minutes: float) -> None:
    """Show a child's events until it ends; its errors become ours."""
    error: dict[str, Any] | None = None
    begins = log.stat().st_size if log.is_file() else 0
    life = _Life(name, log, display, hang_minutes * 60)
    try:
        with open(events, encoding="utf-8") as stream:
            while True:
                code = process.poll()
                for event in _read_events(stream):
                    life.sign(event)
                    if event["event"] == "error":
                        error = event
                    elif event["event"] in ("note", "data"):
                        display.line(event.get("stage", name), event["text"])
                    elif text := describe(event):
                        display.status(event.get("stage", name), text)
                if code is not None:
                    break
                life.check()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.1)
    finally:
        _end(process)
    if error and error["user"]:
        raise UserError(error["text"])
    if code != 0:
        output = _since(log, begins)
        # Where one process of several is killed, the others tell only that they lost it.
        unsaid = error is None or killed(code, output)
        reason = ended(code, output, shutil.disk_usage(log.parent).free) if unsaid else error["text"]
        raise StageFailed(
            f"{name} failed: {reason}\nIts whole output is in {log}. Once the cause is mended, the same command goes on."
        )


class _Life:
    """Notices a child that hangs: it is told of with its stacks in the log, and ended when as much time has passed again."""

    def __init__(self, name: str, log: Path, display: Display, patience_s: float):
        self.name, self.log, self.display, self.patience_s = name, log, display, patience_s
        self.silent, self.looked, self.told, self.pid = 0.0, time.monotonic(), False, None

    def sign(self, event: dict[str, Any]) -> None:
        self.silent, self.told, self.pid = 0.0, False, event.get("pid", self.pid)

    def check(self) -> None:
        now = time.monotonic()
        self.silent += min(now - self.looked, 1.0)  # while this process itself was stopped nobody was silent
        self.looked, silent = now, self.silent
        patience_s = self.patience_s if self.pid else max(self.patience_s, _START_S)
        if silent > 2 * patience_s:
            raise StageFailed(
                f"{self.name} hung: it stood still for {duration(silent)} and was ended. Where it stood is in {self.log}. "
                "The same command goes on from its last checkpoint; launch.hang_minutes sets the patience."
            )
        if silent > patience_s and not self.told:
            self.told = True
            self.display.line(self.name, f"no sign of life for {duration(silent)}; where it stands is in {self.log}")
            if self.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGUSR1)


def _since(log: Path, begins: int) -> str:
    return log.read_bytes()[begins:][-20_000:].decode(errors="replace") if log.is_file() else ""


def _end(process: Any) -> None:
    """Leave no child behind, whatever ended the watching of it."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(40 if isinstance(process, subprocess.Popen) else 10)  # accelerate gives its own children 30 s
    except subprocess.TimeoutExpired:
        process.kill()


def _read_events(stream: Any) -> Iterator[dict[str, Any]]:
    while True:
        place = stream.tell()
        line = stream.readline()
        if not line.endswith("\n"):
            stream.seek(place)  # half a line: its writer is not done with it
            return
        with contextlib.suppress(ValueError):  # a line that a full disk cut short
            yield json.loads(line)


def logs(run: Path, name: str) -> tuple[Path, Path]:
    """An empty file for a child's events, and the file for all that it prints."""
    events = run / "logs" / f"{name}.jsonl"
    events.parent.mkdir(exist_ok=True)
    events.write_text("")
    return events, events.with_suffix(".log")
