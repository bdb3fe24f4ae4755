"""Sections about scores: what is asked after every stage, and what is looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hfpipe.sections.data import HeldOutText
from hfpipe.sections.fields import above, at_least


@dataclass(frozen=True)
class Probe:
    """Held-out questions: `tinyworld/probes`, or a file whose rows name their check, or rows in any known form."""

    path: str
    capability: str | None = None  # default: what each row names
    check: str | None = None  # for rows in a known form: the check, whose value is read from the row's own answer
    judge: str | None = (
        None  # of `prefers`: a reward model's folder or Hub id, or the URL of an OpenAI-compatible endpoint
    )
    judge_model: str = "default"  # the model to ask at that endpoint
    split: str | None = None  # default: test
    limit: int | None = at_least(1, None)  # rows at the most


@dataclass(frozen=True)
class Needle:
    """A fact hidden in held-out text (`evaluate.text`), to be gone on with at its end (hfpipe/evaluation/needle.py)."""

    lengths: tuple[int, ...] = ()  # of the whole prompt, in tokens
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)  # 0: at the beginning, 1: just before the question
    per_cell: int = at_least(1, 10)  # questions for each length and depth
    fact: str = "The password of {name} is {word}."  # asked up to `{word}`


@dataclass(frozen=True)
class LLC:
    """Arguments of devinterp's `llc`, by its names and with its meaning."""

    lr: float = above(0, 1e-5)
    n_beta: float = above(0, 30.0)
    num_chains: int = at_least(1, 2)
    num_draws: int = at_least(1, 50)
    num_burnin_steps: int = at_least(0, 0)
    batch_size: int = at_least(1, 16)
    localization: float = at_least(0, 0.0)


@dataclass(frozen=True)
class Evaluate:
    probes: tuple[Probe, ...] = ()  # asked after every stage; a score for each capability
    text: tuple[HeldOutText, ...] = ()  # held-out pretraining text: perplexity after every stage
    metrics: tuple[
        Literal["perplexity", "bleu", "rouge", "exact_match", "accuracy", "f1"], ...
    ] = ()  # on held-out conversations
    needle: Needle | None = None
    diagnostics: tuple[Literal["effective_rank", "llc"], ...] = ()  # of the weights, after every stage
    llc: LLC = LLC()
    samples: int = at_least(0, 5)
    max_new_tokens: int = at_least(1, 64)
    max_rows: int = at_least(1, 400)  # rows read for each loss
