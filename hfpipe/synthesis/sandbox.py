"""Programs that a model wrote, run with their tests: no network, no writing outside, and limits on all that they take.

In force is a child in its own user, mount, pid, network and ipc namespaces (Linux 5.14 or later, unprivileged user
namespaces allowed): no network interface but an unconnected loopback, the whole file system read-only, an empty /proc, a tmpfs of
its own to write to, no capability, a seccomp filter against all that would undo this and against sockets that are not the
internet's, limits on the CPU seconds and the memory of each process, on file sizes and on the number of processes, and a wall clock
that ends everything in it, as the end of this process does. Short of memory, the system ends a program first. What it may read, it can't send anywhere. Where the system gives no such isolation nothing is run, unless the recipe says so. A program
runs in one process with its tests, so one that is out to deceive them can: this keeps a machine safe, not a judgement.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

from hfpipe.errors import UserError

_CHILD = Path(__file__).with_name("_boxed.py")
_NO_ISOLATION = 97
_LIMITS = {"cpu_s": 5, "memory_mb": 512, "disk_mb": 16, "processes": 16}
_KILLED = 256 - signal.SIGKILL


def run_tests(code: str, tests: str, timeout_s: float = 10, isolated: bool = True) -> str | None:
    """Run a program and then its tests (Python, such as `assert` lines); what is wrong, or None where all passed.

    Raises:
        UserError: this system gives no isolation, and `isolated` is not False.
    """
    word = secrets.token_hex(8)
    given = json.dumps(
        {"code": code, "tests": tests, "word": word, "isolated": isolated, "parent": os.getpid(), **_LIMITS}
    )
    # Files, which the limit on a file's size holds: a pipe would be read into this process's memory without end.
    with TemporaryDirectory(prefix="hfpipe-") as folder, TemporaryFile() as out, TemporaryFile() as told:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_CHILD)], cwd=folder, env={}, start_new_session=True, close_fds=True,
            stdin=subprocess.PIPE, stdout=out, stderr=told,
        )  # fmt: skip
        try:
            process.communicate(given.encode(), timeout_s)
        except subprocess.TimeoutExpired:
            return f"still running after {timeout_s:g} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # in namespaces of its own all that it started ends with it
            process.wait()
        out.seek(0)
        said = out.read()
        if process.returncode == 0 and said.endswith(word.encode()):
            return None
        told.seek(0)
        last = (told.read(20_000).decode(errors="replace").strip().splitlines() or [""])[-1][:200]
    if process.returncode == _NO_ISOLATION and not said:
        raise UserError(
            f"no program of a model is run here: this system gives no isolation from its network and files ({last}). "
            "Allow unprivileged user namespaces, or set `isolated: false` beside the check to run it with limits alone."
        )
    if process.returncode == 0:
        return "it ended before its tests were through"
    if process.returncode == _KILLED:
        return f"killed: more than {_LIMITS['cpu_s']} CPU seconds, or the machine's memory"
    return last or f"ended with exit code {process.returncode}"


@functools.cache
def check_isolation() -> None:
    """UserError where `run_tests` would refuse."""
    run_tests("", "")
