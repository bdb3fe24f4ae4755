"""A first look at every source, before anything is prepared."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hfpipe import artifact
from hfpipe.data.sources import is_hub_id, load_source, named
from hfpipe.errors import ConfigErrors, UserError
from hfpipe.paths import stage_configs_dir
from hfpipe.sections import DEFAULT_SPLIT, Curation, Recipe, Source, Stage
from hfpipe.synth_config import section_of

SUMMARY_FILE = "_summary.json"  # in a folder of shards: what they were made of, and how


def check_sources(recipe: Recipe) -> None:
    """Read the first rows of every local source: is it there, is its form known, does the stage take it?

    Raises:
        ConfigErrors: what is wrong with each.
    """
    problems = []
    listed = [
        (stage.file, f"data.{role}", source, source.as_ or stage.type.rows, split)
        for stage in recipe.stages.values()
        for role, split in DEFAULT_SPLIT.items()
        for source in getattr(stage.data, role)
    ]
    listed += [
        (stage.file, "tokenizer.from", source, "text", "train")
        for stage in recipe.stages.values()
        for source in getattr(stage.sections.get("tokenizer"), "from_", ())
    ]
    head = recipe.folder / "pipeline.yaml"
    listed += [(head, "evaluate.text", source, "text", "validation") for source in recipe.pipeline.evaluate.text]
    synths, shards = recipe.pipeline.synth, shards_to_make(recipe)
    listed += [(head, f"synth.{name}.prompts", synth.prompts, None, "train") for name, synth in synths.items()]
    for file, section, source, wanted, split in listed:
        try:
            with named(f"{file}: {section}"):
                if section_of(source.path, synths) or source.path == shards:  # made on the way, or before
                    continue
                if is_hub_id(source.path):  # its commit is looked up for the fingerprint
                    continue
                load_source(source, wanted=wanted, split=split)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise ConfigErrors(list(dict.fromkeys(problems)))


def check_shards(recipe: Recipe, stages: Iterable[Stage]) -> None:
    """UserError where one of `stages` reads the recipe's curation, and that was not made yet or of another `curate`."""
    for stage in stages:
        if problem := shards_problem(recipe, stage):
            raise UserError(problem)


def shards_problem(recipe: Recipe, stage: Stage) -> str | None:
    """Why a stage cannot read the recipe's curation as it stands, and what to do; None where it can, or reads none."""
    section = recipe.pipeline.curate
    if section is None or section.output_folder not in [s.path for s in (*stage.data.train, *stage.data.eval)]:
        return None
    made = artifact.read_record(Path(section.output_folder).expanduser() / SUMMARY_FILE) or {}
    changed = artifact.changes(made["curation"], curation_of(section)) if "curation" in made else []
    if not shards_to_make(recipe) and not changed:
        return None
    problem = f"was made by another `curate` ({', '.join(changed)})" if changed else "is not there yet"
    name = recipe.folder.name if recipe.folder.parent == stage_configs_dir() else recipe.folder
    return (
        f"{section.output_folder} {problem}. It is made by: hfpipe data prepare {name} (with the same --out and --set, "
        "if any)"
    )


def shards_to_make(recipe: Recipe) -> str | None:
    """The folder of the recipe's curation, where that was not made yet."""
    folder = recipe.pipeline.curate and recipe.pipeline.curate.output_folder
    return None if folder is None or Path(folder).expanduser().exists() else folder


def curation_of(section: Curation) -> dict[str, Any]:
    """What decides the shards of a curation, beside the content of its sources, what is held out and the tokenizer."""
    whole = dataclasses.asdict(section) | {"executor": {"tasks": section.executor.get("tasks")}}
    return json.loads(json.dumps({key: whole[key] for key in whole if key not in ("output_folder", "tokenizer")}))


def held_out_sources(recipe: Recipe, without: str | None = None) -> Iterator[tuple[str, Source, str]]:
    """(label, source, form) of all held-out rows of a recipe but its probes: `data.eval` of its stages, `evaluate.text`.

    `without`: a path that is not among them, since it is yet to be made.
    """
    listed = [(source, s.type.rows or "text") for s in recipe.stages.values() for source in s.data.eval]
    listed += [(source, "text") for source in recipe.pipeline.evaluate.text]
    seen = set()
    for source, form in listed:
        split, form = source.split or DEFAULT_SPLIT["eval"], source.as_ or form
        key = (source.path, source.name, source.revision, source.limit, split)
        if key not in seen and source.path != without:
            seen.add(key)
            yield f"{source.path} [{split}]", source, form
