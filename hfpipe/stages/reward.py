"""reward: a score for answers, from pairs. TRL's RewardTrainer; one number at the conversation's last token.

accelerate launch -m hfpipe.stages.reward stage_configs/tiny/reward.yaml trainer.learning_rate=5e-5
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hfpipe.sections import Data, Guards, Model, Optimizer, Regularize, StageType

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hfpipe.training.job import Job, Progress
    from hfpipe.training.prepare import Prepared

TYPE = StageType(
    name="reward",
    teaches="a score for answers",
    leaves="reward_model",
    parents=("model",),
    sections={"model": Model, "data": Data, "optimizer": Optimizer, "regularize": Regularize, "guards": Guards},
    rows="preference",
    trainer="trl.RewardConfig",
    adapter=True,
    managed={
        "dataset_num_proc": "hfpipe renders the rows itself, once, before training",
        "chat_template_path": "the parent's own template is used",
        "eos_token": "the chat template decides what ends a turn",
        "pad_token": "the tokenizer has its own",
        "model_init_kwargs": "set model.dtype or model.attn_implementation",
    },
)


def prepare(job: Job, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Pairs as token ids: the prompt, each answer, and what the template writes after it: the score is read at the end."""
    from hfpipe.plan.workload import option
    from hfpipe.training.prepare import prepare_rows

    return prepare_rows(job, tokenizer, max_length=option(job.stage, "max_length"), packing=False)


def train(job: Job, progress: Progress) -> dict[str, Any]:
    """Train the parent with a new head of one number; returns the metrics."""
    from transformers import set_seed
    from trl import RewardConfig, RewardTrainer

    from hfpipe.training.adapters import build_trainer
    from hfpipe.training.collate import PairCollator
    from hfpipe.training.fit import build_args, fit
    from hfpipe.training.models import load_reward_model, load_tokenizer
    from hfpipe.training.order import in_order

    tokenizer = load_tokenizer(job)
    data = prepare(job, tokenizer)
    # Longer pairs are left out already, and the collator takes columns that upstream does not know.
    args = build_args(job, RewardConfig, progress, max_length=None, remove_unused_columns=False)
    data = in_order(job, data, args, progress)
    set_seed(args.seed)
    trainer = build_trainer(
        job,
        progress,
        RewardTrainer,
        load_reward_model(job, tokenizer, progress),
        args=args,
        data_collator=PairCollator(tokenizer.pad_token_id),
        train_dataset=data.train,
        eval_dataset=data.eval,
        processing_class=tokenizer,
    )
    return fit(job, trainer, data, progress)


if __name__ == "__main__":
    from hfpipe.stages._run import main

    main(TYPE)
