"""What every stage's run shares: train, put the weights on disk, score them, write the record; and the three doors to it.

The doors: `main` (a stage alone, under `accelerate launch`), `child` (forked by the pipeline) and `prepare_child` (the
data of all stages, before the first of them trains).
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from hfpipe import __version__, artifact
from hfpipe.config import load_recipe
from hfpipe.data.check import check_sources
from hfpipe.errors import UserError
from hfpipe.evaluation.diagnostics import check_diagnostics
from hfpipe.evaluation.probes import load_probes
from hfpipe.evaluation.reward_functions import check_rewards
from hfpipe.faults import beat, explain, print_trace
from hfpipe.paths import cache_dir
from hfpipe.run_folder import claim, complete_at, damage_at, lock
from hfpipe.sections import Recipe, StageType
from hfpipe.stages import stage_module, stage_types
from hfpipe.synthesis.verify import check_verifiers
from hfpipe.training.hardware import energy_meter, keep_freed_memory, use_all_cores_alone
from hfpipe.training.identity import evaluation_identity, processes_now, scores_missing
from hfpipe.training.job import Job, Progress, make_job

PARENT_VARIABLE = "HFPIPE_PARENT"  # the pipeline's process id, for the ranks that it launches
_PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "tokenizers", "huggingface_hub")


def run_stage(job: Job, progress: Progress) -> None:
    """Bring one stage from where it stands to its finished folder.

    A stage whose weights are on disk already is only scored; one with checkpoints goes on from the last.
    """
    from hfpipe.training.guards import train_guarded

    module = stage_module(job.stage.type.name)
    began = time.monotonic()
    if complete_at(job.folder, job.fingerprint) and not damage_at(job.folder):
        if is_main_process():
            score_again(job, progress)
        return
    if is_main_process() and not job.start(progress.note):
        return
    if complete_at(job.work, job.fingerprint) and not damage_at(job.work):
        return  # the main process is putting it in its place
    metrics = job.trained()
    if metrics is None:
        if is_main_process():
            job.check_parents(read_all=True)
            if job.processes != processes_now(job.recipe):
                progress.note(f"goes on what {job.processes} processes began, with another number of rows in a step")
        spent = energy_meter()
        try:
            metrics = train_guarded(module.train, job, progress)
        except UserError:
            if is_main_process():
                job.drop_untrained()
            raise
        energy = spent()
        if energy and not metrics.get("resumed_from_step"):  # that of an attempt that was killed is not known
            metrics["energy"] = energy
        if is_main_process():
            job.mark_trained(metrics)
    else:
        progress.note("weights are on disk from an earlier run; scoring them")
    if not is_main_process():
        return
    sources: list[dict[str, Any]] = []
    if job.stage.type.leaves != "tokenizer":
        progress.tell("doing", text="evaluating")
        scores, sources = evaluate(job, job.work)
        metrics |= scores
    from hfpipe.publishing.card import write_card

    sources = [*metrics.pop("streamed", ()), *sources]
    record = {**stage_record(job, metrics, time.monotonic() - began), "sources": sources}
    write_card(job.work, record)
    job.finish(record)
    progress.tell("finished", metrics=metrics)


def evaluate(job: Job, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Score what the stage left in `folder`: the scores, and what became of the rows of each of its sources."""
    from hfpipe.evaluation.basics import evaluate_model
    from hfpipe.evaluation.rewards import evaluate_reward_model

    score = {"model": evaluate_model, "reward_model": evaluate_reward_model}[job.stage.type.leaves]
    return score(job, folder, stage_module(job.stage.type.name).prepare)


def score_again(job: Job, progress: Progress) -> None:
    """A finished stage is scored anew where the recipe's evaluation has changed; its weights stay as they are."""
    record = artifact.read_record(job.folder / artifact.STAGE_FILE) or {}
    why = scores_missing(job.recipe, job.folder, record) if job.stage.type.leaves != "tokenizer" else None
    if why is None:
        progress.note("finished already, nothing to do")
        return
    from hfpipe.publishing.card import write_card

    progress.note(f"{why}: scoring the weights on disk")
    scores, sources = evaluate(job, job.folder)
    sources = [s for s in record.get("sources", ()) if s.get("streamed")] + sources
    identity = evaluation_identity(job.recipe)
    scored = {"metrics": {**record["metrics"], **scores}, "evaluation": identity, "sources": sources}
    write_card(job.folder, record | scored)
    artifact.amend_record(job.folder / artifact.STAGE_FILE, **scored)


def stage_record(job: Job, metrics: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The content of `stage.json`."""
    import importlib.metadata

    from hfpipe.training.hardware import describe_machine
    from hfpipe.training.templates import render_example

    files = job.trained_files()
    versions = {"hfpipe": __version__, "python": sys.version.split()[0]}
    versions |= {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {
        "stage": job.stage.name,
        "type": job.stage.type.name,
        "teaches": job.stage.type.teaches,
        "leaves": job.stage.type.leaves,
        "recipe": job.recipe.name,
        "fingerprint": job.fingerprint,
        "processes": job.processes,
        "parent": job.parent_record(),
        "pins": job.pins,
        "config": artifact.hashed_config(job.stage, job.recipe.pipeline.seed, job.processes),
        "written": job.stage.raw,
        "data": job.data_hashes,
        "evaluation": evaluation_identity(job.recipe),
        "weights": {name: file["sha256"] for name, file in files.items() if name.endswith(".safetensors")},
        "files": files,
        "versions": versions,
        "machine": {**describe_machine(), "processes": int(os.environ.get("WORLD_SIZE", 1))},
        "metrics": metrics,
        "chat": render_example(job.work) if job.stage.type.rows not in (None, "text") else None,
        "wall_s": round(seconds, 1),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


# --- doors ---


def main(stage_type: StageType) -> None:
    """`accelerate launch -m hfpipe.stages.<name> FILE [section.key=value ...] [--out RUN] [--set ...]`."""
    parser = argparse.ArgumentParser(
        prog=f"hfpipe.stages.{stage_type.name}", description=f"Run a {stage_type.name} stage."
    )
    parser.add_argument("file", type=Path, help="the stage's YAML file; its folder is the recipe")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides of this stage")
    parser.add_argument("--set", action="append", default=[], metavar="stage.section.key=value", help="of any stage")
    parser.add_argument("--out", type=Path, help="the run's folder; default: runs/RECIPE")
    parser.add_argument("--progress", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args()  # overrides may stand after the options
    quiet_environment()
    _leave_with(os.environ.get(PARENT_VARIABLE))
    use_all_cores_alone()
    keep_freed_memory()
    overrides = [*options.set, *(f"{options.file.stem}.{text}" for text in options.overrides)]
    progress = Progress(
        options.progress if is_main_process() else None, echo=is_main_process() and not options.progress
    )
    if options.progress and is_main_process():
        _show_life(progress)
    try:
        if not options.file.is_file():
            raise UserError(f"{options.file} does not exist. Give the YAML file of a {stage_type.name} stage.")
        recipe = load_recipe(options.file.parent, stage_types(), overrides, options.out)
        stage = recipe.stages.get(options.file.stem)
        if stage is None or stage.type.name != stage_type.name:
            found = f"a {stage.type.name} stage" if stage else "not listed in pipeline.yaml"
            raise UserError(f"{options.file} is {found}; this command runs {stage_type.name} stages.")
        run = options.out or Path("runs") / recipe.name
        pipeline_holds_it = options.progress is not None
        with contextlib.nullcontext() if pipeline_holds_it or not is_main_process() else lock(run):
            if is_main_process() and not pipeline_holds_it:
                check_recipe(recipe)
                claim(recipe, run)
            job = make_job(recipe, stage, run)
            job.check_parents()
            run_stage(job, progress)
            if is_main_process() and not pipeline_holds_it:
                print(f"{stage.name} is complete in {job.folder}")
    except UserError as error:
        progress.tell("error", text=str(error), user=True)
        print(f"hfpipe: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except Exception as error:
        progress.tell("error", text=explain(error), user=False)
        print_trace(error)
        raise SystemExit(1) from None


def check_recipe(recipe: Recipe) -> None:
    """Look at what a recipe names, its data, reward functions and probes, and at the cache. UserError for a fault of one."""
    cache_dir()
    check_sources(recipe)
    check_rewards(recipe)
    check_diagnostics(recipe)
    check_verifiers(recipe)
    load_probes(recipe.pipeline.evaluate.probes, f"{recipe.folder / 'pipeline.yaml'}: evaluate.probes")


def is_main_process() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def _leave_with(parent: str | None) -> None:
    """End this process when the pipeline's, which launched it through others, is gone."""
    if parent is None:
        return

    def watch() -> None:
        while not _gone(int(parent)):
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        # A dead process whose own parent does not wait for it keeps its id.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except ProcessLookupError:
        return True
    except OSError:  # a system without /proc
        return False


def child(recipe: Recipe, run: Path, stage: str, events: Path, log: Path) -> None:
    """The pipeline's own child for a stage in one process."""
    _in_child(events, log, lambda progress: run_stage(make_job(recipe, recipe.stages[stage], run), progress))


def prepare_child(recipe: Recipe, run: Path, stages: list[str], events: Path, log: Path) -> None:
    """Prepares the data of `stages`, which are about to run, so that a bad row is told before anything trains."""
    from hfpipe.stages._prepare import prepare_all

    _in_child(events, log, lambda progress: prepare_all(recipe, run, stages, progress))


def prepare_ahead_child(recipe: Recipe, run: Path, stages: list[str], events: Path, log: Path) -> None:
    """Prepares the same beside it, the last stage first: it tells nothing but that it lives, for the other may wait for it."""
    from hfpipe.stages._prepare import prepare_backwards

    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # what is half-written is taken away
    _join_parent(log)
    quiet_environment()
    beat(lambda: Progress(events).tell("alive"))
    prepare_backwards(recipe, run, stages)


def synth_child(recipe: Recipe, run: Path, name: str, events: Path, log: Path) -> None:
    """Makes the rows of a synth section, which a stage about to run trains on."""
    from hfpipe.synthesis.make import make_rows, summary

    def act(progress: Progress) -> None:
        record = make_rows(recipe, name, run, lambda text: progress.tell("doing", text=text))
        progress.tell("data", text=summary(record))

    _in_child(events, log, act)


def _in_child(events: Path, log: Path, act: Any) -> None:
    """Run `act` with its output in a log file and its errors as events; leave with the parent if that dies."""
    _join_parent(log)
    progress = Progress(events)
    quiet_environment()
    keep_freed_memory()
    _show_life(progress)
    try:
        act(progress)
    except UserError as error:
        progress.tell("error", text=str(error), user=True)
        raise SystemExit(2) from None
    except BaseException as error:
        progress.tell("error", text=explain(error), user=False)
        print_trace(error)
        raise SystemExit(1) from None


def _join_parent(log: Path) -> None:
    """Write what is printed to a log, and end when the parent does."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(stream, 1)
    os.dup2(stream, 2)


def _show_life(progress: Progress) -> None:
    """Tell the pipeline that this process gets on; SIGUSR1 writes to the log where every thread of it stands."""
    faulthandler.register(signal.SIGUSR1, file=sys.__stderr__, all_threads=True)
    beat(lambda: progress.tell("alive", pid=os.getpid()))


def quiet_environment() -> None:
    """Defaults a user may override: no telemetry, no progress bars in a log, no warning about forked tokenizers."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
