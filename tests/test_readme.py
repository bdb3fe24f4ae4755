"""The README's words: every command is one that exists, every snippet runs, every link leads somewhere."""

from __future__ import annotations

import re
import shlex

from hfpipe.cli import build_parser
from hfpipe.config import load_recipe
from hfpipe.stages import stage_types

from .conftest import ROOT, hfpipe

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_commands_exist_and_their_settings_are_real():
    commands = []
    for line in "\n".join(blocks("bash")).splitlines():
        for part in line.partition("#")[0].split("&&"):
            commands.append(shlex.split(part))
    ours = [c for c in commands if c[:1] == ["hfpipe"]]
    assert len(ours) >= 6
    for command in ours:
        options = build_parser().parse_args(command[1:])
        if "recipe" in options:
            load_recipe(options.recipe, stage_types(), options.set)
    launched = [c for c in commands if c[:2] == ["accelerate", "launch"]]
    assert launched
    for command in launched:
        module, file, override = command[3:6]
        assert module.rpartition(".")[2] in stage_types()
        assert (ROOT / file).is_file()
        load_recipe("tiny", stage_types(), [f"sft.{override}"])


def test_the_recipe_shown_is_a_recipe(recipe):
    shown = next(block for block in blocks("yaml") if block.startswith("# stage_configs/tiny/sft.yaml"))
    steered = next(block for block in blocks("yaml") if block.startswith("# ppo.yaml"))
    guarded = next(block for block in blocks("yaml") if block.startswith("guards:"))
    judge = "stage: reward\nmodel: {from: sft}\ndata: {train: [{path: tinyworld/preferences}]}\n" + guarded
    folder = recipe({"sft": shown, "reward": judge, "ppo": steered}, base="tiny")
    assert len(load_recipe(folder, stage_types()).stages) == 7


def test_recipes_shown_are_those_shipped():
    shown = [block for block in blocks("yaml") if block.startswith("# stage_configs/")]
    assert shown
    for block in shown:
        first, *lines = block.splitlines()
        ours = (ROOT / first.removeprefix("# ")).read_text().splitlines()
        kept = {line.partition("  #")[0].rstrip() for line in lines} - {"", "adapter: null"}
        assert kept <= {line.partition("  #")[0].rstrip() for line in ours}, first


def test_snippets_run(micro_run):
    snippets = blocks("python")
    assert snippets
    for snippet in snippets:
        exec(snippet.replace("runs/tiny", str(micro_run)), {})


def test_links_and_placeholders():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
    assert "@@" not in README
    for path, anchor in re.findall(r"\]\(((?!http)[^)#]*)#([^)]+)\)", README):
        text = (ROOT / path).read_text() if path else README
        heads = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}, (path, anchor)


def test_what_is_printed_before_one_pays_is_what_is_shown(tmp_path):
    """But for what depends on the machine: of a plan its time and its memory."""
    found = re.findall(r"```\n\$ hfpipe ([^\n]*)\n(.*?)```", README, re.DOTALL)
    shown = {command: block.splitlines() for command, block in found}
    scale = "scale --params 280e9 --tokens 300e9"
    assert hfpipe(*scale.split()).stdout.splitlines() == shown[scale]
    told = hfpipe("new", "mine", "--params", "125M", cwd=tmp_path).stdout.splitlines()
    rows = shown["new mine --params 125M"]
    assert told == rows[: len(told)]
    assert set(rows[len(told) + 1 :]) <= set((tmp_path / "mine" / "pretrain.yaml").read_text().splitlines())
    told = hfpipe("plan", "tiny", "--out", tmp_path / "none").stdout
    assert [
        line for line in shown["plan tiny"] if re.match(" +(data|model|work): |dpo|The rows", line) and line not in told
    ] == []
