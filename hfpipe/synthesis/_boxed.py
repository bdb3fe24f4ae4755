"""The child of sandbox.py: shuts itself in, then runs a program and its tests. A script of the standard library alone."""

import contextlib
import ctypes
import importlib
import io
import json
import os
import platform
import resource
import signal
import struct
import sys

# Imported while this process may still read its own library; the user that root drops to may not.
_COMMON = (
    "abc array base64 bisect calendar cmath collections contextlib copy csv dataclasses datetime decimal difflib enum "
)
_COMMON += "encodings.idna fractions functools hashlib heapq itertools locale math numbers operator pathlib pprint queue random "
_COMMON += (
    "re socket statistics string struct tempfile textwrap threading time traceback typing unicodedata unittest zlib"
)
for _name in _COMMON.split():
    with contextlib.suppress(ImportError):
        importlib.import_module(_name)

_NOBODY = 65534
_NEW = 0x00020000 | 0x10000000 | 0x20000000 | 0x40000000 | 0x08000000  # namespaces: mount, user, pid, net, ipc
_PRIVATE, _RECURSIVE = 1 << 18, 0x4000
_MOUNT_SETATTR, _AT_RECURSIVE, _READ_ONLY = 442, 0x8000, 1
_PDEATHSIG, _NO_NEW_PRIVS, _SECCOMP, _FILTER = 1, 38, 22, 2
_CAPABILITIES = 0x20080522  # the version of capset's structures
_DESK = "/var/tmp"  # the one place that can be written to: a small tmpfs, gone with the process

# Numbers of system calls, by the machine: what would undo the box, or step around it (io_uring opens sockets itself; memory that
# no limit on a process counts is that of shmget, semget, msgget and memfd_create).
_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_DENIED = {
    "x86_64": "mount=165 umount2=166 pivot_root=155 chroot=161 unshare=272 setns=308 ptrace=101 process_vm_readv=310 "
    "process_vm_writev=311 bpf=321 perf_event_open=298 userfaultfd=323 add_key=248 request_key=249 keyctl=250 "
    "shmget=29 semget=64 msgget=68 memfd_create=319 ",
    "aarch64": "mount=40 umount2=39 pivot_root=41 chroot=51 unshare=97 setns=268 ptrace=117 process_vm_readv=270 "
    "process_vm_writev=271 bpf=280 perf_event_open=241 userfaultfd=282 add_key=217 request_key=218 keyctl=219 "
    "shmget=194 semget=190 msgget=186 memfd_create=279 ",
}
_DENIED_EVERYWHERE = (
    "io_uring_setup=425 open_tree=428 move_mount=429 fsopen=430 fspick=433 mount_setattr=442 memfd_secret=447"
)
_SOCKET, _CLONE, _CLONE3 = {"x86_64": 41, "aarch64": 198}, {"x86_64": 56, "aarch64": 220}, 435
_PRCTL = {"x86_64": 157, "aarch64": 167}
_INTERNET = (2, 10)  # AF_INET, AF_INET6; a socket of any other kind could reach a server outside the namespaces
_ANY_NAMESPACE = 0x7E020000  # of clone's flags

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
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # short of memory, the machine ends this first
    _must(libc.mount(None, b"/", None, _PRIVATE | _RECURSIVE, None), "mount")
    attributes = (ctypes.c_uint64 * 4)(_READ_ONLY, 0, 0, 0)
    _must(libc.syscall(_MOUNT_SETATTR, -100, b"/", _AT_RECURSIVE, attributes, 32), "mount_setattr")
    _must(libc.mount(b"tmpfs", b"/proc", b"tmpfs", _READ_ONLY, b"size=4k"), "mount over /proc")
    _must(libc.mount(b"tmpfs", _DESK.encode(), b"tmpfs", 0, f"size={disk_mb}m,nr_inodes=1000".encode()), "mount tmpfs")
    os.chdir(_DESK)


def lock() -> None:
    """Of this process and its children, for good: no capability, none of the calls that lead out; OSError where that can't be."""
    header, none = struct.pack("=II", _CAPABILITIES, 0), bytes(24)
    _must(libc.capset(header, none), "capset")
    code = _filter(platform.machine())
    program = ctypes.create_string_buffer(code)
    pointed = struct.pack("@HP", len(code) // 8, ctypes.addressof(program))
    _must(libc.prctl(_SECCOMP, _FILTER, pointed, 0, 0), "seccomp")


def _filter(machine: str) -> bytes:
    """The filter in the kernel's classic BPF, eight bytes an instruction: what is denied gives EPERM, anything else passes."""
    if machine not in _ARCH:
        raise OSError(0, f"no filter of system calls for {machine}")
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, denied, unknown, kill = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
    number, arch, argument = 0, 4, 16  # offsets in seccomp_data; of the first argument the low half
    code = [(load, 0, 0, arch), (equal, 1, 0, _ARCH[machine]), (give, 0, 0, kill), (load, 0, 0, number)]
    code += [(at_least, 0, 1, 0x40000000), (give, 0, 0, denied)]  # x86's x32
    for call in (_DENIED[machine] + _DENIED_EVERYWHERE).split():
        code += [(equal, 0, 1, int(call.partition("=")[2])), (give, 0, 0, denied)]
    code += [(equal, 0, 1, _CLONE3), (give, 0, 0, unknown)]  # its flags can't be seen: libc takes clone then
    code += [(equal, 0, 4, _CLONE[machine]), (load, 0, 0, argument), (any_bit, 0, 1, _ANY_NAMESPACE)]
    code += [(give, 0, 0, denied), (give, 0, 0, allow)]
    # The signal that ends it with its parent, which the wall clock ends, stays.
    code += [(equal, 0, 4, _PRCTL[machine]), (load, 0, 0, argument), (equal, 0, 1, _PDEATHSIG)]
    code += [(give, 0, 0, denied), (give, 0, 0, allow)]
    code += [(equal, 0, 5, _SOCKET[machine]), (load, 0, 0, argument), (equal, 2, 0, _INTERNET[0])]
    code += [(equal, 1, 0, _INTERNET[1]), (give, 0, 0, denied), (give, 0, 0, allow), (give, 0, 0, allow)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


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


def _end_with(parent: int) -> None:
    """SIGKILL when the parent ends, at once where it has ended already; a new user or namespace clears it."""
    libc.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() not in (parent, 0):  # 0: the parent is outside this pid namespace
        os._exit(1)


def _or_end(act, *arguments: object) -> None:
    try:
        act(*arguments)
    except OSError as error:
        print(f"no isolation: {error}", file=sys.stderr)
        os._exit(97)


def main() -> None:
    given = json.load(sys.stdin)
    if given["isolated"]:
        _or_end(shut_in, given["disk_mb"])
    _end_with(given["parent"])
    parent, child = os.getpid(), os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    _end_with(parent)
    libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0)
    limit(given)
    if given["isolated"]:
        _or_end(lock)
    said, sys.stdin = os.fdopen(os.dup(1), "w"), io.StringIO()
    said.write("in\n")  # from here on what is told by an exit code is told by the program
    said.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    space = {"__name__": "__main__"}
    for part in ("code", "tests"):
        exec(compile(given[part], f"<{part}>", "exec"), space)
    said.write(given["word"])  # a program that ends itself before its tests are through does not say it
    said.flush()
    os._exit(0)


main()
