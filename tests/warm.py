"""`hfpipe` commands one after another in one process, as a notebook gives them: `python -m tests.warm DESCRIPTOR`.

Each line of the standard input is a command, `[arguments, folder]`; its result is written to the descriptor.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).parent.parent


def call(arguments: list[str], folder: str | Path) -> tuple[int, str, str]:
    """What the command line would do with `arguments` in `folder`: exit code, standard output, standard error."""
    from hfpipe.cli import main

    out, err, environment = io.StringIO(), io.StringIO(), dict(os.environ)
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as end:  # argparse
            code = end.code
        except Exception:
            traceback.print_exc()
            code = 1
    os.environ.clear()
    os.environ.update(environment)
    return code, out.getvalue(), err.getvalue()


class Warm:
    """Such a process, with its own environment."""

    def __init__(self, environment: dict[str, str]):
        answers, theirs = os.pipe()
        command = [sys.executable, "-m", "tests.warm", str(theirs)]
        everything = os.environ | environment | {"PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=everything, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, pass_fds=[theirs]
        )
        os.close(theirs)
        self.answers = os.fdopen(answers)

    def call(self, arguments: list[str], folder: str | Path) -> tuple[int, str, str]:
        self.process.stdin.write(json.dumps([arguments, str(folder)]).encode() + b"\n")
        self.process.stdin.flush()
        line = self.answers.readline()
        assert line, f"hfpipe {' '.join(arguments)} ended with its process, exit code {self.process.wait()}"
        return tuple(json.loads(line))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(60)
        self.answers.close()


if __name__ == "__main__":
    os.set_inheritable(int(sys.argv[1]), False)
    with open(int(sys.argv[1]), "w") as answers:
        for line in sys.stdin:
            print(json.dumps(call(*json.loads(line))), file=answers, flush=True)
