"""ppo: preferences, by reinforcement against a reward model. hfpipe's PPOTrainer: TRL's GRPOTrainer with a critic.

accelerate launch -m hfpipe.stages.ppo stage_configs/mine/ppo.yaml trainer.beta=0.1
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from hfpipe.stages import grpo

if TYPE_CHECKING:
    from hfpipe.training.job import Job, Progress

TYPE = dataclasses.replace(
    grpo.TYPE,
    name="ppo",
    teaches="preferences, by reinforcement",
    trainer="hfpipe.training.ppo.PPOConfig",
)

prepare = grpo.prepare


def train(job: Job, progress: Progress) -> dict[str, Any]:
    """As grpo's, with a critic; one of its own starts from the reward model where that has the policy's vocabulary."""
    from peft import PeftModel

    from hfpipe.training.ppo import PPOConfig, PPOTrainer

    def value_model(rewards: list[Any]) -> dict[str, Any]:
        fitting = [reward.model for reward in rewards if getattr(reward, "same_vocabulary", False)]
        whole = [model for model in fitting if not isinstance(model, PeftModel)]
        return {"value_model": whole[0] if whole and job.stage.trainer.get("critic") != "head" else None}

    return grpo.train_by_rewards(job, progress, PPOTrainer, PPOConfig, value_model, kl_per_token=False)


if __name__ == "__main__":
    from hfpipe.stages._run import main

    main(TYPE)
