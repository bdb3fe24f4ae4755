"""`data.curriculum` and `data.phases`: what a stage really trains on, step by step."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from functools import cache
from itertools import chain, pairwise
from pathlib import Path

import pytest

from hfpipe.errors import ConfigErrors, UserError

from .conftest import ROOT, hfpipe, stage_json
from .order_recipe import TRAINER, read_seen, watch, write_recipe

BATCH = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The nano recipe with its tokenizer and its pretraining done."""
    folder = tmp_path_factory.mktemp("nano")
    hfpipe("run", write_recipe(folder), "--out", folder / "run", "--to", "pretrain")
    return folder


def train(base: Path, name: str, *settings: str, order: str = "") -> tuple[list[list], dict]:
    """Train one stage in this process, on the parents that are done: the rows of each of its steps, its record."""
    from transformers import Trainer

    from hfpipe.config import load_recipe
    from hfpipe.stages import stage_types
    from hfpipe.stages._run import run_stage
    from hfpipe.training.job import Progress, make_job

    recipe = load_recipe(write_recipe(base, **{name: order}), stage_types(), [f"{name}.{s}" for s in settings])
    run = base / f"run-{abs(hash((name, settings, order)))}"
    for done in ("tokenizer", "pretrain"):
        if done != name:
            shutil.copytree(base / "run" / done, run / done)
    untouched = Trainer.training_step
    watch(run / "seen")
    try:
        run_stage(make_job(recipe, recipe.stages[name], run), Progress(None))
    finally:
        Trainer.training_step = untouched
    return read_seen(run / "seen"), stage_json(run / name) | {"run": run}


def flat(steps: list[list]) -> list:
    return list(chain.from_iterable(steps))


def tokens(row: list) -> int:
    return sum(len(ids) for ids, _ in row)


def common(a: list[int], b: list[int]) -> int:
    """With how many tokens both begin."""
    return next(n for n, (one, other) in enumerate(zip(a, b, strict=False)) if one != other)


@cache
def tokenizer_of(run: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(run / "tokenizer")


def asked(run: Path, row: list) -> int:
    """The number that a conversation of one row begins with."""
    return int(re.search(r"\d+", tokenizer_of(run).decode(row[0][0]))[0])


def mean_loss(model, row: list) -> float:
    """By the definition: one row alone, the mean over its trained tokens."""
    import torch

    ids, labels = row[0]
    with torch.no_grad():
        found = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    losses = [-found[i - 1, ids[i]].item() for i in range(1, len(ids)) if labels[i] != -100]
    return sum(losses) / len(losses)


def is_sorted(values: list[float], slack: float = 1e-9) -> bool:
    return all(a <= b + slack for a, b in pairwise(values)) and values[-1] > values[0]


# --- curriculum ---


def test_by_a_column_each_epoch_goes_from_easy_to_hard(base):
    steps, record = train(base, "sft", "trainer.num_train_epochs=2", order="curriculum: {by: hard}")
    rows = [json.loads(line) for line in (base / "data" / "talks.jsonl").read_text().splitlines()]
    hard = {int(row["messages"][0]["content"][:-1]): row["hard"] for row in rows}
    seen = [hard[asked(record["run"], row)] for row in flat(steps)]
    assert seen == [*range(64), *range(64)]
    assert record["metrics"]["steps"] == 2 * 64 / BATCH


def test_by_the_loss_of_the_parent(base):
    from transformers import AutoModelForCausalLM

    steps, record = train(base, "sft", order="curriculum: {by: parent_loss}")
    parent = AutoModelForCausalLM.from_pretrained(record["run"] / "pretrain", dtype="float32")
    losses = [mean_loss(parent, row) for row in flat(steps)]
    assert is_sorted(losses, slack=1e-4)
    assert len({asked(record["run"], row) for row in flat(steps)}) == len(losses) == 64


@pytest.mark.parametrize("name", ["dpo", "reward", "kto", "grpo"])
def test_every_trainer_keeps_the_order(base, name):
    steps, _ = train(base, name, *["trainer.max_steps=6"] * (name == "grpo"), order="curriculum: {by: length}")
    if name in ("dpo", "reward"):  # all chosen ones of a batch, then all rejected ones
        pairs = [(a[0][0], b[0][0]) for step in steps for a, b in zip(step[:BATCH], step[BATCH:], strict=True)]
        seen = [len(a) + len(b) - common(a, b) for a, b in pairs]  # the prompt counts once
    else:
        seen = [len(row) if name == "grpo" else tokens(row) for row in flat(steps)]
    assert is_sorted(seen)
    assert len(seen) == {"kto": 64, "grpo": 24}.get(name, 32)


@pytest.mark.parametrize(
    ("name", "settings", "count"),
    [("sft", ["packing=true"], 64), ("pretrain", ["max_steps=-1", "num_train_epochs=1"], 360)],
)
def test_packed_rows_hold_neighbours(base, name, settings, count):
    steps, _ = train(base, name, *(f"trainer.{setting}" for setting in settings), order="curriculum: {by: length}")
    rows = [[len(ids) for ids, _ in row] for row in flat(steps)]
    documents = sorted(chain.from_iterable(rows))
    assert len(documents) == count
    assert is_sorted([sum(n * n for n in row) / sum(row) for row in rows])
    assert max(rows[0]) < documents[count // 2] < min(rows[-1])


def test_what_may_be_drawn_grows(base):
    order = "curriculum: {by: hard, pace: growing, start: 0.25}"
    steps, record = train(base, "sft", order=order)
    rows = [json.loads(line) for line in (base / "data" / "talks.jsonl").read_text().splitlines()]
    hard = {int(row["messages"][0]["content"][:-1]): row["hard"] for row in rows}
    seen = [hard[asked(record["run"], row)] for row in flat(steps)]
    assert all(rank < math.ceil(64 * (0.25 + 0.75 * t / 63) - 1e-9) for t, rank in enumerate(seen))
    assert max(seen[:8]) < 20 < 60 < max(seen)
    assert seen != sorted(seen)
    assert sorted(seen) == list(range(64))
    assert len(steps) == 64 / BATCH
    more, record = train(base, "sft", "trainer.max_steps=40", order=order)
    counts = Counter(hard[asked(record["run"], row)] for row in flat(more))
    assert len(more) == record["metrics"]["steps"] == 40
    assert max(counts[n] for n in range(16)) - min(counts[n] for n in range(16)) <= 1  # once in each pass
    assert counts[63] <= 1 < counts[0]


# --- phases ---

PHASES = "phases: [{share: 0.25, weights: {DATA/a.jsonl: 3, DATA/b.jsonl: 1}, max_length: 12}, {share: 0.75, weights: [1, 3]}]"


def test_phases_have_their_shares_weights_and_lengths(base):
    order = PHASES.replace("DATA", str(base / "data"))
    steps, record = train(base, "pretrain", order=order)
    assert len(steps) == 12
    parts = [flat(steps[:3]), flat(steps[3:])]
    lengths = [[len(ids) for row in part for ids, _ in row] for part in parts]
    assert max(lengths[0]) == 12 < max(lengths[1])
    widths = [[tokens(row) for row in part] for part in parts]
    assert all(sum(width < 40 for width in part) <= 2 for part in widths)  # what is left over at a phase's end
    assert max(map(max, widths)) <= 64
    sources = {source["path"][-7]: source["phases"] for source in record["sources"]}
    sizes = {source["path"][-7]: source["tokens"] for source in record["sources"]}
    for phase, share in ((0, 0.75), (1, 0.25)):
        of_a, of_b = (sources[letter][phase] * sizes[letter] for letter in "ab")
        assert of_a / (of_a + of_b) == pytest.approx(share, abs=0.02)
    whole = sum(sources[letter][p] * sizes[letter] for letter in "ab" for p in (0, 1))
    assert sum(sources[letter][0] * sizes[letter] for letter in "ab") / whole == pytest.approx(0.25, abs=0.02)
    assert all(sum(shares) <= 1 + 1e-9 for shares in sources.values())
    assert max(sum(shares) for shares in sources.values()) > 0.97


def test_no_row_comes_twice_in_phases_by_epochs(base):
    order = "phases: [{share: 0.5, max_length: 22}, {share: 0.5}]"
    steps, record = train(base, "sft", order=order)
    numbers = [asked(record["run"], row) for row in flat(steps)]
    assert len(set(numbers)) == len(numbers) > 20
    assert all(len(step) == BATCH for step in steps)
    longest = [max(tokens(row) for row in step) for step in steps]
    short = sum(length <= 22 for length in longest)
    assert all(length <= 22 for length in longest[:short])
    assert short / len(steps) == pytest.approx(0.5, abs=1 / len(steps))


# --- the same bits ---


# --- by length ---


@pytest.mark.parametrize("name", ["sft", "dpo", "reward"])
def test_rows_of_about_one_length_share_a_step(base, name):
    wanted = "trainer.train_sampling_strategy=group_by_length"
    steps, _ = train(base, name, "trainer.num_train_epochs=2", wanted)
    plain, _ = train(base, name)
    longest = [[max(map(tokens, step))] * len(step) for step in steps[: len(plain)]]
    padded = [[max(map(tokens, step))] * len(step) for step in plain]
    whole = sum(map(tokens, flat(plain)))
    assert sum(map(tokens, flat(steps))) == 2 * whole
    for half in (steps[: len(plain)], steps[len(plain) :]):  # each epoch has each row once
        assert sorted(flat(half)) == sorted(flat(plain))
    assert steps[: len(plain)] != steps[len(plain) :]
    assert sum(flat(longest)) - whole < 0.5 * (sum(flat(padded)) - whole)
    assert not is_sorted([max(map(tokens, step)) for step in steps[: len(plain)]], slack=0)


def stage(base: Path, run: Path, seen: Path, setting: str, *launch: str, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", *launch, "tests.order_recipe", str(seen), "hfpipe.stages.sft"]
    command += [str(base / "recipe" / "sft.yaml"), setting, "--out", str(run)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("order", "setting", "kill_at", "kept"),
    [
        ("curriculum: {by: length, pace: growing}", "trainer.num_train_epochs=1", 10, 8),
        ("", "trainer={num_train_epochs: 2, max_length: 96, SAME, train_sampling_strategy: group_by_length}", 22, 20),
    ],
    ids=["growing", "by_length"],
)
def test_killed_it_goes_on_at_the_next_row_and_two_processes_see_the_same_batches(
    base, tmp_path, order, setting, kill_at, kept
):
    setting = setting.replace("SAME", TRAINER)
    steps, record = train(base, "sft", setting, order=order)
    run = tmp_path / "run"
    for done in ("tokenizer", "pretrain"):
        shutil.copytree(base / "run" / done, run / done)
    shutil.copytree(run, tmp_path / "two")
    killed = stage(base, run, tmp_path / "seen", setting, KILL_AT=str(kill_at))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = stage(base, run, tmp_path / "seen", setting)
    assert done.returncode == 0, done.stderr
    assert f"resumed from checkpoint-{kept}" in done.stdout
    assert read_seen(tmp_path / "seen") == steps
    assert stage_json(run / "sft")["weights"] == record["weights"]

    launch = ("accelerate.commands.launch", "--num_processes", "2", "--multi_gpu", "-m")
    text = (base / "recipe" / "sft.yaml").read_text()
    (base / "recipe" / "sft.yaml").write_text(text.replace(f"batch_size: {BATCH}", f"batch_size: {BATCH // 2}"))
    setting = setting.replace(f"batch_size: {BATCH}", f"batch_size: {BATCH // 2}")
    done = stage(base, tmp_path / "two", tmp_path / "two.seen", setting, *launch)
    assert done.returncode == 0, done.stderr
    assert [sorted(step) for step in read_seen(tmp_path / "two.seen", ranks=2)] == [sorted(step) for step in steps]


# --- told before ---


def test_the_plan_and_inspect_tell_the_order(base, tmp_path):
    from hfpipe.apps.inspect import find_rows
    from hfpipe.config import load_recipe
    from hfpipe.stages import stage_types

    phases = "phases: [{share: 0.5, weights: [0, 1], max_length: 8}, {share: 0.5}]"
    folder = write_recipe(base, sft="curriculum: {by: hard, pace: growing}", pretrain=phases)
    planned = json.loads(hfpipe("plan", folder, "--out", tmp_path, "--json").stdout)["stages"]
    pretrain, sft = planned[1], planned[2]
    assert sft["notes"][0].endswith("talks.jsonl; from easy to hard by hard, the easiest 20% at first")
    assert "; phase 1: 50% of the steps, 0 / 1, at most 8 tokens; phase 2: 50% of the steps" in pretrain["notes"][0]
    assert sft["steps"] == 64 / BATCH
    assert pretrain["steps"] == 12

    recipe = load_recipe(folder, stage_types())
    drawn = find_rows(recipe, base / "run", "sft", 1, 8)
    assert len({row.difficulty for row in drawn}) == 8
    assert max(row.difficulty for row in drawn) < 20
    seen = find_rows(recipe, base / "run", "pretrain", 1, 100)
    assert [row.phase for row in seen] == [1] * 24 + [2] * 24
    assert "so so" in "".join(token for token, _, _ in seen[0].sides["row"])
    assert "phase 1" in str(seen[0])
    recipe = load_recipe(write_recipe(base, sft="curriculum: {by: parent_loss}"), stage_types())
    with pytest.raises(UserError, match="holds no finished"):
        find_rows(recipe, tmp_path, "sft", 1, 1)


def test_weights_balance_and_decontamination_go_on_working(base):
    from hfpipe.apps.inspect import find_rows
    from hfpipe.config import load_recipe
    from hfpipe.stages import stage_types

    held_out = base / "data" / "held.jsonl"
    rows = [json.loads(line) for line in (base / "data" / "talks.jsonl").read_text().splitlines()]
    for n, row in enumerate(rows):
        row["kind"] = "rare" if n < 8 else "common"
        row["messages"][0]["content"] = f"{n}? Say it to me."
    (base / "data" / "kinds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows[40:48]))
    sources = f"[{{path: {base}/data/kinds.jsonl, split: all, weight: 1, balance: kind}}, "
    sources += f"{{path: {base}/data/a.jsonl, split: all, as: text, weight: 1}}]"
    settings = [f"sft.data.train={sources}", f"sft.data.eval=[{{path: {held_out}, split: all}}]"]
    recipe = load_recipe(
        write_recipe(base, sft="curriculum: {by: hard}"), stage_types(), [*settings, "sft.data.decontaminate=true"]
    )
    with pytest.raises(UserError, match=r"expected a column with a number; a.jsonl line 1 has only text"):
        find_rows(recipe, base / "run", "sft", 1, 1)
    recipe = load_recipe(
        write_recipe(base, sft="curriculum: {by: length}"), stage_types(), [*settings, "sft.data.decontaminate=true"]
    )
    shown = find_rows(recipe, base / "run", "sft", 1, 1000)
    assert is_sorted([row.length for row in shown])
    assert [row.difficulty for row in shown] == [row.length for row in shown]
    texts = ["".join(token for token, _, _ in row.sides["row"]) for row in shown]
    talks = Counter(int(text.split("<|user|>")[1].split("?")[0]) for text in texts if "<|user|>" in text)
    assert not set(talks) & set(range(40, 48))
    assert min(talks[n] for n in range(8)) >= 4  # 8 rare rows given as often as 48 common ones
    lengths = [
        sum(row.length for row, text in zip(shown, texts, strict=True) if ("<|user|>" in text) == is_talk)
        for is_talk in (True, False)
    ]
    assert lengths[0] == pytest.approx(lengths[1], rel=0.05)


@pytest.mark.parametrize(
    ("name", "order", "settings", "told"),
    [
        ("sft", "curriculum: {by: length}", ["data.phases=[{share: 1}]"], "data.curriculum beside data.phases"),
        ("sft", "curriculum: {by: length, start: 0.5}", [], "data.curriculum.start belongs to pace: growing"),
        ("sft", "curriculum: {by: length}", ["trainer.train_sampling_strategy=random"], "which sets the order"),
        ("sft", "curriculum: {by: length, pace: growing}", ["trainer.auto_find_batch_size=true"], "for a known batch"),
        ("pretrain", "curriculum: {by: length}", ["data.streaming=true"], "data.curriculum beside data.streaming"),
        ("dpo", "", ["trainer.train_sampling_strategy=batch_rebalance"], "which pairs do not have"),
        ("grpo", "", ["trainer.train_sampling_strategy=group_by_length"], "a rollout repeats its prompts"),
        ("pretrain", "curriculum: {by: parent_loss}", [], "there is no parent"),
        ("grpo", "curriculum: {by: parent_loss}", [], "a prompt has no answer to lose on"),
        ("grpo", "curriculum: {by: length, pace: growing}", [], "a rollout repeats its prompts"),
        ("grpo", "phases: [{share: 1}]", [], "data.phases is for text and conversations"),
        ("tokenizer", "", ["data.curriculum={by: length}"], "a tokenizer reads every source whole"),
        ("pretrain", "phases: [{share: 0.5}, {share: 0.4}]", [], "the shares sum to 0.9; expected 1"),
        ("pretrain", "phases: [{weights: [1, 1]}]", [], "data.phases[0].share is missing"),
        ("pretrain", "phases: [{share: 1, weights: [1]}]", [], "1 numbers for 2 sources"),
        ("pretrain", "phases: [{share: 1, weights: [0, 0]}]", [], "expected numbers of 0 or more, one of them above 0"),
        ("pretrain", "phases: [{share: 1, weights: {c.jsonl: 1}}]", [], "'c.jsonl' is no path of data.train"),
        ("pretrain", "phases: [{share: 1, max_length: 65}]", [], "expected at most the stage's max_length, 64"),
        ("sft", "phases: [{share: 1}]", ["data.train=[{path: x, weight: 1}]"], "weight beside data.phases"),
        ("sft", "phases: [{share: 1, weights: {x: 1}}]", ["data.train=[{path: x}, {path: x}]"], "have the same path"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, name, order, settings, told):
    from hfpipe.config import load_recipe
    from hfpipe.stages import stage_types

    recipe = write_recipe(tmp_path, **{name: order})
    with pytest.raises(ConfigErrors, match=re.escape(told)):
        load_recipe(recipe, stage_types(), [f"{name}.{setting}" for setting in settings])


@pytest.mark.parametrize(
    ("name", "order", "settings", "told"),
    [
        ("sft", "curriculum: {by: hart}", [], r"talks.jsonl line 1 has only messages, hard. Did you mean `hard`\?"),
        ("dpo", "curriculum: {by: chosen}", [], "expected a column with a number; pairs.jsonl line 1 has"),
        ("sft", "phases: [{share: 0.5, max_length: 4}, {share: 0.5}]", [], "has at most 4 tokens"),
        ("sft", "phases: [{share: 0.0001}, {share: 0.9999}]", ["trainer.max_steps=60"], "phase 1 gets no row"),
        ("sft", "phases: [{share: 0.01}, {share: 0.99}]", [], "phase 1 gets no step of 4 rows: it has 1"),
    ],
)
def test_what_the_rows_do_not_give_is_told_before_training(base, name, order, settings, told):
    with pytest.raises(UserError, match=told):
        train(base, name, *settings, order=order)
