"""What a stage will cost and read, by arithmetic alone: no torch, no weights."""

from __future__ import annotations

from typing import Any

from hfpipe.adapter_types import describe
from hfpipe.progress import quantity
from hfpipe.sections import Recipe, Stage


def count_parameters(config: dict[str, Any], vocab_size: int) -> int | None:
    """Parameters of a model shaped like Llama, Qwen3 or Gemma 3; None for a shape that this formula does not know."""
    model_type = config.get("model_type")
    if model_type not in ("llama", "mistral", "qwen3", "gemma3_text"):
        return None
    gemma = model_type == "gemma3_text"
    try:
        hidden, layers, ffn = (config[k] for k in ("hidden_size", "num_hidden_layers", "intermediate_size"))
        heads = config["num_attention_heads"]
    except KeyError:
        return None
    head_dim = config.get("head_dim") or {"qwen3": 128, "gemma3_text": 256}.get(str(model_type), hidden // heads)
    kv = config.get("num_key_value_heads") or heads
    attention = hidden * head_dim * (2 * heads + 2 * kv)
    norms = (4 if gemma else 2) * hidden + (2 * head_dim if model_type in ("qwen3", "gemma3_text") else 0)
    block = attention + 3 * hidden * ffn + norms
    embeddings = vocab_size * hidden * (1 if config.get("tie_word_embeddings", gemma) else 2)
    return embeddings + layers * block + hidden


def describe_stage(recipe: Recipe, stage: Stage) -> dict[str, Any]:
    """`parameters` where the stage makes a model, and `notes`: what it reads and how it trains, a line each."""
    notes = [f"data: {', '.join(_source(s) for s in stage.data.train)}"] if stage.data.train else []
    described: dict[str, Any] = {"notes": notes}
    if stage.model.config:
        parent = recipe.parent(stage)
        vocab = parent.sections["tokenizer"].vocab_size if parent and parent.type.leaves == "tokenizer" else 0
        described["parameters"] = count_parameters(stage.model.config, stage.model.config.get("vocab_size", vocab))
        if described["parameters"]:
            notes.append(f"model: {stage.model.config['model_type']}, {quantity(described['parameters'])} parameters")
    if stage.adapter:
        notes.append(f"adapter: {describe(stage.adapter)}")
    if stage.trainer:
        batch = stage.trainer.get("per_device_train_batch_size", 8) * stage.trainer.get(
            "gradient_accumulation_steps", 1
        )
        rows = batch * (recipe.pipeline.launch.processes or 1)
        length, unit = stage.trainer.get("max_length") or getattr(stage.data, "max_length", 1024), "rows"
        if stage.type.rows == "prompt":
            length, unit = stage.data.max_prompt_length + stage.trainer.get("max_completion_length", 256), "completions"
        if tokens := getattr(stage.data, "batch_tokens", None):
            rows = tokens // length
        rate = stage.trainer.get("learning_rate")
        described |= {"batch_rows": rows, "batch_tokens": rows * length, "learning_rate": rate}
        notes.append(
            f"batch: {rows} {unit} of at most {length} tokens; learning_rate {rate if rate else 'of upstream'}"
        )
    return described


def _source(source: Any) -> str:
    return source.path if source.weight is None else f"{source.path} ({source.weight:g})"
