"""Parameters by arithmetic: against published totals, and name by name against transformers and PEFT."""

from __future__ import annotations

import random
from itertools import product

import pytest

from hfpipe.plan.shapes import KNOWN, read_shape

LLAMA_3 = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256}  # fmt: skip
QWEN3_06B = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
             "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "total"),
    [
        ({"model_type": "gpt2"}, 124_439_808),
        ({"model_type": "llama"}, 6_738_415_616),  # the class's defaults are Llama 2 7B
        ({"model_type": "llama", **LLAMA_3}, 8_030_261_248),
        ({"model_type": "qwen3", **QWEN3_06B}, 596_049_920),
        ({"model_type": "mistral"}, 7_241_732_096),  # and these Mistral 7B v0.1
    ],
)
def test_published_totals(config, total):
    shape = read_shape(config)
    assert shape.total == sum(shape.parts().values()) == total


def test_parts_by_hand():
    shape = read_shape({"model_type": "qwen3", **QWEN3_06B})
    assert shape.parts() == {
        "embedding": 151936 * 1024,
        "head": 0,  # tied
        "attention": 28 * 1024 * 128 * (16 + 8 + 8 + 16),
        "mlp": 28 * 3 * 1024 * 3072,
        "norm": 28 * (2 * 1024 + 2 * 128) + 1024,
    }
    assert shape.embedding == 155_582_464
    assert read_shape({"model_type": "llama", **LLAMA_3}).embedding == 2 * 128256 * 4096
    assert read_shape({"model_type": "gpt2"}).embedding == (50257 + 1024) * 768


def drawn(model_type: str, rng: random.Random) -> dict:
    """A small configuration of a type, options at random."""
    heads, dim = rng.choice([2, 4, 6]), rng.choice([8, 16])
    layers = rng.choice([1, 2, 7])
    config = {"model_type": model_type, "vocab_size": rng.randrange(50, 500), "tie_word_embeddings": rng.random() < 0.5}
    if model_type == "gpt2":
        inner = {"n_inner": rng.choice([None, 40])}
        return config | {"n_embd": heads * dim, "n_layer": layers, "n_head": heads, "n_positions": 33, **inner}
    config |= {"hidden_size": heads * dim, "num_hidden_layers": layers, "num_attention_heads": heads}
    config |= {"intermediate_size": rng.randrange(8, 90), "pad_token_id": 0}
    if model_type == "gpt_neox":
        return config | {"attention_bias": rng.random() < 0.5}
    config["num_key_value_heads"] = rng.choice([1, 2, heads])
    if model_type == "phi3":
        return config
    if model_type in ("llama", "mistral", "qwen3", "gemma", "gemma2", "gemma3_text") and rng.random() < 0.6:
        config["head_dim"] = rng.choice([8, 24])
    if model_type in ("llama", "qwen3", "gemma", "gemma2", "gemma3_text"):
        config["attention_bias"] = rng.random() < 0.5
    if model_type == "llama":
        config["mlp_bias"] = rng.random() < 0.5
    return config


def on_meta(config: dict, scores: bool = False):
    """The model that transformers makes of a configuration, without memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    with torch.device("meta"):
        if scores:
            return AutoModelForSequenceClassification.from_config(AutoConfig.for_model(**config, num_labels=1))
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


@pytest.mark.parametrize("scores", [False, True])
@pytest.mark.parametrize("model_type", KNOWN)
def test_every_weight_is_the_one_that_transformers_makes(model_type, scores):
    rng = random.Random(f"{model_type} {scores}")
    for _ in range(6):
        config = drawn(model_type, rng)
        model, shape = on_meta(dict(config), scores), read_shape(config, scores=scores)
        assert {n: w.size for n, w in shape.weights.items()} == {n: tuple(p.shape) for n, p in model.named_parameters()}
        text = model.config
        kinds = getattr(text, "layer_types", None) or ["full_attention"] * shape.layers
        if model_type == "mistral":
            kinds = ["sliding_attention"] * shape.layers
        expected = [text.sliding_window if kind == "sliding_attention" else None for kind in kinds]
        assert list(shape.windows) == expected


@pytest.mark.parametrize("model_type", KNOWN)
def test_defaults_are_the_classes_own(model_type):
    assert read_shape({"model_type": model_type}).total == on_meta({"model_type": model_type}).num_parameters()


@pytest.mark.parametrize("model_type", KNOWN)
def test_biases_that_a_class_has_no_field_for_are_not_counted(model_type):
    config = drawn(model_type, random.Random(0)) | {"attention_bias": True, "mlp_bias": True}
    assert read_shape(config).total == on_meta(dict(config)).num_parameters()


def test_what_is_not_known_is_none():
    assert read_shape({"model_type": "mixtral"}) is None
    assert read_shape({"model_type": "gpt2", "add_cross_attention": True}) is None
    assert read_shape({}) is None


# --- what trains ---

LLAMA = {"model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}  # fmt: skip
GPT2 = {"model_type": "gpt2", "vocab_size": 300, "n_embd": 32, "n_layer": 3, "n_head": 4, "pad_token_id": 0}
NEOX = {"model_type": "gpt_neox", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2,
        "num_attention_heads": 4, "pad_token_id": 0}  # fmt: skip
QWEN = {**LLAMA, "model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True}


SECTIONS = [
    {"type": "lora"},
    {"type": "lora", "r": 5, "target_modules": "all-linear", "bias": "all"},
    {"type": "lora", "r": 4, "target_modules": "all-linear", "modules_to_save": ["lm_head"]},
    {"type": "lora", "r": 4, "target_modules": ".*(q_proj|c_attn|query_key_value)", "lora_bias": False},
    {"type": "lora", "target_modules": ["o_proj", "c_proj", "dense"], "layers_to_transform": [0, 1]},
    {"type": "lora", "target_modules": "all-linear", "rank_pattern": {"down_proj": 3, "mlp.c_proj": 2}},
    {"type": "lora", "target_modules": "all-linear", "exclude_modules": ["o_proj", "c_fc", "dense"]},
    {"type": "lora", "trainable_token_indices": [1, 2, 3]},
    {"type": "dora", "r": 3, "target_modules": "all-linear"},
    {"type": "ia3"},
    {"type": "ia3", "target_modules": ["o_proj", "c_fc", "dense"], "feedforward_modules": ["c_fc"]},
    {"type": "prompt", "num_virtual_tokens": 7},
    {"type": "p_tuning", "num_virtual_tokens": 7},
    {"type": "p_tuning", "num_virtual_tokens": 7, "encoder_hidden_size": 11},
    {"type": "prefix", "num_virtual_tokens": 7},
    {"type": "prefix", "num_virtual_tokens": 7, "prefix_projection": True, "encoder_hidden_size": 9},
    {"type": "bottleneck", "r": 6},
    {"type": "llama_adapter", "adapter_len": 5, "adapter_layers": 2},
]


def applies(section: dict, config: dict, scores: bool) -> bool:
    if section["type"] == "llama_adapter":  # PEFT has it for language models of these two
        return not scores and config["model_type"] in ("llama", "gpt2")
    return not (scores and "lm_head" in section.get("modules_to_save", []))  # a model that scores has no lm_head


@pytest.mark.parametrize(
    ("section", "config", "scores"),
    [
        pytest.param(*case, id="-".join([*map(str, case[0].values()), case[1]["model_type"], str(case[2])]))
        for case in product(SECTIONS, (LLAMA, GPT2, NEOX, QWEN), (False, True))
        if applies(*case)
    ],
)
def test_adapters_count_as_peft_counts(section, config, scores):
    import torch
    from peft import get_peft_config, get_peft_model

    from hfpipe.adapter_types import find_kind, read_adapter
    from hfpipe.plan.trained import read_trained
    from hfpipe.training import bottleneck  # noqa: F401  makes the method known to PEFT

    problems = []
    adapter = read_adapter(section, "adapter", problems)
    assert not problems
    method, shape = find_kind(adapter.type).method, read_shape(config, scores=scores)
    options = {"peft_type": method.upper(), "task_type": "SEQ_CLS" if scores else "CAUSAL_LM", **adapter.options}
    with torch.device("cpu"):
        model = get_peft_model(small(config, scores), get_peft_config(dict(options)))
    expected = sum(p.numel() for p in model.parameters() if p.requires_grad)
    trained = read_trained(shape, None, adapter)
    assert trained.count(shape) == trained.held(shape) == expected


def small(config: dict, scores: bool = False):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    if scores:
        return AutoModelForSequenceClassification.from_config(AutoConfig.for_model(**config, num_labels=1))
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


@pytest.mark.parametrize("config", [LLAMA, GPT2, NEOX, QWEN], ids=lambda c: c["model_type"])
@pytest.mark.parametrize(
    "layers",
    [0, 1, -1, ("embed_tokens", "wte", "embed_in"), ("lm_head",), ("*.0.mlp", "h.1"), ("layers.*.self_attn", "ln_f")],
)
def test_frozen_layers_count_as_training_freezes_them(config, layers):
    from hfpipe.errors import UserError
    from hfpipe.plan.trained import read_trained
    from hfpipe.sections import Regularize
    from hfpipe.training.regularize import freeze_layers

    model, shape = on_meta(config), read_shape(config)
    kept = () if isinstance(layers, tuple) else layers
    for name in layers if isinstance(layers, tuple) else ():
        try:
            freeze_layers(model, (name,), "here")
            kept += (name,)
        except UserError:  # not this type's name
            continue
    if not isinstance(layers, tuple):
        freeze_layers(model, layers, "here")
    trained = read_trained(shape, Regularize(freeze_layers=kept), None)
    assert trained.base == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not kept or len(trained.base) < len(shape.weights)


def test_frozen_rows_take_memory_and_learn_nothing():
    from hfpipe.plan.trained import read_trained
    from hfpipe.sections import Regularize

    for config, tables in ((QWEN, 1), (LLAMA, 2)):  # tied; a head of its own
        shape = read_shape(config)
        trained = read_trained(shape, Regularize(freeze_embeddings=True), None, special_tokens=13)
        assert trained.held(shape) == shape.total
        assert trained.count(shape) == shape.total - tables * (300 - 13) * 32


def test_an_adapter_that_is_not_known_is_none():
    from hfpipe.plan.trained import read_trained
    from hfpipe.sections import Adapter

    assert read_trained(read_shape(LLAMA), None, Adapter("vera", options={})) is None
