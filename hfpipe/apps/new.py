"""`hfpipe new FOLDER`: a whole recipe for a size, a budget or a model, each number with its reason, that plans clean."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any

from hfpipe.apps.drafts import Draft
from hfpipe.apps.materials import FITTING, Material, choose_material
from hfpipe.artifact import read_json
from hfpipe.config import SETTING
from hfpipe.errors import UserError, nearest
from hfpipe.hub_client import ABOUT_FILES, fetch, resolve, split_id
from hfpipe.plan import describe_stage
from hfpipe.plan.devices import Devices, find_devices
from hfpipe.plan.scaling import TOKENS_PER_PARAMETER, Budget
from hfpipe.plan.shapes import Shape, read_config, read_shape
from hfpipe.plan.sizing import MOST_PASSES, SMALL, SMALLEST, choose_shape
from hfpipe.progress import duration, quantity
from hfpipe.sections import Recipe

_BUDGET = ("params", "tokens", "flops", "hours", "dollars")
_NAMED = 10  # files of a line
_KNOWN = ("tokenizer", "pretrain", "midtrain", "sft", "reward", "kto", "dpo")


def new(options: argparse.Namespace) -> None:
    """Write the folder, whole or not at all, and tell what was chosen.

    Raises:
        UserError: the folder is there already, or what is asked for cannot be had.
    """
    folder = Path(options.folder)
    _check_place(folder)
    if not re.fullmatch(r"[\w.-]+", folder.name):
        raise UserError(f"{folder}: expected letters, digits, `.`, `_` and `-`: the folder's name is the recipe's.")
    devices = find_devices(options.device, options.utilisation, options.price) if options.device else None
    draft, seconds = (_from_model if options.origin else _from_scratch)(options, devices)
    with tempfile.TemporaryDirectory() as scratch:
        recipe = draft.settle(Path(scratch), seconds)
        told = _tell(draft, recipe, folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = folder.with_name(f".{folder.name}.{os.getpid()}")
        try:
            shutil.copytree(scratch, beside)
            beside.chmod(0o755)
            os.rename(beside, folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    print("\n".join(told))


def _check_place(folder: Path) -> None:
    """UserError where there is something already, or nothing can be written."""
    try:
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            raise UserError(f"{folder} is there already and not empty: give another folder. Nothing is overwritten.")
        above = next(path for path in folder.absolute().parents if path.exists())
        tempfile.TemporaryDirectory(prefix=".", dir=above).cleanup()
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}. Give another folder.") from None


# --- what is asked for ---


def _from_scratch(options: argparse.Namespace, devices: Devices | None) -> tuple[Draft, float | None]:
    given = {name: getattr(options, name) for name in _BUDGET if getattr(options, name) is not None}
    if not given and not options.data:
        raise UserError(
            "Give a size (--params 125M), a budget (--hours 2 --device h100x8), a model (--from org/model) or --data DIR."
        )
    text = choose_material(options.data, given.get("params", SMALL), 0.0)
    if not given:  # as large as the text is worth
        worth = MOST_PASSES * (text.text_tokens or 0) / TOKENS_PER_PARAMETER
        given = {"params": max(worth, SMALLEST) if text.own else 1e6}
    budget = Budget(**given, devices=devices).complete()
    config, shape = choose_shape(budget.params, choose_material(options.data, budget.params, 0.0).most_words)
    wanted = TOKENS_PER_PARAMETER * shape.total if list(given) == ["params"] else budget.tokens
    material = choose_material(options.data, shape.total, wanted, shape.vocab_size)
    tokens = min(wanted, MOST_PASSES * (material.text_tokens or wanted))
    middle = [] if material.own else ["midtrain"]
    stages = _stages(options.stages, material, ["tokenizer", "pretrain", *middle, "sft", "dpo"])
    if not options.stages and stages[0] != "tokenizer":
        raise UserError(
            f"--data {options.data} holds {material.found} and no text, with which a model from scratch begins: give "
            "--from MODEL, or add text."
        )
    if stages[:2] != ["tokenizer", "pretrain"]:
        raise UserError("--stages: a model from scratch begins with tokenizer,pretrain. With --from it needs neither.")
    devices = devices or find_devices("cpu" if shape.total < SMALL else "h100" if shape.total < 1e9 else "h100x8")
    draft = Draft(**_named(options), devices=devices, shape=shape, material=material, stages=stages)
    draft.config, draft.tokens, draft.bound = config, tokens, tokens < wanted
    return draft, 3600 * budget.hours if given.keys() & {"hours", "dollars"} else None


def _from_model(options: argparse.Namespace, devices: Devices | None) -> tuple[Draft, None]:
    for name in _BUDGET:
        if getattr(options, name) is not None:
            raise UserError(f"--from starts from a model that is there: --{name} has no meaning beside it.")
    home = Path(options.origin).expanduser()
    origin = str(home.resolve())
    if not home.exists():
        repo_id, revision = split_id(options.origin)
        commit = resolve(repo_id, revision)
        origin, home = f"{repo_id}@{commit}", fetch(repo_id, commit, only=ABOUT_FILES)
    if SETTING.search(origin):
        raise UserError(f"--from {options.origin}: in a recipe {{name}} stands for a setting. Rename the folder.")
    shape = _read_shape(home, options.origin)
    material = choose_material(options.data, shape.total, 0.0)
    if material.own:  # of one's own text the model learns a domain
        material.rows["midtrain"] = material.rows_for("pretrain")
    stages = _stages(options.stages, material, ["midtrain", "sft", "dpo"] if material.own else ["sft", "dpo"])
    if {"tokenizer", "pretrain"} & set(stages):
        raise UserError("--stages: a model that is there has its tokenizer and pretraining. For more text: midtrain.")
    devices = devices or find_devices("cpu" if shape.total < SMALL else "h100")
    draft = Draft(**_named(options), devices=devices, shape=shape, material=material, stages=stages, origin=origin)
    inside = (read_json(home / "tokenizer_config.json") or {}).get("chat_template")
    draft.needs_template = not inside and not (home / "chat_template.jinja").is_file()
    if draft.needs_template and stages[0] not in ("midtrain", "sft"):
        how = "" if material.rows_for("sft") else f", on conversations, of which {material.where} has none"
        raise UserError(
            f"--from {options.origin}: it has no chat template, and a {stages[0]} stage gives it none. Begin with sft{how}, "
            "or give a model that has one."
        )
    return draft, None


def _read_shape(home: Path, given: str) -> Shape:
    """The model in a folder; UserError where it is of no known type, or its values are at fault."""
    config = read_config(home) or {}
    try:
        shape = read_shape(config)
    except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{home / 'config.json'}: no model can be made of these values: {error}.") from None
    if shape is None:
        kind = config.get("model_type", "there is no config.json")
        raise UserError(f"--from {given}: what a model of its type takes is not known here ({kind}).")
    sizes = [number for weight in shape.weights.values() for number in weight.size]
    for number in [*sizes, *filter(None, [*shape.windows, shape.max_positions])]:
        if not (type(number) is int and number > 0):
            raise UserError(
                f"{home / 'config.json'}: one of its sizes is {number!r}: expected whole numbers from 1 on."
            )
    return shape


def _named(options: argparse.Namespace) -> dict[str, Any]:
    """The recipe's name, and the command as it was given."""
    name, words = Path(options.folder).name, []
    for key, value in vars(options).items():
        if value and key not in ("folder", "command"):
            words.append(f"--{key.replace('origin', 'from')} {_exact(value) if isinstance(value, float) else value}")
    return {"name": name, "command": " ".join(["hfpipe new", name, *words])}


def _exact(value: float) -> str:
    """A number as an option takes it, short where that is the same number."""
    short = 1000 <= value < 1e15 and float(f"{value:.3g}") == value
    return quantity(value) if short else repr(value).removesuffix(".0")


def _stages(asked: str | None, material: Material, usual: list[str]) -> list[str]:
    """The stages asked for, else those of the usual ones that there is data for."""
    stages = [name.strip() for name in asked.split(",")] if asked else [s for s in usual if material.rows_for(s)]
    for name in stages:
        if name not in _KNOWN:
            raise UserError(
                f"--stages: no stage `{name}` is written here, but {', '.join(_KNOWN)}.{nearest(name, _KNOWN)}"
            )
        if not material.rows_for(name):
            raise UserError(f"--stages: {material.where} has nothing for a {name} stage, but {material.found}.")
    if sorted(set(stages), key=_KNOWN.index) != stages:
        raise UserError(f"--stages {asked}: expected each once, in this order: {', '.join(_KNOWN)}.")
    if not stages:
        raise UserError(f"{material.where} has nothing for {', '.join(usual)}, but {material.found}.")
    return stages


# --- what is told ---


def _tell(draft: Draft, recipe: Recipe, folder: Path) -> list[str]:
    shape, devices, origin = draft.shape, draft.devices, f"from {draft.origin}" if draft.origin else "from scratch"
    form = f"{shape.model_type}, {shape.layers} layers of {shape.hidden_size}"
    lines = [f"{draft.name}: {quantity(shape.total)} parameters {origin} ({form}), on {devices.label}"]
    for name, stage in recipe.stages.items():
        if not stage.type.trainer:
            continue
        about = describe_stage(recipe, stage, None, devices)
        parts = [f"{about['steps']:,} steps" if about.get("steps") else "steps by its rows"]
        parts += [f"{quantity(about['tokens'])} tokens"] if about.get("tokens") else []
        parts += [f"learning_rate {about['learning_rate']:g}"]
        if about.get("seconds"):
            parts.append(f"about {duration(max(about['seconds'], 1))}")
        elif most := draft.choices[name].quote.seconds:  # of rows as long as they may be
            parts.append(f"at most about {duration(max(most, 1))}")
        lines.append(f"  {name:<9} {', '.join(parts)}")
        lines += [f"  {'':<9} {note}" for note in about["notes"] if note.startswith("warning: ")]
    lines += _not_trained_on(draft, recipe)
    lines += [f"note: {draft.note}"] if draft.note else []
    device = f"{devices.key}x{devices.count}" if devices.count > 1 else devices.key
    lines.append(f"wrote {folder}: pipeline.yaml, {', '.join(f'{name}.yaml' for name in draft.stages)}")
    return [*lines, f"next: hfpipe plan {shlex.quote(str(folder))}{'' if device == 'cpu' else f' --device {device}'}"]


def _not_trained_on(draft: Draft, recipe: Recipe) -> list[str]:
    """The user's own files that no stage learns from, by the reason, with the stages that would."""
    material, reasons = draft.material, {}
    trained = {Path(source.path).name for stage in recipe.stages.values() for source in stage.data.train}
    for name, why in material.aside.items():
        reasons.setdefault(why, []).append(name)
    for name, form in material.forms.items():
        if name in trained or name in material.aside:
            continue
        why = f"{form.name}, which no stage written here takes"
        if fitting := [stage for stage in _KNOWN if stage in FITTING.get(form.gives, ())]:
            stage = "midtrain" if draft.origin and form.gives == "text" else fitting[-1]
            asked = sorted({*draft.stages, stage}, key=_KNOWN.index)
            why = f"{form.name}: --stages {','.join(asked)}"
        reasons.setdefault(why, []).append(name)
    return [f"not trained on: {_some(names)} ({why})" for why, names in reasons.items()]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
