"""LoRA of several ranks against full fine-tuning: the same parent, rows and steps, held-out loss on the way.

    python benchmarks/lora_against_full.py OUT                    the built-in world, a parent of micro's shape
    python benchmarks/lora_against_full.py OUT --real DIR         alpaca_en_demo.json and gsm8k_train.jsonl in DIR

Full fine-tuning has the rates of `--rates`, LoRA ten times each, as the preset lora_without_regret would have it, and once the same
rate; an adapter leaves the embeddings alone, so full fine-tuning is held against it with frozen ones too. OUT keeps the runs,
so that an interrupted benchmark goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TRAINER = "lr_scheduler_type: cosine_with_min_lr, lr_scheduler_kwargs: {min_lr_rate: 0.1}, warmup_steps: 0.05, max_length: 256"

TEXT = """stage: pretrain
model:
  from: tokenizer
  attn_implementation: eager
  config: {model_type: llama, hidden_size: 96, num_hidden_layers: 3, num_attention_heads: 3, num_key_value_heads: 3,
    intermediate_size: 256, max_position_embeddings: 512, tie_word_embeddings: true}
data: {train: [{path: DIR/wikitext2_valid.txt}, {path: DIR/c4_demo.jsonl}], max_length: 256, batch_tokens: 4096}
optimizer: {type: muon, lr: 0.02}
trainer: {learning_rate: 2.0e-3, lr_scheduler_type: cosine, warmup_steps: 0.05, max_steps: 120, per_device_train_batch_size: 16, save_steps: 50}
"""
TURNS = f"""stage: midtrain
model: {{from: pretrain, attn_implementation: eager}}
data: {{max_bad_rows: 1.0, train: [{{path: DIR/glaive_toolcall_en_demo.json}}]}}
optimizer: {{type: muon, lr: 0.01}}
trainer: {{learning_rate: 1.0e-3, {TRAINER}, max_steps: 40, packing: true, per_device_train_batch_size: 16, activation_checkpointing: false}}
"""
FINE_TUNED = f"""stage: sft
model: {{from: midtrain, attn_implementation: eager}}
data: {{max_bad_rows: 1.0, train: [TRAIN], eval: [EVAL]}}
trainer: {{learning_rate: RATE, {TRAINER}, max_steps: STEPS, eval_strategy: steps, eval_steps: EVERY, packing: true,
  per_device_train_batch_size: 8, activation_checkpointing: false, save_steps: 1000}}
"""


def write_recipe(folder: Path, real: str | None, steps: int, rates: list[float], ranks: list[int]) -> list[str]:
    """The recipe of all variants; returns their names."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "stage_configs" / "micro", folder)
    (folder / "dpo.yaml").unlink()
    train, held_out = "{path: tinyworld/sft, limit: 4000}", "{path: tinyworld/sft}"
    if real:
        (folder / "pretrain.yaml").write_text(TEXT.replace("DIR", real))
        (folder / "midtrain.yaml").write_text(TURNS.replace("DIR", real))
        tokenizer = "stage: tokenizer\ntokenizer: {vocab_size: 2048}\ndata: {train: [{path: DIR/wikitext2_valid.txt}, {path: DIR/c4_demo.jsonl}]}\n"
        (folder / "tokenizer.yaml").write_text(tokenizer.replace("DIR", real))
        train = f"{{path: {real}/alpaca_en_demo.json}}, {{path: {real}/gsm8k_train.jsonl}}"
        held_out = train
    text = FINE_TUNED.replace("TRAIN", train).replace("EVAL", held_out)
    text = text.replace("STEPS", str(steps)).replace("EVERY", str(steps // 4))
    variants = {}
    for rate in rates:
        variants[f"full_{rate:g}"] = text.replace("RATE", str(rate))
        variants[f"inner_{rate:g}"] = variants[f"full_{rate:g}"] + "regularize: {freeze_embeddings: true}\n"
    for rank in ranks:
        for rate in [10 * rate for rate in rates]:
            adapter = f"adapter: {{preset: lora_without_regret, r: {rank}}}\n"
            variants[f"r{rank}_{rate:g}"] = text.replace("RATE", str(rate)) + adapter
    same = f"adapter: {{preset: lora_without_regret, r: {ranks[-1]}}}\n"
    variants[f"r{ranks[-1]}_{rates[0]:g}"] = text.replace("RATE", str(rates[0])) + same
    for name, stage in variants.items():
        (folder / f"{name}.yaml").write_text(stage)
    (folder / "sft.yaml").unlink()
    names = ", ".join(["tokenizer", "pretrain", "midtrain", *variants])
    (folder / "pipeline.yaml").write_text(f"name: lora\nstages: [{names}]\nevaluate: {{samples: 0}}\n")
    return list(variants)


def row(run: Path, name: str, steps: int) -> str:
    """One line of the table: what trained, the rate, and the held-out loss after a quarter, a half and all of the steps."""
    lines = [json.loads(line) for line in (run / name / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    kind, _, rate = name.partition("_")
    weights = run / name / "adapter" / "adapter_model.safetensors"
    size = (weights if weights.is_file() else run / name / "model.safetensors").stat().st_size / 4
    shown = " | ".join(f"{losses[step]:.3f}" for step in (steps // 4, steps // 2, steps))
    what = {"full": "full", "inner": "full, embeddings frozen"}.get(kind) or f"LoRA, r {kind[1:]}"
    return f"| {what} | {size / 1e3:,.0f} | {float(rate):g} | {shown} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--real", metavar="DIR", help="a folder of public slices, as the recipe real-small has them")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3], help="of full fine-tuning")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4, 16, 64])
    options = parser.parse_args()
    real = str(Path(options.real).resolve()) if options.real else None
    names = write_recipe(options.out / "recipe", real, options.steps, options.rates, options.ranks)
    run = options.out / "run"
    done = subprocess.run([sys.executable, "-m", "hfpipe", "run", options.out / "recipe", "--out", run])
    if done.returncode:
        sys.exit(done.returncode)  # told already
    quarter, half, whole = options.steps // 4, options.steps // 2, options.steps
    print(f"| trained | thousand parameters | learning rate | loss at step {quarter} | {half} | {whole} |")
    print("|---|---|---|---|---|---|")
    for name in names:
        print(row(run, name, options.steps))


if __name__ == "__main__":
    main()
