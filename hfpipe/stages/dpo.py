"""dpo: preferences, directly. TRL's DPOTrainer; the reference is the parent, its log-probabilities computed once.

accelerate launch -m hfpipe.stages.dpo stage_configs/tiny/dpo.yaml trainer.beta=0.2
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hfpipe.adapter_types import starts_as_no_change
from hfpipe.errors import UserError
from hfpipe.sections import Data, Guards, Model, Optimizer, Regularize, StageType

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hfpipe.training.job import Job, Progress
    from hfpipe.training.prepare import Prepared

_LOOKED_AT = 64  # training pairs, where there are no held-out ones
_NEAR_ZERO_NATS = 0.5  # rounding in bfloat16 leaves a few hundredths

TYPE = StageType(
    name="dpo",
    teaches="preferences, directly",
    leaves="model",
    parents=("model",),
    sections={"model": Model, "data": Data, "optimizer": Optimizer, "regularize": Regularize, "guards": Guards},
    rows="preference",
    trainer="trl.DPOConfig",
    adapter=True,
    managed={
        "dataset_num_proc": "hfpipe renders the rows itself, once, before training",
        "pad_token": "the tokenizer has its own",
        "padding_free": "not available in the installed TRL",
        "truncation_mode": "a pair longer than max_length is counted and left out, never cut",
        "model_init_kwargs": "set model.dtype or model.attn_implementation",
    },
)


def prepare(job: Job, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Pairs as token ids: the prompt, and what the assistant says in each answer with the token that ends its turn."""
    from hfpipe.plan.workload import option
    from hfpipe.training.prepare import prepare_rows

    return prepare_rows(job, tokenizer, max_length=option(job.stage, "max_length"), packing=False)


def train(job: Job, progress: Progress) -> dict[str, Any]:
    """Train against the parent as reference; returns the metrics, held-out pairs before and after among them."""
    from datasets import concatenate_datasets
    from transformers import set_seed
    from trl import DPOConfig, DPOTrainer

    from hfpipe.training.adapters import build_trainer
    from hfpipe.training.fit import build_args, fit, scores_before
    from hfpipe.training.models import load_model, load_tokenizer
    from hfpipe.training.order import in_order, lengths

    class PreparedDPOTrainer(DPOTrainer):
        """Takes rows that hold token ids already (TRL 1.16 would render them again from messages)."""

        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
            """Upstream's, with pairs of like length in a batch: as they lie, two fifths of what it reads are padding."""
            sizes = lengths(dataset, job.stage.model.share_prefixes)
            order = sorted(range(len(dataset)), key=sizes.__getitem__, reverse=True)
            found = super()._precompute_ref_logps(dataset.select(order), name, batch_size)
            places = sorted(range(len(order)), key=order.__getitem__)
            added = found.select_columns([c for c in found.column_names if c not in dataset.column_names])
            return concatenate_datasets([dataset, added.select(places).flatten_indices()], axis=1)

    tokenizer = load_tokenizer(job)
    data = prepare(job, tokenizer)
    # With an adapter the base is the reference; without, one pass over the pairs replaces a second model in memory.
    precompute = job.stage.trainer.get("precompute_ref_log_probs", job.stage.adapter is None)
    args = build_args(job, DPOConfig, progress, precompute_ref_log_probs=precompute)
    data = in_order(job, data, args, progress)
    set_seed(args.seed)
    model = load_model(job, tokenizer, progress)
    progress.tell("doing", text="log-probabilities of the reference")
    trainer = build_trainer(
        job,
        progress,
        PreparedDPOTrainer,
        model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.eval,
        processing_class=tokenizer,
    )
    before = _scores(trainer, data) if scores_before(trainer, progress) else None
    if before is None:
        pass  # its margin is in the first line of the log
    elif job.stage.adapter is None or starts_as_no_change(job.stage.adapter):
        _check_reference(job, before["margin"], args.beta)
    else:
        progress.note(f"before training the margin is {before['margin']}: untrained virtual tokens change the model")
    metrics = fit(job, trainer, data, progress)
    if data.eval is None:
        return metrics
    if before is not None:
        del before["accuracy"]  # every pair is a tie
        metrics["pairs_before"] = before
    return {**metrics, "pairs": _scores(trainer, data)}


def _scores(trainer: Any, data: Prepared) -> dict[str, float]:
    """Loss, accuracy and margin by the implicit reward, beta times the log-ratio to the reference.

    Of the held-out pairs; where there are none, of some training pairs.
    """
    pairs = data.train.select(range(min(len(data.train), _LOOKED_AT))) if data.eval is None else data.eval
    found = trainer.evaluate(pairs if data.eval is None else None)
    names = {"loss": "eval_loss", "accuracy": "eval_rewards/accuracies", "margin": "eval_rewards/margins"}
    return {"n": len(pairs), **{name: round(found[key], 4) for name, key in names.items()}}


def _check_reference(job: Job, margin: float, beta: float) -> None:
    """UserError where policy and reference disagree before training: what follows would not be DPO."""
    if abs(margin) > _NEAR_ZERO_NATS * beta:
        raise UserError(
            f"{job.stage.file}: before training the mean margin between chosen and rejected is {margin:.3f}, not 0: the "
            f"reference is another model than the one that training starts from. Adapters must start as no change at all "
            f"(adapter.init_lora_weights: true), and the parent must not change while it is loaded."
        )


if __name__ == "__main__":
    from hfpipe.stages._run import main

    main(TYPE)
