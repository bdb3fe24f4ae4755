"""datatrove's filters and executors, made from the sections of a curation; what is wrong in them is told, all of it."""

from __future__ import annotations

import inspect
import multiprocessing
import os
from pathlib import Path
from typing import Any

from hfpipe import upstream
from hfpipe.errors import nearest
from hfpipe.sections import Curation, Recipe
from hfpipe.training.shards import EXCLUDED, MADE

TASKS = 8  # where the executor names no number of them
_FILTERS = ("GopherQualityFilter", "GopherRepetitionFilter", "C4QualityFilter", "FineWebQualityFilter")
_EXECUTORS = {"local": "LocalPipelineExecutor", "slurm": "SlurmPipelineExecutor", "ray": "RayPipelineExecutor"}
_MANAGED = (
    "exclusion_writer", "language", "pipeline", "logging_dir", "depends", "skip_completed", "local_tasks",
    "local_rank_offset", "norm_config", "hash_config",
)  # fmt: skip


def build_steps(
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
        built = build_upstream(known[name], rest, {"exclusion_writer": writer, **words}, where, problems)
        steps.append((name, built))
    if section.decontaminate and recipe:
        writer = curate.Jsonl(str(excluded / "decontaminate"))
        steps.append(("decontaminate", curate.Decontaminate(recipe, section.output_folder, writer)))
    return steps


def build_upstream(cls: type, given: dict[str, Any], ours: dict[str, Any], where: str, problems: list[str]) -> Any:
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


def choose_executor(section: Curation, file: str, problems: list[str]) -> Any:
    """A function: pipeline, number of tasks, folder of its logs, the executor before it -> datatrove's executor."""
    import datatrove.executor as executors

    kind = str(section.executor.get("type", "local"))
    if kind not in _EXECUTORS:
        problems.append(f"{file}: executor.type = {kind!r}: expected one of {', '.join(_EXECUTORS)}.")
        return None
    cls = getattr(executors, _EXECUTORS[kind])
    given = {key: value for key, value in section.executor.items() if key not in ("type", "tasks")}
    known = {name: field for name, field in upstream.arguments(cls).items() if name not in _MANAGED}
    checked = {**given, "tasks": section.executor.get("tasks", TASKS)}
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
