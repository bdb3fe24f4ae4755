"""Where in a text its tokens are, spaces included."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_TRIMS = b'"trim_offsets":true'


@contextlib.contextmanager
def whole_offsets(tokenizer: PreTrainedTokenizerFast) -> Iterator[None]:
    """Within it a token's place in the text begins with its spaces, for all tokenizers.

    Many byte-level ones (GPT-2's, Llama 3's) leave them out, and upstream, which finds no token where a turn begins with one,
    takes that turn and all after it for untrained (transformers 5.23, `get_assistant_mask`). The ids are the same.
    """
    backend = tokenizer.backend_tokenizer
    processor = backend.post_processor
    state = processor.__getstate__() if processor is not None else b""
    if _TRIMS not in state:
        yield
        return
    mended = copy.deepcopy(processor)
    mended.__setstate__(state.replace(_TRIMS, b'"trim_offsets":false'))
    backend.post_processor = mended
    try:
        yield
    finally:
        backend.post_processor = processor
