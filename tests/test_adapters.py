"""Adapters of every kind: trained, saved, loaded again, merged where that can be; what goes with what is told before."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hfpipe import artifact
from hfpipe.adapter_types import _UNMERGED, describe, find_kind
from hfpipe.config import load_recipe
from hfpipe.errors import UserError
from hfpipe.run_folder import damage_at
from hfpipe.sections import Adapter
from hfpipe.stages import stage_types

from .conftest import ROOT, hfpipe, stage_json
from .test_config import problems
from .test_nothing_lost import checkpoints, kill, same_result, start, wait_for
from .test_training import plain_model, tiny_llama, weights  # noqa: F401

KINDS = {
    "lora": "{type: lora, r: 4, target_modules: all-linear}",
    "qlora": "{type: qlora, r: 4, target_modules: all-linear}",
    "bottleneck": "{type: bottleneck, r: 8}",
    "dora": "{type: dora, r: 4, target_modules: [q_proj, down_proj]}",
    "prompt": "{type: prompt, num_virtual_tokens: 4}",
    "prefix": "{type: prefix, num_virtual_tokens: 4}",
    "p_tuning": "{type: p_tuning, num_virtual_tokens: 4, encoder_hidden_size: 16}",
    "llama_adapter": "{type: llama_adapter, adapter_len: 4, adapter_layers: 2}",
    "ia3": "{type: ia3}",
    "kept_apart": "{type: lora, r: 4, merge: false}",
    "vera": "{type: vera, r: 4}",  # one of PEFT's, by PEFT's own name
}
ALONE = {"prompt", "prefix", "p_tuning", "llama_adapter", "bottleneck", "kept_apart"}
SFT = """stage: sft
model: {from: midtrain, attn_implementation: eager}
data: {train: [{path: tinyworld/sft, limit: 48}], eval: [{path: tinyworld/sft, limit: 8}]}
trainer: {learning_rate: 1.0e-2, max_steps: 4, save_steps: 2, per_device_train_batch_size: 8, max_length: 256}
"""
PAIRS = "{train: [{path: tinyworld/preferences, limit: 24}], eval: [{path: tinyworld/preferences, limit: 8}]}"
BY_PAIRS = f"""stage: KIND
model: {{from: sft, attn_implementation: eager}}
data: {PAIRS}
trainer: {{learning_rate: 1.0e-2, max_steps: 2, per_device_train_batch_size: 8, max_length: 256}}
"""
BY_REWARDS = """stage: KIND
model: {from: sft, attn_implementation: eager}
data: {train: [{path: tinyworld/sft, limit: 16}], eval: [{path: tinyworld/sft, limit: 4}]}
rewards: {model: reward}
limits: {max_kl: null, min_entropy: null, max_length_growth: null}
trainer: {learning_rate: 1.0e-3, max_steps: 1, per_device_train_batch_size: 8, max_completion_length: 6, beta: 0.05}
"""
IDS = torch.tensor([[0, 20, 30, 40, 41]])


def write_recipe(folder: Path, stages: dict[str, str], before: tuple[str, ...]) -> Path:
    """A recipe of micro's stages `before` and of others."""
    folder.mkdir(exist_ok=True)
    for name in before:
        shutil.copy(ROOT / "stage_configs" / "micro" / f"{name}.yaml", folder)
    for name, text in stages.items():
        (folder / f"{name}.yaml").write_text(text)
    names = ", ".join([*before, *stages])
    (folder / "pipeline.yaml").write_text(
        f"name: micro\nstages: [{names}]\nevaluate: {{samples: 1, max_new_tokens: 4}}\n"
    )
    return folder


def begin(micro_run: Path, run: Path, before: tuple[str, ...]) -> Path:
    for name in before:
        shutil.copytree(micro_run / name, run / name)
    return run


@pytest.fixture(scope="module")
def all_kinds(micro_run, tmp_path_factory):
    """(recipe, run): an sft stage with each kind of adapter, all of them on micro's midtrain, in one `hfpipe run`."""
    root, before = tmp_path_factory.mktemp("kinds"), ("tokenizer", "pretrain", "midtrain")
    recipe = write_recipe(root / "recipe", {k: f"{SFT}adapter: {v}\n" for k, v in KINDS.items()}, before)
    run = begin(micro_run, root / "run", before)
    done = hfpipe("run", recipe, "--out", run, "--from", "lora")
    (root / "stdout.txt").write_text(done.stdout)
    return recipe, run


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=IDS).logits[:, -IDS.shape[1] :].float()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_left_and_loaded_again(all_kinds, kind):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    from hfpipe.training.adapters import load_pretrained

    run = all_kinds[1]
    folder, base = run / kind, AutoModelForCausalLM.from_pretrained(run / "midtrain")
    alone = kind in ALONE
    assert (folder / "adapter_config.json").is_file() == alone
    assert (folder / "config.json").is_file() == (folder / "model.safetensors").is_file() == (not alone)
    assert (folder / "adapter" / "adapter_model.safetensors").is_file() == (not alone)
    assert damage_at(run / "midtrain") is None
    left = logits(load_pretrained(AutoModelForCausalLM, str(folder)))
    assert (left - logits(base)).abs().max() > 1e-2
    adapted = AutoPeftModelForCausalLM.from_pretrained(folder if alone else folder / "adapter")
    torch.testing.assert_close(logits(adapted), left, atol=1e-4, rtol=1e-4)
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted), logits(base), atol=1e-5, rtol=1e-5)
    if kind in ("bottleneck", "kept_apart") or not alone:  # transformers itself loads no virtual tokens
        torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(folder)), left, atol=1e-4, rtol=1e-4)
    record = stage_json(folder)
    assert record["metrics"]["validation"]["perplexity"] > 1
    assert any(name.endswith("adapter_model.safetensors") for name in record["files"])
    card = (folder / "README.md").read_text()
    assert ("from peft import AutoPeftModelForCausalLM" in card) == alone
    assert ("import hfpipe.training.bottleneck" in card) == (kind == "bottleneck")


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_moves_the_base_does_not_and_a_checkpoint_is_gone_on_from(all_kinds, kind, tmp_path):
    from trl import SFTTrainer

    from hfpipe.stages.sft import prepare
    from hfpipe.training.adapters import build_trainer
    from hfpipe.training.collate import PaddedCollator
    from hfpipe.training.fit import construct_args
    from hfpipe.training.job import Progress, make_job
    from hfpipe.training.models import load_model, load_tokenizer

    recipe = load_recipe(all_kinds[0], stage_types())
    job, silent = make_job(recipe, recipe.stages[kind], all_kinds[1]), Progress(None)
    tokenizer = load_tokenizer(job)
    args = construct_args(job.stage, str(tmp_path), 0, dataset_kwargs={"skip_prepare_dataset": True})
    assert args.activation_checkpointing == (kind != "prefix")

    def build():
        return build_trainer(
            job,
            silent,
            SFTTrainer,
            load_model(job, tokenizer, silent),
            args,
            data_collator=PaddedCollator(tokenizer.pad_token_id),
            train_dataset=prepare(job, tokenizer).train,
            processing_class=tokenizer,
        )

    whole = build()
    before = {name: p.detach().clone() for name, p in whole.model.named_parameters()}
    trained = {name for name, p in whole.model.named_parameters() if p.requires_grad}
    assert 0 < len(trained) < len(before)
    whole.train()
    moved = {name for name, p in whole.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trained
    again = build()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, p), (_, q) in zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(p, q), name


def test_the_bottleneck_begins_as_nothing_and_counts_as_by_hand(tmp_path):
    from peft import AutoPeftModelForCausalLM, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    from hfpipe.training.bottleneck import BottleneckConfig

    hidden, layers, r = 32, 2, 8
    sizes = {"n_embd": hidden, "n_layer": layers, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    for number, base in enumerate((tiny_llama(), GPT2LMHeadModel(GPT2Config(vocab_size=64, **sizes)))):
        base.save_pretrained(tmp_path / f"base{number}")
        base = type(base).from_pretrained(tmp_path / f"base{number}")
        untouched = logits(base)
        model = get_peft_model(base, BottleneckConfig(r=r, task_type="CAUSAL_LM", non_linearity="relu"))
        assert torch.equal(logits(model), untouched)
        one = hidden * r + r + r * hidden + hidden  # down with its bias, up with its
        assert model.get_nb_trainable_parameters()[0] == 2 * layers * one
        for name, parameter in model.named_parameters():
            if "bottleneck" in name:
                parameter.data.normal_(std=0.1)
        changed = logits(model)
        assert (changed - untouched).abs().max() > 0.01
        layer = next(module for name, module in model.named_modules() if name.endswith(("o_proj", "attn.c_proj")))
        x = torch.randn(3, hidden)
        h = layer.base_layer(x)
        by_hand = h + layer.bottleneck_up["default"](layer.bottleneck_down["default"](h).relu())
        torch.testing.assert_close(layer(x), by_hand)
        with model.disable_adapter():
            assert torch.equal(logits(model), untouched)
        with pytest.raises(NotImplementedError, match="can't be merged"):  # PEFT's word for it, not a stub's
            model.merge_and_unload()
        model.save_pretrained(tmp_path / f"adapter{number}")
        assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / f"adapter{number}")), changed)
        model.add_adapter("other", BottleneckConfig(r=4, task_type="CAUSAL_LM"))
        model.set_adapter("other")
        assert torch.equal(logits(model), untouched)
        assert torch.equal(logits(model.unload()), untouched)


def test_a_broken_adapter_is_no_result(micro_run, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer

    from hfpipe.training.adapters import save_adapted

    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    next(p for name, p in model.named_parameters() if "lora_B" in name).data.fill_(float("nan"))
    stage = SimpleNamespace(adapter=Adapter(type="lora"), type=SimpleNamespace(leaves="model"))
    job = SimpleNamespace(stage=stage, work=tmp_path / "work", parent_id="parent", parent_revision=None)
    with pytest.raises(ValueError, match="NaNs detected"):
        save_adapted(job, model, AutoTokenizer.from_pretrained(micro_run / "sft"), SimpleNamespace(note=print))
    assert not (job.work / "config.json").exists()


def test_what_is_called_unmerged_is_what_peft_cannot_merge():
    """PEFT is asked for each of its methods; those that need more than a size to be built are left out."""
    from peft import get_peft_config, get_peft_model
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    small = {"num_virtual_tokens": 4, "adapter_len": 4, "adapter_layers": 2}
    merged, not_merged = set(), set()
    for method in PEFT_TYPE_TO_CONFIG_MAPPING:
        name = method.value.lower()
        needed = {key: small[key] for key in find_kind(name).needed}
        if name in ("multitask_prompt_tuning", "cartridge"):
            needed = {"num_virtual_tokens": 4}
        try:
            config = get_peft_config({"peft_type": method, "task_type": "CAUSAL_LM", **needed})
            model = get_peft_model(tiny_llama(), config)
        except (ValueError, TypeError):
            continue
        try:
            model.merge_and_unload()
            merged.add(name)
        except (NotImplementedError, AttributeError):  # how PEFT's methods say that they have no merge
            not_merged.add(name)
        except (ValueError, RuntimeError):
            pass  # for this model: a bias that it has not
    assert len(merged) > 20
    assert len(not_merged) >= 7
    assert not merged & _UNMERGED
    assert not_merged <= _UNMERGED


# --- four bits ---


def test_an_evaluation_in_the_middle_changes_no_gradient(tmp_path):
    """On CPUs with avx512_bf16 bitsandbytes packs the weights anew at the first evaluation, and reads them wrongly after."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from hfpipe.training.quantised import hold_layout, load_options

    tiny_llama(hidden_size=128, intermediate_size=256).save_pretrained(tmp_path)

    def gradient(evaluated: bool) -> torch.Tensor:
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(tmp_path, **load_options())
        assert hold_layout(base) == 14
        model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        if evaluated:
            logits(model)
        model.train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    assert torch.equal(gradient(evaluated=False), gradient(evaluated=True))


def test_a_quantised_base_is_merged_whole(all_kinds):
    run = all_kinds[1]
    from safetensors.torch import load_file

    parent, merged = weights(run / "midtrain"), weights(run / "qlora")
    adapter = load_file(run / "qlora" / "adapter" / "adapter_model.safetensors")
    stdout = (run.parent / "stdout.txt").read_text()
    assert "4 bits: 14 linear layers in nf4, double quantisation, computed in" in stdout
    changed = 0
    for name, weight in parent.items():
        a = adapter.get(f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight")
        b = adapter.get(f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight")
        delta = 0 if a is None else 8 / 4 * b.float() @ a.float()  # lora_alpha is 8 by default
        changed += a is not None
        torch.testing.assert_close(merged[name], weight + delta, atol=1e-5, rtol=1e-5)
    assert changed == 14


def test_four_bits_without_bitsandbytes_are_refused_at_once(recipe):
    code = "import sys; sys.modules['bitsandbytes'] = None; sys.argv = ['hfpipe', 'plan', 'micro', '--set', 'sft.adapter={type: qlora}']\n"
    code += "from hfpipe.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "bitsandbytes, which is not installed: pip install 'hfpipe[quant]', or take lora" in done.stderr


# --- tokens that a stage adds ---


@pytest.mark.parametrize(("tied", "adapter"), [(True, "lora"), (False, "qlora")])
def test_added_tokens_train_and_are_merged(plain_model, tmp_path, tied, adapter):  # noqa: F811
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    size = len(AutoTokenizer.from_pretrained(plain_model))
    tiny_llama(size, max_position_embeddings=512, tie_word_embeddings=tied).save_pretrained(plain_model)
    text = SFT.replace("from: midtrain, attn_implementation: eager", f"from: {plain_model}").replace("256", "512")
    text = f"{text}tokenizer: {{chat_template: hfpipe}}\nadapter: {KINDS['lora']}\n".replace(
        "stage: sft", "stage: midtrain"
    )
    folder = write_recipe(tmp_path / "recipe", {"structure": text.replace("type: lora", f"type: {adapter}")}, ())
    done = hfpipe("run", folder, "--out", tmp_path / "run")
    assert "the rows of the 13 added tokens train with it" in done.stdout
    left = tmp_path / "run" / "structure"
    model = AutoModelForCausalLM.from_pretrained(left)
    assert model.config.tie_word_embeddings == tied
    rows, old = model.get_input_embeddings().weight, weights(plain_model)["model.embed_tokens.weight"]
    assert rows.shape[0] == size + 13
    assert torch.equal(rows[:size], old)
    tokenizer = AutoTokenizer.from_pretrained(left)
    user, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<|user|>", "<|end_assistant|>"))
    assert not torch.equal(rows[user], rows[end])  # all began as the mean of the others
    head = model.get_output_embeddings().weight
    assert torch.equal(head, rows) if tied else not torch.equal(head[user], head[end])
    adapted = AutoPeftModelForCausalLM.from_pretrained(left / "adapter")
    torch.testing.assert_close(logits(adapted), logits(model), atol=1e-4, rtol=1e-4)


def test_what_trains_whole_on_a_parent_in_bf16_is_float32_and_merging_apart_gives_the_same(plain_model, tmp_path):  # noqa: F811
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hfpipe.training.adapters import merge
    from hfpipe.training.job import make_job

    size = len(AutoTokenizer.from_pretrained(plain_model))
    tiny_llama(size, max_position_embeddings=512, tie_word_embeddings=False).bfloat16().save_pretrained(plain_model)
    text = SFT.replace("from: midtrain, attn_implementation: eager", f"from: {plain_model}").replace("256", "512")
    lora = KINDS["lora"].replace("type: lora", "type: lora, modules_to_save: [lm_head, embed_tokens]")
    text = f"{text}tokenizer: {{chat_template: hfpipe}}\nadapter: {lora}\n".replace("stage: sft", "stage: midtrain")
    recipe = write_recipe(tmp_path / "recipe", {"structure": text}, ())
    rate = "structure.trainer.learning_rate=1e-6"
    hfpipe("run", recipe, "--out", tmp_path / "run", "--set", rate, "--set", "structure.trainer.bf16=true")
    left = tmp_path / "run" / "structure"
    head = next(t for name, t in load_file(left / "adapter" / "adapter_model.safetensors").items() if "lm_head" in name)
    assert head.dtype == torch.float32
    assert not torch.equal(head, head.bfloat16().float())  # such small steps would be lost in bf16
    merged = AutoModelForCausalLM.from_pretrained(left)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    loaded = load_recipe(recipe, stage_types(), [rate, "structure.trainer.bf16=true"])
    job = make_job(loaded, loaded.stages["structure"], tmp_path / "run")
    shutil.copytree(left / "adapter", job.work / "adapter")
    apart = merge(job, merged, AutoTokenizer.from_pretrained(left), apart=True)
    for name, weight in apart.state_dict().items():
        assert torch.equal(weight, merged.state_dict()[name]), name


DIVIDED = """
import os, sys, types
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="0")
import torch, torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
from pathlib import Path
from peft import LoraConfig, get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer
from hfpipe.sections import Adapter
from hfpipe.training import models
from hfpipe.training.adapters import save_adapted
parent, work = sys.argv[1:]
config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
model = get_peft_model(AutoModelForCausalLM.from_pretrained(parent), config)
mesh = init_device_mesh("cpu", (1,))
for block in model.base_model.model.model.layers:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))  # as accelerate has it
models.load_whole = lambda job, tokenizer: AutoModelForCausalLM.from_pretrained(parent)
stage = types.SimpleNamespace(adapter=Adapter(type="lora"), type=types.SimpleNamespace(leaves="model"))
job = types.SimpleNamespace(parent_id=parent, parent_revision=None, work=Path(work), stage=stage)
save_adapted(job, model, AutoTokenizer.from_pretrained(parent), types.SimpleNamespace(note=print), state)
"""


def test_an_adapter_on_a_model_that_fsdp_divides_is_left_and_merged(plain_model, tmp_path):  # noqa: F811
    """One process and the parts of torch's FSDP: what accelerate gathers is what is written."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    command = [sys.executable, "-c", DIVIDED, str(plain_model), str(tmp_path / "left")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    adapted, merged = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "left" / "adapter"), tmp_path / "left"
    merged = AutoModelForCausalLM.from_pretrained(merged)
    torch.testing.assert_close(logits(adapted), logits(merged), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(merged), logits(AutoModelForCausalLM.from_pretrained(plain_model)))


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [
        (KINDS["ia3"], "adds 13 tokens, whose rows a ia3 adapter would leave untrained"),
        (
            "{type: lora, target_modules: [norm]}",
            "refused upstream for this model: Target module LlamaRMSNorm",
        ),
    ],
)
def test_what_only_the_model_tells_is_refused_before_training(plain_model, tmp_path, adapter, expected):  # noqa: F811
    from datasets import Dataset
    from trl import SFTTrainer

    from hfpipe.training.adapters import build_trainer
    from hfpipe.training.fit import construct_args
    from hfpipe.training.job import Progress, make_job
    from hfpipe.training.models import load_model, load_tokenizer

    text = SFT.replace("from: midtrain, attn_implementation: eager", f"from: {plain_model}")
    text += f"tokenizer: {{chat_template: hfpipe}}\nadapter: {adapter}\n"
    recipe = load_recipe(write_recipe(tmp_path / "recipe", {"sft": text}, ()), stage_types())
    job, silent = make_job(recipe, recipe.stages["sft"], tmp_path / "run"), Progress(None)
    tokenizer = load_tokenizer(job)
    model, args = load_model(job, tokenizer, silent), construct_args(job.stage, str(tmp_path), 0)
    rows = Dataset.from_list([{"input_ids": [1, 2], "labels": [1, 2]}])
    with pytest.raises(UserError, match=re.escape(expected)):
        build_trainer(job, silent, SFTTrainer, model, args, train_dataset=rows, processing_class=tokenizer)


# --- every stage ---


def test_adapters_in_the_other_stages(micro_run, tmp_path):
    """Kinds that stay apart from their base, in every stage that learns from pairs or rewards; a reward model among them."""
    stages = {
        "reward": (BY_PAIRS, "bottleneck"),
        "dpo": (BY_PAIRS, "prompt"),
        "kto": (BY_PAIRS, "llama_adapter"),
        "grpo": (BY_REWARDS.replace("beta", "num_generations: 4, beta"), "llama_adapter"),
        "rloo": (BY_REWARDS, "p_tuning"),
        "ppo": (BY_REWARDS, "prefix"),
    }
    before = ("tokenizer", "pretrain", "midtrain", "sft")
    texts = {name: f"{text.replace('KIND', name)}adapter: {KINDS[kind]}\n" for name, (text, kind) in stages.items()}
    folder = write_recipe(tmp_path / "recipe", texts, before)
    run = begin(micro_run, tmp_path / "run", before)
    done = hfpipe("run", folder, "--out", run)
    assert "untrained virtual tokens change the model" in done.stdout  # dpo's reference is the model without them
    for name in stages:
        assert (run / name / "adapter_config.json").is_file(), name
        assert stage_json(run / name)["metrics"]["steps"] >= 1
    assert stage_json(run / "reward")["metrics"]["pairs"]["n"] == 8
    assert "AutoPeftModelForSequenceClassification" in (run / "reward" / "README.md").read_text()
    rewards = [json.loads(line)["rewards"] for line in (run / "grpo" / "rollouts.jsonl").read_text().splitlines()]
    assert all("reward_model" in row for row in rewards)


def test_a_killed_adapter_goes_on_to_the_same_bits(all_kinds, tmp_path):
    recipe, whole = all_kinds
    run = tmp_path / "run"
    for name in ("tokenizer", "pretrain", "midtrain", "lora"):
        shutil.copytree(whole / name, run / name)
    process = start(run, "--only", "qlora", recipe=str(recipe))
    assert wait_for(process, lambda: checkpoints(run, "qlora")), process.communicate()[0]
    kill(process)
    assert "resumed from checkpoint-" in hfpipe("run", recipe, "--out", run, "--only", "qlora").stdout
    same_result(run, whole, ("qlora",))


# --- used afterwards ---


def test_an_adapter_alone_is_talked_to_moved_and_missed(all_kinds, tmp_path, capsys):
    from hfpipe.apps.compare import compare, evaluate

    _, whole = all_kinds
    run = tmp_path / "moved"
    for name in ("midtrain", "prompt"):
        shutil.copytree(whole / name, run / name)
    config = json.loads((run / "prompt" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((whole / "midtrain").resolve())
    answer = json.loads(hfpipe("chat", run / "prompt", "--prompt", "Hello!", "--max-new-tokens", "4", "--json").stdout)
    assert answer["messages"]
    probes = tmp_path / "probes.jsonl"
    probe = {"capability": "a", "messages": [{"role": "user", "content": "Hi"}], "check": {"type": "stops"}}
    probes.write_text(json.dumps(probe) + "\n")
    compare(str(run / "midtrain"), str(run / "prompt"), str(probes), True, 0, None, "")
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 1
    evaluate(str(run / "prompt"), str(probes), True, [])
    assert json.loads(capsys.readouterr().out)["capabilities"]["a"]["n"] == 1
    record = json.loads((run / "midtrain" / "stage.json").read_text())
    artifact.write_record(run / "midtrain" / "stage.json", {**record, "fingerprint": "another"})
    with pytest.raises(UserError, match="has been made anew since"):
        evaluate(str(run / "prompt"), str(probes), True, [])


# --- what goes with what ---

PROMPT = "{type: prompt, num_virtual_tokens: 4}"
PREFIX = "{type: prefix, num_virtual_tokens: 4}"
ADAPTION = "{type: llama_adapter, adapter_len: 4, adapter_layers: 2}"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            ["dpo.adapter={type: prompt}"],
            "adapter.num_virtual_tokens is missing: a prompt adapter has no size without it",
        ),
        (["dpo.adapter={type: prefix_tuning}"], "adapter.num_virtual_tokens is missing: a prefix_tuning adapter"),
        (["dpo.adapter={type: llama_adapter, adapter_len: 4}"], "adapter.adapter_layers is missing"),
        (["dpo.adapter={type: lora, rank: 4}"], "adapter.rank = 4 is not a field of peft.LoraConfig"),
        (["dpo.adapter={type: lora, mrge: false}"], "Did you mean `merge`?"),
        (["dpo.adapter={type: lora, merge: 3}"], "adapter.merge = 3 is int; expected bool"),
        (["dpo.adapter={type: lora, r: 0}"], "adapter.r = 0: expected 1 or more"),
        (["dpo.adapter={type: lora, r: four}"], "adapter.r = 'four' is str; peft.LoraConfig expects int"),
        (["dpo.adapter={type: lora, inference_mode: true}"], "adapter.inference_mode is not the recipe's to set"),
        (["dpo.adapter={type: dora, use_dora: false}"], "beside type: dora, which means use_dora: True"),
        (["dpo.adapter={type: bottleneck, non_linearity: gelo}"], "Did you mean `gelu`?"),
        (["dpo.adapter={type: adalorra}"], "Did you mean `adalora`?"),
        (["dpo.adapter={type: adalora, total_step: 10}"], "shares out its ranks when it is called after each step"),
        (["dpo.adapter=lora"], "adapter = 'lora': expected a mapping"),
        (["pretrain.adapter={type: lora}"], "adapter has no place in a pretrain stage"),
        (["tokenizer.adapter={type: lora}"], "adapter has no place in a tokenizer stage: it trains no model"),
        ([f"sft.adapter={PROMPT}"], "adapter.type = 'prompt' with trainer.packing"),
        ([f"sft.adapter={PROMPT}"], "`sft` leaves its prompt adapter alone, and a stage starts from a whole model"),
        (["sft.adapter={type: lora, merge: false}"], "Set adapter.merge: true in sft.yaml, where it is false"),
        (["dpo.adapter={type: prompt, num_virtual_tokens: 4, merge: true}"], "adapter.merge = true: a prompt adapter"),
        ([f"dpo.adapter={PREFIX}", "dpo.trainer.gradient_checkpointing=true"], "with trainer.gradient_checkpointing"),
        (["dpo.adapter={type: prefix, num_virtual_tokens: 4, prefix_projection: true}"], "could not go on from them"),
        ([f"dpo.stage=reward dpo.adapter={PROMPT}"], "scores would be read from padding"),
        ([f"dpo.stage=distill dpo.adapter={PREFIX}"], "adapter.type = 'prefix' in a distill stage: upstream's loss"),
        ([f"dpo.stage=reward dpo.adapter={ADAPTION}"], "PEFT would neither train nor save the new head"),
        ([f"dpo.adapter={ADAPTION}", "pretrain.model.config.model_type=qwen3"], "and this model is a qwen3"),
        (["dpo.adapter={type: lora, target_modules: [lm_head]}"], "holds lm_head, whose weights TRL reads directly"),
        (["dpo.adapter={type: lora, init_lora_weights: pissa}"], "so the reference would be wrong"),
        (["sft.adapter={type: lora, init_lora_weights: eva}"], "needs a pass over data before training"),
        (["sft.adapter={type: lora, init_lora_weights: pissa_niter_4}"], "Take pissa, which is exact"),
        (["sft.adapter={type: qlora, init_lora_weights: olora}"], "4-bit ones can't be rewritten"),
        (["dpo.adapter={type: ia3, preset: lora_without_regret}"], "is for lora, qlora and dora, not for ia3"),
        (["dpo.adapter={type: lora, preset: regret}"], "adapter.preset = 'regret': expected"),
    ],
)
def test_what_cannot_be_is_told_before_anything_loads(recipe, settings, expected):
    settings = [part for item in settings for part in item.split(" dpo.")]
    settings = [part if "." in part.partition("=")[0] else f"dpo.{part}" for part in settings]
    if settings[0].startswith("dpo.stage="):  # without the keys that a dpo stage alone has
        recipe({"dpo": "stage: reward\nmodel: {from: sft}\ndata: {train: [{path: tinyworld/preferences}]}\n"})
    assert expected in problems(recipe(), settings)


def test_a_folder_with_an_adapter_alone_is_no_parent(all_kinds, recipe):
    told = problems(recipe(), [f"sft.model.from={all_kinds[1] / 'bottleneck'}"])
    assert "holds an adapter alone, and a stage starts from a whole model. Merge it" in told


# --- the preset ---


def test_the_preset_says_what_it_sets_and_gives_way(recipe):
    text = (ROOT / "stage_configs" / "micro" / "sft.yaml").read_text()
    gone = ("learning_rate", "lr_scheduler", "warmup")
    text = "".join(line for line in text.splitlines(keepends=True) if not line.strip().startswith(gone))
    folder = recipe({"sft": f"{text}adapter: {{preset: lora_without_regret}}\n"})
    stage = load_recipe(folder, stage_types()).stages["sft"]
    assert stage.adapter.options == {"target_modules": "all-linear", "r": 256, "lora_alpha": 32}
    assert stage.trainer["learning_rate"] == pytest.approx(10 * 2.0e-3)  # midtrain's, which is trained whole
    assert stage.trainer["lr_scheduler_type"] == "cosine_with_min_lr"
    assert stage.trainer["warmup_steps"] == 0.05
    shown = hfpipe("plan", folder).stdout
    assert "the preset lora_without_regret sets target_modules all-linear, r 256, lora_alpha 32" in shown
    assert "trainer.learning_rate 0.02" in shown
    kept = load_recipe(folder, stage_types(), ["sft.adapter.r=8", "sft.trainer.learning_rate=3e-4"]).stages["sft"]
    assert kept.adapter.options["r"] == 8
    assert kept.trainer["learning_rate"] == 3e-4
    assert not {"r", "trainer.learning_rate"} & kept.adapter.from_preset.keys()
    assert "leaves your learning_rate, which should be ten times" in describe(kept.adapter)
    dpo = (ROOT / "stage_configs" / "micro" / "dpo.yaml").read_text().replace("  learning_rate: 1.0e-3\n", "")
    other = load_recipe(recipe({"dpo": dpo}), stage_types(), ["dpo.adapter={preset: lora_without_regret}"]).stages[
        "dpo"
    ]
    assert other.trainer["learning_rate"] == pytest.approx(1e-5)  # ten times upstream's: pairs are not conversations


def test_a_mistake_of_ours_is_not_told_as_the_users():
    """A trainer that is called with what it does not take, and one that refuses a value as upstream's do."""
    from hfpipe.training.adapters import build_trainer

    job = SimpleNamespace(stage=load_recipe("micro", stage_types()).stages["sft"])
    with pytest.raises(TypeError, match="unexpected keyword"):
        build_trainer(job, None, json.JSONDecoder, None, no_such_argument=1)
    with pytest.raises(UserError, match="trainer is refused upstream for this model: TypeError"):
        build_trainer(job, None, json.loads, 5)
