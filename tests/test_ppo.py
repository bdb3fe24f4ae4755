"""PPO: its parts by hand, and the whole through the command line."""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from hfpipe.training.ppo import Critic, clipped_value_loss, estimate_advantages

from .conftest import ROOT, hfpipe, stage_json
from .test_nothing_lost import start
from .test_reinforce import lines, steered  # noqa: F401
from .test_rewards import REWARD

PPO = (
    "{learning_rate: 5.0e-3, critic_learning_rate: 1.0e-3, per_device_train_batch_size: 32, num_iterations: 2, "
    "max_completion_length: 16, max_steps: 32, save_steps: 4, beta: BETA, activation_checkpointing: false, logging_steps: 4}"
)


def by_loop(rewards, values, mask, gamma, lam):
    """Advantages of one row, by the sum over what follows among the positions that count."""
    spots = [t for t, counted in enumerate(mask) if counted]
    found = [0.0] * len(values)
    for i, t in enumerate(spots):
        for power, later in enumerate(spots[i:]):
            after = spots[i + power + 1 :]
            error = rewards[later] + gamma * (values[after[0]] if after else 0.0) - values[later]
            found[t] += (gamma * lam) ** power * error
    return found


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (1.0, 1.0)])
def test_advantages_are_those_of_a_plain_loop(gamma, lam):
    torch.manual_seed(0)
    rewards, values = torch.randn(4, 7), torch.randn(4, 7)
    mask = torch.tensor([[1] * 7, [1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 1, 1, 0], [0] * 7])  # whole, padded, a gap, empty
    advantages, returns = estimate_advantages(rewards * mask, values * mask, mask, gamma, lam)
    for row in range(4):
        expected = by_loop(rewards[row].tolist(), values[row].tolist(), mask[row].tolist(), gamma, lam)
        assert advantages[row].tolist() == pytest.approx(expected, abs=1e-5)
    assert torch.equal(returns, (advantages + values * mask) * mask)


def test_the_value_loss_by_hand():
    values, old, returns = torch.tensor([1.0, 2.0, 0.1]), torch.tensor([0.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, 1.0])
    # held: 0.2, 0.2, 0.1; errors: 0 or 0.8, 1 or 0.8, 0.9 twice
    expected = [0.5 * 0.8**2, 0.5 * 1.0, 0.5 * 0.9**2]
    assert clipped_value_loss(values, old, returns, 0.2).tolist() == pytest.approx(expected)


def test_a_critic_takes_over_the_reward_model_s_head():
    from transformers import LlamaConfig, LlamaForSequenceClassification

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    judge = LlamaForSequenceClassification(LlamaConfig(vocab_size=32, num_labels=1, pad_token_id=0, **shape)).eval()
    ids = torch.randint(1, 32, (3, 6))
    tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert torch.allclose(
        Critic(16, judge.base_model, judge.score)(**tokens)[:, -1], judge(ids).logits[:, 0], atol=1e-6
    )
    assert torch.equal(Critic(16, judge.base_model)(**tokens), torch.zeros(3, 6))


def test_a_critic_is_float32_whatever_it_starts_from(make, micro_run):
    from transformers import AutoModelForSequenceClassification

    source = AutoModelForSequenceClassification.from_pretrained(micro_run / "sft", num_labels=1, dtype=torch.bfloat16)
    critic = make("separate")._build_critic(source)
    assert {p.dtype for p in critic.parameters()} == {torch.float32}
    assert source.dtype == torch.bfloat16


# --- a trainer on a very small model, through the Python API ---


@pytest.fixture
def make(micro_run, tmp_path):
    """`make(critic, **args)`: a PPOTrainer whose policy, reference, critic and value head all differ from each other."""
    return lambda critic="separate", **args: make_trainer(micro_run / "sft", tmp_path, critic, **args)


def odd_sums(completion_ids, **columns):
    return [float(sum(ids) % 7) for ids in completion_ids]


def make_trainer(parent: Path, folder: Path, critic: str, peft_config=None, reward=odd_sums, **args):
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from hfpipe.training.ppo import PPOConfig, PPOTrainer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(parent)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    if not (folder / "policy").exists():
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.3, **shape)).save_pretrained(
            folder / "policy"
        )
    policy = LlamaForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
    policy.generation_config.eos_token_id = list(range(0, len(tokenizer), 5))  # some completions end by themselves
    talks = [
        [{"role": "user", "content": text}] for text in ("Hello!", "What is 2 plus 2?", "Tell me a story.", "Why?")
    ]
    defaults = {
        "output_dir": str(folder / "out"), "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True,
        "gradient_checkpointing": False, "per_device_train_batch_size": 4, "max_completion_length": 6, "beta": 0.3,
        "gamma": 0.9, "lam": 0.8, "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no",
    }  # fmt: skip
    trainer = PPOTrainer(
        policy,
        reward,
        PPOConfig(**{**defaults, **args}, critic=critic),
        train_dataset=Dataset.from_list([{"prompt": talk} for talk in talks * 16]),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    noise = torch.Generator().manual_seed(1)  # the same in every process
    with torch.no_grad():
        for parameter in (*trainer.model.parameters(), *trainer.critic.parameters()):
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=noise)
    return trainer


def whole(batch):
    return torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1), torch.cat(
        [batch["prompt_mask"], batch["completion_mask"]], 1
    )


def values_of(trainer, critic, policy, batch):
    """The critic's value of each completion's token, by hand: (rows, tokens)."""
    ids, mask = whole(batch)
    backbone = policy.base_model if trainer.args.critic == "head" else critic.backbone
    hidden = backbone(input_ids=ids, attention_mask=mask).last_hidden_state
    return critic.head(hidden).squeeze(-1)[:, -batch["completion_ids"].size(1) - 1 : -1]


def log_probs_of(model, batch):
    ids, mask = whole(batch)
    every = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)[:, :-1]
    return every.gather(-1, ids[:, 1:, None]).squeeze(-1)[:, -batch["completion_ids"].size(1) :]


@pytest.mark.parametrize(
    ("critic", "adapted", "options"),
    [
        ("separate", False, {}),
        ("separate", True, {"whiten_rewards": True}),
        ("head", False, {"missing_eos_penalty": 1.5}),
        ("head", True, {}),
        ("head", False, {"num_iterations": 1, "whiten_rewards": True}),  # no other step: no log-probabilities upstream
    ],
)
@torch.no_grad()
def test_a_rollout_by_hand(make, critic, adapted, options):
    """Scores, KL, advantages, whitening: all that stands between the rewards and the loss."""
    trainer = make(critic, peft_config=lora() if adapted else None, **options)
    batch = trainer._generate_and_score_completions([trainer.train_dataset[i] for i in range(4)])
    mask = batch["completion_mask"]
    assert len(set(mask.sum(1).tolist())) > 1
    policy = trainer.model.get_base_model() if adapted else trainer.model
    values = values_of(trainer, trainer.critic, policy, batch) * mask
    with trainer.model.disable_adapter() if adapted else contextlib.nullcontext():
        reference = log_probs_of(policy if adapted else trainer.ref_model, batch)
    log_ratio = (log_probs_of(policy, batch) - reference) * mask
    assert log_ratio.abs().max() > 0.01
    rewards, ended = -0.3 * log_ratio, []
    for row, counted in enumerate(mask.sum(1).tolist()):
        ids = batch["completion_ids"][row, :counted].tolist()
        ended.append(ids[-1] in trainer.eos_token_ids)
        rewards[row, counted - 1] += sum(ids) % 7 - (0 if ended[-1] else options.get("missing_eos_penalty", 0))
    assert set(ended) == {True, False}
    if "whiten_rewards" in options:
        told = rewards[mask.bool()]
        rewards = (rewards - told.mean()) / (told.var(correction=0) + 1e-8).sqrt() + told.mean()
    rows = zip(rewards.tolist(), values.tolist(), mask.tolist(), strict=True)
    advantages = torch.tensor([by_loop(*row, 0.9, 0.8) for row in rows])
    told = advantages[mask.bool()]
    whitened = (advantages - told.mean()) / (told.var(correction=0) + 1e-8).sqrt() * mask
    assert torch.allclose(batch["old_values"], values, atol=1e-5)
    assert torch.allclose(batch["returns"], (advantages + values) * mask, atol=1e-4)
    assert torch.allclose(batch["advantages"], whitened, atol=1e-4)
    assert "ref_per_token_logps" not in batch  # the KL is in the reward, and nowhere else


def lora():
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.mark.parametrize(
    ("critic", "max_grad_norm", "accumulated", "parts", "epochs"),
    [
        ("separate", 0.0, 1, 1, 2),
        ("separate", 0.01, 2, 2, 2),
        ("separate", 0.0, 1, 2, 1),
        ("head", 0.01, 1, 1, 2),
        ("head", 0.0, 1, 2, 1),
    ],
)
def test_steps_of_the_critic_by_hand(make, critic, max_grad_norm, accumulated, parts, epochs):
    """With plain descent a step is the gradient: scaled, clipped, and nothing of it left over for the next one."""
    from transformers import TrainerCallback

    trainer = make(
        critic, optim="sgd", learning_rate=0.05, critic_learning_rate=0.01, max_grad_norm=max_grad_norm, vf_coef=0.5,
        num_iterations=epochs, max_steps=2, per_device_train_batch_size=4 // parts,
        gradient_accumulation_steps=accumulated, steps_per_generation=parts,
    )  # fmt: skip
    states = [copy.deepcopy((trainer.critic, trainer.model))]

    class Keep(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            states.append(copy.deepcopy((trainer.critic, trainer.model)))

    trainer.add_callback(Keep())
    trainer.train()
    batches = trainer._buffered_inputs
    tokens = sum(batch["completion_mask"].sum() for batch in batches) * accumulated / parts
    for step, ((critic_then, policy_then), (critic_after, _)) in enumerate(itertools.pairwise(states)):
        critic_then.zero_grad()
        for batch in batches if accumulated == parts else batches[step : step + 1]:
            values = values_of(trainer, critic_then, policy_then, batch)
            losses = clipped_value_loss(values, batch["old_values"], batch["returns"], trainer.args.cliprange_value)
            (0.5 * (losses * batch["completion_mask"]).sum() / tokens).backward()
        gradients = [p.grad for p in critic_then.parameters()]
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        assert norm > 0.05
        share = min(1.0, max_grad_norm / norm) if max_grad_norm else 1.0
        for before, after, gradient in zip(critic_then.parameters(), critic_after.parameters(), gradients, strict=True):
            assert torch.allclose(before - after, 0.01 * share * gradient, atol=1e-7)


@pytest.mark.parametrize("critic", ["separate", "head"])
@torch.no_grad()
def test_the_loss_by_hand(make, critic):
    """Policy and critic together, after both have left the rollout's so far that tokens of both signs are clipped."""
    trainer = make(critic, vf_coef=0.5, num_iterations=2, cliprange_value=0.05, per_device_train_batch_size=16)
    batch = trainer._generate_and_score_completions([trainer.train_dataset[i] for i in range(16)])
    for parameter in (*trainer.model.parameters(), *trainer.critic.parameters()):
        parameter += 0.1 * torch.randn(parameter.shape)
    trainer.current_gradient_accumulation_steps = 1
    mask, advantages = batch["completion_mask"], batch["advantages"]
    ratio = (log_probs_of(trainer.model, batch) - batch["old_per_token_logps"]).exp()
    surrogate = torch.where(advantages > 0, ratio.clamp(max=1.2), ratio.clamp(min=0.8)) * advantages
    for clipped in ((ratio > 1.2) & (advantages > 0), (ratio < 0.8) & (advantages < 0)):
        assert (clipped & mask.bool()).any()
    values, old, returns = (
        values_of(trainer, trainer.critic, trainer.model, batch),
        batch["old_values"],
        batch["returns"],
    )
    errors = torch.stack([values - returns, old + (values - old).clamp(-0.05, 0.05) - returns]).square()
    assert (errors[1] > errors[0]).any()
    assert (errors[1] < errors[0]).any()
    expected = ((-surrogate + 0.5 * 0.5 * errors.max(dim=0).values) * mask).sum() / mask.sum()
    assert trainer._compute_loss(trainer.model, batch).item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("critic", ["separate", "head"])
@pytest.mark.parametrize("adapted", [False, True])
def test_a_resumed_critic_goes_on_to_the_same_bits(make, critic, adapted):
    def trainer(steps):
        return make(
            critic, peft_config=lora() if adapted else None, num_iterations=2, max_steps=steps, save_strategy="steps", save_steps=2,
            learning_rate=1e-2, seed=3,
        )  # fmt: skip

    at_once, in_two = trainer(4), trainer(4)
    at_once.train()
    folder = Path(at_once.args.output_dir) / "checkpoint-2"
    assert (folder / "critic.safetensors").is_file()
    in_two.train(resume_from_checkpoint=str(folder))
    for one, other in ((at_once.model, in_two.model), (at_once.critic, in_two.critic)):
        ours, theirs = one.state_dict(), other.state_dict()
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    saved = load_file(folder / ("adapter_model.safetensors" if adapted else "model.safetensors"))
    assert not [name for name in saved if "head" in name.replace("lm_head", "") or "critic" in name]


@torch.no_grad()
def test_log_probabilities_are_upstream_s(make):
    from trl import GRPOTrainer

    trainer = make(temperature=0.7)
    batch = trainer._generate_and_score_completions([trainer.train_dataset[i] for i in range(4)])
    asked = (trainer.model, *whole(batch), batch["completion_ids"].size(1), 3, True)
    for ours, theirs in zip(
        trainer._get_per_token_logps_and_entropies(*asked),
        GRPOTrainer._get_per_token_logps_and_entropies(trainer, *asked),
        strict=True,
    ):
        if ours is not None:
            mask = batch["completion_mask"]
            assert torch.allclose(ours * mask, theirs * mask, atol=1e-5)


def test_a_value_head_takes_no_other_model(make, micro_run):
    from hfpipe.training.ppo import PPOTrainer

    trainer = make("head")
    with pytest.raises(ValueError, match="no use for a `value_model`"):
        PPOTrainer(
            trainer.model,
            trainer.reward_funcs,
            trainer.args,
            train_dataset=trainer.train_dataset,
            processing_class=trainer.processing_class,
            value_model=str(micro_run / "sft"),
        )


def length(completion_ids, **columns):
    return [len(ids) / 24 for ids in completion_ids]


def one_third(completion_ids, **columns):
    return [sum(token % 3 == 0 for token in ids) / len(ids) for ids in completion_ids]


@pytest.mark.parametrize(
    ("reward", "limit", "said"),
    [
        (length, {"max_length_growth": 1.4}, "tokens, more than limits.max_length_growth = 1.4 times"),
        (one_third, {"min_entropy": 5.0}, "nats per token, less than limits.min_entropy = 5"),
        (one_third, {"max_kl": 6.0}, "nats from the reference, more than limits.max_kl = 6"),
    ],
)
def test_each_limit_stops_a_run_that_is_made_to_pass_it(make, tmp_path, reward, limit, said):
    from hfpipe.sections import Limits
    from hfpipe.training.reinforce import RewardHacked, Watched

    trainer = make(
        reward=reward, max_completion_length=24, max_steps=48, num_iterations=4, learning_rate=0.02, beta=1e-4,
        per_device_train_batch_size=64 if reward is length else 16, gamma=1.0, lam=1.0, logging_steps=4,
    )  # fmt: skip
    job = SimpleNamespace(stage=SimpleNamespace(file="rl.yaml"), work=tmp_path)
    limits = Limits(**{"max_kl": None, "min_entropy": None, "max_length_growth": None, **limit})
    trainer.add_callback(Watched(job, trainer, limits, kl_per_token=False))
    with pytest.raises(RewardHacked) as raised:
        trainer.train()
    assert said in str(raised.value)
    assert "rl.yaml: step " in str(raised.value)
    assert 8 <= trainer.state.global_step < 48  # not by where it began


TWO_PROCESSES = """
import sys
from pathlib import Path
import torch
from tests.test_ppo import lora, make_trainer
for critic in ("separate", "head"):
    for adapter in (None, lora()):
        trainer = make_trainer(
            Path(sys.argv[1]), Path(sys.argv[2]), critic, peft_config=adapter, max_steps=4, num_iterations=2,
            learning_rate=1e-2, gradient_accumulation_steps=2, steps_per_generation=2, per_device_train_batch_size=2,
        )
        began = [p.detach().clone() for p in trainer.critic.parameters()]
        trainer.train()
        assert trainer.accelerator.num_processes == 2
        for module in (trainer.model, trainer.critic):
            for parameter in module.parameters():
                first, second = trainer.accelerator.gather(parameter.detach()[None])
                assert torch.equal(first, second), (critic, adapter)
        assert not all(map(torch.equal, began, trainer.critic.parameters()))
print("together")
"""


def test_two_processes_keep_one_critic(micro_run, tmp_path):
    make_trainer(micro_run / "sft", tmp_path, "head")  # writes the policy, once
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29577"]
    done = subprocess.run(
        [*command, str(tmp_path / "two.py"), str(micro_run / "sft"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("together") == 2


# --- the stage, through the command line ---


@pytest.fixture(scope="module")
def runs():
    return {}


@pytest.mark.parametrize("beta", ["0.0", "0.05", "0.5"])
def test_the_reward_rises_and_beta_holds_the_policy(steered, tmp_path, runs, beta):  # noqa: F811
    trainer = PPO.replace("BETA", beta)
    if beta == "0.0":
        trainer = trainer.replace("max_steps: 32", "max_steps: 64")
    else:  # at the rate that makes the reward rise the policy is far away before any beta is felt
        trainer = trainer.replace("{learning_rate: 5.0e-3", "{learning_rate: 1.0e-3")
    hfpipe("run", steered("ppo", trainer=trainer), "--out", tmp_path / "run")
    left = tmp_path / "run" / "rl"
    metrics, logged = stage_json(left)["metrics"], lines(left / "metrics.jsonl")
    assert {"critic/loss", "critic/grad_norm", "critic/explained_variance", "rlhf_reward"} <= logged[0].keys()
    runs[beta] = logged[-1]["kl"]
    if beta == "0.0":
        assert metrics["held_out"]["reward"] > metrics["held_out_before"]["reward"] + 0.1
        assert runs[beta] == 0
    assert not (left / "critic.safetensors").exists()  # an ordinary model folder
    if len(runs) == 3:
        assert 0 < runs["0.5"] < runs["0.05"]


def test_a_killed_run_goes_on_to_the_same_bits(steered, tmp_path):  # noqa: F811
    folder = steered("ppo", trainer=PPO.replace("BETA", "0.05").replace("max_steps: 32", "max_steps: 24"))
    hfpipe("run", folder, "--out", tmp_path / "whole")
    run = tmp_path / "run"
    process = start(run, recipe=str(folder))
    while not (found := list(run.glob("rl.partial/checkpoints/checkpoint-*"))):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    assert (found[0] / "critic.safetensors").is_file()
    time.sleep(0.4)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = hfpipe("run", folder, "--out", run)
    assert "resumed from checkpoint-" in done.stdout
    assert stage_json(run / "rl")["weights"] == stage_json(tmp_path / "whole" / "rl")["weights"]
    ours, theirs = (
        [{k: v for k, v in line.items() if "time" not in k and "per_second" not in k} for line in lines(p)]
        for p in (run / "rl" / "metrics.jsonl", tmp_path / "whole" / "rl" / "metrics.jsonl")
    )
    assert ours == theirs


def test_what_ppo_cannot_do_is_refused(steered, tmp_path):  # noqa: F811
    folder = steered("ppo", trainer=PPO.replace("BETA", "0.05").replace("max_steps", "loss_type: cispo, max_steps"))
    done = hfpipe("run", folder, "--out", tmp_path / "run", check=2)
    assert "PPO needs `loss_type` in" in done.stderr
    for override, told in (
        ("rl.trainer.lamda=0.9", "trainer.lamda = 0.9 is not a field"),
        ("launch.accelerate_config=fsdp2", "stage: ppo, whose critic is trained beside the policy, takes a model that"),
        ("launch.accelerate_config=zero3", "does not go together with FSDP and DeepSpeed"),
    ):
        assert told in hfpipe("plan", folder, "--set", override, check=2).stderr


def test_two_processes_with_a_value_head_and_an_adapter_with_a_critic(steered, micro_run, tmp_path):  # noqa: F811
    folder = steered("ppo", trainer=PPO.replace("BETA", "0.05").replace("max_steps: 32", "max_steps: 4"))
    head = ["--set", "launch.processes=2", "--set", "rl.trainer.critic=head"]
    hfpipe("run", folder, "--out", tmp_path / "two", *head)
    assert stage_json(tmp_path / "two" / "rl")["machine"]["processes"] == 2
    weights = load_file(tmp_path / "two" / "rl" / "model.safetensors")
    assert weights.keys() == load_file(micro_run / "sft" / "model.safetensors").keys()  # nothing of the head in it
    adapter = [
        part for item in ("type=lora", "r=8", "target_modules=all-linear") for part in ("--set", f"rl.adapter.{item}")
    ]
    hfpipe("run", folder, "--out", tmp_path / "lora", *adapter)
    assert (tmp_path / "lora" / "rl" / "adapter" / "adapter_model.safetensors").is_file()
    assert stage_json(tmp_path / "lora" / "rl")["metrics"]["steps"] == 4


def test_a_reward_model_with_either_critic(steered, micro_run, tmp_path):  # noqa: F811
    folder = steered("ppo", trainer=PPO.replace("BETA", "0.05").replace("max_steps: 32", "max_steps: 4"),
                     rewards="{model: judge}")  # fmt: skip
    (folder / "judge.yaml").write_text(REWARD.replace("from: sft", f"from: {micro_run / 'sft'}"))
    (folder / "pipeline.yaml").write_text(
        "name: steered\nstages: [judge, rl]\nevaluate: {samples: 1, max_new_tokens: 4}\n"
    )
    short = ["--set", "judge.trainer.max_steps=4"]
    hfpipe("run", folder, "--out", tmp_path / "run", *short)
    from_the_judge = lines(tmp_path / "run" / "rl" / "metrics.jsonl")[0]["critic/value"]
    assert abs(from_the_judge) > 1e-3  # the critic starts with the reward model's head
    hfpipe("run", folder, "--out", tmp_path / "run", *short, "--set", "rl.trainer.critic=head")
    assert abs(lines(tmp_path / "run" / "rl" / "metrics.jsonl")[0]["critic/value"]) < abs(from_the_judge) / 10


def test_held_out_prompts_get_their_likeliest_answers_and_a_gain_prompt_by_prompt(make):
    from hfpipe.evaluation.held_out import held_out_reward

    trainer = make(per_device_eval_batch_size=8, num_generations_eval=1)
    trainer.eval_dataset = trainer.train_dataset.select(range(8))  # four, twice each
    sampled = trainer.generation_config
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(held_out_reward(trainer, trainer.eval_dataset))
    assert found[0].rewards == found[1].rewards
    told = sorted(found[0].rewards)
    assert told[::2] == told[1::2]
    assert len(set(found[0].rewards)) > 1
    assert trainer.generation_config is sampled
    assert sampled.do_sample
    asked = [trainer.train_dataset[0]] * 32
    trainer.model.train()
    ids = trainer._generate_and_score_completions(asked)["completion_ids"]
    assert len({tuple(row.tolist()) for row in ids}) > 8  # what is learnt from is sampled
    summary = found[0].summary()
    assert summary["n"] == 8
    assert summary["low"] < summary["reward"] < summary["high"]
    assert summary["reward"] == pytest.approx(sum(told) / 8, abs=1e-4)


def test_several_answers_to_a_held_out_prompt_count_as_one(make):
    from hfpipe.evaluation.held_out import held_out_reward

    trainer = make(per_device_eval_batch_size=8, num_generations_eval=2)
    trainer.eval_dataset = trainer.train_dataset.select(range(4))
    found = held_out_reward(trainer, trainer.eval_dataset)
    answers = torch.cat(trainer.held_out).tolist()
    assert len(answers) == 8
    assert found.rewards == [(a + b) / 2 for a, b in zip(answers[::2], answers[1::2], strict=True)]
    assert found.summary()["n"] == 4
    asked = list(trainer._logs["prompt"])  # the last four
    assert asked[0] == asked[1] != asked[2] == asked[3]  # the two of a prompt stand together


def test_the_gain_leaves_out_what_had_no_reward_before_or_after():
    from hfpipe.evaluation.held_out import HeldOut

    nan = float("nan")
    before, after = HeldOut([1.0, nan, 0.0, 0.5], 3.0), HeldOut([2.0, 1.0, nan, 0.5], 4.0)
    told = after.summary(before)
    assert (told["n"], told["mean_length"]) == (3, 4.0)
    assert told["reward"] == pytest.approx(3.5 / 3, abs=1e-4)
    assert {name: told["gain"][name] for name in ("n", "win", "tie", "loss", "difference")} == {
        "n": 2, "win": 1, "tie": 1, "loss": 0, "difference": 0.5,
    }  # fmt: skip
    assert "gain" not in before.summary()
    assert "gain" not in HeldOut([nan, 1.0], 1.0).summary(HeldOut([1.0, nan], 1.0))
