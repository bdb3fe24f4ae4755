"""Killed, cut off, flipped, full, moved, hung: the same command goes on, to the same bits."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from hfpipe import artifact
from hfpipe.paths import cache_dir
from hfpipe.run_folder import damage_at, find_checkpoints

from .conftest import ROOT, hfpipe, stage_json

MODELS = ("pretrain", "midtrain", "sft", "dpo")
EVERY = ["--set", "pretrain.trainer.save_steps=10"]


def start(run: Path, *arguments: str, recipe: str = "micro") -> subprocess.Popen:
    command = [sys.executable, "-m", "hfpipe", "run", recipe, "--out", str(run), *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def wait_for(process: subprocess.Popen, seen: Callable[[], object], seconds: float = 240) -> bool:
    """Whether `seen` came true before the process ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if seen():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    raise AssertionError("waited in vain")


def kill(process: subprocess.Popen) -> str:
    """kill -9 of the whole group; what it had printed."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()[0]


def events(run: Path, name: str) -> list[dict]:
    file = run / "logs" / f"{name}.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def checkpoints(run: Path, stage: str) -> list[Path]:
    return find_checkpoints(run / f"{stage}.partial" / "checkpoints")


def begun(micro_run: Path, run: Path, until: str = "pretrain") -> Path:
    """A run in which the stages before `until` are done."""
    for name in ("tokenizer", *MODELS):
        if name == until:
            return run
        shutil.copytree(micro_run / name, run / name)
    raise AssertionError(until)


def stopped_in_pretraining(micro_run: Path, run: Path, whole: int = 1, *more: str) -> Path:
    """A run killed in pretraining with at least `whole` checkpoints."""
    process = start(begun(micro_run, run), "--to", "pretrain", *EVERY, *more)
    assert wait_for(process, lambda: len(checkpoints(run, "pretrain")) >= whole), process.communicate()[0]
    kill(process)
    assert not (run / "pretrain").exists()
    return run


def curve(folder: Path) -> list[dict]:
    """What was logged, times and speeds aside."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "time" not in k and "per_second" not in k} for line in lines]


def same_result(run: Path, other: Path, stages: tuple[str, ...] = MODELS) -> None:
    for name in stages:
        assert stage_json(run / name)["weights"] == stage_json(other / name)["weights"], name
        assert damage_at(run / name) is None
        assert curve(run / name) == curve(other / name), name
        assert (run / name / "eval.json").read_text() == (other / name / "eval.json").read_text(), name
        losses = [stage_json(folder / name)["metrics"]["train_loss"] for folder in (run, other)]
        assert losses[0] == losses[1] > 0


# --- killed ---

MOMENTS: dict[str, Callable[[Path, str], object]] = {
    "preparing": lambda run, stage: half_prepared(),
    "training": checkpoints,
    "saved": checkpoints,  # and no moment later, which a short stage may not have
    "writing a checkpoint": lambda run, stage: (run / f"{stage}.partial" / "checkpoints" / "writing").exists(),
    "trained": lambda run, stage: (run / f"{stage}.partial" / "trained.json").is_file(),
    "evaluating": lambda run, stage: any(e.get("text") == "evaluating" for e in events(run, stage)),
}


def half_prepared() -> list[Path]:
    return list((cache_dir() / "prepared").glob("*.making"))


def kill_through(run: Path, recipe: str, plan: list[tuple[str, str]], rng: random.Random, settings: list[str]) -> dict:
    """Run a recipe to its end, killed at each moment of `plan`; returns what happened."""
    told = {"kills": 0, "at": [], "half prepared": False}
    for stage, moment in plan:
        for file in (run / "logs").glob("*.jsonl"):
            file.unlink()
        process = start(run, *settings, recipe=recipe)
        if wait_for(process, lambda stage=stage, moment=moment: MOMENTS[moment](run, stage), 900):
            time.sleep(rng.random() * {"training": 1.0, "evaluating": 0.3}.get(moment, 0.02))
        ended = process.poll() is not None
        before = newest_step(run, stage)
        output = kill(process)
        told["half prepared"] = told["half prepared"] or bool(half_prepared())
        assert process.returncode == (0 if ended else -signal.SIGKILL), output
        told["kills"] += not ended
        told["at"].append(f"{stage}: {'over before' if ended else moment}")
        assert (run / stage).exists() or newest_step(run, stage) >= before
    hfpipe("run", recipe, "--out", run, *settings)
    return told


def newest_step(run: Path, stage: str) -> int:
    return max((int(p.name.rpartition("-")[2]) for p in checkpoints(run, stage)), default=0)


def test_killed_everywhere_it_comes_to_the_same_bits(tmp_path, monkeypatch):
    settings = [a for name in MODELS for a in ("--set", f"{name}.trainer.save_steps=5")]
    hfpipe("run", "micro", "--out", tmp_path / "whole", *settings)
    monkeypatch.setenv("HFPIPE_CACHE", str(tmp_path / "cache"))  # nothing is prepared yet
    seed = int(os.environ.get("HFPIPE_TEST_SEED", 0))
    print(f"seed {seed}")
    rng = random.Random(seed)
    plan = [("pretrain", "preparing"), ("pretrain", "writing a checkpoint"), ("pretrain", "training")]
    plan += [("midtrain", "training"), ("midtrain", "trained"), ("sft", "writing a checkpoint"), ("sft", "evaluating")]
    plan += [("dpo", "training"), ("dpo", "trained")]
    told = kill_through(tmp_path / "run", "micro", plan, rng, settings)
    assert told["kills"] >= 6, told
    assert told["half prepared"], told
    same_result(tmp_path / "run", tmp_path / "whole")
    resumed = [stage_json(tmp_path / "run" / name)["metrics"]["resumed_from_step"] for name in MODELS]
    assert sum(step > 0 for step in resumed) >= 2, resumed
    tables = [hfpipe("report", tmp_path / name).stdout.replace(f"/{name}/", "/") for name in ("run", "whole")]
    assert tables[0] == tables[1]
    assert all(name in tables[0] for name in MODELS)
    pages = [(tmp_path / name / "report.html").read_text() for name in ("run", "whole")]
    drawn = [re.findall("<svg.*?</svg>", page, re.DOTALL) for page in pages]
    assert drawn[0] == drawn[1] != []


@pytest.mark.slow
def test_twenty_kills_in_one_tiny_run(recipe, tmp_path, monkeypatch):
    tiny = recipe(base="tiny")
    pipeline = tiny / "pipeline.yaml"
    pipeline.write_text(pipeline.read_text().replace("dpo, reward, ppo", "dpo"))
    settings = [a for name in MODELS for a in ("--set", f"{name}.trainer.save_steps=25")]
    hfpipe("run", tiny, "--out", tmp_path / "whole", *settings)
    monkeypatch.setenv("HFPIPE_CACHE", str(tmp_path / "cache"))  # nothing is prepared yet
    moments = ["training", "writing a checkpoint", "training", "writing a checkpoint", "trained", "evaluating"]
    plan = [("pretrain", "preparing")] + [(stage, moment) for stage in MODELS for moment in moments]
    told = kill_through(tmp_path / "run", str(tiny), plan, random.Random(0), settings)
    print(told["kills"], told["at"])
    assert told["kills"] >= 20, told
    assert told["half prepared"], told
    same_result(tmp_path / "run", tmp_path / "whole")
    assert all(stage_json(tmp_path / "run" / name)["metrics"]["resumed_from_step"] > 0 for name in MODELS)


OTHERS = {
    "reward": ("tinyworld/preferences", "", "max_length: 256"),
    "kto": ("tinyworld/preferences", "", "max_length: 256"),
    "rloo": (
        "tinyworld/sft",
        "rewards: {functions: [{function: 'FOLDER/letters.py:letters'}]}\n",
        "num_generations: 2, max_completion_length: 8",
    ),
    "distill": ("tinyworld/sft", "", "teacher_model_name_or_path: PARENT, max_completion_length: 8"),
}


def test_stages_of_every_other_type_go_on_to_the_same_bits(micro_run, tmp_path):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "pipeline.yaml").write_text(
        f"name: others\nstages: [{', '.join(OTHERS)}]\nevaluate: {{samples: 1, max_new_tokens: 4}}\n"
    )
    for name, (data, more, trainer) in OTHERS.items():
        text = (
            f"stage: {name}\nmodel: {{from: PARENT, attn_implementation: eager}}\n"
            f"data: {{train: [{{path: {data}, limit: 64}}], eval: [{{path: {data}, limit: 8}}]}}\n{more}"
            "trainer: {learning_rate: 1.0e-3, per_device_train_batch_size: 4, activation_checkpointing: false, "
            f"max_steps: 30, save_steps: 5, {trainer}}}\n"
        )
        text = text.replace("PARENT", str(micro_run / "sft")).replace("FOLDER", str(tmp_path))
        (tmp_path / "recipe" / f"{name}.yaml").write_text(text)
    reward = "[len(set(messages[0]['content'])) / 20 for messages in completions]"
    (tmp_path / "letters.py").write_text(f"def letters(completions, **columns):\n    return {reward}\n")
    whole, run, recipe = tmp_path / "whole", tmp_path / "run", str(tmp_path / "recipe")
    hfpipe("run", recipe, "--out", whole)
    told = kill_through(run, recipe, [(name, "saved") for name in OTHERS], random.Random(0), [])
    assert told["kills"] >= 3, told
    for name in OTHERS:
        assert stage_json(run / name)["weights"] == stage_json(whole / name)["weights"], name
        assert curve(run / name) == curve(whole / name), name
        assert stage_json(run / name)["weights"] != stage_json(micro_run / "sft")["weights"], name
    assert sum(stage_json(run / name)["metrics"]["resumed_from_step"] > 0 for name in OTHERS) >= 3


def test_it_goes_on_from_the_last_checkpoint_and_says_so(micro_run, tmp_path):
    run = stopped_in_pretraining(micro_run, tmp_path / "run")
    newest = int(checkpoints(run, "pretrain")[0].name.rpartition("-")[2])
    planned = json.loads(hfpipe("plan", "micro", "--out", run, *EVERY, "--json").stdout)["stages"]
    assert f"goes on from step {newest}" in planned[1]["why"]
    done = hfpipe("run", "micro", "--out", run, "--to", "pretrain", *EVERY)
    assert f"resumed from checkpoint-{newest}" in done.stdout
    record = stage_json(run / "pretrain")
    assert record["metrics"]["resumed_from_step"] == newest >= 10
    assert record["weights"] == stage_json(micro_run / "pretrain")["weights"]
    steps = [line["step"] for line in curve(run / "pretrain") if "loss" in line]
    assert steps == sorted(set(steps))
    assert [line.get("loss") for line in curve(run / "pretrain")] == [
        line.get("loss") for line in curve(micro_run / "pretrain")
    ]


def test_an_attempt_under_other_settings_is_kept_beside_a_result(micro_run, tmp_path):
    run = stopped_in_pretraining(micro_run, tmp_path / "run", 1, "--set", "pretrain.trainer.learning_rate=1e-4")
    shutil.copytree(micro_run / "pretrain", run / "pretrain")
    kept = "an unfinished attempt under other settings is kept in pretrain.partial"
    assert planned(run)["pretrain"] == ("done", [kept])


def test_an_attempt_that_ended_before_it_had_a_name_is_cleared_away(micro_run, tmp_path):
    run = begun(micro_run, tmp_path / "run", until="midtrain")
    work = run / "pretrain.partial"
    work.mkdir()
    (work / "begun.json.tmp").write_text('{"finger')
    hfpipe("run", "micro", "--out", run, "--to", "pretrain")
    assert not work.exists()


def test_a_stream_goes_on_at_the_same_row(micro_run, tmp_path):
    stream = ["--set", "pretrain.data.streaming=true", "--set", "pretrain.trainer.max_steps=60"]
    stream += [
        "--set",
        "pretrain.data.train=[{path: tinyworld/pretrain, weight: 0.7}, {path: tinyworld/letters, weight: 0.3}]",
    ]
    whole = begun(micro_run, tmp_path / "whole")
    hfpipe("run", "micro", "--out", whole, "--to", "pretrain", *EVERY, *stream)
    run = stopped_in_pretraining(micro_run, tmp_path / "run", 2, *stream)
    hfpipe("run", "micro", "--out", run, "--to", "pretrain", *EVERY, *stream)
    assert stage_json(run / "pretrain")["metrics"]["resumed_from_step"] >= 20
    same_result(run, whole, ("pretrain",))


def test_a_moved_run_goes_on_whatever_the_clock_says(micro_run, tmp_path):
    run = stopped_in_pretraining(micro_run, tmp_path / "run", 2)
    moved = tmp_path / "elsewhere" / "moved"
    moved.parent.mkdir()
    run.rename(moved)
    newest = checkpoints(moved, "pretrain")[0]
    for path in (newest, *newest.iterdir()):
        os.utime(path, (0, 0))  # written in 1970, before the one before it
    done = hfpipe("run", "micro", "--out", moved, "--to", "pretrain", *EVERY)
    assert f"resumed from {newest.name}" in done.stdout
    assert stage_json(moved / "pretrain")["weights"] == stage_json(micro_run / "pretrain")["weights"]


# --- damaged ---


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("harm", "name", "said"),
    [
        (flip, "model.safetensors", "the content of model.safetensors has changed"),
        (cut, "optimizer.pt", "optimizer.pt has "),
        (Path.unlink, "trainer_state.json", "trainer_state.json is missing"),
        (Path.unlink, "checksums.json", "its list of checksums is missing, cut off or changed"),
        (flip, "checksums.json", "its list of checksums is missing, cut off or changed"),
    ],
)
def test_each_harm_to_a_checkpoint_is_seen(tmp_path, harm, name, said):
    from hfpipe.training.checkpoints import seal, set_damaged_aside

    for step in (9, 10, 11):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for file in ("model.safetensors", "optimizer.pt", "trainer_state.json"):
            (folder / file).write_bytes(os.urandom(1000))
        seal(folder)
    assert set_damaged_aside(tmp_path) == []
    harm(tmp_path / "checkpoint-10" / name)
    (told,) = set_damaged_aside(tmp_path)
    assert told.startswith(f"checkpoint-10 is damaged ({said}")
    assert [p.name for p in find_checkpoints(tmp_path)] == ["checkpoint-11", "checkpoint-9"]
    assert (tmp_path / "damaged-checkpoint-10").is_dir()


@pytest.mark.parametrize("name", ["optimizer.pt", "checksums.json", "adapter", "."])
def test_a_checkpoint_that_may_not_be_read_is_set_aside(name):
    from hfpipe.training.checkpoints import seal, set_damaged_aside

    with tempfile.TemporaryDirectory() as place:  # pytest's own folders are its user's alone
        for step in (9, 10):
            checkpoint = Path(place, f"checkpoint-{step}")
            (checkpoint / "adapter").mkdir(parents=True)
            for file in ("optimizer.pt", "adapter/adapter_model.safetensors"):
                (checkpoint / file).write_bytes(os.urandom(1000))
            seal(checkpoint)
        (checkpoint / name).chmod(0)
        user = os.geteuid()
        if user == 0:  # who may read everything
            for path in (Path(place), *Path(place).rglob("*")):
                os.chown(path, 65534, -1)
            os.seteuid(65534)
        try:
            (told,) = set_damaged_aside(Path(place))
        finally:
            os.seteuid(user)
        assert told.startswith("checkpoint-10 is damaged (")
        assert told.endswith("set aside as damaged-checkpoint-10")
        assert [p.name for p in find_checkpoints(Path(place))] == ["checkpoint-9"]
        Path(place, "damaged-checkpoint-10", name).chmod(0o700)


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(micro_run, tmp_path):
    run = stopped_in_pretraining(micro_run, tmp_path / "run", 2)
    newest, before = checkpoints(run, "pretrain")[:2]
    flip(newest / "model.safetensors")
    shutil.copytree(newest, newest.parent / "writing" / "checkpoint-999")
    done = hfpipe("run", "micro", "--out", run, "--to", "pretrain", *EVERY)
    assert "checkpoint-999 was cut off while it was written" in done.stdout
    assert f"{newest.name} is damaged (the content of model.safetensors has changed)" in done.stdout
    assert f"set aside as damaged-{newest.name}" in done.stdout
    assert f"resumed from {before.name}" in done.stdout
    assert stage_json(run / "pretrain")["weights"] == stage_json(micro_run / "pretrain")["weights"]


def test_what_a_kill_leaves_beside_is_no_part_of_the_model(micro_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(micro_run, run)
    shutil.rmtree(run / "dpo")
    (run / "dpo.partial").mkdir()
    (run / "dpo.partial" / "trained.json.tmp").write_text("{")
    (run / "run.json").rename(run / "run.json.tmp")
    (run / "stdout.txt").unlink()
    hfpipe("run", "micro", "--out", run)
    assert stage_json(run / "dpo")["weights"] == stage_json(micro_run / "dpo")["weights"]
    assert damage_at(run / "dpo") is None


def test_what_a_kill_leaves_of_the_weights_is_no_part_of_the_model(micro_run, tmp_path):
    """safetensors writes beside the file and renames; killed in between, what it had written stays."""
    run = stopped_in_pretraining(micro_run, tmp_path / "run")
    (run / "pretrain.partial" / ".tmp7l8Pdl").write_bytes(b"half of the weights")
    assert "resumed from checkpoint-" in hfpipe("run", "micro", "--out", run, "--to", "pretrain", *EVERY).stdout
    assert stage_json(run / "pretrain")["weights"] == stage_json(micro_run / "pretrain")["weights"]
    assert not list(run.rglob(".tmp*"))


def test_the_best_checkpoint_is_found_where_the_run_has_moved(micro_run, tmp_path):
    best = ["--set", "pretrain.trainer.load_best_model_at_end=true", "--set", "pretrain.trainer.eval_strategy=steps"]
    best += ["--set", "pretrain.trainer.eval_steps=10", "--set", "pretrain.trainer.save_total_limit=1"]
    best += ["--set", "pretrain.trainer.metric_for_best_model=loss", "--set", "pretrain.trainer.greater_is_better=true"]
    whole = begun(micro_run, tmp_path / "whole")
    hfpipe("run", "micro", "--out", whole, "--to", "pretrain", *EVERY, *best)
    assert stage_json(whole / "pretrain")["weights"] != stage_json(micro_run / "pretrain")["weights"]  # the worst, here
    run = stopped_in_pretraining(micro_run, tmp_path / "run", 2, *best)
    moved = run.rename(tmp_path / "moved")
    hfpipe("run", "micro", "--out", moved, "--to", "pretrain", *EVERY, *best)
    assert stage_json(moved / "pretrain")["metrics"]["resumed_from_step"] > 0
    same_result(moved, whole, ("pretrain",))


def planned(run: Path) -> dict[str, tuple[str, list[str]]]:
    rows = json.loads(hfpipe("plan", "micro", "--out", run, "--json").stdout)["stages"]
    return {row["stage"]: (row["status"], row["why"]) for row in rows}


@pytest.mark.parametrize(
    ("harm", "name"),
    [
        (flip, "model.safetensors"),
        (cut, "config.json"),
        (Path.unlink, "tokenizer.json"),
        (cut, "stage.json"),
        (flip, "stage.json"),
        (Path.unlink, "stage.json"),
    ],
)
def test_each_harm_to_a_result_is_reported(micro_run, tmp_path, harm, name):
    run = tmp_path / "run"
    shutil.copytree(micro_run, run)
    harm(run / "sft" / name)
    told = planned(run)
    assert told["sft"][0] == "damaged"
    assert name in told["sft"][1][0]
    assert told["midtrain"][0] == "done"


def test_a_damaged_result_is_set_aside_and_made_again(micro_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(micro_run, run)
    flip(run / "sft" / "model.safetensors")
    done = hfpipe("run", "micro", "--out", run)
    assert "damaged (the content of model.safetensors has changed): set aside as sft.damaged" in done.stdout
    assert stage_json(run / "sft")["weights"] == stage_json(micro_run / "sft")["weights"]
    assert (run / "sft.damaged").is_dir()
    assert {status for status, _ in planned(run).values()} == {"done"}


def test_a_stage_alone_does_not_start_from_damaged_weights(micro_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(micro_run, run)
    shutil.rmtree(run / "dpo")
    flip(run / "sft" / "model.safetensors")
    command = [sys.executable, "-m", "hfpipe.stages.dpo", "stage_configs/micro/dpo.yaml", "--out", str(run)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "sft is damaged: the content of model.safetensors has changed" in done.stderr
    assert not (run / "dpo.partial").exists()


def test_lost_scores_are_made_again_and_nothing_else(micro_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(micro_run, run)
    cut(run / "sft" / "eval.json")
    inode = (run / "sft" / "model.safetensors").stat().st_ino
    done = hfpipe("run", "micro", "--out", run)
    assert "its eval.json is missing or damaged: scoring the weights on disk" in done.stdout
    assert (run / "sft" / "model.safetensors").stat().st_ino == inode
    assert json.loads((run / "sft" / "eval.json").read_text()) == json.loads(
        (micro_run / "sft" / "eval.json").read_text()
    )


def test_an_evaluation_that_fails_leaves_the_stage_trained(micro_run, tmp_path, recipe):
    knows: list[str] = []  # what the judge behind the endpoint answers, refusing as long as it is empty

    class Judge(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200 if knows else 401)
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [{"message": {"content": word}} for word in knows]}).encode())

        def log_message(self, *arguments):
            pass

    folder, run = recipe(), begun(micro_run, tmp_path / "run", until="sft")
    row = {"prompt": "Hi", "completion": "Hello!"}
    (tmp_path / "talks.jsonl").write_text(json.dumps(row) + "\n")
    with ThreadingHTTPServer(("127.0.0.1", 0), Judge) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        judged = f"capability: help, check: prefers, judge: 'http://127.0.0.1:{server.server_port}/v1'"
        pipeline = (folder / "pipeline.yaml").read_text()
        probes = f"evaluate: {{probes: [{{path: {tmp_path}/talks.jsonl, split: all, {judged}}}]}}"
        (folder / "pipeline.yaml").write_text(pipeline.replace("evaluate: probes.yaml", probes))
        failed = hfpipe("run", folder, "--out", run, "--only", "sft", check=2)
        assert "no completion: HTTP Error 401" in failed.stderr
        assert not (run / "sft").exists()
        inode = (run / "sft.partial" / "model.safetensors").stat().st_ino
        knows.append("A")
        done = hfpipe("run", folder, "--out", run, "--only", "sft")
        server.shutdown()
    assert "weights are on disk from an earlier run; scoring them" in done.stdout
    assert not any(event["event"] == "step" for event in events(run, "sft"))
    assert (run / "sft" / "model.safetensors").stat().st_ino == inode
    assert stage_json(run / "sft")["weights"] == stage_json(micro_run / "sft")["weights"]
    assert "help" in (run / "sft" / "eval.json").read_text()


def test_a_report_that_fails_leaves_the_stages_finished(micro_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(micro_run, run)
    (run / "report.html").unlink()
    (run / "report.html").mkdir()
    done = hfpipe("run", "micro", "--out", run, check=1)
    assert f"every stage is finished in {run}, but not its report: IsADirectoryError" in done.stderr
    assert "Traceback" not in done.stderr
    (run / "report.html").rmdir()
    assert hfpipe("run", "micro", "--out", run).stdout.count("done already") == 5
    assert (run / "report.html").is_file()


def test_what_fails_by_our_fault_is_traced_in_the_log_and_a_token_stands_nowhere(micro_run, tmp_path):
    """A file in the place of a folder, in a path that holds what looks like a token."""
    secret = "hf_AbCdEfGhIjKlMnOpQrSt"
    run = begun(micro_run, tmp_path / secret / "run", "dpo")
    (run / "dpo.partial").write_text("in the way")
    command = [sys.executable, "-m", "hfpipe.stages.dpo", "stage_configs/micro/dpo.yaml", "--out", str(run)]
    alone = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    whole = hfpipe("run", "micro", "--out", run, check=1)
    assert "dpo failed: NotADirectoryError" in whole.stderr
    assert "Traceback" not in whole.stderr
    log = (run / "logs" / "dpo.log").read_text()
    assert alone.returncode == 1
    for trace in (alone.stderr, log):
        assert "Traceback (most recent call last)" in trace
        assert "hf_.../run/dpo.partial" in trace
    events = (run / "logs" / "dpo.jsonl").read_text()
    assert secret not in alone.stderr + whole.stderr + log + events
    assert (run / "dpo.partial").read_text() == "in the way"


def test_damaged_prepared_data_is_prepared_again(micro_run, tmp_path, monkeypatch):
    monkeypatch.setenv("HFPIPE_CACHE", str(tmp_path / "cache"))
    run = begun(micro_run, tmp_path / "run")
    hfpipe("run", "micro", "--out", run, "--to", "pretrain")
    flipped = list((tmp_path / "cache").rglob("train/*.arrow"))
    assert flipped
    for path in flipped:
        flip(path)
    damaged = [path.read_bytes() for path in flipped]
    shutil.rmtree(run / "pretrain")
    hfpipe("run", "micro", "--out", run, "--to", "pretrain")
    assert [path.read_bytes() for path in flipped] != damaged
    assert stage_json(run / "pretrain")["weights"] == stage_json(micro_run / "pretrain")["weights"]


# --- the machine ---


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")  # only root can, and no quota that a user may set stands for it
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize("stage", ["pretrain", "sft"], ids=["muon", "adamw"])
def test_a_stage_that_will_not_fit_on_the_disk_does_not_start(micro_run, small_disk, tmp_path, stage):
    every = ["--set", f"{stage}.trainer.save_steps=5", "--to", stage]
    process = start(begun(micro_run, tmp_path / "run", stage), *every)
    assert wait_for(process, lambda: checkpoints(tmp_path / "run", stage))
    kill(process)
    newest = checkpoints(tmp_path / "run", stage)[0]
    state, weights = ((newest / name).stat().st_size for name in ("optimizer.pt", "model.safetensors"))
    run = begun(micro_run, small_disk / "run", stage)
    (small_disk / "filler").write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 1_200_000))
    done = hfpipe("run", "micro", "--out", run, *every, check=2)
    needed = float(re.search(r"this stage needs ([\d.]+) MB or more", done.stderr)[1]) * 1e6
    assert needed == pytest.approx(weights + 3 * (weights + state), rel=0.05)  # two are kept while a third is written
    assert "lower trainer.save_total_limit" in done.stderr
    assert checkpoints(run, stage) == []


def test_a_disk_that_fills_keeps_the_last_good_checkpoint(micro_run, small_disk):
    run = begun(micro_run, small_disk / "run")
    process = start(run, "--to", "pretrain", *EVERY)
    assert wait_for(process, lambda: checkpoints(run, "pretrain"))
    with contextlib.suppress(OSError), open(small_disk / "filler", "wb", buffering=0) as filler:
        while True:
            filler.write(b"x" * 4096)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 1, output
    assert "pretrain failed: the disk is full" in output
    assert "Traceback" not in output
    newest = checkpoints(run, "pretrain")[0]
    assert artifact.damage(newest, artifact.read_record(newest / artifact.CHECKSUMS_FILE)) is None
    (small_disk / "filler").unlink()
    done = hfpipe("run", "micro", "--out", run, "--to", "pretrain", *EVERY)
    assert f"resumed from {newest.name}" in done.stdout
    assert stage_json(run / "pretrain")["weights"] == stage_json(micro_run / "pretrain")["weights"]


def test_a_parent_that_nobody_may_write_to(micro_run, small_disk, recipe, tmp_path):
    shutil.copytree(micro_run / "sft", small_disk / "sft")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    folder = recipe(
        {"dpo": (ROOT / "stage_configs/micro/dpo.yaml").read_text().replace("from: sft", f"from: {small_disk}/sft")}
    )
    (folder / "pipeline.yaml").write_text("name: after\nstages: [dpo]\n")
    hfpipe("run", folder, "--out", tmp_path / "run")
    assert stage_json(tmp_path / "run" / "dpo")["weights"] == stage_json(micro_run / "dpo")["weights"]


def test_a_child_that_the_system_kills_is_told_as_that(micro_run, tmp_path):
    run = begun(micro_run, tmp_path / "run")
    process = start(run, "--to", "pretrain", *EVERY)
    assert wait_for(process, lambda: checkpoints(run, "pretrain"))
    os.kill(next(e["pid"] for e in events(run, "pretrain") if e["event"] == "alive"), signal.SIGKILL)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert "its process was killed (SIGKILL), as the system does when memory runs out" in output
    assert "Lower trainer.per_device_train_batch_size" in output
    done = hfpipe("run", "micro", "--out", run, "--to", "pretrain", *EVERY)
    assert "resumed from checkpoint-" in done.stdout
    assert stage_json(run / "pretrain")["weights"] == stage_json(micro_run / "pretrain")["weights"]


def test_a_rank_that_hangs_is_noticed_and_ended(micro_run, tmp_path):
    run = begun(micro_run, tmp_path / "run", "sft")
    settings = ["--set", "sft.trainer.save_steps=5", "--set", "sft.trainer.num_train_epochs=20"]
    process = start(run, "--to", "sft", *settings, "--set", "launch.hang_minutes=0.25", "--set", "launch.processes=2")
    assert wait_for(process, lambda: checkpoints(run, "sft"))
    os.kill(max(ranks(run)), signal.SIGSTOP)
    output = process.communicate(timeout=180)[0]
    assert process.returncode == 1
    assert "sft hung: it stood still for" in output
    assert ranks(run) == []


def test_a_child_that_hangs_is_noticed_and_ended(micro_run, tmp_path):
    run = begun(micro_run, tmp_path / "run")
    process = start(run, "--to", "pretrain", *EVERY, "--set", "launch.hang_minutes=0.25")
    assert wait_for(process, lambda: checkpoints(run, "pretrain"))
    os.kill(next(e["pid"] for e in events(run, "pretrain") if e["event"] == "alive"), signal.SIGSTOP)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 1
    assert re.search(r"pretrain +no sign of life for \d\d s; where it stands is in .*pretrain.log", output)
    assert re.search(r"pretrain hung: it stood still for \d\d s and was ended", output)


def test_what_stands_still_is_told_from_what_gets_on(tmp_path):
    code = (
        "import random, time\ndef work(n): return n and work(n - 1) + len(str(n))\nfrom hfpipe.faults import beat\nbeats = []\nbeat(lambda: beats.append(1), 0.05)\n"
        "end = time.monotonic() + 1\n"
        "while time.monotonic() < end: work(random.randrange(300))\n"
        "working = len(beats); time.sleep(1); print(working, len(beats) - working)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    working, asleep = map(int, done.stdout.split())
    assert working >= 5
    assert asleep <= 2


# --- two processes ---


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in curve(folder) if "loss" in line}


def ranks(run: Path) -> list[int]:
    found = subprocess.run(["pgrep", "-f", f"hfpipe.stages.sft.*{run}"], capture_output=True, text=True).stdout
    commands = {pid: Path(f"/proc/{pid}/cmdline") for pid in map(int, found.split())}
    return [pid for pid, file in commands.items() if file.exists() and "accelerate" not in file.read_text()]


def test_a_killed_rank_and_another_number_of_processes(micro_run, tmp_path):
    """One process with 4 rows accumulated four times equals two with two; either goes on where the other was killed."""
    setting = [
        "--set",
        "sft.trainer.bf16=false",
        "--set",
        "sft.trainer.save_steps=5",
        "--set",
        "sft.trainer.logging_steps=1",
    ]
    setting += ["--set", "sft.trainer.per_device_train_batch_size=2", "--to", "sft"]
    # 37 steps of 8 rows: of a last batch that two processes can't share evenly accelerate repeats rows.
    setting += ["--set", "sft.trainer.packing=false", "--set", "sft.data.train=[{path: tinyworld/sft, limit: 296}]"]
    one = [*setting, "--set", "sft.trainer.gradient_accumulation_steps=4"]
    two = [*setting, "--set", "sft.trainer.gradient_accumulation_steps=2", "--set", "launch.processes=2"]
    whole = begun(micro_run, tmp_path / "whole", "sft")
    hfpipe("run", "micro", "--out", whole, *one)
    run = begun(micro_run, tmp_path / "run", "sft")
    process = start(run, *two)
    assert wait_for(process, lambda: checkpoints(run, "sft"))
    os.kill(ranks(run)[-1], signal.SIGKILL)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 1, output
    assert "its process was killed (SIGKILL)" in output
    assert ranks(run) == []
    shutil.copytree(run, tmp_path / "other")
    for folder, arguments in ((run, one), (tmp_path / "other", two)):
        done = hfpipe("run", "micro", "--out", folder, *arguments)
        assert "resumed from checkpoint-" in done.stdout
        found, expected = losses(folder / "sft"), losses(whole / "sft")
        assert found.keys() == expected.keys()
        assert all(found[step] == pytest.approx(expected[step], abs=2e-3) for step in expected)


# --- the order on the disk ---


@pytest.fixture
def done(monkeypatch) -> list[tuple[str, str]]:
    """What is synced and renamed, in its order, which stands for a power cut: that can't be had in a test."""
    calls: list[tuple[str, str]] = []
    fsync, rename = os.fsync, Path.rename

    def sync(fd: int) -> None:
        calls.append(("sync", os.readlink(f"/proc/self/fd/{fd}")))
        fsync(fd)

    def move(path: Path, to: Path) -> Path:
        calls.append(("rename", str(path)))
        return rename(path, to)

    monkeypatch.setattr(os, "fsync", sync)  # watched, not replaced: the real one is called
    monkeypatch.setattr(Path, "rename", move)  # likewise
    return calls


def test_a_checkpoint_has_its_name_when_all_of_it_is_on_the_disk(tmp_path, done):
    from hfpipe.training.checkpoints import _put_in_place

    made = tmp_path / "writing" / "checkpoint-5"
    (made / "adapter").mkdir(parents=True)
    files = ("model.safetensors", "optimizer.pt", "adapter/adapter_model.safetensors")
    for name in files:
        (made / name).write_bytes(b"weights")
    _put_in_place(made, tmp_path)
    renamed = done.index(("rename", str(made)))
    for name in (*files, "checksums.json.tmp", "adapter", ""):
        assert ("sync", str(made / name)) in done[:renamed], name
    assert ("sync", str(tmp_path)) in done[renamed:]
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-5"]


def test_stage_json_is_written_when_all_that_it_names_is_on_the_disk(tmp_path, done):
    from hfpipe.config import load_recipe
    from hfpipe.stages import stage_types
    from hfpipe.training.job import Job

    recipe = load_recipe("micro", stage_types())
    job = Job(recipe, recipe.stages["sft"], tmp_path, "f", {}, None)
    job.start(print)
    (job.work / "model.safetensors").write_bytes(b"weights")
    (job.work / "adapter").mkdir()
    (job.work / "adapter" / "adapter_model.safetensors").write_bytes(b"more")
    job.mark_trained({})
    synced = [path for what, path in done if what == "sync"]
    trained = synced.index(str(job.work / "trained.json.tmp"))
    for name in ("model.safetensors", "adapter/adapter_model.safetensors", "adapter", ""):
        assert str(job.work / name) in synced[:trained], name
    assert set(job.trained_files()) == {"model.safetensors", "adapter/adapter_model.safetensors"}
    done.clear()
    (job.work / "eval.json").write_text("{}")
    job.finish({"fingerprint": "f", "files": job.trained_files()})
    order = [path for _, path in done]
    assert order.index(str(job.work / "eval.json")) < order.index(str(job.work / "stage.json.tmp"))
    assert order.index(str(job.work / "stage.json.tmp")) < done.index(("rename", str(job.work)))
    assert done[-1] == ("sync", str(tmp_path))
    assert damage_at(tmp_path / "sft") is None
