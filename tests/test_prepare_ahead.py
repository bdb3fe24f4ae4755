"""The data of a run's stages is prepared by two processes that meet halfway, to the same rows and the same messages."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from hfpipe import processes
from hfpipe.config import load_recipe
from hfpipe.errors import UserError
from hfpipe.progress import Display
from hfpipe.stages import stage_types
from hfpipe.stages._prepare import prepare_all, prepare_backwards

from .conftest import hfpipe
from .test_nothing_lost import begun

STAGES = ["pretrain", "midtrain", "sft", "dpo"]


class Told:
    def __init__(self):
        self.lines = []

    def tell(self, event, **values):
        self.lines.append((event, values))


@pytest.fixture
def store(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HFPIPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prepared"


def reports(store: Path) -> dict[str, float]:
    """What is stored, with the time when it was."""
    return {folder.name: folder.stat().st_mtime for folder in store.iterdir() if folder.is_dir()}


def test_one_makes_what_the_other_finds(micro_run, store, tmp_path):
    run = begun(micro_run, tmp_path / "run", "pretrain")
    recipe = load_recipe("micro", stage_types(), [], run)
    prepare_backwards(recipe, run, STAGES)
    made, told = reports(store), Told()
    assert len(made) == 4
    prepare_all(recipe, run, STAGES, told)
    assert made.items() <= reports(store).items()  # none of them again; what is held out besides is the other's
    assert [values["stage"] for event, values in told.lines if event == "doing"] == STAGES
    rows = {name: (store / name / "report.json").read_text() for name in made}
    shutil.rmtree(store)
    prepare_all(recipe, run, STAGES, Told())
    assert rows.items() <= {name: (store / name / "report.json").read_text() for name in reports(store)}.items()


def test_a_run_has_both_and_leaves_none(micro_run, store, tmp_path, monkeypatch):
    """The second one is ended with the first, also where that has met a fault."""
    run, begun_processes = begun(micro_run, tmp_path / "run", "pretrain"), []

    class Seen(processes.ForkedProcess):
        def __init__(self, target, arguments):
            super().__init__(target, arguments)
            begun_processes.append((target.__name__, self))

    monkeypatch.setattr(processes, "ForkedProcess", Seen)  # the real one, noted
    monkeypatch.setattr(processes, "_has_room", lambda stages: True)  # also where there is one processor
    recipe = load_recipe("micro", stage_types(), [], run)
    processes.prepare_stages(recipe, run, STAGES, Display())
    assert [name for name, _ in begun_processes] == ["prepare_ahead_child", "prepare_child"]
    assert len(reports(store)) >= 4
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\n{\n')
    bad = load_recipe("micro", stage_types(), [f"pretrain.data.train=[{{path: {tmp_path / 'bad.jsonl'}}}]"], run)
    with pytest.raises(UserError, match=r"bad\.jsonl"):
        processes.prepare_stages(bad, run, STAGES, Display())
    assert len(begun_processes) == 4
    assert all(process.poll() is not None for _, process in begun_processes)
    assert not list(store.glob("*.making"))


def test_what_is_wrong_is_told_once_in_the_stages_order_and_nothing_is_left_half_made(recipe, store, tmp_path):
    """The last stage's fault is met first by the process that says nothing, the first one's by the other."""
    asked, said = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    rows = {
        "sft": [{"messages": [asked, said]}, *[{"messages": [said, said]}] * 3],
        "dpo": [
            {"prompt": "Hi", "chosen": "Hello", "rejected": "Go"},
            *[{"prompt": "Hi", "chosen": "", "rejected": ""}] * 3,
        ],
    }
    for name, given in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    folder = recipe(
        {
            "sft": f"stage: sft\nmodel: {{from: midtrain}}\ndata: {{train: [{{path: {tmp_path / 'sft.jsonl'}}}]}}\n",
            "dpo": f"stage: dpo\nmodel: {{from: sft}}\ndata: {{train: [{{path: {tmp_path / 'dpo.jsonl'}}}]}}\n",
        }
    )
    result = hfpipe("run", folder, "--out", tmp_path / "run", check=2)
    assert "recipe/sft.yaml: " in result.stderr
    assert "3 of 4 rows cannot be used" in result.stderr
    assert "dpo.yaml" not in result.stderr
    assert result.stderr.count("hfpipe: ") == 1
    assert not (tmp_path / "run" / "pretrain").exists()
    assert not list(store.glob("*.making"))


def test_one_stage_or_one_processor_needs_no_second_process(monkeypatch):
    for cores, stages, wanted in [
        ({0, 1}, ["sft", "dpo"], True),
        ({0, 1}, ["sft"], False),
        ({0}, ["sft", "dpo"], False),
    ]:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cores=cores: cores)  # another machine's
        assert processes._has_room(stages) == wanted
