"""The report of a run: one HTML file that needs nothing else, made from what the stages left on disk."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfpipe import artifact
from hfpipe.evaluation.scorecard import Cell, read_scorecard, result
from hfpipe.progress import duration, quantity
from hfpipe.publishing.figures import curves_svg, needles_svg, shade

REPORT_FILE = "report.html"
_LONGEST = 160  # characters of an answer that the story shows
_TEMPLATE = Path(__file__).with_name("report.html.jinja")
# One question of each of these kinds is followed through the stages, where the probes have them.
_STORY = (
    "cloze", "question", "small_sum", "tool_answer", "json", "harm", "lookalike", "future", "made_up", "asks", "pirate",
)  # fmt: skip


@dataclass(frozen=True)
class StageStory:
    """What the report says of one stage."""

    name: str
    record: dict[str, Any]
    curve: list[tuple[int, float]]  # (step, training loss)
    held_out: list[tuple[int, float]]  # (step, loss on the stage's own validation rows, while it trained)
    rewards: list[tuple[int, float]]  # (step, mean reward), of a stage of reinforcement
    samples: list[dict[str, Any]]
    probes: list[dict[str, Any]]
    needle: dict[str, Any] | None = None  # of eval.json (hfpipe/evaluation/needle.py)

    @property
    def metrics(self) -> dict[str, Any]:
        return self.record.get("metrics", {})

    @property
    def warnings(self) -> list[str]:
        """What the guards did while it trained."""
        told = [*self.metrics.get("rollbacks", []), self.metrics.get("overfitting")]
        return [item["text"] for item in told if item]


def write_report(run: Path) -> Path:
    """Write `report.html` into a run's folder; an older one is replaced whole."""
    path = run / REPORT_FILE
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(build_report(run), encoding="utf-8")
    beside.replace(path)
    return path


def build_report(run: Path) -> str:
    """The report as HTML. Everything that came from a model or from data is escaped by the template."""
    from jinja2 import Environment, select_autoescape

    stages, card = read_stages(run), read_scorecard(run)
    environment = Environment(autoescape=select_autoescape(default=True, default_for_string=True), trim_blocks=True)
    environment.filters |= {"duration": duration, "quantity": quantity, "shade": _shade, "result": result}
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    record = artifact.read_json(run / "run.json") or {}
    return template.render(
        name=record.get("recipe", run.name),
        stages=stages,
        card=card,
        story=story(stages),
        curves=curves_svg(stages),
        needles=needles_svg(stages),
        total_s=sum(stage.record.get("wall_s", 0) for stage in stages),
        last=stages[-1].record if stages else {},
    )


def read_stages(run: Path) -> list[StageStory]:
    """The finished stages of a run in the recipe's order."""
    stages = []
    for name in (artifact.read_json(run / "run.json") or {}).get("stages", []):
        folder = run / name
        record = artifact.read_json(folder / artifact.STAGE_FILE)
        if record is None:
            continue
        history = read_lines(folder / "metrics.jsonl")
        curve = [(line["step"], line["loss"]) for line in history if "loss" in line]
        held_out = [(line["step"], line["eval_loss"]) for line in history if "eval_loss" in line]
        rewards = [(line["step"], line["reward"]) for line in history if "reward" in line]
        scores = artifact.read_json(folder / "eval.json") or {}
        samples, probes = scores.get("samples", []), read_lines(folder / "probes.jsonl")
        stages.append(StageStory(name, record, curve, held_out, rewards, samples, probes, scores.get("needle")))
    return stages


def story(stages: list[StageStory]) -> list[dict[str, Any]]:
    """A question of each kind with every stage's answer.

    Of the questions that the last stage answers rightly, the first of those whose right and wrong answers, stage by
    stage, are the commonest pattern.
    """
    scored = [stage for stage in stages if stage.probes]
    answered = {stage.name: {_key(row): row for row in stage.probes} for stage in scored}
    common = [row for row in scored[0].probes if all(_key(row) in rows for rows in answered.values())] if scored else []
    followed = []
    for kind in _STORY:
        spots = {_key(row): row for row in common if row["kind"] == kind}
        patterns = {key: tuple(answered[s.name][key]["score"] == 1 for s in scored) for key in spots}
        right_in_the_end = {i: p for i, p in patterns.items() if p[-1]} or patterns
        if not right_in_the_end:
            continue
        ((typical, _),) = Counter(right_in_the_end.values()).most_common(1)
        spot = next(key for key, pattern in right_in_the_end.items() if pattern == typical)
        answers = [
            {"stage": stage.name, "text": _told(answered[stage.name][spot]), "right": right}
            for stage, right in zip(scored, typical, strict=True)
        ]
        row = spots[spot]
        followed.append({"asked": _asked(row), "capability": row["capability"], "answers": answers})
    return followed


def _key(row: dict[str, Any]) -> str:
    return json.dumps([row["kind"], row.get("prompt"), row.get("messages")])


def _told(row: dict[str, Any]) -> str:
    text = "\n".join(row.get("turns") or [row["answer"]]) or row["raw"]
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST].rstrip()} …"


def _asked(row: dict[str, Any]) -> str:
    if "prompt" in row:
        return f"{row['prompt']} ..."
    return "\n".join(f"{m['role']}: {m.get('content') or ''}" for m in row["messages"])


def _shade(cell: Cell) -> str:
    return "rgb({}, {}, {})".format(*shade(cell.score))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a jsonl file; none where there is no file."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").split("\n"):  # JSON may hold other ends of lines, as U+2028
        with contextlib.suppress(ValueError):  # the last line of a write that was cut off
            found.append(json.loads(line))
    return found
