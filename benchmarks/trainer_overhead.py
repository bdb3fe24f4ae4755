"""Training time of a stage against the bare upstream trainer with the same arguments and rows, alternating in one process.

    python benchmarks/trainer_overhead.py runs/tiny --recipe tiny --stage sft [--steps 40] [--rounds 5] [--packing]

`RUN` is a finished run of the recipe. Both sides see the same packed rows, model, seed and batch; the figure is the
ratio of `train_runtime`, hfpipe to bare, pair by pair. `--packing` adds TRL's SFT with its own packing and collator.
"""

from __future__ import annotations

import argparse
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
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, set_seed

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
    model = AutoModelForCausalLM.from_pretrained(job.parent_path, dtype="float32", attn_implementation=attention)
    collator = None if own_packing else PackedCollator(tokenizer.pad_token_id)
    trainer = (trl.SFTTrainer if sft else Trainer)(
        model, args, data_collator=collator, train_dataset=data.train, processing_class=tokenizer
    )
    return trainer.train().metrics["train_runtime"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--stage", default="sft", choices=["midtrain", "sft"])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--packing", action="store_true")
    options = parser.parse_args()
    ratios, packed = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds + 1):
            times = []
            for name, measure in (("ours", ours), ("bare", bare)):
                times.append(measure(Path(folder) / f"{name}-{number}", options))
            own = bare(Path(folder) / f"packed-{number}", options, own_packing=True) if options.packing else 0.0
            if number:  # the first round warms up
                ratios.append(times[0] / times[1])
                packed.append(own / times[1])
                more = f"  TRL's packing {own:.2f} s" if own else ""
                print(f"hfpipe {times[0]:.2f} s  bare {times[1]:.2f} s  ratio {ratios[-1]:.3f}{more}", flush=True)
    print(f"hfpipe / bare: median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")
    if options.packing:
        print(f"TRL's own packing and collator / bare: median {statistics.median(packed):.3f}")


if __name__ == "__main__":
    main()
