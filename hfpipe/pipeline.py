"""A run: which stages are done, which must run and why; each in a process of its own; one live line per stage."""

from __future__ import annotations

import shlex
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfpipe import artifact
from hfpipe.config import load_recipe
from hfpipe.data.check import check_shards, shards_problem
from hfpipe.errors import StageFailed, UserError, nearest
from hfpipe.evaluation.scorecard import Scorecard, changes, read_scorecard, result, table
from hfpipe.faults import explain
from hfpipe.hub_client import ask_anew, tell_notes
from hfpipe.plan import describe_stage, warn
from hfpipe.plan.devices import Devices
from hfpipe.processes import logs, make_synth, prepare_stages, run_stage_process, start_server
from hfpipe.progress import Display, duration, printable
from hfpipe.publishing.publisher import Publisher
from hfpipe.publishing.report import REPORT_FILE, write_report
from hfpipe.run_folder import (
    check_is_run,
    check_owner,
    claim,
    clear_unnamed,
    complete_at,
    damage_at,
    lock,
    unfinished_step,
)
from hfpipe.sections import Recipe, Stage
from hfpipe.stages import stage_types
from hfpipe.stages._run import check_recipe
from hfpipe.training.identity import identify, kept_pins, parent_identity, processes_now, scores_missing, synth_to_make


@dataclass(frozen=True)
class Planned:
    """What a run will do with a stage: `status` is done, new, changed, downstream, interrupted, damaged or rescore."""

    stage: Stage
    fingerprint: str
    status: str
    why: tuple[str, ...] = ()

    @property
    def runs(self) -> bool:
        return self.status != "done"

    @property
    def trains(self) -> bool:
        return self.status not in ("done", "rescore")


def open_recipe(name: str | Path, overrides: Sequence[str], out: Path | None) -> tuple[Recipe, Path]:
    """A recipe and its run's folder, after every check that reads no weights; UserError with all that is at fault."""
    ask_anew()
    recipe = load_recipe(name, stage_types(), overrides, out)
    run = out or Path("runs") / recipe.name
    check_owner(recipe, run)
    check_recipe(recipe)
    return recipe, run


def plan_rows(recipe: Recipe, run: Path, devices: Devices | None = None) -> list[dict[str, Any]]:
    """What a run would do: `stage`, `status`, `why`, whether it `trains`, and what `describe_stage` says of it, a stage a row."""
    rows = []
    for p in plan_run(recipe, run):
        row = {"stage": p.stage.name, "status": p.status, "why": list(p.why), "trains": p.trains}
        row |= describe_stage(recipe, p.stage, run, devices)
        row["notes"] += filter(None, [shards_problem(recipe, p.stage)])
        row["notes"] += kept_pins(p.stage, run) if p.trains else []
        rows.append(row)
    return rows


def plan_run(recipe: Recipe, run: Path) -> list[Planned]:
    """Compare every stage with what stands in the run's folder; reads no weights, imports no torch."""
    planned: dict[str, Planned] = {}
    for stage in recipe.stages.values():
        parent = recipe.parent(stage)
        parent_fingerprint = planned[parent.name].fingerprint if parent else parent_identity(recipe, stage, run)
        ahead = {name: item.fingerprint for name, item in planned.items()}
        fingerprint, hashes, _ = identify(recipe, stage, parent_fingerprint, run, ahead)
        waits_for = [planned[needed.name] for needed in recipe.needed(stage)]
        planned[stage.name] = _status(recipe, stage, run, fingerprint, hashes, waits_for)
    return list(planned.values())


def _status(
    recipe: Recipe, stage: Stage, run: Path, fingerprint: str, hashes: dict[str, str], waits_for: list[Planned]
) -> Planned:
    folder, work = run / stage.name, run / f"{stage.name}.partial"
    record = artifact.read_record(folder / artifact.STAGE_FILE)
    if (record is None or complete_at(folder, fingerprint)) and (damaged := damage_at(folder)):
        return Planned(stage, fingerprint, "damaged", (f"{damaged}; it will be set aside and made again",))
    if record and complete_at(folder, fingerprint):
        if stage.type.leaves != "tokenizer" and (why := scores_missing(recipe, folder, record)):
            return Planned(stage, fingerprint, "rescore", (f"{why}; the weights stay",))
        other = (f"an unfinished attempt under other settings is kept in {work.name}",) if unfinished_step(work) else ()
        return Planned(stage, fingerprint, "done", other)
    begun = (artifact.read_record(work / artifact.BEGUN_FILE) or {}).get("fingerprint")
    step = unfinished_step(work)
    if complete_at(work, fingerprint):
        return Planned(stage, fingerprint, "interrupted", ("finished, not yet in its place",))
    if begun == fingerprint:
        where = f"goes on from step {step}" if step else "starts again: it has no checkpoint yet"
        if (work / artifact.TRAINED_FILE).is_file():
            where = "trained, not yet scored"
        return Planned(stage, fingerprint, "interrupted", (where,))
    lost = (f"an attempt under other settings, at step {step}, will be cleared away",) if begun and step else ()
    if record is None:
        return Planned(stage, fingerprint, "new", ("never finished here", *lost))
    again = [item.stage.name for item in waits_for if item.trains]
    if why := _changes(recipe, stage, record, hashes, again):
        return Planned(stage, fingerprint, "changed", (*why, *lost))
    if again:
        return Planned(stage, fingerprint, "downstream", (f"`{again[0]}` runs again", *lost))
    return Planned(stage, fingerprint, "downstream", ("its parent changed", *lost))


def _changes(
    recipe: Recipe, stage: Stage, record: dict[str, Any], hashes: dict[str, str], again: list[str]
) -> list[str]:
    """What of a finished stage's own settings and data is not as it was; `again`: what runs again and it waits for."""
    found = artifact.changes(
        record["config"], artifact.hashed_config(stage, recipe.pipeline.seed, processes_now(recipe))
    )
    guided = f"{stage.guide[0]} {stage.guide[1]}" if stage.guide and stage.guide[1] in again else None
    ours, before = hashes.keys() - {guided}, record["data"]
    found += [f"{name} changed" for name in hashes if name in ours and before.get(name) not in (None, hashes[name])]
    other = sorted(ours ^ before.keys() - {guided})
    return found or [f"{name} {'added' if name in ours else 'removed'}" for name in other]


def select(planned: list[Planned], start: str | None, end: str | None, only: str | None) -> list[Planned]:
    """The stages from `start` to `end`, or `only` one; UserError where a name is unknown."""
    if only and (start or end):
        raise UserError("--only stands instead of --from and --to: give one or the other.")
    names = [p.stage.name for p in planned]
    for option, name in (("--from", start), ("--to", end), ("--only", only)):
        if name is not None and name not in names:
            raise UserError(f"{option} {name}: no such stage; the recipe has {', '.join(names)}.{nearest(name, names)}")
    first = names.index(only or start or names[0])
    last = names.index(only or end or names[-1])
    if last < first:
        raise UserError(f"--from {start} --to {end}: `{end}` comes before `{start}`.")
    chosen = planned[first : last + 1]
    done = {p.stage.name for p in planned if not p.trains}
    for item in chosen:
        guide = item.stage.guide and item.stage.guide[1]
        for source, how in ((item.stage.model.from_, "starts from"), (guide, "is steered by")):
            missing = source in names and source not in done and names.index(source) < first
            if item.runs and missing:
                needed = next(p.stage.name for p in planned if p.trains)
                raise UserError(
                    f"`{item.stage.name}` {how} `{source}`, which is not finished or has changed. "
                    f"Run what comes before it too: --from {needed} --to {names[last]}."
                )
    return chosen


def run_recipe(
    recipe: Recipe,
    run: Path,
    display: Display,
    start: str | None = None,
    end: str | None = None,
    only: str | None = None,
) -> list[Planned]:
    """Bring every stage from `start` to `end` (or `only` one) to its finished folder, in order; returns those stages.

    Raises:
        UserError: a stage found the input at fault.
        StageFailed: a stage's process ended without its result; the log's place is told.
    """
    chosen = select(plan_run(recipe, run), start, end, only)  # what is wrong is told before anything is written
    check_shards(recipe, [item.stage for item in chosen])
    with lock(run):
        claim(recipe, run)
        chosen = select(plan_run(recipe, run), start, end, only)
        waiting = [p for p in chosen if p.runs]
        _refuse_to_pay(recipe, run, waiting)
        with Publisher(recipe, run, display, [p.stage.name for p in waiting]) as publisher:
            tell_notes(lambda note: display.line("hub", note))
            for item in waiting:
                kept = kept_pins(item.stage, run) if item.trains else []
                for note in (*warn(recipe, item.stage, run), *kept):
                    display.line(item.stage.name, note)
            _run_stages(recipe, run, display, chosen, publisher)
        return chosen


def run_and_report(
    recipe: Recipe,
    run: Path,
    display: Display,
    start: str | None = None,
    end: str | None = None,
    only: str | None = None,
) -> None:
    """`run_recipe`, then the scorecard and `report.html` where anything ran, and a line that closes it."""
    began = time.monotonic()
    chosen = run_recipe(recipe, run, display, start, end, only)
    if any(item.runs for item in chosen) or not (run / REPORT_FILE).is_file():
        try:
            card = read_scorecard(run)
            if card.capabilities or card.text or card.diagnostics:
                display.text("\n".join(["", *table(card), ""]))
            if card.stages:
                display.text(f"report: {write_report(run)}")
        except Exception as error:
            raise StageFailed(
                f"every stage is finished in {run}, but not its report: {explain(error)}\nhfpipe report {shlex.quote(str(run))} writes it again."
            ) from error
    whole = len(chosen) == len(recipe.stages)
    what = recipe.name if whole else ", ".join(item.stage.name for item in chosen)
    verb = "is" if whole or len(chosen) == 1 else "are"
    display.text(f"{what} {verb} complete in {run} ({duration(time.monotonic() - began)})")


def report_run(run: Path) -> tuple[Scorecard, Path]:
    """Write `report.html` of what stands in a run's folder; the scorecard in it, and its path."""
    check_is_run(run)
    card = read_scorecard(run)
    if not card.stages:
        raise UserError(f"{run} holds no finished stage that left a language model.")
    return card, write_report(run)


def _refuse_to_pay(recipe: Recipe, run: Path, waiting: list[Planned]) -> None:
    """Rows that an endpoint makes or judges, which may cost money, are made by their own command."""
    for item in waiting:
        for name in synth_to_make(recipe, item.stage, run):
            synth = recipe.pipeline.synth[name]
            if any(asked and asked.endpoint for asked in (synth.teacher, synth.judge)):
                raise UserError(
                    f"`{item.stage.name}` trains on synth/{name}, whose rows an endpoint makes, maybe at a cost. Have them made "
                    f"first: hfpipe data synth {shlex.quote(str(recipe.folder))} --out {shlex.quote(str(run))} --only {name}"
                )


def _run_stages(recipe: Recipe, run: Path, display: Display, chosen: list[Planned], publisher: Publisher) -> None:
    waiting = [p for p in chosen if p.runs]
    for item in chosen:
        if not item.runs:
            clear_unnamed(run / f"{item.stage.name}.partial")
            display.line(item.stage.name, f"done already ({_summary(run / item.stage.name)})")
    if waiting:
        start_server(logs(run, "data")[1])
    prepared: set[str] = set()
    for item in waiting:
        for name in synth_to_make(recipe, item.stage, run):
            make_synth(recipe, run, name, display)
        if item.stage.name not in prepared and item.stage.type.trainer:
            after = [p.stage for p in waiting[waiting.index(item) :]]
            rest = [stage.name for stage in after if not synth_to_make(recipe, stage, run)]
            prepare_stages(recipe, run, rest, display)
            prepared.update(rest)
        began = time.monotonic()
        run_stage_process(recipe, run, item.stage, display)
        took = duration(time.monotonic() - began)
        display.line(item.stage.name, f"{_summary(run / item.stage.name)}, {took}")
        for sample in (artifact.read_json(run / item.stage.name / "eval.json") or {}).get("samples", []):
            display.line("", f"  {_cut(sample['asked'], 56, keep_end=True)} -> {_cut(sample['answer'], 72)}")
        for line in _scored(run, item.stage.name):
            display.line("", f"  {line}")
        publisher.wake(item.stage.name)


def _scored(run: Path, stage: str) -> list[str]:
    """What the probes say of a finished stage: what changed from its parent, and what was forgotten."""
    card = read_scorecard(run)
    moved = changes(card, stage)
    lines = textwrap.wrap(f"changed: {moved}", 110, subsequent_indent="  ") if moved else []
    return lines + [f"forgotten: {line}" for line in card.forgotten if line.startswith(f"{stage}:")]


def _summary(folder: Path) -> str:
    """The finished stage in a few words, from its record."""
    return result((artifact.read_json(folder / artifact.STAGE_FILE) or {}).get("metrics", {}))


def _cut(text: str, width: int, keep_end: bool = False) -> str:
    """One line of at most `width` characters."""
    text = printable(" ".join(text.split()))
    if len(text) <= width:
        return text
    return f"...{text[3 - width :]}" if keep_end else f"{text[: width - 3]}..."
