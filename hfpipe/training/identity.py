"""What a stage's result is known by: its configuration, the content that it reads, its parents. Imports no torch."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hfpipe import artifact
from hfpipe.errors import UserError
from hfpipe.hub_client import resolve, split_id, use_pins
from hfpipe.sections import DEFAULT_SPLIT, Recipe, Source, Stage
from hfpipe.synth_config import Asked, file_of, section_of


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
    from hfpipe.data.check import shards_to_make
    from hfpipe.data.sources import named
    from hfpipe.training.templates import load_chat_template

    use_pins(_pins_of(stage, run))
    seed = recipe.pipeline.seed
    to_make = {str(file_of(run, name)) for name in synth_to_make(recipe, stage, run, planned)} if run else set()
    to_make |= {shards_to_make(recipe)}
    hashes = {}
    for role, split in DEFAULT_SPLIT.items():
        for number, source in enumerate(getattr(stage.data, role)):
            with named(f"{stage.file}: data.{role}"):
                known = "to be made" if source.path in to_make else hash_source(source, split, seed)
                hashes[f"{role}[{number}] {source.path}"] = known
    for number, source in enumerate(getattr(stage.sections.get("tokenizer"), "from_", ())):
        with named(f"{stage.file}: tokenizer.from"):
            hashes[f"tokenizer.from[{number}] {source.path}"] = hash_source(source, "train", seed)
    if stage.data.decontaminate:
        hashes |= hash_held_out(recipe)
    if stage.guide:
        key, name, _ = stage.guide
        hashes[f"{key} {name}"] = (planned or {}).get(name) or guide_identity(recipe, stage, run) or ""
    for item in getattr(stage.sections.get("rewards"), "functions", ()):
        if item.function and (file := file_of_function(item.function, stage)):
            hashes[f"rewards.functions {item.function}"] = artifact.file_sha256(file)
    tokenizer = stage.sections.get("tokenizer")
    if tokenizer and tokenizer.chat_template:
        with named(f"{stage.file}: tokenizer.chat_template"):
            template = load_chat_template(tokenizer.chat_template)
        hashes[f"chat_template {tokenizer.chat_template}"] = artifact.digest(template)

    def fingerprint(processes: int) -> str:
        config = artifact.hashed_config(stage, seed, processes)
        return artifact.fingerprint(config, hashes, parent_fingerprint)

    for name, file in ((stage.name, artifact.STAGE_FILE), (f"{stage.name}.partial", artifact.BEGUN_FILE)):
        record = artifact.read_record(run / name / file) if run else None
        if record and record["fingerprint"] == fingerprint(record["processes"]):
            return Identity(record["fingerprint"], hashes, record["processes"])
    return Identity(fingerprint(processes_now(recipe)), hashes, processes_now(recipe))


def file_of_function(function: str, stage: Stage) -> Path | None:
    """Where the source of `package.module:name` or `path/to/file.py:name` stands; a path is looked up beside the stage's
    file, then in the working directory."""
    place = function.rpartition(":")[0]
    if place.endswith(".py"):
        beside = stage.file.parent / Path(place).expanduser()
        file = beside if beside.is_file() else Path(place).expanduser()
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


def guide_identity(recipe: Recipe, stage: Stage, run: Path | None) -> str | None:
    """The same of the reward model or the teacher."""
    key, source, leaves = stage.guide or ("", None, "")
    return _identity_of(stage, key, source, recipe.guide_stage(stage), run, (leaves,))


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
    return hub_commit(stage, key, source, run) if made_by is None else None


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


def hash_held_out(recipe: Recipe, without: str | None = None) -> dict[str, str]:
    """What decides which rows `data.decontaminate` leaves out; `without` as `held_out_sources` has it."""
    from hfpipe.data.check import held_out_sources
    from hfpipe.data.sources import content_hash

    seed = recipe.pipeline.seed
    sources = held_out_sources(recipe, without)
    hashes = {f"held out {label}": hash_source(source, "validation", seed) for label, source, _ in sources}
    for probe in recipe.pipeline.evaluate.probes:
        hashes[f"held out probes {probe.path}"] = content_hash(probe.path, split=probe.split, size=probe.limit)
    return hashes


def synth_identity(recipe: Recipe, name: str, run: Path, planned: Mapping[str, str] | None = None) -> str:
    """What the rows of a synth section are known by: its keys, the prompts' content, teacher, judge, what is held out."""
    synth = recipe.pipeline.synth[name]
    hashes = {"prompts": hash_source(synth.prompts, "train", recipe.pipeline.seed), **hash_held_out(recipe)}
    config = dataclasses.asdict(synth)
    del config["prompts"]["path"]
    for key, asked, leaves in (("teacher", synth.teacher, "model"), ("judge", synth.judge, "reward_model")):
        for field in ("model", "endpoint", "concurrency", "input_price", "output_price") if asked else ():
            del config[key][field]
        hashes[key] = asked_identity(recipe, asked, run, leaves, planned) if asked else ""
    return artifact.fingerprint(config, hashes, None)


def asked_identity(
    recipe: Recipe, asked: Asked, run: Path, leaves: str, planned: Mapping[str, str] | None = None
) -> str:
    """A teacher's or a judge's: a stage's fingerprint, a folder's hash, a Hub model's commit, an endpoint and its model."""
    name = str(asked.model)
    if asked.endpoint:
        return f"{asked.endpoint} {name}"
    if name in recipe.stages:
        record = artifact.read_record(run / name / artifact.STAGE_FILE) or {}
        return (planned or {}).get(name) or record.get("fingerprint", "not finished")
    folder = Path(name).expanduser()
    return artifact.folder_identity(folder, (leaves,)) if folder.is_dir() else resolve(*split_id(name))


def synth_to_make(recipe: Recipe, stage: Stage, run: Path, planned: Mapping[str, str] | None = None) -> list[str]:
    """The synth sections that a stage trains on whose rows are not there, or not as they would be made now."""
    synths = recipe.pipeline.synth
    names = dict.fromkeys(filter(None, (section_of(source.path, synths) for source in stage.data.train)))
    return [name for name in names if synth_record(recipe, name, run, planned) is None]


def synth_record(
    recipe: Recipe, name: str, run: Path, planned: Mapping[str, str] | None = None
) -> dict[str, Any] | None:
    """What is written of a section's rows, where they are there, whole, and would be made the same way now."""
    record = artifact.read_record(file_of(run, name).with_suffix(".json"))
    if record is None or artifact.damage(run / "synth", record["files"], trust_times=True):
        return None
    return record if record["fingerprint"] == synth_identity(recipe, name, run, planned) else None


def evaluation_identity(recipe: Recipe) -> str:
    """Changes when the recipe's `evaluate` section or the text and probes that it names do."""
    from hfpipe.data.sources import content_hash

    evaluate = recipe.pipeline.evaluate
    hashes = [hash_source(source, "validation", recipe.pipeline.seed) for source in evaluate.text]
    hashes += [content_hash(probe.path, split=probe.split, size=probe.limit) for probe in evaluate.probes]
    # A key that came later counts where it is used: older runs are not scored anew for it.
    unused = {"needle"} if evaluate.needle is None else set()
    unused |= set() if evaluate.diagnostics else {"diagnostics", "llc"}
    asked = {key: value for key, value in dataclasses.asdict(evaluate).items() if key not in unused}
    for source in asked["text"]:
        if source["domain"] is None:
            del source["domain"]
    return artifact.digest([asked, hashes])


def scores_missing(recipe: Recipe, folder: Path, record: dict[str, Any]) -> str | None:
    """Why a finished stage must be scored anew; None where its scores are there and answer to the recipe."""
    if record["evaluation"] != evaluation_identity(recipe):
        return "the recipe's evaluation changed"
    told = artifact.read_json(folder / "eval.json")
    if told is None or told.get("fingerprint") != record["fingerprint"]:
        return "its eval.json is missing or damaged"
    return None


def _pins_of(stage: Stage, run: Path | None) -> dict[str, str]:
    """The commits that a stage, finished or begun, was begun with."""
    pins: dict[str, str] = {}
    for name, file in ((f"{stage.name}.partial", artifact.BEGUN_FILE), (stage.name, artifact.STAGE_FILE)):
        record = artifact.read_record(run / name / file) if run else None
        pins |= (record or {}).get("pins", {})
    return pins


def kept_pins(stage: Stage, run: Path) -> list[str]:
    """A line for each branch and tag of the Hub that a stage reads as it stood when it was first begun here."""
    named = {stage.model.from_, stage.guide[1] if stage.guide else None}
    for source in (*stage.data.train, *stage.data.eval):
        named.add(f"datasets/{source.path}" + (f"@{source.revision}" if source.revision else ""))
    return [
        f"{name.removeprefix('datasets/')} is read at commit {commit[:12]}, as it stood when this stage was first begun here; "
        "another --out takes it as it stands then"
        for name, commit in _pins_of(stage, run).items()
        if name in named and not name.endswith(commit)
    ]


def hub_commit(stage: Stage, key: str, source: str, run: Path | None = None) -> str:
    """The commit that a Hub id and its revision stand for.

    What `run` holds of the stage, finished or begun, keeps the commit that it was begun with.

    Raises:
        UserError: there is none to be had.
    """
    if source in (pins := _pins_of(stage, run)):
        return pins[source]
    try:
        return resolve(*split_id(source))
    except UserError as error:
        raise UserError(f"{stage.file}: {key} = {source!r}: {error}") from None
