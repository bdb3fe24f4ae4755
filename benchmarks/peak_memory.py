"""The most memory that a command and all its children held at once, shared pages counted once (Linux, PSS).

python benchmarks/peak_memory.py hfpipe run tiny
"""

from __future__ import annotations

import subprocess
import sys
import time

import psutil


def held(process: psutil.Process) -> int:
    """Bytes of the process and its children."""
    total = 0
    for one in (process, *process.children(recursive=True)):
        try:
            total += one.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def main() -> None:
    began = time.monotonic()
    command = subprocess.Popen(sys.argv[1:])
    process, peak = psutil.Process(command.pid), 0
    while command.poll() is None:
        peak = max(peak, held(process))
        time.sleep(1)
    print(f"peak {peak / 2**30:.2f} GiB, {time.monotonic() - began:.0f} s, exit code {command.returncode}")
    raise SystemExit(command.returncode)


if __name__ == "__main__":
    main()
