"""`hfpipe list`: the recipes that are shipped, and the stages there are."""

from __future__ import annotations

import json

from hfpipe.config import shipped_recipes
from hfpipe.paths import stage_configs_dir
from hfpipe.stages import stage_types
from hfpipe.yaml_files import load_yaml


def list_recipes(as_json: bool) -> None:
    heads = {name: load_yaml(stage_configs_dir() / name / "pipeline.yaml") for name in shipped_recipes()}
    recipes = {name: head["stages"] for name, head in heads.items()}
    stages = {name: kind.teaches for name, kind in stage_types().items()}
    if as_json:
        print(json.dumps({"recipes": recipes, "stages": stages, "folder": str(stage_configs_dir())}, indent=2))
        return
    print(f"Recipes (hfpipe run NAME), in {stage_configs_dir()}:")
    for name, listed in recipes.items():
        first = f" (after hfpipe data prepare {name})" if "curate" in heads[name] else ""
        print(f"  {name:<12} {' -> '.join(listed)}{first}")
    print("Stages:")
    for name, teaches in stages.items():
        print(f"  {name:<12} {teaches}")
