"""Preferences, paired and not: dpo's losses and its reference, kto on labels; held-out answers tell what was learnt."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest

from .conftest import REAL, ROOT, hfpipe, needs_real_data, stage_json

KTO = """stage: kto
model: {from: sft, attn_implementation: eager}
data: {train: [SOURCE], eval: [{path: tinyworld/preferences, limit: 32}]}
trainer: {learning_rate: 1.0e-3, per_device_train_batch_size: 16, max_length: 256, activation_checkpointing: false}
"""


@pytest.fixture
def after_sft(micro_run, recipe, tmp_path):
    """Runs one stage after micro's sft: `after_sft(name, text, *arguments)`; returns the process and the stage's folder."""

    def run(name: str, text: str, *arguments: str, check: int = 0):
        folder = recipe({name: text})
        head = folder / "pipeline.yaml"
        stages = ["tokenizer", "pretrain", "midtrain", "sft", name]
        head.write_text(f"name: micro\nstages: [{', '.join(stages)}]\nevaluate: {{samples: 2, max_new_tokens: 8}}\n")
        for stage in stages[:-1]:
            if not (tmp_path / "run" / stage).exists():
                shutil.copytree(micro_run / stage, tmp_path / "run" / stage)
        done = hfpipe("run", folder, "--out", tmp_path / "run", "--only", name, *arguments, check=check)
        return done, tmp_path / "run" / name

    return run


WHOLE_DPO = (ROOT / "stage_configs" / "micro" / "dpo.yaml").read_text()
DPO = WHOLE_DPO.replace("limit: 384", "limit: 64")


@pytest.mark.parametrize("loss", ["ipo", "robust", "apo_zero"])
def test_the_losses_of_dpo(after_sft, loss):
    extra = ["--set", "dpo.trainer.label_smoothing=0.1"] if loss == "robust" else []
    _, left = after_sft(
        "dpo",
        WHOLE_DPO,
        "--set",
        f"dpo.trainer.loss_type=[{loss}]",
        "--set",
        "dpo.trainer.loss_weights=[1.0]",
        *extra,
    )
    metrics = stage_json(left)["metrics"]
    assert abs(metrics["pairs_before"]["margin"]) < 0.01
    assert metrics["pairs"]["margin"] > metrics["pairs_before"]["margin"]


WATCHED = """
import gc, json, sys, transformers, trl
from hfpipe.stages import dpo
from hfpipe.stages._run import main

seen = {"models": set(), "forwards": set(), "columns": [], "bf16": set()}
passes, step = [], trl.DPOTrainer.training_step
forward = transformers.LlamaModel.forward


def counted(self, *args, **kwargs):
    passes.append(1)
    return forward(self, *args, **kwargs)


def watched(self, *args, **kwargs):
    passes.clear()
    loss = step(self, *args, **kwargs)
    alive = [o for o in gc.get_objects() if isinstance(o, transformers.LlamaForCausalLM)]
    seen["models"].add((len(alive), self.ref_model is None))
    seen["forwards"].add(len(passes))
    seen["bf16"].add(self.args.bf16)
    seen["columns"] = self.train_dataset.column_names
    return loss


transformers.LlamaModel.forward, trl.DPOTrainer.training_step = counted, watched
main(dpo.TYPE)
print(json.dumps({name: sorted(value) for name, value in seen.items()}))
"""


def test_the_reference_is_read_once_and_no_second_model_is_held(micro_run, tmp_path):
    """Watched from within: in every step one model is alive, and it reads the batch once."""
    run = tmp_path / "micro"
    for stage in ("tokenizer", "pretrain", "midtrain", "sft"):
        shutil.copytree(micro_run / stage, run / stage)
    command = [sys.executable, "-c", WATCHED, "stage_configs/micro/dpo.yaml", "--out", str(run)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["models"] == [[1, True]]
    assert seen["forwards"] == [1]
    assert seen["bf16"] == [re.search(r"dpo +(bf16|fp32): ", (micro_run / "stdout.txt").read_text())[1] == "bf16"]
    assert {"ref_chosen_logps", "ref_rejected_logps"} <= set(seen["columns"])
    assert stage_json(run / "dpo")["weights"] == stage_json(micro_run / "dpo")["weights"]


def test_a_wrong_reference_is_seen_before_training(after_sft):
    adapter = ["type=lora", "r=8", "target_modules=all-linear", "init_lora_weights=false", "lora_alpha=64"]
    settings = [part for item in adapter for part in ("--set", f"dpo.adapter.{item}")]
    done, left = after_sft("dpo", DPO, *settings, check=2)
    assert "before training the mean margin between chosen and rejected is" in done.stderr
    assert not left.exists()


def test_kto_on_labels_of_one_s_own(after_sft, tmp_path):
    rows = []
    for n in range(96):
        prompt = [{"role": "user", "content": f"What is {n} plus 1?"}]
        good = n % 2 == 0
        rows.append({"prompt": prompt, "completion": f"It is {n + 1}." if good else "Go away!", "label": good})
    (tmp_path / "judged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = f"{{path: {tmp_path / 'judged.jsonl'}, split: all}}"
    done, left = after_sft("kto", KTO.replace("SOURCE", source), "--set", "kto.trainer.num_train_epochs=4")
    assert "judged.jsonl [all]: unpaired preference; 96 rows used" in done.stdout
    metrics = stage_json(left)["metrics"]
    assert metrics["answers_before"]["good"] == metrics["answers_before"]["bad"] == 0
    assert metrics["answers"]["n"] == 64  # each of 32 pairs is two answers
    assert metrics["train_loss"] < metrics["answers_before"]["loss"]


def test_kto_on_answers_judged_alike(after_sft, tmp_path):
    rows = [{"prompt": f"What is {n} plus 1?", "completion": "Go away!", "label": False} for n in range(8)]
    (tmp_path / "judged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = f"{{path: {tmp_path / 'judged.jsonl'}, split: all}}"
    done, _ = after_sft("kto", KTO.replace("SOURCE", source), "--set", "kto.trainer.max_steps=1")
    assert "warning: every answer of data.train is bad, so nothing is learnt of good ones [one_sided]" in done.stdout


def test_kto_unpairs_preferences(after_sft):
    _, left = after_sft("kto", KTO.replace("SOURCE", "{path: tinyworld/preferences, limit: 384}"))
    metrics = stage_json(left)["metrics"]
    assert metrics["answers"]["good"] > metrics["answers"]["bad"]
    assert "validation" in metrics
    assert stage_json(left)["sources"][0]["used"] == 768


@needs_real_data
def test_kto_on_public_rows(after_sft):
    source = f"{{path: {REAL / 'kto_en_demo.json'}, split: all, limit: 24}}"
    text = KTO.replace("SOURCE", source).replace("train: [", "max_bad_rows: 1.0, train: [")
    done, left = after_sft("kto", text, "--set", "kto.trainer.max_length=512")
    assert "unpaired preference, conversation" in done.stdout
    assert stage_json(left)["metrics"]["steps"] >= 1


def test_a_judged_row_is_inspected(micro_run, recipe, tmp_path):
    rows = [{"prompt": "What is 1 plus 1?", "completion": "Go away!", "label": False}]
    (tmp_path / "judged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = recipe({"kto": KTO.replace("SOURCE", f"{{path: {tmp_path / 'judged.jsonl'}, split: all}}")})
    (folder / "pipeline.yaml").write_text("name: micro\nstages: [tokenizer, pretrain, midtrain, sft, kto]\n")
    shown = hfpipe("inspect", folder / "kto.yaml", "--out", micro_run).stdout
    assert "bad: <|begin|><|user|>What is 1 plus 1?<|end_user|><|assistant|>⟦Go away!<|end_assistant|>⟧" in shown
