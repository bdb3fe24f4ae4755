"""Recipes: YAML files -> frozen, checked configuration; all faults of all stages told at once, before anything loads."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hfpipe import upstream
from hfpipe.adapter_types import apply_preset, read_adapter
from hfpipe.contradictions import contradictions, needle, sharded, split_batch
from hfpipe.errors import ConfigErrors, UserError, nearest
from hfpipe.graph import check_graph, unknown_source
from hfpipe.model_config import model_faults
from hfpipe.paths import place_fault, stage_configs_dir
from hfpipe.sections import SHARDS, Curation, Evaluate, Pipeline, Recipe, Stage, StageType
from hfpipe.strict import build
from hfpipe.synth_config import place_synth, read_synth
from hfpipe.yaml_files import load_yaml, parse_value

# Set by hfpipe in every stage: a recipe that gives one is told why not.
_MANAGED = {
    "output_dir": "hfpipe writes to the run's folder (--out)",
    "do_train": "the stage decides",
    "do_eval": "the stage decides",
    "do_predict": "the stage decides",
    "resume_from_checkpoint": "a stage goes on from its own last checkpoint by itself",
    "push_to_hub": "publishing is not a trainer's work here",
    "hub_model_id": "publishing is not a trainer's work here",
    "hub_token": "a token never goes into a file; use HF_TOKEN or `hf auth login`",
    "hub_strategy": "publishing is not a trainer's work here",
    "hub_private_repo": "publishing is not a trainer's work here",
    "hub_always_push": "publishing is not a trainer's work here",
    "hub_revision": "publishing is not a trainer's work here",
    "remove_unused_columns": "rows are prepared before training",
    "label_names": "rows are prepared before training",
    "seed": "set `seed` in pipeline.yaml",
    "disable_tqdm": "progress is one line of hfpipe's own",
    "parallelism_config": "it takes an object of accelerate's, which no YAML gives; see launch.accelerate_config",
}

_NO_ADAPTER = {
    "model": "what is made from scratch is trained whole. For more text on a finished model take a midtrain stage whose "
    "sources have `as: text`.",
    "tokenizer": "it trains no model.",
}


def recipe_folder(name: str) -> Path:
    """The folder of a shipped recipe or of a path; UserError names the recipes there are."""
    if fault := place_fault(name):
        raise UserError(f"No recipe `{name[:80]}`: {fault}. The shipped ones: {', '.join(shipped_recipes())}.")
    for folder in (Path(name), stage_configs_dir() / name):
        if (folder / "pipeline.yaml").is_file():
            return folder
    known = shipped_recipes()
    if Path(name).suffix == ".yaml" and (Path(name).parent / "pipeline.yaml").is_file():
        raise UserError(f"{name} is a file of the recipe {Path(name).parent}: give that folder.")
    if Path(name).is_dir():
        raise UserError(f"{name} has no pipeline.yaml, so it is not a recipe. See `hfpipe list` for the shipped ones.")
    raise UserError(f"No recipe `{name}`: neither a folder nor one of {', '.join(known)}.{nearest(name, known)}")


def shipped_recipes() -> list[str]:
    return sorted(p.parent.name for p in stage_configs_dir().glob("*/pipeline.yaml"))


def load_recipe(
    name: str | Path, stage_types: dict[str, StageType], overrides: Sequence[str] = (), run: Path | None = None
) -> Recipe:
    """Read, override and check a whole recipe.

    Args:
        name: a shipped recipe's name or a folder with `pipeline.yaml`.
        overrides: `stage.section.key=value`, `settings_name=value` or `launch.processes=2`.
        run: the run's folder, which holds synthetic rows; default: runs/RECIPE.

    Raises:
        ConfigErrors: every problem found, one line each.
    """
    folder = recipe_folder(str(name))
    head_file = folder / "pipeline.yaml"
    problems: list[str] = []
    head_raw = load_yaml(head_file)
    listed = _listed_stages(head_raw, head_file, problems)
    files = {s: folder / f"{s}.yaml" for s in listed}
    raws: dict[str, dict] = {}
    for stage, file in files.items():
        if file.is_file():
            try:
                raws[stage] = load_yaml(file)
            except UserError as error:
                problems.append(str(error))
        else:
            there = [p.stem for p in folder.glob("*.yaml") if p.stem != "pipeline"]
            problems.append(f"{head_file}: stages names `{stage}`, but {file} does not exist.{nearest(stage, there)}")
    _read_files(head_raw, folder, problems)
    for text in overrides:
        problems += _override(text, head_raw, raws, set(listed))
        _read_files(head_raw, folder, problems)
    pipeline = build(Pipeline, head_raw, f"{head_file}: ", problems)
    if pipeline is None:  # refused in the end; what is right in it is held to the rest all the same
        needed = {"name": "recipe", "stages": listed}
        sound = {key: value for key, value in head_raw.items() if build(Pipeline, needed | {key: value}, "", [])}
        head_raw = needed | sound
        pipeline = build(Pipeline, head_raw, "", [])
    settings = head_raw.get("settings") if isinstance(head_raw.get("settings"), dict) else {}
    run = run or Path("runs") / pipeline.name
    curation, settings = _curation(head_raw.get("curate"), settings, run, f"{head_file}: curate.", problems)
    stages = {}
    for stage, raw in raws.items():
        raw = _fill_settings(raw, settings, f"{files[stage]}: ", problems)
        built = _stage(stage, files[stage], raw, stage_types, listed, problems)
        if built:
            stages[stage] = built
    stages = {name: apply_preset(stages, stage) for name, stage in stages.items()}
    assert pipeline is not None
    if not re.fullmatch(r"[\w.-]+", pipeline.name):
        problems.append(
            f"{head_file}: name = {pipeline.name!r}: expected letters, digits, `.`, `_` and `-`: it names a folder."
        )
    filled = _fill_settings(head_raw.get("evaluate") or {}, settings, f"{head_file}: evaluate.", problems)
    evaluate = build(Evaluate, filled, f"{head_file}: evaluate.", [])
    filled = _fill_settings(head_raw.get("synth") or {}, settings, f"{head_file}: synth.", problems)
    synths = read_synth(filled, f"{head_file}: synth.", listed, stages, problems)
    stages = place_synth(stages, synths, run, problems)
    pipeline = dataclasses.replace(pipeline, evaluate=evaluate or Evaluate(), synth=synths, curate=curation)
    problems += (f"{head_file}: evaluate.needle: {problem}" for problem in needle(pipeline.evaluate))
    problems += _check_launch(pipeline, head_file)
    repo_id = pipeline.hub.repo_id
    if repo_id is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repo_id):
        problems.append(f"{head_file}: hub.repo_id = {repo_id!r}: expected NAMESPACE/NAME, such as me/{pipeline.name}.")
    distributed_type = _distributed_type(pipeline)
    for stage in stages.values():
        problems += split_batch(stage, pipeline.launch.processes or 1)
        problems += sharded(stage, distributed_type)
    check_graph(listed, stages, problems)
    if problems:
        raise ConfigErrors(list(dict.fromkeys(problems)))
    return Recipe(pipeline.name, folder, pipeline, stages, tuple(overrides))


def _curation(
    raw: Any, settings: dict, run: Path, where: str, problems: list[str]
) -> tuple[Curation | None, dict[str, Any]]:
    """What `hfpipe data prepare` makes for the recipe, and the settings with `{shards}`, its place."""
    if not isinstance(raw, dict) or not raw:
        return None, settings
    built = build(Curation, _fill_settings(raw, settings, where, problems), where, problems)
    folder = (built and built.output_folder) or str(run / SHARDS)
    curation = dataclasses.replace(built, output_folder=folder) if built else None
    return curation, {**settings, "shards": folder}


def _listed_stages(head: dict[str, Any], file: Path, problems: list[str]) -> list[str]:
    listed = head.get("stages")
    if not isinstance(listed, list) or not listed or not all(isinstance(s, str) for s in listed):
        problems.append(f"{file}: stages = {listed!r}: expected a list of stage names, such as [tokenizer, pretrain].")
        head["stages"] = []
        return []
    twice = sorted({s for s in listed if listed.count(s) > 1})
    if twice:
        problems.append(f"{file}: stages lists {', '.join(twice)} more than once; copy the file under another name.")
    return list(dict.fromkeys(listed))


def _read_files(head: dict[str, Any], folder: Path, problems: list[str]) -> None:
    """`evaluate: probes.yaml` stands for the mapping in that file of the recipe, and so do `synth` and `curate`."""
    for key in ("evaluate", "synth", "curate"):
        if isinstance(head.get(key), str):
            try:
                head[key] = load_yaml(folder / head[key])
            except UserError as error:
                problems.append(f"{folder / 'pipeline.yaml'}: {key}: {error}")
                head[key] = {}


def _check_launch(pipeline: Pipeline, file: Path) -> list[str]:
    name, shipped = pipeline.launch.accelerate_config, upstream.accelerate_configs()
    if name and (fault := place_fault(name)):
        return [f"{file}: launch.accelerate_config = {name[:80]!r} cannot be looked up: {fault}."]
    if name is None or name in shipped or Path(name).is_file():
        return []
    known = ", ".join(sorted(shipped))
    told = f"{file}: launch.accelerate_config = {name!r} is neither a file nor one of {known}."
    return [told + nearest(name, shipped)]


def _distributed_type(pipeline: Pipeline) -> str | None:
    """What the recipe's accelerate configuration makes of several processes: MULTI_GPU, FSDP, DEEPSPEED ..."""
    name = pipeline.launch.accelerate_config
    file = upstream.accelerate_configs().get(name or "", Path(name or ""))
    return load_yaml(file).get("distributed_type") if not place_fault(str(file)) and file.is_file() else None


def _override(text: str, head: dict, raws: dict[str, dict], listed: set[str]) -> list[str]:
    key, equals, right = text.partition("=")
    if not equals:
        return [f"--set {text}: expected stage.section.key=value."]
    parts = key.strip().split(".")
    if parts[0] == "stages":
        return [f"--set {text}: the stages are the recipe's own; select among them with --from, --to and --only."]
    try:
        value = parse_value(right)
    except UserError as error:
        return [str(error)]
    if parts[0] in raws and len(parts) == 1:
        return [
            f"--set {text}: `{parts[0]}` is a whole stage; name a key of it, such as {parts[0]}.trainer.learning_rate."
        ]
    if parts[0] in raws:
        target, path = raws[parts[0]], parts[1:]
    elif len(parts) == 1 and parts[0] in (head.get("settings") or {}):
        target, path = head["settings"], parts
    elif parts[0] in {f.name for f in dataclasses.fields(Pipeline)}:
        target, path = head, parts
    else:
        if parts[0] in listed:
            return []  # its file is missing or unreadable, which is told already
        known = [*raws, *(head.get("settings") or {}), *(f.name for f in dataclasses.fields(Pipeline))]
        return [
            f"--set {text}: `{parts[0]}` is neither a stage nor a setting of this recipe.{nearest(parts[0], known)}"
        ]
    for part in path[:-1]:
        if target.get(part) is None:
            target[part] = {}
        target = target[part]
        if not isinstance(target, dict):
            return [f"--set {text}: `{part}` is {type(target).__name__}, not a section with keys of its own."]
    target[path[-1]] = value
    return []


SETTING = re.compile(r"\{([a-z_][a-z0-9_]*)\}")


def _fill_settings(value: Any, settings: dict, where: str, problems: list[str]) -> Any:
    """Replace `{name}` in every `path` and `from` by the recipe's setting."""
    if isinstance(value, list):
        return [_fill_settings(v, settings, f"{where[:-1]}[{i}].", problems) for i, v in enumerate(value)]
    if not isinstance(value, dict):
        return value
    filled = {}
    for key, item in value.items():
        if key in ("path", "from") and isinstance(item, str):
            for name in SETTING.findall(item):
                if settings.get(name) is None:
                    needs = f"needs the setting `{name}`"
                    if name in settings and any(needs in problem for problem in problems):
                        continue  # one value is missing, however often it is named
                    example = f"--set {name}=VALUE" if name in settings else "add it to `settings` in pipeline.yaml"
                    problems.append(f"{where}{key} = {item!r} {needs}: {example}.")
                else:
                    item = item.replace(f"{{{name}}}", str(settings[name]))
            if fault := place_fault(item):
                problems.append(f"{where}{key} = {item[:80]!r} cannot be looked up: {fault}.")
                item = "."  # for the checks that follow
            filled[key] = item
        else:
            filled[key] = _fill_settings(item, settings, f"{where}{key}.", problems)
    return filled


def _stage(
    name: str, file: Path, raw: dict, stage_types: dict[str, StageType], listed: list[str], problems: list[str]
) -> Stage | None:
    where = f"{file}: "
    type_name = raw.get("stage")
    if not isinstance(type_name, str) or type_name not in stage_types:
        expected = ", ".join(stage_types)
        problems.append(f"{where}stage = {type_name!r}: expected one of {expected}.{nearest(type_name, stage_types)}")
        return None
    kind = stage_types[type_name]
    known = {"stage", *kind.sections, *(["trainer"] if kind.trainer else []), *(["adapter"] if kind.adapter else [])}
    for key in raw:
        if key == "adapter" and not kind.adapter:
            problems.append(f"{where}adapter has no place in a {type_name} stage: {_NO_ADAPTER[kind.leaves]}")
        elif key not in known:
            problems.append(f"{where}{key} is not a section of a {type_name} stage.{nearest(key, known)}")
    sections = {}
    for key, section_type in kind.sections.items():
        value = raw.get(key)
        if value is not None and not isinstance(value, dict):
            problems.append(f"{where}{key} = {value!r}: expected a mapping.")
            sections[key] = None
        else:
            sections[key] = build(section_type, value or {}, f"{where}{key}.", problems)
    trainer = _upstream_section(raw.get("trainer"), f"{where}trainer", problems)
    if kind.trainer:
        owner = kind.trainer
        managed = {**_MANAGED, **kind.managed}
        for key in [k for k in trainer if k in managed]:
            problems.append(f"{where}trainer.{key} is not the recipe's to set: {managed[key]}.")
        given = {k: v for k, v in trainer.items() if k not in managed}
        if "max_length" in given and given["max_length"] is None:
            problems.append(
                f"{where}trainer.max_length is null: give a number of tokens; nothing is cut silently here."
            )
        problems += upstream.check(given, upstream.fields(owner.split(".")[-1]), owner, f"{where}trainer")
        if "report_to" in given:
            problems += upstream.check_reports(given["report_to"], f"{where}trainer.report_to")
    adapter = None
    if kind.adapter and raw.get("adapter") is not None:
        adapter = read_adapter(raw["adapter"], f"{where}adapter", problems)
    model = raw.get("model") if "model" in sections else None
    if isinstance(model, dict) and isinstance(config := model.get("config"), dict) and config:
        problems += model_faults(config, f"{where}model.config")
    if None in sections.values():
        if isinstance(model, dict) and isinstance(source := model.get("from"), str):
            problems += unknown_source(f"{where}model.from", source, listed)
        return None
    if "data" in sections and not sections["data"].train:
        problems.append(f"{where}data.train is missing: a list of sources, such as [{{path: rows.jsonl}}].")
    stage = Stage(name, kind, file, sections, trainer, adapter, raw)
    problems += contradictions(stage)
    return stage


def _upstream_section(value: Any, where: str, problems: list[str]) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        problems.append(f"{where} = {value!r}: expected a mapping.")
        return {}
    return value
