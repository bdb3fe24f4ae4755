"""Training time of a stage against the bare upstream trainer with the same arguments and rows, alternating in one process.

    python benchmarks/trainer_overhead.py runs/tiny --recipe tiny --stage sft [--steps 40] [--rounds 12] [--packing]

`RUN` is a finished run of the recipe. Both sides see the same packed rows, model, seed and batch; the figure is the
ratio of `train_runtime`, hfpipe to bare, pair by pair, each side first in every other pair, with a 95% interval of the mean
(bootstrap of the pairs' logarithms). `--packing` adds TRL's SFT with its own packing and collator.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from pathlib import Path

from hfpipe.config import load_recipe
from hfpipe.stages import stage_module, stage_types
from hfpipe.training.job import Progress, make_job


def job_in(folder: Path, options: argparse.Namespace):
    overrides = [f"{options.stage}.trainer.max_steps={options.steps}", f"{options.stage}.trainer.save_steps=100000"]
    # What upstream does not have is left out on both sides: Muon and frozen rows.
    overrides += [f"{options.stage}.optimizer=null", f"{options.stage}.regularize=null"]
    # The rehearsal is a few seconds before the first step, whatever the length, and blocks would be compiled on one side.
    overrides += [f"{options.stage}.guards={{rehearse: false}}", f"{options.stage}.model.compile_blocks=false"]
    recipe = load_recipe(options.recipe, stage_types(), overrides)
    stage = recipe.stages[options.stage]
    parent = recipe.parent(stage).name
    folder.mkdir()
    (folder / parent).symlink_to((options.run / parent).resolve())
    job = make_job(recipe, stage, folder)
    job.start(print)
    return job


def ours(folder: Path, options: argparse.Namespace) -> float:
    job = job_in(folder, options)
    return stage_module(options.stage).train(job, Progress(folder / "events.jsonl"))["train_runtime_s"]


def bare(folder: Path, options: argparse.Namespace, own_packing: bool = False) -> float:
    """What one would write by hand around the upstream class."""
    import trl
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, set_seed

    from hfpipe.training.collate import PackedCollator
    from hfpipe.training.fit import construct_args

    job = job_in(folder, options)
    tokenizer = AutoTokenizer.from_pretrained(job.parent_path)
    data = stage_module(options.stage).prepare(job, tokenizer)
    sft = job.stage.type.trainer == "trl.SFTConfig"
    extra = {"packing": own_packing, "dataset_kwargs": {"skip_prepare_dataset": True}} if sft else {}
    args = construct_args(
        job.stage, str(folder / "bare"), seed=0, **extra, **({} if sft else {"remove_unused_columns": False})
    )
    set_seed(0)
    attention = job.stage.model.attn_implementation
    if job.stage.model.config:
        config = AutoConfig.for_model(**{**job.stage.model.config, "vocab_size": len(tokenizer)})
        model = AutoModelForCausalLM.from_config(config, dtype="float32", attn_implementation=attention)
    else:
        model = AutoModelForCausalLM.from_pretrained(job.parent_path, dtype="float32", attn_implementation=attention)
    collator = None if own_packing else PackedCollator(tokenizer.pad_token_id)
    trainer = (trl.SFTTrainer if sft else Trainer)(
        model, args, data_collator=collator, train_dataset=data.train, processing_class=tokenizer
    )
    return trainer.train().metrics["train_runtime"]


def interval(ratios: list[float]) -> tuple[float, float]:
    """95% of the geometric mean."""
    rng = random.Random(0)
    means = sorted(statistics.geometric_mean(rng.choices(ratios, k=len(ratios))) for _ in range(10_000))
    return means[250], means[9749]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--stage", default="sft", choices=["pretrain", "midtrain", "sft"])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--packing", action="store_true")
    options = parser.parse_args()
    ratios, packed = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds + 1):
            times = {}
            for name, measure in (("ours", ours), ("bare", bare))[:: -1 if number % 2 else 1]:
                times[name] = measure(Path(folder) / f"{name}-{number}", options)
            own = bare(Path(folder) / f"packed-{number}", options, own_packing=True) if options.packing else 0.0
            if number:  # the first round warms up
                ratios.append(times["ours"] / times["bare"])
                packed.append(own / times["bare"])
                more = f"  TRL's packing {own:.2f} s" if own else ""
                print(
                    f"hfpipe {times['ours']:.2f} s  bare {times['bare']:.2f} s  ratio {ratios[-1]:.3f}{more}",
                    flush=True,
                )
    low, high = interval(ratios)
    print(
        f"hfpipe / bare, {len(ratios)} pairs: mean {statistics.geometric_mean(ratios):.3f} ({low:.3f} to {high:.3f}), "
        f"median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}"
    )
    if options.packing:
        print(f"TRL's own packing and collator / bare: median {statistics.median(packed):.3f}")


if __name__ == "__main__":
    main()
