"""Serves a test Hub until interrupted, and prints what a shell has to export to use it."""

import argparse
import contextlib
import shlex
import signal
import threading

from . import LocalHub

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.localhub", description=__doc__)
    parser.add_argument("--root", required=True, help="folder for what the Hub is sent")
    parser.add_argument("--port", type=int, default=0, help="default: a free one")
    parser.add_argument("--xet", action="store_true", help="large files by Xet; default: by LFS")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it from the start
    with LocalHub(arguments.root, xet=arguments.xet, port=arguments.port) as hub:
        for name, value in hub.env().items():
            print(f"export {name}={shlex.quote(value)}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
