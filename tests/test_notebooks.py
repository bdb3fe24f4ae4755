"""Every notebook, run from top to bottom in a fresh kernel and looked at as a person looks: what each cell shows."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import venv
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from hfpipe import load_pipeline

from .notebooks import NOTEBOOKS, ROOT, execute

STAGES = ["tokenizer", "pretrain", "midtrain", "sft", "dpo"]
MACHINE = re.compile(r"/(work|tmp|root|home|Users|content)/")


class Shown:
    """What a notebook shows. A cell is named by its source, or by a part of it that no other cell has."""

    def __init__(self, notebook):
        self.cells = {cell.source: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}

    def outputs(self, source: str) -> list:
        if source in self.cells:
            return self.cells[source]
        (found,) = [outputs for cell, outputs in self.cells.items() if source in cell]
        return found

    def of(self, source: str, kind: str) -> list[str]:
        return [output["data"][kind] for output in self.outputs(source) if kind in output.get("data", {})]

    def table(self, source: str) -> str:
        return self.of(source, "text/html")[0]

    def text(self, source: str) -> str:
        return "".join(o.get("text", "") + o.get("data", {}).get("text/plain", "") for o in self.outputs(source))


def heads(table: str) -> list[str]:
    return re.findall(r"<th[^>]*>(.*?)</th>", table)


def numbers(table: str) -> list[float]:
    return [float(found) for found in re.findall(r"<td>([\d.]+)</td>", table)]


def check_tiny(shown: Shown, offline: bool) -> None:
    assert [name for name in heads(shown.table("pipe.plan()")) if name in STAGES] == STAGES
    lines = shown.of("run = pipe.run()", "text/plain")
    assert len(lines) == 1  # one output, written anew
    assert re.search(r"micro is complete in runs/micro \(.* s\)$", lines[0])
    assert "↑" in lines[0]
    assert set(STAGES[1:]) < set(heads(shown.table("run.scorecard()")))
    assert "turn_taking" in shown.table('scores["arrow"]')
    assert len(shown.of("run.plot()", "image/png")) == 1
    assert "pretrain" in heads(shown.table("run.curves()"))
    answers = shown.table("questions = [")
    assert [name for name in heads(answers) if name in STAGES] == STAGES[1:]
    assert answers.count("<td>") == 4 * 4
    # So small a model may go on with its call until the tokens are used up; that is no text.
    assert (
        shown.text("talk.say(").strip() or "'tool_calls'" in shown.text("talk.messages").rpartition("'role': 'user'")[2]
    )
    assert "'role': 'user', 'content': 'Work out 586 times 670.'" in shown.text("talk.messages").replace("\n", "")
    assert "149,824 parameters" in shown.text("num_parameters()")
    assert "report.html" in shown.text("run.report()")
    assert "trainer.learning_rate 0.001 -&gt; 0.0002" in shown.table("2e-4")


def check_your_data(shown: Shown, offline: bool) -> None:
    assert shown.text("rows, the first").startswith("120 rows")
    made_here = "making a small model instead" in shown.text("import model_info")
    assert made_here == offline
    assert "adapter: lora" in shown.text("recipe.mkdir")
    assert re.search(r"⟦<\|assistant\|>On \w+ we \w+ at \w+\.<\|end_assistant\|>⟧", shown.text("pipe.inspect"))
    bad = shown.text("except UserError as error:\n    print")
    assert "UserError: library/sft.yaml: library.jsonl [train]: 1 of" in bad
    assert "line 1: empty assistant turn" in bad
    assert "library is complete in runs/library" in shown.text("run = pipe.run()")
    assert shown.table("questions = [").count("<td>") == 3 * 2
    before, after = numbers(shown.table("pd.concat"))[0::4]
    assert before < 0.2
    assert after > 0.6 or not offline  # what lies on the Hub there is as small, and learns little at SmolLM's rates
    assert len(shown.of("run.plot()", "image/png")) == 1


def check_preferences(shown: Shown, offline: bool) -> None:
    assert "40 pairs" in shown.text("len(rows), ")
    assert ("making a small model instead" in shown.text("hf_hub_download")) == offline
    assert "adapter: qlora" in shown.text("recipe.mkdir")
    assert "short is complete in runs/short" in shown.text("run = pipe.run()")
    assert len(shown.of("run.plot()", "image/png")) == 1
    before, after = numbers(shown.table("pd.concat"))[0::4]
    pairs = dict(re.findall(r"(\w+) +([\d.]+)", shown.text('after.metrics["pairs"]')))
    if offline:  # what lies on the Hub there has never been long-winded
        assert after > before + 0.3
        assert float(pairs["accuracy"]) > 0.8


def check_publish(shown: Shown, offline: bool) -> None:
    assert shown.outputs("notebook_login()") == []  # the tests have a token
    assert "published: alice/notebook@midtrain" in shown.text("pipe.run(to=")
    for found in ("run.status()", "run.push()", "list_repo_refs"):
        table = shown.table(found)
        assert all(stage in table for stage in STAGES[:3])
        assert len(re.findall("<td>[0-9a-f]{40}</td>", table)) >= 3
    assert "## Load it" in shown.text("ModelCard.load")
    assert "turn_taking: 2 held-out questions" in shown.table("eval_results")
    assert re.findall("<td>(done|new)</td>", shown.table('pipe.plan("runs/elsewhere")')) == ["done"] * 3 + ["new"] * 2
    assert "published: alice/notebook@dpo" in shown.text('pipe.run("runs/elsewhere")')
    assert len(shown.of("elsewhere.plot()", "image/png")) == 1
    assert all(stage in heads(shown.table("lineage(f")) for stage in STAGES)
    verdicts = shown.text("value_counts")
    assert "holds" in verdicts
    assert "broken" not in verdicts
    assert shown.text("load_model(f").strip()


# What a notebook must show besides running through; one without an entry is run all the same.
CHECKS = {
    "01_tiny": check_tiny,
    "02_your_data": check_your_data,
    "03_preferences": check_preferences,
    "04_publish": check_publish,
}


# By how the Hub takes large files; None: there is no network.
MODES = {"02_your_data": (None, "xet"), "03_preferences": (None, "lfs"), "04_publish": ("lfs", "xet")}
HUBS = [(path, mode) for path in NOTEBOOKS for mode in MODES.get(path.stem, (None,))]
NAMED = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize(("path", "mode"), HUBS, ids=lambda given: getattr(given, "stem", given or "offline"))
def test_runs_from_top_to_bottom(request, path, mode, tmp_path, hub_server):
    network = {"HF_HUB_OFFLINE": "1"}
    if mode:
        if path.stem != "04_publish":
            upload(request.getfixturevalue("micro_run") / "sft", hub_server[mode])
        network = hub_server[mode].env() | {
            "HF_HOME": str(tmp_path / "home"),
            "HFPIPE_NOTEBOOK_REPO": "alice/notebook",
        }
    notebook = execute(path, tmp_path, HFPIPE_NOTEBOOK_RECIPE="micro", **network)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert "".join(output.text for output in outputs if output.get("name") == "stderr") == ""
    if check := CHECKS.get(path.stem):
        check(Shown(notebook), offline=mode is None)
    if mode and path.stem != "04_publish":
        (parent,) = [json.loads(file.read_text())["parent"] for file in tmp_path.glob("runs/*/*/stage.json")]
        assert parent["from"] == NAMED
        assert re.fullmatch("[0-9a-f]{40}", parent["revision"])


def upload(folder, hub) -> None:
    """Put a small model where the notebooks look for theirs."""
    upload = f"HfApi().create_repo({NAMED!r}, exist_ok=True); HfApi().upload_folder(repo_id={NAMED!r}, folder_path={str(folder)!r})"
    command = [sys.executable, "-c", f"from huggingface_hub import HfApi; {upload}"]
    subprocess.run(command, env=os.environ | hub.env("hf_maker_write"), check=True, capture_output=True)


def test_there_are_notebooks():
    assert set(CHECKS) <= {path.stem for path in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_committed_as_it_should_be(path):
    text = path.read_text()
    assert len(text) < 200_000
    assert not MACHINE.search(text), MACHINE.search(text)
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert f"colab.research.google.com/github/hfpipe/hfpipe/blob/main/notebooks/{path.name}" in notebook.cells[0].source
    assert "-c hfpipe-repository/constraints.txt" in next(c.source for c in notebook.cells if c.cell_type == "code")
    for link in re.findall(
        r"\]\(((?!http)[^)]+)\)", "".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    ):
        assert (ROOT / "notebooks" / link).exists(), link
    assert '"output_type": "error"' not in text


def test_what_is_proposed_to_change_can_be_changed():
    cells = nbformat.read(ROOT / "notebooks" / "01_tiny.ipynb", as_version=4).cells
    proposed = re.findall(r"`(\{.*?\})`", "".join(cell.source for cell in cells if cell.cell_type == "markdown"))
    assert len(proposed) >= 2
    for overrides in proposed:
        load_pipeline("tiny", json.loads(overrides))


def test_an_interrupted_cell_goes_on_where_it_was(tmp_path):
    start = "pipe = load_pipeline('micro', {'pretrain.trainer.save_steps': 10})\npipe.run('out', to='pretrain')"
    cells = ["from hfpipe import load_pipeline", start, "pipe.plan('out').loc['pretrain', 'why']"]
    notebook = new_notebook(cells=[new_code_cell(cell) for cell in cells])
    client = NotebookClient(notebook, allow_errors=True, resources={"metadata": {"path": str(tmp_path)}})
    told = tmp_path / "out" / "logs" / "pretrain.jsonl"

    def interrupt() -> None:  # as Jupyter does it: the whole process group
        while not (told.is_file() and re.search(r'"step": [2-9]\d', told.read_text())):
            time.sleep(0.1)
        os.killpg(client.km.provisioner.process.pid, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT)})
    *_, shown = notebook.cells[1].outputs
    assert shown.ename == "Interrupted"
    assert shown.traceback == ["hfpipe: interrupted; the same call goes on from what is on disk."]
    assert re.fullmatch(r"'goes on from step \d\d'", notebook.cells[2].outputs[0]["data"]["text/plain"])


def test_a_fault_is_one_message(tmp_path):
    cell = new_code_cell("from hfpipe import load_pipeline\nload_pipeline('micro', {'sft.trainer.learing_rate': 1})")
    notebook = new_notebook(cells=[cell])
    NotebookClient(notebook, allow_errors=True, resources={"metadata": {"path": str(tmp_path)}}).execute()
    (shown,) = notebook.cells[0].outputs
    assert shown.output_type == "error"
    assert len(shown.traceback) == 1
    assert re.fullmatch(r"hfpipe: \S+sft.yaml: trainer.learing_rate = 1 is not .*`learning_rate`\?", shown.traceback[0])


_copy_tree = functools.partial(shutil.copytree, ignore=shutil.ignore_patterns("__pycache__"))


def test_the_first_cell_installs_where_hfpipe_is_not(tmp_path):
    """As on Colab, with a repository of this tree in the place of GitHub's, and what hfpipe needs there already."""
    cells = {next(c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code") for path in NOTEBOOKS}
    first = {cell.replace('"./hfpipe-repository[quant]"', "./hfpipe-repository") for cell in cells}
    assert (len(cells), len(first)) == (2, 1)
    tree = tmp_path / "hfpipe"
    for name in ("hfpipe", "stage_configs", "chat_templates", "pyproject.toml", "README.md", "constraints.txt"):
        copy = _copy_tree if (ROOT / name).is_dir() else shutil.copy
        (tree / name).parent.mkdir(exist_ok=True)
        copy(ROOT / name, tree / name)
    # IPython puts the packages of VIRTUAL_ENV in its path, whichever Python it runs in.
    foreign = re.compile("PYTHONPATH|VIRTUAL_ENV|GIT_.*")
    env = {name: value for name, value in os.environ.items() if not foreign.fullmatch(name)}
    env |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    author = {f"GIT_{who}_{what}": "hfpipe" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    for command in ("init -q", "add .", "commit -q -m tree"):
        subprocess.run(["git", *command.split()], cwd=tree, env=env | author, check=True)
    venv.create(tmp_path / "env", symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    here = Path(importlib.util.find_spec("torch").origin).parents[1]
    (fresh,) = (tmp_path / "env").glob("lib/*/site-packages")
    for path in here.iterdir():
        if "hfpipe" not in path.name and path.suffix != ".pth":
            (fresh / path.name).symlink_to(path)
    env |= {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.{tree.as_uri()}.insteadOf"}
    env |= {"GIT_CONFIG_VALUE_0": "https://github.com/hfpipe/hfpipe"}
    env |= {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "false"}  # which stands for --no-build-isolation
    elsewhere = tmp_path / "content"
    elsewhere.mkdir()

    def told(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([python, *arguments], cwd=elsewhere, env=env, capture_output=True, text=True)

    look = "import hfpipe; print(hfpipe.__file__); print(len(hfpipe.load_pipeline('micro').plan()))"
    assert "No module named 'hfpipe'" in told("-c", "import hfpipe").stderr
    (elsewhere / "cell.ipy").write_text(first.pop())
    done = told("-m", "IPython", "cell.ipy")
    assert told("-c", look).stdout.split() == [str(fresh / "hfpipe" / "__init__.py"), "5"], done.stdout + done.stderr
