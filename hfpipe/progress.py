"""What a person sees of a running stage: one live line on a terminal, a plain log elsewhere."""

from __future__ import annotations

import logging
import re
import sys
import time
import warnings
from typing import Any

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line feed


def duration(seconds: float) -> str:
    """`7 s`, `3 min 05 s`, `2 h 10 min`, `12 days`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    if seconds >= 100 * 3600:
        return f"{seconds / 86400:,.0f} days"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def quantity(number: float) -> str:
    """`950`, `12.3k`, `1.24M`, `2,880T`."""
    number = float(f"{number:.3g}")
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:,.0f}{unit}" if number >= 1000 * size else f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def money(dollars: float) -> str:
    """`$0.42`, `$12.30`, `$1,240`."""
    return f"${dollars:,.0f}" if dollars >= 100 else f"${dollars:,.2f}"


def printable(text: str) -> str:
    """Text of a model or of data without the control characters that would command a terminal."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def quiet_imports() -> None:
    """Before upstream is imported: it misses a 4-bit kernel that no model here asks for, and widgets that nobody needs."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="IProgress not found")


def describe(event: dict[str, Any]) -> str | None:
    """A line for an event, or None for one that is not shown."""
    kind = event["event"]
    if kind == "step":
        parts = [f"step {event['step']}/{event['total']}"]
        if event.get("loss") is not None:
            parts.append(f"loss {event['loss']:.3f}")
        if event.get("tokens_per_s"):
            parts.append(f"{quantity(event['tokens_per_s'])} tokens/s")
        if event.get("left_s") is not None:
            parts.append(f"{duration(event['left_s'])} left")
        return "  ".join(parts)
    if kind == "doing":
        return event["text"]
    if kind in ("note", "data"):
        return f"{event['text']}"
    return None


class Display:
    """One line per stage that is rewritten on a terminal; elsewhere a line at most every `every_s` seconds."""

    def __init__(self, stream: Any = None, every_s: float = 20.0):
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        self.every_s = every_s
        self._last = time.monotonic()
        self._shown = 0

    def status(self, stage: str, text: str) -> None:
        """The stage's current state; on a terminal it replaces the one before."""
        now = time.monotonic()
        if self.live:
            import shutil

            line = f"{stage:<10} {text}"[: shutil.get_terminal_size().columns - 1]
            self.stream.write("\r" + line.ljust(self._shown))
            self._shown = len(line)
        elif now - self._last >= self.every_s:
            self.stream.write(f"{stage:<10} {text}\n")
            self._last = now
        self.stream.flush()

    def line(self, stage: str, text: str) -> None:
        """A line that stays."""
        self.text(f"{stage:<10} {text}")

    def text(self, text: str) -> None:
        """Lines that stay and are of no one stage."""
        if self.live and self._shown:
            self.stream.write("\r" + " " * self._shown + "\r")
            self._shown = 0
        self.stream.write(f"{text}\n")
        self.stream.flush()
        self._last = time.monotonic()


class NotebookDisplay(Display):
    """The same in a notebook: one output, written anew as the run goes on, so that only what stays is saved with it."""

    def __init__(self, every_s: float = 1.0):
        from IPython.display import display

        self.every_s = every_s
        self._last = 0.0
        self._lines: list[str] = []
        self._handle = display({"text/plain": ""}, raw=True, display_id=True)

    def status(self, stage: str, text: str) -> None:
        if time.monotonic() - self._last >= self.every_s:
            self._draw(f"{stage:<10} {text}")

    def text(self, text: str) -> None:
        self._lines.append(text)
        self._draw()

    def _draw(self, status: str = "") -> None:
        self._handle.update({"text/plain": "\n".join([*self._lines, status]).rstrip("\n")}, raw=True)
        self._last = time.monotonic()


def find_display() -> Display:
    """The display for where this process runs: a notebook's, where IPython drives a kernel."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return NotebookDisplay() if shell is not None and shell.has_trait("kernel") else Display()
