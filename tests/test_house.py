"""The house's own rules, held by reading the source."""

from __future__ import annotations

import ast
import dataclasses
import re
import subprocess
import sys

import hfpipe
from hfpipe import sections
from hfpipe.stages import stage_types

from .conftest import ROOT

PACKAGE = ROOT / "hfpipe"
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "accelerate", "numpy", "pandas"}


def order() -> dict[str, int]:
    """Layer name -> rank, from the package's docstring; a lower rank may import a higher one."""
    line = " ".join(line.strip() for line in hfpipe.__doc__.splitlines() if ">" in line)
    return {name.strip(): rank for rank, group in enumerate(line.split(">")) for name in group.split(",")}


def imports(path):
    """(module, at top level) for every import of a file, those for type checking left out."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, id(node) in top
            if node.module == "hfpipe":
                yield from ((f"hfpipe.{alias.name}", id(node) in top) for alias in node.names)


def layer(module: str) -> str:
    return [*module.split("."), "", ""][1]


def test_imports_go_one_way():
    ranks, seen = order(), 0
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if own in ("__init__", "__main__"):
            continue
        for module, _ in imports(path):
            if module.startswith("hfpipe.") and layer(module) != own and layer(module) in ranks:
                seen += 1
                assert ranks[own] <= ranks[layer(module)], f"{path} imports {module}"
    assert seen > 50


def test_every_module_has_a_layer():
    modules = {p.stem if p.is_file() else p.name for p in PACKAGE.iterdir() if not p.name.startswith("__")}
    assert modules - {"stage_configs", "chat_templates"} <= set(order())


def test_the_command_line_imports_nothing_heavy():
    adapted = ["plan", "tiny", "--set", "sft.adapter={preset: lora_without_regret}"]
    for arguments in (["--help"], ["list"], ["plan", "tiny"], adapted):
        code = f"import sys; sys.argv = ['hfpipe', *{arguments!r}]\nfrom hfpipe.cli import main\ntry:\n    assert not main()\n"
        code += f"except SystemExit:\n    pass\nassert not {HEAVY!r} & set(sys.modules), {HEAVY!r} & set(sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_every_config_key_is_read_somewhere():
    source = {p: p.read_text() for p in PACKAGE.rglob("*.py") if p.parent.name != "sections"}
    keys = [
        f.name
        for kind in vars(sections).values()
        if dataclasses.is_dataclass(kind) and kind not in (sections.Stage, sections.StageType, sections.Recipe)
        for f in dataclasses.fields(kind)
    ]
    assert len(keys) > 30
    for key in set(keys):
        assert any(re.search(rf"\.{key}\b|\"{key}\"", text) for text in source.values()), f"`{key}` is read nowhere"


def test_a_stage_is_one_file_under_its_own_name():
    found = {p.stem for p in (PACKAGE / "stages").glob("[a-z]*.py")}
    assert set(stage_types()) == found == {kind.name for kind in stage_types().values()}
    readme = (ROOT / "README.md").read_text()
    for name in found:
        assert f"| `{name}` |" in readme


def test_no_file_is_too_long_to_read():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 350, path
