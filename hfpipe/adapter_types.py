"""What kinds of adapter there are, what each can be combined with, and the preset: all that is known before anything loads."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfpipe import upstream
from hfpipe.errors import nearest
from hfpipe.sections import Adapter, Stage
from hfpipe.strict import build

ADAPTER_FILE = "adapter_config.json"  # PEFT's name


@dataclass(frozen=True)
class Kind:
    """A name for an adapter: PEFT's method, its configuration class, and what the name stands for beyond that."""

    method: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)
    four_bit: bool = False
    needed: tuple[str, ...] = ()  # fields without a default that could train


_NAMES = {
    "lora": Kind("lora", "LoraConfig"),
    "qlora": Kind("lora", "LoraConfig", four_bit=True),
    "dora": Kind("lora", "LoraConfig", {"use_dora": True}),
    "prompt": Kind("prompt_tuning", "PromptTuningConfig", needed=("num_virtual_tokens",)),
    "prefix": Kind("prefix_tuning", "PrefixTuningConfig", needed=("num_virtual_tokens",)),
    "p_tuning": Kind("p_tuning", "PromptEncoderConfig", needed=("num_virtual_tokens",)),
    "llama_adapter": Kind("adaption_prompt", "AdaptionPromptConfig", needed=("adapter_len", "adapter_layers")),
    "ia3": Kind("ia3", "IA3Config"),
    "bottleneck": Kind("bottleneck", "BottleneckConfig"),
}
_EXAMPLES = {"num_virtual_tokens": 20, "adapter_len": 10, "adapter_layers": 2}
# They put tokens of their own before the text (the last two before its keys and values).
_PROMPTS = frozenset(["prompt_tuning", "multitask_prompt_tuning", "p_tuning", "cpt", "prefix_tuning", "cartridge"])
KEPT_IN_CACHE = frozenset(["prefix_tuning", "cartridge"])
# The installed PEFT (0.21) has no way to write them into the weights; tests/test_adapters.py asks it.
_UNMERGED = _PROMPTS | {"adaption_prompt", "bottleneck", "lily", "poly", "shadow", "xlora"}
_OURS = ("type", "preset", "merge")
_MANAGED = ("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode")  # fmt: skip
# They change the base's own weights, so that the model without its adapter is no longer the reference (PEFT 0.21).
_REWRITES_BASE = ("pissa", "olora", "corda", "eva", "lora_ga")
_FROM_DATA = ("corda", "eva", "lora_ga")
_CALLED_IN_LOOP = frozenset(["adalora", "adamss"])  # by a training loop of one's own: no trainer of upstream's does
_SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")
_BY_REWARDS = "prompt"  # the rows of stages that learn from rewards


def find_kind(name: str) -> Kind:
    """The kind behind a recipe's `adapter.type`; KeyError for an unknown one."""
    plain = {kind.method: kind for kind in _NAMES.values() if not kind.options and not kind.four_bit}
    return _NAMES.get(name) or plain.get(name) or Kind(name, upstream.peft_methods()[name])


def is_merged(adapter: Adapter) -> bool:
    """Whether a stage with this adapter leaves a whole model, with the adapter written into its weights."""
    return adapter.merge is not False and find_kind(adapter.type).method not in _UNMERGED


def starts_as_no_change(adapter: Adapter) -> bool:
    """Whether the model says the same with the untrained adapter: virtual tokens before the text are read at once."""
    return find_kind(adapter.type).method not in _PROMPTS


def looks_at_rows(adapter: Adapter) -> bool:
    """Whether what it does depends on the batch's rows: tokens before each of them, or something told apart by row or place."""
    method = find_kind(adapter.type).method
    return method in _PROMPTS | {"xlora", "poly"} or bool(adapter.options.get("alora_invocation_tokens"))


def checkpointing_off(stage: Stage) -> bool:
    """Whether the stage's adapter needs activation checkpointing off where the recipe says nothing of it."""
    return stage.adapter is not None and find_kind(stage.adapter.type).method in KEPT_IN_CACHE


# --- the section ---


def read_adapter(raw: Any, where: str, problems: list[str]) -> Adapter | None:
    """The `adapter` section of a stage, its fields checked against PEFT's; None with `problems` where it is wrong."""
    if not isinstance(raw, dict):
        problems.append(f"{where} = {raw!r}: expected a mapping, such as {{type: lora, r: 16}}.")
        return None
    ours = {key: value for key, value in raw.items() if key in _OURS}
    if "type" not in ours and ours.get("preset"):
        ours["type"] = "lora"
    name, known = ours.get("type"), [*_NAMES, *(n for n in upstream.peft_methods() if n not in _NAMES)]
    if not isinstance(name, str) or name not in known:
        rest = f"or one of PEFT's methods: {', '.join(sorted(set(known) - set(_NAMES)))}"
        problems.append(f"{where}.type = {name!r}: expected one of {', '.join(_NAMES)}, {rest}.{nearest(name, known)}")
        return None
    kind = find_kind(name)
    options = {key: value for key, value in raw.items() if key not in _OURS}
    owner = f"{'hfpipe.training.bottleneck' if kind.method == 'bottleneck' else 'peft'}.{kind.config}"
    for key in [key for key in options if key in _MANAGED]:
        problems.append(f"{where}.{key} is not the recipe's to set: hfpipe does, from the stage and its parent.")
        del options[key]
    # Our own keys are in it for the sake of "did you mean": `options` holds none of them.
    fields = {**upstream.fields(kind.config), **dict.fromkeys(_OURS, upstream.Field("", None))}
    problems += upstream.check(options, fields, owner, where)
    for key in kind.needed:
        if options.get(key) is None:
            problems.append(f"{where}.{key} is missing: a {name} adapter has no size without it. Try {_EXAMPLES[key]}.")
    for key, value in kind.options.items():
        if options.get(key, value) != value:
            problems.append(f"{where}.{key} = {options[key]!r} beside type: {name}, which means {key}: {value}.")
    adapter = build(Adapter, ours, f"{where}.", problems)
    return adapter and dataclasses.replace(adapter, options={**kind.options, **options})


# --- the preset ---


def apply_preset(stages: dict[str, Stage], stage: Stage) -> Stage:
    """The stage with what `adapter.preset` sets, in `adapter` and `trainer`; what the recipe says itself stays.

    Schulman et al. 2025, "LoRA Without Regret" (thinkingmachines.ai/blog/lora), and TRL's page of that name: all linear
    layers, a high rank (32 is plenty for rewards), alpha 32, ten times the learning rate of full fine-tuning. That rate is
    the one of the parent where it was trained whole on rows of the same form, whose schedule is taken too, else upstream's.
    """
    adapter = stage.adapter
    if adapter is None or adapter.preset is None:
        return stage
    r = 32 if stage.type.rows == _BY_REWARDS else 256
    options = {"target_modules": "all-linear", "r": r, "lora_alpha": 32}
    parent = stages.get(stage.model.from_ or "")
    like = parent if parent and parent.adapter is None and parent.type.rows == stage.type.rows else None
    trainer = {key: like.trainer[key] for key in _SCHEDULE if like and key in like.trainer}
    owner = str(stage.type.trainer).rpartition(".")[2]
    full = like.trainer.get("learning_rate") if like else None
    full = upstream.fields(owner)["learning_rate"].default if full is None else full
    if isinstance(full, int | float):
        trainer["learning_rate"] = 10 * full
    options = {key: value for key, value in options.items() if key not in adapter.options}
    trainer = {key: value for key, value in trainer.items() if key not in stage.trainer}
    adapter = dataclasses.replace(
        adapter,
        options={**options, **adapter.options},
        from_preset={**options, **{f"trainer.{key}": value for key, value in trainer.items()}},
    )
    return dataclasses.replace(stage, adapter=adapter, trainer={**stage.trainer, **trainer})


def describe(adapter: Adapter) -> str:
    """One line: the type, what the preset has set, and what the stage will leave."""
    told = adapter.type
    if adapter.preset:
        told += f"; the preset {adapter.preset} sets {', '.join(f'{k} {v}' for k, v in adapter.from_preset.items())}"
        if "trainer.learning_rate" not in adapter.from_preset:
            told += " and leaves your learning_rate, which should be ten times that of full fine-tuning"
    left = "the adapter and the merged model" if is_merged(adapter) else "the adapter alone, on its base"
    return f"{told}; leaves {left}"


# --- what cannot go together ---


def contradictions(stage: Stage) -> Iterator[str]:
    """What the stage's adapter cannot be combined with, a line each."""
    if stage.adapter is None:
        return
    for check in (_loop, _merge, _prompts, _projection, _llama_adapter, _targets, _start, _bits):
        yield from check(stage, stage.adapter, find_kind(stage.adapter.type))


def _loop(stage: Stage, adapter: Adapter, kind: Kind) -> Iterator[str]:
    if kind.method in _CALLED_IN_LOOP:
        yield (
            f"adapter.type = '{adapter.type}' shares out its ranks when it is called after each step, which no trainer of upstream's "
            "does: it would stay as it began. Take lora, with rank_pattern where ranks should differ, or dora."
        )


def _merge(stage: Stage, adapter: Adapter, kind: Kind) -> Iterator[str]:
    if adapter.merge and not is_merged(adapter):
        yield (
            f"adapter.merge = true: a {adapter.type} adapter can't be written into the model's weights. Leave it out; the "
            "stage leaves the adapter on its base."
        )
    if adapter.preset and kind.method != "lora":
        yield f"adapter.preset = '{adapter.preset}' is for lora, qlora and dora, not for {adapter.type}."


def _prompts(stage: Stage, adapter: Adapter, kind: Kind) -> Iterator[str]:
    if kind.method not in _PROMPTS:
        return
    if stage.trainer.get("packing"):
        yield (
            f"adapter.type = '{adapter.type}' with trainer.packing: its virtual tokens let packed documents see each "
            "other. Set trainer.packing: false."
        )
    if stage.type.name == "distill":
        yield (
            f"adapter.type = '{adapter.type}' in a distill stage: upstream's loss asks the layers without PEFT, which puts the "
            "virtual tokens there. Take lora, ia3 or bottleneck."
        )
    if stage.type.leaves == "reward_model" and kind.method not in KEPT_IN_CACHE:
        yield (
            f"adapter.type = '{adapter.type}' in a reward stage: its rows reach the model as vectors, among which "
            "transformers can't tell padding, so scores would be read from padding. Take prefix, lora, ia3 or bottleneck."
        )
    on = [key for key in ("activation_checkpointing", "gradient_checkpointing") if stage.trainer.get(key)]
    if kind.method in KEPT_IN_CACHE and on:
        yield (
            f"adapter.type = '{adapter.type}' with trainer.{on[0]}: its tokens live in the cache, which checkpointing does "
            "without. Remove it: hfpipe switches it off."
        )


def _projection(stage: Stage, adapter: Adapter, kind: Kind) -> Iterator[str]:
    if adapter.options.get("prefix_projection") and stage.trainer.get("save_strategy") != "no":
        yield (
            "adapter.prefix_projection: PEFT's checkpoints hold what the projection gives and not itself, so a killed run "
            "could not go on from them. Leave it out, or set trainer.save_strategy: 'no'."
        )


def _llama_adapter(stage: Stage, adapter: Adapter, kind: Kind) -> Iterator[str]:
    if kind.method == "adaption_prompt" and stage.type.leaves == "reward_model":
        yield (
            f"adapter.type = '{adapter.type}' in a reward stage: PEFT would neither train nor save the new head. "
            "Take lora, ia3, prefix or bottleneck."
        )


def _targets(stage: Stage, adapter: Adapter, kind: Kind) -> Iterator[str]:
    targets = adapter.options.get("target_modules")
    if stage.type.leaves == "model" and isinstance(targets, list) and "lm_head" in targets:
        yield (
            "adapter.target_modules holds lm_head, whose weights TRL reads directly: an adapter there would never be "
            "trained. Remove it, or train the head whole: adapter.modules_to_save: [lm_head]."
        )


def _start(stage: Stage, adapter: Adapter, kind: Kind) -> Iterator[str]:
    start = str(adapter.options.get("init_lora_weights"))
    if not start.startswith(_REWRITES_BASE):
        return
    if stage.type.rows in ("preference", "unpaired", _BY_REWARDS) and stage.type.leaves == "model":
        yield (
            f"adapter.init_lora_weights = {start!r} rewrites the base's weights, so the reference would be wrong. "
            f"Leave it out in a {stage.type.name} stage."
        )
    elif start.startswith(_FROM_DATA):
        yield (
            f"adapter.init_lora_weights = {start!r} needs a pass over data before training, which hfpipe does not make. "
            "Take pissa or olora, or leave it out."
        )
    elif start.startswith("pissa_niter"):
        yield (
            f"adapter.init_lora_weights = {start!r} starts from a random projection, which is another one whenever the adapter "
            "is loaded again. Take pissa, which is exact."
        )
    elif kind.four_bit:
        yield f"adapter.init_lora_weights = {start!r} rewrites the base's weights, and 4-bit ones can't be rewritten."


def _bits(stage: Stage, adapter: Adapter, kind: Kind) -> Iterator[str]:
    if kind.four_bit and importlib.util.find_spec("bitsandbytes") is None:
        yield (
            f"adapter.type = '{adapter.type}' keeps the base in 4 bits, by bitsandbytes, which is not installed: "
            "pip install 'hfpipe[quant]', or take lora."
        )


def check_lineage(stages: dict[str, Stage], stage: Stage) -> Iterator[str]:
    """What is wrong between a stage's adapter, or its parent's, and the model that it is put on."""
    parent = stages.get(stage.model.from_ or "")
    if parent and parent.adapter and not is_merged(parent.adapter):
        yield f"model.from = {stage.model.from_!r}: {_not_whole(parent.adapter, parent)}"
    elif parent is None and stage.model.from_ and is_adapter_folder(Path(stage.model.from_).expanduser()):
        yield (
            f"model.from = {stage.model.from_!r} holds an adapter alone, and a stage starts from a whole model. Merge it "
            "(peft: AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(...)) and give that."
        )
    if stage.adapter and find_kind(stage.adapter.type).method == "adaption_prompt":
        model_type, known = model_type_of(stages, stage), upstream.adaption_prompt_models()
        if model_type is not None and model_type not in known:
            yield (
                f"adapter.type = '{stage.adapter.type}': PEFT has it for {', '.join(known)}, and this model is a "
                f"{model_type}. Take lora, prefix or bottleneck."
            )


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder holds an adapter and not the model that it is for."""
    return (folder / ADAPTER_FILE).is_file() and not (folder / "config.json").is_file()


def _not_whole(adapter: Adapter, parent: Stage) -> str:
    told = f"`{parent.name}` leaves its {adapter.type} adapter alone, and a stage starts from a whole model."
    if is_merged(dataclasses.replace(adapter, merge=None)):
        return f"{told} Set adapter.merge: true in {parent.file.name}, where it is false."
    return (
        f"{told} That kind can't be merged: start from `{parent.model.from_}`, or give `{parent.name}` one that can "
        "(lora, qlora, dora, ia3)."
    )


def model_type_of(stages: dict[str, Stage], stage: Stage) -> str | None:
    """The model type of a stage's model, where a recipe or a folder's config.json says it; None for the Hub's."""
    seen: set[str] = set()
    while (parent := stages.get(stage.model.from_ or "")) and not stage.model.config and parent.name not in seen:
        seen.add(parent.name)
        stage = parent
    if stage.model.config:
        return stage.model.config.get("model_type")
    folder = Path(stage.model.from_ or "").expanduser()
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # told where the folder's identity is taken
        return None
    return config.get("model_type") if isinstance(config, dict) else None
