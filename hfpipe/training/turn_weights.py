"""Turns of the assistant that a row leaves out of the loss, by `weight: 0`."""

from __future__ import annotations

import itertools
from typing import Any

from hfpipe.errors import UserError


def weigh_turns(mask: list[int], messages: list[dict[str, Any]], number: int) -> list[int]:
    """The mask without its turns of weight 0; UserError, with the row's number, where it has not one stretch a turn."""
    weights = [message.get("weight", 1) for message in messages if message["role"] == "assistant"]
    if all(weights):
        return mask
    runs = [list(run) for _, run in itertools.groupby(mask)]
    if sum(run[0] for run in runs) != len(weights):
        raise UserError(
            f"Row {number}: `weight: 0` needs one trained stretch for each turn of the assistant; the chat template "
            f"gives {sum(run[0] for run in runs)} for {len(weights)}"
        )
    turns = iter(weights)
    return [trained for run in runs for trained in ([next(turns)] * len(run) if run[0] else run)]
