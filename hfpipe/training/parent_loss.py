"""How hard a row is for the model that a stage starts from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from hfpipe.training.collate import PaddedCollator
from hfpipe.training.hardware import own_device, scoring_options
from hfpipe.training.models import load_parent

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from hfpipe.training.job import Job

_TOKENS = 4096  # of a batch, padding counted


@torch.no_grad()
def parent_losses(job: Job, tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> list[float]:
    """Mean loss of a row's trained tokens under the stage's parent, in nats; of a preference those of `chosen`."""
    model = load_parent(job, tokenizer).eval()
    if torch.accelerator.is_available() and not getattr(model, "is_quantized", False):
        model.to(own_device(), **scoring_options())
    collate = PaddedCollator(tokenizer.pad_token_id)
    losses = [0.0] * len(rows)
    for numbers in _batches(list(rows["tokens"])):
        batch = {name: ids.to(model.device) for name, ids in collate([_trained(rows[n]) for n in numbers]).items()}
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1].float()
        loss = cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none").sum(1)
        for number, mean in zip(numbers, (loss / (labels != -100).sum(1).clamp(min=1)).tolist(), strict=True):
            losses[number] = mean
    del model
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()  # the stage's own model comes next
    return losses


def _batches(lengths: list[int]) -> list[list[int]]:
    """Rows of about the same length, as many as `_TOKENS` hold."""
    batches: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > _TOKENS:
            batches.append([])
        batches[-1].append(number)
    return batches


def _trained(row: dict[str, Any]) -> dict[str, list[int]]:
    if "input_ids" in row:
        return row
    answer = row["chosen_ids"] if "chosen_ids" in row else row["completion_ids"]
    return {"input_ids": [*row["prompt_ids"], *answer], "labels": [-100] * len(row["prompt_ids"]) + list(answer)}
