"""Programs of a model: what they can't do to the machine that runs them."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time

import pytest

from hfpipe.errors import UserError
from hfpipe.synthesis import sandbox
from hfpipe.synthesis.sandbox import check_isolation, run_tests

from .conftest import ROOT

try:
    check_isolation()
except UserError as error:
    pytestmark = pytest.mark.skip(reason=str(error))


@pytest.mark.parametrize(
    ("code", "tests", "told"),
    [
        ("def double(x):\n    return 2 * x", "assert double(2) == 4", None),
        ("def double(x):\n    return x", "assert double(2) == 4", "AssertionError"),
        ("def double(x) return x", "", "SyntaxError"),
        ("raise SystemExit(0)", "assert False", "ended before its tests"),
        ("import os\nos._exit(0)", "assert False", "ended before its tests"),
        ("x = bytearray(2 << 30)", "", "MemoryError"),
        ("import os\nwhile True:\n    os.fork()", "", "Resource temporarily unavailable"),
        ("import socket\nsocket.create_connection(('192.0.2.1', 80), 3)", "", "Network is unreachable"),
        ("open('notes.txt', 'w').write('here')", "assert open('notes.txt').read() == 'here'", None),
        ("f = open('notes.txt', 'wb')\nfor _ in range(64):\n    f.write(bytes(1 << 20))", "", "File too large"),
        ("import os\nassert not {'HOME', 'PATH', 'OPENAI_API_KEY'} & set(os.environ)", "", None),
        ("print('x' * 100_000_000)", "", None),
        ("import os\nos._exit(97)", "", "ended with exit code 97"),  # as a box that can't be shut ends
        (
            "import csv, pathlib, tempfile\ntempfile.TemporaryFile().write(b'x')",
            "assert pathlib.Path('.').is_dir()",
            None,
        ),
        ("for n in range(100_000):\n    open(str(n), 'w').close()", "", "No space left on device"),
    ],
)
def test_a_program_and_its_tests(code, tests, told):
    found = run_tests(code, tests)
    assert found is None if told is None else told in found


def test_a_file_outside_can_not_be_written(tmp_path):
    tmp_path.chmod(0o777)
    told = run_tests(f"open({str(tmp_path / 'x')!r}, 'w')", "")
    assert "Read-only file system" in told or "Permission denied" in told  # root's sandbox can't even enter the folder
    assert not (tmp_path / "x").exists()


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no place here (macOS) that anybody may write to")
def test_a_place_where_anybody_may_write_is_read_only():
    assert "Read-only file system" in run_tests("open('/dev/shm/hfpipe-test', 'w')", "")


def test_a_server_of_this_machine_is_not_reached():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), 3).close()
        assert run_tests(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 3)", "") is not None


MOUNT = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\nassert libc.{} == -1\nassert ctypes.get_errno() == 1\n"


@pytest.mark.parametrize(
    "code",
    [
        MOUNT.format("mount(None, b'/', None, 32 | 4096, None)"),  # writable again
        MOUNT.format("mount(b'tmpfs', b'/mnt', b'tmpfs', 0, b'size=200m')"),  # more room
        MOUNT.format("umount2(b'/proc', 2)"),
        MOUNT.format("unshare(0x10000000 | 0x20000)"),  # all capabilities, in namespaces of its own
        MOUNT.format("syscall({'x86_64': 56, 'aarch64': 220}[os.uname().machine], 0x10000011, 0, 0, 0, 0)"),
        MOUNT.format("syscall(425, 8, bytes(120))"),  # io_uring
        MOUNT.format("prctl(1, 0, 0, 0, 0)"),  # to outlive its parent
        MOUNT.format(
            "memfd_create(b'x', 0)"
        ),  # memory beyond its limit: gone only with the namespaces, or with the file
        MOUNT.format("shmget(0, 1 << 20, 0o1777)"),
        MOUNT.format("msgget(0, 0o1777)"),
        MOUNT.format("semget(0, 1, 0o1777)"),
        "import os\nassert os.listdir('/proc') == []",
        "import threading\nthread = threading.Thread(target=print)\nthread.start()\nthread.join()",
    ],
)
def test_the_box_can_not_be_opened_from_inside_and_is_no_hindrance_to_a_program(code):
    assert run_tests(code, "") is None


def test_a_unix_socket_of_this_machine_is_not_reached():
    import socket
    import tempfile

    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as server:
        os.chmod(folder, 0o755)
        server.bind(f"{folder}/socket")
        os.chmod(f"{folder}/socket", 0o777)
        server.listen()
        told = run_tests(f"import socket\nsocket.socket(socket.AF_UNIX).connect({folder + '/socket'!r})", "")
        assert "Operation not permitted" in told


ALONE = (
    "import ctypes, os, time\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\nos.setsid()\nfor fd in range(9):\n"
    "    try:\n        os.close(fd)\n    except OSError:\n        pass\ntime.sleep(1000)"
)


@pytest.mark.parametrize("code", ["while True:\n    pass", "import time\ntime.sleep(1000)", ALONE])
def test_a_program_without_end_is_ended_with_all_that_it_started(code, monkeypatch):
    monkeypatch.setitem(sandbox._LIMITS, "cpu_s", 1)
    before, began = children(), time.monotonic()
    assert run_tests(f"import os\nos.fork()\n{code}", "", timeout_s=2) is not None
    assert time.monotonic() - began < 20
    time.sleep(0.2)
    assert children() <= before


def test_it_ends_with_the_process_that_asked_for_it():
    before = children()
    asked = f"from hfpipe.synthesis.sandbox import run_tests\nrun_tests({ALONE!r}, '', 600)"
    process = subprocess.Popen([sys.executable, "-c", asked], cwd=ROOT)
    while len(children() - before) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    time.sleep(0.5)
    assert children() <= before


def test_what_a_program_writes_does_not_fill_this_process():
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert run_tests("import os\nfor _ in range(4000):\n    os.write(3, bytes(1 << 16))", "") is not None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held < 100_000  # KiB; 250 MB are written


def children() -> set[str]:
    """Processes on this machine that run the sandbox."""
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                found |= {pid} if b"_boxed.py" in file.read() else set()
        except OSError:
            pass
    return found


def test_without_isolation_nothing_runs_unless_it_is_told_to(monkeypatch, tmp_path):
    child = tmp_path / "_boxed.py"
    child.write_text(sandbox._CHILD.read_text().replace("_must(libc.unshare(_NEW)", "_must(libc.unshare(-1)"))
    monkeypatch.setattr(sandbox, "_CHILD", child)
    with pytest.raises(UserError, match="isolated: false"):
        run_tests("", "")
    assert run_tests("", "", isolated=False) is None
    assert "AssertionError" in run_tests("", "assert False", isolated=False)
