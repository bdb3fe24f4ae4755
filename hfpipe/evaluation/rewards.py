"""After a reward stage: how well its scores rank held-out pairs, what they are worth as probabilities, and length."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfpipe import artifact
from hfpipe.evaluation.intervals import wilson

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hfpipe.training.job import Job
    from hfpipe.training.prepare import Prepared

_ROWS_AT_ONCE = 16
_BINS = 10


def evaluate_reward_model(
    job: Job, folder: Path, prepare: Callable[[Job, PreTrainedTokenizerBase], Prepared]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Score the held-out pairs with the reward model in `folder` and write `eval.json` and `samples.jsonl`.

    Returns `{"pairs": ...}` as `pair_scores` gives it, and what became of the rows of each of the stage's sources.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from hfpipe.training.adapters import load_pretrained
    from hfpipe.training.hardware import free_memory, own_device, scoring_options

    options = {"trust_remote_code": job.stage.model.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(str(folder), **options)
    free_memory()
    loaded = load_pretrained(AutoModelForSequenceClassification, str(folder), **options, **scoring_options())
    model = loaded.to(own_device()).eval()
    prepared = prepare(job, tokenizer)
    scores: dict[str, Any] = {}
    samples: list[dict[str, Any]] = []
    if prepared.eval is not None:
        rewards = score_pairs(model, tokenizer, prepared.eval)
        lengths = [(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in prepared.eval]
        scores["pairs"] = pair_scores(rewards, lengths) | by_kind(rewards, prepared.report["kinds"])
        samples = _samples(tokenizer, prepared.eval, rewards, job.recipe.pipeline.evaluate.samples)
    artifact.write_jsonl(folder / "samples.jsonl", samples)
    artifact.write_json(folder / "eval.json", {"fingerprint": job.fingerprint, **scores, "samples": samples})
    return scores, prepared.report["sources"]


def score_pairs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Any) -> list[tuple[float, float]]:
    """The rewards of the chosen and of the rejected answer of each pair, in the pairs' order."""
    import torch

    from hfpipe.training.collate import PairCollator

    collate = PairCollator(tokenizer.pad_token_id)
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i]["prompt_ids"]) + len(pairs[i]["chosen_ids"]))
    found: dict[int, tuple[float, float]] = {}
    for start in range(0, len(order), _ROWS_AT_ONCE):
        batch = order[start : start + _ROWS_AT_ONCE]
        inputs = {name: value.to(model.device) for name, value in collate([pairs[i] for i in batch]).items()}
        with torch.inference_mode():
            rewards = model(**inputs, use_cache=False).logits.squeeze(-1).float().tolist()
        found |= dict(zip(batch, zip(rewards[: len(batch)], rewards[len(batch) :], strict=True), strict=True))
    return [found[i] for i in range(len(pairs))]


def pair_scores(rewards: list[tuple[float, float]], lengths: list[tuple[int, int]]) -> dict[str, Any]:
    """What held-out pairs say of a reward model.

    Args:
        rewards: of the chosen and the rejected answer of each pair.
        lengths: in tokens, likewise.

    Returns:
        n: pairs. loss: mean of -log sigmoid(margin), in nats.
        accuracy, low, high: share of pairs whose chosen answer has the higher reward, with its 95% interval.
        margin: mean of chosen minus rejected.
        calibration_error: sigmoid(margin) read as the probability that an answer is the better one: the mean distance
            between that and how often it is, over ten bins (0 is perfect; Guo et al. 2017).
        length_correlation: Pearson's, of an answer's reward with its length.
        longer_preferred, longer_chosen: of the pairs of unlike length, the share in which the longer answer has the
            higher reward, and in which it is the chosen one; the first well above the second is a bias for length.
    """
    margins = [chosen - rejected for chosen, rejected in rewards]
    right = sum(margin > 0 for margin in margins)
    low, high = wilson(right, len(margins))
    unlike = [(margin, a - b) for margin, (a, b) in zip(margins, lengths, strict=True) if a != b]
    flat = [number for pair in rewards for number in pair], [float(number) for pair in lengths for number in pair]
    scores = {
        "loss": sum(_softplus(-margin) for margin in margins) / len(margins),
        "accuracy": right / len(margins),
        "low": low,
        "high": high,
        "margin": sum(margins) / len(margins),
        "calibration_error": _calibration_error(margins),
        "length_correlation": _correlation(*flat),
        "longer_preferred": sum(margin * longer > 0 for margin, longer in unlike) / max(len(unlike), 1),
        "longer_chosen": sum(longer > 0 for _, longer in unlike) / max(len(unlike), 1),
    }
    return {"n": len(margins), **{name: round(value, 4) for name, value in scores.items()}}


def by_kind(rewards: list[tuple[float, float]], kinds: list[str | None]) -> dict[str, Any]:
    """`{"kinds": {kind: {accuracy, n}}}` where the rows have a column `kind`: a mean can hide one that is at chance."""
    margins: dict[str, list[float]] = {}
    for (chosen, rejected), kind in zip(rewards, kinds, strict=True):
        if kind is not None:
            margins.setdefault(str(kind), []).append(chosen - rejected)
    found = {k: {"accuracy": round(sum(m > 0 for m in v) / len(v), 4), "n": len(v)} for k, v in margins.items()}
    return {"kinds": dict(sorted(found.items()))} if found else {}


def _softplus(value: float) -> float:
    return max(value, 0) + math.log1p(math.exp(-abs(value)))


def _calibration_error(margins: list[float]) -> float:
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(_BINS)]
    for margin in margins:
        sure = 1 / (1 + math.exp(-min(abs(margin), 500)))  # from 0.5 to 1
        bins[min(int((sure - 0.5) * 2 * _BINS), _BINS - 1)].append((sure, margin > 0))
    distances = [abs(sum(sure - right for sure, right in part)) for part in bins]
    return sum(distances) / len(margins)


def _correlation(a: list[float], b: list[float]) -> float:
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    spread = math.sqrt(sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b))
    return sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True)) / spread if spread else 0.0


def _samples(
    tokenizer: PreTrainedTokenizerBase, pairs: Any, rewards: list[tuple[float, float]], count: int
) -> list[dict[str, Any]]:
    """A few pairs with their rewards, the most wrongly ranked first."""
    worst = sorted(range(len(rewards)), key=lambda i: rewards[i][0] - rewards[i][1])[:count]
    samples = []
    for i in worst:
        chosen, rejected = (tokenizer.decode(pairs[i][side]) for side in ("chosen_ids", "rejected_ids"))
        samples.append(
            {
                "asked": tokenizer.decode(pairs[i]["prompt_ids"], skip_special_tokens=True),
                "prompt": tokenizer.decode(pairs[i]["prompt_ids"]),
                "answer": f"{rewards[i][0]:+.2f} {chosen} | {rewards[i][1]:+.2f} {rejected}",
                "chosen": chosen,
                "rejected": rejected,
                "rewards": [round(reward, 3) for reward in rewards[i]],
            }
        )
    return samples
