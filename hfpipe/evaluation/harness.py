"""Standard benchmarks through lm-evaluation-harness: its tasks, its prompts, its metrics; our scorecard."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hfpipe.errors import UserError, nearest
from hfpipe.evaluation.intervals import wilson

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HARNESS_FILE = "harness.json"  # in a stage's folder, beside eval.json
PREFIX = "harness/"


def run_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    limit: int | None = None,
    apply_chat_template: bool = False,
) -> dict[str, dict[str, Any]]:
    """`{"harness/TASK": {"score", "n", "low", "high", "metric", "judged", "kinds": {}}}`: each task's first metric.

    `include_path` is a folder with task files of one's own; the rest are arguments of `lm_eval.simple_evaluate`.

    Raises:
        UserError: the extra is not installed, or a task is unknown.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f'--harness needs lm-evaluation-harness ({error}): pip install -c constraints.txt "hfpipe[harness]".'
        ) from None
    manager = TaskManager(include_path=include_path)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise UserError(
            f"--harness: lm-evaluation-harness has no task `{unknown[0]}`.{nearest(unknown[0], manager.all_tasks)}"
        )
    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16),
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        apply_chat_template=apply_chat_template,
        random_seed=0,
        bootstrap_iters=1000,
    )
    scored = {}
    for task, scores in found["results"].items():
        higher = found.get("higher_is_better", {}).get(task, {})
        score = _score(scores, found.get("n-samples", {}).get(task, {}).get("effective", 0), higher)
        if score:
            scored[f"{PREFIX}{task}"] = score
    if not scored:
        raise UserError(f"--harness: {', '.join(tasks)} gave no number.")
    return scored


def _score(scores: dict[str, Any], n: int, higher_is_better: dict[str, bool]) -> dict[str, Any] | None:
    metric = next(
        (name for name, value in scores.items() if "," in name and "_stderr" not in name and _number(value)), None
    )
    if metric is None:
        return None
    name, _, which = metric.partition(",")
    error, score = scores.get(f"{name}_stderr,{which}"), float(scores[metric])
    spread = 1.96 * error if _number(error) else 0.0
    low, high = max(score - spread, 0.0), score + spread
    if 0 <= score <= 1:
        high = min(high, 1.0)
        if n > 1 and _number(error) and math.isclose(error, math.sqrt(score * (1 - score) / (n - 1)), abs_tol=1e-6):
            low, high = wilson(score * n, n)  # a share's; a plain one has no width at 0 and 1
    return {
        "score": round(score, 4),
        "n": n,
        "low": round(low, 4),
        "high": round(high, 4),
        "metric": metric,
        "judged": _number(error) and bool(higher_is_better.get(name, True)),  # whether a change can be called one
        "kinds": {},
    }


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
