"""A first look at every source, before anything is prepared."""

from __future__ import annotations

from hfpipe.data.sources import is_hub_id, load_source, named
from hfpipe.errors import ConfigErrors, UserError
from hfpipe.sections import DEFAULT_SPLIT, Recipe


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
    head = recipe.folder / "pipeline.yaml"
    listed += [(head, "evaluate.text", source, "text", "validation") for source in recipe.pipeline.evaluate.text]
    for file, section, source, wanted, split in listed:
        try:
            with named(f"{file}: {section}"):
                if is_hub_id(source.path):  # its commit is looked up for the fingerprint
                    continue
                load_source(source, wanted=wanted, split=split)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise ConfigErrors(list(dict.fromkeys(problems)))
