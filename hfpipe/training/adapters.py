"""PEFT adapters from a recipe's `adapter` section."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hfpipe.errors import UserError

if TYPE_CHECKING:
    from hfpipe.training.job import Job


def build_adapter(job: Job) -> Any | None:
    """The PEFT configuration of the stage's `adapter` section, or None."""
    if job.stage.adapter is None:
        return None
    from peft import get_peft_config

    options = dict(job.stage.adapter)
    kind = options.pop("type")
    try:
        return get_peft_config({"peft_type": kind.upper(), "task_type": "CAUSAL_LM", **options})
    except (TypeError, ValueError) as error:
        raise UserError(f"{job.stage.file}: adapter is refused by PEFT: {error}") from error
