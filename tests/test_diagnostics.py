"""Effective rank and LLC: right by hand, the same again, shown where a recipe asks for them and imported nowhere else."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hfpipe.evaluation.diagnostics import effective_rank

from .conftest import ROOT, hfpipe
from .sequences import RECIPE, write_data

ASKED = "--set=evaluate.diagnostics=[effective_rank, llc]", "--set=evaluate.llc={num_draws: 5, batch_size: 4}"


@pytest.fixture(scope="module")
def nano(tmp_path_factory) -> tuple[Path, Path]:
    """A very small recipe and its run, in which the models have their diagnostics."""
    folder = tmp_path_factory.mktemp("nano")
    write_data(folder / "data", 0)
    (folder / "recipe").mkdir()
    for name, text in RECIPE.items():
        (folder / "recipe" / f"{name}.yaml").write_text(text.replace("DATA", str(folder / "data")))
    hfpipe("run", folder / "recipe", "--out", folder / "run", *ASKED)
    return folder / "recipe", folder / "run"


def told(run: Path, stage: str) -> dict:
    return json.loads((run / stage / "eval.json").read_text())["diagnostics"]


@pytest.mark.parametrize(
    ("matrix", "rank"),
    [
        (torch.eye(7), 7.0),
        (torch.outer(torch.arange(1.0, 5), torch.arange(1.0, 4)), 1.0),
        (torch.diag(torch.tensor([1.0, 1.0, 0.0])), 2.0),
        (torch.diag(torch.tensor([3.0, 1.0])), 4 / 27**0.25),  # exp of -(3/4 log 3/4 + 1/4 log 1/4)
    ],
)
def test_effective_rank_by_hand(matrix, rank):
    assert effective_rank(matrix) == pytest.approx(rank, rel=1e-4)


def test_scores_are_finite_and_shown(nano):
    _, run = nano
    page, printed = (run / "report.html").read_text(), hfpipe("report", run).stdout
    for stage in ("pretrain", "sft"):
        ranks, llc = told(run, stage)["effective_rank"], told(run, stage)["llc"]
        kinds = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        assert set(ranks) == {"mean", *kinds}
        assert all(1 <= rank <= 16 for rank in ranks.values())
        assert torch.isfinite(torch.tensor([llc["mean"], llc["std"]])).all()
        assert llc["mean"] != 0
        assert f"{llc['mean']:.2f} ± {llc['std']:.2f}" in page
    assert "down_proj" in page
    line = next(line for line in printed.splitlines() if line.startswith("effective rank"))
    assert line.split()[2:] == [f"{told(run, stage)['effective_rank']['mean']:.2f}" for stage in ("pretrain", "sft")]


def test_the_same_again_and_other_settings_are_scored_again(nano, tmp_path):
    recipe, run = nano
    again = Path(shutil.copytree(run, tmp_path / "run"))
    weights = (again / "sft" / "model.safetensors").read_bytes()
    (again / "sft" / "eval.json").unlink()
    hfpipe("run", recipe, "--out", again, *ASKED)
    assert told(again, "sft") == told(run, "sft")
    assert (again / "sft" / "model.safetensors").read_bytes() == weights


def test_missing_package_and_wrong_settings_are_told_by_plan(nano):
    recipe, _ = nano
    code = "import sys; sys.modules['devinterp'] = None\nfrom importlib import util; find = util.find_spec\n"
    code += "util.find_spec = lambda name, *rest: None if name == 'devinterp' else find(name, *rest)\n"
    code += f"from hfpipe.cli import main; sys.exit(main(['plan', {str(recipe)!r}, {ASKED[0]!r}]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert 'pip install -c constraints.txt "hfpipe[diagnostics]"' in done.stderr
    done = hfpipe("plan", recipe, "--set", "evaluate.llc={num_draw: 5}", check=2)
    assert "Did you mean `num_draws`?" in done.stderr


def test_a_recipe_without_it_imports_nothing(nano):
    recipe, _ = nano
    code = "import sys\nfrom hfpipe.evaluation import basics, diagnostics\nfrom hfpipe.sections import Evaluate\n"
    code += "assert diagnostics.diagnose(Evaluate(), None, []) == {}\n"
    code += f"from hfpipe.cli import main; assert main(['plan', {str(recipe)!r}]) == 0\nassert 'devinterp' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
