"""Annealing: steps and rates taken from the parent, its optimizer's state carried on, what is refused and when."""

from __future__ import annotations

import json
import math
import os
import shutil

import pytest

from hfpipe.annealing import OPTIMIZER_FILE
from hfpipe.artifact import hashed_config
from hfpipe.config import load_recipe
from hfpipe.errors import ConfigErrors
from hfpipe.plan import describe_stage
from hfpipe.publishing.package import pack
from hfpipe.sections import Hub
from hfpipe.stages import stage_types

from .conftest import ROOT, hfpipe, stage_json

BRANCHES = ("anneal", "only_decay", "only_quality", "neither")


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def rates(folder) -> list[float]:
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["learning_rate"] for line in logged if "learning_rate" in line]


# --- the shipped recipe, at a size for seconds ---


def sources(web: float, rows: int) -> str:
    return (
        f"[{{path: '{{web}}', weight: {web}, limit: {rows}}}, "
        f"{{path: '{{quality}}', weight: {1 - web:.1f}, limit: {rows}}}]"
    )


SMALL = [
    "pretrain.trainer.warmup_steps=40",
    "tokenizer.tokenizer.vocab_size=384",
    "pretrain.model.config.hidden_size=32",
    "pretrain.model.config.num_hidden_layers=1",
    "pretrain.model.config.intermediate_size=64",
    f"pretrain.data.train={sources(0.8, 500)}",
    "evaluate.max_rows=60",
    "evaluate.samples=0",
    "anneal.trainer.lr_scheduler_type=warmup_stable_decay",
    "anneal.trainer.lr_scheduler_kwargs={decay_type: 1-sqrt}",
]
for name in ("pretrain", *BRANCHES):
    SMALL += [f"{name}.data.max_length=64", f"{name}.data.batch_tokens=128", f"{name}.trainer.logging_steps=1"]
for name, web in zip(BRANCHES, (0.2, 0.8, 0.2, 0.8), strict=True):
    SMALL.append(f"{name}.data.train={sources(web, 150)}")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("anneal") / "run"
    settings = [a for text in SMALL for a in ("--set", text)]
    done = hfpipe("run", "anneal", "--out", folder, *settings)
    return folder, done.stdout


def test_steps_are_a_share_of_the_parents_tokens(run):
    folder, told = run
    parent = stage_json(folder / "pretrain")["metrics"]
    assert parent["steps"] > 500
    for name in BRANCHES:
        metrics = stage_json(folder / name)["metrics"]
        step = metrics["tokens"] / metrics["steps"]
        assert abs(metrics["tokens"] - 0.1 * parent["tokens"]) <= step / 2 + 1, name
        assert f"{name:<10} anneal: {metrics['steps']} steps, 0.1 of the " in told


def test_rates_go_from_the_parents_last_to_zero(run):
    folder, _ = run
    stable = rates(folder / "pretrain")
    assert stable[-1] == stable[45] == 0.02  # Muon's, which is the first group; after 40 steps of warmup
    for name in BRANCHES:
        found = rates(folder / name)
        steps = len(found)
        assert found[0] == stable[-1]
        expected = {
            "anneal": [0.02 * (1 - (n / steps) ** 0.5) for n in range(steps)],
            "only_decay": [0.02 * (1 - n / steps) for n in range(steps)],
        }
        assert found == pytest.approx(expected.get(name, [0.02] * steps))
        last = stage_json(folder / name)["metrics"]["last_rate"]
        assert last["learning_rate"] == pytest.approx(3e-3 * found[-1] / 0.02)
        assert last["lr"] == pytest.approx(found[-1])


def test_both_halves_of_annealing_help_on_held_out_quality_text(run):
    folder, _ = run
    loss = {name: stage_json(folder / name)["metrics"]["held_out_text"]["loss"] for name in ("pretrain", *BRANCHES)}
    assert loss["anneal"] < min(loss["only_quality"], loss["only_decay"])
    assert max(loss["only_quality"], loss["only_decay"]) < loss["neither"] < loss["pretrain"]


def test_the_mixture_may_change_while_the_rate_falls(run, tmp_path):
    folder, _ = run
    shutil.copytree(folder, tmp_path / "run")
    phases = [
        "anneal.data.train=[{path: '{web}', limit: 150}, {path: '{quality}', limit: 150}]",
        "anneal.data.phases=[{share: 0.5, weights: [0.9, 0.1]}, {share: 0.5, weights: [0.1, 0.9]}]",
    ]
    settings = [a for text in (*SMALL, *phases) for a in ("--set", text)]
    done = hfpipe("run", "anneal", "--out", tmp_path / "run", "--only", "anneal", *settings)
    record = stage_json(tmp_path / "run" / "anneal")
    steps = stage_json(folder / "anneal")["metrics"]["steps"]
    assert record["metrics"]["steps"] == steps
    assert rates(tmp_path / "run" / "anneal") == pytest.approx([0.02 * (1 - (n / steps) ** 0.5) for n in range(steps)])
    web, quality = ([share * one["tokens"] for share in one["phases"]] for one in record["sources"][:2])
    assert [w / (w + q) for w, q in zip(web, quality, strict=True)] == pytest.approx([0.9, 0.1], abs=0.03)
    assert "order: phase 1: 50% of the steps, 0.9 / 0.1; phase 2: 50% of the steps, 0.1 / 0.9" in done.stdout


def test_state_is_kept_beside_the_weights_and_never_published(run):
    folder, told = run
    record = stage_json(folder / "pretrain")
    assert OPTIMIZER_FILE in record["files"]
    assert list(record["weights"]) == ["model.safetensors"]
    packed = pack(folder, Hub(repo_id="me/anneal"), "pretrain").files
    assert "model.safetensors" in packed
    assert OPTIMIZER_FILE not in packed
    assert not (folder / "anneal" / OPTIMIZER_FILE).exists()
    trained = len(weights(folder / "pretrain"))
    assert f"anneal     optimizer: the parent's state of {trained} of {trained} parameters" in told


def test_the_plan_says_what_the_run_then_does(run):
    folder, _ = run
    recipe = load_recipe("anneal", stage_types(), SMALL)
    for name in BRANCHES:
        done = stage_json(folder / name)["metrics"]["steps"]
        before = describe_stage(recipe, recipe.stages[name])
        assert before["steps"] == pytest.approx(done, rel=0.25, abs=1)
        assert "anneal: 0.1 of the tokens that pretrain trains on" in before["notes"]
        assert not [w for w in before["warnings"] if w["name"].startswith("learning_rate")]
        after = describe_stage(recipe, recipe.stages[name], folder)  # the parent's tokens are known then
        assert after["steps"] == pytest.approx(done, rel=0.1, abs=1)


# --- the state of the optimizer ---

MODEL = "{model_type: llama, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32}"
DATA = "data: {max_length: 64, train: [{path: TEXT, split: all}], eval: [{path: TEXT, split: all}]}\n"
PARENT = (
    f"stage: pretrain\nmodel: {{from: tokenizer, config: {MODEL}}}\n{DATA}"
    "optimizer: {OPTIMIZER}\ntrainer: {learning_rate: 1.0e-2, per_device_train_batch_size: 1, weight_decay: 0.1, "
    "lr_scheduler_type: SCHEDULE, max_steps: STEPS}\n"
)
CHILD = (
    f"stage: pretrain\nmodel: {{from: PARENT}}\n{DATA}optimizer: {{TYPE}}\nanneal: {{share: 0.2, carry_optimizer: CARRY}}\n"
    "trainer: {per_device_train_batch_size: 1, weight_decay: 0.1, lr_scheduler_type: constant}\n"
)


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    """(recipe, run): for Muon and for AdamW five steps, six steps, and the sixth as a stage of its own, warm and cold."""
    root = tmp_path_factory.mktemp("nano")
    recipe, text = root / "recipe", root / "text.txt"
    recipe.mkdir()
    text.write_text("One row of text, which is the whole batch of every step.\n")
    files = {"tokenizer": f"stage: tokenizer\ntokenizer: {{vocab_size: 300}}\n{DATA.replace('max_length: 64, ', '')}"}
    for kind, optimizer in (("muon", "type: muon, lr: 0.02, "), ("adamw", "")):
        for name, steps in (("five", 5), ("six", 6)):
            given = PARENT.replace("OPTIMIZER", f"{optimizer}keep_state: true").replace("STEPS", str(steps))
            files[f"{name}_{kind}"] = given.replace("SCHEDULE", "constant_with_warmup")
        for name, carry in (("warm", "true"), ("cold", "false")):
            given = CHILD.replace("PARENT", f"five_{kind}").replace("TYPE", "type: muon" if kind == "muon" else "")
            files[f"{name}_{kind}"] = given.replace("CARRY", carry)
    # As wrong as a parent can be: at the end of its schedule.
    files["decayed"] = PARENT.replace("OPTIMIZER", "").replace("STEPS", "30").replace("SCHEDULE", "linear")
    seldom = PARENT.replace("OPTIMIZER", "").replace("STEPS", "7").replace("SCHEDULE", "cosine_with_min_lr")
    files["seldom"] = seldom.replace(
        "max_steps", "lr_scheduler_kwargs: {min_lr_rate: 0.5}, logging_steps: 1000, max_steps"
    )
    for name, content in files.items():
        (recipe / f"{name}.yaml").write_text(content.replace("TEXT", str(text)))
    head = f"name: nano\nstages: [{', '.join(files)}]\nevaluate: {{samples: 0}}\n"
    (recipe / "pipeline.yaml").write_text(head)
    hfpipe("run", recipe, "--out", root / "run", "--set", "tokenizer.data.train=[{path: tinyworld/pretrain, limit: 50}]",
           "--set", "tokenizer.data.eval=[]")  # fmt: skip
    return recipe, root / "run"


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_the_first_step_is_the_parents_next_one(nano, kind):
    _, run = nano
    assert stage_json(run / f"warm_{kind}")["metrics"]["steps"] == 1
    five, six, warm, cold = (weights(run / f"{name}_{kind}") for name in ("five", "six", "warm", "cold"))
    for name, value in six.items():
        assert not value.equal(five[name]), name
        assert value.equal(warm[name]), name
        assert not value.equal(cold[name]), name


def test_the_last_rate_is_that_of_the_last_step_however_seldom_it_is_logged(nano):
    metrics = stage_json(nano[1] / "seldom")["metrics"]
    share = 0.5 + 0.5 * 0.5 * (1 + math.cos(math.pi * 6 / 7))
    assert metrics["last_rate"] == pytest.approx({"learning_rate": 1e-2 * share, "of_peak": share})
    assert len(rates(nano[1] / "seldom")) == 2  # of the first step and of the last


def test_what_a_parent_outside_the_recipe_lacks_is_told_before_training(nano, tmp_path):
    recipe, run = nano
    folder = tmp_path / "recipe"
    folder.mkdir()
    (folder / "pipeline.yaml").write_text("name: alone\nstages: [anneal]\nevaluate: {samples: 0}\n")
    stage = (recipe / "warm_adamw.yaml").read_text().replace("carry_optimizer: true", "carry_optimizer: false")
    (folder / "anneal.yaml").write_text(stage.replace("from: five_adamw", f"from: {run / 'decayed'}"))
    done = hfpipe("run", folder, "--out", tmp_path / "out", check=2)
    assert "the learning rate of" in done.stderr
    assert "has decayed already (to 0.033 of its peak)" in done.stderr
    (tmp_path / "plain").mkdir()
    for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        os.link(run / "five_adamw" / file, tmp_path / "plain" / file)
    done = hfpipe("run", folder, "--out", tmp_path / "out", "--set", f"anneal.model.from={tmp_path / 'plain'}", check=2)
    assert "does not say how it was trained" in done.stderr
    assert not (tmp_path / "out" / "anneal").exists()


# --- what the recipe shows ---

REFUSED = [
    ("anneal.trainer.learning_rate=1e-3", "trainer.learning_rate beside anneal"),
    ("anneal.trainer.max_steps=5", "trainer.max_steps beside anneal"),
    ("anneal.trainer.num_train_epochs=1", "trainer.num_train_epochs beside anneal"),
    ("anneal.trainer.warmup_steps=5", "trainer.warmup_steps beside anneal"),
    ("anneal.optimizer.lr=0.1", "optimizer.lr beside anneal"),
    ("anneal.optimizer.type=null", "optimizer.type is null, but `pretrain` was trained with muon"),
    ("anneal.trainer.lr_scheduler_type=inverse_sqrt", "expected linear, cosine, warmup_stable_decay"),
    ("anneal.trainer.lr_scheduler_kwargs={min_lr_ratio: 0.1}", "lr_scheduler_kwargs.min_lr_ratio beside anneal"),
    ("anneal.anneal.share=1.5", "anneal.share = 1.5: expected at most 1"),
    ("anneal.anneal.share=null", "anneal.carry_optimizer without anneal.share"),
    ("anneal.model.from=tokenizer", "model.config is missing"),
    ("pretrain.trainer.lr_scheduler_type=cosine", "the learning rate of `pretrain` has decayed already"),
    ("pretrain.trainer.lr_scheduler_kwargs={num_decay_steps: 10}", "of `pretrain` has decayed already"),
    ("pretrain.optimizer.keep_state=false", "anneal.carry_optimizer: `pretrain` keeps no optimizer state"),
    ("pretrain.anneal.share=0.1", "the model is made from scratch"),
    ("pretrain.trainer.fsdp=full_shard", "optimizer.keep_state takes a model that is whole on each device"),
]


@pytest.mark.parametrize(("setting", "told"), REFUSED)
def test_refused_at_plan_time(setting, told):
    with pytest.raises(ConfigErrors) as error:
        load_recipe("anneal", stage_types(), [setting])
    assert told in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        ["pretrain.trainer.lr_scheduler_type=constant_with_warmup", "pretrain.trainer.lr_scheduler_kwargs=null"],
        [
            "pretrain.trainer.lr_scheduler_type=cosine_with_min_lr",
            "pretrain.trainer.lr_scheduler_kwargs={min_lr_rate: 0.1}",
        ],
        ["anneal.trainer.lr_scheduler_type=cosine"],
        ["anneal.data.streaming=true"],
    ],
)
def test_allowed(settings):
    load_recipe("anneal", stage_types(), settings)


def test_keep_state_beside_another_optimizer_or_an_adapter_is_refused(recipe):
    sft = (ROOT / "stage_configs" / "micro" / "sft.yaml").read_text() + "optimizer: {keep_state: true}\n"
    with pytest.raises(ConfigErrors, match="what is kept is AdamW's and Muon's state"):
        load_recipe(recipe({"sft": sft}), stage_types(), ["sft.trainer.optim=adafactor"])
    with pytest.raises(ConfigErrors, match=r"optimizer\.keep_state beside adapter"):
        load_recipe(recipe(), stage_types(), ["sft.adapter={type: lora}"])


def test_keys_that_are_not_used_leave_a_finished_stage_finished():
    recipe = load_recipe("micro", stage_types())
    for stage in recipe.stages.values():
        config = hashed_config(stage, 0, 1)
        assert "anneal" not in config
        assert "keep_state" not in config.get("optimizer", {})
    annealing = load_recipe("anneal", stage_types())
    assert hashed_config(annealing.stages["pretrain"], 0, 1)["optimizer"]["keep_state"] is True
    assert hashed_config(annealing.stages["anneal"], 0, 1)["anneal"] == {"share": 0.1, "carry_optimizer": True}
