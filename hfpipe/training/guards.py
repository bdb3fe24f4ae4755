"""Guards while a stage trains: a loss that diverges is gone back from, overfitting is stopped, the first batch is looked at.

To go back is to begin the stage's training anew, from a checkpoint or its parent, with some steps left out and a lower
learning rate. Which, is kept in `rollbacks.json` beside the checkpoints, so that a killed attempt does the same.
"""

from __future__ import annotations

import gc
import itertools
import math
import shlex
import shutil
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from hfpipe import artifact
from hfpipe.run_folder import find_checkpoints
from hfpipe.training.first_batch import check_first_batch
from hfpipe.training.rehearse import pass_longest, rehearse

if TYPE_CHECKING:
    from transformers import Trainer

    from hfpipe.training.job import Job, Progress

ROLLBACKS_FILE = "rollbacks.json"
_STATE = "guards"  # in a checkpoint's trainer_state.json, under `stateful_callbacks`
_WINDOW = 50  # steps whose median is the usual loss
# A loss near 0 may triple and mean nothing: a sure spike is this much higher too (nats), and than what has come this often of
# late by this factor: rows of a rare kind come again and again. Until there are losses enough for a median, the highest one
# is taken instead, with a wider berth; and what is read then may simply be new to the model, which says no more of it than
# chance would. Of pairs and judgements one false label outweighs all others: there it takes so many
# in a row.
_ENOUGH, _RISE, _ABOVE, _AGAIN, _EARLY_RISE, _IN_A_ROW = 10, 1.0, 1.5, 3, 3.0, 3


class Diverged(FloatingPointError):
    """The training has diverged, and going back is not allowed or has not helped."""


class GoBack(Exception):
    """Asks for the stage's training to begin anew from where `rollbacks.json` says."""


def train_guarded(train: Callable[[Job, Progress], dict[str, Any]], job: Job, progress: Progress) -> dict[str, Any]:
    """A stage's `train`, begun anew as often as it diverges and may go back."""
    while True:
        try:
            return train(job, progress)
        except GoBack as back:
            progress.note(str(back))
        gc.collect()  # the model of that attempt, before there is another


def read_rollbacks(job: Job) -> list[dict[str, Any]]:
    """What this stage has gone back from so far: `step`, `why`, `to`, `skipped` [first, last], `lr_factor`, `text`."""
    return (artifact.read_json(job.checkpoints / ROLLBACKS_FILE) or {}).get("rollbacks", [])


def spike(loss: float, losses: list[float], times: float, rule: str = "sure", chance: float = 0.0) -> str | None:
    """Why `loss` is no usual one after `losses` (nats, the oldest first), by `guards.loss_spike`; None where it is.

    Args:
        rule: of `guards.spike_rule`; `plain` asks for no more than so many times the median.
        chance: the loss of a guess among all words.
    """
    if not losses:
        return None
    enough = len(losses) >= _ENOUGH or rule == "plain"
    usual, rise = (statistics.median(losses), _RISE) if enough else (max(losses), _EARLY_RISE)
    late = sorted(losses[_ENOUGH:], reverse=True)  # those of the first steps aside, which are high
    again = late[_AGAIN - 1] if len(late) >= _AGAIN else 0.0
    least = times * usual if rule == "plain" else max(times * usual, usual + rise, _ABOVE * again)
    least = least if enough else max(least, chance)
    if loss <= least:
        return None
    what = f"{'a median of' if enough else 'at most'} {usual:.4g} in the {len(losses)} steps before it"
    return f"its loss is {loss:.4g}, against {what} (guards.loss_spike: {times:g})"


class Guard(TrainerCallback):
    """Looks at every optimizer step of a trainer of upstream's, and at its evaluations.

    Where a stage has no `guards` section (reinforcement, whose rollouts no step can be taken out of) a loss or gradient
    that is not finite ends it at once.
    """

    def __init__(self, job: Job, trainer: Trainer, progress: Progress, turns: Sequence[int] = ()):
        self.job, self.trainer, self.progress, self.turns = job, trainer, progress, turns
        self.section = job.stage.sections.get("guards")
        self.rollbacks = read_rollbacks(job)
        self.overfitting: dict[str, Any] | None = None
        self.skipped = {s for back in self.rollbacks for s in range(back["skipped"][0], back["skipped"][1] + 1)}
        of_words = job.stage.type.rows in ("text", "messages")
        self.chance = math.log(len(trainer.processing_class)) if of_words else 0.0
        self.loss: Any = 0.0  # of the step in progress, of this process
        self.factor, self.rates = 1.0, []
        # The first batch is still to be looked at; one of `plan --rehearse` may be made up.
        self.first = self.section is not None and not self.rollbacks and job.rehearsal is None
        args = trainer.args
        # A best checkpoint takes checkpoints; a recipe that calls something else the best keeps that, and is not stopped.
        self.keeps_best = (
            self.section is not None
            and self.section.overfit_patience is not None
            and "no" not in (args.eval_strategy.value, args.save_strategy.value)
            and args.metric_for_best_model in (None, "loss", "eval_loss")
            and not args.greater_is_better
        )
        if self.keeps_best:
            args.metric_for_best_model, args.greater_is_better = args.metric_for_best_model or "loss", False
        self._wrap()
        trainer.add_callback(self)

    def results(self) -> dict[str, Any]:
        """What the guards did, for the stage's metrics."""
        found = {"rollbacks": self.rollbacks, "overfitting": self.overfitting}
        return {name: value for name, value in found.items() if value}

    def _wrap(self) -> None:
        """Upstream has no event with a step's loss and gradient, nor one that leaves a step out."""
        trainer = self.trainer
        step, clip, norm = trainer.training_step, trainer._clip_grad_norm, trainer._get_grad_norm
        rate = trainer._get_learning_rate

        def training_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self._skips():  # in the log such a step stands with the usual loss
                usual = self._usual() / trainer.current_gradient_accumulation_steps
                return torch.tensor(usual, device=trainer.args.device)
            if self.first and trainer.state.global_step == 0:
                check_first_batch(self.job, trainer.processing_class, inputs, self.progress)
            self.first = False
            loss = step(model, inputs, *args, **kwargs)
            self.loss = self.loss + loss
            return loss

        def get_grad_norm(model: Any, grad_norm: Any = None) -> Any:
            if self._skips():
                return 0.0
            found = norm(model, grad_norm=grad_norm)
            self._look(found)
            return found

        trainer.training_step, trainer._get_grad_norm = training_step, get_grad_norm
        trainer._clip_grad_norm = lambda model: torch.zeros(()) if self._skips() else clip(model)
        trainer._get_learning_rate = lambda: rate() * self.factor

    # --- a step ---

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.loss = 0.0
        if state.global_step in self.turns:  # another phase: what was usual until now says nothing of it
            self.kept["losses"].clear()
        self.factor = math.prod(back["lr_factor"] for back in self.rollbacks if state.global_step >= back["to"])
        self.rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] *= self.factor

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._skips():  # accelerate's optimizer steps only where gradients are in sync
            self.trainer.accelerator.gradient_state._set_sync_gradients(False)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        for group, rate in zip(optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate  # the schedule's own, which it reckons from

    def _skips(self) -> bool:
        return self.trainer.state.global_step + 1 in self.skipped

    def _usual(self) -> float:
        losses = self.kept["losses"]
        return statistics.median(losses) if losses else 0.0

    def _look(self, grad_norm: Any) -> None:
        """Judge the step in progress before it changes a weight. This waits for the device, once a step."""
        step = self.trainer.state.global_step + 1
        loss = float(self.trainer.accelerator.reduce(self.loss, "mean"))
        # Under fp16 a gradient overflows now and then; its scaler skips that step.
        norm = 0.0 if grad_norm is None or self.trainer.args.fp16 else float(grad_norm)
        if not math.isfinite(loss):
            self._go_back(step, f"its loss is {loss}")
        if not math.isfinite(norm):
            self._go_back(step, f"its gradient is {norm}")
        losses, high, since = self.kept["losses"], self.kept["high"], self.kept["since"]
        section = self.section
        # From easy to hard rows the loss jumps by plan.
        watched = section and section.loss_spike is not None and not self.job.stage.data.curriculum
        if problem := watched and spike(loss, losses, section.loss_spike, section.spike_rule, self.chance):
            high.append(loss)
            uneven = section.spike_rule == "sure" and self.job.stage.type.rows in ("preference", "unpaired")
            if len(high) == (_IN_A_ROW if uneven else 1):
                self._go_back(step, problem, high=len(high))
        else:
            losses += [*high, loss]
            high.clear()
            del losses[:-_WINDOW]
        since[:] = [since[0] + loss, since[1] + 1]

    def _go_back(self, step: int, problem: str, high: int = 0) -> None:
        """Set aside what was saved since the step before, write down what to leave out, and have the stage begin anew.

        The step before goes too: its update may be what spoilt this one. Where the training got no further than the last
        time, the checkpoint that it went back to is not trusted any more, but for the oldest one.

        Args:
            high: steps, this one the last, whose loss was too high; 0: it is no number.
        """
        told = f"step {step} has diverged: {problem}"
        section, past = self.section, self.rollbacks
        if section is None or len(past) >= section.max_rollbacks:
            history = "".join(f"\n  {back['text']}" for back in past)
            went = f" It has gone back {len(past)} times (guards.max_rollbacks):{history}\n" if past else " "
            raise Diverged(
                f"{told}.{went}Lower trainer.learning_rate tenfold, lengthen trainer.warmup_steps, or look at the rows that "
                f"are read there: hfpipe inspect {shlex.quote(str(self.job.stage.file))}."
            )
        first = max(step - (high or 1), 1)
        stuck = past and step <= past[-1]["skipped"][1] + 1
        newest = min(first - 1, past[-1]["to"] - 1) if stuck else first - 1
        numbers = {int(p.name.rpartition("-")[2]): p for p in find_checkpoints(self.job.checkpoints)}
        oldest = min((number for number in numbers if number < first), default=0)
        to = max((number for number in numbers if number <= newest), default=oldest if high else 0)
        after = [path for number, path in sorted(numbers.items()) if number > to]
        place = f"checkpoint-{to}" if to else f"where the stage began ({self.job.stage.model.from_})"
        aside = f", with {', '.join(p.name for p in after)} set aside" if after else ""
        text = (
            f"{told}: back to {place}{aside}; steps {first} to {step} are left out and the learning rate is times "
            f"{section.lr_factor:g} from there"
        )
        back = {"step": step, "why": problem, "to": to, "skipped": [first, step], "lr_factor": section.lr_factor}
        self.trainer.accelerator.wait_for_everyone()  # all have seen the same checkpoints
        if self.trainer.is_world_process_zero():
            # In this order: killed between the two, the next attempt comes to the same step and the same decision.
            for path in after:
                shutil.rmtree(path.with_name(f"diverged-{path.name}"), ignore_errors=True)
                path.rename(path.with_name(f"diverged-{path.name}"))
            artifact.write_json(self.job.checkpoints / ROLLBACKS_FILE, {"rollbacks": [*past, {**back, "text": text}]})
        self.trainer.accelerator.wait_for_everyone()
        raise GoBack(text)

    # --- evaluations ---

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.kept = state.stateful_callbacks.setdefault(
            _STATE, {"losses": [], "high": [], "since": [0.0, 0], "evaluations": []}
        )
        if state.best_global_step and not (Path(args.output_dir) / f"checkpoint-{state.best_global_step}").is_dir():
            state.best_metric = state.best_global_step = None  # set aside: others may be the best now
        if self.first and self.section.rehearse and not state.global_step:
            rehearse(self.job, self.trainer, self.progress)
        elif self.section and self.job.stage.model.compile_blocks and self.job.rehearsal is None:
            pass_longest(self.job, self.trainer)  # what is compiled depends on the first length

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # An evaluation may turn out the best and be saved: the losses until then belong into its log.
        control.should_log = control.should_log or (self.keeps_best and control.should_evaluate)

    on_epoch_end = on_step_end

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        loss, (total, steps) = (metrics or {}).get("eval_loss"), self.kept["since"]
        if not self.keeps_best or not self.trainer.is_in_train or loss is None or not steps:
            return
        found: list[list[float]] = self.kept["evaluations"]  # [step, validation loss, training loss since the last one]
        found.append([state.global_step, loss, total / steps])
        self.kept["since"][:] = [0.0, 0]
        if state.best_metric is None or loss < state.best_metric:  # upstream notes it as the best right after this
            control.should_save = True
        rising = found[-1 - self.section.overfit_patience :]
        rose = len(rising) > self.section.overfit_patience and all(a[1] < b[1] for a, b in itertools.pairwise(rising))
        if not rose or rising[-1][2] >= rising[0][2]:
            return
        # A checkpoint of this step would go on beyond it when resumed.
        control.should_training_stop, control.should_save, args.load_best_model_at_end = True, False, True
        held_out = ", ".join(f"{one[1]:.4f}" for one in rising)
        text = (
            f"overfitting: validation loss rose {len(rising) - 1} times in a row ({held_out}) while training loss fell from "
            f"{rising[0][2]:.4f} to {rising[-1][2]:.4f}: stopped at step {state.global_step}; the result is that of step "
            f"{state.best_global_step}, the best, with validation loss {state.best_metric:.4f}"
        )
        self.overfitting = {
            "step": state.global_step,
            "best_step": state.best_global_step,
            "evaluations": found,
            "text": text,
        }
        self.progress.note(text)
