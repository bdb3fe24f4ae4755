"""Pushing beside a run: a process of its own sends what is finished while the next stage trains."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from hfpipe import artifact
from hfpipe.faults import explain
from hfpipe.progress import Display
from hfpipe.publishing.hub import ERROR_FILE, check_access
from hfpipe.publishing.package import finished_stages, published_at
from hfpipe.sections import Recipe


class Publisher:
    """Nothing of it fails a run: what could not be sent is told at the end, and waits on the disk.

    Args:
        waiting: stages that this run will still make; they are not sent before.
    """

    def __init__(self, recipe: Recipe, run: Path, display: Display, waiting: list[str]):
        self.hub, self.run, self.display, self.waiting = recipe.pipeline.hub, run, display, list(waiting)
        self.stages = list(recipe.stages)
        self._sending: list[str] = []  # what that process was told to send
        self._whole: set[str] = set()  # read once: nobody else works in this folder, and what sends them reads them too
        self._process: subprocess.Popen[str] | None = None
        self._log = run / "logs" / "push.log"
        self._shown = 0

    def __enter__(self) -> Publisher:
        """UserError where the Hub would refuse; else nothing is lost by going on."""
        if self.hub.repo_id is None:
            return self
        if note := check_access(self.hub, self.stages):
            self.display.line("hub", note)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._log.write_text("")
        self.wake()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Wait for what is being sent, have the rest sent, and say what did not get through; after a failure only say it."""
        if self.hub.repo_id is None:
            return
        with self._failing_softly():
            if kind is None:
                self._wait()
                if set(self._left()) - set(self._sending):  # finished since the last process began
                    self.wake()
                    self._wait()
            self._say_what_is_left()

    @contextlib.contextmanager
    def _failing_softly(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.display.line("hub", f"publishing failed: {explain(error)}; `hfpipe push {self.run}` tries again")

    def wake(self, finished: str | None = None) -> None:
        """Have what is finished sent, unless that is being done."""
        if self.hub.repo_id is None:
            return
        if finished in self.waiting:
            self.waiting.remove(finished)
        with self._failing_softly():
            self._show()
            self._send()

    def _send(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        stages = [stage for stage in self._finished() if stage not in self.waiting]
        if not any(published_at(self.run, self.hub, stage) is None for stage in stages):
            return
        command = [sys.executable, "-m", "hfpipe", "push", str(self.run)]
        for stage in stages:
            command += ["--stage", stage]
        self._sending = stages
        with open(self._log, "a", encoding="utf-8") as log:
            # The lowest priority: it has all the time of the next stage, and must not take any of it.
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, preexec_fn=lambda: os.nice(19)
            )

    def _say_what_is_left(self) -> None:
        if left := self._left():
            told = artifact.read_json(self.run / "logs" / ERROR_FILE) or {}
            busy = self._process is not None and self._process.poll() is None
            why = " (it is being sent)" if busy else f" ({told['reason']})" if "reason" in told else ""
            self.display.line("hub", f"not published yet: {', '.join(left)}{why}")
            self.display.line("hub", f"everything is on the disk; `hfpipe push {self.run}` sends it")

    def _wait(self) -> None:
        if self._process is not None:
            self.display.status("hub", f"publishing to {self.hub.repo_id}")
            self._process.wait()
        self._show()

    def _left(self) -> list[str]:
        return [stage for stage in self._finished() if published_at(self.run, self.hub, stage) is None]

    def _finished(self) -> list[str]:
        found = finished_stages(self.run, self._whole)
        self._whole.update(stage for stage in found if stage not in self.waiting)
        return found

    def _show(self) -> None:
        """Lines of the log that say what has been published."""
        text = self._log.read_text(encoding="utf-8", errors="replace")
        whole = text.rfind("\n") + 1
        for line in text[self._shown : whole].splitlines():
            name, _, rest = line.partition(" ")
            if name in (*self.stages, "main"):
                self.display.line(name, rest.strip())
        self._shown = whole
