"""The command line. Each command's body imports what it needs, so that `hfpipe --help` imports nothing heavy."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from hfpipe import __version__
from hfpipe.errors import StageFailed, UserError


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 the user's input is at fault, 1 a fault of ours or of the machine."""
    options = build_parser().parse_args(argv)
    try:
        return options.command(options) or 0
    except UserError as error:
        print(f"hfpipe: {error}", file=sys.stderr)
        return 2
    except StageFailed as error:
        print(f"hfpipe: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nhfpipe: interrupted; the same command goes on from what is on disk.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hfpipe", description="From raw text to an aligned, evaluated assistant.")
    parser.add_argument("--version", action="version", version=f"hfpipe {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("run", help="run a recipe, or go on where it stopped")
    _recipe_options(command)
    command.add_argument("--from", dest="start", metavar="STAGE", help="first stage; those before must be finished")
    command.add_argument("--to", dest="end", metavar="STAGE", help="last stage")
    command.add_argument("--only", metavar="STAGE", help="this stage alone, instead of --from and --to")
    command.set_defaults(command=_run)

    command = commands.add_parser("plan", help="check a recipe and say what a run would do, and why")
    _recipe_options(command)
    command.add_argument("--json", action="store_true", help="machine-readable output")
    command.set_defaults(command=_plan)

    command = commands.add_parser("list", help="the shipped recipes and the stages there are")
    command.add_argument("--json", action="store_true", help="machine-readable output")
    command.set_defaults(command=_list)
    return parser


def _recipe_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", help="a shipped recipe's name, or a folder with pipeline.yaml")
    command.add_argument("--out", type=Path, help="the run's folder; default: runs/RECIPE")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="stage.section.key=value, or a setting of the recipe",
    )


def _load(options: argparse.Namespace) -> tuple[Any, Path]:
    from hfpipe.config import load_recipe
    from hfpipe.data.check import check_sources
    from hfpipe.run_folder import check_owner
    from hfpipe.stages import stage_types

    recipe = load_recipe(options.recipe, stage_types(), options.set)
    run = options.out or Path("runs") / recipe.name
    check_owner(recipe, run)
    check_sources(recipe)
    return recipe, run


def _run(options: argparse.Namespace) -> None:
    import time

    from hfpipe.pipeline import run_recipe
    from hfpipe.progress import Display, duration

    began = time.monotonic()
    recipe, run = _load(options)
    chosen = run_recipe(recipe, run, Display(), options.start, options.end, options.only)
    whole = len(chosen) == len(recipe.stages)
    _print_scorecard(run)
    what = recipe.name if whole else ", ".join(item.stage.name for item in chosen)
    print(
        f"{what} {'is' if whole or len(chosen) == 1 else 'are'} complete in {run} ({duration(time.monotonic() - began)})"
    )


def _print_scorecard(run: Path) -> None:
    from hfpipe.evaluation.scorecard import read_scorecard, table

    card = read_scorecard(run)
    if card.capabilities:
        print("\n".join(["", *table(card), ""]))


def _plan(options: argparse.Namespace) -> None:
    from hfpipe.pipeline import plan_run
    from hfpipe.plan import describe_stage

    recipe, run = _load(options)
    planned = plan_run(recipe, run)
    rows = [
        {"stage": p.stage.name, "status": p.status, "why": list(p.why), **describe_stage(recipe, p.stage)}
        for p in planned
    ]
    if options.json:
        print(json.dumps({"recipe": recipe.name, "run": str(run), "stages": rows}, indent=2))
        return
    print(f"{recipe.name} -> {run}")
    for row in rows:
        print(f"{row['stage']:<10} {row['status']}{': ' if row['why'] else ''}{'; '.join(row['why'])}")
        for line in row["notes"]:
            print(f"{'':<10}   {line}")


def _list(options: argparse.Namespace) -> None:
    from hfpipe.config import shipped_recipes
    from hfpipe.paths import stage_configs_dir
    from hfpipe.stages import stage_types
    from hfpipe.yaml_files import load_yaml

    recipes = {name: load_yaml(stage_configs_dir() / name / "pipeline.yaml")["stages"] for name in shipped_recipes()}
    stages = {name: kind.teaches for name, kind in stage_types().items()}
    if options.json:
        print(json.dumps({"recipes": recipes, "stages": stages, "folder": str(stage_configs_dir())}, indent=2))
        return
    print(f"Recipes (hfpipe run NAME), in {stage_configs_dir()}:")
    for name, listed in recipes.items():
        print(f"  {name:<12} {' -> '.join(listed)}")
    print("Stages:")
    for name, teaches in stages.items():
        print(f"  {name:<12} {teaches}")
