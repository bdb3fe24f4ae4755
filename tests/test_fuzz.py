"""Anything for a configuration, anything for rows: one clear message or a result, never a traceback, nothing half-written."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hfpipe import upstream
from hfpipe.run_folder import damage_at
from hfpipe.yaml_files import load_yaml

from .conftest import ROOT
from .sequences import RECIPE, write_data
from .warm import call

TIMES = int(os.environ.get("HFPIPE_FUZZ", 1))  # 1: the same inputs every time; more: as many times others
COUNTS: Counter[str] = Counter()


def fuzz(examples: int):
    return settings(
        max_examples=examples * TIMES, derandomize=TIMES == 1, deadline=None, database=None, print_blob=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def told(arguments: list[str]) -> tuple[int, str]:
    """Exit code and output of the command line, in this process."""
    code, out, err = call(arguments, Path.cwd())
    COUNTS[f"{arguments[0]} {code}"] += 1
    return code, out + err


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


# --- configurations ---

MICRO = {path.stem: load_yaml(path) for path in sorted((ROOT / "stage_configs" / "micro").glob("*.yaml"))}
KEYS = st.sampled_from(
    [
        "stage",
        "model",
        "data",
        "trainer",
        "adapter",
        "optimizer",
        "regularize",
        "l2_to_parent",
        "average_with_parent",
        "freeze_layers",
        "layerwise_lr_decay",
        "tokenizer",
        "from",
        "config",
        "type",
        "path",
        "weight",
        "limit",
        "as",
        "name",
        "split",
        "train",
        "eval",
        "learning_rate",
        "max_length",
        "packing",
        "seed",
        "launch",
        "processes",
        "evaluate",
        "probes",
        "text",
        "samples",
        "lora",
        "r",
        "beta",
        "loss_type",
    ]
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats()
    | st.sampled_from(
        ["", " ", "1e-4", "0x10", "yes", "~", "sft", "dpo", "tokenizer", "../..", "/", "{name}", "é\u0000", "\u202e"]
    )
    | st.text(max_size=8)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)


def places(value: object, path: tuple = ()) -> list[tuple]:
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return found + [place for key, inner in items for place in places(inner, (*path, key))]


def put(tree: dict, path: tuple, value: object, delete: bool) -> None:
    for key in path[:-1]:
        tree = tree[key]
    if delete:
        del tree[path[-1]]
    else:
        tree[path[-1]] = value


def dump(value: object) -> str:
    """YAML is a superset of JSON, but for the names of what is no number."""
    return json.dumps(value, ensure_ascii=False, default=str).replace("NaN", ".nan").replace("Infinity", ".inf")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "recipe"


def check_plan(recipe: Path, files: dict[str, str]) -> None:
    recipe.mkdir(exist_ok=True)
    for name, text in files.items():
        (recipe / f"{name}.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    before = sorted(p.name for p in recipe.parent.iterdir())
    code, output = told(["plan", str(recipe), "--out", str(recipe.parent / "run")])
    assert code in (0, 2), output
    assert code == 0 or output.startswith("hfpipe: "), output
    assert "Traceback" not in output
    assert sorted(p.name for p in recipe.parent.iterdir()) == before


@fuzz(900)
@given(data=st.data())
def test_any_value_anywhere_in_a_recipe(recipe, data):
    files = copy.deepcopy(MICRO)
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(files)))
        place = data.draw(st.sampled_from(places(files[name]) or [("stage",)]))
        with contextlib.suppress(KeyError, IndexError, TypeError):  # an earlier change took the place away
            put(files[name], place, data.draw(VALUES), data.draw(st.booleans()) and data.draw(st.booleans()))
    check_plan(recipe, {name: dump(content) for name, content in files.items()})


@fuzz(300)
@given(data=st.data())
def test_any_text_as_yaml(recipe, data):
    files = {path.stem: path.read_text() for path in sorted((ROOT / "stage_configs" / "micro").glob("*.yaml"))}
    name = data.draw(st.sampled_from(sorted(files)))
    text = files[name]
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text)))
        oddity = st.sampled_from(
            [
                "\t",
                "&a ",
                "*a",
                "<<: ",
                "!!python/object:os.system ",
                "---\n",
                "{",
                "]",
                ": ",
                "- ",
                "|",
                "\r",
                "\x00",
                "#",
            ]
        )
        text = text[:at] + data.draw(oddity | st.text(max_size=5)) + text[at + data.draw(st.integers(0, 12)) :]
    check_plan(recipe, {**files, name: text})


@fuzz(200)
@given(
    arguments=st.lists(
        st.tuples(st.sampled_from(places(MICRO)), VALUES).map(lambda pair: f"{'.'.join(map(str, pair[0]))}={dump(pair[1])}")
        | st.text(max_size=20),
        min_size=1, max_size=3,
    )
)  # fmt: skip
def test_any_setting(recipe, arguments):
    settings_given = [part for text in arguments for part in (f"--set={text}",)]
    code, output = told(["plan", "micro", "--out", str(recipe.parent / "none"), *settings_given])
    assert code in (0, 2), output
    assert "Traceback" not in output


# --- what a plan takes, trained ---

FIELDS = upstream.fields("SFTConfig")
# Compiling takes minutes, and DeepSpeed and FSDP take several devices.
LEFT_OUT = re.compile("torch_compile|deepspeed|fsdp")
SMALL = st.sampled_from([*range(-1, 4), 0.0, 0.5, -0.5, 1e-9, float("nan"), float("inf"), True, False, None])
TEXTS = st.sampled_from(
    ["", "no", "steps", "epoch", "best", "adamw_torch", "sgd", "linear", "eval_loss", "fork", "bfd"]
)


@st.composite
def an_option(draw: st.DrawFn) -> tuple[str, object]:
    """A field of the trainer's with a value of its kind, or of any."""
    name = draw(st.sampled_from(sorted(name for name in FIELDS if not LEFT_OUT.search(name))))
    fitting = [
        value for value in (True, 2, 0.5, "steps", {"a": 1}, ["a"]) if isinstance(value, FIELDS[name].types or ())
    ]
    own = st.sampled_from([*FIELDS[name].choices, *fitting] or [None])
    return name, draw(own | SMALL | TEXTS | st.sampled_from([{"a": 1}, ["a"], [1]]))


@pytest.fixture(scope="module")
def nano(tmp_path_factory) -> Iterator[Path]:
    """A recipe of seconds whose stages before the last are done."""
    folder = tmp_path_factory.mktemp("nano")
    (folder / "recipe").mkdir()
    write_data(folder / "data", 0)
    for name, text in RECIPE.items():
        text = text.replace("DATA", str(folder / "data")).replace(
            "max_steps: 12, save_steps: 2", "max_steps: 2, save_steps: 1"
        )
        (folder / "recipe" / f"{name}.yaml").write_text(text)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HFPIPE_CACHE", str(folder / "cache"))
        assert told(["run", str(folder / "recipe"), "--out", str(folder / "run"), "--to", "pretrain"])[0] == 0
        yield folder


@fuzz(80)
@given(options=st.lists(an_option(), min_size=1, max_size=2))
def test_any_option_of_a_trainer_runs_or_is_refused(nano, options):
    for left in ("sft", "sft.partial"):
        shutil.rmtree(nano / "run" / left, ignore_errors=True)
    settings_given = [f"--set=sft.trainer.{name}={dump(value)}" for name, value in options]
    code, output = told(["run", str(nano / "recipe"), "--out", str(nano / "run"), "--only", "sft", *settings_given])
    assert code in (0, 2), output
    assert "Traceback" not in output
    assert (code == 0) == (nano / "run" / "sft").is_dir()
    assert damage_at(nano / "run" / "sft") is None


# --- rows ---

WORDS = st.sampled_from(
    ["Hello", "What is 2+2?", "<|assistant|>", "", " ", "\n", "é" * 3, "\u0000", "😀", "<|end|>", "{{ x }}", "a" * 400]
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "", 3, None]),
            "content": WORDS | SCALARS | st.lists(st.fixed_dictionaries({"type": WORDS, "text": WORDS}), max_size=2),
            "from": st.sampled_from(["human", "gpt", "system", "function_call", "observation", 1]),
            "value": WORDS | SCALARS,
            "tool_calls": VALUES | st.just([{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]),
        },
    ),
    max_size=4,
)
COLUMNS = [
    "messages",
    "conversations",
    "text",
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "instruction",
    "input",
    "output",
    "question",
    "answer",
    "system",
    "tools",
    "label",
]
ROWS = st.dictionaries(
    st.sampled_from(COLUMNS) | st.text(max_size=5), WORDS | MESSAGES | VALUES, max_size=5
) | VALUES  # fmt: skip
GOOD = {
    "sft": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]},
    "dpo": {"prompt": "Hi", "chosen": "Hello!", "rejected": "No."},
    "pretrain": {"text": "A dog is an animal."},
}


@pytest.fixture(scope="module")
def trained(micro_run, tmp_path_factory) -> Iterator[Path]:
    """A recipe whose stages start from micro's models and read a file of ours; what it prepares lies beside it."""
    folder = tmp_path_factory.mktemp("rows")
    (folder / "recipe").mkdir()
    (folder / "recipe" / "pipeline.yaml").write_text("name: rows\nstages: [pretrain, sft, dpo]\n")
    for stage, parent in (("pretrain", "pretrain"), ("sft", "midtrain"), ("dpo", "sft")):
        (folder / "recipe" / f"{stage}.yaml").write_text(
            f"stage: {stage}\nmodel: {{from: {micro_run / parent}}}\n"
            f"data: {{train: [{{path: {folder}/rows.jsonl, split: all}}]}}\n"
        )
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HFPIPE_CACHE", str(folder / "cache"))
        yield folder


def check_rows(folder: Path, stage: str, content: bytes) -> None:
    (folder / "rows.jsonl").write_bytes(content)
    code, output = told(["inspect", str(folder / "recipe" / f"{stage}.yaml"), "--json"])
    assert code in (0, 2), output
    assert "Traceback" not in output
    if code == 0:
        for line in output.splitlines():
            for tokens in json.loads(line)["sides"].values():
                assert isinstance("".join(text for text, _, _ in tokens), str)
    else:
        assert "hfpipe: " in output
    prepare_stage(folder, stage)


def prepare_stage(folder: Path, stage: str) -> None:
    """All rows as a run prepares them: used, or counted with a reason, or refused."""
    from hfpipe import paths
    from hfpipe.config import load_recipe
    from hfpipe.errors import UserError
    from hfpipe.stages import stage_module, stage_types
    from hfpipe.training.job import make_job
    from hfpipe.training.models import load_tokenizer

    recipe = load_recipe(folder / "recipe", stage_types(), [f"{stage}.data.max_bad_rows=1.0"])
    try:
        job = make_job(recipe, recipe.stages[stage], folder / "run", parent_fingerprint="")
        report = stage_module(stage).prepare(job, load_tokenizer(job)).report
    except UserError:
        COUNTS["rows refused"] += 1
    else:
        COUNTS["rows prepared"] += 1
        (source,) = report["sources"]
        assert (
            source["read"]
            >= source["used"] + sum(source["left_out"].values()) - source["duplicates"] - source["other_splits"]
        )
    assert not list((paths.cache_dir() / "prepared").glob("*.making"))


@fuzz(450)
@given(stage=st.sampled_from(sorted(GOOD)), rows=st.lists(ROWS, min_size=1, max_size=4), good=st.booleans())
def test_any_rows(trained, stage, rows, good):
    rows = [GOOD[stage], *rows] if good else rows
    lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows]
    check_rows(trained, stage, "".join(lines).encode("utf-8", "surrogatepass"))


@fuzz(200)
@given(stage=st.sampled_from(sorted(GOOD)), content=st.binary(max_size=60), at=st.integers(0, 60))
def test_any_bytes(trained, stage, content, at):
    line = json.dumps(GOOD[stage]).encode() + b"\n"
    check_rows(trained, stage, line + line[:at] + content + line[at:] + line)


def test_the_fuzzing_reached_both_ends():
    """Of more than two thousand inputs some were taken and some refused, through each door."""
    print(dict(COUNTS))
    assert COUNTS["plan 0"] + COUNTS["plan 2"] + COUNTS["inspect 0"] + COUNTS["inspect 2"] >= 2000
    for name in ("plan 0", "plan 2", "run 0", "run 2", "inspect 0", "inspect 2", "rows prepared", "rows refused"):
        assert COUNTS[name] > (3 if name == "run 0" else 20), COUNTS
