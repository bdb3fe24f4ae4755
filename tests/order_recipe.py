"""A very small recipe whose rows tell where they come from and how hard they are, and what a stage saw of them.

python -m tests.order_recipe SEEN hfpipe.stages.NAME FILE OPTIONS     a stage, what it trains on written to SEEN.RANK
"""

from __future__ import annotations

import itertools
import json
import os
import random
import runpy
import signal
import sys
from pathlib import Path

MODEL = "{model_type: llama, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32}"
TRAINER = "per_device_train_batch_size: 4, learning_rate: 1.0e-2, logging_steps: 1, save_steps: 4"
STAGES = ("tokenizer", "pretrain", "sft", "dpo", "kto", "reward", "grpo")
ON_PRETRAIN = "model: {from: pretrain}\ndata:\n  train: [{path: DATA/FILE.jsonl, split: all}]\nORDER\n"
WATCHED = "guards: {rehearse: false}\n"  # a rehearsal trains on rows too
EPOCH = f"trainer: {{num_train_epochs: 1, max_length: 96, {TRAINER}}}\n"
FILES = {
    "pipeline": f"name: nano\nstages: [{', '.join(STAGES)}]\nevaluate: {{samples: 0}}\n",
    "tokenizer": "stage: tokenizer\ntokenizer: {vocab_size: 300}\ndata: {train: [{path: DATA/a.jsonl, split: all}]}\n",
    "pretrain": f"stage: pretrain\n{WATCHED}model: {{from: tokenizer, config: {MODEL}}}\n"
    "data:\n  max_length: 64\n  train: [{path: DATA/a.jsonl, split: all}, {path: DATA/b.jsonl, split: all}]\nORDER\n"
    f"trainer: {{max_steps: 12, {TRAINER}}}\n",
    "sft": f"stage: sft\n{WATCHED}{ON_PRETRAIN.replace('FILE', 'talks')}{EPOCH}",
    "dpo": f"stage: dpo\n{WATCHED}{ON_PRETRAIN.replace('FILE', 'pairs')}{EPOCH}",
    "kto": f"stage: kto\n{WATCHED}{ON_PRETRAIN.replace('FILE', 'pairs')}{EPOCH}",
    "reward": f"stage: reward\n{WATCHED}{ON_PRETRAIN.replace('FILE', 'pairs')}{EPOCH}",
    "grpo": f"stage: grpo\n{ON_PRETRAIN.replace('FILE', 'talks')}rewards: {{functions: [{{check: contains, value: so}}]}}\n"
    f"trainer: {{num_train_epochs: 1, max_completion_length: 4, num_generations: 2, {TRAINER}}}\n",
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


def watch(seen: Path, kill_at: int | None = None) -> None:
    """Have every trainer of this process write down what each micro-batch holds before it computes it.

    A row is a list of documents, a document [token ids, labels]; of prompts it is their text. `kill_at`: kill -9 there.
    """
    from transformers import Trainer

    compute = Trainer.training_step

    def training_step(self, model, inputs, *args, **kwargs):
        step = self.state.global_step
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        is_ids = "input_ids" in inputs
        told = _documents(inputs) if is_ids else [row["prompt"][-1]["content"] for row in inputs]
        with open(f"{seen}.{os.environ.get('RANK', 0)}", "a") as file:
            file.write(json.dumps([step, told]) + "\n")
        return compute(self, model, inputs, *args, **kwargs)

    Trainer.training_step = training_step


def _documents(inputs: dict) -> list[list]:
    ids, rows = inputs["input_ids"], []
    labels = inputs.get("labels", ids)
    for r in range(len(ids)):
        if "position_ids" not in inputs:
            kept = inputs["attention_mask"][r].bool()
            rows.append([[ids[r][kept].tolist(), labels[r][kept].tolist()]])
            continue
        starts = [*(inputs["position_ids"][r] == 0).nonzero().flatten().tolist(), len(ids[r])]
        pieces = [[ids[r][i:j].tolist(), labels[r][i:j].tolist()] for i, j in itertools.pairwise(starts)]
        rows.append([piece for piece in pieces if len(set(piece[0])) > 1 or max(piece[1]) >= 0])  # not the padding
    return rows


def read_seen(seen: Path, ranks: int = 1) -> list[list]:
    """The rows of each step, those of all ranks together; of a step that was begun twice the second time's."""
    steps: dict[int, list] = {}
    for rank in range(ranks):
        own: dict[int, list] = {}
        before = -1
        for step, rows in map(json.loads, Path(f"{seen}.{rank}").read_text().splitlines()):
            own[step] = own[step] + rows if step == before else rows
            before = step
        for step, rows in own.items():
            steps.setdefault(step, []).extend(rows)
    assert sorted(steps) == list(range(len(steps)))
    return [steps[step] for step in sorted(steps)]


if __name__ == "__main__":
    watch(Path(sys.argv[1]), int(os.environ["KILL_AT"]) if "KILL_AT" in os.environ else None)
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__")
