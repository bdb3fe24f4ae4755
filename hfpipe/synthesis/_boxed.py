"""The child of sandbox.py: shuts itself in, then runs a program and its tests. A script of the standard library alone."""

import contextlib
import ctypes
import importlib
import io
import json
import os
import resource
import signal
import sys

# Imported while this process may still read its own library; the user that root drops to may not.
_COMMON = "bisect collections copy dataclasses datetime decimal enum fractions functools heapq itertools math operator "
_COMMON += "encodings.idna random re socket statistics string textwrap time traceback typing unittest"
for _name in _COMMON.split():
    with contextlib.suppress(ImportError):
        importlib.import_module(_name)

_NOBODY = 65534
_NEW = 0x00020000 | 0x10000000 | 0x20000000 | 0x40000000 | 0x08000000  # namespaces: mount, user, pid, net, ipc
_PRIVATE, _RECURSIVE = 1 << 18, 0x4000
_MOUNT_SETATTR, _AT_RECURSIVE, _READ_ONLY = 442, 0x8000, 1
_PDEATHSIG, _NO_NEW_PRIVS = 1, 38
_DESK = "/var/tmp"  # the one place that can be written to: a small tmpfs, gone with the process

libc = ctypes.CDLL(None, use_errno=True)


def _must(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def shut_in(disk_mb: int) -> None:
    """No network, no other process to be seen, every file read-only but those under `_DESK`; OSError where that can't be."""
    if os.getuid() == 0:  # root would be held to no number of processes
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
        libc.prctl(4, 1, 0, 0, 0)  # dumpable again: /proc/self is ours to write
    uid, gid = os.getuid(), os.getgid()
    _must(libc.unshare(_NEW), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    _must(libc.mount(None, b"/", None, _PRIVATE | _RECURSIVE, None), "mount")
    attributes = (ctypes.c_uint64 * 4)(_READ_ONLY, 0, 0, 0)
    _must(libc.syscall(_MOUNT_SETATTR, -100, b"/", _AT_RECURSIVE, attributes, 32), "mount_setattr")
    _must(libc.mount(b"tmpfs", _DESK.encode(), b"tmpfs", 0, f"size={disk_mb}m".encode()), "mount tmpfs")
    os.chdir(_DESK)


def limit(given: dict) -> None:
    """Of this process and its children; RLIMIT_NPROC counts those of its user namespace."""
    for name, value in (
        ("CPU", given["cpu_s"]),
        ("AS", given["memory_mb"] << 20),
        ("FSIZE", given["disk_mb"] << 20),
        ("NPROC", given["processes"]),
        ("NOFILE", 64),
        ("CORE", 0),
    ):
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def main() -> None:
    given = json.load(sys.stdin)
    if given["isolated"]:
        try:
            shut_in(given["disk_mb"])
        except OSError as error:
            print(f"no isolation: {error}", file=sys.stderr)
            os._exit(97)
    parent, child = os.getpid(), os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    libc.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0)
    if not given["isolated"] and os.getppid() != parent:
        os._exit(1)
    limit(given)
    said, sys.stdin = os.fdopen(os.dup(1), "w"), io.StringIO()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    space = {"__name__": "__main__"}
    for part in ("code", "tests"):
        exec(compile(given[part], f"<{part}>", "exec"), space)
    said.write(given["word"])  # a program that ends itself before its tests are through does not say it
    said.flush()
    os._exit(0)


main()
