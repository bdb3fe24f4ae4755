"""What a rehearsal trains with where a run has not come so far yet: random tokens, random weights, a tokenizer of the right size."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, PreTrainedTokenizerFast, TrainerCallback

from hfpipe.training.hardware import has_accelerator
from hfpipe.training.prepare import Prepared
from hfpipe.training.templates import load_chat_template, set_chat_template
from hfpipe.training.tokenizers import BEGIN, PAD, SPECIAL_TOKENS

WARM_UP, STEPS = 3, 10
_PATIENCE_S = 90  # of one stage, unless not even a step is done


class Over(Exception):
    """The steps are measured: the training goes no further."""


@dataclass
class Rehearsal(TrainerCallback):
    """A job's stand-ins, and the clock that ends it."""

    config: dict[str, Any]  # of the model that the stage starts from
    vocab_size: int
    rows: int  # to make up
    tokens: int  # of one of them, a pair's answers both counted
    packed: bool
    stamps: list[float] = field(default_factory=list)  # ends of the steps, in seconds
    made_up: set[str] = field(default_factory=set)  # what was not there
    tokens_per_row: float = 0.0

    def load(self, auto_class: Any, **options: Any) -> Any:
        """In place of `auto_class.from_pretrained`."""
        if "Tokenizer" in auto_class.__name__:
            return self._tokenizer()
        self.made_up.add("random weights")
        given = {"attn_implementation": options["attn_implementation"]} if "attn_implementation" in options else {}
        sizes = {**self.config, "vocab_size": self.vocab_size, "num_labels": options.get("num_labels", 2)}
        dtype = self.config.get("dtype", "float32") if options.get("dtype") == "auto" else options.get("dtype")
        return auto_class.from_config(AutoConfig.for_model(**sizes), dtype=getattr(torch, str(dtype)), **given)

    def _tokenizer(self) -> PreTrainedTokenizerFast:
        words = [*SPECIAL_TOKENS, *(f"w{n}" for n in range(self.vocab_size - len(SPECIAL_TOKENS)))]
        backend = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token=PAD))
        named = {"bos_token": BEGIN, "eos_token": "<|end_assistant|>", "pad_token": PAD}
        others = [token for token in SPECIAL_TOKENS if token not in named.values()]
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, extra_special_tokens=others, **named)
        set_chat_template(tokenizer, load_chat_template("hfpipe"))
        return tokenizer

    def prepared(self, kind: str) -> Prepared:
        """Rows of a stage's form, as `hfpipe.training.prepare` would give them."""
        self.made_up.add("random tokens")
        rng = random.Random(0)

        def ids(count: int) -> list[int]:
            return [rng.randrange(len(SPECIAL_TOKENS), self.vocab_size) for _ in range(max(count, 2))]

        rows = []
        for number in range(self.rows):
            if kind == "preference":
                part = self.tokens // 4
                row = {"prompt_ids": ids(part), "chosen_ids": ids(part), "rejected_ids": ids(part)}
                row |= {"chosen_end": [], "rejected_end": []}
            elif kind == "unpaired":
                row = {
                    "prompt_ids": ids(self.tokens // 2),
                    "completion_ids": ids(self.tokens // 2),
                    "label": number % 2 == 0,
                }
            else:
                row = {"input_ids": (made := ids(self.tokens)), "labels": made}
                row["seq_lengths"] = [len(made) // 2, len(made) - len(made) // 2] if self.packed else [len(made)]
            rows.append(row)
        report = {"sources": [], "samples": [], "kinds": [], "tokens_per_row": self.tokens}
        return Prepared(Dataset.from_list(rows), None, report)

    # --- the clock ---

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if has_accelerator():
            torch.accelerator.synchronize()
        self.stamps.append(time.perf_counter())
        late = self.stamps[-1] - self.began > _PATIENCE_S and len(self.stamps) > 1
        if late or len(self.stamps) == WARM_UP + STEPS:
            raise Over

    def seconds(self) -> tuple[float, int]:
        """Of one step, in the mean of the steps measured; and their number."""
        first = min(WARM_UP, len(self.stamps) // 2) - 1
        measured = len(self.stamps) - 1 - first
        return (self.stamps[-1] - self.stamps[first]) / measured, measured
