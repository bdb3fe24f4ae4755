"""Rows of a synth section: asked in parts of a fixed order and seed, each part on disk before the next is asked.

`RUN/synth/NAME.parquet` has the rows, in the form `messages`, with how each came to be; `NAME.rejected.parquet` those that
were not kept, with the reason; `NAME.json`, written last, the counts and the cost. Killed anywhere, the same call goes on
with the first part that is missing, to the same rows.
"""

from __future__ import annotations

import json
import shlex
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from hfpipe import artifact
from hfpipe.data.groups import NearDuplicates
from hfpipe.data.held_out import index_held_out
from hfpipe.data.rows import Row, as_form
from hfpipe.data.shingles import hash_words
from hfpipe.data.sources import Loaded, load_source
from hfpipe.data.splits import digest
from hfpipe.data.texts import told
from hfpipe.errors import UserError
from hfpipe.evaluation.answers import Answer, Question
from hfpipe.evaluation.judges import Score, grade_of, reward_of
from hfpipe.hub_client import locate, use_pins, used_pins
from hfpipe.progress import duration, money, quantity
from hfpipe.sections import Recipe
from hfpipe.synth_config import Asked, Synth, file_of
from hfpipe.synthesis.teachers import EndpointTeacher, LocalTeacher, Teacher, as_text, ends_with_calls
from hfpipe.synthesis.verify import check_can_run, wrong
from hfpipe.training.identity import asked_identity, synth_identity, synth_record

_PART, _PART_ASKED = 128, 32  # answers; of an endpoint, which is paid for each
_COMPARED = 1000  # rows held against what is held out at a time
_ASK_BACK = "Write the request that this text answers. Say only the request.\n\n{answer}"


def make_rows(recipe: Recipe, name: str, run: Path, tell: Callable[[str], Any]) -> dict[str, Any]:
    """Bring a section's rows to disk, unless they are there as they would be made now; returns the record `NAME.json`.

    `tell` hears of the progress.

    Raises:
        UserError: a teacher, judge or source that is not there, an endpoint that refuses, no isolation for programs.
    """
    if (done := synth_record(recipe, name, run)) is not None:
        return done
    synth, folder = recipe.pipeline.synth[name], run / "synth"
    work = folder / f"{name}.partial"
    begun = artifact.read_record(work / artifact.BEGUN_FILE) or {}
    use_pins(begun.get("pins", {}))
    identity, size = synth_identity(recipe, name, run), _part_size(synth)
    if (begun.get("fingerprint"), begun.get("part")) != (identity, size):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    seat = _Seat(recipe, name, synth, run)
    artifact.write_record(work / artifact.BEGUN_FILE, {"fingerprint": identity, "part": size, "pins": used_pins()})
    where = f"{recipe.folder / 'pipeline.yaml'}: synth.{name}.prompts"
    source = load_source(synth.prompts, seed=recipe.pipeline.seed, where=where)
    asked = list(_asked(source, synth))
    if not asked:
        raise UserError(f"{where}: no row has an answer to be asked back about. {source.describe()}.")
    rows_a_part = max(1, size // synth.samples)
    parts = [asked[at : at + rows_a_part] for at in range(0, len(asked), rows_a_part)]
    for number, part in enumerate(parts):
        file = work / f"part-{number:05}.json"
        if artifact.read_json(file) is None:
            tell(f"{name}: answers {number * rows_a_part * synth.samples} of {len(asked) * synth.samples}")
            seed = int(artifact.digest([synth.seed, number])[:7], 16)
            artifact.write_json(file, seat.part(part, seed, file.with_suffix(".answers")))
    made = [artifact.read_json(work / f"part-{number:05}.json") or {} for number in range(len(parts))]
    rows = [row for part in made for row in part["rows"]]
    _decontaminate(recipe, rows)
    _keep(synth, rows)
    _leave_out_repeats(synth, rows)
    return _write(recipe, name, run, identity, rows, made, {**source.report(), "told": source.describe()})


def _part_size(synth: Synth) -> int:
    return max(_PART_ASKED, synth.teacher.concurrency) if synth.teacher.endpoint else _PART


class _Seat:
    """The teacher and the judge of a section, loaded when the first part is asked."""

    def __init__(self, recipe: Recipe, name: str, synth: Synth, run: Path):
        check_can_run(synth.verify)
        self.recipe, self.synth, self.run = recipe, synth, run
        self.teacher_name = _named(recipe, synth.teacher, run, "model", f"synth.{name}.teacher")
        self.judge_name = synth.judge and _named(recipe, synth.judge, run, "reward_model", f"synth.{name}.judge")
        self.judged: list[dict[str, Any]] = []  # the `usage` of each grade of an endpoint
        self._teacher: Teacher | None = None
        self._score: Score | None = None

    def part(self, part: list[tuple[str, Row]], seed: int, paid: Path) -> dict[str, Any]:
        """What came of some prompts: `rows`, each with its verdict and the reason why it is not kept, and the cost.

        The teacher's answers are written to `paid` before they are judged: a judge that fails does not lose them.
        """
        began, self.judged = time.monotonic(), []
        if self._teacher is None:
            self._teacher, self._score = self._seated()
        synth = self.synth
        drawn = [(place, row, sample) for place, row in part for sample in range(synth.samples)]
        if (kept := artifact.read_json(paid)) is None:
            answers = self._teacher.answer([_question(synth, row) for _, row, _ in drawn], seed)
            seconds = time.monotonic() - began
            artifact.write_json(paid, {"answers": [asdict(answer) for answer in answers], "seconds": seconds})
        else:
            answers, began = [Answer(**answer) for answer in kept["answers"]], began - kept["seconds"]
        asked = [row for _, row, _ in drawn]
        if synth.judge and synth.judge.endpoint:
            with ThreadPoolExecutor(synth.judge.concurrency) as threads:
                verdicts = list(threads.map(self._judge, asked, answers))
        else:
            verdicts = list(map(self._judge, asked, answers))
        rows = []
        for (place, row, sample), answer, made in zip(drawn, answers, verdicts, strict=True):
            made |= {"made_by": self.teacher_name, "made_from": place, "made_with": _instruction(synth)}
            made |= {"method": synth.method, "seed": seed, "sample": sample}
            made |= {"kind": str(row["kind"]) if row.get("kind") is not None else None}
            made |= {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens}
            rows.append({**made, "judged_by": self.judge_name})
        judged = {key: sum(used[key] for used in self.judged) for key in ("prompt_tokens", "completion_tokens")}
        return {"rows": rows, "seconds": round(time.monotonic() - began, 2), "judged": judged if self.judged else {}}

    def _seated(self) -> tuple[Teacher, Score | None]:
        asked, judge, synth = self.synth.teacher, self.synth.judge, self.synth
        if asked.endpoint:
            teacher: Teacher = EndpointTeacher(asked.endpoint, str(asked.model), asked.concurrency, synth)
        else:
            teacher = LocalTeacher(self._folder(asked), synth)
        if judge is None:
            return teacher, None
        if judge.endpoint:
            return teacher, grade_of(judge.endpoint, str(judge.model), self.judged_usage)
        return teacher, reward_of(str(self._folder(judge)))

    def _folder(self, asked: Asked) -> Path:
        return self.run / asked.model if asked.model in self.recipe.stages else locate(str(asked.model))

    def judged_usage(self, usage: dict[str, Any]) -> None:
        self.judged.append(usage)

    def _judge(self, row: Row, answer: Answer) -> dict[str, Any]:
        """The conversation that a row and an answer make, with the verdict on it."""
        said_something = answer.text or ends_with_calls(answer, row.get("tools"))
        reason = None if said_something else "empty answer"
        reason = answer.fault or ("unfinished answer" if not answer.stopped else reason)
        prompt, said = row["prompt"], answer
        if self.synth.method == "backtranslate":
            prompt = [{"role": "user", "content": answer.text}]
            said = Answer(messages=row["reference"], stopped=True)
        whole, verdict, score = {**row, "messages": prompt}, {}, None
        for item in self.synth.verify if reason is None else ():
            reason = wrong(item, whole, said)
            verdict[item.check] = reason or "passed"
            if reason:
                break
        if reason is None and self._score is not None:
            score, threshold = self._score({"messages": prompt}, said.text), self.synth.judge.threshold
            if score is None:
                reason = "the judge named no grade"
            elif threshold is not None and score < threshold:
                reason = f"judged below {threshold:g}"
        messages = [_plain(message) for message in (*prompt, *said.messages)]
        return {"messages": messages, "tools": row.get("tools"), "verdict": verdict, "score": score, "reason": reason}


def _named(recipe: Recipe, asked: Asked, run: Path, leaves: str, where: str) -> str:
    """Who is asked, and which state of them: `sft@1f6b...`, `org/model@commit`, a URL and the model's name."""
    if asked.model in recipe.stages and not asked.endpoint:
        folder = run / asked.model
        if not (folder / artifact.STAGE_FILE).is_file():
            raise UserError(
                f"{recipe.folder / 'pipeline.yaml'}: {where}.model = {asked.model!r}: {run} holds no finished stage of "
                f"that name. Run it first: hfpipe run {shlex.quote(str(recipe.folder))} --out {shlex.quote(str(run))} --to {asked.model}"
            )
        artifact.folder_identity(folder, (leaves,))  # a damaged one is refused
    identity = asked_identity(recipe, asked, run, leaves)
    return identity if asked.endpoint else f"{str(asked.model).partition('@')[0]}@{identity[:16]}"


def _asked(source: Loaded, synth: Synth) -> Iterator[tuple[str, Row]]:
    """(place, row of `prompt` and `reference`) of the section's source; a document is asked, or answered, as a whole."""
    for place, row in source.located_rows():
        if "text" in row:
            turn = {"content": row["text"]}
            row |= {"prompt": [{"role": "user", **turn}], "reference": [{"role": "assistant", **turn}]}
        else:
            row = as_form(row, "prompt")
        if synth.method != "backtranslate" or row.get("reference"):
            yield place, row


def _instruction(synth: Synth) -> str | None:
    return synth.instruction or (_ASK_BACK if synth.method == "backtranslate" else None)


def _question(synth: Synth, row: Row) -> Question:
    if synth.method == "backtranslate":
        answer = str(row["reference"][-1].get("content") or "")
        asked = str(_instruction(synth)).replace("{answer}", answer)
        return Question([{"role": "user", "content": asked}])
    prompt = row["prompt"]
    if synth.instruction:
        own = [m["content"] for m in prompt if m["role"] == "system"]
        system = {"role": "system", "content": "\n\n".join([synth.instruction, *own])}
        prompt = [system, *(m for m in prompt if m["role"] != "system")]
    return Question(prompt, row.get("tools"))


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message of the same columns in every row: arguments of tool calls as text."""
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    called = [{"name": call["name"], "arguments": as_text(call["arguments"])} for call in calls]
    plain = {"role": message["role"], "content": str(message.get("content") or "")}
    plain |= {"tool_calls": [{"type": "function", "function": call} for call in called]} if called else {}
    return plain | ({"name": str(message["name"])} if message.get("name") else {})


def _keep(synth: Synth, rows: list[dict[str, Any]]) -> None:
    """Of each prompt's good answers all, the first, or the best."""
    if synth.keep == "all":
        return
    for at in range(0, len(rows), synth.samples):
        good = _good(rows[at : at + synth.samples])
        if synth.keep == "best":
            good.sort(key=lambda row: -row["score"])
        for row in good[1:]:
            row["reason"] = "another answer to its prompt is kept"


def _good(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["reason"] is None]


def _leave_out_repeats(synth: Synth, rows: list[dict[str, Any]]) -> None:
    seen: set[bytes] = set()
    for row in _good(rows):
        if (key := digest(row)) in seen:
            row["reason"] = "duplicate"
        seen.add(key)
    good = _good(rows)
    if synth.near_duplicates or not good:
        return
    near = NearDuplicates()
    near.add(hash_words([told(row) for row in good]), np.arange(len(good)))
    for at in near.pairs()[0].tolist():
        good[at]["reason"] = "near duplicate"


def _decontaminate(recipe: Recipe, rows: list[dict[str, Any]]) -> None:
    held_out, good = index_held_out(recipe), _good(rows)
    for start in range(0, len(good) if len(held_out) else 0, _COMPARED):
        chunk = good[start : start + _COMPARED]
        for match in held_out.find(chunk):
            chunk[match.row]["reason"] = f"shows held-out rows: {held_out.label(match.item)}"


def _write(
    recipe: Recipe,
    name: str,
    run: Path,
    identity: str,
    rows: list[dict[str, Any]],
    parts: list[dict[str, Any]],
    prompts: dict[str, Any],
) -> dict[str, Any]:
    synth, kept = recipe.pipeline.synth[name], _good(rows)
    file = file_of(run, name)
    aside = file.with_suffix(".rejected.parquet")
    _write_parquet(file, kept)
    _write_parquet(aside, [row for row in rows if row["reason"] is not None])
    tokens = {key: sum(row[key] for row in rows) for key in ("prompt_tokens", "completion_tokens")}
    judged = sum((Counter(part["judged"]) for part in parts), Counter())
    dollars = _dollars(synth.teacher, tokens) + (_dollars(synth.judge, judged) if synth.judge else 0)
    record = {
        "fingerprint": identity,
        "method": synth.method,
        "made_by": rows[0]["made_by"],
        "prompts": prompts,
        "asked": len(rows),
        "kept": len(kept),
        "rejected": dict(Counter(row["reason"].partition(":")[0] for row in rows if row["reason"]).most_common()),
        "cost": {
            **tokens,
            "judge": dict(judged),
            "seconds": round(sum(part["seconds"] for part in parts), 1),
            "dollars": round(dollars, 6),
        },
        "pins": used_pins(),
        "files": artifact.checksums(file.parent, [file.name, aside.name]),
    }
    artifact.write_record(file.with_suffix(".json"), record)
    shutil.rmtree(file.parent / f"{name}.partial")
    return record


def summary(record: dict[str, Any]) -> str:
    """A section's record in one line."""
    rejected = "".join(f", {n:,} {reason}" for reason, n in record["rejected"].items())
    cost = record["cost"]
    tokens = f"{quantity(cost['prompt_tokens'])} tokens read and {quantity(cost['completion_tokens'])} written"
    spent = f", {money(cost['dollars'])}" if cost["dollars"] else ""
    who, prompts = record["made_by"], record["prompts"]
    asked = f"; {prompts['told']}" if prompts["read"] != prompts["used"] else ""
    return f"{record['kept']:,} of {record['asked']:,} answers of {who} kept{rejected}; {tokens}{spent}, {duration(cost['seconds'])}{asked}"


def _dollars(asked: Asked, tokens: Any) -> float:
    spent = asked.input_price * tokens["prompt_tokens"] + asked.output_price * tokens["completion_tokens"]
    return spent / 1e6


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    text, whole = pyarrow.string(), pyarrow.int64()
    call = pyarrow.struct([("type", text), ("function", pyarrow.struct([("name", text), ("arguments", text)]))])
    message = pyarrow.struct([("role", text), ("content", text), ("tool_calls", pyarrow.list_(call)), ("name", text)])
    told = ("kind", "made_by", "made_from", "made_with", "method", "judged_by", "verdict", "reason", "tools")
    schema = pyarrow.schema(
        [("messages", pyarrow.list_(message)), *((key, text) for key in told), ("score", pyarrow.float64())]
        + [(key, whole) for key in ("seed", "sample", "prompt_tokens", "completion_tokens")]
    )
    as_json = [{**row, **{key: json.dumps(row[key]) for key in ("verdict", "tools") if row[key]}} for row in rows]
    plain = [{**row, "verdict": row["verdict"] or None, "tools": row["tools"] or None} for row in as_json]
    beside = path.with_name(path.name + artifact.BESIDE)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(plain, schema), beside, compression="zstd")
    artifact.sync(beside)
    beside.replace(path)
