"""distill: a teacher's next-token distributions, on the student's own answers (on-policy). TRL's DistillationTrainer.

accelerate launch -m hfpipe.stages.distill stage_configs/mine/distill.yaml trainer.beta=0.5
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hfpipe.errors import UserError
from hfpipe.sections import Model, PromptData, Regularize, StageType
from hfpipe.stages import grpo

if TYPE_CHECKING:
    from hfpipe.training.job import Job, Progress

TYPE = StageType(
    name="distill",
    teaches="what a teacher would say next, on its own answers",
    leaves="model",
    parents=("model",),
    sections={"model": Model, "data": PromptData, "regularize": Regularize},
    rows="prompt",
    trainer="trl.DistillationConfig",
    adapter=True,
    managed={
        "model_init_kwargs": "set model.dtype or model.attn_implementation",
        "teacher_model_init_kwargs": "the teacher is loaded as it is stored",
        "teacher_model_revision": "write trainer.teacher_model_name_or_path: org/model@revision",
        "trust_remote_code": "set model.trust_remote_code",
        "train_sampling_strategy": "a rollout repeats its prompts by upstream's own sampler; data.curriculum orders them",
        "log_completions": "samples.jsonl keeps some answers",
    },
)

prepare = grpo.prepare


def train(job: Job, progress: Progress) -> dict[str, Any]:
    """Let the student answer and draw it to the teacher's distribution; the divergence on held-out prompts is told."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from trl import DistillationConfig, DistillationTrainer

    from hfpipe.training.adapters import build_trainer, load_pretrained
    from hfpipe.training.fit import build_args, fit, scores_before
    from hfpipe.training.models import load_model, load_tokenizer
    from hfpipe.training.reinforce import WithTools, as_prompts

    class Distillation(WithTools, DistillationTrainer):
        """Upstream's; a prompt shows its row's tools."""

    where = f"{job.stage.file}: trainer.teacher_model_name_or_path"
    tokenizer, folder = load_tokenizer(job), job.guide_path()
    try:
        teacher, own = load_pretrained(AutoModelForCausalLM, folder), AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: no model in {folder}: {str(error).splitlines()[0]}") from None
    if own.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"{where} = {job.stage.guide[1]!r} has another vocabulary than the student, so their distributions can't be "
            "compared. Take a teacher with the same tokenizer, or train on its answers: hfpipe data synth."
        )
    data = prepare(job, tokenizer)
    rows = job.stage.trainer.get("per_device_train_batch_size", 8)
    given = job.stage.trainer.get("per_device_eval_batch_size", rows)
    args = build_args(job, DistillationConfig, progress, per_device_eval_batch_size=given)
    set_seed(args.seed)
    trainer = build_trainer(
        job,
        progress,
        Distillation,
        load_model(job, tokenizer, progress),
        args=args,
        teacher_model=teacher,
        train_dataset=as_prompts(data.train),
        eval_dataset=as_prompts(data.eval),
        processing_class=tokenizer,
    )

    def divergence() -> dict[str, float] | None:
        """Mean per token of the student's own answers, in nats: the reverse KL with upstream's `beta` 1."""
        set_seed(args.seed)
        return data.eval and {"n": len(data.eval), "divergence": round(trainer.evaluate()["eval_loss"], 4)}

    before = divergence() if scores_before(trainer, progress) else None
    metrics = fit(job, trainer, data, progress)
    return {**metrics, "teacher_before": before, "teacher": divergence()}


if __name__ == "__main__":
    from hfpipe.stages._run import main

    main(TYPE)
