"""PPO: its parts by hand, and the whole through the command line."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from hfpipe.training.ppo import Critic, clipped_value_loss, estimate_advantages

from .conftest import hfpipe, stage_json
from .test_nothing_lost import start
from .test_reinforce import lines, steered  # noqa: F401

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
    critic = Critic(judge.base_model, judge.score)
    assert torch.allclose(critic(ids, torch.ones_like(ids))[:, -1], judge(ids).logits[:, 0], atol=1e-6)
    assert torch.equal(Critic(judge.base_model)(ids, torch.ones_like(ids)), torch.zeros(3, 6))


@pytest.fixture(scope="module")
def runs():
    return {}


@pytest.mark.parametrize("beta", ["0.0", "0.05", "0.5"])
def test_the_reward_rises_and_beta_holds_the_policy(steered, tmp_path, runs, beta):  # noqa: F811
    hfpipe("run", steered("ppo", trainer=PPO.replace("BETA", beta)), "--out", tmp_path / "run")
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
    assert (
        "trainer.lamda = 0.9 is not a field" in hfpipe("plan", folder, "--set", "rl.trainer.lamda=0.9", check=2).stderr
    )


def test_two_processes_and_an_adapter(steered, tmp_path):  # noqa: F811
    folder = steered("ppo", trainer=PPO.replace("BETA", "0.05").replace("max_steps: 32", "max_steps: 4"))
    hfpipe("run", folder, "--out", tmp_path / "two", "--set", "launch.processes=2")
    assert stage_json(tmp_path / "two" / "rl")["machine"]["processes"] == 2
    adapter = [
        part for item in ("type=lora", "r=8", "target_modules=all-linear") for part in ("--set", f"rl.adapter.{item}")
    ]
    hfpipe("run", folder, "--out", tmp_path / "lora", *adapter)
    assert (tmp_path / "lora" / "rl" / "adapter" / "adapter_model.safetensors").is_file()
    assert stage_json(tmp_path / "lora" / "rl")["metrics"]["steps"] == 4
