"""Batches of packed rows whose documents cannot attend to each other."""

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

    @classmethod
    def for_model(cls, model: Any, tokenizer: Any) -> PackedCollator:
        return cls(tokenizer.pad_token_id, flatten="flash" in (model.config._attn_implementation or ""))

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        longest = max(len(row["input_ids"]) for row in rows)
        width = longest if self.flatten else -(-longest // 8) * 8
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
