"""Rows of a rollout that share a pass: of like length, without padding that none of them needs, to the same gradients."""

import pytest
import torch
from trl.trainer.utils import split_tensor_dict

from hfpipe.training.rollouts import by_length
from tests.test_ppo import make  # noqa: F401


def cells(passes):
    return sum(one[name].numel() for one in passes for name in ("prompt_ids", "completion_ids"))


def told(passes):
    """The tokens of every row, without padding, with their advantages."""
    rows = [{k: v[n] for k, v in one.items() if v.dim()} for one in passes for n in range(len(one["prompt_ids"]))]
    return sorted(
        [row["prompt_ids"][row["prompt_mask"].bool()].tolist()]
        + [row[name][row["completion_mask"].bool()].tolist() for name in ("completion_ids", "advantages")]
        for row in rows
    )


def gradient(trainer, passes):
    trainer.model.zero_grad()
    trainer.critic.zero_grad()
    for one in passes:
        trainer.compute_loss(trainer.model, one).backward()
    return torch.cat([p.grad.flatten() for p in (*trainer.model.parameters(), *trainer.critic.parameters())])


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "bnpo"])
def test_a_step_s_gradient_is_the_same(make, loss_type):  # noqa: F811
    trainer = make(
        loss_type=loss_type, per_device_train_batch_size=4, gradient_accumulation_steps=2, steps_per_generation=4,
        num_iterations=2, max_completion_length=24,
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 2
    passes = split_tensor_dict(
        trainer._generate_and_score_completions([trainer.train_dataset[i] for i in range(16)]), 4
    )
    with torch.no_grad():  # so that ratios are not all one
        for parameter in trainer.model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape)
    found = by_length(passes, trainer.args)
    for step in (0, 2):
        before, after = gradient(trainer, passes[step : step + 2]), gradient(trainer, found[step : step + 2])
        assert before.norm() > 1e-3
        assert torch.allclose(before, after, atol=1e-6, rtol=1e-3)
        assert told(passes[step : step + 2]) == told(found[step : step + 2])
    assert cells(found) < (0.95 if loss_type == "bnpo" else 0.8) * cells(passes)
    if loss_type == "bnpo":  # divides by the tokens of a pass: its rows stay together
        assert [told([one]) for one in found] == [told([one]) for one in passes]


def test_what_a_trainer_learns_from_is_dealt_out(make):  # noqa: F811
    trainer = make(per_device_train_batch_size=4, gradient_accumulation_steps=4, max_completion_length=24, max_steps=1)
    trainer.train()
    lengths = torch.cat([one["prompt_mask"].sum(1) + one["completion_mask"].sum(1) for one in trainer._buffered_inputs])
    assert lengths.tolist() == sorted(lengths.tolist())
    for one in trainer._buffered_inputs:
        assert one["prompt_mask"][:, 0].any()
        assert one["completion_mask"][:, -1].any()
        widths = {name: value.size(1) for name, value in one.items() if value.dim() == 2}
        assert {widths[name] for name in ("completion_ids", "advantages", "returns", "old_values")} == {
            widths["completion_mask"]
        }


def test_a_rollout_cut_off_whole():
    """`mask_truncated_completions` takes out all tokens of a completion: nothing may be left of a pass."""
    ids = torch.ones(2, 3, dtype=torch.int64)
    one = {
        "prompt_ids": ids,
        "prompt_mask": ids,
        "completion_ids": ids,
        "completion_mask": 0 * ids,
        "advantages": ids[:, 0],
    }
    args = type("Args", (), {"gradient_accumulation_steps": 1})
    (found,) = by_length([one], args)
    assert found["completion_ids"].shape == (2, 1)
    assert found["prompt_ids"].shape == (2, 3)
    assert by_length([one | {"num_images": [1, 1]}], args) == [one | {"num_images": [1, 1]}]
