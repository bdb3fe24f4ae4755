"""The processes of a run: a fork server that has imported the stack once, `accelerate launch`, and what they tell."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hfpipe import artifact, upstream
from hfpipe.errors import StageFailed, UserError
from hfpipe.progress import Display, describe
from hfpipe.sections import Recipe, Stage
from hfpipe.stages._run import PARENT_VARIABLE, child, prepare_child, quiet_environment

_IMPORTED_ONCE = ["torch", "transformers", "trl", "datasets", "hfpipe.training.fit", "hfpipe.evaluation.basics"]


def start_server(run: Path) -> None:
    """Start importing the stack in the fork server while this process goes on."""
    import multiprocessing
    import multiprocessing.forkserver

    quiet_environment()  # before huggingface_hub is imported there: it reads its switches once
    multiprocessing.set_forkserver_preload(_IMPORTED_ONCE)
    terminal = os.dup(2)  # what the imports print (bitsandbytes without its kernels) goes to the log
    _, log = _logs(run, "data")
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(stream, 2)
    multiprocessing.forkserver.ensure_running()
    os.dup2(terminal, 2)
    os.close(terminal)
    os.close(stream)


def prepare_stages(recipe: Recipe, run: Path, stages: list[str], display: Display) -> None:
    """Prepare the data of `stages`, so that a bad row is told before anything trains."""
    events, log = _logs(run, "data")
    arguments = (recipe, run, stages, events, log)
    _follow_child(prepare_child, arguments, "data", events, log, display)


def run_stage_process(recipe: Recipe, run: Path, stage: Stage, display: Display) -> None:
    """Run one stage in a process of its own, or in several, until its folder is finished."""
    events, log = _logs(run, stage.name)
    launch = recipe.pipeline.launch
    alone = launch.processes in (None, 1) and not launch.accelerate_config
    if alone or not stage.type.trainer:
        arguments = (recipe, run, stage.name, events, log)
        _follow_child(child, arguments, stage.name, events, log, display)
    else:
        with open(log, "ab") as stream:
            environment = {**os.environ, PARENT_VARIABLE: str(os.getpid())}
            command = launch_command(recipe, run, stage, events)
            process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)
            _follow(process, stage.name, events, log, display)
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


class _Process:
    """A multiprocessing child with the little of Popen's interface that `_follow` needs."""

    def __init__(self, target: Any, arguments: tuple[Any, ...]):
        import multiprocessing

        self._process = multiprocessing.get_context("forkserver").Process(target=target, args=arguments)
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


def _follow_child(
    target: Any, arguments: tuple[Any, ...], name: str, events: Path, log: Path, display: Display
) -> None:
    _follow(_Process(target, arguments), name, events, log, display)


def _follow(process: Any, name: str, events: Path, log: Path, display: Display) -> None:
    """Show a child's events until it ends; its errors become ours."""
    error: dict[str, Any] | None = None
    try:
        with open(events, encoding="utf-8") as stream:
            while True:
                code = process.poll()
                for event in _read_events(stream):
                    if event["event"] == "error":
                        error = event
                    elif event["event"] in ("note", "data"):
                        display.line(event.get("stage", name), event["text"])
                    elif text := describe(event):
                        display.status(event.get("stage", name), text)
                if code is not None:
                    break
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.1)
    finally:
        _end(process)
    if error and error["user"]:
        raise UserError(error["text"])
    if code != 0:
        reason = error["text"] if error else f"its process ended with exit code {code}"
        raise StageFailed(
            f"{name} failed: {reason}\nIts whole output is in {log}. Once the cause is mended, the same command goes on."
        )


def _end(process: Any) -> None:
    """Leave no child behind, whatever ended the watching of it."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()


def _read_events(stream: Any) -> Iterator[dict[str, Any]]:
    while True:
        place = stream.tell()
        line = stream.readline()
        if not line.endswith("\n"):
            stream.seek(place)  # half a line: its writer is not done with it
            return
        yield json.loads(line)


def _logs(run: Path, name: str) -> tuple[Path, Path]:
    """An empty file for a child's events, and the file for all that it prints."""
    events = run / "logs" / f"{name}.jsonl"
    events.parent.mkdir(exist_ok=True)
    events.write_text("")
    return events, events.with_suffix(".log")
