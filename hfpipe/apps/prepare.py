"""`hfpipe data prepare`: corpora -> filtered, deduplicated, tokenised shards, by datatrove, as one YAML file says."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hfpipe import artifact, upstream
from hfpipe.config import load_recipe
from hfpipe.data.sources import content_hash, is_hub_id, local_path, named, open_rows
from hfpipe.errors import ConfigErrors, UserError, nearest
from hfpipe.progress import quantity
from hfpipe.run_folder import lock
from hfpipe.sections import Curation, Recipe
from hfpipe.stages import stage_types
from hfpipe.strict import build
from hfpipe.training.identity import hash_held_out
from hfpipe.training.shards import EXCLUDED, MADE, SCRATCH, SUMMARY_FILE
from hfpipe.yaml_files import load_yaml

_FILTERS = ("GopherQualityFilter", "GopherRepetitionFilter", "C4QualityFilter", "FineWebQualityFilter")
_EXECUTORS = {"local": "LocalPipelineExecutor", "slurm": "SlurmPipelineExecutor", "ray": "RayPipelineExecutor"}
_MANAGED = (
    "exclusion_writer", "language", "pipeline", "logging_dir", "depends", "skip_completed", "local_tasks",
    "local_rank_offset", "norm_config", "hash_config",
)  # fmt: skip
_IMPORTED = ("hfpipe.training.curate", "hfpipe.training.gopher", "tokenizers", "py3langid.langid")  # by all workers
_TASKS = 8
_VERSION = 2  # raise when the same inputs come to give other shards


def prepare_data(file: Path, tokenizer: Path | None, as_json: bool = False) -> None:
    """Prepare what `file` describes, or go on where it was stopped; print what was left out, and why.

    Raises:
        UserError: the file, a source or the tokenizer is at fault, or datatrove is not installed.
    """
    try:
        from datatrove.pipeline.dedup import MinhashConfig
    except ImportError:
        raise UserError('data prepare needs datatrove: pip install -c constraints.txt "hfpipe[curate]".') from None
    section, recipe, problems = _read(file)
    folder = Path(section.output_folder).expanduser().absolute()
    root = folder.with_name(f"{folder.name}.partial")
    problems += _misplaced(section, folder, str(file))
    steps = _steps(section, recipe, root, str(file), problems)
    if section.minhash is not None:
        _built(MinhashConfig, section.minhash, {}, f"{file}: minhash", problems)
    executor = _executor(section, str(file), problems)
    if problems:
        raise ConfigErrors(problems)
    vocabulary = _tokenizer(section, recipe, tokenizer, str(file))
    with named(str(file)):
        identity = _identity(section, recipe, vocabulary)
        if folder.exists() and artifact.read_record(folder / SUMMARY_FILE) is None:
            raise UserError(f"output_folder {folder} holds something else. Name a folder that is not there yet.")
    with lock(root), named(str(file)):
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


def _read(file: Path) -> tuple[Curation, Recipe | None, list[str]]:
    problems: list[str] = []
    section = build(Curation, load_yaml(file), f"{file}: ", problems)
    if section is None:
        raise ConfigErrors(problems)
    recipe = load_recipe(file.parent, stage_types()) if (file.parent / "pipeline.yaml").is_file() else None
    if not section.sources:
        problems.append(f"{file}: sources is empty: a list such as [{{path: corpus}}].")
    if section.decontaminate and recipe is None:
        problems.append(
            f"{file}: decontaminate removes what a recipe holds out, and no pipeline.yaml is beside this file."
        )
    return section, recipe, problems


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


def _steps(
    section: Curation, recipe: Recipe | None, root: Path, file: str, problems: list[str]
) -> list[tuple[str, Any]]:
    """(name, step) of all that is done to a document alone, in order."""
    import datatrove.pipeline.filters as filters

    from hfpipe.training import curate
    from hfpipe.training.gopher import GopherQualityFilter, GopherRepetitionFilter

    excluded = root / MADE / EXCLUDED
    known = {name: getattr(filters, name) for name in _FILTERS}
    known |= {cls.__name__: cls for cls in (GopherQualityFilter, GopherRepetitionFilter, curate.LanguageFilter)}
    steps: list[tuple[str, Any]] = [("mask_personal", curate.MaskPersonal())] if section.mask_personal else []
    for number, given in enumerate(section.filters):
        where, name = f"{file}: filters[{number}]", str(given.get("type"))
        if name not in known:
            problems.append(f"{where}.type = {name!r}: expected one of {', '.join(known)}.{nearest(name, known)}")
            continue
        writer = curate.Jsonl(str(excluded / f"{number}-{name}"))
        words = {"language": curate.Words()} if name in _FILTERS else {}
        rest = {key: value for key, value in given.items() if key != "type"}
        built = _built(known[name], rest, {"exclusion_writer": writer, **words}, where, problems)
        steps.append((name, built))
    if section.decontaminate and recipe:
        writer = curate.Jsonl(str(excluded / "decontaminate"))
        steps.append(("decontaminate", curate.Decontaminate(recipe, section.output_folder, writer)))
    return steps


def _built(cls: type, given: dict[str, Any], ours: dict[str, Any], where: str, problems: list[str]) -> Any:
    """An upstream object from a section, its fields checked; None with the reasons added to `problems`."""
    known = {name: field for name, field in upstream.arguments(cls).items() if name not in _MANAGED}
    found = upstream.check(given, known, f"datatrove's {cls.__name__}", where)
    found += [
        f"{where}.{key} = {value!r}: expected a list of {of}."
        for key, value in given.items()
        if isinstance(value, list) and key in known and (of := _strangers(value, known[key].annotation))
    ]
    problems += found
    if found:
        return None
    tuples = {key: tuple(v) for key, v in given.items() if isinstance(v, list) and "tuple" in known[key].annotation}
    try:
        return cls(**{**given, **tuples, **ours})
    except (TypeError, ValueError) as error:
        problems.append(f"{where} is refused by datatrove's {cls.__name__}: {error}")


def _strangers(given: list[Any], annotation: str) -> str | None:
    """What a list's items were expected to be, where one of them is something else."""
    if "tuple[tuple[" in annotation:
        pairs = all(isinstance(one, list) and [type(x) for x in one] in ([int, float], [int, int]) for one in given)
        return None if pairs else "pairs of a length and a share, such as [[2, 0.2], [3, 0.18]]"
    return None if all(isinstance(one, str) for one in given) else "texts"


def _executor(section: Curation, file: str, problems: list[str]) -> Any:
    """A function: pipeline, number of tasks, folder of its logs, the executor before it -> datatrove's executor."""
    import datatrove.executor as executors

    kind = str(section.executor.get("type", "local"))
    if kind not in _EXECUTORS:
        problems.append(f"{file}: executor.type = {kind!r}: expected one of {', '.join(_EXECUTORS)}.")
        return None
    cls = getattr(executors, _EXECUTORS[kind])
    given = {key: value for key, value in section.executor.items() if key not in ("type", "tasks")}
    known = {name: field for name, field in upstream.arguments(cls).items() if name not in _MANAGED}
    checked = {**given, "tasks": section.executor.get("tasks", _TASKS)}
    problems += upstream.check(checked, known, f"datatrove's {_EXECUTORS[kind]}", f"{file}: executor")
    workers, methods = given.get("workers", 1), multiprocessing.get_all_start_methods()
    if isinstance(workers, int) and (workers == 0 or workers < -1):
        problems.append(f"{file}: executor.workers = {workers}: expected 1 or more, or -1 for as many as tasks.")
    if given.get("start_method", methods[0]) not in methods:
        problems.append(
            f"{file}: executor.start_method = {given['start_method']!r}: expected one of {', '.join(methods)}."
        )
    needed = {p.name for p in inspect.signature(cls).parameters.values() if p.default is p.empty}
    missing = sorted(needed - checked.keys() - {"pipeline"})
    problems += [f"{file}: executor.{name} is missing, which {kind} needs." for name in missing]
    if kind == "local":
        given.setdefault("workers", os.cpu_count())

    def make(pipeline: list[Any], tasks: int, logs: Path, before: Any) -> Any:
        alone = {"workers": 1} if kind == "local" and tasks == 1 else {}  # in this process: none is started for it
        return cls(pipeline, tasks=tasks, logging_dir=str(logs), depends=before, **given | alone)

    return make


def _tokenizer(section: Curation, recipe: Recipe | None, given: Path | None, file: str) -> Path:
    made = next((s.name for s in recipe.stages.values() if s.type.leaves == "tokenizer"), None) if recipe else None
    folder = given or section.tokenizer or (Path("runs") / recipe.name / made if recipe and made else None)
    if folder is None:
        raise UserError(f"{file}: no tokenizer: name its folder, by `tokenizer` or --tokenizer.")
    return Path(folder).expanduser().absolute()


def _identity(section: Curation, recipe: Recipe | None, tokenizer: Path) -> str:
    from hfpipe.training.shards import TextEncoder

    written = {**dataclasses.asdict(section), "executor": section.executor.get("tasks", _TASKS), "tokenizer": None}
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

    tasks, made = section.executor.get("tasks", _TASKS), root / MADE
    places = ("documents", "signatures", "pairs", "removed")
    documents, signatures, pairs, removed = (str(root / SCRATCH / name) for name in places)
    first = [("sources", curate.ReadDocuments(section.sources)), *steps]
    near = section.minhash is not None
    config = MinhashConfig(**section.minhash) if near else curate.EXACT
    sign = (curate.Signatures if near else curate.ExactSignatures)(signatures, config, curate.Words())
    duplicates = "near duplicates" if near else "duplicates"
    left_out = curate.Jsonl(str(made / EXCLUDED / duplicates.replace(" ", "_")))
    shards = curate.WriteShards(str(made), str(tokenizer))
    finish = curate.Finish(str(root), str(folder), [name for name, _ in first], duplicates, identity)
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
