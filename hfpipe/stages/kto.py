"""kto: preferences from single answers, each labelled good or bad. TRL's KTOTrainer; the reference is the parent.

accelerate launch -m hfpipe.stages.kto stage_configs/mine/kto.yaml trainer.beta=0.2
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hfpipe.sections import Data, Guards, Model, Optimizer, Regularize, StageType

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hfpipe.training.job import Job, Progress
    from hfpipe.training.prepare import Prepared

TYPE = StageType(
    name="kto",
    teaches="preferences, from answers judged one by one",
    leaves="model",
    parents=("model",),
    sections={"model": Model, "data": Data, "optimizer": Optimizer, "regularize": Regularize, "guards": Guards},
    rows="unpaired",
    trainer="trl.KTOConfig",
    adapter=True,
    managed={
        "dataset_num_proc": "hfpipe renders the rows itself, once, before training",
        "train_sampling_strategy": "upstream reads the rows in their order, which hfpipe has shuffled",
        "data_seed": "the order of rows is drawn by the recipe's seed",
        "model_init_kwargs": "set model.dtype or model.attn_implementation",
    },
)


def prepare(job: Job, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Judged answers as token ids; of a preference the better answer is a good one and the other a bad one."""
    from hfpipe.plan.workload import option
    from hfpipe.training.prepare import prepare_rows

    return prepare_rows(job, tokenizer, max_length=option(job.stage, "max_length"), packing=False)


def train(job: Job, progress: Progress) -> dict[str, Any]:
    """Train against the parent as reference; returns the metrics, held-out answers before and after among them."""
    from transformers import set_seed
    from trl import KTOConfig, KTOTrainer

    from hfpipe.training.adapters import build_trainer
    from hfpipe.training.fit import build_args, fit, scores_before
    from hfpipe.training.models import load_model, load_tokenizer
    from hfpipe.training.order import in_order

    class PreparedKTOTrainer(KTOTrainer):
        """Takes rows that hold token ids already (TRL 1.16 would render them again from messages)."""

        def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, *rest: Any) -> Any:
            if not self.calculate_KL:
                return dataset
            size = args.per_device_train_batch_size  # another's answer of the same batch, as TRL has it
            return dataset.map(_rotated, batched=True, batch_size=size, keep_in_memory=True)

    tokenizer = load_tokenizer(job)
    data = prepare(job, tokenizer)
    if len(labels := set(data.train["label"])) == 1:
        kind, other = ("good", "bad") if labels == {True} else ("bad", "good")
        progress.note(
            f"warning: every answer of data.train is {kind}, so nothing is learnt of {other} ones [one_sided]"
        )
    precompute = job.stage.trainer.get("precompute_ref_log_probs", job.stage.adapter is None)
    args = build_args(job, KTOConfig, progress, precompute_ref_log_probs=precompute)
    data = in_order(job, data, args, progress)
    set_seed(args.seed)
    model = load_model(job, tokenizer, progress)
    progress.tell("doing", text="log-probabilities of the reference")
    trainer = build_trainer(
        job,
        progress,
        PreparedKTOTrainer,
        model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.eval,
        processing_class=tokenizer,
    )
    before = _held_out(trainer, data) if scores_before(trainer, progress) else None
    metrics = fit(job, trainer, data, progress)
    return {**metrics, "answers_before": before, "answers": _held_out(trainer, data)}


def _rotated(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    answers = rows["completion_ids"]
    return {"KL_completion_ids": [answers[-1], *answers[:-1]]}


def _held_out(trainer: Any, data: Prepared) -> dict[str, float] | None:
    """Loss and implicit rewards of the held-out answers; before training every reward is 0."""
    if data.eval is None:
        return None
    found = trainer.evaluate()
    names = {"loss": "eval_loss", "good": "eval_rewards/chosen", "bad": "eval_rewards/rejected", "kl": "eval_kl"}
    return {"n": len(data.eval), **{name: round(found[key], 4) for name, key in names.items() if key in found}}


if __name__ == "__main__":
    from hfpipe.stages._run import main

    main(TYPE)
