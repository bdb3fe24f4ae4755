"""What grpo, rloo and ppo share: prompts as upstream reads them, rollouts kept with their rewards, limits, a control.

A checkpoint holds no rollout, so none may be written in the midst of one: `check_rollouts`.
"""

from __future__ import annotations

import copy
import json
import math
from collections import UserList
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from hfpipe.errors import UserError
from hfpipe.training.responses import parse_message
from hfpipe.training.rollouts import by_length

if TYPE_CHECKING:
    from datasets import Dataset

    from hfpipe.sections import Limits
    from hfpipe.training.job import Job

ROLLOUTS_FILE = "rollouts.jsonl"
_LIKELIEST = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "min_p": None}
_KEPT_AT_ONCE = 4  # completions of a logging step


class RewardHacked(RuntimeError):
    """The policy has found a way to be rewarded that is not the one that was meant."""


def as_prompts(rows: Dataset | None) -> Dataset | None:
    """Prepared prompts as TRL's trainers read them: `prompt`, `reference` (messages or None) and `row`, the whole row."""
    return None if rows is None else rows.with_transform(_decode)


def _decode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    rows = [json.loads(row) for row in batch["row"]]
    return {
        "prompt": [row["prompt"] for row in rows],
        "reference": [row.get("reference") for row in rows],
        "row": rows,
    }


def check_rollouts(job: Job, args: Any, prompts: int) -> None:
    """UserError where a rollout takes more than the `prompts` there are, or a checkpoint would fall within one."""
    needed = args.generation_batch_size // args.num_generations
    if prompts < needed:
        raise UserError(
            f"{job.stage.file}: data.train has {prompts} prompts, but one rollout takes {needed}, so nothing would be learnt. "
            "Give more rows, a smaller trainer.per_device_train_batch_size, or more trainer.num_generations of each."
        )
    steps = max(args.num_iterations * args.steps_per_generation // args.gradient_accumulation_steps, 1)
    if args.save_strategy == "steps" and (args.save_steps < 1 or args.save_steps % steps):
        raise UserError(
            f"{job.stage.file}: trainer.save_steps = {args.save_steps:g}, but {steps} steps share one rollout, which no "
            f"checkpoint holds. Give a multiple of {steps}, such as {max(round(args.save_steps / steps), 1) * steps}."
        )


class WithTools:
    """Mixed into a trainer of TRL's that samples: a prompt shows the tools of its own row, where upstream knows of one list."""

    _rows: list[dict[str, Any]] | None = None
    _prompt_ids: list[list[int]] | None = None  # of the rows

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._rows = [one["row"] for one in inputs] if "row" in inputs[0] else None
        return super()._generate_and_score_completions(inputs)

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], Any, dict[str, Any]]:
        if self._rows is None:  # not a recipe's: whoever uses a trainer by itself
            return super()._tokenize_prompts(prompts)
        self._prompt_ids = [
            self.processing_class.apply_chat_template(
                prompt,
                tools=row.get("tools") or None,
                add_generation_prompt=True,
                return_dict=True,
                **self.chat_template_kwargs,
            )["input_ids"]
            for prompt, row in zip(prompts, self._rows, strict=True)
        ]
        return self._prompt_ids, None, {}


class Steered(WithTools):
    """A control besides, and completions parsed whatever the trainer.

    `random_reward`: the rewards of a rollout are dealt out at random among its rows.
    """

    random_reward = False
    rewarded: bool | None = None  # whether any completion was, of those that were sampled in training

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.data_collator = UserList  # accelerate walks through lists, string by string, to move tensors
        self.held_out: list[torch.Tensor] = []  # rewards of the last evaluation, a batch each

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Upstream's, of the likeliest answers, as the probes ask for; sampled where vLLM writes them, or several to a prompt."""
        self.held_out = []
        vars(self).pop("_eval_dataloaders", None)  # persistent workers would go on in an order of their own
        sampled = {name: getattr(self, name, None) for name in ("generation_config", "generation_kwargs")}
        if None in sampled.values() or self.num_generations_eval > 1:
            return super().evaluate(*args, **kwargs)
        self.generation_config = copy.deepcopy(self.generation_config)
        self.generation_config.update(**_LIKELIEST)
        self.generation_kwargs = {**self.generation_kwargs, **_LIKELIEST}
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            for name, value in sampled.items():
                setattr(self, name, value)

    def _calculate_rewards(
        self, inputs: list[Any], prompts: list[Any], completions: list[Any], completion_ids_list: list[list[int]]
    ) -> torch.Tensor:
        if self._rows is not None:  # RLOO's are text alone, and GRPO's are parsed without the row's tools
            said = zip(self._prompt_ids, completion_ids_list, self._rows, strict=True)
            completions = [
                [parse_message(self.processing_class, asked, ids, row.get("tools") or None)] for asked, ids, row in said
            ]
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self.model.training:
            self.rewarded = self.rewarded or not bool(rewards.isnan().all())
        else:
            whole = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
            self.held_out.append(whole.masked_fill(rewards.isnan().all(dim=1), math.nan).cpu())
        if not self.random_reward or not self.model.training:
            return rewards  # (rows of all processes, functions)
        generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + self.state.global_step)
        return rewards[torch.randperm(len(rewards), generator=generator).to(rewards.device)]

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if not self.model.training or self._buffered_inputs is before:
            return inputs
        self._buffered_inputs = by_length(self._buffered_inputs, self.args)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]


class Watched(TrainerCallback):
    """Keeps some completions with their rewards in `rollouts.jsonl`, and stops at the recipe's limits.

    `kl_per_token`: what the trainer logs as `kl` is a mean over tokens, not over completions.
    """

    def __init__(self, job: Job, trainer: Any, limits: Limits, kl_per_token: bool):
        self.file, self.trainer, self.limits, self.kl_per_token = job.stage.file, trainer, limits, kl_per_token
        self.path: Path = job.work / ROLLOUTS_FILE

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.path.is_file():  # what a killed attempt wrote beyond its checkpoint
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= state.global_step]
            self.path.write_text("".join(kept), encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "completions/mean_length" not in logs:
            return
        if state.is_world_process_zero:
            self._keep(state.global_step)
        if state.global_step > 1:  # the first rollout may lack them by chance
            self._ask_whether_rewarded(state.global_step)
        self._hold(logs, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ask_whether_rewarded(state.global_step)

    def _ask_whether_rewarded(self, step: int) -> None:
        if self.trainer.rewarded is False:
            names = ", ".join(self.trainer.reward_func_names)
            raise UserError(
                f"{self.file}: rewards: after {step} steps no completion has had a reward: {names} gave None or NaN for all, "
                "so nothing is learnt. A check reads its value from the row's answer (`reference`, `answer` or `solution` of a "
                f"prompt) or from `value`; the completions are in {self.path}."
            )

    def _keep(self, step: int) -> None:
        told = self.trainer._logs
        rows = zip(told["prompt"], told["completion"], told["advantages"], strict=True)
        with open(self.path, "a", encoding="utf-8") as file:
            for number, (prompt, completion, advantage) in enumerate(rows):
                if number == _KEPT_AT_ONCE:
                    break
                rewards = {name: values[number] for name, values in told["rewards"].items()}
                row = {"step": step, "prompt": prompt, "completion": completion, "rewards": rewards}
                file.write(json.dumps({**row, "advantage": advantage}, ensure_ascii=False, default=str) + "\n")

    def _hold(self, logs: dict[str, float], state: Any) -> None:
        limits, length = self.limits, logs["completions/mean_length"]
        lengths = [line["completions/mean_length"] for line in state.log_history if "completions/mean_length" in line]
        kl = logs.get("kl")
        problem = None
        if kl is not None and limits.max_kl is not None:
            nats = kl * length if self.kl_per_token else kl
            if nats > limits.max_kl:
                problem = (
                    f"a completion is {nats:.1f} nats from the reference, more than limits.max_kl = {limits.max_kl:g}. "
                    "Raise trainer.beta, or lower trainer.learning_rate"
                )
        entropy = logs.get("entropy")
        if entropy is not None and limits.min_entropy is not None and entropy < limits.min_entropy:
            problem = (
                f"entropy is {entropy:.4f} nats per token, less than limits.min_entropy = {limits.min_entropy:g}: the "
                "policy says the same whatever is sampled. Lower trainer.learning_rate, raise trainer.temperature or beta"
            )
        if limits.max_length_growth is not None and lengths and length > limits.max_length_growth * max(lengths[0], 1):
            problem = (
                f"completions have grown from {lengths[0]:.0f} to {length:.0f} tokens, more than "
                f"limits.max_length_growth = {limits.max_length_growth:g} times. Reward brevity (check: length), lower "
                "trainer.max_completion_length, or look at what the reward likes in long answers"
            )
        if problem:
            raise RewardHacked(
                f"{self.file}: step {state.global_step}: {problem}. The last completions are in {self.path}."
            )
