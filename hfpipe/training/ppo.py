"""PPO for language models on TRL's GRPOTrainer (TRL has had none of its own since 1.13).

TRL keeps the rollouts (generate or vLLM), chat formatting, reward functions and models, adapters, and the clipped surrogate
of the policy, token by token. Added here: a critic, a reward for every token (the score at the last one, minus beta times
the log-ratio to the reference at each), generalised advantages, and a clipped value loss.

One rollout holds `per_device_train_batch_size * steps_per_generation * processes` completions; it is learnt from
`num_iterations` times, in `steps_per_generation / gradient_accumulation_steps` optimizer steps each time.

Departures from the papers (Schulman et al. 2017, arXiv:1707.06347; Ouyang et al. 2022, arXiv:2203.02155):
- the parts of a rollout are not shuffled anew for each of its epochs (TRL's buffer);
- advantages are whitened over the whole rollout, not in each minibatch;
- both losses are means over the tokens of an optimizer step, so that a long completion counts for more than a short one;
- beta is constant; nothing of the pretraining loss is mixed in (PPO-ptx): replay is another stage's business;
- policy and critic are clipped apart, each to `max_grad_norm`, and share the optimizer, not their rate.

`critic: head` needs no second network: a value head reads the policy's last hidden states in the very pass that gives the
log-probabilities, and the value loss trains the policy's backbone too. It is no part of the policy's module, so no saved
weights, adapter, generation or vLLM know of it.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import is_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, PreTrainedModel, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import disable_dropout_in_model

from hfpipe.training.reinforce import Steered

CRITIC_FILE = "critic.safetensors"
# What the additions assume of GRPO's own options.
_NEEDED = {
    "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo"),
    "importance_sampling_level": ("token",),
    "multi_objective_aggregation": ("sum_then_normalize",),
}


class _One(int):
    """A number of completions that passes GRPOConfig's `num_generations < 2`: groups need two, a critic needs one."""

    def __lt__(self, other: object) -> bool:
        return False


@dataclass
class PPOConfig(GRPOConfig):
    """GRPOConfig's fields, some with other defaults, and those of PPO under the names of TRL's former PPOConfig."""

    num_generations: int = field(default=1, metadata={"help": "Completions of a prompt in a rollout."})
    num_iterations: int = field(default=4, metadata={"help": "PPO epochs: how often a rollout is learnt from."})
    beta: float = field(default=0.05, metadata={"help": "Weight of the log-ratio to the reference in the reward."})
    gamma: float = field(default=1.0, metadata={"help": "Discount of a token's reward for those before it."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of the generalised advantage estimate."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    cliprange_value: float = field(default=0.2, metadata={"help": "How far a value may move from the rollout's."})
    critic: Literal["separate", "head"] = field(
        default="separate", metadata={"help": "A network of its own, or a value head on the policy: less memory."}
    )
    critic_learning_rate: float | None = field(default=None, metadata={"help": "Default: `learning_rate`."})
    whiten_rewards: bool = field(default=False, metadata={"help": "Scale the tokens' rewards to unit variance."})
    missing_eos_penalty: float = field(default=0.0, metadata={"help": "Taken off the score of a completion cut off."})

    def __post_init__(self) -> None:
        count = self.num_generations
        if count < 1:
            raise ValueError(f"`num_generations` must be at least 1, got {count}")
        self.num_generations = _One(count)
        super().__post_init__()
        self.num_generations = count
        for name, allowed in _NEEDED.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"PPO needs `{name}` in {allowed}, got {getattr(self, name)!r}")


def estimate_advantages(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantages and returns (Schulman et al. 2016, arXiv:1506.02438).

    All are (rows, tokens). Positions where `mask` is 0 (padding, a tool's result) are stepped over as if they were not there.
    """
    advantages = torch.zeros_like(values)
    ahead = next_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.size(1))):
        here = mask[:, t].bool()
        error = rewards[:, t] + gamma * next_value - values[:, t]
        ahead = torch.where(here, error + gamma * lam * ahead, ahead)
        next_value = torch.where(here, values[:, t], next_value)
        advantages[:, t] = torch.where(here, ahead, advantages[:, t])
    return advantages, (advantages + values) * mask


def clipped_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip: float
) -> torch.Tensor:
    """Per token half the squared error, the larger one of the value and of the value held within `clip` of the old one."""
    held = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.max((values - returns) ** 2, (held - returns) ** 2)


class Critic(nn.Module):
    """A value for every position: a head of one number on hidden states, those of a backbone of its own or the policy's."""

    def __init__(self, hidden_size: int, backbone: nn.Module | None = None, head: nn.Linear | None = None):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        if head is not None:
            self.head.weight.data.copy_(head.weight.data)

    def forward(self, hidden: torch.Tensor | None = None, **tokens: torch.Tensor) -> torch.Tensor:
        """`hidden`, or the `input_ids` and `attention_mask` that its own backbone reads; (rows, tokens)."""
        if self.backbone is not None:
            hidden = self.backbone(**tokens, use_cache=False).last_hidden_state
        return self.head(hidden.to(self.head.weight.dtype)).squeeze(-1).float()


class _CriticStep(TrainerCallback):
    """Trainer clips and zeroes the gradients of `trainer.model` alone: the critic's are seen to here."""

    def __init__(self, trainer: PPOTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        norm = nn.utils.clip_grad_norm_(self.trainer.critic.parameters(), args.max_grad_norm or float("inf"))
        self.trainer._metrics["train"]["critic/grad_norm"].append(norm.item())

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.critic.zero_grad()


class PPOTrainer(Steered, GRPOTrainer):
    """GRPOTrainer's arguments, and `value_model`: a path, a Hub id or a model whose backbone the critic starts from.

    By default that is the policy's own checkpoint. A reward model of the policy's vocabulary is the better start: its
    head is taken over too. With `critic="head"` there is none. Text models alone, in one process or under DDP.
    """

    _tag_names = ("trl", "ppo")
    _name = "PPO"

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: PPOConfig | None = None,
        *,
        value_model: str | PreTrainedModel | None = None,
        **kwargs: Any,
    ):
        super().__init__(model, reward_funcs, args or PPOConfig("ppo-output"), **kwargs)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or self._is_vlm:
            # For those who use the class by itself: a recipe is refused before, by `contradictions.sharded`.
            raise ValueError("PPOTrainer takes text models, in one process or under DDP")
        self.beta = 0.0  # none in the loss: see _generate_and_score_completions
        self._head_values: list[torch.Tensor] = []  # of the last passes through the policy, for `critic: head`
        self.critic = self.accelerator.prepare_model(self._build_critic(value_model).to(self.accelerator.device))
        self.add_callback(_CriticStep(self))

    def _build_critic(self, source: str | PreTrainedModel | None) -> Critic:
        config = self.model.config
        if self.args.critic == "head":
            if source is not None:
                raise ValueError("`critic='head'` puts the critic on the policy: there is no use for a `value_model`")
            return Critic(config.get_text_config().hidden_size)
        source = config._name_or_path if source is None else source
        if isinstance(source, str):
            backbone, head = AutoModel.from_pretrained(source, dtype=torch.float32), None
        else:
            # in float32 whatever the source is stored in: the optimizer's steps are lost in bf16
            backbone, head = copy.deepcopy(source.base_model).float(), getattr(source, "score", None)
        backbone.requires_grad_(True)
        disable_dropout_in_model(backbone)
        if self.args.gradient_checkpointing:
            backbone.gradient_checkpointing_enable(self.args.gradient_checkpointing_kwargs)
            backbone.enable_input_require_grads()
        return Critic(backbone.config.get_text_config().hidden_size, backbone.train(), head)

    # --- values: of the state before each token of the completions, (rows, tokens) ---

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Upstream's. A value head reads the hidden states of the same pass; its values go to `_head_values`."""
        if self.args.critic == "separate":
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        seen: list[torch.Tensor] = []  # nothing, where `model` is a reference with a backbone of its own
        policy = self.model.get_base_model() if is_peft_model(self.model) else self.model
        with policy.base_model.register_forward_hook(
            lambda module, given, output: seen.append(output.last_hidden_state)
        ):
            found = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        if seen:
            self._head_values.append(self.critic(torch.cat(seen)[:, -found[0].size(1) - 1 : -1]))
        return found

    def _critic_values(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.critic(**_whole(inputs))[:, -inputs["completion_ids"].size(1) - 1 : -1]

    # --- rollouts ---

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._rewards_per_func = super()._calculate_rewards(*args, **kwargs)  # (rows of all processes, functions)
        return self._rewards_per_func

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        # Upstream computes the reference's log-probabilities where beta is set, and then adds the KL to its loss too.
        # In PPO it belongs to the reward, so beta is set here and nowhere else.
        self.beta = self.args.beta
        self._head_values.clear()
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            self.beta = 0.0
        with torch.no_grad():
            self._score_tokens(output)
        return output

    def _score_tokens(self, output: dict[str, Any]) -> None:
        """Turn the scores of whole completions into advantages and returns of their tokens."""
        args, mode = self.args, "train" if self.model.training else "eval"
        mask = output["completion_mask"] * output.get("tool_mask", 1)
        rows, size = len(mask), getattr(args, f"per_device_{mode}_batch_size")
        if "old_per_token_logps" not in output and (args.beta or args.critic == "head"):
            # One step a rollout: upstream has no use for them.
            self._head_values.clear()
            output["old_per_token_logps"] = self._get_per_token_logps_and_entropies(
                self.model, **_whole(output), logits_to_keep=mask.size(1), batch_size=size
            )[0]
        log_ratio = torch.zeros(mask.shape, device=mask.device)  # policy against reference: the k1 estimate of the KL
        if args.beta:
            log_ratio = (output["old_per_token_logps"] - output.pop("ref_per_token_logps")) * mask
        if args.critic == "head":
            values = self._head_values[0] * mask  # the policy is asked first: a reference may share its backbone
        else:
            parts = [{name: output[name][i : i + size] for name in _ROLLOUT} for i in range(0, rows, size)]
            values = torch.cat([self._critic_values(part) for part in parts]) * mask
        per_func = self._rewards_per_func[self.accelerator.process_index * rows :][:rows]
        scores = (per_func * self.reward_weights.to(per_func.device)).nansum(dim=1)
        if args.missing_eos_penalty:
            ends = torch.isin(output["completion_ids"], torch.tensor(self.eos_token_ids, device=mask.device))
            scores = scores - args.missing_eos_penalty * ~(ends & mask.bool()).any(dim=1)
        rewards = -args.beta * log_ratio
        rewards[torch.arange(rows), mask.cumsum(dim=1).argmax(dim=1)] += scores  # at the last trained token
        if args.whiten_rewards:
            rewards = self._whiten(rewards, mask, shift_mean=False)
        advantages, returns = estimate_advantages(rewards, values, mask, args.gamma, args.lam)
        scored = mask * ~per_func.isnan().all(dim=1, keepdim=True)  # where no function had a say nothing is learnt
        output["advantages"] = self._whiten(advantages, scored)
        output["returns"], output["old_values"] = torch.where(scored.bool(), returns, values), values

        log = self._metrics[mode]
        missed = self._mean((returns - values) ** 2, scored)
        spread = self._mean((returns - self._mean(returns, scored)) ** 2, scored)
        log.pop("frac_reward_zero_std", None)  # about groups
        log["kl"].append(self.accelerator.gather(log_ratio.sum(dim=1)).mean().item())
        log["rlhf_reward"].append(self.accelerator.gather(scores - args.beta * log_ratio.sum(dim=1)).mean().item())
        log["critic/value"].append(self._mean(values, mask).item())
        log["critic/explained_variance"].append(1 - (missed / spread.clamp(min=1e-8)).item())

    def _mean(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Over the tokens of all processes."""
        total = self.accelerator.reduce(torch.stack([(x * mask).sum(), mask.sum().float()]), reduction="sum")
        return total[0] / total[1].clamp(min=1.0)

    def _whiten(self, x: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
        mean = self._mean(x, mask)
        white = (x - mean) * torch.rsqrt(self._mean((x - mean) ** 2, mask) + 1e-8)
        return (white if shift_mean else white + mean) * mask

    # --- training ---

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        self._head_values.clear()
        loss = super()._compute_loss(model, inputs)
        values = self._head_values.pop() if self.args.critic == "head" else self._critic_values(inputs)
        mode = "train" if self.model.training else "eval"
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        losses = clipped_value_loss(values, inputs["old_values"], inputs["returns"], self.args.cliprange_value)
        # A mean over the tokens of an optimizer step, as upstream's "dapo" has it.
        normalizer = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if mode == "train":
            normalizer = normalizer * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        self._metrics[mode]["critic/loss"].append(self._mean(losses.detach(), mask).item())
        return loss + self.args.vf_coef * (losses * mask).sum() / normalizer

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        # While gradients accumulate, Trainer holds back the exchange of the policy's alone.
        hold = contextlib.nullcontext() if self.accelerator.sync_gradients else self.accelerator.no_sync(self.critic)
        with hold:
            return super().training_step(model, inputs, num_items_in_batch)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        params = [p for p in self.critic.parameters() if p.requires_grad and id(p) not in known]
        rate = self.args.critic_learning_rate
        rate = self.args.learning_rate if rate is None else rate
        for decay, matrices in ((self.args.weight_decay, True), (0.0, False)):
            if group := [p for p in params if (p.ndim > 1) == matrices]:
                optimizer.add_param_group({"params": group, "lr": rate, "weight_decay": decay})
        return optimizer

    # --- checkpoints: the critic's optimizer state is in optimizer.pt, with the policy's ---

    def _critic_state(self) -> dict[str, torch.Tensor]:
        critic = self.accelerator.unwrap_model(self.critic)
        return {name: parameter.data for name, parameter in critic.named_parameters() if parameter.requires_grad}

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            save_file({name: one.contiguous() for name, one in self._critic_state().items()}, folder / CRITIC_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        saved, own = load_file(Path(resume_from_checkpoint) / CRITIC_FILE), self._critic_state()
        if saved.keys() != own.keys():
            raise ValueError(f"{CRITIC_FILE} is of another critic: {sorted(saved.keys() ^ own.keys())[:5]}")
        for name, parameter in own.items():
            parameter.copy_(saved[name])


_ROLLOUT = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")


def _whole(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Prompts and completions together."""
    return {
        "input_ids": torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
        "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
    }
