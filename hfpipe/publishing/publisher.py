"""Pushing beside a run: a process of its own sends what is finished while the next stage trains."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hfpipe import artifact
from hfpipe.faults import explain
from hfpipe.progress import Display
from hfpipe.publishing.hub import ERROR_FILE, check_access
from hfpipe.publishing.package import finished_stages, published_at
from hfpipe.publishing.throttle import Throttle
from hfpipe.sections import Recipe


class Publisher:
    """Nothing of it fails a run: what could not be sent is told at the end, and waits on the disk.

    Args:
        waiting: stages that this run will still make; they are not sent before.
    """

    def __init__(self, recipe: Recipe, run: Path, display: Display, waiting: list[str]):
        self.hub, self.run, self.display, self.waiting = recipe.pipeline.hub, run, display, list(waiting)
        self.stages = list(recipe.stages)
        self._sending: list[str] = []  # what was last told to be sent
        self._whole: set[str] = set()  # read once: nobody else works in this folder, and what sends them reads them too
        self._pusher: Pusher | None = None
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
        with self._failing_softly():
            left = self._left()
            if left or self.waiting:
                self._pusher = Pusher(self.run, self._log, beside=True)
            if left:
                self._send()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Wait for what is being sent, have the rest sent, and say what did not get through; after a failure only say it."""
        if self.hub.repo_id is None:
            return
        if kind is not None and not issubclass(kind, Exception):
            self._end(at_once=True)  # one that the user interrupted ends with the run
        try:
            with self._failing_softly():
                if kind is None:
                    self._send_rest()
                self._show()
                self._say_what_is_left()
        finally:
            self._end()  # a failed run's push goes on, as was said

    def _end(self, at_once: bool = False) -> None:
        pusher, self._pusher = self._pusher, None
        if pusher is not None:
            pusher.end(at_once)

    @contextlib.contextmanager
    def _failing_softly(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.display.line(
                "hub", f"publishing failed: {explain(error)}; `hfpipe push {shlex.quote(str(self.run))}` tries again"
            )

    def wake(self, finished: str) -> None:
        """Have what is finished sent, unless that is being done."""
        if self.hub.repo_id is None:
            return
        if finished in self.waiting:
            self.waiting.remove(finished)
        self._whole.add(finished)  # written just now, and read again before it is sent
        with self._failing_softly():
            self._show()
            if self._pusher is None or not self._pusher.is_busy():
                self._send()

    def _send(self) -> None:
        if self._pusher is None or not self._pusher.is_alive():
            self._pusher = Pusher(self.run, self._log, beside=True)
        self._sending = [stage for stage in self._finished() if stage not in self.waiting]
        self._pusher.send(self._sending)

    def _send_rest(self) -> None:
        """What finished since the last push began is sent by a process of ordinary priority: nothing trains any more."""
        if not (left := self._left()):
            return
        last = Pusher(self.run, self._log, beside=False) if set(left) - set(self._sending) else None
        self.display.status("hub", f"publishing to {self.hub.repo_id}")
        if self._pusher is not None:
            self._pusher.hurry()
            self._pusher.wait()
        if last is not None:
            if self._pusher is not None:
                self._pusher.end()
            self._pusher = last
            self._show()
            self._send()
            self._pusher.wait()

    def _say_what_is_left(self) -> None:
        if left := self._left():
            told = artifact.read_json(self.run / "logs" / ERROR_FILE) or {}
            busy = self._pusher is not None and self._pusher.is_busy()
            why = " (it is being sent)" if busy else f" ({told['reason']})" if "reason" in told else ""
            self.display.line("hub", f"not published yet: {', '.join(left)}{why}")
            self.display.line("hub", f"everything is on the disk; `hfpipe push {shlex.quote(str(self.run))}` sends it")

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


class Pusher:
    """The run's end of a process that pushes (hfpipe/publishing/pusher.py): one job at a time."""

    def __init__(self, run: Path, log: Path, beside: bool):
        command = [sys.executable, "-m", "hfpipe.publishing.pusher", str(run), *(["beside"] if beside else [])]
        with open(log, "a", encoding="utf-8") as stream:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream, bufsize=0
            )
        self._asked = False
        self._throttle = Throttle(self._process.pid, held=self._tell) if beside else None

    def _tell(self, what: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended, which `is_busy` finds
            self._process.stdin.write(json.dumps(what).encode() + b"\n")

    def send(self, stages: list[str]) -> None:
        self._asked = True
        self._tell(stages)

    def is_busy(self) -> bool:
        return self._asked and not self._answered(0)

    def wait(self) -> None:
        """Until the job is over, well or not."""
        if self._asked:
            self._answered(None)

    def _answered(self, seconds: float | None) -> bool:
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            return False
        if not os.read(self._process.stdout.fileno(), 100):
            self._process.wait()  # its output has ended, and so it does
        self._asked = False
        return True

    def hurry(self) -> None:
        """Nothing holds it back any more, and it gets the run's own priority where the system lets it: it may be root's right."""
        self._let_go()
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{self._process.pid}/task").iterdir():
                os.setpriority(os.PRIO_PROCESS, int(task.name), os.getpriority(os.PRIO_PROCESS, 0))

    def _let_go(self) -> None:
        throttle, self._throttle = self._throttle, None
        if throttle is not None:
            throttle.end()

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def end(self, at_once: bool = False) -> None:
        """Have it end: after the job that it is doing, or now."""
        self._let_go()
        if self.is_busy() and not at_once:
            self._tell(None)
        else:
            self._process.kill()
            self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
