"""The memory that `hfpipe plan` says a training takes against the peak of the training itself, on a CPU.

python benchmarks/memory_of_training.py [NAME ...] [--allocator hfpipe]

Each combination is a process of its own: imports and a training of a very small model first (what they take is the base),
then three steps of the real one; the peak of the resident set above the base is the measurement. With the default
allocator setting every freed tensor goes back to the system at once, so that the peak is that of the tensors; `hfpipe`
keeps freed memory, as a run on a CPU does.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

LLAMA = {"model_type": "llama", "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408,
         "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4}  # fmt: skip
QWEN3 = {**LLAMA, "model_type": "qwen3", "head_dim": 64, "tie_word_embeddings": True, "vocab_size": 16384}
GEMMA3 = {"model_type": "gemma3_text", "vocab_size": 65536, "hidden_size": 384, "intermediate_size": 1024, "head_dim": 64,
          "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 2, "sliding_window": 4096}  # fmt: skip
GPT2 = {"model_type": "gpt2"}  # the published one, 124M
PLAIN = {"stage": "pretrain", "model": LLAMA, "rows": 8, "length": 256, "dtype": "fp32", "attention": "sdpa"}
LORA = {"type": "lora", "r": 16, "target_modules": "all-linear"}
COMBINATIONS: dict[str, dict[str, Any]] = {
    "pretrain-fp32": PLAIN,
    "pretrain-bf16": {**PLAIN, "dtype": "bf16"},
    "pretrain-fp32-checkpointing": {**PLAIN, "checkpointing": True, "rows": 16},
    "pretrain-bf16-checkpointing": {**PLAIN, "dtype": "bf16", "checkpointing": True, "rows": 16},
    "pretrain-fp32-eager": {**PLAIN, "attention": "eager", "length": 512, "rows": 4},
    "pretrain-bf16-eager": {**PLAIN, "dtype": "bf16", "attention": "eager", "length": 512, "rows": 4},
    "pretrain-muon": {**PLAIN, "optimizer": "muon", "rows": 4},
    "pretrain-adafactor": {**PLAIN, "optimizer": "adafactor", "rows": 4},
    "pretrain-accumulating": {**PLAIN, "accumulate": 2},
    "pretrain-packed": {**PLAIN, "packed": True},
    "pretrain-few-tokens": {**PLAIN, "rows": 1, "length": 128},
    "gpt2-fp32": {**PLAIN, "model": GPT2, "rows": 2},
    "gpt2-sgd-checkpointing": {**PLAIN, "model": GPT2, "rows": 2, "optimizer": "sgd", "checkpointing": True},
    "qwen3-bf16-tied": {**PLAIN, "model": QWEN3, "dtype": "bf16"},
    "gemma3-large-vocabulary": {**PLAIN, "model": GEMMA3, "rows": 4},
    "half-frozen": {**PLAIN, "freeze": 4},
    "sft-fp32": {**PLAIN, "stage": "sft", "packed": True},
    "sft-bf16-checkpointing": {**PLAIN, "stage": "sft", "packed": True, "dtype": "bf16", "checkpointing": True},
    "sft-lora-fp32": {**PLAIN, "stage": "sft", "adapter": LORA},
    "sft-lora-bf16": {**PLAIN, "stage": "sft", "adapter": LORA, "dtype": "bf16"},
    "sft-lora-bf16-stored": {**PLAIN, "stage": "sft", "adapter": LORA, "dtype": "bf16", "stored": 2},
    "sft-qlora-bf16": {**PLAIN, "stage": "sft", "adapter": {**LORA, "type": "qlora"}, "dtype": "bf16"},
    "dpo-fp32": {**PLAIN, "stage": "dpo", "rows": 4},
    "dpo-lora-bf16": {**PLAIN, "stage": "dpo", "rows": 4, "adapter": LORA, "dtype": "bf16"},
    "reward-fp32": {**PLAIN, "stage": "reward", "rows": 4},
}


def planned(spec: dict[str, Any]) -> float:
    """Bytes, by `hfpipe.plan.memory`."""
    from hfpipe.adapter_types import read_adapter
    from hfpipe.plan.memory import Setting, plan_memory
    from hfpipe.plan.shapes import read_shape
    from hfpipe.plan.trained import read_trained
    from hfpipe.sections import Regularize

    pairs, stage = spec["stage"] in ("dpo", "reward"), spec["stage"]
    shape = read_shape(spec["model"], scores=stage == "reward")
    adapter = read_adapter(spec["adapter"], "", []) if spec.get("adapter") else None
    trained = read_trained(shape, Regularize(freeze_layers=spec.get("freeze", 0)), adapter)
    setting = Setting(
        rows=spec["rows"] * (2 if pairs else 1),
        length=spec["length"],
        dtype=spec["dtype"],
        stored=spec.get("stored", 4),
        four_bit=trained.four_bit,
        attention=spec["attention"],
        masked=spec.get("packed", False),  # rows of one length need no mask
        checkpointing=spec.get("checkpointing", False),
        accumulates=spec.get("accumulate", 1) > 1,
        head={"pretrain": "logits", "reward": "score"}.get(stage, "tiles"),
        optimizer=spec.get("optimizer", "adamw_torch_fused"),
        on_cpu=True,
    )
    return plan_memory(shape, trained, setting).peak


def measured(spec: dict[str, Any], allocator: str = "returning", steps: int = 3) -> dict[str, float]:
    """`peak` in bytes, of a process of its own."""
    command = [sys.executable, __file__, "--one", json.dumps(spec), "--allocator", allocator, "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TOKENIZERS_PARALLELISM": "false"})
    if done.returncode:
        raise RuntimeError(f"{spec}\n{done.stdout}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


# --- in the child ---


def one(spec: dict[str, Any], allocator: str, steps: int) -> dict[str, float]:
    from hfpipe.training.hardware import keep_freed_memory, memory_meter

    if allocator == "hfpipe":
        keep_freed_memory()
    else:
        ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: each tensor a mapping of its own
    small = {"hidden_size": 64, "n_embd": 64, "intermediate_size": 96, "num_hidden_layers": 2, "n_layer": 2,
             "num_attention_heads": 4, "n_head": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        fields = {name: value for name, value in small.items() if name in spec["model"] or spec["model"] == GPT2}
        tiny = {
            **spec["model"],
            **{
                n: v
                for n, v in fields.items()
                if (n in ("n_embd", "n_layer", "n_head", "vocab_size")) == (spec["model"] == GPT2) or n == "vocab_size"
            },
        }
        train({**spec, "model": tiny, "rows": 2, "length": 16, "freeze": min(spec.get("freeze", 0), 1)}, folder, 2)
        import gc

        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        taken = memory_meter()
        train(spec, folder, steps)
        return {"peak": taken()}


def train(spec: dict[str, Any], folder: str, steps: int) -> None:
    import torch
    from datasets import Dataset
    from transformers import TrainingArguments
    from trl import DPOConfig, RewardConfig, SFTConfig

    from hfpipe.training.collate import PackedCollator, PairCollator
    from hfpipe.training.regularize import freeze_layers

    torch.manual_seed(0)
    stage, rows, length, vocab = spec["stage"], spec["rows"], spec["length"], spec["model"].get("vocab_size", 50257)
    model, tokenizer = build_model(spec, folder), build_tokenizer(vocab)
    freeze_layers(model, spec.get("freeze", 0), "here")
    accumulate = spec.get("accumulate", 1)
    count = rows * accumulate * steps

    def ids(n: int) -> list[int]:
        return torch.randint(4, vocab, (n,)).tolist()

    if stage in ("dpo", "reward"):
        half = length // 2
        table = [
            {"prompt_ids": ids(half), "chosen_ids": ids(length - half), "rejected_ids": ids(length - half)}
            for _ in range(count)
        ]
        table = [{**row, "chosen_end": [], "rejected_end": []} if stage == "reward" else row for row in table]
    else:
        parts = [length // 2, length - length // 2] if spec.get("packed") else [length]
        table = [{"input_ids": (i := ids(length)), "labels": i, "seq_lengths": parts} for _ in range(count)]
    options: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": accumulate,
        "bf16": spec["dtype"] == "bf16",
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "activation_checkpointing": spec.get("checkpointing", False),
        "logging_steps": 1,
    }
    optimizer = spec.get("optimizer", "adamw_torch_fused")
    if optimizer != "muon":
        options["optim"] = optimizer
    config = {"pretrain": TrainingArguments, "sft": SFTConfig, "dpo": DPOConfig, "reward": RewardConfig}[stage]
    more = {
        "sft": {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None, "packing": False},
        "dpo": {"precompute_ref_log_probs": not spec.get("adapter"), "max_length": None},
        "reward": {"max_length": None},
    }.get(stage, {})
    args = config(**options, **more)
    collator = PairCollator(0) if stage == "reward" else PackedCollator(0) if stage != "dpo" else None
    trainer = build_trainer(spec, model, args, Dataset.from_list(table), tokenizer, collator)
    if optimizer == "muon":
        from hfpipe.sections import Optimizer
        from hfpipe.training.optim import build_muon

        trainer.optimizer = build_muon(trainer.model, Optimizer(type="muon"), args)
    trainer.train()


def build_model(spec: dict[str, Any], folder: str) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    config = AutoConfig.for_model(**{**spec["model"], "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2})
    options = {
        "attn_implementation": spec["attention"],
        "dtype": torch.bfloat16 if spec.get("stored") == 2 else torch.float32,
    }
    if spec["stage"] == "reward":
        config.num_labels = 1
        return AutoModelForSequenceClassification.from_config(config, **options)
    if (spec.get("adapter") or {}).get("type") == "qlora":
        from hfpipe.training.quantised import hold_layout, load_options

        saved = Path(folder) / f"saved-{config.hidden_size}"
        if not saved.is_dir():  # in a process of its own: what making it takes is not training's
            save = "import sys, torch; from transformers import AutoConfig, AutoModelForCausalLM as M; import json; "
            save += "c = AutoConfig.for_model(**json.loads(sys.argv[1])); M.from_config(c, dtype=torch.float32).save_pretrained(sys.argv[2])"
            given = {**spec["model"], "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
            subprocess.run([sys.executable, "-c", save, json.dumps(given), str(saved)], check=True, capture_output=True)
        model = AutoModelForCausalLM.from_pretrained(saved, attn_implementation=spec["attention"], **load_options())
        hold_layout(model)
        return model
    return AutoModelForCausalLM.from_config(config, **options)


def build_tokenizer(vocab: int) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, min(vocab, 64))}}
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")), **names)


def build_trainer(spec: dict[str, Any], model: Any, args: Any, data: Any, tokenizer: Any, collator: Any) -> Any:
    from peft import get_peft_config
    from transformers import Trainer
    from trl import DPOTrainer, RewardTrainer, SFTTrainer

    from hfpipe.training.head import keep_logits_on_cpu

    keep_logits_on_cpu()

    class PreparedDPOTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *rest: Any) -> Any:
            return dataset

    class PreparedRewardTrainer(RewardTrainer):
        def _prepare_dataset(self, dataset: Any, *rest: Any) -> Any:
            return dataset

    kinds = {"pretrain": Trainer, "sft": SFTTrainer, "dpo": PreparedDPOTrainer, "reward": PreparedRewardTrainer}
    options: dict[str, Any] = {"args": args, "train_dataset": data, "processing_class": tokenizer}
    if collator is not None:
        options["data_collator"] = collator
    if adapter := spec.get("adapter"):
        given = {key: value for key, value in adapter.items() if key != "type"}
        options["peft_config"] = get_peft_config({"peft_type": "LORA", "task_type": "CAUSAL_LM", **given})
    trainer = kinds[spec["stage"]](model, **options)
    if spec.get("adapter"):
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="of combinations; default: all")
    parser.add_argument("--allocator", choices=["returning", "hfpipe"], default="returning")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(json.loads(options.one), options.allocator, options.steps)))
        return
    print("| combination | planned, MB | measured, MB | planned / measured |\n|---|---|---|---|")
    ratios = []
    for name in options.names or COMBINATIONS:
        spec = COMBINATIONS[name]
        peak, expected = measured(spec, options.allocator)["peak"], planned(spec)
        ratios.append(expected / peak)
        print(f"| {name} | {expected / 1e6:,.0f} | {peak / 1e6:,.0f} | {ratios[-1]:.3f} |", flush=True)
    close = sum(abs(ratio - 1) <= 0.15 for ratio in ratios)
    print(f"{close} of {len(ratios)} within 15%; {min(ratios):.3f} to {max(ratios):.3f}")


if __name__ == "__main__":
    main()
