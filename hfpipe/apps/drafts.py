"""A recipe while its figures are settled: written, quoted by the planner, and written again, until every stage fits its device."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfpipe.apps.materials import Material
from hfpipe.apps.recipe_text import pipeline_text, stage_text
from hfpipe.config import load_recipe
from hfpipe.errors import UserError
from hfpipe.plan.devices import Devices
from hfpipe.plan.quote import Quote, quote_stage
from hfpipe.plan.scaling import TOKENS_PER_PARAMETER
from hfpipe.plan.shapes import Shape
from hfpipe.plan.sizing import SMALL, batch_tokens, power_of_two
from hfpipe.progress import duration, quantity
from hfpipe.sections import Recipe
from hfpipe.stages import stage_types

_PASS, _PASS_CPU = 32_768, 4_096  # tokens: more in one pass gains no speed
_PAIRS, _SMALL_PAIRS = 32, 16  # of a step
_LEAST_STEPS = 50  # of a stage with few rows
_TUNING_TOKENS = {"midtrain": 50e6, "sft": 20e6}  # at the most, where rows are not counted
_PAIRED_STEPS = 1000


@dataclass
class Choice:
    """What was settled for one stage."""

    steps: int | None  # trainer.max_steps; None: epochs
    checkpointing: bool
    rows: int = 1  # of a pass
    accumulation: int = 1
    quote: Quote | None = None  # of the stage as it is written


@dataclass
class Draft:
    """`config` is that of a model from scratch, `origin` the model that is started from instead."""

    name: str
    command: str
    devices: Devices
    shape: Shape
    material: Material
    stages: list[str]
    config: dict[str, Any] = field(default_factory=dict)
    tokens: float = 0.0  # of pretraining
    bound: bool = False  # they are what the text there is holds
    origin: str | None = None
    needs_template: bool = False
    adapter: bool = False
    sharded: bool = False
    choices: dict[str, Choice] = field(default_factory=dict)
    note: str | None = None  # of a budget that does not hold

    @property
    def params(self) -> int:
        return self.shape.total

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return min(self.shape.max_positions or 2048, 4096)

    def row_length(self, name: str) -> int:
        return self.material.text_length(self.length) if name == "pretrain" else self.length

    def write(self, folder: Path, stages: list[str] | None = None) -> Recipe:
        """The recipe's files, with no more stages than these; and the recipe that they are."""
        draft = dataclasses.replace(self, stages=stages or self.stages)
        (folder / "pipeline.yaml").write_text(pipeline_text(draft), encoding="utf-8")
        for name in draft.stages:
            (folder / f"{name}.yaml").write_text(stage_text(draft, name), encoding="utf-8")
        return load_recipe(folder, stage_types())

    def settle(self, folder: Path, seconds: float | None) -> Recipe:
        """Choose what fits, and with a budget of `seconds` let pretraining take what the later stages leave, at least half.

        Raises:
            UserError: there is no way to fit it on the devices.
        """
        trained = [name for name in self.stages if name != "tokenizer"]
        # With nothing of the model's own text to replay, an adapter: it learns less and forgets less (arXiv:2405.09673).
        adapters = [False] if self.config else [False, True] if self.material.replay else [True]
        ways = [(adapter, False) for adapter in adapters] + [(adapters[0], True)] * (self.devices.count > 1)
        for self.adapter, self.sharded in ways:
            if all(self._settle(folder, name) for name in trained):
                break
        else:
            raise UserError(
                f"{quantity(self.params)} parameters do not train on {self.devices.label}: not one row fits into "
                f"{self.devices.memory:.0f} GB. Give more devices, such as --device h100x8, or fewer parameters."
            )
        if seconds:
            first = self.choices["pretrain"]
            later = sum(choice.quote.seconds or 0 for choice in self.choices.values() if choice is not first)
            if later > seconds / 2:
                self.note = (
                    f"the budget does not hold: the later stages take about {duration(later)} of {duration(seconds)}, and "
                    f"pretraining half of it, in all {duration(later + seconds / 2)}. Give more, or fewer --stages"
                )
            share = max(seconds - later, seconds / 2) / first.quote.seconds
            first.steps = max(int(first.steps * (min(share, 1) if self.bound else share)), 1)
            self.tokens = first.steps * first.quote.work.tokens_per_step
            first.quote = self._quote(folder, "pretrain")
        return self.write(folder)

    def _settle(self, folder: Path, name: str) -> bool:
        """The largest pass that fits, and the batch, of one stage; False where nothing fits."""
        for checkpointing in (False, True):
            self.choices[name] = choice = Choice(self._steps(name, 1), checkpointing)
            quote = self._quote(folder, name)
            if quote.largest != 0:
                break
        else:
            return False
        each = power_of_two(self._rows(name, quote) / self.devices.count)
        most = (_PASS_CPU if self.devices.key == "cpu" else _PASS) / quote.work.length
        choice.rows = power_of_two(min(each, most, quote.largest or each))
        if name == "kto":
            choice.rows = max(choice.rows, 2)  # TRL holds each answer against another one's
        choice.accumulation = max(each // choice.rows, 1)
        choice.steps = self._steps(name, choice.rows * choice.accumulation * self.devices.count)
        choice.quote = self._quote(folder, name)
        return True

    def _rows(self, name: str, quote: Quote) -> float:
        """Rows of a step that are best."""
        epochs, rows = quote.work.epochs or 1, quote.work.rows
        if name == "pretrain":
            return batch_tokens(self.params, self.tokens) / quote.work.length
        best = float(_SMALL_PAIRS if self.params < SMALL else _PAIRS)
        if name in _TUNING_TOKENS:
            tokens = rows * epochs * quote.work.length if rows else _TUNING_TOKENS[name]
            best = batch_tokens(self.params, tokens) / quote.work.length
        return min(best, rows * epochs / _LEAST_STEPS) if rows else best

    def _steps(self, name: str, rows: int) -> int | None:
        """Steps of a stage whose tokens are given, or whose rows nobody has counted yet; None: its epochs say it."""
        if name == "pretrain":
            return max(round(self.tokens / (rows * self.row_length(name))), 1)
        if self.material.counted:
            return None
        tokens = min(_TUNING_TOKENS.get(name, 0), self.params * TOKENS_PER_PARAMETER / 25)
        return round(tokens / (rows * self.length)) or _PAIRED_STEPS

    def _quote(self, folder: Path, name: str) -> Quote:
        recipe = self.write(folder, [stage for stage in self.stages if stage in self.choices or stage == "tokenizer"])
        return quote_stage(recipe, recipe.stages[name], None, self.devices, full_rows=True)
