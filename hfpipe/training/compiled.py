"""`model.compile_blocks`: the passes of a model's blocks in training, compiled once for rows of any length.

Blocks are alike, so one of them is compiled and all run it; the next stage finds the kernels in the compiler's cache.
`trainer.torch_compile` compiles a whole model, again for shapes that it has not met, so that what a batch runs depends on
those before it. Here one program serves all lengths; a batch of fewer rows than others, as an epoch may leave, runs as it would
otherwise, as does what takes no gradients (evaluation, answers, a reference). Which program it is the first batch's length
decides, so that training on rows begins with passes of the longest, to no effect, also where it is resumed, and comes to the
same bits; what samples its rows (ppo and the like) may not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hfpipe.errors import UserError
from hfpipe.training.regularize import find_blocks

if TYPE_CHECKING:
    from transformers import Trainer

    from hfpipe.training.job import Job, Progress


def compile_blocks(job: Job, trainer: Trainer, progress: Progress) -> None:
    """Have the blocks of the trainer's model, and of a critic's own backbone, run compiled where they are trained."""
    if not job.stage.model.compile_blocks:
        return
    models = [trainer.model, getattr(getattr(trainer, "critic", None), "backbone", None)]
    blocks = [block for model in models if model is not None for block in compiled_blocks(model, f"{job.stage.file}")]
    failure = _Failure(progress)
    for block in blocks:
        _compile(block, failure)
    progress.note(f"compiled: the passes of {len(blocks)} blocks in training, at the first one (model.compile_blocks)")


def compiled_blocks(model: nn.Module, where: str) -> nn.ModuleList:
    """The blocks that would be compiled; UserError where the model keeps them in no list."""
    if (blocks := find_blocks(model)) is None:
        raise UserError(
            f"{where}: model.compile_blocks: a {model.config.get_text_config().model_type} model keeps its blocks in no list "
            "that hfpipe finds. Leave it out; trainer.torch_compile compiles a model as a whole."
        )
    return blocks


class _Failure:
    """That the compiler has failed, said once: no compiler for C++ is here, or it can't do what this model does."""

    def __init__(self, progress: Progress):
        self.progress, self.happened = progress, False

    def tell(self, error: Exception) -> None:
        if not self.happened:
            self.happened = True
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            self.progress.note(f"not compiled after all, the blocks train as they are: {reason}")


def _compile(block: nn.Module, failure: _Failure) -> None:
    from torch._dynamo.exc import TorchDynamoException  # a second of imports
    from torch._inductor import config as inductor

    # With dynamic shapes a float such as a norm's epsilon would be an input too: found out only after all has been traced once.
    torch._dynamo.config.specialize_float = True
    if inductor.cpp.vec_isa_ok is None:
        # Else six seconds go into trying what the processor says of itself. Where it can't, `failure` is told.
        inductor.cpp.vec_isa_ok = True
    compiled = torch.compile(block._call_impl, dynamic=True)
    most = 0  # rows of a batch so far

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal most
        rows, length = (args or tuple(kwargs.values()))[0].shape[:2]
        # The few rows that an epoch leaves can be too small for the program: one for them alone takes half a minute.
        if torch.is_grad_enabled() and not failure.happened and rows >= most:
            most = rows
            # What another training has begun with at another length must not be found in the compiler's cache.
            if not torch.compiler.config.cache_key_tag:
                torch.compiler.config.cache_key_tag = f"hfpipe: {length} tokens first"
            try:
                return compiled(*args, **kwargs)
            except TorchDynamoException as error:
                failure.tell(error)
        return block._call_impl(*args, **kwargs)

    # As `Module.compile` does: a copy of the block, or its saved state, has none of it.
    block._compiled_call_impl = call
