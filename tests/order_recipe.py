"""A very small recipe whose rows tell where they come from and how hard they are, and what a stage saw of them.

    python -m tests.order_recipe SEEN -- FILE OPTIONS of a stage, run with the batches of each of its steps written down

A row is told by its first number: `17 comes ...`.
"""

from __future__ import annotations

import json
import os
import random
import runpy
import sys
from pathlib import Path

MODEL = "{model_type: llama, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32}"
TRAINER = "per_device_train_batch_size: 4, learning_rate: 1.0e-2, logging_steps: 1, save_steps: 4"
STAGES = ("tokenizer", "pretrain", "sft", "dpo")
FILES = {
    "pipeline": f"name: nano\nstages: [{', '.join(STAGES)}]\nevaluate: {{samples: 0}}\n",
    "tokenizer": "stage: tokenizer\ntokenizer: {vocab_size: 300}\ndata: {train: [{path: DATA/a.jsonl, split: all}]}\n",
    "pretrain": f"stage: pretrain\nmodel: {{from: tokenizer, config: {MODEL}}}\n"
    "data:\n  max_length: 64\n  train: [{path: DATA/a.jsonl, split: all}, {path: DATA/b.jsonl, split: all}]\nORDER\n"
    f"trainer: {{max_steps: 12, {TRAINER}}}\n",
    "sft": "stage: sft\nmodel: {from: pretrain}\ndata:\n  train: [{path: DATA/talks.jsonl, split: all}]\nORDER\n"
    f"trainer: {{num_train_epochs: 1, max_length: 96, {TRAINER}}}\n",
    "dpo": "stage: dpo\nmodel: {from: pretrain}\ndata:\n  train: [{path: DATA/pairs.jsonl, split: all}]\nORDER\n"
    f"trainer: {{num_train_epochs: 1, max_length: 96, {TRAINER}}}\n",
}


def write_recipe(folder: Path, **orders: str) -> Path:
    """The recipe with the lines of `data` that its stages are given."""
    recipe, data = folder / "recipe", folder / "data"
    recipe.mkdir(exist_ok=True)
    for name, text in FILES.items():
        order = f"  {orders[name]}" if name in orders else ""
        (recipe / f"{name}.yaml").write_text(text.replace("DATA", str(data)).replace("ORDER", order))
    if not data.exists():
        data.mkdir()
        _write_data(data)
    return recipe


def _write_data(data: Path) -> None:
    rng = random.Random(0)
    for letter, count in (("a", 240), ("b", 120)):
        texts = [f"{letter} {n} " + "so " * rng.randrange(1, 12) for n in range(count)]
        _write(data / f"{letter}.jsonl", [{"text": text} for text in texts])
    hard = [*range(64)]
    rng.shuffle(hard)
    talks = [
        [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n} " + "so " * rng.randrange(20)}]
        for n in range(64)
    ]
    _write(data / "talks.jsonl", [{"messages": talk, "hard": hard[n]} for n, talk in enumerate(talks)])
    pairs = [{"prompt": f"{n}?", "chosen": "yes " * (n % 7 + 1), "rejected": "no " * (n % 5 + 1)} for n in range(32)]
    _write(data / "pairs.jsonl", pairs)


def _write(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def watch(seen: Path) -> None:
    """Have every trainer of this process write down the rows of each micro-batch that it computes, before it does."""
    from transformers import Trainer

    compute = Trainer.training_step

    def training_step(self, model, inputs, *args, **kwargs):
        rank = os.environ.get("RANK", "0")
        with open(f"{seen}.{rank}", "a") as file:
            file.write(json.dumps({"step": self.state.global_step, "rows": inputs["input_ids"].tolist()}) + "\n")
        return compute(self, model, inputs, *args, **kwargs)

    Trainer.training_step = training_step


if __name__ == "__main__":
    watch(Path(sys.argv[1]))
    module = sys.argv[3]
    sys.argv = [module, *sys.argv[4:]]
    runpy.run_module(module, run_name="__main__")
