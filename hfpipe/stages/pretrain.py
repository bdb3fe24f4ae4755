"""pretrain: language. transformers' Trainer on packed documents, from scratch or onwards from a model.

accelerate launch -m hfpipe.stages.pretrain stage_configs/tiny/pretrain.yaml trainer.learning_rate=1e-3
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hfpipe.errors import UserError
from hfpipe.sections import Anneal, ExtendTokenizer, Guards, Model, Optimizer, Regularize, StageType, TextData

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
        "regularize": Regularize,
        "anneal": Anneal,
        "guards": Guards,
    },
    rows="text",
    trainer="transformers.TrainingArguments",
)


def prepare(job: Job, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Documents packed into rows of `data.max_length` tokens; longer ones are cut into several rows, nothing is lost."""
    from hfpipe.training.prepare import prepare_rows
    from hfpipe.training.streams import stream_rows

    make = stream_rows if job.stage.data.streaming else prepare_rows
    return make(job, tokenizer, max_length=job.stage.data.max_length, packing=True)


def train(job: Job, progress: Progress) -> dict[str, Any]:
    """Train on text and leave the model in the job's working folder; returns the metrics."""
    from transformers import Trainer, TrainingArguments, set_seed

    from hfpipe.training.adapters import build_trainer
    from hfpipe.training.anneal import begin_where_parent_stood
    from hfpipe.training.fit import build_args, build_collator, fit
    from hfpipe.training.models import load_model, load_tokenizer
    from hfpipe.training.order import in_order
    from hfpipe.training.streams import tell_streamed

    tokenizer = load_tokenizer(job)
    data = prepare(job, tokenizer)
    # A stream's batches are made in each process: rows of unequal width cannot be dispatched from the first.
    dispatch = {"accelerator_config": {"dispatch_batches": False}} if job.stage.data.streaming else {}
    args = build_args(job, TrainingArguments, progress, remove_unused_columns=False, **dispatch)
    _set_batch(job, args, progress)
    begin_where_parent_stood(job, args, data, progress)
    data = in_order(job, data, args, progress)
    set_seed(args.seed)
    model = load_model(job, tokenizer, progress)
    trainer = build_trainer(
        job,
        progress,
        Trainer,
        model,
        args,
        data_collator=build_collator(job, model, tokenizer, packing=True),
        train_dataset=data.train,
        eval_dataset=data.eval,
        processing_class=tokenizer,
    )
    metrics = fit(job, trainer, data, progress)
    return {**metrics, "streamed": tell_streamed(job, progress)} if job.stage.data.streaming else metrics


def _set_batch(job: Job, args: Any, progress: Progress) -> None:
    """`data.batch_tokens`, of all processes together, as rows of a pass and gradient accumulation steps."""
    data, given = job.stage.data, args.per_device_train_batch_size
    if data.batch_tokens is None:
        return
    rows, rest = divmod(data.batch_tokens, data.max_length * args.world_size)
    if rest or not rows:
        unit = data.max_length * args.world_size
        raise UserError(
            f"{job.stage.file}: data.batch_tokens = {data.batch_tokens} is not a multiple of {unit} tokens: one row of "
            f"data.max_length {data.max_length} in each of {args.world_size} processes. Take {max(rows, 1) * unit}."
        )
    size = next(n for n in range(min(given, rows), 0, -1) if rows % n == 0)
    args.per_device_train_batch_size, args.gradient_accumulation_steps = size, rows // size
    lowered = f", per_device_train_batch_size lowered from {given}" if size < given else ""
    progress.note(
        f"batch: {data.batch_tokens:,} tokens = {args.world_size} x {size} rows of {data.max_length} x {rows // size} "
        f"accumulated{lowered}"
    )


if __name__ == "__main__":
    from hfpipe.stages._run import main

    main(TYPE)
