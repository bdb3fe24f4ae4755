"""Batches of rows: packed ones whose documents cannot attend to each other, and plain padded ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class PackedCollator:
    """Stacks packed rows; each document starts again at position 0, which isolates it in the attention mask.

    Rows come as `input_ids`, `labels` and `seq_lengths` (tokens of each document in the row). Returns `input_ids`,
    `labels`, `position_ids`: (batch, seq) int64, without an attention mask: transformers then derives the
    block-diagonal one from `position_ids` (transformers 5.23, masking_utils.find_packed_sequence_indices).
    The first token of a document carries no loss, since nothing of its own comes before it.

    With `flatten` the batch is one row of (1, batch * seq): the form that flash attention's variable-length kernels need.
    """

    pad_token_id: int
    flatten: bool = False

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        width = -(-max(len(row["input_ids"]) for row in rows) // 8) * 8
        ids, labels, positions = [], [], []
        for row in rows:
            lengths = list(row["seq_lengths"])
            if not self.flatten and sum(lengths) < width:
                lengths.append(width - sum(lengths))  # padding is a document of its own
            pad = sum(lengths) - len(row["input_ids"])
            ids.append(torch.tensor([*row["input_ids"], *[self.pad_token_id] * pad]))
            positions.append(torch.cat([torch.arange(n) for n in lengths]))
            labels.append(torch.tensor([*row["labels"], *[-100] * pad]).masked_fill(positions[-1] == 0, -100))
        join = (lambda parts: torch.cat(parts)[None]) if self.flatten else torch.stack
        return {"input_ids": join(ids), "labels": join(labels), "position_ids": join(positions)}


@dataclass
class PaddedCollator:
    """Pads rows of one document each; returns `input_ids`, `labels`, `attention_mask`: (batch, seq) int64."""

    pad_token_id: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        width = -(-max(len(row["input_ids"]) for row in rows) // 8) * 8

        def padded(key: str, value: int) -> torch.Tensor:
            return torch.tensor([[*row[key], *[value] * (width - len(row[key]))] for row in rows])

        ids = padded("input_ids", self.pad_token_id)
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        return {
            "input_ids": ids,
            "labels": padded("labels", -100),
            "attention_mask": (torch.arange(width) < lengths[:, None]).long(),
        }


@dataclass
class PairCollator:
    """Pads both conversations of preferences, as the template renders them when they are over.

    Returns `input_ids`, `attention_mask`: (2 * batch, seq) int64, first all with the chosen answer, then all others.
    """

    pad_token_id: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        sides = ("chosen", "rejected")
        whole = [[*row["prompt_ids"], *row[f"{side}_ids"], *row[f"{side}_end"]] for side in sides for row in rows]
        padded = PaddedCollator(self.pad_token_id)([{"input_ids": ids, "labels": ids} for ids in whole])
        return {name: padded[name] for name in ("input_ids", "attention_mask")}


def collator_for(model: Any, tokenizer: Any, *, packing: bool) -> PackedCollator | PaddedCollator:
    """The collator for a model's rows.

    Raises:
        ValueError: rows are packed, but this architecture lets packed documents see each other.
    """
    if not packing:
        return PaddedCollator(tokenizer.pad_token_id)
    collator = PackedCollator(tokenizer.pad_token_id, flatten="flash" in (model.config._attn_implementation or ""))
    if not collator.flatten and not isolates_documents(model):
        raise ValueError(f"{model.config.model_type} lets packed documents see each other")
    return collator


@torch.no_grad()
def isolates_documents(model: Any) -> bool:
    """Whether a document's logits in a packed row are those that it has alone, tried with two short ones."""
    training = model.training
    model.eval()
    vocab = model.get_input_embeddings().num_embeddings
    first, second = [torch.arange(start, start + 4, device=model.device) % vocab for start in (vocab // 3, vocab // 2)]
    packed = model(
        input_ids=torch.cat([first, second])[None],
        position_ids=torch.cat([torch.arange(4), torch.arange(4)]).to(model.device)[None],
        use_cache=False,
    ).logits[0, 4:]
    alone = model(input_ids=second[None], use_cache=False).logits[0]
    model.train(training)
    tolerance = 1e-4 if packed.dtype == torch.float32 else 3e-2
    return bool((packed - alone).abs().max() <= tolerance * alone.abs().max())
