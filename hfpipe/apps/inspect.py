"""A row as the model will see it: its source, its roles, every token trained or not, what was neutralised, what is wrong."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfpipe.errors import UserError
from hfpipe.progress import quiet_imports
from hfpipe.training.first_batch import coloured, decode_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hfpipe.sections import Recipe
    from hfpipe.training.job import Job


@dataclass
class Inspected:
    """One row: `sides` holds its tokens as (text, id, trained), a list for a row and two for a pair."""

    number: int
    source: str
    place: str
    form: str
    roles: list[str]
    sides: dict[str, list[tuple[str, int, bool]]]
    neutralised: int
    problem: str | None = None
    difficulty: float | None = None
    phase: int | None = None
    reasoning_hidden: bool = False
    length: int = field(init=False)
    trained: int = field(init=False)

    def __post_init__(self) -> None:
        self.length = max(map(len, self.sides.values()), default=0)
        self.trained = sum(token[2] for tokens in self.sides.values() for token in tokens)

    def __str__(self) -> str:
        return _shown(self, colours=False)


def inspect_rows(job: Job) -> Iterator[Inspected]:
    """The rows of a stage's training sources, one source after the other, before they are packed and mixed.

    With a curriculum or phases: the rows that the stage trains on, packed, in the order in which it sees them.
    """
    from hfpipe.data.report import SourceReport
    from hfpipe.training.models import load_tokenizer
    from hfpipe.training.order import is_ordered
    from hfpipe.training.prepare import read_source

    stage = job.stage
    tokenizer = load_tokenizer(job)
    if is_ordered(stage.data):
        yield from _inspect_ordered(job, tokenizer)
        return
    max_length = stage.trainer.get("max_length") or getattr(
        stage.data, "max_length", getattr(stage.data, "max_prompt_length", 1024)
    )
    number = itertools.count(1)
    for source in stage.data.train:
        wanted = source.as_ or stage.type.rows or "text"
        report = SourceReport.of(source, "train")
        for place, row in read_source(source, report, wanted=wanted, job=job):
            yield _inspect(next(number), source.path, place, wanted, row, tokenizer, max_length)


def _inspect_ordered(job: Job, tokenizer: PreTrainedTokenizerBase) -> Iterator[Inspected]:
    from hfpipe.stages import stage_module
    from hfpipe.training.order import find_order

    form = job.stage.type.rows or "text"
    prepared = stage_module(job.stage.type.name).prepare(job, tokenizer)
    order = find_order(job, prepared) or range(len(prepared.train))
    for number, place in enumerate(order, 1):
        row = prepared.train[place]
        told = {name: row.get(name) for name in ("difficulty", "phase")}
        documents = len(row.get("seq_lengths") or [0])
        packed = f"{documents} packed" if documents > 1 else "1 alone"
        yield Inspected(
            number,
            job.stage.name,
            f"row {place + 1} of {len(prepared.train)}, {packed}",
            form,
            [],
            _sides(row, tokenizer),
            0,
            **told,
        )


def _inspect(
    number: int, source: str, place: str, wanted: str, row: dict, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Inspected:
    from hfpipe.data.report import SourceReport
    from hfpipe.training.encode import encode_rows

    report = SourceReport(source, "train", "train")
    # A longer limit than the stage's, so that a row that is too long is shown all the same.
    encoded = list(encode_rows([(place, row)], report, wanted, tokenizer, sys.maxsize))
    sides = _sides(encoded[0][1], tokenizer) if encoded else {}
    problem = next(iter(report.left_out), None)
    longest = max(map(len, sides.values()), default=0)
    if longest > max_length:
        cut = wanted == "text"
        problem = f"{longest} tokens, longer than max_length {max_length}: {'cut into rows' if cut else 'left out'}"
    messages = row.get("messages") or [*row.get("prompt", []), *(row.get("chosen") or row.get("completion") or [])]
    roles = [message["role"] for message in messages] if isinstance(messages, list) else []
    told = {"problem": problem, "reasoning_hidden": bool(report.reasoning_hidden)}
    return Inspected(number, source, place, wanted, roles, sides, report.neutralised, **told)


def _sides(encoded: dict[str, list[int]], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[tuple[str, int, bool]]]:
    if "prompt_ids" not in encoded:
        labels = encoded["labels"]
        return {"row": decode_tokens(tokenizer, encoded["input_ids"], [label != -100 for label in labels])}
    prompt = encoded["prompt_ids"]
    if "row" in encoded:
        return {"row": decode_tokens(tokenizer, prompt, [False] * len(prompt))}
    if "label" in encoded:
        answers = {"good" if encoded["label"] else "bad": encoded["completion_ids"]}
    else:
        answers = {"chosen": encoded["chosen_ids"], "rejected": encoded["rejected_ids"]}
    return {
        side: decode_tokens(tokenizer, [*prompt, *answer], [False] * len(prompt) + [True] * len(answer))
        for side, answer in answers.items()
    }


def find_rows(recipe: Recipe, run: Path, name: str, first: int, last: int) -> list[Inspected]:
    """Rows of a stage, counted from 1; UserError where the stage has none, or trains on none."""
    quiet_imports()
    from hfpipe.data.check import check_shards
    from hfpipe.training.job import make_job

    stage = recipe.stages.get(name)
    file = stage.file if stage else recipe.folder / f"{name}.yaml"
    if stage is None:
        raise UserError(
            f"{file}: `{name}` is not among the stages of {recipe.folder / 'pipeline.yaml'}: {', '.join(recipe.stages)}."
        )
    if not stage.type.trainer:
        raise UserError(f"{file}: a {stage.type.name} stage trains on no rows.")
    if first < 1:
        raise UserError(f"--row {first}: rows are counted from 1.")
    check_shards(recipe, [stage])
    by_parent = stage.data.curriculum is not None and stage.data.curriculum.by == "parent_loss"
    job = make_job(recipe, stage, run, parent_fingerprint=None if by_parent else "")
    if by_parent:
        job.check_parents()
    found = list(itertools.islice(inspect_rows(job), first - 1, last))
    if not found:
        raise UserError(f"{file}: there is no row {first} in its training data.")
    return found


def inspect_stage(file: Path, overrides: list[str], run: Path | None, row: int | None, as_json: bool) -> None:
    """Print one row of a stage, or the first five."""
    from hfpipe.config import load_recipe
    from hfpipe.stages import stage_types

    if not file.is_file() or file.name == "pipeline.yaml":
        raise UserError(f"{file} is not a stage's file. Give one, such as stage_configs/tiny/sft.yaml.")
    recipe = load_recipe(file.parent, stage_types(), overrides, run)
    first, last = (1, 5) if row is None else (row, row)
    found = find_rows(recipe, run or Path("runs") / recipe.name, file.stem, first, last)
    for item in found:
        print(json.dumps(asdict(item), ensure_ascii=False) if as_json else _shown(item, sys.stdout.isatty()))


def _shown(item: Inspected, colours: bool) -> str:
    head: list[Any] = [
        f"row {item.number}",
        item.place if item.source in item.place else f"{item.source}, {item.place}",
    ]
    head += [item.form, f"{item.length} tokens, {item.trained} trained"]
    if item.roles:
        head.append(" ".join(item.roles))
    head += [f"{name} {value:.4g}" for name in ("difficulty", "phase") if (value := getattr(item, name)) is not None]
    if item.neutralised:
        head.append(f"{item.neutralised} control tokens neutralised")
    if item.reasoning_hidden:
        head.append("reasoning_content not shown by the chat template")
    lines = [" · ".join(map(str, head))]
    if item.problem:
        lines.append(f"  ! {item.problem}")
    for name, tokens in item.sides.items():
        lines.append(coloured(tokens, colours) if name == "row" else f"{name}: {coloured(tokens, colours)}")
    return "\n".join([*lines, ""])
