"""Reward models: what they leave, what is told of them, and that every door reads the same score."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hfpipe.evaluation.judges import reward_judge
from hfpipe.evaluation.rewards import pair_scores, score_pairs
from hfpipe.training.templates import encode_preference

from .conftest import hfpipe, stage_json

REWARD = """stage: reward
model: {from: sft, attn_implementation: eager}
data: {train: [{path: tinyworld/preferences, limit: 256}], eval: [{path: tinyworld/preferences, limit: 64}]}
trainer: {learning_rate: 1.0e-3, per_device_train_batch_size: 16, max_length: 256, activation_checkpointing: false}
"""
TALK = [{"role": "user", "content": "What is the capital of France?"}]
ANSWERS = ["The capital of France is Paris.", "I can't help with that."]


@pytest.fixture(scope="module")
def run(micro_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    shutil.copytree("stage_configs/micro", folder / "recipe")
    (folder / "recipe" / "reward.yaml").write_text(REWARD)
    head = (folder / "recipe" / "pipeline.yaml").read_text().replace("sft, dpo", "sft, dpo, reward")
    (folder / "recipe" / "pipeline.yaml").write_text(head)
    shutil.copytree(micro_run, folder / "run")
    (folder / "stdout.txt").write_text(hfpipe("run", folder / "recipe", "--out", folder / "run").stdout)
    return folder


def test_what_a_reward_stage_leaves_and_tells(run):
    left = run / "run" / "reward"
    pairs = stage_json(left)["metrics"]["pairs"]
    assert pairs["n"] == 64
    assert 0.5 < pairs["accuracy"] <= 1
    assert pairs["low"] < pairs["accuracy"] < pairs["high"]
    assert pairs["margin"] > 0
    printed = (run / "stdout.txt").read_text()
    assert "of 64 held-out pairs right, calibration error" in printed
    assert "prefers the longer answer in" in printed
    model = AutoModelForSequenceClassification.from_pretrained(left)
    assert model.config.num_labels == 1
    assert "AutoModelForSequenceClassification" in (left / "README.md").read_text()
    samples = [json.loads(line) for line in (left / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 5
    assert all(sample["chosen"] and sample["rejected"] and len(sample["rewards"]) == 2 for sample in samples)
    table = hfpipe("report", run / "run").stdout
    assert "dpo" in table
    assert "reward" not in table.splitlines()[0]  # it answers nothing: no column among those that do


def test_every_door_reads_the_same_score(run):
    """The stage, a template's own rendering (TRL, a user) and the judge of `compare`."""
    left = run / "run" / "reward"
    tokenizer = AutoTokenizer.from_pretrained(left)
    model = AutoModelForSequenceClassification.from_pretrained(left).eval()
    talks = [[{"role": "assistant", "content": answer}] for answer in ANSWERS]
    pair = encode_preference(tokenizer, {"prompt": TALK, "chosen": talks[0], "rejected": talks[1]})
    rewards = score_pairs(model, tokenizer, [pair._asdict()])[0]
    for reward, talk in zip(rewards, talks, strict=True):
        ids = tokenizer.apply_chat_template([*TALK, *talk], return_dict=True, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            assert model(ids).logits.item() == pytest.approx(reward, abs=1e-5)
    verdict = reward_judge(str(left))([{"messages": TALK}], [ANSWERS[0]], [ANSWERS[1]])
    assert verdict == [float(rewards[1] > rewards[0])]


def test_scoring_again_leaves_the_weights(run, tmp_path):
    shutil.copytree(run / "run", tmp_path / "run")
    (tmp_path / "run" / "reward" / "eval.json").unlink()
    done = hfpipe("run", run / "recipe", "--out", tmp_path / "run")
    assert "its eval.json is missing or damaged: scoring the weights on disk" in done.stdout
    assert json.loads((tmp_path / "run" / "reward" / "eval.json").read_text()) == json.loads(
        (run / "run" / "reward" / "eval.json").read_text()
    )


def test_an_adapted_reward_model_is_merged_with_its_head(run, tmp_path):
    shutil.copytree(run / "run", tmp_path / "run")
    hfpipe(
        *("run", run / "recipe", "--out", tmp_path / "run", "--only", "reward"),
        *("--set", "reward.adapter.type=lora", "--set", "reward.adapter.target_modules=all-linear"),
        *("--set", "reward.adapter.r=4"),
    )
    left = tmp_path / "run" / "reward"
    from peft import AutoPeftModelForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(left)
    ids = tokenizer.apply_chat_template(TALK, return_dict=True, return_tensors="pt")["input_ids"]
    merged = AutoModelForSequenceClassification.from_pretrained(left).eval()
    adapted = AutoPeftModelForSequenceClassification.from_pretrained(left / "adapter", num_labels=1).eval()
    with torch.inference_mode():
        assert torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-4)


def test_pair_scores_by_hand():
    sure = math.log(3)  # sigmoid of it: 0.75
    rewards = [(sure, 0.0), (sure, 0.0), (sure, 0.0), (0.0, sure)]
    told = pair_scores(rewards, [(2, 1), (2, 1), (1, 2), (5, 5)])
    assert told["n"] == 4
    assert told["accuracy"] == 0.75
    assert told["calibration_error"] == 0
    assert told["margin"] == pytest.approx(sure / 2, abs=1e-4)
    assert told["loss"] == pytest.approx((3 * -math.log(0.75) - math.log(0.25)) / 4, abs=1e-4)
    assert told["longer_preferred"] == told["longer_chosen"] == pytest.approx(2 / 3, abs=1e-4)
    wrong = pair_scores([(0.0, 9.0)] * 4, [(1, 2)] * 4)
    assert wrong["calibration_error"] == pytest.approx(1, abs=1e-3)
    assert (wrong["longer_preferred"], wrong["longer_chosen"], wrong["length_correlation"]) == (1, 0, 1)


def test_a_policy_cannot_start_from_a_reward_model(run, tmp_path):
    folder = tmp_path / "recipe"
    shutil.copytree(run / "recipe", folder)
    dpo = (folder / "dpo.yaml").read_text().replace("from: sft", "from: reward")
    (folder / "dpo.yaml").write_text(dpo)
    done = hfpipe("plan", folder, check=2)
    assert "`reward` leaves a reward_model, but a dpo stage needs a model" in done.stderr
