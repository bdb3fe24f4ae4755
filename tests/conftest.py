from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Prepared data of the tests goes to a folder of theirs, unless the environment names one."""
    if "HFPIPE_CACHE" not in os.environ:
        os.environ["HFPIPE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def hfpipe(*arguments: object, cwd: Path | None = None, check: int | None = 0) -> subprocess.CompletedProcess:
    """The command line as a user has it; `check` is the exit code that is expected."""
    command = [sys.executable, "-m", "hfpipe", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd or ROOT, capture_output=True, text=True)
    if check is not None:
        assert done.returncode == check, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def stage_json(folder: Path) -> dict:
    return json.loads((folder / "stage.json").read_text())


@pytest.fixture(scope="session")
def micro_run(tmp_path_factory) -> Path:
    """`hfpipe run micro`, once for all tests that look at what it leaves. They must not change it."""
    run = tmp_path_factory.mktemp("runs") / "micro"
    done = hfpipe("run", "micro", "--out", run)
    (run / "stdout.txt").write_text(done.stdout)
    return run


@pytest.fixture
def recipe(tmp_path):
    """Writes a small recipe: `recipe({"sft": "..."})` replaces or adds stage files; returns its folder."""
    import shutil

    def write(files: dict[str, str] | None = None, base: str = "micro") -> Path:
        folder = tmp_path / "recipe"
        if not folder.exists():
            shutil.copytree(ROOT / "stage_configs" / base, folder)
        for name, text in (files or {}).items():
            (folder / f"{name}.yaml").write_text(text)
        return folder

    return write
