"""A run's folder: whose it is, who is at work in it, and where each stage in it stands."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from hfpipe import artifact
from hfpipe.errors import UserError
from hfpipe.sections import SHARDS, Recipe

CHECKPOINTS = "checkpoints"  # in a stage's working folder


@contextlib.contextmanager
def lock(run: Path) -> Iterator[None]:
    """One run at a time per folder; the second is told who holds it."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = open(run / ".lock", "a+")  # noqa: SIM115
    except OSError as error:
        raise UserError(
            f"--out {run}: no folder can be made or written there ({error.strerror}). Give another."
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip()
            raise UserError(f"{run} is in use by another run (process {holder}). Wait for it, or give --out.") from None
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        yield


def claim(recipe: Recipe, run: Path) -> None:
    """Mark the folder as this recipe's; one that another recipe made is refused."""
    check_owner(recipe, run)
    record = {"recipe": recipe.name, "stages": list(recipe.stages)}
    if recipe.pipeline.hub.repo_id:
        record["hub"] = dataclasses.asdict(recipe.pipeline.hub)
    artifact.write_json(run / "run.json", record)


def check_owner(recipe: Recipe, run: Path) -> None:
    if run.exists() and not run.is_dir():
        raise UserError(f"--out {run} is a file. Give a folder, or a path where there is nothing yet.")
    record = artifact.read_json(run / "run.json")
    if record and record.get("recipe") != recipe.name:
        raise UserError(
            f"{run} was made by the recipe `{record.get('recipe')}`, not `{recipe.name}`. Give another folder with --out."
        )
    if record is None and run.is_dir():
        ends = ("", ".partial", ".old", ".damaged", ".partial.damaged")
        known = {name + end for name in recipe.stages for end in ends}
        known |= {"logs", "synth", SHARDS, f"{SHARDS}.partial", "run.json", f"run.json{artifact.BESIDE}", "report.html"}
        foreign = sorted(p.name for p in run.iterdir() if not p.name.startswith(".") and p.name not in known)
        if foreign:
            raise UserError(
                f"{run} exists and is not a run's folder: it holds {', '.join(foreign[:5])}. Give another --out."
            )


def check_is_run(run: Path) -> None:
    if not (run / "run.json").is_file():
        raise UserError(f"{run} is not a run's folder: it has no run.json. Give one, such as runs/tiny.")


def find_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints, the newest first; whether they are whole is not looked at."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)


def put_in_place(work: Path, folder: Path) -> None:
    """Give a finished stage its place; an older result of it goes last. Killed anywhere, it can be done again."""
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(work / CHECKPOINTS, ignore_errors=True)
    for name in (artifact.TRAINED_FILE, artifact.BEGUN_FILE):
        (work / name).unlink(missing_ok=True)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    work.rename(folder)
    artifact.sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def set_aside(folder: Path) -> Path:
    """Rename a damaged result to `NAME.damaged`, in the place of an older one of that name."""
    aside = folder.with_name(f"{folder.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    return aside


def clear_unnamed(work: Path) -> None:
    """Remove what is left of an attempt that ended before it was written down which result it was for."""
    if not any(artifact.read_record(work / name) for name in (artifact.BEGUN_FILE, artifact.STAGE_FILE)):
        shutil.rmtree(work, ignore_errors=True)


def complete_at(folder: Path, fingerprint: str) -> bool:
    """Whether a folder holds a finished stage with this fingerprint; `damage_at` says whether it is still sound."""
    record = artifact.read_record(folder / artifact.STAGE_FILE)
    return record is not None and record.get("fingerprint") == fingerprint


def damage_at(folder: Path, trust_times: bool = True) -> str | None:
    """What is wrong with a finished stage's folder, by the checksums in its `stage.json`; None where nothing is."""
    if not folder.is_dir():
        return None
    record = artifact.read_record(folder / artifact.STAGE_FILE)
    if record is None:
        return f"{artifact.STAGE_FILE} is missing, cut off or changed"
    return artifact.damage(folder, record["files"], trust_times)


def unfinished_step(work: Path) -> int | None:
    """The step of the last checkpoint of an unfinished stage."""
    found = find_checkpoints(work / CHECKPOINTS)
    return int(found[0].name.rpartition("-")[2]) if found else None
