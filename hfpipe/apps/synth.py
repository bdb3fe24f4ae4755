"""`hfpipe data synth`: the rows of a recipe's synth sections."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from hfpipe.errors import UserError, nearest
from hfpipe.pipeline import open_recipe
from hfpipe.progress import Display
from hfpipe.run_folder import claim, lock
from hfpipe.synth_config import file_of
from hfpipe.synthesis.make import make_rows, summary


def synth(recipe_name: str, overrides: Sequence[str], out: Path | None, only: str | None, as_json: bool) -> None:
    """Make what is not there yet, of all sections or of `only` one, and say what became of the answers."""
    recipe, run = open_recipe(recipe_name, overrides, out)
    names = list(recipe.pipeline.synth)
    if not names:
        raise UserError(
            f"{recipe.folder / 'pipeline.yaml'} has no `synth`: name a file of sections, synth: synth.yaml."
        )
    if only is not None and only not in names:
        raise UserError(f"--only {only}: no such section; the recipe has {', '.join(names)}.{nearest(only, names)}")
    display, records = Display(), {}
    with lock(run):
        claim(recipe, run)
        for name in names if only is None else [only]:
            records[name] = make_rows(
                recipe, name, run, lambda text: None if as_json else display.status("synth", text)
            )
            if not as_json:
                display.line(name, f"{summary(records[name])}\n{'':<10} {file_of(run, name)}")
    if as_json:
        print(json.dumps(records, indent=2))
