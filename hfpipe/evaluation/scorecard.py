"""The scorecard of a run: stage x capability, what each stage changed, and what it made the model forget. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfpipe import artifact
from hfpipe.evaluation.harness import HARNESS_FILE
from hfpipe.evaluation.intervals import difference

if TYPE_CHECKING:
    from pandas import DataFrame

# The order in which capabilities are shown; others follow by name.
ORDER = (
    "stopping", "turn_taking", "tools", "format", "instructions",
    "helpfulness", "safety", "honesty", "tone", "detail", "clarification",
    "knowledge", "robustness", "long_context",
)  # fmt: skip
DIAGNOSTICS = {"effective_rank": "effective rank", "llc": "LLC"}
TEXT_LIMIT = 1.25  # perplexity of held-out text against the first model's, above which it counts as forgotten
_HOLD = "set regularize.l2_to_parent, average_with_parent or freeze_layers, lower trainer.learning_rate, or train fewer steps"
_ADVICE = {
    "knowledge": f"replay pretraining text (a source with `as: text`), {_HOLD}",
    "text": f"replay pretraining text (a source with `as: text`), {_HOLD}",
}
OTHER_TOKENS = "perplexity is a token's: not to be compared between stages of different tokenizers; bits per byte are"
_KEEP_ROWS = f"keep some rows of the earlier stage among its data, {_HOLD}"


@dataclass(frozen=True)
class Cell:
    """A score with its 95% interval and, against the parent, its change; `sure`: 0 lies outside the change's interval."""

    score: float
    low: float
    high: float
    n: int
    change: float | None = None
    sure: bool = False

    @property
    def arrow(self) -> str:
        return ("↑" if self.change > 0 else "↓") if self.sure and self.change else ""


@dataclass(frozen=True)
class Scorecard:
    stages: list[str]
    capabilities: list[str]
    cells: dict[tuple[str, str], Cell]  # (stage, capability)
    text: dict[str, dict[str, float]]  # stage -> loss, perplexity and bits_per_byte of held-out text
    parents: dict[str, str]
    forgotten: list[str]  # in words, one line each
    beyond: list[str]  # likewise: what stages of reinforcement gained beyond their control by random rewards
    domains: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)  # stage -> domain -> as in `text`
    fertility: dict[str, dict[str, Any]] = field(default_factory=dict)  # stage -> text -> before, after
    diagnostics: dict[str, dict[str, dict[str, float]]] = field(
        default_factory=dict
    )  # stage -> effective_rank, llc -> mean and more

    def branches(self) -> dict[str, str]:
        """Stages that do not start from the one before them, with what they start from: `from sft`."""
        before = dict(zip(self.stages[1:], self.stages, strict=False))
        return {stage: f"from {parent}" for stage, parent in self.parents.items() if parent != before.get(stage)}

    def text_rows(self) -> list[tuple[str, dict[str, float]]]:
        """What is known of held-out text: a label, and a figure for each stage that has one."""
        rows = []
        for domain in dict.fromkeys(name for scores in self.domains.values() for name in scores) or [None]:
            told = {s: self.domains.get(s, {}).get(domain) for s in self.stages} if domain else self.text
            for key, label in (("perplexity", "perplexity"), ("bits_per_byte", "bits per byte")):
                values = {stage: scores[key] for stage, scores in told.items() if scores and key in scores}
                rows.append((f"{label} {domain}" if domain else label, values))
        return [(label, values) for label, values in rows if values]

    def weight_rows(self) -> list[tuple[str, dict[str, float]]]:
        """The mean of each diagnostic of the weights: a label, and a figure for each stage that has one."""
        rows = []
        for name, label in DIAGNOSTICS.items():
            rows.append((label, {s: told[name]["mean"] for s, told in self.diagnostics.items() if name in told}))
        return [(label, values) for label, values in rows if values]

    def as_json(self) -> dict[str, Any]:
        rows = {
            stage: {
                c: vars(self.cells[stage, c]) | {"arrow": self.cells[stage, c].arrow}
                for c in self.capabilities
                if (stage, c) in self.cells
            }
            for stage in self.stages
        }
        more = {"held_out_domains": self.domains, "fertility": self.fertility}
        words = {"forgotten": self.forgotten, "beyond_control": self.beyond}
        if self.diagnostics:
            more["diagnostics"] = self.diagnostics
        return {"stages": rows, "held_out_text": self.text, **more, "parents": self.parents, **words}

    def as_frame(self, long: bool = False) -> DataFrame:
        """Scores, capabilities down and stages across; with `long` a row a score, with all that its `Cell` holds."""
        from pandas import DataFrame

        rows = [{"stage": s, "capability": c, **vars(x), "arrow": x.arrow} for (s, c), x in self.cells.items()]
        frame = DataFrame(rows, columns=["stage", "capability", *Cell.__dataclass_fields__, "arrow"]).drop(
            columns="sure"
        )
        if long:
            return frame
        return frame.pivot(index="capability", columns="stage", values="score").loc[self.capabilities, self.stages]


def read_scorecard(run: Path) -> Scorecard:
    """From the `eval.json` and `stage.json` of every finished stage that left a language model."""
    listed = (artifact.read_json(run / "run.json") or {}).get("stages", [])
    found = {stage: artifact.read_json(run / stage / "eval.json") for stage in listed}
    evals = {}
    for stage, scores in found.items():
        if scores is None or "pairs" in scores:  # a reward model answers nothing
            continue
        harness = artifact.read_json(run / stage / HARNESS_FILE) or {}
        evals[stage] = {**scores, "capabilities": {**scores.get("capabilities", {}), **harness}}
    cells: dict[tuple[str, str], Cell] = {}
    parents, names = {}, set()
    records = {stage: artifact.read_json(run / stage / artifact.STAGE_FILE) or {} for stage in evals}
    for stage, scores in evals.items():
        record = records[stage]
        parent = (record.get("parent") or {}).get("from")
        if parent in evals:
            parents[stage] = parent
        for name, score in scores["capabilities"].items():
            names.add(name)
            cells[stage, name] = _cell(score, (evals.get(parent) or {}).get("capabilities", {}).get(name))
    order = {name: place for place, name in enumerate(ORDER)}
    text = {stage: scores["held_out_text"] for stage, scores in evals.items() if "held_out_text" in scores}
    card = Scorecard(
        list(evals), sorted(names, key=lambda n: (order.get(n, len(order)), n)), cells, text, parents, [], [],
        {stage: scores["held_out_domains"] for stage, scores in evals.items() if "held_out_domains" in scores},
        {stage: scores["fertility"] for stage, scores in evals.items() if "fertility" in scores},
        {stage: scores["diagnostics"] for stage, scores in evals.items() if "diagnostics" in scores},
    )  # fmt: skip
    card.forgotten.extend(_forgotten(card))
    card.beyond.extend(_beyond_control(card, records))
    return card


def _cell(score: dict[str, Any], before: dict[str, Any] | None) -> Cell:
    own = score["score"], score["low"], score["high"]
    if before is None:
        return Cell(*own, score["n"])
    low, high = difference((before["score"], before["low"], before["high"]), own)
    # Of a metric that is better when lower, or without an interval, no arrow can speak.
    sure = not low <= 0 <= high and score.get("judged", True)
    return Cell(*own, score["n"], round(own[0] - before["score"], 4), sure)


def _forgotten(card: Scorecard) -> list[str]:
    lines = []
    for (stage, name), cell in card.cells.items():
        if cell.arrow == "↓":
            before = card.cells[card.parents[stage], name].score
            advice = _ADVICE.get(name, _KEEP_ROWS)
            lines.append(f"{stage}: {name} {before:.2f} -> {cell.score:.2f}, more than the interval: {advice}")
    lines += _forgotten_domains(card)
    first = None if card.domains else next(iter(card.text.values()), None)
    for stage, scores in card.text.items():
        perplexity = first and _perplexity(scores, first)
        held = first is not None and perplexity <= TEXT_LIMIT * first["perplexity"]  # False for a NaN
        if first and not held and stage in card.parents:
            lines.append(
                f"{stage}: perplexity of held-out text {first['perplexity']:.2f} -> {perplexity:.2f}, "
                f"more than {TEXT_LIMIT:g} times the first: {_ADVICE['text']}"
            )
    return lines


def _perplexity(now: dict[str, float], first: dict[str, float]) -> float:
    """Of as many bytes as one of the first model's tokens has: tokens may have changed meanwhile."""
    if not first["bits_per_byte"]:
        return now["perplexity"]
    return math.exp(min(first["loss"] * now["bits_per_byte"] / first["bits_per_byte"], 50))


def _forgotten_domains(card: Scorecard) -> list[str]:
    """Domains whose text is harder than for the first model, by bits per byte: tokens may have changed meanwhile."""
    lines, firsts = [], next(iter(card.domains.values()), {})
    for stage, scores in card.domains.items():
        for name in scores.keys() & firsts.keys() if stage in card.parents else ():
            first, now = firsts[name], scores[name]
            if not _perplexity(now, first) <= TEXT_LIMIT * first["perplexity"]:
                lines.append(
                    f"{stage}: bits per byte of {name} {first['bits_per_byte']:.2f} -> {now['bits_per_byte']:.2f}, as a "
                    f"perplexity more than {TEXT_LIMIT:g} times the first: {_ADVICE['text']}"
                )
    return lines


def _beyond_control(card: Scorecard, records: dict[str, dict[str, Any]]) -> list[str]:
    """Each stage of reinforcement against the one of its kind and parent whose rewards were dealt out at random."""

    def rewards(stage: str) -> dict[str, Any] | None:
        return records[stage].get("config", {}).get("rewards")

    def key(stage: str) -> tuple[Any, Any]:
        return records[stage].get("type"), (records[stage].get("parent") or {}).get("fingerprint")

    steered = [stage for stage in card.stages if rewards(stage)]
    controls = {key(stage): stage for stage in steered if rewards(stage)["control"]}
    lines = []
    for stage in steered:
        control = controls.get(key(stage))
        if control is None or control == stage:
            continue
        rewarded = [(records[one].get("metrics", {}).get("held_out") or {}).get("reward") for one in (stage, control)]
        gains = [] if None in rewarded else [f"held-out reward {rewarded[0] - rewarded[1]:+.2f}"]
        for name in card.capabilities:
            own, other = card.cells.get((stage, name)), card.cells.get((control, name))
            if own is None or other is None:
                continue
            low, high = difference((other.score, other.low, other.high), (own.score, own.low, own.high))
            if not low <= 0 <= high:
                gains.append(f"{name} {own.score - other.score:+.2f} ({low:+.2f} to {high:+.2f})")
        lines.append(f"{stage} beyond {control}: {', '.join(gains) or 'nothing outside the intervals'}")
    return lines


def table(card: Scorecard) -> list[str]:
    """The scorecard as lines of plain text."""
    text = card.text_rows()
    width = max([14, *map(len, card.capabilities), *(len(label) for label, _ in text)]) + 2
    branches = card.branches()
    column = max([10, *map(len, card.stages), *map(len, branches.values())]) + 2
    lines = [" " * width + "".join(f"{stage:>{column}}" for stage in card.stages)]
    if branches:
        lines.append(" " * width + "".join(f"{branches.get(stage, ''):>{column}}" for stage in card.stages))
    for name in card.capabilities:
        shown = (card.cells.get((stage, name)) for stage in card.stages)
        lines.append(f"{name:<{width}}" + "".join(f"{_show(cell):>{column}}" for cell in shown))
    for label, figures in [*text, *card.weight_rows()]:
        values = [figures.get(stage) for stage in card.stages]
        lines.append(f"{label:<{width}}" + "".join(f"{'' if v is None else f'{v:.2f}  ':>{column}}" for v in values))
    lines += [OTHER_TOKENS] if card.fertility else []
    if any(cell.arrow for cell in card.cells.values()):
        lines.append("↑ ↓: changed from the stage that it starts from by more than the 95% interval of the difference")
    return lines


def _show(cell: Cell | None) -> str:
    return "" if cell is None else f"{cell.score:.2f} {cell.arrow or ' '}"


def changes(card: Scorecard, stage: str) -> str:
    """What a stage changed beyond the interval, in one line; empty where nothing did."""
    moved = [(name, card.cells[stage, name]) for name in card.capabilities if (stage, name) in card.cells]
    moved = sorted((m for m in moved if m[1].sure), key=lambda m: -abs(m[1].change or 0))
    return ", ".join(
        f"{name} {cell.score - (cell.change or 0):.2f} {cell.arrow} {cell.score:.2f}" for name, cell in moved
    )


def result(metrics: dict[str, Any]) -> str:
    """What a finished stage's `metrics` say, in a few words: steps, held-out losses, pairs, rewards."""
    parts = []
    if "steps" in metrics:
        parts.append(f"{metrics['steps']} steps")
    for name, label in (("validation", "validation"), ("held_out_text", "held-out text")):
        if name in metrics:
            parts.append(f"{label} loss {metrics[name]['loss']:.3f} (perplexity {metrics[name]['perplexity']:.2f})")
    for name, scores in metrics.get("held_out_domains", {}).items():
        parts.append(f"{name} {scores['bits_per_byte']:.3f} bits per byte")
    for name, told in metrics.get("fertility", {}).items():
        before, after = (told[when]["tokens_per_word"] for when in ("before", "after"))
        parts.append(f"{name} {before:.2f} -> {after:.2f} tokens a word")
    if pairs := metrics.get("pairs"):
        parts.append(f"{pairs['accuracy']:.0%} of {pairs['n']} held-out pairs right")
        if "calibration_error" in pairs:
            parts.append(
                f"calibration error {pairs['calibration_error']:.3f}, prefers the longer answer in "
                f"{pairs['longer_preferred']:.0%} of pairs (it is the better one in {pairs['longer_chosen']:.0%})"
            )
        if kinds := pairs.get("kinds"):
            worst = sorted(kinds, key=lambda kind: kinds[kind]["accuracy"])[:3]
            parts.append("weakest: " + ", ".join(f"{kind} {kinds[kind]['accuracy']:.0%}" for kind in worst))
    if after := metrics.get("held_out"):
        before = metrics["held_out_before"]  # None where the model was divided among devices
        was = f"{before['reward']:.2f} -> " if before else ""
        gain = after.get("gain")
        told = f" ({gain['difference']:+.2f}, {gain['low']:+.2f} to {gain['high']:+.2f})" if gain else ""
        parts.append(f"reward of {after['n']} held-out prompts {was}{after['reward']:.2f}{told}")
    if after := metrics.get("teacher"):
        before = metrics["teacher_before"]
        was = f"{before['divergence']:.3f} -> " if before else ""
        parts.append(f"from the teacher on {after['n']} held-out prompts {was}{after['divergence']:.3f} nats a token")
    if "vocab_size" in metrics:
        parts.append(f"{metrics['vocab_size']} entries")
    if "bytes_per_token" in metrics:
        parts.append(f"{metrics['bytes_per_token']} bytes a token")
    return ", ".join(parts)
