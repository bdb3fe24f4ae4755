"""The Python API through the door that a plain script has."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from hfpipe import StageFailed, UserError, artifact, load_model, load_pipeline, load_run, pull

from .conftest import ROOT, hfpipe
from .test_house import HEAVY

MODELS = ["pretrain", "midtrain", "sft", "dpo"]
STAGES = ["tokenizer", *MODELS]


def script(text: str, cwd, check: bool = True) -> subprocess.CompletedProcess:
    (cwd / "script.py").write_text(text)
    done = subprocess.run([sys.executable, "script.py"], cwd=cwd, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def run(micro_run):
    return load_run(micro_run)


def test_the_names_are_there_at_once_and_import_nothing_heavy(tmp_path):
    text = "import sys\nbefore = set(sys.modules)\nimport hfpipe\n"
    text += "assert set(sys.modules) - before == {'hfpipe'}, set(sys.modules) - before\n"
    text += "from hfpipe import StageFailed, UserError, load_model, load_pipeline, load_run\n"
    text += f"load_pipeline('tiny')\nassert not {HEAVY!r} & set(sys.modules), {HEAVY!r} & set(sys.modules)\n"
    text += "load_pipeline('tiny').plan()\nassert not {'torch', 'transformers'} & set(sys.modules)\n"
    text += "try:\n    hfpipe.load_nothing\nexcept AttributeError:\n    print('as any module')"
    assert script(text, tmp_path).stdout == "as any module\n"


def test_a_script_without_a_guard_runs_goes_on_and_begins_once(tmp_path):
    text = """
import os
from hfpipe import load_pipeline

print("began")
small = {f"{name}.trainer.max_steps": 3 for name in ("pretrain", "midtrain")}
pipe = load_pipeline("micro", small)
print(list(pipe.plan("out")["status"]))
first = pipe.run("out", to="pretrain")
os.environ["HFPIPE_CACHE"] = "other"  # the fork server stands already; its next child must know of it
second = load_pipeline("micro", small).run("out", from_="tokenizer", to="midtrain")
print(list(first), second, list(pipe.plan("out")["status"]), "TQDM_DISABLE" in os.environ)
"""
    done = script(text, tmp_path)
    lines = done.stdout.splitlines()
    assert lines.count("began") == 1
    assert lines[1] == str(["new"] * 5)
    assert [line.split()[0] for line in lines if "done already" in line] == ["tokenizer", "pretrain"]
    assert lines[-1] == (
        "['tokenizer', 'pretrain', 'midtrain'] Run('out': tokenizer, pretrain, midtrain) "
        "['done', 'done', 'done', 'new', 'new'] False"
    )
    assert "tokenizer, pretrain, midtrain are complete in out" in done.stdout
    assert (tmp_path / "out" / "report.html").is_file()
    assert list((tmp_path / "other").iterdir())
    assert "Traceback" not in done.stderr


def test_the_working_folder_may_change_in_between(micro_run, tmp_path):
    text = f"""
import os
from hfpipe import load_model, load_run

os.chdir({str(micro_run.parent)!r})
run, model = load_run("micro"), load_model("micro/sft")
before = run.scorecard()
os.chdir({str(tmp_path)!r})
assert run.scorecard().equals(before), run
print(list(run), run["sft"].tokenizer().eos_token == model.tokenizer().eos_token, list(run.status()["state"]))
"""
    assert script(text, tmp_path).stdout.splitlines()[-1] == f"{STAGES} True {['finished'] * 5}"


def test_a_stage_that_dies_is_told_as_on_the_command_line(tmp_path):
    text = "from hfpipe import load_pipeline\n"
    text += "load_pipeline('micro', {'pretrain.trainer.learning_rate': 1e30}).run('out', to='pretrain')"
    done = script(text, tmp_path, check=False)
    assert done.returncode == 1
    assert "hfpipe.errors.StageFailed: pretrain failed: Diverged: step " in done.stderr
    assert "It has gone back 3 times (guards.max_rollbacks)" in done.stderr
    assert "Lower trainer.learning_rate" in done.stderr
    assert load_run(tmp_path / "out")["tokenizer"].metrics["vocab_size"] == 768
    assert list(load_run(tmp_path / "out")) == ["tokenizer"]


def test_plan_says_what_the_command_says(micro_run):
    overrides = {"sft.trainer.learning_rate": 1e-5, "dpo.data.train": [{"path": "tinyworld/preferences", "limit": 100}]}
    frame = load_pipeline("micro", overrides).plan(micro_run)
    assert list(frame["status"]) == ["done", "done", "done", "changed", "changed"]
    assert frame.loc["sft", "why"] == "trainer.learning_rate 0.001 -> 1e-05"
    settings = [word for key, value in overrides.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    rows = json.loads(hfpipe("plan", "micro", "--out", micro_run, *settings, "--json").stdout)["stages"]
    assert list(frame.index) == [row["stage"] for row in rows]
    assert list(frame["why"]) == ["; ".join(row["why"]) for row in rows]
    assert load_pipeline("micro", ["sft.trainer.learning_rate=1e-5"]).plan(micro_run).loc["sft", "status"] == "changed"


def test_an_edit_of_the_recipe_counts_from_the_next_call_on(micro_run, recipe):
    folder = recipe()
    pipe = load_pipeline(folder)
    assert set(pipe.plan(micro_run)["status"]) == {"done"}
    file = folder / "dpo.yaml"
    file.write_text(file.read_text().replace("beta: 0.1", "beta: 0.2"))
    assert pipe.plan(micro_run).loc["dpo", "why"] == "trainer.beta 0.1 -> 0.2"
    file.write_text("stage: dpo\nmodle: 1\n")
    with pytest.raises(UserError, match="Did you mean `model`"):
        pipe.plan(micro_run)


def test_the_scorecard_is_that_of_the_report(run, micro_run):
    told = json.loads(hfpipe("report", micro_run, "--json").stdout)
    frame, long = run.scorecard(), run.scorecard(long=True)
    assert list(frame.columns) == MODELS
    assert frame.size == len(long) == sum(len(cells) for cells in told["stages"].values())
    for row in long.to_dict("records"):
        cell = told["stages"][row["stage"]][row["capability"]]
        assert frame.loc[row["capability"], row["stage"]] == row["score"] == cell["score"]
        assert [row[key] for key in ("low", "high", "n", "arrow")] == [cell[k] for k in ("low", "high", "n", "arrow")]
    assert "↑" in set(long["arrow"])
    assert run.report() == micro_run / "report.html"


def test_curves_and_plot(run, micro_run):
    curves = run.curves()
    assert list(curves["stage"].unique()) == MODELS
    lines = [json.loads(line) for line in (micro_run / "sft" / "metrics.jsonl").read_text().splitlines()]
    assert list(curves[curves["stage"] == "sft"]["loss"]) == [line["loss"] for line in lines]
    figure = run.plot()
    assert figure._repr_png_().startswith(b"\x89PNG")
    above, below = (part.axes[0] for part in figure.subfigs)
    assert [line.get_label() for line in above.get_lines() if not line.get_label().startswith("_")] == MODELS
    words = [text.get_text() for text in below.texts]
    assert len(words) == run.scorecard().size
    assert any(word.startswith("↑ ") for word in words)
    picture = below.get_images()[0].get_array()
    assert picture.shape[:2] == run.scorecard().shape
    assert tuple(picture[list(run.scorecard().index).index("turn_taking"), 1]) == (92, 184, 170)


def test_a_stage_has_what_it_left(run, micro_run):
    sft = run["sft"]
    assert sft.folder == micro_run / "sft"
    assert sft.metrics["steps"] == sft.record["metrics"]["steps"] > 0
    assert sft.eval == json.loads((micro_run / "sft" / "eval.json").read_text())
    assert list(sft.samples["asked"]) == [sample["asked"] for sample in sft.eval["samples"]]
    assert type(sft.model()).__name__ == "LlamaForCausalLM"
    assert sft.model() is not sft.model()
    assert sft.tokenizer().encode("Hello") == run["tokenizer"].tokenizer().encode("Hello")
    assert list(run) == ["tokenizer", *MODELS]


def test_chat_is_what_the_command_answers(run, micro_run):
    options = ["--prompt", "What is 2+2?", "--system", "You are kind.", "--max-new-tokens", "20", "--json"]
    told = json.loads(hfpipe("chat", micro_run / "sft", *options).stdout)
    session = run["sft"].session("You are kind.", max_new_tokens=20)
    assert session.say("What is 2+2?").text == told["answer"]
    assert session.messages[1:] == told["messages"]
    assert run["sft"].chat("What is 2+2?", system="You are kind.", max_new_tokens=20) == told["answer"]


def test_the_calculator_works(learned):
    model = load_model(learned[0])
    assert model.chat("What is 12 * 34?") == "12 × 34 = 408"
    session = model.session()
    session.say("What is 12 * 34?")
    assert [message["role"] for message in session.messages] == ["user", "assistant", "tool", "assistant"]
    assert session.messages[2]["content"] == "408"


def test_score_is_what_eval_prints(run, micro_run, tmp_path):
    probes = tmp_path / "mine.jsonl"
    asked = {"capability": "sums", "messages": [{"role": "user", "content": "What is 2+2?"}]}
    probes.write_text(json.dumps({**asked, "check": {"type": "contains", "value": "1"}}) + "\n")
    told = json.loads(hfpipe("eval", micro_run / "sft", "--probes", probes, "--json").stdout)["capabilities"]
    found = run["sft"].score(probes)
    assert found.to_dict("index") == {"sums": {key: told["sums"][key] for key in ("score", "low", "high", "n")}}


def test_a_model_made_anew_is_loaded_anew(micro_run, tmp_path):
    copy = shutil.copytree(micro_run, tmp_path / "micro")
    before = load_run(copy)["dpo"].chat("Hello!", max_new_tokens=20)
    shutil.rmtree(copy / "dpo")
    shutil.copytree(copy / "pretrain", copy / "dpo")
    after = load_run(copy)["dpo"].chat("Hello!", max_new_tokens=20)
    assert after == load_run(micro_run)["pretrain"].chat("Hello!", max_new_tokens=20) != before


def test_what_answers_nothing(micro_run, tmp_path):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(micro_run / "sft")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=0, **shape)
    folder = tmp_path / "run" / "reward"
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    artifact.write_record(folder / "stage.json", {"type": "reward", "metrics": {}, "fingerprint": ""})
    artifact.write_json(folder.parent / "run.json", {"recipe": "mine", "stages": ["sft", "reward"]})
    reward = load_run(folder.parent)["reward"]
    assert reward.model().config.num_labels == 1
    assert "is a reward model" in hfpipe("chat", folder, "--prompt", "Hello!", check=2).stderr
    assert type(reward.model()).__name__ == "LlamaForSequenceClassification"
    for stage in (reward, load_run(micro_run)["tokenizer"]):
        with pytest.raises(UserError, match="leaves no model that answers"):
            stage.chat("Hello!")
    with pytest.raises(UserError, match="leaves no model"):
        load_run(micro_run)["tokenizer"].model()


def test_faults_are_told_in_the_words_of_the_command_line(micro_run, tmp_path):
    recipe = ROOT / "stage_configs" / "micro"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("Dear all")
    for act, command in (
        (lambda: load_pipeline("tyny"), ["plan", "tyny"]),
        (
            lambda: load_pipeline(recipe, {"sft.trainer.learing_rate": 1, "dpo.model.from": "tokenizer"}),
            ["plan", recipe, "--set", "sft.trainer.learing_rate=1", "--set", "dpo.model.from=tokenizer"],
        ),
        (lambda: load_pipeline("micro").run(tmp_path / "full"), ["run", "micro", "--out", tmp_path / "full"]),
        (lambda: load_pipeline("tiny").plan(micro_run), ["plan", "tiny", "--out", micro_run]),
        (
            lambda: load_pipeline("micro").run(micro_run, only="stf"),
            ["run", "micro", "--out", micro_run, "--only", "stf"],
        ),
        (lambda: load_run(tmp_path), ["report", tmp_path]),
        (lambda: load_model(tmp_path).chat("Hello!"), ["chat", tmp_path, "--prompt", "Hello!"]),
    ):
        with pytest.raises(UserError) as told:
            act()
        assert hfpipe(*command, check=2).stderr == f"hfpipe: {told.value}\n"
    with pytest.raises(UserError, match="Did you mean `sft`"):
        load_run(micro_run)["stf"]
    assert not issubclass(StageFailed, UserError)


def test_what_no_command_line_could_be_given_is_told(run, micro_run):
    pipe, sft = load_pipeline("micro"), run["sft"]
    for act, told in (
        (lambda: sft.chat(5), "text = 5: expected a text"),
        (lambda: sft.chat([{"role": "user", "content": "Hi"}]), "text = [{'role': 'user'"),
        (lambda: sft.chat("Hi", system=5), "system = 5: expected a text"),
        (lambda: sft.chat("Hi", max_new_tokens=0), "max_new_tokens = 0: expected 1 or more"),
        (lambda: sft.session(max_new_tokens="5"), "max_new_tokens = '5': expected a number"),
        (lambda: run[5], "5 is no finished stage of"),
        (lambda: load_pipeline("micro", 5), "overrides = 5: expected a mapping, such as"),
        (lambda: load_pipeline("micro", [5]), "overrides = 5: expected a mapping, such as"),
        (lambda: load_run(None), "folder = None: expected a folder's path"),
        (lambda: load_model(5), "source = 5: expected a folder's path"),
        (lambda: pull(5), "source = 5: expected org/model@revision"),
        (lambda: pipe.plan(5), "out = 5: expected a folder's path"),
        (lambda: pipe.inspect("sft", "1", micro_run), "row = '1': expected a number, counted from 1"),
        (lambda: run.push(5), "repo_id = 5: expected NAMESPACE/NAME"),
        (lambda: run.push("me/x", private="no"), "private = 'no': expected True or False"),
        (lambda: run.push("me/x", stages=5), "stages = 5: expected names of stages"),
    ):
        with pytest.raises(UserError) as error:
            act()
        assert told in str(error.value)


def test_a_run_without_a_model_yet(micro_run, tmp_path):
    shutil.copytree(micro_run / "tokenizer", tmp_path / "tokenizer")
    shutil.copy(micro_run / "run.json", tmp_path)
    run = load_run(tmp_path)
    for act in (run.scorecard, run.plot, run.report):
        with pytest.raises(UserError, match="holds no finished stage that left a language model"):
            act()
    assert list(run.curves().groupby("stage")["loss"].max()) == []
    assert list(run["tokenizer"].samples["answer"]) == []
    assert list(run.status()["state"]) == ["finished", *["not begun"] * 4]
    shutil.rmtree(tmp_path)
    for act in (run.scorecard, run.plot, run.report, run.status):
        with pytest.raises(UserError, match="is not a run's folder"):
            act()


def test_what_a_bare_name_shows(run, micro_run):
    assert repr(load_pipeline("micro", {"seed": 1})) == "Pipeline('micro', seed=1)"
    assert repr(run) == f"Run({str(micro_run)!r}: {', '.join(STAGES)})"
    assert repr(run["sft"]).startswith(f"Stage({str(micro_run / 'sft')!r}: {run['sft'].metrics['steps']} steps, ")
    assert repr(load_model("org/model@main")) == "Model('org/model@main')"


def test_a_row_inspected_reads_as_in_the_terminal(micro_run):
    shown = hfpipe("inspect", ROOT / "stage_configs" / "micro" / "sft.yaml", "--out", micro_run, "--row", "3").stdout
    assert f"{load_pipeline('micro').inspect('sft', 3, micro_run)}\n" == shown
    with pytest.raises(UserError, match="trains on no rows"):
        load_pipeline("micro").inspect("tokenizer")
