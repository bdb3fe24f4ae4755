"""A quote for a stage: parameters, work, time, money, memory and disk, by arithmetic alone: no torch, no weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hfpipe import artifact, upstream
from hfpipe.annealing import anneals
from hfpipe.data.size import Size, estimate_size
from hfpipe.errors import UserError
from hfpipe.hub_client import ABOUT_FILES, fetch, is_commit, split_id
from hfpipe.plan.costs import stage_flops, stage_seconds
from hfpipe.plan.devices import Devices, find_devices
from hfpipe.plan.memory import Memory, Setting, disk_bytes, kv_cache, largest_batch, plan_memory
from hfpipe.plan.shapes import NOT_TEXT, Shape, read_config, read_shape
from hfpipe.plan.trained import Trained, read_trained
from hfpipe.plan.workload import (
    BY_REWARDS,
    PAIRS,
    Work,
    guess_bytes_per_token,
    option,
    plan_work,
    recomputes,
    rollout_rows,
)
from hfpipe.rope import positions
from hfpipe.sections import Recipe, Stage
from hfpipe.yaml_files import load_yaml

# Of a device's memory, the rest being the driver's and what lies between tensors. On a CPU hfpipe has freed memory kept
# (hfpipe.training.hardware.keep_freed_memory), which took up to half as much again (benchmarks/RESULTS.md).
USABLE, USABLE_CPU = 0.9, 0.65
_CONTROL_TOKENS = {"hfpipe": 13}  # of a chat template that hfpipe gives a tokenizer, pad among them
_SAVED = 2  # hfpipe's own default of save_total_limit
_BY_ZERO = ("ddp", "zero1", "zero2", "full")  # by DeepSpeed's zero_optimization.stage


@dataclass(frozen=True)
class Quote:
    """What a stage is, does and takes; parts are None where the model or the data is not known yet."""

    shape: Shape | None
    trained: Trained | None
    work: Work
    dtype: str
    devices: Devices
    sharding: str
    flops: dict[str, float] | None
    seconds: float | None
    memory: Memory | None
    largest: int | None
    disk: float | None
    bytes_per_token: float
    sizes: tuple[Size, ...]  # of the training sources
    unknown: tuple[str, ...]


def quote_stage(
    recipe: Recipe,
    stage: Stage,
    run: Path | None = None,
    devices: Devices | None = None,
    full_rows: bool = False,
) -> Quote:
    """The quote for a stage that trains.

    Args:
        run: a run's folder: what its finished stages know of their tokenizer is used.
        devices: what it would run on; by default this machine's CPU.
        full_rows: as `plan_work` has it.
    """
    devices = devices or find_devices("cpu")
    ranks = devices.count if devices.count > 1 else recipe.pipeline.launch.processes or 1
    origin, vocab, control = _origin(recipe, stage)
    config = origin.model.config or (read_origin(origin.model.from_) if origin.model.from_ else {})
    shape = read_shape(config, config.get("vocab_size") or vocab, scores=stage.type.leaves == "reward_model")
    if shape and (longest := positions(recipe.stages, stage)):
        shape = replace(shape, max_positions=longest)
    bytes_per_token = _bytes_per_token(recipe, stage, run) or guess_bytes_per_token(
        shape.vocab_size if shape else 32768
    )

    seed = recipe.pipeline.seed
    sizes = tuple(estimate_size(s, s.as_ or stage.type.rows, "train", seed) for s in stage.data.train)
    work = plan_work(stage, ranks, bytes_per_token, sizes, _parent_tokens(recipe, stage, run, devices), full_rows)
    trained = shape and read_trained(shape, stage.sections.get("regularize"), stage.adapter, control)
    dtype = _dtype(stage, devices)
    sharding = _sharding(recipe, stage)
    unknown = [work.why] if work.why else []
    if shape is None:
        unknown.append(f"the shape of {config.get('model_type') or origin.model.from_} is not known here")
    elif not_text := [name.removesuffix("_config") for name in NOT_TEXT if name in config]:
        unknown.append(
            f"the numbers are those of the text alone: the {' and '.join(not_text)} part is not counted here"
        )
    if shape and trained is None:
        unknown.append(f"what a {stage.adapter.type} adapter trains is not counted here")
    known = (shape, trained, work, dtype, devices, sharding)
    if shape is None or trained is None:
        return Quote(*known, None, None, None, None, None, bytes_per_token, sizes, tuple(unknown))
    setting = _setting(stage, origin, trained, work, dtype, devices, ranks, sharding)
    beside = _beside(stage, shape, work, setting)
    memory = plan_memory(shape, trained, setting, beside)
    rows = 2 if stage.type.name in PAIRS else 1
    usable = (USABLE_CPU if setting.on_cpu else USABLE) * devices.memory * 1e9
    largest = largest_batch(shape, trained, setting, usable, beside, rows)
    costs = stage_flops(stage, shape, trained, work) if work.tokens else None
    seconds = stage_seconds(stage, shape, work, costs, dtype, devices, setting) if costs else None
    saved = 0 if option(stage, "save_strategy") == "no" else option(stage, "save_total_limit") or _SAVED
    if saved == 1 and option(stage, "eval_strategy") != "no":
        saved = 2  # the best stays beside the newest
    disk = disk_bytes(shape, trained, setting.optimizer, saved)
    if getattr(stage.sections.get("optimizer"), "keep_state", False):
        disk += memory.optimizer
    return Quote(*known, costs, seconds, memory, largest, disk, bytes_per_token, sizes, tuple(unknown))


# --- the model ---


def _origin(recipe: Recipe, stage: Stage) -> tuple[Stage, int | None, int]:
    """The stage that says what the model is, its tokenizer's entries and control tokens where the recipe makes it."""
    origin = stage
    while not origin.model.config and (parent := recipe.parent(origin)):
        origin = parent
    made = recipe.parent(origin)
    section = made.sections.get("tokenizer") if made and made.type.leaves == "tokenizer" else None
    control = _CONTROL_TOKENS.get(section.chat_template, 0) if section else 0
    vocab = section and section.vocab_size
    while vocab and stage is not made:  # what the stages on the way add, at the most
        vocab += getattr(stage.sections.get("tokenizer"), "add_pieces", 0)
        stage = recipe.parent(stage)
    return origin, vocab, control


def read_origin(source: str) -> dict[str, Any]:
    """The configuration of a folder, or of a Hub model at a commit that it is pinned to; empty where it is not to be had."""
    repo_id, revision = split_id(source)
    if Path(source).expanduser().exists() or not is_commit(revision):
        return read_config(Path(source).expanduser()) or {}
    try:
        return read_config(fetch(repo_id, str(revision), only=ABOUT_FILES)) or {}
    except UserError:  # told with its reason by the run itself
        return {}


def _bytes_per_token(recipe: Recipe, stage: Stage, run: Path | None) -> float | None:
    """As the run's finished tokenizer stage has measured it."""
    while parent := recipe.parent(stage):
        stage = parent
    record = run and artifact.read_record(run / stage.name / artifact.STAGE_FILE)
    return (record or {}).get("metrics", {}).get("bytes_per_token")


def _parent_tokens(recipe: Recipe, stage: Stage, run: Path | None, devices: Devices) -> float | None:
    """What the parent of an annealing has trained on, by its record, or would, by its own quote."""
    if anneals(stage) is None:
        return None
    parent = recipe.parent(stage)
    folder = Path(stage.model.from_ or "").expanduser() if parent is None else run and run / parent.name
    record = (artifact.read_record(folder / artifact.STAGE_FILE) if folder else None) or {}
    if record.get("metrics", {}).get("tokens") and (parent is None or record.get("written") == parent.raw):
        return record["metrics"]["tokens"]
    return quote_stage(recipe, parent, run, devices).work.tokens if parent else None


# --- how it is trained ---


def _dtype(stage: Stage, devices: Devices) -> str:
    if stage.trainer.get("fp16"):
        return "fp16"
    return "bf16" if stage.trainer.get("bf16", devices.has_bf16) else "fp32"


def _sharding(recipe: Recipe, stage: Stage) -> str:
    """How the model is divided, by the stage's own `trainer`, else by the launch's accelerate configuration."""
    name = recipe.pipeline.launch.accelerate_config or ""
    file = upstream.accelerate_configs().get(name, Path(name))
    launch = load_yaml(file) if file.is_file() else {}
    kind, deepspeed = launch.get("distributed_type"), launch.get("deepspeed_config") or {}
    if zero := stage.trainer.get("deepspeed") or deepspeed.get("deepspeed_config_file"):
        number = _settings(zero).get("zero_optimization", {}).get("stage", 0)
        return _BY_ZERO[int(number)]
    if kind == "DEEPSPEED" and not stage.trainer.get("fsdp"):
        return _BY_ZERO[int(deepspeed.get("zero_stage", 2))]
    if kind != "FSDP" and not stage.trainer.get("fsdp"):
        return "ddp"
    told, legacy = _settings(stage.trainer.get("fsdp_config") or launch.get("fsdp_config")), stage.trainer.get("fsdp")
    fsdp = {key.removeprefix("fsdp_"): value for key, value in told.items()}
    given = [legacy, fsdp.get("sharding_strategy"), fsdp.get("reshard_after_forward")]
    words = str([value for value in given if value is not None]).lower()
    if "no_shard" in words:
        return "ddp"
    # What is not divided again after the forward pass lies whole on each device until the backward one is over.
    return "zero2" if "grad_op" in words or "false" in words else "full"


def _settings(given: Any) -> dict[str, Any]:
    """A mapping, or what the JSON file of this name holds."""
    return artifact.read_json(Path(given).expanduser()) or {} if isinstance(given, str) else dict(given or {})


def _stored(stage: Stage, origin: Stage) -> int:
    """Bytes of one of the base's parameters, as it is loaded."""
    given = stage.model.dtype
    if given is None and stage.adapter is not None and not origin.model.config:
        config = read_origin(origin.model.from_ or "")
        given = config.get("dtype") or config.get("torch_dtype")
    return 2 if given in ("bfloat16", "float16") else 4


def _setting(
    stage: Stage,
    origin: Stage,
    trained: Trained,
    work: Work,
    dtype: str,
    devices: Devices,
    ranks: int,
    sharding: str,
) -> Setting:
    section = stage.sections.get("optimizer")
    attention = stage.model.attn_implementation or (
        "eager" if origin.model.config.get("model_type") == "gemma2" else "sdpa"
    )
    liger = stage.trainer.get("use_liger_kernel")
    head = "logits" if stage.type.rows == "text" else "score" if stage.type.leaves == "reward_model" else "tiles"
    return Setting(
        rows=work.per_device * (2 if stage.type.name in PAIRS else 1),
        length=work.length,
        dtype=dtype,
        stored=_stored(stage, origin),
        four_bit=trained.four_bit,
        attention=attention,
        masked=True,
        checkpointing=recomputes(stage),
        accumulates=work.accumulation > 1,
        head="tiles" if liger and head == "logits" else head,
        optimizer=(section and section.type) or option(stage, "optim") or "adamw_torch_fused",
        on_cpu=devices.key == "cpu",
        ranks=ranks,
        sharding=sharding,
    )


def _beside(stage: Stage, shape: Shape, work: Work, setting: Setting) -> dict[str, float]:
    """What lies in memory beside the model that trains."""
    whole, name = 4.0 * shape.total, stage.type.name
    reference = whole / setting.ranks if setting.sharding == "full" else whole  # TRL divides it as the model
    found: dict[str, float] = {}
    section = stage.sections.get("regularize")
    average = setting.on_cpu and getattr(section, "average_with_parent", 0)  # its copy lies in the host's memory
    if (getattr(section, "l2_to_parent", 0) or average) and stage.adapter is None:
        found["parent_copy"] = whole
    pairwise = name in ("dpo", "kto") and not option(stage, "precompute_ref_log_probs") and stage.adapter is None
    if pairwise and "precompute_ref_log_probs" in stage.trainer:
        found["reference"] = reference
    if name == "distill":
        found["teacher"] = whole
    if name not in BY_REWARDS:
        return found
    if option(stage, "beta") and stage.adapter is None:
        found["reference"] = reference
    if stage.sections["rewards"].model:
        found["reward_model"] = whole  # as large as the policy, for want of its own shape
    if name == "ppo" and option(stage, "critic") != "head":
        found["critic"] = 4 * whole  # weights, gradients, two moments
    found["kv_cache"] = kv_cache(shape, rollout_rows(stage, work), work.length, setting.width)
    return found


def as_json(quote: Quote) -> dict[str, Any]:
    """All numbers: FLOPs, seconds, USD, bytes."""
    shape, trained, work = quote.shape, quote.trained, quote.work
    total = sum(quote.flops.values()) if quote.flops else None
    return {
        "parameters": shape and shape.total,
        "trainable": trained and trained.count(shape),
        "embedding": shape and shape.embedding,
        "parameters_by_part": shape and shape.parts(),
        "steps": work.steps,
        "rows": work.rows,
        "tokens": work.tokens and round(work.tokens),
        "exact": work.exact,
        "batch_rows": work.rows_per_step,
        "batch_tokens": work.tokens_per_step,
        "per_device_train_batch_size": work.per_device,
        "gradient_accumulation_steps": work.accumulation,
        "flops": total,
        "flops_by_part": quote.flops,
        "device": quote.devices.label,
        "utilisation": quote.devices.utilisation,
        "dtype": quote.dtype,
        "sharding": quote.sharding,
        "seconds": quote.seconds,
        "dollars": quote.devices.cost(quote.seconds) if quote.seconds else None,
        "memory": quote.memory and quote.memory.as_json(),
        "largest_per_device_train_batch_size": quote.largest,
        "disk": quote.disk and round(quote.disk),
        "unknown": list(quote.unknown),
    }
