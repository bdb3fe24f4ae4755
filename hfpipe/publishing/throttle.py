"""Holding back a process that works beside a training, so that it takes next to nothing from it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

NICENESS = 19  # that the process gives itself, once it would go on though this one were killed
SHARE = 0.01  # of one processor: where threads wait for each other, what each of them loses adds up
_SAVED_S = 0.1  # of a processor: what it did not use before and may take at once, so that a small push is soon through
_LOOKS_S = 0.1
_LONGEST_S = 2.0  # no server is left without a sign of life for longer


class Throttle:
    """Stops a process for a while whenever it has taken more of a processor that others wanted than `SHARE` and what it had saved.

    A low priority alone is no bound: every thread of the process has a weight of its own. What it takes of processors
    that nobody else wants is not counted: its time there is not time for which its threads were ready and waited. By
    Linux' own counts; elsewhere nothing is held back.

    Args:
        held: is told after each stop, before the process goes on, for how many seconds it stood.
    """

    def __init__(self, pid: int, held: Callable[[float], None]):
        self._pid, self._held, self._over = pid, held, threading.Event()
        self._thread = threading.Thread(target=self._hold_back, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Let it go, for good."""
        self._over.set()
        self._thread.join()

    def _hold_back(self) -> None:
        try:
            process = os.pidfd_open(self._pid)  # a number may be another process' later
        except (AttributeError, OSError):  # not Linux, or an old one; or it has ended
            return
        looked, seen, debt, idle = time.monotonic(), _threads(self._pid), -_SAVED_S, False
        while seen and not self._over.wait(5 * _LOOKS_S if idle else _LOOKS_S):
            now, told = time.monotonic(), _threads(self._pid)
            ran, waited = (sum(told[t][i] - seen.get(t, (0.0, 0.0))[i] for t in told) for i in (0, 1))
            idle = ran + waited == 0
            taken = ran * waited / (ran + waited) if ran else 0.0
            debt = max(debt + taken - SHARE * (now - looked), -_SAVED_S)
            looked, seen = now, told
            if debt > 0:
                self._stop(process, debt / SHARE)
        os.close(process)

    def _stop(self, process: int, seconds: float) -> None:
        began = time.monotonic()
        with contextlib.suppress(ProcessLookupError):  # it has ended
            if os.getpriority(os.PRIO_PROCESS, self._pid) < NICENESS:
                return  # it has only begun, and could be left standing for ever
            signal.pidfd_send_signal(process, signal.SIGSTOP)
            try:
                self._over.wait(min(seconds, _LONGEST_S))
                self._held(time.monotonic() - began)
            finally:
                signal.pidfd_send_signal(process, signal.SIGCONT)


def _threads(pid: int) -> dict[str, tuple[float, float]]:
    """Thread -> seconds that it ran, and seconds for which it was ready and had no processor; none where Linux isn't."""
    found = {}
    for file in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, ValueError):  # a thread that has ended since
            ran, waited, _ = file.read_text().split()
            found[file.parent.name] = (int(ran) / 1e9, int(waited) / 1e9)
    return found
