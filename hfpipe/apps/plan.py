"""`hfpipe plan`: what a run would do, and why."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hfpipe.pipeline import plan_run
from hfpipe.plan import describe_stage
from hfpipe.sections import Recipe


def plan(recipe: Recipe, run: Path, options: argparse.Namespace) -> None:
    rows = [
        {"stage": p.stage.name, "status": p.status, "why": list(p.why), **describe_stage(recipe, p.stage)}
        for p in plan_run(recipe, run)
    ]
    if options.json:
        print(json.dumps({"recipe": recipe.name, "run": str(run), "stages": rows}, indent=2))
        return
    print(f"{recipe.name} -> {run}")
    for row in rows:
        print(f"{row['stage']:<10} {row['status']}{': ' if row['why'] else ''}{'; '.join(row['why'])}")
        for line in row["notes"]:
            print(f"{'':<10}   {line}")
