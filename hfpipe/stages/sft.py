"""sft: behaviour, by demonstration. TRL's SFTTrainer on conversations; the loss falls on the assistant's words alone.

accelerate launch -m hfpipe.stages.sft stage_configs/tiny/sft.yaml trainer.learning_rate=1e-4
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hfpipe.sections import Data, ExtendTokenizer, Guards, Model, Optimizer, Regularize, StageType

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hfpipe.training.job import Job, Progress
    from hfpipe.training.prepare import Prepared

_PREPARED = "hfpipe renders, masks and packs the rows itself, once, before training"
_MANAGED = {
    "assistant_only_loss": "the loss always falls on what the assistant says",
    "completion_only_loss": "the loss always falls on what the assistant says",
    "dataset_kwargs": _PREPARED,
    "dataset_text_field": _PREPARED,
    "dataset_num_proc": _PREPARED,
    "packing_strategy": _PREPARED,
    "eval_packing": _PREPARED,
    "pad_to_multiple_of": _PREPARED,
    "padding_free": _PREPARED,
    "chat_template_path": "set tokenizer.chat_template",
    "eos_token": "the chat template decides what ends a turn",
    "pad_token": "the tokenizer has its own",
    "model_init_kwargs": "set model.dtype or model.attn_implementation",
}

TYPE = StageType(
    name="sft",
    teaches="behaviour, by demonstration",
    leaves="model",
    parents=("model",),
    sections={
        "model": Model,
        "tokenizer": ExtendTokenizer,
        "data": Data,
        "optimizer": Optimizer,
        "regularize": Regularize,
        "guards": Guards,
    },
    rows="messages",
    trainer="trl.SFTConfig",
    adapter=True,
    managed=_MANAGED,
)


def prepare(job: Job, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Conversations as packed token ids with the assistant's tokens as labels."""
    from hfpipe.plan.workload import option
    from hfpipe.training.prepare import prepare_rows

    max_length, packing = option(job.stage, "max_length"), option(job.stage, "packing")
    return prepare_rows(job, tokenizer, max_length=max_length, packing=packing)


def train(job: Job, progress: Progress) -> dict[str, Any]:
    """Fine-tune the parent and leave the model in the job's working folder; returns the metrics."""
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    from hfpipe.plan.workload import packs
    from hfpipe.training.adapters import build_trainer
    from hfpipe.training.anneal import begin_where_parent_stood
    from hfpipe.training.fit import build_args, build_collator, fit
    from hfpipe.training.models import load_model, load_tokenizer
    from hfpipe.training.order import in_order

    tokenizer = load_tokenizer(job)
    data = prepare(job, tokenizer)
    as_it_is = {"packing": False, "dataset_kwargs": {"skip_prepare_dataset": True}}  # `prepare` has packed it
    args = build_args(job, SFTConfig, progress, **as_it_is)
    begin_where_parent_stood(job, args, data, progress)
    data = in_order(job, data, args, progress)
    set_seed(args.seed)
    model = load_model(job, tokenizer, progress)
    trainer = build_trainer(
        job,
        progress,
        SFTTrainer,
        model,
        args,
        data_collator=build_collator(job, model, tokenizer, packing=packs(job.stage)),
        train_dataset=data.train,
        eval_dataset=data.eval,
        processing_class=tokenizer,
    )
    return fit(job, trainer, data, progress)


if __name__ == "__main__":
    from hfpipe.stages._run import main

    main(TYPE)
