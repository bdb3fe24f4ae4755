"""Checkpoints that are whole or absent: written beside, hashed, synced to disk, renamed; read back only if every hash holds."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from hfpipe import artifact
from hfpipe.errors import UserError
from hfpipe.run_folder import find_checkpoints

if TYPE_CHECKING:
    from transformers import Trainer

WRITING = "writing"  # beside the checkpoints: the one that is being written
_REPLACED = "replaced-"
_TWO_MOMENTS = ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_apex_fused")


def keep_whole(trainer: Trainer) -> None:
    """Have a trainer of upstream's write every checkpoint in this way; its `save_total_limit` counts whole ones."""
    upstream_save, args, wait = trainer._save_checkpoint, trainer.args, trainer.accelerator.wait_for_everyone

    def save(model: Any, trial: Any) -> None:
        folder, limit = Path(args.output_dir), args.save_total_limit
        args.output_dir, args.save_total_limit = str(folder / WRITING), None
        try:
            upstream_save(model, trial)
        except BaseException:
            shutil.rmtree(folder / WRITING, ignore_errors=True)  # on a full disk it would go on being in the way
            raise
        finally:
            args.output_dir, args.save_total_limit = str(folder), limit
        wait()
        made, state = folder / WRITING / f"checkpoint-{trainer.state.global_step}", trainer.state
        if state.best_model_checkpoint == str(made):
            state.best_model_checkpoint = str(folder / made.name)
            if args.should_save:
                state.save_to_json(str(made / "trainer_state.json"))
        if args.should_save:
            _put_in_place(made, folder)
            # By number, not by time as upstream does: clocks are set back, and copied folders are as old as they like.
            rotate_checkpoints(str(folder), limit, trainer.state.best_model_checkpoint, use_mtime=False)
        wait()

    trainer._save_checkpoint = save
    # TRL would make its own card with each checkpoint; the stage's comes at its end.
    trainer.create_model_card = lambda *args, **options: None
    trainer.add_callback(_Resumable())


def check_space(trainer: Trainer, folder: Path, where: str) -> None:
    """UserError where the disk of `folder` has less room than the checkpoints to come and the result will take."""
    folder.mkdir(parents=True, exist_ok=True)
    needed, kept = space_needed(trainer)
    earlier = (p for checkpoint in find_checkpoints(folder) for p in checkpoint.rglob("*"))
    there = sum(p.stat().st_size for p in earlier if p.is_file())  # they give way to those to come
    free = shutil.disk_usage(folder).free + there
    if needed > free:
        raise UserError(
            f"{where}: this stage needs {_size(needed)} or more on the disk of {folder} ({kept} checkpoints of weights and "
            f"optimizer, and the result), and {_size(free)} are free. Free some space, lower trainer.save_total_limit, "
            "or give --out on another disk."
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def space_needed(trainer: Trainer) -> tuple[int, int]:
    """Bytes that training and its result will take at the least, and how many checkpoints are among them."""
    args, critic = trainer.args, getattr(trainer, "critic", None)  # PPO's is kept and optimized beside the policy
    parameters = [*trainer.model.parameters(), *(critic.parameters() if critic else ())]
    weights = sum(p.numel() * p.element_size() for p in parameters)
    trained = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    saved = trained if hasattr(trainer.model, "peft_config") else weights
    steps = args.max_steps
    if steps <= 0:
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        steps = math.ceil(len(trainer.train_dataset) / batch * args.num_train_epochs)
    every = args.save_steps if args.save_steps >= 1 else max(1, math.ceil(args.save_steps * steps))
    # Upstream writes one at the last step too, and the oldest goes when the newest is whole.
    by_strategy = {"no": 0, "best": 1, "epoch": math.ceil(args.num_train_epochs)}
    written = by_strategy.get(args.save_strategy.value, math.ceil(steps / every))
    limit = max(
        args.save_total_limit or 0, 2 if args.eval_strategy.value != "no" else 0
    )  # the best and the newest stay
    kept = min(written, limit + 1) if args.save_total_limit else written
    return (weights + saved if saved < weights else weights) + kept * (saved + _optimizer_state(trainer, trained)), kept


def _optimizer_state(trainer: Trainer, trained: int) -> int:
    """Bytes that the optimizer keeps for `trained` bytes of parameters, at the least."""
    if trainer.optimizer is None:  # upstream makes it when training begins
        return 2 * trained if trainer.args.optim.value in _TWO_MOMENTS else 0
    groups = trainer.optimizer.param_groups
    return sum((2 if "betas" in g else 1) * p.numel() * p.element_size() for g in groups for p in g["params"])


def _put_in_place(made: Path, folder: Path) -> None:
    seal(made)
    if (place := folder / made.name).exists():  # an evaluation after it was written found it the best: written again
        place.rename(folder / f"{_REPLACED}{made.name}")
    made.rename(place)
    artifact.sync(folder)
    shutil.rmtree(folder / WRITING, ignore_errors=True)
    shutil.rmtree(folder / f"{_REPLACED}{made.name}", ignore_errors=True)


def seal(checkpoint: Path) -> None:
    """Put a checkpoint's files on the disk itself, and beside them what they must look like."""
    artifact.write_record(checkpoint / artifact.CHECKSUMS_FILE, artifact.checksums(checkpoint))
    artifact.sync_tree(checkpoint)


def set_damaged_aside(folder: Path) -> list[str]:
    """What was found wrong with the checkpoints; afterwards all of them are as they were written.

    Damaged ones are kept as `damaged-checkpoint-N` until the stage is finished.
    """
    told = []
    cut = sorted(p.name for p in (folder / WRITING).glob("checkpoint-*"))
    if cut:
        told.append(f"{cut[-1]} was cut off while it was written: the one before it is used")
    shutil.rmtree(folder / WRITING, ignore_errors=True)
    for old in folder.glob(f"{_REPLACED}*"):  # killed while it was replaced
        if (place := folder / old.name.removeprefix(_REPLACED)).exists():
            shutil.rmtree(old)
        else:
            old.rename(place)
    for path in find_checkpoints(folder):
        reason = artifact.damage(path, artifact.read_record(path / artifact.CHECKSUMS_FILE))
        if reason is None:
            continue
        aside = folder / f"damaged-{path.name}"
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        told.append(f"{path.name} is damaged ({reason}): set aside as {aside.name}")
    return told


class _Resumable(TrainerCallback):
    """What upstream leaves out of a checkpoint, so that the curve and the end of a resumed run are the same."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The losses since the last log are not in a checkpoint: log them before it is written. And how the last step was.
        control.should_log = control.should_log or control.should_save or state.global_step >= state.max_steps

    on_epoch_end = on_step_end

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Upstream forgets the best checkpoint where its path of old, before a move, leads nowhere.
        best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
        if state.best_global_step and best.is_dir():
            state.best_model_checkpoint = str(best)
