"""pretrain: language. transformers' Trainer on packed documents, from scratch or onwards from a model.

accelerate launch -m hfpipe.stages.pretrain stage_configs/tiny/pretrain.yaml trainer.learning_rate=1e-3
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hfpipe.errors import UserError
from hfpipe.sections import ExtendTokenizer, Freeze, Model, Optimizer, StageType, TextData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hfpipe.training.job import Job, Progress
    from hfpipe.training.prepare import Prepared

TYPE = StageType(
    name="pretrain",
    teaches="language",
    leaves="model",
    parents=("tokenizer", "model"),
    sections={
        "model": Model,
        "tokenizer": ExtendTokenizer,
        "data": TextData,
        "optimizer": Optimizer,
        "freeze": Freeze,
    },
    rows="text",
    trainer="transformers.TrainingArguments",
)


def prepare(job: Job, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Documents packed into rows of `data.max_length` tokens; longer ones are cut into several rows, nothing is lost."""
    from hfpipe.training.prepare import prepare_rows, stream_rows

    make = stream_rows if job.stage.data.streaming else prepare_rows
    return make(job, tokenizer, max_length=job.stage.data.max_length, packing=True)


def train(job: Job, progress: Progress) -> dict[str, Any]:
    """Train on text and leave the model in the job's working folder; returns the metrics."""
    from transformers import Trainer, TrainingArguments, set_seed

    from hfpipe.training.fit import build_args, build_collator, fit
    from hfpipe.training.models import load_model, load_tokenizer

    tokenizer = load_tokenizer(job)
    data = prepare(job, tokenizer)
    # A stream's batches are made in each process: rows of unequal width cannot be dispatched from the first.
    dispatch = {"accelerator_config": {"dispatch_batches": False}} if job.stage.data.streaming else {}
    args = build_args(job, TrainingArguments, progress, remove_unused_columns=False, **dispatch)
    _set_batch(job, args, progress)
    set_seed(args.seed)
    model = load_model(job, tokenizer, progress)
    trainer = Trainer(
        model,
        args,
        data_collator=build_collator(job, model, tokenizer, packing=True),
        train_dataset=data.train,
        eval_dataset=data.eval,
        processing_class=tokenizer,
    )
    return fit(job, trainer, data, progress)


def _set_batch(job: Job, args: Any, progress: Progress) -> None:
    """`data.batch_tokens` as gradient accumulation steps."""
    data = job.stage.data
    if data.batch_tokens is None:
        return
    per_pass = data.max_length * args.per_device_train_batch_size * args.world_size
    steps, rest = divmod(data.batch_tokens, per_pass)
    if rest or not steps:
        raise UserError(
            f"{job.stage.file}: data.batch_tokens = {data.batch_tokens} is not a multiple of the {per_pass} tokens of one "
            f"pass (data.max_length {data.max_length} x trainer.per_device_train_batch_size "
            f"{args.per_device_train_batch_size} x {args.world_size} processes). Take {max(steps, 1) * per_pass}."
        )
    args.gradient_accumulation_steps = steps
    progress.note(f"batch: {data.batch_tokens:,} tokens = {steps} x {per_pass:,}")


if __name__ == "__main__":
    from hfpipe.stages._run import main

    main(TYPE)
