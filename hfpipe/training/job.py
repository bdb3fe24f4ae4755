"""One stage of one run: where it reads, where it writes, what it reports while it works."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfpipe import artifact
from hfpipe.errors import UserError
from hfpipe.run_folder import complete_at, put_in_place
from hfpipe.sections import DEFAULT_SPLIT, Recipe, Source, Stage


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
        source = str(self.stage.model.from_)
        return str(Path(source).expanduser()) if Path(source).expanduser().is_dir() else source.partition("@")[0]

    def check_parents(self) -> None:
        """UserError where the parent is not finished; names the first stage that must run."""
        missing, stage = None, self.stage
        while parent := self.recipe.parent(stage):
            if (self.run / parent.name / artifact.STAGE_FILE).is_file():
                break
            missing = stage = parent
        if missing:
            raise UserError(
                f"{self.stage.name} starts from `{self.stage.model.from_}`, but {self.run} holds no finished "
                f"`{missing.name}`. Run what comes before it: "
                f"hfpipe run {self.recipe.folder} --out {self.run} --to {self.stage.model.from_}"
            )

    @property
    def parent_revision(self) -> str | None:
        """The commit of a Hub model; None for a folder."""
        return hub_commit(self.stage) if not Path(self.parent_path).is_dir() else None

    def start(self) -> bool:
        """Make the working folder; returns False where the stage turns out to be finished already.

        A half-done attempt under another configuration is cleared away.
        """
        if complete_at(self.work, self.fingerprint):
            put_in_place(self.work, self.folder)
        if complete_at(self.folder, self.fingerprint):
            return False
        begun = artifact.read_json(self.work / artifact.BEGUN_FILE) or {}
        if begun.get("fingerprint") != self.fingerprint and self.work.exists():
            shutil.rmtree(self.work)
        self.work.mkdir(parents=True, exist_ok=True)
        artifact.write_json(self.work / artifact.BEGUN_FILE, {"fingerprint": self.fingerprint})
        return True

    def trained(self) -> dict[str, Any] | None:
        """The metrics of a training that is finished and whose evaluation is not."""
        record = artifact.read_json(self.work / artifact.TRAINED_FILE)
        return record["metrics"] if record and record.get("fingerprint") == self.fingerprint else None

    def mark_trained(self, metrics: dict[str, Any]) -> None:
        artifact.write_json(self.work / artifact.TRAINED_FILE, {"fingerprint": self.fingerprint, "metrics": metrics})

    def finish(self, record: dict[str, Any]) -> None:
        """Write `stage.json` and put the whole folder in its place."""
        artifact.write_json(self.work / artifact.STAGE_FILE, record)
        put_in_place(self.work, self.folder)

    def parent_record(self) -> dict[str, Any] | None:
        """What `stage.json` says of the parent: where it is and exactly which one it was."""
        if self.stage.model.from_ is None:
            return None
        return {
            "from": self.stage.model.from_,
            "revision": self.parent_revision,
            "fingerprint": self.parent_fingerprint,
        }


def identify(recipe: Recipe, stage: Stage, parent_fingerprint: str | None) -> tuple[str, dict[str, str]]:
    """The fingerprint of a stage's result and the hash of each thing it reads; imports no torch."""
    from hfpipe.data.sources import named
    from hfpipe.training.templates import load_chat_template

    seed = recipe.pipeline.seed
    hashes = {}
    for role, split in DEFAULT_SPLIT.items():
        for number, source in enumerate(getattr(stage.data, role)):
            with named(f"{stage.file}: data.{role}"):
                hashes[f"{role}[{number}] {source.path}"] = hash_source(source, split, seed)
    tokenizer = stage.sections.get("tokenizer")
    if tokenizer and tokenizer.chat_template:
        hashes[f"chat_template {tokenizer.chat_template}"] = artifact.digest(
            load_chat_template(tokenizer.chat_template)
        )
    config = artifact.hashed_config(stage, seed)
    return artifact.fingerprint(config, hashes, parent_fingerprint), hashes


def parent_identity(recipe: Recipe, stage: Stage, run: Path) -> str | None:
    """Fingerprint of the parent as it stands on disk, or the commit of a Hub model."""
    source = stage.model.from_
    if source is None:
        return None
    parent = recipe.parent(stage)
    folder = run / parent.name if parent else Path(source).expanduser()
    if folder.is_dir():
        return artifact.folder_identity(folder, stage.type.parents)
    if parent is None and folder.exists():
        raise UserError(f"{stage.file}: model.from = {source!r} is a file. Give the model's folder.")
    return hub_commit(stage) if parent is None else None


def hash_source(source: Source, split: str, seed: int) -> str:
    """Hash of a source's content; `split` where the source names none."""
    from hfpipe.data.sources import content_hash

    return content_hash(
        source.path,
        split=source.split or split,
        seed=seed,
        size=source.limit,
        revision=source.revision,
        name=source.name,
    )


def evaluation_identity(recipe: Recipe) -> str:
    """Changes when the recipe's `evaluate` section or the text and probes that it names do."""
    from hfpipe.data.sources import content_hash

    evaluate = recipe.pipeline.evaluate
    hashes = [hash_source(source, "validation", recipe.pipeline.seed) for source in evaluate.text]
    hashes += [content_hash(probe.path, split=probe.split, size=probe.limit) for probe in evaluate.probes]
    return artifact.digest([dataclasses.asdict(evaluate), hashes])


@functools.cache
def _commit(model: str, revision: str | None) -> str | None:
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        return HfApi().model_info(model, revision=revision, timeout=10).sha
    except Exception:
        # Offline, or no such model: what the cache holds is what would be loaded.
        cached = try_to_load_from_cache(model, "config.json", revision=revision)
        return Path(cached).parent.name if isinstance(cached, str) else None


def hub_commit(stage: Stage) -> str:
    """The commit that a Hub id and its revision stand for now; UserError where there is none to be had."""
    model, _, revision = str(stage.model.from_).partition("@")
    commit = revision if len(revision) == 40 else _commit(model, revision or None)
    if commit is None:
        raise UserError(
            f"{stage.file}: model.from = {stage.model.from_!r} is not a folder, and neither the Hub nor its cache has such "
            "a model (is there a connection, is HF_HUB_OFFLINE set?). Give a local folder, or connect."
        )
    return commit


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
