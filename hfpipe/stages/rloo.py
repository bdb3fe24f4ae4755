"""rloo: as grpo, by TRL's RLOOTrainer: each completion against the mean of the others (REINFORCE, leave one out).

accelerate launch -m hfpipe.stages.rloo stage_configs/mine/rloo.yaml trainer.num_generations=4
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from hfpipe.stages import grpo

if TYPE_CHECKING:
    from hfpipe.training.job import Job, Progress

TYPE = dataclasses.replace(grpo.TYPE, name="rloo", trainer="trl.RLOOConfig")

prepare = grpo.prepare


def train(job: Job, progress: Progress) -> dict[str, Any]:
    """As grpo's."""
    from trl import RLOOConfig, RLOOTrainer

    from hfpipe.training.reinforce import Steered

    class SteeredRLOOTrainer(Steered, RLOOTrainer):
        """Upstream's, with the control."""

    return grpo.train_by_rewards(job, progress, SteeredRLOOTrainer, RLOOConfig)


if __name__ == "__main__":
    from hfpipe.stages._run import main

    main(TYPE)
