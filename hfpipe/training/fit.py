"""The run that every stage shares: upstream's arguments, checkpoints, progress, the weights on disk."""

from __future__ import annotations

import copy
import importlib
import time
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DynamoBackend
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.optimization import get_scheduler

from hfpipe import artifact, upstream
from hfpipe.adapter_types import checkpointing_off
from hfpipe.annealing import anneals
from hfpipe.errors import UserError
from hfpipe.run_folder import find_checkpoints
from hfpipe.training.adapters import save_adapted
from hfpipe.training.anneal import carry_state, keep_state, last_rate, optimizer_section, set_schedule
from hfpipe.training.checkpoints import check_space, keep_whole, set_damaged_aside
from hfpipe.training.compiled import compile_blocks
from hfpipe.training.guards import Guard
from hfpipe.training.hardware import choose_bf16, has_accelerator
from hfpipe.training.optim import build_muon
from hfpipe.training.order import ByLength, groups_by_length, lengths
from hfpipe.training.regularize import hold_to_parent, is_sharded, refuse_sharded, spread_rates

if TYPE_CHECKING:
    from hfpipe.sections import Optimizer, Stage
    from hfpipe.training.job import Job, Progress
    from hfpipe.training.prepare import Prepared


def build_args(job: Job, config_class: type, progress: Progress, **ours: Any) -> Any:
    """Upstream's argument object from the recipe's `trainer` section and what hfpipe sets itself.

    Raises:
        UserError: upstream refuses the values; its words are passed on.
    """
    bf16, reason = choose_bf16()
    if not job.stage.trainer.get("fp16"):
        wanted = job.stage.trainer.get("bf16", bf16)
        progress.note(reason if wanted == bf16 else f"bf16: {wanted}, as the recipe says")
    if checkpointing_off(job.stage):
        progress.note(f"activation_checkpointing: false, since {job.stage.adapter.type} keeps its tokens in the cache")
    args = construct_args(job.stage, str(job.checkpoints), job.recipe.pipeline.seed, **ours)
    assert isinstance(args, config_class)
    if args.n_gpu > 1:  # upstream would cut each batch for threads of this process, beside what was planned
        progress.note(
            f"{args.n_gpu} devices are there and one is used: launch.processes: {args.n_gpu} in pipeline.yaml takes them all"
        )
        args._n_gpu = 1
    return args


def construct_args(stage: Stage, output_dir: str, seed: int, **ours: Any) -> Any:
    """The stage's upstream argument object; nothing is loaded and nothing is written."""
    if missing := upstream.missing_reports(stage.trainer.get("report_to", "none"), f"{stage.file}: trainer.report_to"):
        raise UserError(missing)
    module, _, name = str(stage.type.trainer).rpartition(".")
    config_class = getattr(importlib.import_module(module), name)
    given = copy.deepcopy(stage.trainer)
    if not given.get("fp16"):
        given.setdefault("bf16", choose_bf16()[0])
    defaults = {"report_to": "none", "save_total_limit": 2, "logging_steps": 10, "logging_first_step": True}
    defaults["logging_nan_inf_filter"] = False  # upstream's default logs a NaN as 0.0
    if checkpointing_off(stage):
        defaults["activation_checkpointing"] = False
    if groups_by_length(stage):  # by a sampler of ours, in `fit`
        given["train_sampling_strategy"] = "sequential"
    managed = {
        "output_dir": output_dir,
        "seed": seed,
        "use_cpu": given.pop("use_cpu", not has_accelerator()),
        "disable_tqdm": True,
    }
    try:
        return config_class(**{**defaults, **given, **managed, **ours})
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise UserError(f"{stage.file}: trainer is refused by {stage.type.trainer}: {error}") from error


def try_optimizer(stage: Stage, args: Any) -> None:
    """Build the optimizer and the schedule for one small matrix: upstream looks at most of their options only then.

    Raises:
        UserError: upstream refuses the values, or a package that they need is not installed.
    """
    model = torch.nn.Linear(2, 2)
    if anneals(stage):
        set_schedule(args, 10)
    try:
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        optimizer = optimizer_class(options.pop("params", model.parameters()), **options)
        schedule = get_scheduler(
            args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=args.get_warmup_steps(10),
            num_training_steps=10,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
        for _ in range(0 if args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy") else 9):
            optimizer.step()
            schedule.step()
    except (ValueError, TypeError, KeyError, ImportError, AssertionError) as error:
        raise UserError(f"{stage.file}: trainer's optimizer or schedule is refused upstream: {error}") from error


def try_passes(stage: Stage, args: Any) -> None:
    """Load one row and pass it through one small matrix as training would: upstream looks at these options only then.

    Raises:
        UserError: upstream refuses the values.
    """
    try:
        DataLoader(
            [0],
            num_workers=args.dataloader_num_workers,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
        )
        given = args.gradient_checkpointing_kwargs or {}
        if not isinstance(given, dict):
            raise ValueError(f"activation_checkpointing_kwargs = {given!r}: expected a mapping")
        if args.gradient_checkpointing:
            known = {key: value for key, value in given.items() if key != "selective"}  # TRL's own
            checkpoint(torch.nn.Linear(2, 2), torch.ones(1, 2), **{"use_reentrant": False, **known})
        if args.torch_compile_backend:
            DynamoBackend(args.torch_compile_backend.upper())
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{stage.file}: trainer is refused upstream: {error}") from error


def build_collator(job: Job, model: Any, tokenizer: Any, *, packing: bool) -> Any:
    """The collator for the stage's rows; UserError where the model cannot keep packed documents apart."""
    from hfpipe.training.collate import collator_for

    try:
        return collator_for(model, tokenizer, packing=packing)
    except ValueError as error:
        raise UserError(
            f"{job.stage.file}: {error}, because it takes no notice of position_ids. "
            "Set trainer.packing: false, or take a model type that does (llama, qwen3, mistral, gpt2 ...)."
        ) from None


def fit(job: Job, trainer: Trainer, data: Prepared, progress: Progress) -> dict[str, Any]:
    """Train from the last checkpoint if there is one, and put weights, tokenizer and metrics into the stage's folder.

    Returns:
        Metrics of the training: `train_loss`, `steps`, `tokens`, `train_runtime_s`, `tokens_per_s`, `resumed_from_step`,
        `last_rate`.
    """
    keep_whole(trainer)
    if trainer.is_world_process_zero():
        for text in set_damaged_aside(job.checkpoints):
            progress.note(text)
    trainer.accelerator.wait_for_everyone()
    newest = next(iter(find_checkpoints(job.checkpoints)), None)  # in every process
    section = optimizer_section(job)
    _set_optimizer(job, trainer, section)
    if trainer.is_world_process_zero() and job.rehearsal is None:
        check_space(trainer, job.checkpoints, f"{job.stage.file}")
    if (annealing := anneals(job.stage)) and annealing.carry_optimizer and job.rehearsal is None:
        carry_state(job, trainer, progress)
    if groups_by_length(job.stage):
        sizes = lengths(data.train, job.stage.model.share_prefixes)
        sampler = ByLength(sizes, _rows_per_step(trainer.args), trainer.args.seed)
        trainer._get_train_sampler = lambda dataset=None: sampler
    held = hold_to_parent(job, trainer, progress)
    compile_blocks(job, trainer, progress)
    guard = Guard(job, trainer, progress, data.report.get("turns", ()))
    trainer.add_callback(_Watch(job, progress, data.tokens_per_row))
    if job.rehearsal:
        job.rehearsal.tokens_per_row = data.tokens_per_row
        trainer.add_callback(job.rehearsal)
    if newest:
        progress.note(f"resumed from {newest.name}")
    result = trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    resumed = int(newest.name.rpartition("-")[2]) if newest else 0
    if newest and trainer.state.global_step < resumed:
        raise RuntimeError(f"training ended at step {trainer.state.global_step}, before its checkpoint's {resumed}")
    progress.tell("doing", text="writing weights")
    if held:
        held.average(job.stage.sections["regularize"].average_with_parent)
    save(job, trainer, progress)
    if section and section.keep_state and trainer.is_world_process_zero():
        keep_state(trainer, job.work)
    steps, seconds = trainer.state.global_step, result.metrics["train_runtime"]
    tokens = data.tokens_per_row * steps * _rows_per_step(trainer.args)
    metrics = {
        "train_loss": _mean_loss(trainer.state.log_history),
        "steps": steps,
        "tokens": round(tokens),
        "train_runtime_s": round(seconds, 2),
        "tokens_per_s": round(tokens * (steps - resumed) / max(steps, 1) / max(seconds, 1e-9)),
        "resumed_from_step": resumed,
        "last_rate": last_rate(trainer, section),
        **guard.results(),
    }
    if trainer.is_world_process_zero():
        # Of packed rows TRL counts what its own collator would give; `tokens` is ours.
        history = [
            {name: value for name, value in line.items() if name != "num_tokens"}
            for line in trainer.state.log_history
            if "train_runtime" not in line
        ]
        artifact.write_jsonl(job.work / "metrics.jsonl", history)
    return metrics


def save(job: Job, trainer: Trainer, progress: Progress) -> None:
    """Weights, configuration and tokenizer as an ordinary model folder, an adapter as `hfpipe.training.adapters` has it."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.is_fsdp_enabled:  # whatever form its checkpoints have
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    if job.stage.adapter is not None:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if is_sharded(trainer) else None
        if trainer.is_world_process_zero():
            save_adapted(job, model, trainer.processing_class, progress, state)
    else:
        model.config.use_cache = True
        trainer.save_model(str(job.work))
    if trainer.is_world_process_zero():
        trainer.processing_class.save_pretrained(str(job.work))
        (job.work / "training_args.bin").unlink(missing_ok=True)  # a pickle: nothing of it is needed again


def scores_before(trainer: Trainer, progress: Progress) -> bool:
    """Whether the trainer can evaluate already: what is divided among devices is made ready by the training's beginning."""
    if is_sharded(trainer):
        progress.note("held-out rows are not scored before training: the model is divided among devices when it begins")
    return not is_sharded(trainer)


def _mean_loss(history: list[dict[str, Any]]) -> float | None:
    """Over all steps, by the log: upstream's own mean leaves out those before a resumption."""
    logged = [(line["step"], line["loss"]) for line in history if "loss" in line]
    lengths = [step - before for (step, _), before in zip(logged, [0, *(step for step, _ in logged)], strict=False)]
    total = sum(loss * length for (_, loss), length in zip(logged, lengths, strict=True))
    return total / sum(lengths) if logged else None


def _rows_per_step(args: Any) -> int:
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def _set_optimizer(job: Job, trainer: Trainer, section: Optimizer | None) -> None:
    """Give the trainer ours where the stage asks for one; now, because an adapter is in place only now."""
    decay, annealing = job.stage.sections["regularize"].layerwise_lr_decay, anneals(job.stage)
    if decay < 1:
        refuse_sharded(job, trainer)
    if section is not None and section.type is not None:
        trainer.optimizer = build_muon(trainer.model, section, trainer.args)
    elif decay < 1 or (annealing and annealing.carry_optimizer):
        trainer.create_optimizer()
    else:
        return
    if decay < 1:
        spread_rates(trainer.optimizer, trainer.model, decay, f"{job.stage.file}")
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    left_out = [name for name, p in trainer.model.named_parameters() if p.requires_grad and id(p) not in held]
    assert not left_out, f"parameters that no optimizer trains: {left_out[:5]}"


class _Watch(TrainerCallback):
    """Reports steps, loss, speed and time left."""

    def __init__(self, job: Job, progress: Progress, tokens_per_row: float):
        self.file, self.progress, self.tokens_per_row = job.stage.file, progress, tokens_per_row
        self.loss: float | None = None
        self.began = self.told = time.monotonic()
        self.first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.monotonic()
        self.first_step = state.global_step
        warmup = args.get_warmup_steps(state.max_steps)
        if warmup >= state.max_steps:
            raise UserError(
                f"{self.file}: trainer.warmup_steps takes {warmup} of {state.max_steps} steps, so the learning rate would "
                "never leave 0 or reach its height. Give more rows or epochs, a smaller batch, or warmup_steps: 0."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.monotonic()
        if now - self.told < 0.5 and state.global_step < state.max_steps:
            return
        self.told = now
        done = state.global_step - self.first_step
        per_step = (now - self.began) / max(done, 1)
        rows = _rows_per_step(args)
        if state.is_world_process_zero:
            self.progress.tell(
                "step", step=state.global_step, total=state.max_steps, loss=self.loss,
                tokens_per_s=self.tokens_per_row * rows / per_step, left_s=per_step * (state.max_steps - state.global_step),
            )  # fmt: skip

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.loss = (logs or {}).get("loss", self.loss)
