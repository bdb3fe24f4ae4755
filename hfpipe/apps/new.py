"""`hfpipe new FOLDER`: a whole recipe for a size, a budget or a model, each number with its reason, that plans clean."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from hfpipe.apps.materials import Material, choose_material
from hfpipe.apps.recipe_text import pipeline_text, stage_text
from hfpipe.config import load_recipe
from hfpipe.errors import UserError, nearest
from hfpipe.hub_client import ABOUT_FILES, fetch, resolve, split_id
from hfpipe.plan import describe_stage
from hfpipe.plan.devices import Devices, find_devices
from hfpipe.plan.quote import Quote, quote_stage
from hfpipe.plan.scaling import TOKENS_PER_PARAMETER, Budget
from hfpipe.plan.shapes import Shape, read_config, read_shape
from hfpipe.plan.sizing import SMALL, batch_tokens, choose_shape, power_of_two
from hfpipe.progress import duration, quantity
from hfpipe.sections import Recipe
from hfpipe.stages import stage_types

TEXT_PER_PASS, TEXT_PER_PASS_CPU = 32_768, 4_096  # tokens: more in one pass gains no speed
_PAIRS, _SMALL_PAIRS = 32, 16  # of a step
_LEAST_STEPS = 50  # of a stage with few rows
MOST_PASSES = 4  # over the same text, nearly as good as new: Muennighoff et al. 2023, arXiv:2305.16264
_TUNING_TOKENS = {"midtrain": 50e6, "sft": 20e6}  # at the most, where rows are not counted: a hundredth of pretraining


@dataclass
class Choice:
    """What was settled for one stage."""

    rows: int = 1  # of a pass
    accumulation: int = 1
    steps: int | None = None  # trainer.max_steps; None: epochs
    checkpointing: bool = False
    quote: Quote | None = None  # of the stage as it is written


@dataclass
class Draft:
    """A recipe while its figures are settled; `origin` is the model that it starts from, None for one from scratch."""

    name: str
    command: str
    devices: Devices
    shape: Shape
    config: dict
    tokens: float  # of pretraining
    material: Material
    stages: list[str]
    origin: str | None = None
    adapter: str | None = None
    needs_template: bool = False
    sharded: bool = False
    choices: dict[str, Choice] = field(default_factory=dict)

    @property
    def params(self) -> int:
        return self.shape.total

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return min(self.shape.max_positions or 2048, 4096)


def new(options: argparse.Namespace) -> None:
    """Write the folder, whole or not at all, and tell what was chosen.

    Raises:
        UserError: the folder is there already, or what is asked for cannot be had.
    """
    folder = Path(options.folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder} is there already and not empty: give another folder. Nothing is overwritten.")
    if not re.fullmatch(r"[\w.-]+", folder.name):
        raise UserError(f"{folder}: expected letters, digits, `.`, `_` and `-`: the folder's name is the recipe's.")
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / folder.name
        draft, recipe = _settle_all(options, made)
        told = _tell(draft, recipe, folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            shutil.copytree(made, beside, dirs_exist_ok=True)
            beside.chmod(0o755)
            os.rename(beside, folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    print("\n".join(told))


# --- what is asked for ---


def _draft(options: argparse.Namespace) -> tuple[Draft, Budget | None]:
    names = ("params", "tokens", "flops", "hours", "dollars")
    given = [name for name in names if getattr(options, name) is not None]
    device = find_devices(options.device, options.utilisation, options.price) if options.device else None
    command = " ".join(["hfpipe new", Path(options.folder).name, *_told(options)])
    shared = {"name": Path(options.folder).name, "command": command}
    if options.origin:
        if given:
            raise UserError(f"--from starts from a model that is there: --{given[0]} has no meaning beside it.")
        origin, home = _find_model(options.origin)
        config = read_config(home) or {}
        if not config or (shape := read_shape(config)) is None:
            kind = config.get("model_type", "no config.json")
            raise UserError(f"--from {options.origin}: what a model of this type takes is not known here ({kind}).")
        material = choose_material(options.data, shape.total, 0.0)
        if material.own:  # midtraining is for text here
            material.rows["midtrain"] = material.rows_for("pretrain")
        stages = _stages(options.stages, material, ["midtrain", "sft", "dpo"] if material.own else ["sft", "dpo"])
        device = device or find_devices("cpu" if shape.total < SMALL else "h100")
        draft = Draft(
            **shared, devices=device, shape=shape, config={}, tokens=0, material=material, stages=stages, origin=origin
        )
        draft.needs_template = not _has_template(home)
        if "pretrain" in stages or "tokenizer" in stages:
            raise UserError(
                "--stages: a model that is there has its tokenizer and its pretraining. For more text: midtrain."
            )
        return draft, None
    budget = Budget(**{name: getattr(options, name) for name in names}, devices=device).complete()
    most_words = choose_material(options.data, budget.params, 0.0).most_words
    config, shape = choose_shape(budget.params, most_words)
    tokens = TOKENS_PER_PARAMETER * shape.total if given == ["params"] else budget.tokens
    material = choose_material(options.data, shape.total, tokens, shape.vocab_size)
    tokens = min(tokens, MOST_PASSES * material.text_tokens) if material.text_tokens else tokens
    middle = [] if material.own else ["midtrain"]
    stages = _stages(options.stages, material, ["tokenizer", "pretrain", *middle, "sft", "dpo"])
    if stages[:2] != ["tokenizer", "pretrain"]:
        raise UserError(
            "--stages: a model from scratch begins with tokenizer, pretrain. To start from a model, give --from."
        )
    device = device or find_devices("cpu" if shape.total < SMALL else "h100" if shape.total < 1e9 else "h100x8")
    draft = Draft(**shared, devices=device, shape=shape, config=config, tokens=tokens, material=material, stages=stages)
    return draft, budget if options.hours or options.dollars else None


def _told(options: argparse.Namespace) -> list[str]:
    """The options given, as they are written."""
    named = {"origin": "from"}
    plain = ((named.get(key, key), value) for key, value in vars(options).items() if key not in ("folder", "command"))
    return [
        f"--{key} {quantity(value) if isinstance(value, float) and value >= 1000 else value}"
        for key, value in plain
        if value
    ]


def _find_model(source: str) -> tuple[str, Path]:
    """What `model.from` will say, and the folder with the model's configuration."""
    folder = Path(source).expanduser()
    if folder.exists():
        return str(folder.resolve()), folder
    repo_id, revision = split_id(source)
    commit = resolve(repo_id, revision)
    return f"{repo_id}@{commit}", fetch(repo_id, commit, only=ABOUT_FILES)


def _has_template(home: Path) -> bool:
    said = home / "tokenizer_config.json"
    return (home / "chat_template.jinja").is_file() or (said.is_file() and '"chat_template"' in said.read_text("utf-8"))


def _stages(asked: str | None, material: Material, usual: list[str]) -> list[str]:
    """The stages asked for, else those of the usual ones that there is data for."""
    known = [name for name in ("tokenizer", "pretrain", "midtrain", "sft", "reward", "kto", "dpo")]
    stages = [name.strip() for name in asked.split(",")] if asked else [s for s in usual if material.rows_for(s)]
    for name in stages:
        if name not in known:
            raise UserError(
                f"--stages: no stage `{name}` is written here, but {', '.join(known)}.{nearest(name, known)}"
            )
        if not material.rows_for(name):
            raise UserError(
                f"--stages: {material.where} holds nothing that a {name} stage learns from: {material.found}."
            )
    if sorted(stages, key=known.index) != stages or len(set(stages)) < len(stages):
        raise UserError(f"--stages {','.join(stages)}: expected each once, in this order: {', '.join(known)}.")
    if not stages:
        raise UserError(f"{material.where} holds nothing that a stage from here on learns from: {material.found}.")
    return stages


# --- what fits ---


def _settle_all(options: argparse.Namespace, folder: Path) -> tuple[Draft, Recipe]:
    draft, budget = _draft(options)
    folder.mkdir(parents=True)
    whole = bool(draft.config or draft.material.replay)  # nothing of the model's own text to replay: LoRA forgets less
    adapters = [None] if draft.config else [None, "lora"] if whole else ["lora"]
    ways = [(adapter, False) for adapter in adapters]
    ways += [(adapters[0], True)] if draft.devices.count > 1 else []
    for draft.adapter, draft.sharded in ways:
        if all(_settle(draft, folder, name) for name in draft.stages if name != "tokenizer"):
            break
    else:
        raise UserError(
            f"{quantity(draft.params)} parameters do not train on {draft.devices.label}: not one row fits into "
            f"{draft.devices.memory:.0f} GB. Give more devices, such as --device h100x8, or fewer parameters."
        )
    if budget:
        later = sum(c.quote.seconds or 0 for name, c in draft.choices.items() if name != "pretrain")
        chosen, seconds = draft.choices["pretrain"], 3600 * (budget.hours or 0)
        share = max(seconds - later, seconds / 2) / chosen.quote.seconds
        chosen.steps = max(int(chosen.steps * share), 1)
        draft.tokens = chosen.steps * chosen.quote.work.tokens_per_step
        chosen.quote = _quote(draft, folder, "pretrain")[1]
    recipe = _write(draft, folder)
    return draft, recipe


def _settle(draft: Draft, folder: Path, name: str) -> bool:
    """Find the largest pass that fits for one stage, and the batch; False where nothing fits."""
    for checkpointing in (False, True):
        draft.choices[name] = chosen = Choice(checkpointing=checkpointing, steps=_steps(draft, name, 1))
        _, quote = _quote(draft, folder, name)
        if quote.largest != 0:
            break
    else:
        return False
    work, ranks, small = quote.work, draft.devices.count, draft.params < SMALL
    length = work.length
    if name in ("dpo", "reward", "kto"):
        rows = _SMALL_PAIRS if small else _PAIRS
    else:
        known = work.rows * length * (work.epochs or 1) if work.rows else _TUNING_TOKENS.get(name, 0)
        rows = batch_tokens(draft.params, draft.tokens if name == "pretrain" else known) / length
    if work.rows and name != "pretrain":
        rows = min(rows, work.rows * (work.epochs or 1) / _LEAST_STEPS)
    each = power_of_two(rows / ranks)
    most = (TEXT_PER_PASS_CPU if draft.devices.key == "cpu" else TEXT_PER_PASS) / length
    chosen.rows = power_of_two(min(each, most, quote.largest or each))
    if name == "kto":
        chosen.rows = max(chosen.rows, 2)  # TRL holds each answer against another one's
    chosen.accumulation = max(each // chosen.rows, 1)
    chosen.steps = _steps(draft, name, chosen.rows * chosen.accumulation * ranks)
    _, chosen.quote = _quote(draft, folder, name)
    return True


def _steps(draft: Draft, name: str, rows: int) -> int | None:
    """Steps of a stage whose rows nobody has counted yet, or whose tokens are given; None: epochs say it."""
    if name == "pretrain":
        return max(round(draft.tokens / (rows * draft.material.row_length(draft.length))), 1)
    if draft.material.counted:
        return None
    if name in _TUNING_TOKENS:
        return round(min(_TUNING_TOKENS[name], draft.params * TOKENS_PER_PARAMETER / 25) / (rows * draft.length))
    return 1000


def _quote(draft: Draft, folder: Path, name: str) -> tuple[Recipe, Quote]:
    """The stage's quote as the recipe stands; a Hub model's shape is read from its configuration."""
    recipe = _write(draft, folder, only=[s for s in draft.stages if s in draft.choices or s == "tokenizer"])
    return recipe, quote_stage(recipe, recipe.stages[name], None, draft.devices)


def _write(draft: Draft, folder: Path, only: list[str] | None = None) -> Recipe:
    written = dataclasses.replace(draft, stages=only or draft.stages)
    (folder / "pipeline.yaml").write_text(pipeline_text(written), encoding="utf-8")
    for name in written.stages:
        (folder / f"{name}.yaml").write_text(stage_text(written, name), encoding="utf-8")
    return load_recipe(folder, stage_types())


# --- what is told ---


def _tell(draft: Draft, recipe: Recipe, folder: Path) -> list[str]:
    shape, origin = draft.shape, f"from {draft.origin}" if draft.origin else "from scratch"
    lines = [
        f"{draft.name}: {quantity(shape.total)} parameters {origin} ({shape.model_type}, {shape.layers} layers of "
        f"{shape.hidden_size}), on {draft.devices.label}"
    ]
    for name, stage in recipe.stages.items():
        if not stage.type.trainer:
            continue
        about = describe_stage(recipe, stage, None, draft.devices)
        took = f", about {duration(about['seconds'])}" if about.get("seconds") else ""
        done = f"{about['steps']:,} steps" if about.get("steps") else "steps by its rows"
        amount = f", {quantity(about['tokens'])} tokens" if about.get("tokens") else ""
        lines.append(f"  {name:<9} {done}{amount}, learning_rate {about['learning_rate']:g}{took}")
        lines += [f"  {'':<9} {note}" for note in about["notes"] if note.startswith("warning: ")]
    device = f" --device {draft.devices.key}{f'x{draft.devices.count}' if draft.devices.count > 1 else ''}"
    lines.append(f"wrote {folder}: pipeline.yaml, {', '.join(f'{name}.yaml' for name in draft.stages)}")
    return [*lines, f"next: hfpipe plan {folder}{'' if draft.devices.key == 'cpu' else device}"]
