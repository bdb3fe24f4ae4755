"""The README's words: every command is one that exists, every snippet runs, every link leads somewhere."""

from __future__ import annotations

import re
import shlex

from hfpipe.cli import build_parser
from hfpipe.config import load_recipe
from hfpipe.stages import stage_types

from .conftest import ROOT

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
    shown, steered = (b for b in blocks("yaml") if b.startswith(("# stage_configs/tiny/", "# ppo.yaml of")))
    assert shown.startswith("# stage_configs/tiny/sft.yaml")
    judge = "stage: reward\nmodel: {from: sft}\ndata: {train: [{path: tinyworld/preferences}]}\n"
    folder = recipe({"sft": shown, "reward": judge, "ppo": steered}, base="tiny")
    head = (folder / "pipeline.yaml").read_text().replace("sft, dpo", "sft, dpo, reward, ppo")
    (folder / "pipeline.yaml").write_text(head)
    assert len(load_recipe(folder, stage_types()).stages) == 7
    kept = [line.partition("  #")[0].rstrip() for line in shown.splitlines()[1:]]
    ours = (ROOT / "stage_configs" / "tiny" / "sft.yaml").read_text().splitlines()
    assert {line for line in kept if line.strip()} <= {line.partition("  #")[0].rstrip() for line in ours} | {
        "adapter: null"
    }


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
