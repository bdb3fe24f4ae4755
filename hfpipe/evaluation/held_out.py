"""What reinforcement has gained: the answers to held-out prompts and their rewards, before and after."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hfpipe.evaluation.compare import paired
from hfpipe.evaluation.intervals import interval

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class HeldOut:
    """What the answers to held-out prompts were worth.

    `rewards`: of each prompt (NaN: none), in upstream's order, which is the same at every evaluation; `length`: tokens of an
    answer, the mean.
    """

    rewards: list[float]
    length: float

    def summary(self, before: HeldOut | None = None) -> dict[str, Any]:
        """`n`, `reward` with its 95% interval `low` to `high`, `mean_length`; with `before` the `gain`, prompt by prompt."""
        scored = [reward for reward in self.rewards if not math.isnan(reward)]
        low, high = interval(scored)
        found = {
            "n": len(scored),
            "reward": sum(scored) / len(scored),
            "low": low,
            "high": high,
            "mean_length": self.length,
        }
        rounded = {name: round(value, 4) for name, value in found.items()}
        if before is None:
            return rounded
        both = [pair for pair in zip(before.rewards, self.rewards, strict=True) if not any(map(math.isnan, pair))]
        return {**rounded, "gain": paired(*zip(*both, strict=True))} if both else rounded


def held_out_reward(trainer: Any, prompts: Dataset | None) -> HeldOut | None:
    """What the answers to held-out prompts are worth now; None where none had a reward."""
    if prompts is None:
        return None
    found = trainer.evaluate()
    several = trainer.num_generations_eval  # answers to a prompt, one after the other; processes repeat rows at the end
    rewards = torch.cat(trainer.held_out)[: len(prompts) * several].view(-1, several).nanmean(dim=1).tolist()
    if all(map(math.isnan, rewards)):
        return None
    return HeldOut(rewards, found["eval_completions/mean_length"])
