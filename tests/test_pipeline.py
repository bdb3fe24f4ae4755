"""The whole path at its smallest, through the command line: what it leaves, what runs again, what goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hfpipe import artifact

from .conftest import ROOT, everything_in, hfpipe, stage_json

STAGES = ["tokenizer", "pretrain", "midtrain", "sft", "dpo"]
MODELS = STAGES[1:]


@pytest.fixture
def run_copy(micro_run, tmp_path) -> Path:
    """A copy of the finished run, for a test that changes it."""
    return Path(shutil.copytree(micro_run, tmp_path / "micro"))


def plan(*arguments) -> dict[str, dict]:
    rows = json.loads(hfpipe("plan", *arguments, "--json").stdout)["stages"]
    return {row["stage"]: row for row in rows}


def test_every_stage_leaves_what_it_promises(micro_run):
    for name in STAGES:
        folder, record = micro_run / name, stage_json(micro_run / name)
        assert {"stage", "fingerprint", "parent", "config", "data", "versions", "metrics"} <= set(record)
        assert record["stage"] == name
        assert {"README.md", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= set(
            os.listdir(folder)
        )
        assert not list(folder.glob("*.bin"))
        assert not (folder / "checkpoints").exists()
    for parent, name in zip(STAGES, MODELS, strict=False):
        folder, record = micro_run / name, stage_json(micro_run / name)
        assert record["parent"]["fingerprint"] == stage_json(micro_run / parent)["fingerprint"]
        left = set(os.listdir(folder))
        assert {"model.safetensors", "config.json", "generation_config.json", "metrics.jsonl", "samples.jsonl"} <= left
        scores = json.loads((folder / "eval.json").read_text())
        assert scores["validation"]["perplexity"] > 1
        assert scores["held_out_text"]["tokens"] > 1000
        samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        assert len(samples) == 5
        assert all(sample["prompt"] for sample in samples)
        assert scores["samples"] == samples
        assert all(
            " ".join(sample["asked"].split())[-20:] in (micro_run / "stdout.txt").read_text() for sample in samples
        )
        steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert steps == sorted(steps)
        assert record["metrics"]["steps"] > 0


def test_training_taught_something(micro_run):
    base = stage_json(micro_run / "pretrain")["metrics"]
    assert base["validation"]["perplexity"] < 60  # untrained: about 768
    first, last = (
        json.loads((micro_run / name / "eval.json").read_text())["validation"]["loss"] for name in ("pretrain", "sft")
    )
    assert first < 5
    assert last < 5
    pairs = stage_json(micro_run / "dpo")["metrics"]
    assert abs(pairs["pairs_before"]["margin"]) < 0.02  # the reference is the parent
    assert pairs["pairs"]["margin"] > 0.1
    assert pairs["pairs"]["loss"] < pairs["pairs_before"]["loss"]


def test_models_load_as_ordinary_folders_and_know_where_to_stop(micro_run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name in MODELS:
        model = AutoModelForCausalLM.from_pretrained(micro_run / name)
        tokenizer = AutoTokenizer.from_pretrained(micro_run / name)
        stops = tokenizer.convert_tokens_to_ids(["<|end_assistant|>", "<|end_tool_call|>", "<|end|>"])
        assert set(model.generation_config.eos_token_id) == set(stops)
        assert tokenizer.pad_token_id not in stops
        assert model.config.use_cache is not False
    assert not torch_equal(micro_run / "sft", micro_run / "dpo", "model.layers.0.mlp.up_proj.weight")


def torch_equal(first: Path, second: Path, name: str) -> bool:
    from safetensors import safe_open

    tensors = []
    for folder in (first, second):
        with safe_open(folder / "model.safetensors", "pt") as file:
            tensors.append(file.get_tensor(name))
    return bool((tensors[0] == tensors[1]).all())


def test_frozen_rows_stay_and_control_tokens_move(micro_run):
    from safetensors import safe_open

    rows = []
    for name in ("pretrain", "midtrain"):
        with safe_open(micro_run / name / "model.safetensors", "pt") as file:
            rows.append(file.get_tensor("model.embed_tokens.weight"))
    moved = (rows[0] != rows[1]).any(dim=1)
    assert moved[:13].sum() >= 8  # tokens that occur in the conversations
    assert not moved[13:].any()


def test_a_second_run_does_nothing_and_imports_no_torch(micro_run):
    code = (
        "import sys\nfrom hfpipe.cli import main\n"
        f"assert main(['run', 'micro', '--out', {str(micro_run)!r}]) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done already") == len(STAGES)


def test_plan_names_what_changed_and_what_follows(micro_run):
    rows = plan("micro", "--out", micro_run, "--set", "sft.trainer.learning_rate=1e-5")
    assert [rows[name]["status"] for name in STAGES] == ["done", "done", "done", "changed", "downstream"]
    assert rows["sft"]["why"] == ["trainer.learning_rate 0.001 -> 1e-05"]
    told = hfpipe("plan", "micro", "--out", micro_run, "--set", "sft.trainer.learning_rate=1e-5").stdout
    assert re.search(r"sft .*changed: trainer\.learning_rate 0\.001 -> 1e-05", told), told
    assert rows["dpo"]["why"] == ["`sft` runs again"]
    rows = plan("micro", "--out", micro_run, "--set", "sft.data.eval=[]")
    assert (rows["sft"]["status"], rows["sft"]["why"]) == ("changed", ["eval[0] tinyworld/sft removed"])
    rows = plan("micro", "--out", micro_run, "--set", "sft.trainer.logging_steps=1")
    assert {row["status"] for row in rows.values()} == {"done"}


def test_only_the_changed_stage_and_those_after_it_run(run_copy):
    before = {name: stage_json(run_copy / name) for name in STAGES}
    done = hfpipe("run", "micro", "--out", run_copy, "--set", "dpo.trainer.beta=0.3")
    after = {name: stage_json(run_copy / name) for name in STAGES}
    assert done.stdout.count("done already") == 4
    assert [name for name in STAGES if before[name] != after[name]] == ["dpo"]


def test_what_a_fork_server_imports_is_there():
    """Python says nothing of a module that a fork server does not find. The compiler is not among what is there."""
    code = (
        "import hfpipe.stages._stack, sys, torch, bitsandbytes, gc\n"
        "print('torch._inductor.compile_fx' in sys.modules, torch.compile.__module__, gc.isenabled(), gc.get_freeze_count() > 10**5)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "torch", "True", "True"]


def test_a_stage_is_forked_from_a_process_that_has_the_stack(tmp_path):
    code = (
        "import sys; from pathlib import Path; from hfpipe.processes import ForkedProcess, start_server\n"
        "start_server(Path('log'))\n"
        "for name in ('first', 'second'):\n"
        '    look = f\'import os, sys; print("trl.trainer.sft_trainer" in sys.modules, os.getppid(), file=open({name!r}, "w"))\'\n'
        "    ForkedProcess(exec, (look,)).wait(300)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
    first, second = ((tmp_path / name).read_text().split() for name in ("first", "second"))
    assert first[0] == second[0] == "True"
    assert first[1] == second[1]  # of one server


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_alone_gives_the_same_result(micro_run, tmp_path, name):
    run = tmp_path / "micro"
    for other in STAGES:
        if other != name:
            shutil.copytree(micro_run / other, run / other)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "-m", f"hfpipe.stages.{name}"]
    command = [*launch, f"stage_configs/micro/{name}.yaml", "--out", str(run)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    left, expected = stage_json(run / name), stage_json(micro_run / name)
    assert left["fingerprint"] == expected["fingerprint"]
    assert left["weights"] == expected["weights"]
    assert bool(left["weights"]) == (name != "tokenizer")
    assert (run / name / "tokenizer.json").read_bytes() == (micro_run / name / "tokenizer.json").read_bytes()
    assert {row["status"] for row in plan("micro", "--out", run).values()} == {"done"}


def test_a_stage_alone_takes_overrides_of_its_own(run_copy):
    """As `--set dpo...` of the pipeline, which then finds the stage done."""
    command = [sys.executable, "-m", "hfpipe.stages.dpo", "stage_configs/micro/dpo.yaml", "--out", str(run_copy)]
    refused = subprocess.run([*command, "trainer.betta=1"], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "dpo.yaml: trainer.betta = 1 is not a field of trl.DPOConfig. Did you mean `beta`?" in refused.stderr
    settings = ["trainer.learning_rate=1e-4", "trainer.max_steps=2"]
    done = subprocess.run([*command, *settings], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    record = stage_json(run_copy / "dpo")
    assert (record["config"]["trainer"]["learning_rate"], record["metrics"]["steps"]) == (1e-4, 2)
    same = [word for setting in settings for word in ("--set", f"dpo.{setting}")]
    assert plan("micro", "--out", run_copy, *same)["dpo"]["status"] == "done"


@pytest.mark.parametrize(
    ("command", "threads"),
    [
        ("accelerate.commands.launch --num_processes 1 -m hfpipe.stages.tokenizer", len(os.sched_getaffinity(0))),
        ("hfpipe.stages.tokenizer", 1),
    ],
)
def test_a_stage_alone_has_the_threads_that_its_user_asked_for(tmp_path, command, threads):
    """A shell's own environment, as the kernel has it, does not show what was exported in it."""
    asked = "export OMP_NUM_THREADS=1; " if threads == 1 else ""
    line = f"{asked}{sys.executable} -m {command} stage_configs/micro/tokenizer.yaml --out {tmp_path / 'run'}; exit $?"
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run(["sh", "-c", line], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert stage_json(tmp_path / "run" / "tokenizer")["machine"]["threads"] == threads


def test_weights_on_disk_are_scored_and_not_trained_again(run_copy):
    """Killed between training and scoring: the next run only scores."""
    folder, partial = run_copy / "dpo", run_copy / "dpo.partial"
    record = stage_json(folder)
    folder.rename(partial)
    for name in ("stage.json", "eval.json", "samples.jsonl"):
        (partial / name).unlink()
    state = {"fingerprint": record["fingerprint"], "processes": 1}
    artifact.write_record(partial / "begun.json", state)
    artifact.write_record(partial / "trained.json", {**state, "metrics": record["metrics"], "files": record["files"]})
    done = hfpipe("run", "micro", "--out", run_copy)
    assert "scoring them" in done.stdout
    assert stage_json(folder)["weights"] == record["weights"]
    assert (folder / "eval.json").is_file()


def test_a_folder_of_another_recipe_is_refused(micro_run, recipe):
    folder = recipe()
    text = (folder / "pipeline.yaml").read_text().replace("name: micro", "name: mine")
    (folder / "pipeline.yaml").write_text(text)
    before = everything_in(micro_run)
    done = hfpipe("run", folder, "--out", micro_run, check=2)
    assert "was made by the recipe `micro`, not `mine`" in done.stderr
    assert everything_in(micro_run) == before


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    done = hfpipe("run", "micro", "--out", tmp_path, check=2)
    assert "is not a run's folder: it holds thesis.tex" in done.stderr
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_two_runs_in_one_folder(micro_run):
    from hfpipe.pipeline import lock

    with lock(micro_run):
        done = hfpipe("run", "micro", "--out", micro_run, check=2)
    assert f"in use by another run (process {os.getpid()})" in done.stderr


def test_list_and_plan_as_json():
    listed = json.loads(hfpipe("list", "--json").stdout)
    assert listed["recipes"]["micro"] == STAGES
    assert set(STAGES) <= set(listed["stages"])
    rows = plan("tiny", "--out", "runs/none")
    assert rows["pretrain"]["parameters"] > 1e6
    assert rows["pretrain"]["status"] == "new"


@pytest.mark.parametrize("killed", ["before the renames", "between the renames", "after the renames"])
def test_killed_while_a_finished_stage_takes_its_place(run_copy, killed):
    folder, partial, old = run_copy / "dpo", run_copy / "dpo.partial", run_copy / "dpo.old"
    weights = stage_json(folder)["weights"]
    if killed == "before the renames":
        shutil.copytree(folder, partial)
        (folder / "stage.json").unlink()
    elif killed == "between the renames":
        shutil.copytree(folder, old)
        folder.rename(partial)
    else:
        shutil.copytree(folder, old)
    done = hfpipe("run", "micro", "--out", run_copy)
    assert "step" not in "".join(line for line in done.stdout.splitlines() if line.startswith("dpo") and "/" in line)
    assert stage_json(folder)["weights"] == weights
    assert not partial.exists()


@pytest.mark.parametrize("group", [False, True], ids=["its process", "its group"])
def test_several_processes_end_with_the_pipeline(micro_run, tmp_path, group):
    """Ranks are in no group of the pipeline's, and see its end also where nobody waits for it."""
    run = tmp_path / "micro"
    for name in ("tokenizer", "pretrain", "midtrain"):
        shutil.copytree(micro_run / name, run / name)
    command = [sys.executable, "-m", "hfpipe", "run", "micro", "--out", str(run), "--to", "sft"]
    command += ["--set", "launch.processes=2", "--set", "sft.trainer.num_train_epochs=50"]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **silent)
    events, deadline = run / "logs" / "sft.jsonl", time.monotonic() + 120
    while '"step"' not in (events.read_text() if events.exists() else "") and time.monotonic() < deadline:
        time.sleep(0.1)
    (os.killpg if group else os.kill)(process.pid, signal.SIGKILL)
    time.sleep(5)
    left = subprocess.run(["pgrep", "-f", f"hfpipe.stages.sft.*{run}"], capture_output=True, text=True).stdout
    process.wait()
    assert not left


def test_a_template_that_changed_is_noticed(micro_run, tmp_path):
    from hfpipe.training.templates import load_chat_template

    template = tmp_path / "mine.jinja"
    template.write_text(load_chat_template("hfpipe"))
    setting = ["--set", f"midtrain.tokenizer.chat_template={template}"]
    first = plan("micro", "--out", micro_run, *setting)["midtrain"]
    assert first["status"] == "changed"
    run = tmp_path / "run"
    for name in ("tokenizer", "pretrain"):
        shutil.copytree(micro_run / name, run / name)
    from hfpipe.config import load_recipe
    from hfpipe.stages import stage_types
    from hfpipe.training.identity import identify

    recipe = load_recipe("micro", stage_types(), [setting[1]])
    before = identify(recipe, recipe.stages["midtrain"], None)[0]
    template.write_text(template.read_text() + "{# a word more #}")
    assert identify(recipe, recipe.stages["midtrain"], None)[0] != before


def test_another_evaluation_scores_again_and_trains_nothing(run_copy):
    setting = ["--set", "evaluate.samples=2"]
    rows = plan("micro", "--out", run_copy, *setting)
    assert [rows[name]["status"] for name in STAGES] == ["done", "rescore", "rescore", "rescore", "rescore"]
    before = {name: stage_json(run_copy / name) for name in MODELS}
    hfpipe("run", "micro", "--out", run_copy, *setting)
    for name in MODELS:
        after = stage_json(run_copy / name)
        assert after["weights"] == before[name]["weights"]
        assert after["finished"] == before[name]["finished"]
        assert len(json.loads((run_copy / name / "eval.json").read_text())["samples"]) == 2
    assert {row["status"] for row in plan("micro", "--out", run_copy, *setting).values()} == {"done"}


def test_numbers_and_nulls_written_otherwise_change_nothing(micro_run):
    settings = ["sft.trainer.num_train_epochs=1.0", "sft.adapter=null", "sft.regularize.freeze_layers=0"]
    rows = plan("micro", "--out", micro_run, *(a for s in settings for a in ("--set", s)))
    assert {row["status"] for row in rows.values()} == {"done"}
