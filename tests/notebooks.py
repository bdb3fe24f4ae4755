"""Executes notebooks as a person would, top to bottom in a fresh kernel.

python -m tests.notebooks notebooks/01_tiny.ipynb      # and writes what it showed into the file, without this machine's paths
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def execute(path: Path, folder: Path, **environment: str) -> Any:
    """The notebook with its outputs, run in `folder`; nbclient's CellExecutionError where a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=3600,
        record_timing=False,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT), "IPYTHONDIR": str(folder / ".ipython"), **environment})
    return notebook


def main() -> None:
    for path in map(Path, sys.argv[1:]):
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(path, Path(folder))
            notebook.metadata["language_info"] = {"name": "python"}
            text = nbformat.writes(notebook).replace(f"{folder}/", "").replace(f"{ROOT}/", "")
        path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
