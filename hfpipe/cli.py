"""The command line. Each command's body imports what it needs, so that `hfpipe --help` imports nothing heavy."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from hfpipe import __version__
from hfpipe.apps.options import (
    add_check_options,
    add_device_options,
    add_new_options,
    add_prepare_options,
    add_probe_options,
    add_scale_options,
    positive,
)
from hfpipe.errors import StageFailed, UserError
from hfpipe.faults import explain, full, print_trace


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 the user's input is at fault, 1 a fault of ours or of the machine."""
    options = build_parser().parse_args(argv)
    try:
        return options.command(options) or 0
    except (UserError, StageFailed) as error:
        print(f"hfpipe: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("\nhfpipe: interrupted; the same command goes on from what is on disk.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except Exception as error:
        if full(error):
            print(f"hfpipe: {explain(error)}", file=sys.stderr)
        else:  # a fault of ours: whoever mends it needs the traceback
            print_trace(error)
        return 1
    finally:
        if "hfpipe.hub_client" in sys.modules:
            sys.modules["hfpipe.hub_client"].tell_notes(lambda note: print(f"hfpipe: {note}", file=sys.stderr))


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

    command = commands.add_parser(
        "new", help="write a recipe for a size, a budget or a model, each number with its reason"
    )
    add_new_options(command)
    command.set_defaults(command=_new)

    command = commands.add_parser("plan", help="check a recipe and say what a run would do, and why")
    _recipe_options(command)
    add_device_options(command)
    command.add_argument("--rehearse", action="store_true", help="measure ten steps of each stage on this machine")
    command.add_argument("--json", action="store_true", help="machine-readable output")
    command.set_defaults(command=_plan)

    command = commands.add_parser("scale", help="scaling laws: the best model for a budget, and what it costs")
    add_scale_options(command)
    command.set_defaults(command=_scale)

    command = commands.add_parser(
        "data", help="look at data, prepare it, or make it: hfpipe data check, prepare, synth"
    )
    about_data = command.add_subparsers(required=True, metavar="check | prepare | synth")
    command = about_data.add_parser(
        "prepare", help="filter, deduplicate and tokenise corpora into shards, by datatrove"
    )
    add_prepare_options(command)
    command.set_defaults(command=_prepare_data)
    command = about_data.add_parser("synth", help="make the rows of a recipe's synth sections, or go on with them")
    _recipe_options(command)
    command.add_argument("--only", metavar="NAME", help="this section alone")
    command.add_argument("--json", action="store_true", help="machine-readable output")
    command.set_defaults(command=_synth)
    command = about_data.add_parser(
        "check", help="what a recipe's sources or loose files hold, and what of it deserves attention"
    )
    add_check_options(command)
    command.set_defaults(command=_check_data)

    command = commands.add_parser("report", help="write a run's report.html and print its scorecard")
    command.add_argument("run", type=Path, help="a run's folder, such as runs/tiny")
    command.add_argument("--json", action="store_true", help="machine-readable output")
    command.set_defaults(command=_report)

    command = commands.add_parser("eval", help="put probes to any model: a score with its interval for each capability")
    command.add_argument("model", help="a model's folder, or org/model@revision")
    add_probe_options(command)
    command.add_argument("--harness", metavar="TASKS", help="tasks of lm-evaluation-harness, such as gsm8k,ifeval")
    command.add_argument("--include-path", metavar="DIR", help="task files of your own, for --harness")
    command.add_argument("--limit", type=int, metavar="N", help="questions of each task at the most, for --harness")
    command.add_argument("--apply-chat-template", action="store_true", help="ask as a user's turn, for --harness")
    command.set_defaults(command=_eval)

    command = commands.add_parser("compare", help="the same questions to two models: wins, ties and losses, paired")
    command.add_argument("first", help="a model's folder, or org/model@revision")
    command.add_argument("second", help="the one that is held against it")
    add_probe_options(command)
    command.add_argument(
        "--judge", help="a reward model, or the URL of an OpenAI-compatible endpoint; default: the checks"
    )
    command.add_argument("--judge-model", default="default", metavar="NAME", help="the model to ask at that endpoint")
    command.add_argument("--show", type=int, default=5, metavar="N", help="questions that only one of them got right")
    command.set_defaults(command=_compare)

    command = commands.add_parser(
        "redteam", help="attack a model's refusals; write what got through as rows to learn from"
    )
    command.add_argument("model", help="a model's folder, or org/model@revision")
    command.add_argument("--size", type=int, default=40, metavar="N", help="requests of each kind")
    command.add_argument("--out", type=Path, help="a folder for dpo.jsonl and sft.jsonl")
    command.add_argument("--json", action="store_true", help="machine-readable output")
    command.set_defaults(command=_redteam)

    command = commands.add_parser("inspect", help="rows of a stage as the model will see them, trained tokens marked")
    command.add_argument("file", type=Path, help="a stage's YAML file, such as stage_configs/tiny/sft.yaml")
    command.add_argument("--row", type=int, metavar="N", help="this row, from 1; default: the first five")
    command.add_argument("--out", type=Path, help="the run with the tokenizer; default: runs/RECIPE")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for run")
    command.add_argument("--json", action="store_true", help="one JSON object a row")
    command.set_defaults(command=_inspect)

    command = commands.add_parser("chat", help="talk to a model in the terminal; it may use the calculator")
    command.add_argument("model", help="a model's folder, such as runs/tiny/dpo, or org/model@revision")
    command.add_argument("--prompt", metavar="TEXT", help="one turn, then end")
    command.add_argument("--system", metavar="TEXT", help="a system message")
    command.add_argument(
        "--max-new-tokens", type=positive, default=256, metavar="N", help="tokens of an answer at the most"
    )
    command.add_argument("--json", action="store_true", help="one JSON object a turn")
    command.set_defaults(command=_chat)

    command = commands.add_parser("status", help="the stages of a run: finished, published where, left to push")
    command.add_argument("run", type=Path, help="a run's folder, such as runs/tiny")
    command.add_argument("--json", action="store_true", help="machine-readable output")
    command.set_defaults(command=_status)

    command = commands.add_parser(
        "push", help="publish finished stages that are not on the Hub yet, or not as they are"
    )
    command.add_argument("run", type=Path, help="a run's folder, such as runs/tiny")
    command.add_argument("--stage", action="append", metavar="STAGE", help="this stage; may be given several times")
    command.add_argument("--repo-id", metavar="ID", help="where to: me/tiny; default: the recipe's hub.repo_id")
    command.add_argument(
        "--public", action=argparse.BooleanOptionalAction, help="of a repo that is made; default: hub.private"
    )
    command.add_argument("--json", action="store_true", help="machine-readable output")
    command.set_defaults(command=_push)

    command = commands.add_parser("pull", help="a published run with all its stages, or one model, each file verified")
    command.add_argument("model", help="me/tiny, me/tiny@TAG, me/tiny@sft, or any org/model@revision")
    command.add_argument(
        "--out", type=Path, help="the run's folder; default: runs/RECIPE; of one model: a folder for it"
    )
    command.add_argument("--json", action="store_true", help="machine-readable output")
    command.set_defaults(command=_pull)

    command = commands.add_parser(
        "lineage", help="from a model back to its raw data, and whether each link still holds"
    )
    command.add_argument("model", help="a stage's folder, or org/model@revision")
    command.add_argument("--json", action="store_true", help="machine-readable output")
    command.set_defaults(command=_lineage)

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


def _quiet() -> None:
    from hfpipe.stages._run import quiet_environment

    quiet_environment()


def _run(options: argparse.Namespace) -> None:
    from hfpipe.pipeline import open_recipe, run_and_report
    from hfpipe.progress import Display

    recipe, run = open_recipe(options.recipe, options.set, options.out)
    run_and_report(recipe, run, Display(), options.start, options.end, options.only)


def _check_data(options: argparse.Namespace) -> None:
    from hfpipe.apps.data import check_data

    check_data(options.what, options.set, options.out, options.held_out, options.json)


def _prepare_data(options: argparse.Namespace) -> None:
    from hfpipe.apps.prepare import prepare_data

    prepare_data(options.what, options.tokenizer, options.set, options.out, options.json)


def _synth(options: argparse.Namespace) -> None:
    _quiet()
    from hfpipe.apps.synth import synth

    synth(options.recipe, options.set, options.out, options.only, options.json)


def _report(options: argparse.Namespace) -> None:
    from hfpipe.evaluation.scorecard import table
    from hfpipe.pipeline import report_run

    card, path = report_run(options.run)
    if options.json:
        print(json.dumps({"report": str(path), **card.as_json()}, indent=2))
        return
    words = [*(f"forgotten: {line}" for line in card.forgotten), *(f"gained: {line}" for line in card.beyond)]
    scores = table(card) if card.capabilities or card.text or card.diagnostics else []
    print("\n".join([*scores, *words, f"report: {path}"]))


def _eval(options: argparse.Namespace) -> None:
    _quiet()
    from hfpipe.apps.compare import evaluate

    evaluate(
        options.model,
        options.probes,
        options.json,
        [task for task in (options.harness or "").split(",") if task],
        include_path=options.include_path,
        limit=options.limit,
        apply_chat_template=options.apply_chat_template,
    )


def _compare(options: argparse.Namespace) -> None:
    _quiet()
    from hfpipe.apps.compare import compare

    compare(
        options.first,
        options.second,
        options.probes,
        options.json,
        options.show,
        options.judge,
        options.judge_model,
    )


def _redteam(options: argparse.Namespace) -> None:
    _quiet()
    from hfpipe.apps.redteam import redteam

    redteam(options.model, size=options.size, out=options.out, as_json=options.json)


def _inspect(options: argparse.Namespace) -> None:
    _quiet()
    from hfpipe.apps.inspect import inspect_stage

    inspect_stage(options.file, options.set, options.out, options.row, options.json)


def _chat(options: argparse.Namespace) -> None:
    _quiet()
    from hfpipe.apps.chat import chat

    chat(
        options.model,
        prompt=options.prompt,
        system=options.system,
        as_json=options.json,
        max_new_tokens=options.max_new_tokens,
    )


def _status(options: argparse.Namespace) -> None:
    from hfpipe.apps.hub import status

    status(options.run, options.json)


def _push(options: argparse.Namespace) -> None:
    from hfpipe.apps.hub import push

    push(options.run, options.stage, options.repo_id, options.public, options.json)


def _pull(options: argparse.Namespace) -> None:
    from hfpipe.apps.hub import pull

    pull(options.model, options.out, options.json)


def _lineage(options: argparse.Namespace) -> int:
    from hfpipe.apps.hub import lineage

    return lineage(options.model, options.json)


def _new(options: argparse.Namespace) -> None:
    from hfpipe.apps.new import new

    new(options)


def _plan(options: argparse.Namespace) -> None:
    from hfpipe.apps.plan import plan
    from hfpipe.pipeline import open_recipe

    plan(*open_recipe(options.recipe, options.set, options.out), options)


def _scale(options: argparse.Namespace) -> None:
    from hfpipe.apps.scale import scale

    scale(options)


def _list(options: argparse.Namespace) -> None:
    from hfpipe.apps.listing import list_recipes

    list_recipes(options.json)
