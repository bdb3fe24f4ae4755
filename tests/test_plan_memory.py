"""Memory by arithmetic: byte by byte against what torch keeps, by hand, and against the peak of whole trainings."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

import pytest

from hfpipe.plan.activations import blocks_bytes
from hfpipe.plan.memory import FOUR_BIT, Setting, disk_bytes, kv_cache, largest_batch, optimizer_bytes, plan_memory
from hfpipe.plan.shapes import read_shape
from hfpipe.plan.trained import read_trained
from hfpipe.sections import Adapter, Regularize

from .conftest import ROOT

SHAPE = {"vocab_size": 128, "hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 6,
         "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
GPT2 = {"model_type": "gpt2", "vocab_size": 128, "n_embd": 96, "n_head": 6, "bos_token_id": 1, "eos_token_id": 2}
LORA = {"r": 8, "target_modules": "all-linear"}
ROWS, LENGTH = 2, 64


def configured(model_type: str, layers: int) -> dict:
    if model_type == "gpt2":
        return {**GPT2, "n_layer": layers}
    without = ("num_key_value_heads",) if model_type == "gpt_neox" else ()
    shape = {name: value for name, value in SHAPE.items() if name not in without}
    return {**shape, "model_type": model_type, "num_hidden_layers": layers}


def kept(config: dict, setting: Setting, lora: dict | None) -> int:
    """Bytes of all distinct tensors that autograd keeps of a backbone's forward pass, weights left out."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = torch.float32 if setting.stored == 4 else torch.bfloat16
    config = AutoConfig.for_model(**config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=setting.attention, dtype=dtype).train()
    backbone = model.base_model
    if lora:
        from peft import LoraConfig, get_peft_model

        backbone = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora)).base_model.model.base_model
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no other takes its place
        return tensor

    ids = torch.randint(3, 128, (ROWS, LENGTH))
    positions = torch.cat([torch.arange(LENGTH // 2)] * 2).expand(ROWS, -1) if setting.masked else None
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=setting.dtype == "bf16"),
    ):
        backbone(ids, position_ids=positions, use_cache=False)
    return sum(size for size, _ in seen.values())


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "lora"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("model_type", "attention", "masked"),
    [
        (model_type, *how)
        for model_type in (
            "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox",
        )
        for how in (("sdpa", False), ("sdpa", True), ("eager", False))
        if (model_type, how[0]) != ("gemma2", "sdpa")  # it caps its scores, which sdpa can't: transformers refuses it
    ],
)  # fmt: skip
def test_what_a_block_keeps_is_what_torch_keeps(model_type, attention, masked, dtype, lora):
    setting = Setting(ROWS, LENGTH, dtype, attention=attention, masked=masked, on_cpu=True)
    shape = read_shape(configured(model_type, 3))
    trained = read_trained(shape, None, Adapter("lora", options=lora) if lora else None)
    few, many = (kept(configured(model_type, layers), setting, lora) for layers in (2, 5))
    copies = 2 * shape.block_matrices if setting.casts else 0
    copies += 2 * sum(w.numel for w in trained.added) if dtype == "bf16" else 0
    expected = blocks_bytes(shape, trained, setting)
    assert len(expected) == 3
    assert sum(expected) * ROWS * LENGTH + copies == pytest.approx(many - few, rel=0.002)


def test_stored_in_bfloat16_too():
    setting = Setting(ROWS, LENGTH, "bf16", stored=2, masked=False)
    shape = read_shape(configured("llama", 3))
    trained = read_trained(shape, None, Adapter("lora", options=LORA))
    few, many = (kept(configured("llama", layers), setting, LORA) for layers in (2, 5))
    expected = sum(blocks_bytes(shape, trained, setting)) * ROWS * LENGTH + 2 * sum(w.numel for w in trained.added)
    assert expected == pytest.approx(many - few, rel=0.002)


def test_static_parts_by_hand():
    shape = read_shape(configured("llama", 4))
    whole = read_trained(shape, None, None)
    n, matrices = shape.total, shape.block_matrices
    memory = plan_memory(shape, whole, Setting(1, 8, "fp32"))
    assert (memory.weights, memory.gradients, memory.optimizer, memory.copies) == (4 * n, 4 * n, 8 * n, 0)
    assert plan_memory(shape, whole, Setting(1, 8, "bf16")).copies == 2 * (matrices + 128 * 96)
    assert plan_memory(shape, whole, Setting(1, 8, "fp32")).logits == 12 * 128 * 8
    assert optimizer_bytes(shape, whole, "muon") == 4 * matrices + 8 * (n - matrices)
    assert optimizer_bytes(shape, whole, "sgd") == 0
    assert optimizer_bytes(shape, whole, "lion_32bit") == 4 * n
    small = 96 * 9 + 2 * 4 * 32 * 96  # norms, and k and v: fewer than 4,096 each stay in float32
    assert optimizer_bytes(shape, whole, "adamw_8bit") == 2 * (n - small) + 8 * small
    lora = read_trained(shape, None, Adapter("lora", options=LORA))
    added = sum(w.numel for w in lora.added)
    four = plan_memory(shape, lora, Setting(1, 8, "bf16", four_bit=True))
    assert four.weights == pytest.approx(4 * (n - matrices) + FOUR_BIT * matrices + 4 * added)
    assert (four.gradients, four.optimizer) == (4 * added, 8 * added)
    assert kv_cache(shape, 3, 10) == 3 * 10 * 4 * 2 * 2 * 16 * 2
    assert disk_bytes(shape, whole, "adamw", 2) == 4 * n + 2 * (4 + 8) * n
    assert disk_bytes(shape, lora, "adamw", 1) == 4 * (n + added) + 12 * added


def test_ranks_divide_what_is_sharded():
    shape = read_shape(configured("llama", 4))
    whole = read_trained(shape, None, None)
    alone = plan_memory(shape, whole, Setting(1, 8, "fp32"))
    ddp = plan_memory(shape, whole, Setting(1, 8, "fp32", ranks=4))
    zero2 = plan_memory(shape, whole, Setting(1, 8, "fp32", ranks=4, sharding="zero2"))
    full = plan_memory(shape, whole, Setting(1, 8, "fp32", ranks=4, sharding="full"))
    assert (ddp.weights, ddp.gradients, ddp.optimizer) == (alone.weights, 2 * alone.gradients, alone.optimizer)
    assert (zero2.weights, zero2.gradients) == (alone.weights, alone.gradients / 4)
    assert zero2.optimizer == full.optimizer == alone.optimizer / 4
    assert alone.weights / 4 < full.weights < alone.weights
    zero1 = plan_memory(shape, whole, Setting(1, 8, "fp32", ranks=4, sharding="zero1"))
    assert (zero1.gradients, zero1.optimizer) == (alone.gradients, alone.optimizer / 4)
    assert full.peak < zero2.peak < zero1.peak < ddp.peak


def test_the_largest_batch_fits_and_one_more_does_not():
    shape = read_shape(configured("llama", 4))
    whole, setting = read_trained(shape, None, None), Setting(1, 512, "bf16")
    for limit in (2e7, 1e9):
        rows = largest_batch(shape, whole, setting, limit)
        assert rows >= 1
        assert plan_memory(shape, whole, replace(setting, rows=rows)).peak <= limit
        assert plan_memory(shape, whole, replace(setting, rows=rows + 1)).peak > limit
    assert largest_batch(shape, whole, setting, 1e5) == 0
    pairs = largest_batch(shape, whole, setting, 1e9, None, 2)
    assert pairs == largest_batch(shape, whole, setting, 1e9) // 2
    more = largest_batch(shape, whole, replace(setting, checkpointing=True), 1e9)
    assert more > largest_batch(shape, whole, setting, 1e9)


def test_freezing_the_lower_half_keeps_less():
    shape = read_shape(configured("llama", 4))
    frozen = read_trained(shape, Regularize(freeze_layers=("embed_tokens", "layers.[01]")), None)
    assert len(blocks_bytes(shape, frozen, Setting(1, 8))) == 2


@pytest.mark.parametrize("name", ["pretrain-few-tokens", "sft-lora-bf16"])
def test_the_peak_of_a_training_is_what_was_planned(name):
    """Two of benchmarks/memory_of_training.py, smaller, with a wider tolerance: the process itself weighs more there."""
    sys.path.insert(0, os.fspath(ROOT / "benchmarks"))
    try:
        from memory_of_training import COMBINATIONS, measured, planned
    finally:
        sys.path.pop(0)
    spec = COMBINATIONS[name]
    spec = {**spec, "rows": min(spec["rows"], 4), "model": {**spec["model"], "num_hidden_layers": 6}}
    assert planned(spec) == pytest.approx(measured(spec, steps=2)["peak"], rel=0.25)
