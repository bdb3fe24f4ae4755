"""What stages start from and are steered by: earlier stages of the recipe, folders, Hub ids; no cycles."""

from __future__ import annotations

import re
from pathlib import Path

from hfpipe import rope
from hfpipe.adapter_types import check_lineage, is_merged, model_type_of
from hfpipe.annealing import check_parent
from hfpipe.errors import nearest
from hfpipe.sections import Stage


def check_graph(listed: list[str], stages: dict[str, Stage], problems: list[str]) -> None:
    """`model.from` names an earlier stage that leaves what this one needs, a folder, or a Hub id; no cycles."""
    for name, stage in stages.items():
        if "model" not in stage.sections:
            continue
        _check_guide(listed, name, stages, problems)
        alone = stage.adapter is not None and not is_merged(stage.adapter)
        told = [*check_lineage(stages, stage), *check_parent(stages, stage)]
        told += rope.problems(stage.model, model_type_of(stages, stage), alone)
        problems += (f"{stage.file}: {problem}" for problem in told)
        source, where = stage.model.from_, f"{stage.file}: model.from = {stage.model.from_!r}"
        if source is None:
            if stage.type.parents:
                needs = " or a ".join(stage.type.parents)
                problems.append(
                    f"{stage.file}: model.from is missing: a {stage.type.name} stage starts from a {needs}."
                )
        elif source in stages:
            parent = stages[source]
            chain = _chain(name, stages)
            if chain[-1] in chain[:-1]:
                problems.append(f"{where}: the stages form a cycle: {' -> '.join(chain)}.")
            elif parent.type.leaves not in stage.type.parents:
                needs = " or a ".join(stage.type.parents) or "nothing"
                problems.append(
                    f"{where}: `{source}` leaves a {parent.type.leaves}, but a {stage.type.name} stage needs a {needs}."
                )
            elif parent.type.leaves == "tokenizer" and not stage.model.config:
                problems.append(
                    f"{stage.file}: model.config is missing: `{source}` leaves a tokenizer, so the model is made from scratch. "
                    "Give model_type and that configuration's fields."
                )
            elif parent.type.leaves == "model" and stage.model.config:
                problems.append(
                    f"{stage.file}: model.config makes a model from scratch, but `{source}` leaves one to go on from. "
                    "Remove model.config, or start from a tokenizer stage."
                )
            elif listed.index(source) > listed.index(name):
                problems.append(f"{where}: `{source}` comes after `{name}` in pipeline.yaml's stages; put it before.")
        else:
            problems += unknown_source(f"{stage.file}: model.from", source, listed)


def unknown_source(where: str, source: str, listed: list[str]) -> list[str]:
    """What is wrong with a name that is no stage's, no folder's and no Hub id; of a listed stage its own fault is told."""
    if source in listed or Path(source).expanduser().exists() or looks_like_hub_id(source):
        return []
    return [
        f"{where} = {source!r} is neither a stage of this recipe ({', '.join(listed)}), nor a folder that exists, "
        f"nor a Hub id (org/name).{nearest(source, listed)}"
    ]


def _check_guide(listed: list[str], name: str, stages: dict[str, Stage], problems: list[str]) -> None:
    """`rewards.model` names an earlier reward stage, a teacher an earlier model, or a folder, or a Hub id."""
    stage = stages[name]
    if stage.guide is None or (stage.guide[1] in listed and stage.guide[1] not in stages):
        return
    key, source, leaves = stage.guide
    where = f"{stage.file}: {key} = {source!r}"
    if source in stages:
        if stages[source].type.leaves != leaves:
            wanted = leaves.replace("_", " ")
            problems.append(f"{where}: `{source}` leaves a {stages[source].type.leaves}, not a {wanted}.")
        elif listed.index(source) > listed.index(name):
            problems.append(f"{where}: `{source}` comes after `{name}` in pipeline.yaml's stages; put it before.")
    else:
        problems += unknown_source(f"{stage.file}: {key}", source, listed)


def _chain(name: str, stages: dict[str, Stage]) -> list[str]:
    """`name`, its parent, its parent's parent ... until the root or the first repetition."""
    chain = [name]
    while True:
        stage = stages[chain[-1]]
        source = stage.model.from_
        if source not in stages:
            return chain
        chain.append(source)
        if chain.count(source) > 1:
            return chain


def looks_like_hub_id(source: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", source) is not None and not source.startswith((".", "~", "/"))
