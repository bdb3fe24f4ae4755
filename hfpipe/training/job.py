"""One stage of one run: where it reads, where it writes, what it reports while it works."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfpipe import artifact
from hfpipe.errors import UserError
from hfpipe.hub_client import fetch, split_id, used_pins
from hfpipe.run_folder import CHECKPOINTS, complete_at, damage_at, put_in_place, set_aside
from hfpipe.sections import Recipe, Stage
from hfpipe.training.identity import hub_commit, identify, parent_identity

if TYPE_CHECKING:
    from hfpipe.training.stand_ins import Rehearsal

# What tells of a model and is no part of it: written anew whenever a stage is scored.
_TOLD = ("README.md", "eval.json", "harness.json", "metrics.jsonl", "probes.jsonl", "rollouts.jsonl", "samples.jsonl")


@dataclass(frozen=True)
class Job:
    """A stage about to run: `folder` is where its result will stand, `work` where it is made until it is whole."""

    recipe: Recipe
    stage: Stage
    run: Path
    fingerprint: str
    data_hashes: dict[str, str]
    parent_fingerprint: str | None
    processes: int = 1  # that the fingerprint counts with: those of an earlier attempt, where this one goes on from it
    rehearsal: Rehearsal | None = None  # of `hfpipe plan --rehearse`: stand-ins for what is not there yet

    @property
    def folder(self) -> Path:
        return self.run / self.stage.name

    @property
    def work(self) -> Path:
        return self.run / f"{self.stage.name}.partial"

    @property
    def checkpoints(self) -> Path:
        return self.work / CHECKPOINTS

    @property
    def parent_path(self) -> str:
        """Folder or Hub id of the model or tokenizer that this stage starts from."""
        parent = self.recipe.parent(self.stage)
        if parent:
            folder = self.run / parent.name
            if not self.rehearsal and not (folder / artifact.STAGE_FILE).is_file():
                raise UserError(
                    f"{self.stage.name} starts from `{parent.name}`, but {folder} holds no finished stage. "
                    f"Run that stage first: hfpipe run {shlex.quote(str(self.recipe.folder))} --out {shlex.quote(str(self.run))} --to {parent.name}"
                )
            return str(folder)
        source = str(self.stage.model.from_)
        if Path(source).expanduser().is_dir():
            return str(Path(source).expanduser())
        repo_id, _ = split_id(source)
        return str(fetch(repo_id, str(self.parent_revision)))

    @property
    def parent_id(self) -> str:
        """What the parent is known by elsewhere: its Hub id, or its folder's whole path."""
        if self.parent_revision:
            return split_id(str(self.stage.model.from_))[0]
        return str(Path(self.parent_path).resolve())

    def check_parents(self, read_all: bool = False) -> None:
        """UserError where the parent is damaged or not finished; names the first stage that must run.

        With `read_all` large files are read too that look untouched by their size and time.
        """
        if (judge := self.recipe.guide_stage(self.stage)) and (
            reason := damage_at(self.run / judge.name)
            or (None if (self.run / judge.name / artifact.STAGE_FILE).is_file() else "it is not finished")
        ):
            raise UserError(
                f"{self.stage.name} is steered by {self.run / judge.name}, but {reason}. "
                f"Make it first: hfpipe run {shlex.quote(str(self.recipe.folder))} --out {shlex.quote(str(self.run))} --to {judge.name}"
            )
        missing, stage = None, self.stage
        while parent := self.recipe.parent(stage):
            folder = self.run / parent.name
            if (folder / artifact.STAGE_FILE).is_file():
                if reason := damage_at(folder, trust_times=not read_all):
                    raise UserError(
                        f"{self.stage.name} starts from {folder}, which is damaged: {reason}. "
                        f"Make it again: hfpipe run {shlex.quote(str(self.recipe.folder))} --out {shlex.quote(str(self.run))} --to {parent.name}"
                    )
                break
            missing = stage = parent
        if missing:
            raise UserError(
                f"{self.stage.name} starts from `{self.stage.model.from_}`, but {self.run} holds no finished "
                f"`{missing.name}`. Run what comes before it: "
                f"hfpipe run {shlex.quote(str(self.recipe.folder))} --out {shlex.quote(str(self.run))} --to {self.stage.model.from_}"
            )

    @property
    def parent_revision(self) -> str | None:
        """The commit of a Hub model; None for a folder."""
        source = self.stage.model.from_
        if source is None or self.recipe.parent(self.stage) or Path(source).expanduser().is_dir():
            return None
        return hub_commit(self.stage, "model.from", source, self.run)

    def guide_path(self) -> str:
        """Folder of the reward model or the teacher, fetched and verified where it is the Hub's."""
        key, source, _ = self.stage.guide or ("", "", "")
        made_by = self.recipe.guide_stage(self.stage)
        if made_by:
            return str(self.run / made_by.name)
        if Path(source).expanduser().is_dir():
            return str(Path(source).expanduser())
        return str(fetch(split_id(source)[0], hub_commit(self.stage, key, source, self.run)))

    @property
    def pins(self) -> dict[str, str]:
        """The commits of the Hub ids that the stage reads models and data from; it keeps them."""
        found = {str(self.stage.model.from_): self.parent_revision}
        key, guide, _ = self.stage.guide or ("", "", "")
        if guide and not self.recipe.guide_stage(self.stage) and not Path(guide).expanduser().is_dir():
            found[guide] = hub_commit(self.stage, key, guide, self.run)
        return {**used_pins(), **{source: commit for source, commit in found.items() if commit}}

    def start(self, note: Callable[[str], None]) -> bool:
        """Make the working folder; returns False where the stage turns out to be finished already.

        A half-done attempt under another configuration is cleared away, a damaged result is set aside.
        """
        for folder in (self.work, self.folder):
            if complete_at(folder, self.fingerprint) and (reason := damage_at(folder)):
                note(f"damaged ({reason}): set aside as {set_aside(folder).name}")
        if complete_at(self.work, self.fingerprint):
            put_in_place(self.work, self.folder)
        if complete_at(self.folder, self.fingerprint):
            return False
        if self.folder.is_dir() and artifact.read_record(self.folder / artifact.STAGE_FILE) is None:
            note(f"damaged ({damage_at(self.folder)}): set aside as {set_aside(self.folder).name}")
        begun = artifact.read_record(self.work / artifact.BEGUN_FILE) or {}
        if begun.get("fingerprint") != self.fingerprint and self.work.exists():
            shutil.rmtree(self.work)
        self.work.mkdir(parents=True, exist_ok=True)
        for left in [path for path in self.work.rglob(".tmp*") if path.is_file()]:
            left.unlink()  # safetensors' own, of a writing that was killed
        begun = {"fingerprint": self.fingerprint, "processes": self.processes, "pins": self.pins}
        artifact.write_record(self.work / artifact.BEGUN_FILE, begun)
        return True

    def drop_untrained(self) -> None:
        """Remove the working folder of an attempt that was refused before it left anything."""
        if all(path.is_dir() or path.name == artifact.BEGUN_FILE for path in self.work.rglob("*")):
            shutil.rmtree(self.work, ignore_errors=True)

    def trained(self) -> dict[str, Any] | None:
        """The metrics of a training that is finished and whose evaluation is not."""
        record = artifact.read_record(self.work / artifact.TRAINED_FILE)
        if record is None or record.get("fingerprint") != self.fingerprint:
            return None
        if artifact.damage(self.work, record.get("files")):
            return None  # trained again, from the last checkpoint
        return record["metrics"]

    def mark_trained(self, metrics: dict[str, Any]) -> None:
        """Note that the weights are whole, once they are on the disk itself."""
        artifact.sync_tree(self.work)
        record = {"fingerprint": self.fingerprint, "metrics": metrics, "files": self.files()}
        artifact.write_record(self.work / artifact.TRAINED_FILE, record)

    def trained_files(self) -> dict[str, dict[str, Any]]:
        """What `mark_trained` wrote down."""
        return (artifact.read_record(self.work / artifact.TRAINED_FILE) or {})["files"]

    def files(self) -> dict[str, dict[str, Any]]:
        """Checksums of what makes the stage's model or tokenizer: weights, configuration, vocabulary, template."""
        passing = {CHECKPOINTS, artifact.BEGUN_FILE, artifact.TRAINED_FILE, artifact.STAGE_FILE, *_TOLD}
        left = [p.relative_to(self.work) for p in sorted(self.work.rglob("*"))]
        return artifact.checksums(
            self.work, [str(path) for path in left if path.parts[0] not in passing and path.suffix != artifact.BESIDE]
        )

    def finish(self, record: dict[str, Any]) -> None:
        """Write `stage.json`, once all that it names is on the disk itself, and put the whole folder in its place."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        artifact.sync_tree(self.work)
        artifact.write_record(self.work / artifact.STAGE_FILE, record)
        put_in_place(self.work, self.folder)

    def parent_record(self) -> dict[str, Any] | None:
        """What `stage.json` says of the parent: where it is and exactly which one it was, with what it held."""
        if self.stage.model.from_ is None:
            return None
        made_by = self.recipe.parent(self.stage)
        folder = self.run / made_by.name if made_by else Path(self.stage.model.from_).expanduser()
        record = artifact.read_record(folder / artifact.STAGE_FILE)
        told = {"content": artifact.content_of(record)} if record and "files" in record else {}
        return {
            "from": self.stage.model.from_,
            "revision": self.parent_revision,
            "fingerprint": self.parent_fingerprint,
            **told,
        }


def make_job(recipe: Recipe, stage: Stage, run: Path, parent_fingerprint: str | None = None) -> Job:
    """A job for a stage whose parent is on disk; `parent_fingerprint` replaces looking it up."""
    if parent_fingerprint is None:
        parent_fingerprint = parent_identity(recipe, stage, run)
    known = identify(recipe, stage, parent_fingerprint, run)
    return Job(recipe, stage, run, known.fingerprint, known.data_hashes, parent_fingerprint, known.processes)


class Progress:
    """Events of a running stage, one JSON line each: the pipeline reads them and shows one live line."""

    def __init__(self, path: Path | None, echo: bool = False):
        self._file = open(path, "a", encoding="utf-8") if path else None  # noqa: SIM115
        self._echo = echo

    def tell(self, event: str, **values: Any) -> None:
        values = {"event": event, "time": time.time(), **values}
        if self._file:
            with contextlib.suppress(OSError):  # a disk too full for a line about the progress
                self._file.write(json.dumps(values, default=str) + "\n")
                self._file.flush()
        if self._echo:
            from hfpipe.progress import describe

            text = describe(values)
            if text:
                print(text, flush=True)

    def note(self, text: str) -> None:
        """Something inferred, said once with its reason."""
        self.tell("note", text=text)
