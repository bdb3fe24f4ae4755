"""FLOPs by arithmetic: by hand, and as torch counts them."""

from __future__ import annotations

import pytest

from hfpipe.plan import flops
from hfpipe.plan.shapes import read_shape
from hfpipe.plan.trained import read_trained
from hfpipe.sections import Adapter, Regularize

LLAMA = {"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 6,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
ROWS, LENGTH = 2, 48


def counted(config: dict, section: dict | None = None, checkpointing: bool = False, freeze: int = 0) -> int:
    """FLOPs of one training step, counted operation by operation (eager attention: every product is a plain one)."""
    import torch
    from peft import get_peft_config, get_peft_model
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    from hfpipe.training.regularize import freeze_layers

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation="eager").train()
    freeze_layers(model, freeze, "here")
    if section:
        model = get_peft_model(model, get_peft_config({"peft_type": "LORA", "task_type": "CAUSAL_LM", **section}))
    if checkpointing:
        model.gradient_checkpointing_enable()
        if section:
            model.enable_input_require_grads()
    ids = torch.randint(0, 512, (ROWS, LENGTH))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return counter.get_total_flops()


def planned(config: dict, section: dict | None = None, checkpointing: bool = False, freeze: int = 0) -> float:
    shape = read_shape(config)
    adapter = Adapter("lora", options=section) if section else None
    trained = read_trained(shape, Regularize(freeze_layers=freeze), adapter)
    return flops.training(shape, trained, ROWS * LENGTH, LENGTH, checkpointing)


def test_by_hand():
    shape = read_shape(LLAMA)
    block = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 160
    matrices = 6 * block + 64 * 512
    attention = 6 * 4 * LENGTH * 64  # a token's, forward
    tokens = ROWS * LENGTH
    assert flops.forward(shape, tokens, LENGTH) == tokens * (2 * matrices + attention)
    assert planned(LLAMA) == tokens * (6 * matrices + 3 * attention)
    # Frozen, with an adapter of rank 4 on q: 4 for each frozen parameter, 6 for each of the adapter.
    lora = 6 * 4 * (64 + 64)
    assert planned(LLAMA, {"r": 4, "target_modules": ["q_proj"]}) == tokens * (4 * matrices + 3 * attention + 6 * lora)
    # Four of six blocks frozen: forward through all, backward through two and the head.
    above = 2 * block + 64 * 512
    shape_frozen = tokens * (2 * matrices + 4 * above + attention + 2 * attention / 3)
    table_frozen = read_trained(
        shape, Regularize(freeze_layers=("embed_tokens", *(f"layers.{i}" for i in range(4)))), None
    )
    assert flops.training(shape, table_frozen, tokens, LENGTH) == shape_frozen
    again = tokens * (2 * 6 * (block - 64 * 160) + attention)
    assert planned(LLAMA, checkpointing=True) == planned(LLAMA) + again


def test_a_window_bounds_the_context_and_a_causal_kernel_skips_half():
    config = {**LLAMA, "model_type": "mistral", "sliding_window": 16}
    shape = read_shape(config)
    assert flops.attention(shape, 10, 48) == 10 * 6 * 4 * 16 * 64
    assert flops.attention(shape, 10, 48, causal=True) == 10 * 6 * 2 * 16 * 64
    assert flops.attention(shape, 10, 8) == 10 * 6 * 4 * 8 * 64


def test_generation_by_hand():
    shape = read_shape(LLAMA)
    tokens = 3 * (10 + 5)
    blocks = 2 * shape.block_matrices * tokens + tokens * 6 * 4 * 15 * 64 / 2
    assert flops.generation(shape, 10, 5, 3) == blocks + 2 * 64 * 512 * 15


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_full_training_is_what_torch_counts(checkpointing, tied):
    config = {**LLAMA, "tie_word_embeddings": tied}
    assert planned(config, checkpointing=checkpointing) == counted(config, checkpointing=checkpointing)


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "gemma3_text", "phi3", "qwen3"])
def test_other_types_too(model_type):
    config = {**LLAMA, "model_type": model_type, "pad_token_id": 0}
    if model_type == "gpt2":
        config = {"model_type": "gpt2", "vocab_size": 512, "n_embd": 64, "n_layer": 6, "n_head": 4}
    assert planned(config) == counted(config)


@pytest.mark.parametrize("modules", ["all-linear", ["q_proj", "v_proj"]])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_is_what_torch_counts(checkpointing, modules):
    section = {"r": 8, "target_modules": modules}
    found, expected = planned(LLAMA, section, checkpointing), counted(LLAMA, section, checkpointing)
    tokens = ROWS * LENGTH
    if not checkpointing:  # the first block's input asks for no gradient, so its first products are fewer
        adapted = 3 if modules == "all-linear" else 2
        spared = 2 * (64 * 64 + 2 * 64 * 32) + adapted * 2 * 8 * 64
        # ... and where k has no adapter nothing before it asks for one either: attention's product for it is spared.
        spared += 2 * LENGTH * 64 if modules != "all-linear" else 0
        assert found - expected == spared * tokens
    elif modules == "all-linear":  # the last adapter's own second product is not asked for again
        assert found - expected == 6 * 2 * 8 * 64 * tokens
    else:
        assert found == expected
    assert found < planned(LLAMA, None, checkpointing)


def test_frozen_blocks_are_what_torch_counts():
    # The table below the frozen blocks trains, so the gradient passes them.
    assert planned(LLAMA, freeze=3) == counted(LLAMA, freeze=3)
