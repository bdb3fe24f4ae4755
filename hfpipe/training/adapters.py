"""PEFT adapters from a recipe's `adapter` section."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from hfpipe.errors import UserError

if TYPE_CHECKING:
    from hfpipe.sections import Stage


# They change the base's own weights, so that the model without its adapter is no longer the reference (PEFT 0.21).
_REWRITES_BASE = ("pissa", "olora", "corda", "eva", "lora_ga")


def build_adapter(stage: Stage) -> Any | None:
    """The PEFT configuration of the stage's `adapter` section, or None.

    Raises:
        UserError: PEFT refuses it, or it would give the stage a wrong reference.
    """
    if stage.adapter is None:
        return None
    from peft import get_peft_config

    options = copy.deepcopy(stage.adapter)
    start = str(options.get("init_lora_weights"))
    if stage.type.rows == "preference" and stage.type.leaves == "model" and start.startswith(_REWRITES_BASE):
        raise UserError(
            f"{stage.file}: adapter.init_lora_weights = {start!r} rewrites the base's weights, so the reference would be wrong. "
            "Leave it out in a stage of preferences."
        )
    kind = options.pop("type")
    task = "SEQ_CLS" if stage.type.leaves == "reward_model" else "CAUSAL_LM"
    try:
        return get_peft_config({"peft_type": kind.upper(), "task_type": task, **options})
    except (TypeError, ValueError) as error:
        raise UserError(f"{stage.file}: adapter is refused by PEFT: {error}") from error
