"""grpo: what can be checked, by reinforcement. TRL's GRPOTrainer; several completions of a prompt against each other.

accelerate launch -m hfpipe.stages.grpo stage_configs/mine/grpo.yaml trainer.num_generations=16
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hfpipe.sections import Limits, Model, PromptData, Regularize, Rewards, StageType

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hfpipe.training.job import Job, Progress
    from hfpipe.training.prepare import Prepared

TYPE = StageType(
    name="grpo",
    teaches="what can be checked, by reinforcement",
    leaves="model",
    parents=("model",),
    sections={"model": Model, "data": PromptData, "rewards": Rewards, "limits": Limits, "regularize": Regularize},
    rows="prompt",
    trainer="trl.GRPOConfig",
    adapter=True,
    managed={
        "reward_weights": "set `weight` beside each reward",
        "log_completions": "rollouts.jsonl keeps some completions with their rewards",
        "log_completions_hub_repo": "publishing is not a trainer's work here",
        "train_sampling_strategy": "a rollout repeats its prompts by upstream's own sampler; data.curriculum orders them",
        "auto_find_batch_size": "a rollout must hold whole groups of completions",
        "model_init_kwargs": "set model.dtype or model.attn_implementation",
    },
)


def prepare(job: Job, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Prompts with the rows that they come from; a conversation's own answer is what checks compare with."""
    from hfpipe.training.prepare import prepare_rows

    return prepare_rows(job, tokenizer, max_length=job.stage.data.max_prompt_length, packing=False)


def train(job: Job, progress: Progress) -> dict[str, Any]:
    """Let the parent answer prompts and learn from the rewards; returns the metrics, held-out rewards among them."""
    from trl import GRPOConfig, GRPOTrainer

    from hfpipe.training.reinforce import Steered

    class SteeredGRPOTrainer(Steered, GRPOTrainer):
        """Upstream's, with the control."""

    return train_by_rewards(job, progress, SteeredGRPOTrainer, GRPOConfig)


def train_by_rewards(
    job: Job,
    progress: Progress,
    trainer_class: type,
    config_class: type,
    more: Callable[[list[Any]], dict[str, Any]] = lambda rewards: {},
    kl_per_token: bool = True,
) -> dict[str, Any]:
    """`train` with a trainer that samples completions: GRPO's, RLOO's, PPO's.

    `more` gives further arguments of the trainer for the rewards; `kl_per_token` says what it logs as `kl`.
    """
    from transformers import set_seed

    from hfpipe.evaluation.answers import stop_ids
    from hfpipe.evaluation.held_out import held_out_reward
    from hfpipe.evaluation.reward_functions import build_rewards
    from hfpipe.training.adapters import build_trainer
    from hfpipe.training.fit import build_args, fit, scores_before
    from hfpipe.training.models import load_model, load_tokenizer
    from hfpipe.training.order import in_order
    from hfpipe.training.reinforce import Watched, as_prompts, check_rollouts

    tokenizer = load_tokenizer(job)
    data = prepare(job, tokenizer)
    model = load_model(job, tokenizer, progress)
    rewards, weights = build_rewards(job, tokenizer, stop_ids(model))
    args = build_args(job, config_class, progress, reward_weights=weights, **_held_out(job.stage.trainer))
    data = in_order(job, data, args, progress)
    check_rollouts(job, args, len(data.train))
    set_seed(args.seed)
    trainer = build_trainer(
        job,
        progress,
        trainer_class,
        model,
        rewards,
        args,
        train_dataset=as_prompts(data.train),
        eval_dataset=as_prompts(data.eval),
        processing_class=tokenizer,
        **more(rewards),
    )
    limits = job.stage.sections["limits"]
    if limits.max_kl is not None and not args.beta:
        progress.note("limits.max_kl is not watched: with trainer.beta = 0 there is no reference to measure from")
    trainer.random_reward = job.stage.sections["rewards"].control == "random_reward"
    trainer.add_callback(Watched(job, trainer, limits, kl_per_token))
    before = held_out_reward(trainer, data.eval) if scores_before(trainer, progress) else None
    metrics = fit(job, trainer, data, progress)
    metrics["tokens"] = trainer.state.num_input_tokens_seen
    after = held_out_reward(trainer, data.eval)
    metrics["held_out_before"] = before and before.summary()
    return {**metrics, "held_out": after and after.summary(before)}


def _held_out(given: dict[str, Any]) -> dict[str, Any]:
    """Held-out prompts, unless the recipe says otherwise: one completion each, in batches as large as training's."""
    if "num_generations_eval" in given:
        return {}
    rows = given.get("per_device_eval_batch_size", given.get("per_device_train_batch_size", 8))
    return {"num_generations_eval": 1, "per_device_eval_batch_size": rows}


if __name__ == "__main__":
    from hfpipe.stages._run import main

    main(TYPE)
