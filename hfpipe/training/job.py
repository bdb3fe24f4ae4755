"""One stage of one run: where it reads, where it writes, what it reports while it works."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfpipe import artifact
from hfpipe.errors import UserError
from hfpipe.sections import DEFAULT_SPLIT, Recipe, Stage


@dataclass(frozen=True)
class Job:
    """A stage about to run: `folder` is where its result will stand, `work` where it is made until it is whole."""

    recipe: Recipe
    stage: Stage
    run: Path
    fingerprint: str
    data_hashes: dict[str, str]
    parent_fingerprint: str | None

    @property
    def folder(self) -> Path:
        return self.run / self.stage.name

    @property
    def work(self) -> Path:
        return self.run / f"{self.stage.name}.partial"

    @property
    def checkpoints(self) -> Path:
        return self.work / "checkpoints"

    @property
    def parent_path(self) -> str:
        """Folder or Hub id of the model or tokenizer that this stage starts from."""
        parent = self.recipe.parent(self.stage)
        if parent:
            folder = self.run / parent.name
            if not (folder / artifact.STAGE_FILE).is_file():
                raise UserError(
                    f"{self.stage.name} starts from `{parent.name}`, but {folder} holds no finished stage. "
                    f"Run that stage first: hfpipe run {self.recipe.folder} --out {self.run} --to {parent.name}"
                )
            return str(folder)
        return str(self.stage.model.from_).partition("@")[0]

    @property
    def parent_revision(self) -> str | None:
        return str(self.stage.model.from_).partition("@")[2] or None

    def start(self) -> None:
        """Make the working folder; a half-done attempt under another configuration is cleared away."""
        begun = artifact.read_json(self.work / "begun.json") or {}
        if begun.get("fingerprint") != self.fingerprint and self.work.exists():
            shutil.rmtree(self.work)
        self.work.mkdir(parents=True, exist_ok=True)
        artifact.write_json(self.work / "begun.json", {"fingerprint": self.fingerprint})

    def trained(self) -> dict[str, Any] | None:
        """The record of a training that is finished and whose evaluation is not."""
        record = artifact.read_json(self.work / artifact.TRAINED_FILE)
        return record if record and record.get("fingerprint") == self.fingerprint else None

    def finish(self, record: dict[str, Any]) -> None:
        """Write `stage.json` and put the whole folder in its place; an older result of this stage goes last."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        for name in (artifact.TRAINED_FILE, "begun.json"):
            (self.work / name).unlink(missing_ok=True)
        artifact.write_json(self.work / artifact.STAGE_FILE, record)
        old = self.run / f"{self.stage.name}.old"
        if self.folder.exists():
            self.folder.rename(old)
        self.work.rename(self.folder)
        shutil.rmtree(old, ignore_errors=True)

    def parent_record(self) -> dict[str, Any] | None:
        """What `stage.json` says of the parent: where it is and exactly which one it was."""
        if "model" not in self.stage.sections or self.stage.model.from_ is None:
            return None
        name = self.stage.model.from_
        return {"from": name, "revision": self.parent_revision, "fingerprint": self.parent_fingerprint}


def identify(recipe: Recipe, stage: Stage, parent_fingerprint: str | None) -> tuple[str, dict[str, str]]:
    """The fingerprint of a stage's result and the hash of each source's content; imports no torch."""
    from hfpipe.data.sources import content_hash

    seed = recipe.pipeline.seed
    hashes = {}
    for role in ("train", "eval"):
        for source in getattr(stage.data, role):
            split = source.split or DEFAULT_SPLIT[role]
            hashes[f"{role}: {source.path}"] = content_hash(
                source.path, split=split, seed=seed, size=source.limit, revision=source.revision, name=source.name
            )
    config = artifact.hashed_config(stage.raw, seed)
    return artifact.fingerprint(config, hashes, parent_fingerprint), hashes


def parent_identity(recipe: Recipe, stage: Stage, run: Path) -> str | None:
    """Fingerprint of the parent as it stands on disk, or its Hub id and revision."""
    if "model" not in stage.sections or stage.model.from_ is None:
        return None
    parent = recipe.parent(stage)
    folder = run / parent.name if parent else Path(stage.model.from_).expanduser()
    return artifact.folder_identity(folder) if folder.is_dir() else stage.model.from_


def make_job(recipe: Recipe, stage: Stage, run: Path, parent_fingerprint: str | None = None) -> Job:
    """A job for a stage whose parent is on disk; `parent_fingerprint` replaces looking it up."""
    if parent_fingerprint is None:
        parent_fingerprint = parent_identity(recipe, stage, run)
    fingerprint, hashes = identify(recipe, stage, parent_fingerprint)
    return Job(recipe, stage, run, fingerprint, hashes, parent_fingerprint)


class Progress:
    """Events of a running stage, one JSON line each: the pipeline reads them and shows one live line."""

    def __init__(self, path: Path | None, echo: bool = False):
        self._file = open(path, "a", encoding="utf-8") if path else None  # noqa: SIM115
        self._echo = echo

    def tell(self, event: str, **values: Any) -> None:
        values = {"event": event, "time": time.time(), **values}
        if self._file:
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
