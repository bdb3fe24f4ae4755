"""How long `hfpipe data check` takes and how much memory, on generated files of two sizes, one ten times the other.

python benchmarks/data_check.py [ROWS] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_SYLLABLES = ("ba", "cor", "den", "fa", "gli", "ho", "jun", "ka", "lem", "mo", "nar", "pi", "ras", "su", "tol", "ven")


def write_rows(path: Path, rows: int) -> None:
    """Chat rows of about 1 kB from a vocabulary of 20,000 words; one in 50 repeats another, nearly or word for word."""
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices(_SYLLABLES, k=rng.randint(1, 4))) for _ in range(20_000)]
    weights = [1 / (rank + 10) for rank in range(len(vocabulary))]
    drawn = rng.choices(vocabulary, weights, k=400_000)
    kept = []
    with path.open("w") as file:
        for number in range(rows):
            starts = [rng.randrange(len(drawn) - 60) for _ in range(4)]
            asked, *said = (" ".join(drawn[start : start + rng.randint(25, 50)]) for start in starts)
            row = {"prompt": f"{asked}?", "completion": ". ".join(said) + ".", "topic": rng.choice(("a", "b", "c"))}
            if number % 50 == 49:
                row = {**rng.choice(kept), "topic": "a"}
                row["completion"] += rng.choice(("", " Once more."))
            elif len(kept) < 1000:
                kept.append(row)
            file.write(json.dumps(row) + "\n")


def measure(rows: int, folder: Path) -> None:
    path = folder / f"{rows}.jsonl"
    write_rows(path, rows)
    began = time.monotonic()
    command = [sys.executable, "-m", "hfpipe", "data", "check", str(path), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        [found] = json.loads(process.stdout.read())["sources"]
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    print(
        f"{rows:>9,} rows  {path.stat().st_size / 1e6:6.1f} MB  {time.monotonic() - began:6.1f} s  "
        f"{used.ru_utime + used.ru_stime:6.1f} CPU s  {used.ru_maxrss / 1024:6.0f} MiB at the most  "
        f"{found['exact']['rows']:,} repeated, {found['near']['rows']:,} nearly"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=int, nargs="?", default=100_000)
    parser.add_argument("--folder", type=Path, help="for the generated files, which stay there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for rows in (options.rows // 10, options.rows):
            measure(rows, options.folder or Path(scratch))


if __name__ == "__main__":
    main()
