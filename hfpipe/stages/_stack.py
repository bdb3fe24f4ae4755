"""The stack as all stages of a run need it: imported once, by the run's fork server, of which each stage is a fork.

Nothing of it is garbage. Looking for some while it is imported takes a sixth of the time, and later upstream's trainer asks
for a whole collection at its start and its end, which would go over the million objects of the stack each time.
"""

import functools
import gc
import importlib
from collections.abc import Callable
from typing import Any

import torch

_compile = torch.compile


def compile_later(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    """`torch.compile` that begins at a function's first call."""
    if function is None:
        return functools.partial(compile_later, **options)
    compiled = functools.cache(lambda: _compile(function, **options))
    return functools.wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))


gc.disable()
# bitsandbytes names four functions to compile when PEFT imports it, and the compiler's import is an eighth of all.
torch.compile = compile_later
for _name in (
    "transformers",
    "datasets",
    "trl.trainer.dpo_trainer",
    "trl.trainer.sft_trainer",
    "hfpipe.evaluation.answers",
    "hfpipe.evaluation.basics",
    "hfpipe.processes",
    "hfpipe.training.adapters",
    "hfpipe.training.fit",
    "hfpipe.training.models",
    "hfpipe.training.order",
    "hfpipe.training.prepare",
):
    importlib.import_module(_name)
torch.compile = _compile

from transformers.conversion_mapping import get_checkpoint_conversion_mapping  # noqa: E402

get_checkpoint_conversion_mapping("")  # compiles some hundred patterns, once in a process
gc.freeze()
gc.enable()
