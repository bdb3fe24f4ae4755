"""`hfpipe new`: what it writes loads, plans without a warning, fits its device, is of the size asked for, and runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy
import pytest
from huggingface_hub import HfApi
from safetensors.numpy import save_file

from hfpipe.config import load_recipe
from hfpipe.data import tinyworld
from hfpipe.plan import describe_stage
from hfpipe.plan.devices import find_devices
from hfpipe.plan.quote import quote_stage
from hfpipe.plan.shapes import read_config, read_shape
from hfpipe.plan.sizing import LARGEST, SMALLEST, choose_shape
from hfpipe.stages import stage_types

from .conftest import ROOT, hfpipe, stage_json
from .localhub.server import USERS
from .test_house import HEAVY

FROM_SCRATCH = ["tokenizer", "pretrain", "midtrain", "sft", "dpo"]
# What is asked for, the parameters and the hours that it should come to, and what it is planned for.
ASKED = {
    "1M": (["--params", "1M"], 1e6, None, "cpu"),
    "5M": (["--params", "5M"], 5e6, None, "cpu"),
    "125M": (["--params", "125M"], 125e6, None, "h100"),
    "1B": (["--params", "1B"], 1e9, None, "h100x8"),
    "7B": (["--params", "7B"], 7e9, None, "h100x8"),
    "two hours of eight": (["--hours", "2", "--device", "h100x8"], None, 2, "h100x8"),
    "three minutes here": (["--hours", "0.05", "--device", "cpu"], None, 0.05, "cpu"),
    "a day of one": (["--hours", "24", "--device", "a100-40"], None, 24, "a100-40"),
    "money": (["--dollars", "20", "--device", "rtx4090"], None, 20 / 0.74, "rtx4090"),
    "size and hours": (["--params", "50M", "--hours", "3", "--device", "l4"], 50e6, 3, "l4"),
}


def numbers(folder, device: str) -> dict[str, dict]:
    """What the planner says of each stage that trains."""
    recipe, devices = load_recipe(folder, stage_types()), find_devices(device)
    trained = [stage for stage in recipe.stages.values() if stage.type.trainer]
    return {stage.name: describe_stage(recipe, stage, None, devices) for stage in trained}


@pytest.mark.parametrize("name", ASKED)
def test_it_plans_clean_and_is_what_was_asked_for(name, tmp_path):
    arguments, params, hours, device = ASKED[name]
    folder = tmp_path / "mine"
    said = hfpipe("new", folder, *arguments).stdout
    plan = numbers(folder, device)
    assert list(plan) == FROM_SCRATCH[1:]
    assert [stage["warnings"] for stage in plan.values()] == [[]] * 4
    if params:
        assert plan["pretrain"]["parameters"] == pytest.approx(params, rel=0.05)
    for stage in plan.values():
        assert stage["largest_per_device_train_batch_size"] >= stage["per_device_train_batch_size"]
    pretrain = plan["pretrain"]
    if hours:
        recipe, devices = load_recipe(folder, stage_types()), find_devices(device)
        full = [quote_stage(recipe, recipe.stages[stage], None, devices, full_rows=True).seconds for stage in plan]
        assert sum(full) == pytest.approx(3600 * hours, rel=0.05)  # dpo too, whose rows nobody has counted
        assert "at most about" in said or device == "cpu"
        assert "does not hold" not in said
    else:
        places = pretrain["steps"] * pretrain["batch_tokens"]
        assert places == pytest.approx(20 * pretrain["parameters"], rel=0.02)
    rates = [stage["learning_rate"] for stage in plan.values()]
    assert rates == sorted(rates, reverse=True)
    assert ("accelerate_config: fsdp2" in (folder / "pipeline.yaml").read_text()) == (name == "7B")
    assert f"{pretrain['steps']:,} steps" in said
    assert said.endswith(f"next: hfpipe plan {folder}{'' if device == 'cpu' else f' --device {device}'}\n")
    if device == "cpu":  # with tinyworld the plan itself needs no Hub
        told = hfpipe("plan", folder, "--out", tmp_path / "run").stdout
        assert "warning" not in told
        assert "unknown" not in told


def test_the_sets_of_the_hub_plan_clean_where_there_is_a_hub(hub_server, monkeypatch, tmp_path):
    folder, hub = tmp_path / "mine", hub_server["lfs"]
    hfpipe("new", folder, "--params", "125M", "--stages", "tokenizer,pretrain,midtrain,sft,reward,kto,dpo")
    named = {path for file in folder.glob("*.yaml") for path in re.findall(r"path: ([\w-]+/[\w-]+)", file.read_text())}
    assert len(named) == 5
    for path in named:
        monkeypatch.setitem(USERS["hf_alice_write"].organizations, path.partition("/")[0], "write")
        HfApi(hub.endpoint, "hf_alice_write").create_repo(path, repo_type="dataset")
    told = hfpipe("plan", folder, "--device", "h100", "--out", tmp_path / "run", env=hub.env()).stdout
    assert "warning" not in told
    hub.reset()


def test_the_comments_have_the_arithmetic(tmp_path):
    folder = tmp_path / "mine"
    hfpipe("new", folder, "--params", "125M")
    file = (folder / "pretrain.yaml").read_text()
    steps, ratio, params, each = re.search(
        r"max_steps: (\d+)  # ([\d.]+) tokens x (\d+)M .* / ([\d,]+) tokens", file
    ).groups()
    assert float(ratio) * float(params) * 1e6 / int(each.replace(",", "")) == pytest.approx(int(steps), rel=0.01)
    assert f"batch_tokens: {each.replace(',', '')} " in file
    chosen = [line for line in file.splitlines() if re.search(r": [\d.e-]+( |$)", line) and not line.startswith("#")]
    assert len(chosen) > 12
    assert [line.strip() for line in chosen if "#" not in line] == ["num_attention_heads: 14"]
    assert "hfpipe new mine --params 125M" in (folder / "pipeline.yaml").read_text()
    for each in folder.glob("*.yaml"):
        assert max(map(len, each.read_text().splitlines())) <= 160


def test_shapes_are_within_5_percent_from_the_smallest_on():
    sizes = [SMALLEST * (LARGEST / SMALLEST) ** (n / 60) for n in range(61)]
    for size in sizes:
        config, shape = choose_shape(size)
        assert shape.total == pytest.approx(size, rel=0.05)
        assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
        assert shape.heads * shape.head_dim == shape.hidden_size


# --- one's own data, one's own model ---


@pytest.fixture(scope="module")
def own_data(tmp_path_factory):
    """A folder of text, conversations and preferences."""
    folder = tmp_path_factory.mktemp("own data")

    def write(name: str, rows: list[dict]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("text.jsonl", [{"text": row["text"]} for row in tinyworld.rows("pretrain", size=3000)])
    write("talks.jsonl", [{"messages": row["messages"]} for row in tinyworld.rows("sft", size=500)])
    pairs = tinyworld.rows("preferences", size=400)
    write("pairs.jsonl", [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in pairs])
    (folder / "README.md").write_text("no data")
    return folder


def paths(folder, stage: str, role: str = "train") -> list[str]:
    sources = getattr(load_recipe(folder, stage_types()).stages[stage].data, role)
    return [source.path.rpartition("/")[2] + (f" as {source.as_}" if source.as_ else "") for source in sources]


def test_own_files_go_to_the_stage_of_their_form(own_data, tmp_path):
    folder = tmp_path / "mine"
    hfpipe("new", folder, "--params", "0.2M", "--data", own_data)
    assert list(load_recipe(folder, stage_types()).stages) == ["tokenizer", "pretrain", "sft", "dpo"]
    assert paths(folder, "pretrain") == ["text.jsonl"]
    assert paths(folder, "sft") == ["talks.jsonl", "text.jsonl as text"]
    assert paths(folder, "dpo") == paths(folder, "dpo", "eval") == ["pairs.jsonl"]
    told = hfpipe("plan", folder, "--out", tmp_path / "run", "--json").stdout
    stages = {row["stage"]: row for row in json.loads(told)["stages"]}
    # The text is read four times over at the most, whatever the size would want.
    assert stages["pretrain"]["tokens"] <= 4.5 * 3000 * 75
    assert "the text holds no more" in (folder / "pretrain.yaml").read_text()
    assert {w["name"] for row in stages.values() for w in row.get("warnings", [])} <= {"tokens_per_parameter"}


def splits(folder, stage: str, role: str = "train") -> list[tuple[str, str | None]]:
    data = load_recipe(folder, stage_types()).stages[stage].data
    return [(source.path.rpartition("/")[2], source.split) for source in getattr(data, role)]


@pytest.mark.parametrize("names", ["train validation test", "talks_training talks_dev talks_test", "train eval test"])
def test_files_that_name_splits_are_held_out(names, base, tmp_path):
    train, validation, test = (tmp_path / "data" / f"{name}.jsonl" for name in names.split())
    rows = [json.dumps({"messages": row["messages"]}) + "\n" for row in tinyworld.rows("sft", size=60)]
    train.parent.mkdir()
    for file, part in ((train, rows[:40]), (validation, rows[40:50]), (test, rows[50:])):
        file.write_text("".join(part))
    hfpipe("new", tmp_path / "mine", "--from", base, "--data", train.parent, "--stages", "sft")
    assert splits(tmp_path / "mine", "sft") == [(train.name, "all")]
    assert splits(tmp_path / "mine", "sft", "eval") == [(validation.name, "all")]
    hfpipe("plan", tmp_path / "mine", "--out", tmp_path / "run")
    validation.unlink()
    hfpipe("new", tmp_path / "other", "--from", base, "--data", train.parent, "--stages", "sft")
    assert splits(tmp_path / "other", "sft") == [(train.name, None)]  # of which a tenth is its validation split
    assert splits(tmp_path / "other", "sft", "eval") == [(train.name, "validation")]


def test_each_file_that_is_not_trained_on_is_named(base, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    pairs = list(tinyworld.rows("preferences", size=60))
    talks = [row["prompt"] + row["chosen"] for row in pairs]
    judged = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in pairs]
    for name, rows in (
        ("talks", [{"messages": talk} for talk in talks[:30]]),
        ("test", [{"messages": talk} for talk in talks[30:]]),
        ("judged", judged),
        ("asked", [{"prompt": row["prompt"]} for row in pairs]),
    ):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number in range(12):
        (data / f"x{number:02}.xlsx").write_text("")
    arguments = ("new", "--from", base, "--data", data, "--device", "cpu")
    told = hfpipe(*arguments, tmp_path / "mine", "--stages", "sft").stdout
    assert [line for line in told.splitlines() if line.startswith("not trained on")] == [
        f"not trained on: {', '.join(f'x{number:02}.xlsx' for number in range(10))} and 2 more (no kind of file that is read)",
        "not trained on: test.jsonl (named test, held out)",
        "not trained on: asked.jsonl (prompt, which no stage written here takes)",
        "not trained on: judged.jsonl (unpaired preference: --stages sft,kto)",
    ]
    assert "judged" not in hfpipe(*arguments, tmp_path / "other", "--stages", "sft,kto").stdout


@pytest.mark.parametrize("data", ["everything", "conversations", "nothing"])
def test_from_a_model_that_is_there(data, micro_run, own_data, tmp_path):
    folder, chosen = tmp_path / "mine", own_data
    if data == "conversations":
        chosen = tmp_path / "talks"
        chosen.mkdir()
        (chosen / "talks.jsonl").write_text((own_data / "talks.jsonl").read_text())
    hfpipe("new", folder, "--from", micro_run / "pretrain", *([] if data == "nothing" else ["--data", chosen]))
    stages = load_recipe(folder, stage_types()).stages
    first = next(iter(stages.values()))
    assert first.model.from_ == str(micro_run / "pretrain")
    assert (
        list(stages)
        == {"everything": ["midtrain", "sft", "dpo"], "conversations": ["sft"], "nothing": ["sft", "dpo"]}[data]
    )
    if data == "everything":
        assert paths(folder, "midtrain") == ["text.jsonl as text"]
    # Without text to replay only an adapter is trained.
    assert {stage.adapter.type if stage.adapter else None for stage in stages.values()} == {
        "lora" if data == "conversations" else None
    }
    told = hfpipe("plan", folder, "--out", tmp_path / "run").stdout
    assert "warning" not in told
    assert "llama, 150k parameters" in told


def test_from_the_hub_at_its_commit(hub_server, micro_run, tmp_path):
    hub, folder = hub_server["lfs"], tmp_path / "mine"
    env = hub.env() | {"HF_HOME": str(tmp_path / "home")}
    assert hfpipe("new", folder, "--from", "alice/base", check=2, env=env).stderr.count("\n") == 1
    api = HfApi(hub.endpoint, "hf_alice_write")
    api.create_repo("alice/base")
    commit = api.upload_file(
        path_or_fileobj=micro_run / "sft" / "config.json", path_in_repo="config.json", repo_id="alice/base"
    )
    hfpipe("new", folder, "--from", "alice/base", env=env)
    assert f"from: alice/base@{commit.oid}" in (folder / "sft.yaml").read_text()
    assert "chat_template: chatml" in (folder / "sft.yaml").read_text()  # it came without one
    assert "llama, 150k parameters" in hfpipe("plan", folder, "--out", tmp_path / "run", env=env).stdout
    hub.reset()


@pytest.fixture
def base(tmp_path):
    """A model as far as it is read before it trains, without a chat template."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(BASE))
    save_file({"model.norm.weight": numpy.ones(64, "float32")}, folder / "model.safetensors")
    return folder


BASE = {"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
BASE |= {"num_attention_heads": 2, "max_position_embeddings": 128}


@pytest.mark.parametrize("stages", ["dpo", "kto", "reward,dpo", "sft,dpo", "midtrain"])
def test_the_first_stage_gives_a_chat_template(stages, base, tmp_path):
    first, gives = stages.partition(",")[0], stages.startswith(("sft", "midtrain"))
    arguments = ("new", tmp_path / "mine", "--from", base, "--data", "tinyworld", "--stages", stages)
    told = hfpipe(*arguments, check=0 if gives else 2)
    if gives:
        stage = load_recipe(tmp_path / "mine", stage_types()).stages[first]
        assert stage.sections["tokenizer"].chat_template == "chatml"
    else:
        assert f"no chat template, and a {first} stage gives it none. Begin with sft" in told.stderr
        assert not (tmp_path / "mine").exists()
        (base / "chat_template.jinja").write_text("{{ messages }}")
        hfpipe(*arguments)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{broken", "not readable as JSON"),
        ("[]", "expected a mapping with model_type, found list"),
        *(
            (json.dumps({**BASE, **wrong}), words)
            for wrong, words in (
                ({"hidden_size": "big"}, "no model can be made of these values"),
                ({"hidden_size": 0}, "one of its sizes is 0"),
                ({"vocab_size": None}, "one of its sizes is None"),
                ({"max_position_embeddings": "x"}, "one of its sizes is 'x'"),
            )
        ),
    ],
)
def test_a_model_at_fault_is_named(config, words, base, tmp_path):
    (base / "config.json").write_text(config)
    told = hfpipe("new", tmp_path / "mine", "--from", base, "--data", "tinyworld", check=2).stderr
    assert f"{base / 'config.json'}: {words}" in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("name", ["123", "1e5", "null", "2026-13-45"])
def test_a_name_that_yaml_reads_as_something_else(name, tmp_path):
    hfpipe("new", tmp_path / name, "--params", "0.2M", "--stages", "tokenizer,pretrain")
    assert load_recipe(tmp_path / name, stage_types()).name == name


def test_the_command_makes_the_same_recipe_again(tmp_path):
    arguments = ["--params", "1234567", "--device", "cpu", "--utilisation", "0.35"]
    hfpipe("new", tmp_path / "mine", *arguments, "--stages", "tokenizer,pretrain")
    written = (tmp_path / "mine" / "pipeline.yaml").read_text().splitlines()[1]
    assert written.removeprefix("#   hfpipe new mine ").split()[:6] == arguments


def test_a_budget_that_the_later_stages_take_is_told(tmp_path):
    said = hfpipe("new", tmp_path / "mine", "--params", "1M", "--hours", "0.01", "--device", "cpu").stdout
    assert re.search(r"note: the budget does not hold: the later stages take about .* of 36 s", said)


def test_the_smallest_runs(tmp_path):
    folder, run = tmp_path / "mine", tmp_path / "run"
    hfpipe("new", folder, "--params", "0.2M", "--data", "tinyworld", "--stages", "tokenizer,pretrain,sft,dpo")
    few = ["evaluate={samples: 1, max_new_tokens: 4}", "tokenizer.data.train=[{path: tinyworld/pretrain, limit: 500}]"]
    for stage, rows in (("pretrain", "pretrain"), ("sft", "sft"), ("dpo", "preferences")):
        few += [f"{stage}.trainer.max_steps=3", f"{stage}.trainer.warmup_steps=0"]
        few += [f"{stage}.data.{role}=[{{path: tinyworld/{rows}, limit: 200}}]" for role in ("train", "eval")]
    hfpipe("run", folder, "--out", run, *(word for setting in few for word in ("--set", setting)))
    planned = numbers(folder, "cpu")["pretrain"]["parameters"]
    words = stage_json(run / "tokenizer")["metrics"]["vocab_size"]
    assert planned == pytest.approx(0.2e6, rel=0.05)
    made = read_shape(read_config(run / "dpo"))
    assert made.total == planned - (640 - words) * made.hidden_size  # of so little text fewer entries come
    assert [stage_json(run / stage)["metrics"]["steps"] for stage in ("pretrain", "sft", "dpo")] == [3, 3, 3]


# --- what is at fault ---


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Give a size (--params 125M), a budget"),
        (["--params", "0"], "--params 0: expected a finite number above 0"),
        (["--params", "10k"], "expected from 200000 to 1e+12"),
        (["--params", "1M", "--device", "h1000"], "Did you mean `h100`?"),
        (["--hours", "2"], "--hours needs --device"),
        (["--params", "7B", "--device", "l4"], "do not train on NVIDIA L4: not one row fits into 24 GB"),
        (["--params", "1M", "--data", "nowhere"], "--data nowhere: no such folder"),
        (["--params", "1M", "--data", str(ROOT / "chat_templates")], "Expected files in one of the forms"),
        (["--params", "1M", "--stages", "tokenizer,pretrian"], "Did you mean `pretrain`?"),
        (["--params", "1M", "--stages", "pretrain,tokenizer"], "expected each once, in this order"),
        (["--params", "1M", "--stages", "sft"], "begins with tokenizer,pretrain"),
        (["--from", str(ROOT)], "there is no config.json"),
        (["--from", "org/model", "--params", "1M"], "--params has no meaning beside it"),
    ],
)
def test_bad_input_writes_nothing(arguments, words, tmp_path):
    done = hfpipe("new", tmp_path / "mine", *arguments, check=2, env={"HF_HUB_OFFLINE": "1"})
    assert words in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["file/mine", "file/sub/mine", "/proc/mine", "x" * 300])
def test_where_nothing_can_be_written(place, tmp_path):
    (tmp_path / "file").write_text("")
    done = hfpipe("new", tmp_path / place, "--params", "1M", check=2)
    assert f"{tmp_path / place} cannot be written: " in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_own_data_at_fault_is_named(own_data, base, tmp_path):
    (tmp_path / "talks").mkdir()
    file = tmp_path / "talks" / "talks.jsonl"
    file.write_text((own_data / "talks.jsonl").read_text())
    told = hfpipe("new", tmp_path / "mine", "--data", file.parent, check=2).stderr
    assert f"{file.parent} holds 1 x messages and no text" in told
    assert "give --from MODEL, or add text" in told
    file.rename(file.with_name("my {notes} x.jsonl"))
    told = hfpipe("new", tmp_path / "mine", "--data", file.parent, "--from", base, check=2).stderr
    assert "my {notes} x.jsonl: in a recipe's paths {notes} stands for a setting" in told
    base.rename(tmp_path / "{base}")
    told = hfpipe("new", tmp_path / "mine", "--from", tmp_path / "{base}", check=2).stderr
    assert "stands for a setting" in told


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "mine").mkdir()
    hfpipe("new", tmp_path / "mine", "--params", "1M")  # an empty folder may be there
    before = {file: file.read_text() for file in (tmp_path / "mine").iterdir()}
    assert "is there already and not empty" in hfpipe("new", tmp_path / "mine", "--params", "2M", check=2).stderr
    assert {file: file.read_text() for file in (tmp_path / "mine").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_it_imports_nothing_heavy(tmp_path):
    arguments = ["new", str(tmp_path / "mine"), "--params", "1B"]
    code = f"import sys\nfrom hfpipe.cli import main\nassert main({arguments!r}) == 0\n"
    code += f"assert not {HEAVY!r} & set(sys.modules), {HEAVY!r} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
