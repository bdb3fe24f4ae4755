"""One stage of one run: where it reads, where it writes, what it reports while it works."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hfpipe import artifact
from hfpipe.errors import UserError
from hfpipe.run_folder import CHECKPOINTS, complete_at, damage_at, put_in_place, set_aside
from hfpipe.sections import DEFAULT_SPLIT, Recipe, Source, Stage

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
            if not (folder / artifact.STAGE_FILE).is_file():
                raise UserError(
                    f"{self.stage.name} starts from `{parent.name}`, but {folder} holds no finished stage. "
                    f"Run that stage first: hfpipe run {self.recipe.folder} --out {self.run} --to {parent.name}"
                )
            return str(folder)
        source = str(self.stage.model.from_)
        return str(Path(source).expanduser()) if Path(source).expanduser().is_dir() else source.partition("@")[0]

    def check_parents(self, read_all: bool = False) -> None:
        """UserError where the parent is damaged or not finished; names the first stage that must run.

        With `read_all` large files are read too that look untouched by their size and time.
        """
        if (judge := self.recipe.reward_stage(self.stage)) and (
            reason := damage_at(self.run / judge.name)
            or (None if (self.run / judge.name / artifact.STAGE_FILE).is_file() else "it is not finished")
        ):
            raise UserError(
                f"{self.stage.name} is steered by {self.run / judge.name}, but {reason}. "
                f"Make it first: hfpipe run {self.recipe.folder} --out {self.run} --to {judge.name}"
            )
        missing, stage = None, self.stage
        while parent := self.recipe.parent(stage):
            folder = self.run / parent.name
            if (folder / artifact.STAGE_FILE).is_file():
                if reason := damage_at(folder, trust_times=not read_all):
                    raise UserError(
                        f"{self.stage.name} starts from {folder}, which is damaged: {reason}. "
                        f"Make it again: hfpipe run {self.recipe.folder} --out {self.run} --to {parent.name}"
                    )
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
        if Path(self.parent_path).is_dir():
            return None
        return hub_commit(self.stage, "model.from", str(self.stage.model.from_))

    def reward_path(self) -> tuple[str, str | None]:
        """Folder of the reward model, or its Hub id and commit."""
        source = str(self.stage.sections["rewards"].model)
        made_by = self.recipe.reward_stage(self.stage)
        folder = self.run / made_by.name if made_by else Path(source).expanduser()
        if made_by or folder.is_dir():
            return str(folder), None
        return source.partition("@")[0], hub_commit(self.stage, "rewards.model", source)

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
        begun = {"fingerprint": self.fingerprint, "processes": self.processes}
        artifact.write_record(self.work / artifact.BEGUN_FILE, begun)
        return True

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
        """What `stage.json` says of the parent: where it is and exactly which one it was."""
        if self.stage.model.from_ is None:
            return None
        return {
            "from": self.stage.model.from_,
            "revision": self.parent_revision,
            "fingerprint": self.parent_fingerprint,
        }


class Identity(NamedTuple):
    """What a stage's result is known by; `processes` is their number that the fingerprint counts with."""

    fingerprint: str
    data_hashes: dict[str, str]
    processes: int


def identify(
    recipe: Recipe,
    stage: Stage,
    parent_fingerprint: str | None,
    run: Path | None = None,
    planned: Mapping[str, str] | None = None,
) -> Identity:
    """The fingerprint of a stage's result and the hash of each thing it reads; imports no torch.

    What `run` holds, finished or begun, keeps its fingerprint where nothing but the number of processes is another now.
    `planned`: fingerprints that other stages of the recipe will have, where they are not to be read from `run`.
    """
    from hfpipe.data.sources import named
    from hfpipe.training.templates import load_chat_template

    seed = recipe.pipeline.seed
    hashes = {}
    for role, split in DEFAULT_SPLIT.items():
        for number, source in enumerate(getattr(stage.data, role)):
            with named(f"{stage.file}: data.{role}"):
                hashes[f"{role}[{number}] {source.path}"] = hash_source(source, split, seed)
    if getattr(stage.sections.get("rewards"), "model", None):
        name = f"rewards.model {stage.sections['rewards'].model}"
        hashes[name] = (planned or {}).get(stage.sections["rewards"].model) or reward_identity(recipe, stage, run) or ""
    for item in getattr(stage.sections.get("rewards"), "functions", ()):
        if item.function and (file := _file_of(item.function)):
            hashes[f"rewards.functions {item.function}"] = artifact.file_sha256(file)
    tokenizer = stage.sections.get("tokenizer")
    if tokenizer and tokenizer.chat_template:
        hashes[f"chat_template {tokenizer.chat_template}"] = artifact.digest(
            load_chat_template(tokenizer.chat_template)
        )

    def fingerprint(processes: int) -> str:
        config = artifact.hashed_config(stage, seed, processes)
        return artifact.fingerprint(config, hashes, parent_fingerprint)

    for name, file in ((stage.name, artifact.STAGE_FILE), (f"{stage.name}.partial", artifact.BEGUN_FILE)):
        record = artifact.read_record(run / name / file) if run else None
        if record and record["fingerprint"] == fingerprint(record["processes"]):
            return Identity(record["fingerprint"], hashes, record["processes"])
    return Identity(fingerprint(processes_now(recipe)), hashes, processes_now(recipe))


def _file_of(function: str) -> Path | None:
    """Where the source of `package.module:name` or `path/to/file.py:name` stands."""
    place = function.rpartition(":")[0]
    if place.endswith(".py"):
        file = Path(place).expanduser()
    else:
        try:
            spec = importlib.util.find_spec(place)
        except (ImportError, ValueError):
            return None
        file = Path(spec.origin) if spec and spec.origin else None
    return file if file and file.is_file() else None


def processes_now(recipe: Recipe) -> int:
    """Of `accelerate launch` inside it, of the recipe before."""
    return int(os.environ.get("WORLD_SIZE") or recipe.pipeline.launch.processes or 1)


def parent_identity(recipe: Recipe, stage: Stage, run: Path) -> str | None:
    """Fingerprint of the parent as it stands on disk, or the commit of a Hub model."""
    return _identity_of(stage, "model.from", stage.model.from_, recipe.parent(stage), run, stage.type.parents)


def reward_identity(recipe: Recipe, stage: Stage, run: Path | None) -> str | None:
    """The same of the reward model."""
    source = stage.sections["rewards"].model
    return _identity_of(stage, "rewards.model", source, recipe.reward_stage(stage), run, ("reward_model",))


def _identity_of(
    stage: Stage, key: str, source: str | None, made_by: Stage | None, run: Path | None, leaves: tuple[str, ...]
) -> str | None:
    if source is None or (made_by and run is None):
        return None
    folder = run / made_by.name if made_by and run else Path(source).expanduser()
    if folder.is_dir():
        return artifact.folder_identity(folder, leaves)
    if made_by is None and folder.exists():
        raise UserError(f"{stage.file}: {key} = {source!r} is a file. Give the model's folder.")
    return hub_commit(stage, key, source) if made_by is None else None


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


def scores_missing(recipe: Recipe, folder: Path, record: dict[str, Any]) -> str | None:
    """Why a finished stage must be scored anew; None where its scores are there and answer to the recipe."""
    if record["evaluation"] != evaluation_identity(recipe):
        return "the recipe's evaluation changed"
    told = artifact.read_json(folder / "eval.json")
    if told is None or told.get("fingerprint") != record["fingerprint"]:
        return "its eval.json is missing or damaged"
    return None


@functools.cache
def _commit(model: str, revision: str | None) -> str | None:
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        return HfApi().model_info(model, revision=revision, timeout=10).sha
    except Exception:
        # Offline, or no such model: what the cache holds is what would be loaded.
        cached = try_to_load_from_cache(model, "config.json", revision=revision)
        return Path(cached).parent.name if isinstance(cached, str) else None


def hub_commit(stage: Stage, key: str, source: str) -> str:
    """The commit that a Hub id and its revision stand for now; UserError where there is none to be had."""
    model, _, revision = source.partition("@")
    commit = revision if len(revision) == 40 else _commit(model, revision or None)
    if commit is None:
        raise UserError(
            f"{stage.file}: {key} = {source!r} is not a folder, and neither the Hub nor its cache has such "
            "a model (is there a connection, is HF_HUB_OFFLINE set?). Give a local folder, or connect."
        )
    return commit


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
