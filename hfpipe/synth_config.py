"""The synth sections of a recipe: rows that are made from others by a teacher, checked before anything is asked.

`synth: synth.yaml` in pipeline.yaml names a file of sections; a stage reads the rows of one as `path: synth/NAME`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from hfpipe.errors import nearest
from hfpipe.graph import looks_like_hub_id
from hfpipe.sections import Source, Stage, above, at_least
from hfpipe.strict import build

PREFIX = "synth/"
CHECKERS = ("calculator", "code")  # of hfpipe.synthesis.verify, beside the checks of hfpipe.evaluation.checks


@dataclass(frozen=True)
class Asked:
    """Who answers or judges: a stage of the recipe, a folder, a Hub id, or a model behind an OpenAI-compatible endpoint."""

    model: str | None = None  # with an endpoint: the name it knows the model by
    endpoint: str | None = None  # http://localhost:8000/v1; its key is read from OPENAI_API_KEY
    concurrency: int = at_least(1, 4)  # requests to the endpoint at one time
    input_price: float = at_least(0, 0.0)  # dollars for a million tokens read
    output_price: float = at_least(0, 0.0)  # and written


@dataclass(frozen=True)
class Judge(Asked):
    threshold: float | None = None  # a row is kept from this score on: a reward, or an endpoint's grade from 1 to 10


@dataclass(frozen=True)
class Verify:
    """One check that every kept answer passes."""

    check: str  # calculator, code, json_schema, number ...
    value: Any = None  # None: from the row's own answer; of code its column `tests`, of json_schema `schema`
    isolated: bool = True  # of code: false runs it with limits alone where the system gives no namespaces


@dataclass(frozen=True)
class Synth:
    method: Literal["distil", "backtranslate", "verified", "judged"]
    teacher: Asked
    prompts: Source  # whose prompts are asked; of backtranslate: whose answers
    instruction: str | None = None  # to the teacher, before each prompt; of backtranslate with {answer} in it
    samples: int = at_least(1, 1)  # answers drawn for each prompt
    temperature: float = at_least(0, 1.0)  # 0: greedy
    top_p: float = above(0, 1.0, at_most=1)
    max_new_tokens: int = at_least(1, 256)
    verify: tuple[Verify, ...] = ()
    judge: Judge | None = None
    keep: Literal["all", "first", "best"] = "all"  # of a prompt's good answers; best: by the judge's score
    near_duplicates: bool = False  # keep rows that are nearly like an earlier one
    seed: int = at_least(0, 0)


def read_synth(raw: Any, where: str, listed: list[str], stages: dict[str, Stage], problems: list[str]) -> dict:
    """The sections by name. `where` begins a message; teachers and judges are looked for among `stages`."""
    found = {}
    for name, section in (raw or {}).items():
        place = f"{where}{name}."
        if not isinstance(section, dict) or not str(name).replace("_", "").replace("-", "").isalnum():
            problems.append(f"{where}{name} = {section!r}: expected a name and a mapping with keys of its own.")
        elif (built := build(Synth, section, place, problems)) is not None:
            problems += (place + problem for problem in _faults(built, listed, stages))
            found[name] = built
    return found


def _faults(synth: Synth, listed: list[str], stages: dict[str, Stage]) -> Iterator[str]:
    for key, asked, leaves in (("teacher", synth.teacher, "model"), ("judge", synth.judge, "reward_model")):
        if asked is None:
            continue
        model, stage = asked.model, stages.get(asked.model or "")
        if asked.endpoint and not asked.endpoint.startswith(("http://", "https://")):
            yield f"{key}.endpoint = {asked.endpoint!r}: expected a URL, such as http://localhost:8000/v1."
        elif asked.endpoint and not _is_url(asked.endpoint):
            yield f"{key}.endpoint = {asked.endpoint!r} is no URL with a host and a port, such as http://localhost:8000/v1."
        elif asked.endpoint and not model:
            yield f"{key}.model is missing: the name that the endpoint knows its model by."
        elif asked.endpoint:
            continue
        elif model is None:
            yield f"{key} names nobody: give `model`, or `endpoint` and `model`."
        elif stage and stage.type.leaves != leaves:
            yield f"{key}.model = {model!r}: `{model}` leaves a {stage.type.leaves}, not a {leaves}."
        elif not stage and not Path(model).expanduser().exists() and not looks_like_hub_id(model):
            yield (
                f"{key}.model = {model!r} is neither a stage of this recipe ({', '.join(listed)}), nor a folder that "
                f"exists, nor a Hub id (org/name).{nearest(model, listed)}"
            )
    if synth.method == "verified" and not synth.verify:
        yield "verify is missing: method verified keeps what passes checks, such as [{check: number}]."
    if synth.method == "judged" and synth.judge is None:
        yield "judge is missing: method judged keeps what a judge scores at its threshold or above."
    if synth.method == "judged" and synth.judge and synth.judge.threshold is None:
        yield "judge.threshold is missing: the score, or the endpoint's grade from 1 to 10, from which an answer is kept."
    if synth.keep == "best" and synth.judge is None:
        yield "keep = 'best' needs a judge; checks alone say only right or wrong: keep first or all."
    if synth.method == "backtranslate" and synth.instruction and "{answer}" not in synth.instruction:
        yield "instruction has no {answer} in it: the place for the text whose question is wanted."
    if synth.temperature == 0 and synth.samples > 1:
        yield f"samples = {synth.samples} at temperature 0 are the same answer {synth.samples} times."
    if synth.prompts.path.startswith(PREFIX):
        yield f"prompts.path = {synth.prompts.path!r}: rows that were made are not made anew; name their source."


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return bool(parts.hostname) and (parts.port or 1) > 0 and not re.search(r"\s", text)
    except ValueError:
        return False


def place_synth(stages: dict[str, Stage], synths: dict[str, Synth], run: Path, problems: list[str]) -> dict[str, Stage]:
    """The stages, each source `synth/NAME` of theirs as the file in the run's folder that holds its rows."""
    placed, before = {}, set()
    if synths and "synth" in stages:
        problems.append(
            f"{stages['synth'].file}: a stage named `synth` beside synth sections: both write to {run}/synth."
        )
    for name, stage in stages.items():
        train = tuple(_placed(source, run) for source in stage.data.train)
        if train != stage.data.train:
            data = dataclasses.replace(stage.data, train=train)
            placed[name] = dataclasses.replace(stage, sections={**stage.sections, "data": data})
        for source in (*stage.data.train, *stage.data.eval):
            if not source.path.startswith(PREFIX):
                continue
            section, where = source.path.removeprefix(PREFIX), f"{stage.file}: data: {source.path}"
            if section not in synths:
                problems.append(f"{where}: the recipe has no synth section `{section}`.{nearest(section, synths)}")
            elif source in stage.data.eval:
                problems.append(f"{where} under `eval`: what a model made measures no model. Name rows of people.")
            elif late := [s for s in made_by(synths[section]) if s in stages and s not in before]:
                problems.append(f"{where} is made by `{late[0]}`, which does not come before `{name}` in `stages`.")
        before.add(name)
    return {**stages, **placed}


def _placed(source: Source, run: Path) -> Source:
    if not source.path.startswith(PREFIX):
        return source
    return dataclasses.replace(
        source, path=str(file_of(run, source.path.removeprefix(PREFIX))), split=source.split or "all"
    )


def made_by(synth: Synth) -> list[str]:
    """What the teacher and the judge are called, endpoints left out."""
    return [a.model for a in (synth.teacher, synth.judge) if a and a.model and not a.endpoint]


def file_of(run: Path, name: str) -> Path:
    """The file of a section's rows; `NAME.rejected.parquet` and `NAME.json` stand beside it."""
    return run / "synth" / f"{name}.parquet"


def section_of(path: str, synths: dict[str, Synth]) -> str | None:
    """The section that makes the file at `path`, if one does."""
    file = Path(path)
    return file.stem if file.suffix == ".parquet" and file.parent.name == "synth" and file.stem in synths else None
