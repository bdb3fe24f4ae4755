"""`hfpipe data prepare`: corpora -> filtered, deduplicated, tokenised shards, by datatrove, as a recipe or a YAML file says."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hfpipe import artifact
from hfpipe.apps.curation import TASKS, build_steps, build_upstream, choose_executor
from hfpipe.config import load_recipe
from hfpipe.data.check import SUMMARY_FILE, curation_of
from hfpipe.data.sources import content_hash, is_hub_id, local_path, named, open_rows
from hfpipe.errors import ConfigErrors, UserError
from hfpipe.pipeline import run_recipe
from hfpipe.progress import Display, quantity
from hfpipe.run_folder import check_owner, claim, lock
from hfpipe.sections import Curation, Recipe
from hfpipe.stages import stage_types
from hfpipe.stages._run import check_recipe
from hfpipe.strict import build
from hfpipe.training.identity import hash_held_out
from hfpipe.training.shards import EXCLUDED, MADE, SCRATCH
from hfpipe.yaml_files import load_yaml

_IMPORTED = ("hfpipe.training.curate", "hfpipe.training.gopher", "tokenizers", "py3langid.langid")  # by all workers
_VERSION = 2  # raise when the same inputs come to give other shards


def prepare_data(
    what: str,
    tokenizer: Path | None = None,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    as_json: bool = False,
) -> None:
    """Prepare what a recipe's `curate` or a file describes, or go on where it was stopped; print what was left out, and why.

    The tokenizer of a recipe is made first, where it is not there.

    Raises:
        UserError: the file, a source or the tokenizer is at fault, or datatrove is not installed.
    """
    try:
        from datatrove.pipeline.dedup import MinhashConfig
    except ImportError:
        raise UserError('data prepare needs datatrove: pip install -c constraints.txt "hfpipe[curate]".') from None
    file, section, recipe, problems = _read(what, overrides, out)
    folder = Path(section.output_folder).expanduser().absolute()
    root = folder.with_name(f"{folder.name}.partial")
    problems += _misplaced(section, folder, file)
    steps = build_steps(section, recipe, root, file, problems)
    if section.minhash is not None:
        build_upstream(MinhashConfig, section.minhash, {}, f"{file}: minhash", problems)
    executor = choose_executor(section, file, problems)
    if problems:
        raise ConfigErrors(problems)
    vocabulary = tokenizer or _tokenizer(section, recipe, out, file, as_json)
    vocabulary = vocabulary.expanduser().absolute()
    with named(file):
        identity = _identity(section, recipe, vocabulary)
        if folder.exists() and artifact.read_record(folder / SUMMARY_FILE) is None:
            raise UserError(f"output_folder {folder} holds something else. Name a folder that is not there yet.")
    with lock(root), named(file):
        done = artifact.read_record(folder / SUMMARY_FILE)
        if done is None or done["identity"] != identity:
            _clear_other(root, identity)
            chain = _chain(section, steps, executor, root, folder, vocabulary, identity)
            _run(chain, section, root, quiet=as_json)
            done = artifact.read_record(folder / SUMMARY_FILE)
        if done is not None:
            shutil.rmtree(root)
    if done is None:
        summary = str(folder / SUMMARY_FILE)
        print(json.dumps({"submitted": summary}) if as_json else f"submitted; {summary} is written when all is done")
    else:
        told = [*_told(done), f"prepared: {section.output_folder}"]
        print(json.dumps(done, indent=2) if as_json else "\n".join(told))


# --- what the file says ---


def _read(what: str, overrides: Sequence[str], out: Path | None) -> tuple[str, Curation, Recipe | None, list[str]]:
    """(the file that an error begins with, what it says, the recipe that it belongs to, what is wrong with it)."""
    if Path(what).suffix not in (".yaml", ".yml") and not Path(what).is_file():
        recipe = load_recipe(what, stage_types(), overrides, out)
        file, section = str(recipe.folder / "pipeline.yaml"), recipe.pipeline.curate
        if section is None:
            raise UserError(f"{file} has no `curate`: name a file, curate: curate.yaml.")
        return f"{file}: curate", section, recipe, _no_sources(section, f"{file}: curate")
    if overrides or out:
        raise UserError(f"--set and --out are for a recipe; {what} is a file: change it, or give its recipe's folder.")
    problems: list[str] = []
    section = build(Curation, load_yaml(Path(what)), f"{what}: ", problems)
    if section is None:
        raise ConfigErrors(problems)
    beside = Path(what).parent
    recipe = load_recipe(beside, stage_types()) if (beside / "pipeline.yaml").is_file() else None
    if section.output_folder is None:
        hint = f", or prepare the whole recipe: hfpipe data prepare {shlex.quote(str(beside))}" if recipe else ""
        raise UserError(f"{what}: output_folder is missing: name a folder{hint}.")
    problems += _no_sources(section, what)
    if section.decontaminate and recipe is None:
        problems.append(
            f"{what}: decontaminate removes what a recipe holds out, and no pipeline.yaml is beside this file."
        )
    return what, section, recipe, problems


def _no_sources(section: Curation, file: str) -> list[str]:
    return [] if section.sources else [f"{file}: sources is empty: a list such as [{{path: corpus}}]."]


def _misplaced(section: Curation, folder: Path, file: str) -> Iterator[str]:
    """Sources that are not there, and an output folder that is remote or one with a source."""
    if "://" in section.output_folder:
        yield f"{file}: output_folder = {section.output_folder!r}: expected a folder of this machine."
    for number, source in enumerate(section.sources):
        try:
            with named(f"{file}: sources[{number}]"):
                if is_hub_id(source.path):
                    continue
                open_rows(source.path, "all", revision=source.revision, name=source.name)
        except UserError as error:
            yield str(error)
            continue
        if source.path.startswith("tinyworld/"):
            continue
        place, out = local_path(source.path).resolve(), folder.resolve()
        if out.is_relative_to(place) or place.is_relative_to(out):
            yield (
                f"{file}: output_folder {section.output_folder} and the source {source.path} are one in the other: the "
                "shards would be read as documents, or take their place. Name a folder beside it."
            )


def _tokenizer(section: Curation, recipe: Recipe | None, out: Path | None, file: str, quiet: bool) -> Path:
    """The folder of the tokenizer that the file names, else of the recipe's, which is brought up to date."""
    stage = next((s for s in recipe.stages.values() if s.type.leaves == "tokenizer"), None) if recipe else None
    if section.tokenizer or stage is None:
        if section.tokenizer is None:
            raise UserError(f"{file}: no tokenizer: name its folder, by `tokenizer` or --tokenizer.")
        return Path(section.tokenizer)
    run = out or Path("runs") / recipe.name
    if recipe.pipeline.curate is None:  # a file beside a recipe that does not know it: as it stands
        return run / stage.name
    alone = dataclasses.replace(recipe, stages={stage.name: stage})
    read = [*stage.data.train, *stage.data.eval, *recipe.pipeline.evaluate.text]
    if any(source.path == section.output_folder for source in read):
        raise UserError(
            f"{file}: {section.output_folder} is made with the tokenizer of `{stage.name}`, which reads it."
        )
    check_owner(recipe, run)
    check_recipe(alone)
    with contextlib.redirect_stdout(sys.stderr) if quiet else contextlib.nullcontext():
        run_recipe(alone, run, Display())
    with lock(run):
        claim(recipe, run)  # of all its stages
    return run / stage.name


def _identity(section: Curation, recipe: Recipe | None, tokenizer: Path) -> str:
    from hfpipe.training.shards import TextEncoder

    written = {**dataclasses.asdict(section), "executor": section.executor.get("tasks", TASKS), "tokenizer": None}
    content = [content_hash(s.path, revision=s.revision, name=s.name) for s in section.sources]
    held_out = hash_held_out(recipe, section.output_folder) if recipe and section.decontaminate else {}
    return artifact.digest([_VERSION, written, content, held_out, TextEncoder(tokenizer).identity])


# --- what is run ---


def _clear_other(root: Path, identity: str) -> None:
    """Keep an unfinished attempt at the same shards, and nothing else."""
    if (artifact.read_record(root / artifact.BEGUN_FILE) or {}).get("identity") != identity:
        for part in (MADE, SCRATCH):
            shutil.rmtree(root / part, ignore_errors=True)
        artifact.write_record(root / artifact.BEGUN_FILE, {"identity": identity})


def _chain(
    section: Curation, steps: list[tuple[str, Any]], executor: Any, root: Path, folder: Path, tokenizer: Path,
    identity: str,
) -> list[tuple[str, Any]]:  # fmt: skip
    """(name, executor) in order: documents and their signatures, duplicates, shards, summary."""
    from datatrove.pipeline.dedup import MinhashConfig, MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter

    from hfpipe.training import curate

    tasks, made = section.executor.get("tasks", TASKS), root / MADE
    places = ("documents", "signatures", "pairs", "removed")
    documents, signatures, pairs, removed = (str(root / SCRATCH / name) for name in places)
    first = [("sources", curate.ReadDocuments(section.sources)), *steps]
    near = section.minhash is not None
    config = MinhashConfig(**section.minhash) if near else curate.EXACT
    sign = (curate.Signatures if near else curate.ExactSignatures)(signatures, config, curate.Words())
    duplicates = "near duplicates" if near else "duplicates"
    left_out = curate.Jsonl(str(made / EXCLUDED / duplicates.replace(" ", "_")))
    shards = curate.WriteShards(str(made), str(tokenizer))
    made_by = {"identity": identity, "curation": curation_of(section)}
    finish = curate.Finish(str(root), str(folder), [name for name, _ in first], duplicates, made_by)
    listed: list[tuple[str, list[Any], int]] = [
        ("read", [*(step for _, step in first), curate.Jsonl(documents), sign], tasks),
        ("buckets", [MinhashDedupBuckets(signatures, pairs, config=config, lines_to_buffer=1000)], config.num_buckets),
        ("cluster", [MinhashDedupCluster(pairs, removed, config=config)], 1),
        ("write", [curate.ReadJsonl(documents), MinhashDedupFilter(removed, left_out), shards], tasks),
        ("summary", [finish], 1),
    ]
    chain: list[tuple[str, Any]] = []
    for name, pipeline, many in listed:
        pipeline = [curate.leave_with_parent, *pipeline]
        chain.append((name, executor(pipeline, many, root / SCRATCH / name, chain[-1][1] if chain else None)))
    return chain


def _run(chain: list[tuple[str, Any]], section: Curation, root: Path, quiet: bool) -> None:
    import multiprocess  # what datatrove starts its workers by

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a worker a core already
    local = section.executor.get("type", "local") == "local"
    multiprocess.set_forkserver_preload(["__main__", *_IMPORTED])
    try:
        with _stderr_to(root / "log.txt"):
            for name, executor in chain if local else chain[-1:]:  # others start those that they depend on themselves
                if not quiet:
                    print(f"{name} ...", flush=True)
                executor.run()
    except UserError:
        # What is at fault has to change, and the work with it; a Hub that is out of reach does not.
        if not any(is_hub_id(source.path) for source in section.sources):
            shutil.rmtree(root)
        raise


@contextlib.contextmanager
def _stderr_to(path: Path) -> Iterator[None]:
    """What datatrove logs goes to a file: its workers write to the same descriptor."""
    kept = os.dup(2)
    with path.open("a") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _told(done: dict[str, Any]) -> list[str]:
    lines = [f"{done['documents']:,} documents read" + (f", {done['masked']:,} masked" if done["masked"] else "")]
    for item in done["left_out"]:
        reasons = ", ".join(
            f"{count:,} {reason}" for reason, count in sorted(item["reasons"].items(), key=lambda r: -r[1])
        )
        lines.append(f"{item['step']:<24}{item['documents']:>10,} left out{f': {reasons}' if reasons else ''}")
    for split, kept in done["splits"].items():
        lines.append(f"{split:<24}{kept['documents']:>10,} documents, {quantity(kept['tokens'])} tokens")
    return lines
