"""What the machine did to a stage, in words: no memory left, no disk left, a process that was killed or that hangs."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType

from hfpipe.errors import StageFailed, hide_tokens

LESS_MEMORY = (
    "Lower trainer.per_device_train_batch_size (and raise trainer.gradient_accumulation_steps by as much), lower "
    "max_length, or set trainer.gradient_checkpointing: true."
)
_LESS_DISK = "The last whole checkpoint is kept. Free some space, or lower trainer.save_total_limit."
_DISK = re.compile(r"No space left on device|os error 28|Disk quota exceeded|PytorchStreamWriter failed writing", re.I)
_TOO_LARGE = re.compile(r"File too large|os error 27\b")
_MEMORY = re.compile(
    r"out of memory|can't allocate memory|Cannot allocate memory|std::bad_alloc|HIP out of memory", re.I
)
_KILLED = re.compile(r"exitcode *: -9\b")


def full(error: BaseException) -> bool:
    """Whether an error says that a disk, or a share of one, is full."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or _DISK.search(str(error)) is not None


def no_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out."""
    return isinstance(error, MemoryError) or _MEMORY.search(str(error)) is not None


def explain(error: BaseException) -> str:
    """An exception in words; a disk or a memory that is full with what to do about it."""
    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    text = str(error) if isinstance(error, StageFailed) else hide_tokens(f"{type(error).__name__}: {error}")
    if any(map(full, causes)):
        return f"the disk is full ({text.splitlines()[0]}). {_LESS_DISK}"
    if any(_TOO_LARGE.search(str(cause)) for cause in causes):
        return f"a file may not become as large as that here, by the limit on files (ulimit -f) or the file system: {text.splitlines()[0]}"
    if any(map(no_memory, causes)):
        return f"there is not enough memory ({text.splitlines()[0]}). {LESS_MEMORY}"
    return text


def print_trace(error: BaseException) -> None:
    """Write an exception's whole traceback, in which no token stands, to standard error, which is a child's log."""
    several, rank = int(os.environ.get("WORLD_SIZE", 1)) > 1, os.environ.get("RANK")
    lines = hide_tokens("".join(traceback.format_exception(error))).splitlines()
    with contextlib.suppress(OSError):  # a full disk
        print("\n".join(f"[rank{rank}]: {line}" if several else line for line in lines), file=sys.stderr, flush=True)


def killed(code: int, log: str) -> bool:
    """Whether a process, or by the log of its launcher one of several, ended by SIGKILL."""
    return code == -signal.SIGKILL or _KILLED.search(log) is not None


def ended(code: int, log: str, free: int) -> str:
    """Why a process ended that gave no reason itself: by the end of its output, and the bytes free on the run's disk."""
    if code != -signal.SIGKILL and (free < 2**20 or _DISK.search(log)):
        return f"the disk is full. {_LESS_DISK}"
    if _MEMORY.search(log):
        return f"there is not enough memory. {LESS_MEMORY}"
    if killed(code, log):
        return f"its process was killed (SIGKILL), as the system does when memory runs out. {LESS_MEMORY}"
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    return f"its process ended with exit code {code}"


def beat(alive: Callable[[], None], every_s: float = 5.0) -> None:
    """Call `alive` from time to time as long as the calling thread gets on, or others compute for it.

    It gets on where it stands elsewhere than before; one that spins in one place does not.
    """
    thread, waiting = threading.get_ident(), threading.Event()

    def others() -> float:
        return time.process_time() - time.clock_gettime(time.pthread_getcpuclockid(thread))

    def watch() -> None:
        before, worked = None, 0.0
        while True:
            here, work = _place(sys._current_frames().get(thread)), others()
            if here != before or work - worked > 0.2 * every_s:
                alive()
            before, worked = here, work
            waiting.wait(every_s)

    threading.Thread(target=watch, daemon=True).start()


def _place(frame: FrameType | None) -> list[tuple[int, int]]:
    """Where a thread stands: every call on its stack with its place in it."""
    places = []
    while frame:
        places.append((id(frame), frame.f_lasti))
        frame = frame.f_back
    return places
