"""A run: which stages are done, which must run and why; each in a process of its own; one live line per stage."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hfpipe import artifact
from hfpipe.errors import ConfigErrors, UserError, nearest
from hfpipe.processes import prepare_stages, run_stage_process, start_server
from hfpipe.progress import Display, duration
from hfpipe.sections import DEFAULT_SPLIT, Recipe, Stage
from hfpipe.training.job import identify, parent_identity


@dataclass(frozen=True)
class Planned:
    """What a run will do with a stage: `status` is done, new, changed, downstream or interrupted."""

    stage: Stage
    fingerprint: str
    status: str
    why: tuple[str, ...] = ()

    @property
    def runs(self) -> bool:
        return self.status != "done"


def plan_run(recipe: Recipe, run: Path) -> list[Planned]:
    """Compare every stage with what stands in the run's folder; reads no weights, imports no torch."""
    planned: dict[str, Planned] = {}
    for stage in recipe.stages.values():
        parent = recipe.parent(stage)
        parent_fingerprint = planned[parent.name].fingerprint if parent else parent_identity(recipe, stage, run)
        fingerprint, hashes = identify(recipe, stage, parent_fingerprint)
        waits_for = planned[parent.name] if parent else None
        planned[stage.name] = _status(recipe, stage, run, fingerprint, hashes, waits_for)
    return list(planned.values())


def check_sources(recipe: Recipe) -> None:
    """Read the first rows of every local source: is it there, is its form known, does the stage take it?

    Raises:
        ConfigErrors: what is wrong with each.
    """
    from hfpipe.data.sources import is_hub_id, load_source

    problems = []
    listed = [
        (s.file, "data.train", src, src.as_ or s.type.rows) for s in recipe.stages.values() for src in s.data.train
    ]
    listed += [
        (s.file, "data.eval", src, src.as_ or s.type.rows) for s in recipe.stages.values() for src in s.data.eval
    ]
    listed += [(recipe.folder / "pipeline.yaml", "evaluate.text", s, "text") for s in recipe.pipeline.evaluate.text]
    for file, section, source, wanted in listed:
        try:
            if is_hub_id(source.path):
                continue  # its commit was looked up for the fingerprint; its rows are read when they are prepared
            split = DEFAULT_SPLIT.get(section.partition(".")[2], "validation")
            load_source(source, wanted=wanted, split=split, where=f"{file}: {section}")
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise ConfigErrors(list(dict.fromkeys(problems)))


def _status(
    recipe: Recipe, stage: Stage, run: Path, fingerprint: str, hashes: dict[str, str], parent: Planned | None
) -> Planned:
    record = artifact.read_json(run / stage.name / artifact.STAGE_FILE)
    if record and record["fingerprint"] == fingerprint:
        return Planned(stage, fingerprint, "done")
    work = run / f"{stage.name}.partial"
    begun = artifact.read_json(work / "begun.json")
    if begun and begun["fingerprint"] == fingerprint:
        steps = [int(p.name.rpartition("-")[2]) for p in (work / "checkpoints").glob("checkpoint-*")]
        where = f"goes on from step {max(steps)}" if steps else "starts again: it has no checkpoint yet"
        if (work / artifact.TRAINED_FILE).is_file():
            where = "trained, not yet scored"
        return Planned(stage, fingerprint, "interrupted", (where,))
    if record is None:
        return Planned(stage, fingerprint, "new", ("never finished here",))
    config = artifact.hashed_config(stage.raw, recipe.pipeline.seed)
    why = artifact.changes(record["config"], config)
    why += [f"data: {name} changed" for name in hashes if record["data"].get(name) not in (None, hashes[name])]
    if why:
        return Planned(stage, fingerprint, "changed", tuple(why))
    reason = f"`{parent.stage.name}` runs again" if parent and parent.runs else "its parent changed"
    return Planned(stage, fingerprint, "downstream", (reason,))


def select(planned: list[Planned], start: str | None, end: str | None, only: str | None) -> list[Planned]:
    """The stages from `start` to `end`, or `only` one; UserError where a name is unknown."""
    names = [p.stage.name for p in planned]
    for option, name in (("--from", start), ("--to", end), ("--only", only)):
        if name is not None and name not in names:
            raise UserError(f"{option} {name}: no such stage; the recipe has {', '.join(names)}.{nearest(name, names)}")
    first = names.index(only or start or names[0])
    last = names.index(only or end or names[-1])
    if last < first:
        raise UserError(f"--from {start} --to {end}: `{end}` comes before `{start}`.")
    chosen = planned[first : last + 1]
    done = {p.stage.name for p in planned if not p.runs}
    for item in chosen:
        parent = item.stage.model.from_ if "model" in item.stage.sections else None
        missing = parent in names and parent not in done and names.index(parent) < first
        if item.runs and missing:
            raise UserError(
                f"`{item.stage.name}` starts from `{parent}`, which is not finished or has changed. "
                f"Run it too: --from {parent}, or leave the selection out."
            )
    return chosen


def run_recipe(recipe: Recipe, run: Path, chosen: list[Planned], display: Display) -> None:
    """Bring every chosen stage to its finished folder, in order.

    Raises:
        UserError: a stage found the input at fault.
        StageFailed: a stage's process ended without its result; the log's place is told.
    """
    with lock(run):
        claim(recipe, run)
        waiting = [p for p in chosen if p.runs]
        for item in chosen:
            if not item.runs:
                display.line(item.stage.name, f"done already ({_summary(run / item.stage.name)})")
        if not waiting:
            return
        if recipe.pipeline.launch.processes == 1 and not recipe.pipeline.launch.accelerate_config:
            start_server(run)
        prepared = False
        for item in waiting:
            if not prepared and item.stage.type.trainer:
                rest = [p.stage.name for p in waiting[waiting.index(item) :]]
                prepare_stages(recipe, run, rest, display)
                prepared = True
            began = time.monotonic()
            run_stage_process(recipe, run, item.stage, display)
            took = duration(time.monotonic() - began)
            display.line(item.stage.name, f"{_summary(run / item.stage.name)}, {took}")
            for sample in (artifact.read_json(run / item.stage.name / "eval.json") or {}).get("samples", []):
                display.line("", f"  {_cut(sample['asked'], 56, keep_end=True)} -> {_cut(sample['answer'], 72)}")


def _summary(folder: Path) -> str:
    """The finished stage in a few words, from its record."""
    metrics = (artifact.read_json(folder / artifact.STAGE_FILE) or {}).get("metrics", {})
    parts = []
    if "steps" in metrics:
        parts.append(f"{metrics['steps']} steps")
    for name, label in (("validation", "validation"), ("held_out_text", "held-out text")):
        if name in metrics:
            parts.append(f"{label} loss {metrics[name]['loss']:.3f} (perplexity {metrics[name]['perplexity']:.2f})")
    if metrics.get("pairs"):
        before = metrics["pairs_before"]["accuracy"]
        parts.append(f"pairs right {before:.2f} -> {metrics['pairs']['accuracy']:.2f}")
    if "vocab_size" in metrics:
        parts.append(f"{metrics['vocab_size']} entries")
    if "bytes_per_token" in metrics:
        parts.append(f"{metrics['bytes_per_token']} bytes a token")
    return ", ".join(parts)


def _cut(text: str, width: int, keep_end: bool = False) -> str:
    """One line of at most `width` characters."""
    text = " ".join(text.split())
    if len(text) <= width:
        return text
    return f"...{text[3 - width :]}" if keep_end else f"{text[: width - 3]}..."


# --- the run's folder ---


@contextlib.contextmanager
def lock(run: Path) -> Iterator[None]:
    """One run at a time per folder; the second is told who holds it."""
    run.mkdir(parents=True, exist_ok=True)
    with open(run / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{run} is in use by another run (process {file.read().strip()}). Wait for it, or --out."
            ) from None
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        yield


def claim(recipe: Recipe, run: Path) -> None:
    """Mark the folder as this recipe's; one that another recipe made is refused."""
    check_owner(recipe, run)
    artifact.write_json(run / "run.json", {"recipe": recipe.name, "stages": list(recipe.stages)})


def check_owner(recipe: Recipe, run: Path) -> None:
    record = artifact.read_json(run / "run.json")
    if record and record["recipe"] != recipe.name:
        raise UserError(
            f"{run} was made by the recipe `{record['recipe']}`, not `{recipe.name}`. Give another folder with --out."
        )
    if record is None and run.is_dir():
        strange = [p.name for p in run.iterdir() if not p.name.startswith(".")]
        foreign = [n for n in strange if n.split(".")[0] not in recipe.stages and n != "logs"]
        if foreign:
            raise UserError(
                f"{run} exists and is not a run's folder: it holds {', '.join(foreign[:5])}. Give another --out."
            )
