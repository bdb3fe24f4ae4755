"""Warnings of `plan` and of a run's head: each planted, each silenced by its name, none in a recipe that is shipped."""

from __future__ import annotations

import typing

import pytest

from hfpipe.config import load_recipe, shipped_recipes
from hfpipe.plan import describe_stage
from hfpipe.plan.advice import _CHECKS, usual_peak
from hfpipe.sections import Plan
from hfpipe.stages import stage_types

from .conftest import REAL, hfpipe

PLANTED = {
    "learning_rate": ("sft", ["sft.trainer.learning_rate=0.5"], "0.5 is so high that it may diverge"),
    "learning_rate_order": ("sft", ["midtrain.trainer.learning_rate=9e-4"], "is above `midtrain`'s 0.0009"),
    "few_examples": ("dpo", ["dpo.data.train=[{path: tinyworld/preferences, limit: 40}]"], "40 examples are few"),
    "many_epochs": ("pretrain", ["pretrain.trainer.num_train_epochs=9"], "every row is seen 9 times"),
    "no_replay": ("sft", ["sft.data.train=[{path: tinyworld/sft}]"], "nothing holds what earlier stages taught"),
    "large_batch": ("dpo", ["dpo.trainer.per_device_train_batch_size=128"], "3 steps in all: a batch of 128 is large"),
    "context": ("sft", ["sft.trainer.max_length=1024"], "1024 tokens, but the model was made for 512"),
    "long_decay": (
        "pretrain",
        [
            "pretrain.trainer.lr_scheduler_type=warmup_stable_decay",
            "pretrain.trainer.lr_scheduler_kwargs={num_decay_steps: 5000}",
        ],
        "num_decay_steps = 5000 after 5 of warm-up, and",
    ),
    "tokens_per_parameter": ("pretrain", ["plan.silence=[]"], "1.1 tokens a parameter, where about 20 are best"),
    "repeated_source": (
        "pretrain",
        [
            "pretrain.data.streaming=true",
            "pretrain.trainer.max_steps=2000",
            "pretrain.data.train=[{path: tinyworld/pretrain, weight: 0.5}, {path: tinyworld/letters, limit: 300, weight: 0.5}]",
        ],
        "tinyworld/letters is read",
    ),
}


def warnings(folder, stage: str, overrides=()) -> dict[str, str]:
    recipe = load_recipe(folder, stage_types(), overrides)
    return {warning["name"]: warning["text"] for warning in describe_stage(recipe, recipe.stages[stage])["warnings"]}


def test_each_has_a_name_that_the_recipe_may_give():
    admitted = typing.get_args(typing.get_args(typing.get_type_hints(Plan)["silence"])[0])
    assert set(PLANTED) == set(_CHECKS) == set(admitted)


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_told_and_silenced(name, recipe):
    stage, overrides, words = PLANTED[name]
    folder = recipe()
    found = warnings(folder, stage, overrides)
    assert words in found[name]
    silenced = [text for text in overrides if not text.startswith("plan.")]
    assert name not in warnings(folder, stage, [*silenced, f"plan.silence=[{name}]"])
    assert name == "tokens_per_parameter" or name not in warnings(folder, stage)  # without the fault


def test_shipped_recipes_plan_clean():
    for name in shipped_recipes():
        overrides = [f"data_dir={REAL}"] if name == "real-small" else []
        if overrides and not REAL.is_dir():
            continue
        recipe = load_recipe(name, stage_types(), overrides)
        for stage in recipe.stages.values():
            told = describe_stage(recipe, stage)
            assert not told.get("warnings"), (name, stage.name)
            unknown = [note for note in told["notes"] if note.startswith("unknown")]
            own = (s.path for s in stage.data.train if "/synth/" in s.path or s.path.endswith("/shards"))
            made = [f"the rows of {path} are not known yet" for path in own]
            assert [note.removeprefix("unknown: ") for note in unknown] == made, (name, stage.name)


def test_rates_scale_with_size_as_published():
    """Brown et al. 2020, table 2.1, within a factor of two."""
    for params, rate in ((125e6, 6e-4), (1.3e9, 2e-4), (13e9, 1e-4), (175e9, 0.6e-4)):
        assert rate / 2 < usual_peak(params) < 2 * rate


def test_an_adapter_may_have_ten_times_the_rate(recipe):
    lora = ["sft.regularize=null", "sft.adapter={type: lora, r: 4}", "sft.trainer.learning_rate=1.5e-2"]
    assert not {"learning_rate", "learning_rate_order"} & warnings(recipe(), "sft", lora).keys()
    assert "learning_rate" in warnings(recipe(), "sft", ["sft.trainer.learning_rate=1.5e-2"])


def test_plan_prints_them_and_so_does_a_run(recipe, tmp_path):
    folder, overrides = (
        recipe(),
        ["--set", "pretrain.trainer.max_steps=12", "--set", "pretrain.trainer.learning_rate=0.2"],
    )
    told = "0.2 is so high that it may diverge"
    assert told in hfpipe("plan", folder, *overrides).stdout
    run = hfpipe("run", folder, "--out", tmp_path / "run", "--to", "pretrain", *overrides, check=None).stdout
    assert told in run
    assert "[learning_rate]" in run
    silence = "plan.silence=[learning_rat]"
    assert "Did you mean `learning_rate`?" in hfpipe("plan", folder, "--set", silence, check=2).stderr


def test_values_that_fit_no_model_stop_nothing(recipe):
    plan = hfpipe("plan", recipe(), "--set", "pretrain.model.config={model_type: llama, intermediate_size: -100000}")
    assert "unknown: no quote can be made of these values" in plan.stdout
