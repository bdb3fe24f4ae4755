"""The process that pushes beside a run: started before the first stage trains, it takes one job after the other.

Each line of its standard input is a job, the stages to push, and each line of its standard output says that one is over;
a number is for how many seconds it was held back (hfpipe/publishing/throttle.py); `null` ends it after what it is doing,
and the end of the input, as when the run is killed, at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from hfpipe.errors import UserError
from hfpipe.hub_client import Unreachable
from hfpipe.progress import duration
from hfpipe.publishing.hub import note_failure, push_run
from hfpipe.publishing.package import hub_of
from hfpipe.publishing.throttle import NICENESS

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_held: list[float] = []  # for how many seconds, each time


def main() -> None:
    """`python -m hfpipe.publishing.pusher RUN [beside]`; what it says of its work goes to the standard error."""
    run, answers = Path(sys.argv[1]), os.dup(1)
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it too, and the run decides
    if "beside" in sys.argv[2:]:
        _go_on_when_left()
        # A weight of 15 beside 1024; SCHED_IDLE's 3 were too few to get through while other work never rests.
        os.nice(NICENESS)
    jobs: queue.SimpleQueue[list[str] | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=[jobs], daemon=True).start()
    _prepare()
    print(f"hfpipe: ready to push after {time.process_time():.2f} s of a processor", flush=True)
    while (stages := jobs.get()) is not None:
        _push(run, stages)
        with contextlib.suppress(BrokenPipeError):  # the run has failed, and waits for no answer
            os.write(answers, b"\n")


def _listen(jobs: queue.SimpleQueue[list[str] | None]) -> None:
    for line in sys.stdin:
        job = json.loads(line)
        if isinstance(job, float):
            _held.append(job)
            continue
        jobs.put(job)
        if job is None:
            return
    os._exit(1)


def _go_on_when_left() -> None:
    """A run that is killed while it holds this process back would leave it so for ever."""
    with contextlib.suppress(AttributeError, OSError):  # only Linux has it, and nothing is held back elsewhere
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)


def _prepare() -> None:
    """What every push needs, and what is slower than a small one: imports, and the certificates that a client reads."""
    import yaml  # noqa: F401
    from huggingface_hub import CommitOperationAdd, EvalResult, HfApi  # noqa: F401
    from huggingface_hub.utils import disable_progress_bars, get_session

    disable_progress_bars()
    get_session()
    with contextlib.suppress(ImportError):  # not on every system
        import hf_xet  # noqa: F401


def _push(run: Path, stages: list[str]) -> None:
    def say(stage: str, text: str) -> None:
        print(f"{stage:<10} {text}", flush=True)

    began, worked = time.monotonic(), time.process_time()
    try:
        push_run(run, say, functools.partial(watch, run), stages, hub_of(run))
    except (UserError, Unreachable) as error:
        print(f"hfpipe: {error}", flush=True)
    took, worked = time.monotonic() - began, time.process_time() - worked
    print(f"hfpipe: that push took {worked:.2f} s of a processor in {took:.1f} s", flush=True)


@contextlib.contextmanager
def watch(run: Path, what: str, patience_s: float) -> Iterator[None]:
    """End this process when a push takes longer than it may: nothing else stops a request that hangs in an upload.

    The time that it waits for a processor, since others compute, is not counted, nor that for which it is held back.
    """
    over = threading.Event()

    def look() -> None:
        left, looked, waited, held = patience_s, time.monotonic(), _waited_s(), sum(_held)
        while not over.wait(min(max(left, 0.0), 1.0)):
            now, more = time.monotonic(), _waited_s()
            passed = max(now - looked - max(more - waited, 0.0), 0.0)
            spared = min(sum(_held) - held, passed)  # what is told a little late counts in the next second
            left, looked, waited, held = left - passed + spared, now, more, held + spared
            if left <= 0:
                break
        else:
            return
        note_failure(run, f"pushing {what} took more than {duration(patience_s)}")
        print(
            f"hfpipe: pushing {what} took more than {duration(patience_s)} and was ended; nothing here is lost. "
            "hub.timeout_minutes sets the patience.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    threading.Thread(target=look, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _waited_s() -> float:
    """How long the threads of this process have been ready and had no processor, by Linux' own count; 0 elsewhere."""
    total = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # a thread that has ended since
            total += int(file.read_text().split()[1])
    return total / 1e9


if __name__ == "__main__":
    main()
