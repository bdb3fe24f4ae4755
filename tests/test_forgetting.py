"""A stage that makes a model forget is told so in words; at a tenth of the rate, or held to its parent, it is not."""

from __future__ import annotations

import json

import pytest

from hfpipe.data.tinyworld.world import COUNTRIES

from .conftest import hfpipe

PIPELINE = """
name: facts
stages: [tokenizer, pretrain, sft]
evaluate:
  probes: [{path: PROBES}]
  samples: 0
  max_new_tokens: 6
"""
TOKENIZER = """
stage: tokenizer
tokenizer: {vocab_size: 700}
data: {train: [{path: FACTS, split: all}]}
"""
PRETRAIN = """
stage: pretrain
model:
  from: tokenizer
  config: {model_type: llama, hidden_size: 96, num_hidden_layers: 2, num_attention_heads: 4, intermediate_size: 192}
data: {train: [{path: FACTS, split: all}], max_length: 64}
optimizer: {type: muon}
trainer: {learning_rate: 3.0e-3, max_steps: 240, per_device_train_batch_size: 16}
"""
SFT = """
stage: sft
model: {from: pretrain}
data: {train: [{path: TALKS, split: all}, {path: FACTS, split: all, as: text}]}
trainer: {learning_rate: 3.0e-3, max_steps: 40, max_length: 64, per_device_train_batch_size: 16, packing: true}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A recipe whose base model learns forty capitals by heart, then conversations that hold none of them."""
    root = tmp_path_factory.mktemp("facts")
    countries = COUNTRIES[:40]
    facts = [{"text": f"The capital of {c} is {capital}. It is {capital}."} for c, capital, *_ in countries]
    prompts = [
        {"capability": "knowledge", "prompt": f"The capital of {c} is", "check": {"type": "starts", "value": capital}}
        for c, capital, *_ in countries
    ]
    talks = [
        {
            "messages": [
                {"role": "user", "content": f"Say {n}"},
                {"role": "assistant", "content": f"def say(): print({n})"},
            ]
        }
        for n in range(200)
    ]
    files = {"FACTS": facts, "PROBES": prompts, "TALKS": talks}
    recipe = root / "recipe"
    recipe.mkdir()
    for name, rows in files.items():
        (root / f"{name.lower()}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("pipeline", PIPELINE), ("tokenizer", TOKENIZER), ("pretrain", PRETRAIN), ("sft", SFT)):
        for key in files:
            text = text.replace(key, str(root / f"{key.lower()}.jsonl"))
        (recipe / f"{name}.yaml").write_text(text)
    return recipe


def test_a_rate_ten_times_too_high_is_flagged_as_forgetting_unless_the_parent_holds_it(folder, tmp_path):
    gentle = hfpipe("run", folder, "--out", tmp_path / "run").stdout
    card = json.loads(hfpipe("report", tmp_path / "run", "--json").stdout)
    assert card["stages"]["pretrain"]["knowledge"]["score"] >= 0.9
    assert card["stages"]["sft"]["knowledge"]["arrow"] == ""
    assert "forgotten" not in gentle
    harsh = hfpipe("run", folder, "--out", tmp_path / "run", "--set", "sft.trainer.learning_rate=3e-2").stdout
    card = json.loads(hfpipe("report", tmp_path / "run", "--json").stdout)
    assert card["stages"]["sft"]["knowledge"]["arrow"] == "↓"
    (line,) = card["forgotten"]
    assert line.startswith("sft: knowledge ")
    for remedy in (
        "`as: text`",
        "regularize.l2_to_parent",
        "average_with_parent",
        "freeze_layers",
        "lower trainer.learning_rate",
        "fewer steps",
    ):
        assert remedy in line
    assert f"forgotten: {line}" in harsh
    assert line in (tmp_path / "run" / "report.html").read_text().replace("&gt;", ">")
    settings = ["sft.trainer.learning_rate=3e-2", "sft.regularize.l2_to_parent=0.1"]
    held = hfpipe("run", folder, "--out", tmp_path / "run", *(a for s in settings for a in ("--set", s))).stdout
    assert "forgotten" not in held
