"""Synthetic rows: teachers near and far, what is kept and why, kills, and the stage that trains on what was made."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow.parquet
import pytest

from hfpipe.artifact import digest
from hfpipe.errors import UserError
from hfpipe.evaluation.judges import _GRADE
from hfpipe.pipeline import open_recipe
from hfpipe.synthesis.make import _ASK_BACK
from hfpipe.synthesis.sandbox import check_isolation

from .conftest import ROOT, hfpipe, stage_json

HI, FRIENDS = "Hello! How can I help you?", "Hello to all of your friends here, and to you!"
SUM = "12 × 34 = 408"


def called(asked: str, expression: str, result: str, said: str) -> list[dict]:
    call = {"type": "function", "function": {"name": "calculator", "arguments": expression}}
    return [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": result},
        {"role": "assistant", "content": said},
    ]


def talk(asked: str, said: str) -> list[dict]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]


def graded(asked: str, answer: str, grade: str) -> list[dict]:
    return talk(_GRADE.format(asked=f"user: {asked}", answer=answer), grade)


# What the teacher knows by heart, its faults among it.
KNOWN = [
    called("What is 12 * 34?", "12 * 34", "408", SUM),
    called("What is 12 * 35?", "12 * 34", "408", "12 × 35 = 408"),
    talk("What is 2 + 3?", "2 + 3 equals 5."),
    called("What do I get for 12 * 36 in all?", "12 * 36", "432", "12 × 36 = 432"),
    talk("Hello!", HI),
    talk("Please say hello to all of my friends here", FRIENDS),
    talk("Please say hello to all of my friends here!", FRIENDS),
    talk(_ASK_BACK.replace("{answer}", SUM), "What is 12 * 34?"),
    talk(_ASK_BACK.replace("{answer}", HI), "Hello!"),
    graded("Hello!", HI, "9"),
    graded("What is 12 * 34?", SUM, "2"),
]
ASKED = [row[0]["content"] for row in KNOWN[:7]]
MODEL = "{model_type: llama, hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 4, intermediate_size: 128}"
TRAINER = "per_device_train_batch_size: 4, activation_checkpointing: false, bf16: false, lr_scheduler_type: constant"
RECIPE = {
    "pipeline": "name: nano\nstages: [tokenizer, pretrain, teacher, student]\nsynth: synth.yaml\n"
    "evaluate: {samples: 1, max_new_tokens: 4, probes: [{path: FOLDER/probes.jsonl}]}\n",
    "tokenizer": "stage: tokenizer\ntokenizer: {vocab_size: 420}\ndata: {train: [{path: FOLDER/text.txt, split: all}]}\n",
    "pretrain": f"stage: pretrain\nmodel: {{from: tokenizer, config: {MODEL}}}\n"
    "data: {max_length: 64, train: [{path: FOLDER/text.txt, split: all}]}\n"
    f"trainer: {{max_steps: 2, {TRAINER}}}\n",
    "teacher": "stage: midtrain\nmodel: {from: pretrain}\ndata: {train: [{path: FOLDER/known.jsonl, split: all}]}\n"
    f"trainer: {{max_steps: 160, learning_rate: 4.0e-3, max_length: 512, {TRAINER}}}\n",
    "student": "stage: sft\nmodel: {from: pretrain}\ndata: {train: [{path: synth/sums}]}\n"
    f"tokenizer: {{chat_template: hfpipe}}\ntrainer: {{max_steps: 2, max_length: 128, {TRAINER}}}\n",
    "synth": """
sums:
  method: verified
  teacher: {model: teacher, input_price: 1.0, output_price: 2.0}
  prompts: {path: FOLDER/asked.jsonl, split: all}
  temperature: 0
  max_new_tokens: 40
  verify: [{check: calculator}]
talks:
  method: distil
  teacher: {model: teacher}
  prompts: {path: FOLDER/asked.jsonl, split: all}
  samples: 2
  temperature: 0.01
  max_new_tokens: 40
back:
  method: backtranslate
  teacher: {model: teacher}
  prompts: {path: FOLDER/known.jsonl, split: all}
  temperature: 0
  max_new_tokens: 40
  verify: [{check: calculator}]
many:
  method: distil
  teacher: {model: teacher}
  prompts: {path: FOLDER/asked.jsonl, split: all}
  samples: 64
  temperature: 1.5
  max_new_tokens: 40
  seed: 5
""",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path, str]:
    """A recipe whose student learns from its teacher's verified answers, run in one go: its folder, the run, what it said."""
    folder = tmp_path_factory.mktemp("synth")
    (folder / "recipe").mkdir()
    for name, text in RECIPE.items():
        (folder / "recipe" / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))
    write(folder / "known.jsonl", [{"messages": row} for row in KNOWN])
    write(folder / "asked.jsonl", [{"prompt": asked} for asked in ASKED])
    held_out = {"capability": "sums", "prompt": ASKED[3], "check": {"type": "number", "value": 432}}
    write(folder / "probes.jsonl", [held_out])
    (folder / "text.txt").write_text("\n\n".join(m["content"] for row in KNOWN for m in row))
    done = hfpipe("run", folder / "recipe", "--out", folder / "run")
    return folder / "recipe", folder / "run", done.stdout


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows(run: Path, name: str) -> list[dict]:
    return pyarrow.parquet.read_table(run / "synth" / f"{name}.parquet").to_pylist()


def said(row: dict) -> list[str]:
    return [message["content"] for message in row["messages"]]


def rejected(run: Path, name: str) -> dict[str, list[str]]:
    """Reason -> what was asked."""
    found: dict[str, list[str]] = {}
    for row in rows(run, f"{name}.rejected"):
        found.setdefault(row["reason"], []).append(row["messages"][0]["content"])
    return found


def test_what_passes_is_kept_with_how_it_came_to_be_and_the_rest_with_the_reason(made):
    _, run, _ = made
    kept = rows(run, "sums")
    assert [said(row) for row in kept] == [["What is 12 * 34?", "", "408", SUM], ["What is 2 + 3?", "2 + 3 equals 5."]]
    assert kept[0]["messages"][1]["tool_calls"][0]["function"] == {"name": "calculator", "arguments": "12 * 34"}
    fingerprint = stage_json(run / "teacher")["fingerprint"]
    first = kept[0]
    assert first["made_by"] == f"teacher@{fingerprint[:16]}"
    assert first["made_from"].endswith("asked.jsonl line 1")
    assert (first["method"], first["sample"]) == ("verified", 0)
    assert first["seed"] == int(digest([0, 0])[:7], 16)
    assert json.loads(first["verdict"]) == {"calculator": "passed"}
    assert first["completion_tokens"] > 0
    assert rejected(run, "sums") == {
        "calculator: an equation does not hold": ["What is 12 * 35?"],
        "calculator: no arithmetic to check": ASKED[4:],
        f"shows held-out rows: probes {run.parent}/probes.jsonl": [ASKED[3]],
    }
    record = json.loads((run / "synth" / "sums.json").read_text())
    assert (record["asked"], record["kept"]) == (7, 2)
    cost = record["cost"]
    assert cost["dollars"] == pytest.approx((cost["prompt_tokens"] + 2 * cost["completion_tokens"]) / 1e6, abs=1e-6)
    every = [*kept, *rows(run, "sums.rejected")]
    assert cost["completion_tokens"] == sum(row["completion_tokens"] for row in every)


def test_the_stage_trains_on_them_in_one_go_and_runs_again_where_they_would_be_others(made):
    recipe, run, told = made
    assert "synth/sums 2 of 7 answers of teacher@" in told
    assert told.index("teacher    160 steps") < told.index("synth/sums") < told.index("student    2 steps")
    source = stage_json(run / "student")["sources"][0]
    assert (source["used"], source["form"]) == (2, "messages")
    assert "student    done already" in hfpipe("run", recipe, "--out", run).stdout
    assert f"holds     train[0] {run}/synth/sums.parquet" in hfpipe("lineage", run / "student").stdout
    plans = {
        change: {
            item["stage"]: item["status"]
            for item in json.loads(hfpipe("plan", recipe, "--out", run, "--json", *change).stdout)["stages"]
        }
        for change in ((), ("--set", "synth.sums.seed=1"), ("--set", "synth.sums.teacher.input_price=3"))
    }
    assert [plan["student"] for plan in plans.values()] == ["done", "changed", "done"]
    (run / "synth" / "sums.parquet").write_bytes(b"")  # damaged rows are not trained on
    damaged = json.loads(hfpipe("plan", recipe, "--out", run, "--json").stdout)["stages"]
    assert [item["status"] for item in damaged if item["stage"] == "student"] == ["changed"]
    made_again = json.loads(hfpipe("data", "synth", recipe, "--out", run, "--only", "sums", "--json").stdout)
    assert made_again["sums"]["kept"] == len(rows(run, "sums"))
    assert "student    done already" in hfpipe("run", recipe, "--out", run).stdout


def test_repeats_are_left_out_and_answers_give_questions(made):
    recipe, run, _ = made
    hfpipe("data", "synth", recipe, "--out", run, "--only", "talks")
    kept = {row["messages"][0]["content"] for row in rows(run, "talks")}
    assert kept == {*ASKED[:3], *ASKED[4:6]}
    reasons = rejected(run, "talks")
    assert reasons["near duplicate"] == [ASKED[6]]
    assert sorted(reasons["duplicate"]) == sorted({*ASKED} - {ASKED[3]})  # which shows a probe, both times
    hfpipe("data", "synth", recipe, "--out", run, "--only", "back")
    (row,) = rows(run, "back")
    assert said(row) == ["What is 12 * 34?", "", "408", SUM]
    assert row["made_from"].endswith("known.jsonl line 1")


def test_killed_at_any_moment_the_same_command_goes_on_to_the_same_rows(made, tmp_path):
    recipe, run, _ = made
    for name in ("whole", "killed"):
        shutil.copytree(run, tmp_path / name, ignore=shutil.ignore_patterns("many*"))
    command = ("data", "synth", recipe, "--only", "many", "--out")
    hfpipe(*command, tmp_path / "whole")
    parts = tmp_path / "killed" / "synth" / "many.partial"
    process = subprocess.Popen([sys.executable, "-m", "hfpipe", *map(str, command), tmp_path / "killed"])
    while not list(parts.glob("part-*.json")):
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "synth" / "many.parquet").exists()
    part = json.loads((parts / "part-00000.json").read_text())
    part["seconds"] = 1e6  # a part that is there is not asked again
    (parts / "part-00000.json").write_text(json.dumps(part))
    hfpipe(*command, tmp_path / "killed")
    assert json.loads((tmp_path / "killed" / "synth" / "many.json").read_text())["cost"]["seconds"] >= 1e6
    assert rows(tmp_path / "killed", "many") == rows(tmp_path / "whole", "many")
    assert rows(tmp_path / "killed", "many.rejected") == rows(tmp_path / "whole", "many.rejected")
    assert len(rows(tmp_path / "whole", "many")) > 5
    assert not parts.exists()


# --- endpoints ---


@pytest.fixture(scope="module")
def served(made, tmp_path_factory):
    """`transformers serve` with the teacher's folder: (URL, the model's name there)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model = str(made[1] / "teacher")
    program = Path(sys.executable).with_name("transformers")
    command = [program, "serve", model, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = tmp_path_factory.mktemp("served") / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=stream, stderr=stream)
    try:
        for _ in range(1200):
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1", model
    finally:
        process.kill()
        process.wait()


def test_a_served_model_teaches_and_judges(made, served):
    recipe, run, _ = made
    url, model = served
    teacher = f"{{endpoint: '{url}', model: {model}, input_price: 1.0}}"
    settings = ["--set", f"synth.talks.teacher={teacher}", "--set", "synth.talks.samples=1"]
    settings += ["--set", f"synth.talks.judge={{endpoint: '{url}', model: {model}, threshold: 5, input_price: 1.0}}"]
    settings += ["--set", "synth.talks.method=judged", "--set", "synth.talks.temperature=0"]
    hfpipe("data", "synth", recipe, "--out", run, "--only", "talks", *settings)
    kept = {row["messages"][0]["content"]: row for row in rows(run, "talks")}
    assert said(kept["Hello!"]) == ["Hello!", HI]
    assert kept["Hello!"]["score"] == 9
    assert kept["Hello!"]["made_by"] == kept["Hello!"]["judged_by"] == f"{url} {model}"
    assert "What is 12 * 34?" in rejected(run, "talks")["judged below 5"]
    cost = json.loads((run / "synth" / "talks.json").read_text())["cost"]
    assert cost["judge"]["prompt_tokens"] > cost["prompt_tokens"] > 0
    assert cost["dollars"] == pytest.approx((cost["prompt_tokens"] + cost["judge"]["prompt_tokens"]) / 1e6, abs=1e-6)


def test_a_run_does_not_pay_by_itself(made):
    recipe, run, _ = made
    paid = "synth.sums.teacher={endpoint: 'http://127.0.0.1:9/v1', model: big}"
    done = hfpipe("run", recipe, "--out", run, "--set", paid, check=2)
    assert f"hfpipe data synth {recipe} --out {run} --only sums" in done.stderr


@pytest.fixture
def faulty():
    """An endpoint that says no as often as its model's name says: `429-2` twice, then it answers. It keeps the keys it saw.

    A question that is JSON has what its answer is to have in place of the usual.
    """
    seen: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            code, _, times = body["model"].partition("-")
            seen.append(self.headers["Authorization"])
            failing = len(seen) <= int(times)
            self.send_response(int(code) if failing else 200)
            self.send_header("Retry-After", "0")
            self.end_headers()
            words = body["messages"][-1]["content"]
            given = json.loads(words) if words.startswith("{") else {}
            said = {"role": "assistant", "content": f"You said: {words}", **given.get("message", {})}
            usage = {"prompt_tokens": 7, "completion_tokens": 3, **given.get("usage", {})}
            reply = {"choices": [{"message": said, "finish_reason": "stop"}], "usage": usage}
            if failing:
                reply = {"error": f"no, {self.headers['Authorization']}"}
            self.wfile.write(json.dumps(reply).encode())

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", seen
    server.shutdown()


@pytest.mark.parametrize(("model", "code"), [("429-2", 0), ("503-1", 0), ("401-99", 2), ("400-1", 0), ("400-99", 2)])
def test_passing_faults_are_waited_for_and_the_key_is_written_nowhere(made, faulty, tmp_path, model, code):
    recipe, run, _ = made
    (url, seen), key = faulty, "sk-very-secret-key"
    settings = [
        f"synth.sums.teacher={{endpoint: '{url}', model: '{model}', concurrency: 1}}",
        "synth.sums.method=distil",
    ]
    settings += ["synth.sums.verify=[]", "synth.sums.instruction=Be kind."]
    options = [word for setting in settings for word in ("--set", setting)]
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("synth"))
    command = ("data", "synth", recipe, "--out", tmp_path / "run", "--only", "sums", *options)
    done = hfpipe(*command, check=code, env={"OPENAI_API_KEY": key})
    assert set(seen) == {f"Bearer {key}"}
    assert key not in done.stdout + done.stderr
    assert not any(key.encode() in path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    if model == "400-99":
        assert f"all of 7 questions were refused; the first: refused: endpoint {url}: HTTP Error 400" in done.stderr
        return
    if code:
        assert f"endpoint {url}: no completion: HTTP Error 401" in done.stderr
        assert len(seen) < 4  # of seven prompts, one at a time
        return
    if model == "400-1":  # one question is not answered, and the others are
        assert len(seen) == 7
        assert next(iter(rejected(tmp_path / "run", "sums"))).startswith(f"refused: endpoint {url}: HTTP Error 400")
        assert sum(map(len, rejected(tmp_path / "run", "sums").values())) + len(rows(tmp_path / "run", "sums")) == 7
        return
    assert len(seen) == 7 + int(model[-1])
    kept = rows(tmp_path / "run", "sums")
    assert said(kept[0]) == [ASKED[0], f"You said: {ASKED[0]}"]  # without the instruction, which `made_with` keeps
    assert kept[0]["made_with"] == "Be kind."
    cost = json.loads((tmp_path / "run" / "synth" / "sums.json").read_text())["cost"]
    assert (cost["prompt_tokens"], cost["completion_tokens"]) == (49, 21)


def test_answers_that_were_paid_for_outlast_a_judge_that_fails(made, faulty, tmp_path):
    recipe, run, _ = made
    url, seen = faulty
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("synth"))
    settings = [
        f"synth.sums.teacher={{endpoint: '{url}', model: '429-0'}}",
        "synth.sums.method=judged",
        "synth.sums.verify=[]",
    ]
    judge = f"synth.sums.judge={{endpoint: '{url}', model: '401-%d', threshold: 5, concurrency: 1}}"
    command = ["data", "synth", recipe, "--out", tmp_path / "run", "--only", "sums"]
    command += [word for setting in settings for word in ("--set", setting)]
    done = hfpipe(*command, "--set", judge % 8, check=2)
    assert "HTTP Error 401" in done.stderr
    before = len(seen)
    assert 7 < before < 14  # seven answers, and not all of the grades
    hfpipe(*command, "--set", judge % 8)
    assert len(seen) == before + 7  # the grades alone
    assert sum(map(len, rejected(tmp_path / "run", "sums").values())) + len(rows(tmp_path / "run", "sums")) == 7


def asked_of(made, url: str, tmp_path: Path, prompts: list[dict], *settings: str) -> tuple[list[dict], dict[str, str]]:
    """What is kept of the endpoint's answers, and of the prompts that are not, why."""
    recipe, run, _ = made
    write(tmp_path / "asked.jsonl", prompts)
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("synth"))
    settings = (
        f"synth.sums.teacher={{endpoint: '{url}', model: '429-0'}}", "synth.sums.verify=[]", "synth.sums.method=distil",
        f"synth.sums.prompts={{path: {tmp_path / 'asked.jsonl'}, split: all}}", *settings,
    )  # fmt: skip
    options = [word for setting in settings for word in ("--set", setting)]
    hfpipe("data", "synth", recipe, "--out", tmp_path / "run", "--only", "sums", *options)
    reasons = {asked: why for why, all_asked in rejected(tmp_path / "run", "sums").items() for asked in all_asked}
    return rows(tmp_path / "run", "sums"), reasons


VERIFIED = ("synth.sums.method=verified", "synth.sums.near_duplicates=true")


def test_json_is_held_to_its_schema(made, faulty, tmp_path):
    towns = [json.dumps({"message": {"content": json.dumps({"town": town})}}) for town in ("Lima", 5)]
    schema = {"properties": {"town": {"type": "string"}}}
    asked = [{"prompt": towns[0], "schema": schema}, {"prompt": towns[1], "schema": json.dumps(schema)}]
    kept, reasons = asked_of(made, faulty[0], tmp_path, asked, *VERIFIED, "synth.sums.verify=[{check: json_schema}]")
    assert [said(row)[1] for row in kept] == ['{"town": "Lima"}']
    assert reasons == {towns[1]: "json_schema"}


def test_programs_are_run_with_their_tests(made, faulty, tmp_path):
    try:
        check_isolation()
    except UserError as error:
        pytest.skip(str(error))  # as in test_sandbox.py: no program of a model is run on this system
    double = {"message": {"content": "So:\n```python\ndef double(x):\n    return 2 * x\n```\nDone."}}
    right, wrong = json.dumps(double), json.dumps({"n": 2, **double})
    ended = json.dumps({"message": {"content": "import os\nos._exit(97)"}})  # as a box that can't be shut ends
    asked = [{"prompt": right, "tests": "assert double(2) == 4"}, {"prompt": wrong, "tests": ["assert double(2) == 5"]}]
    asked += [{"prompt": ended, "tests": "assert False"}]
    kept, reasons = asked_of(made, faulty[0], tmp_path, asked, *VERIFIED, "synth.sums.verify=[{check: code}]")
    assert [(said(row)[0], row["verdict"]) for row in kept] == [(right, '{"code": "passed"}')]
    assert reasons == {wrong: "code: AssertionError", ended: "code: ended with exit code 97"}


def test_what_a_server_says_otherwise_than_the_protocol_costs_its_row_alone(made, faulty, tmp_path):
    answers = {
        "half": {"message": {"content": "half of \ud83d a pair"}},
        "number": {"message": {"content": 5}},
        "calls": {"message": {"tool_calls": "calculator"}},
        "parts": {"message": {"content": [{"type": "text", "text": "In parts."}]}},
        "huge": {"usage": {"prompt_tokens": 10**30}},
        "words": {"usage": {"prompt_tokens": "seven", "completion_tokens": None}},
    }
    prompts = {name: json.dumps(answer) for name, answer in answers.items()}
    kept, reasons = asked_of(
        made, faulty[0], tmp_path, [{"prompt": prompt} for prompt in prompts.values()],
        f"synth.sums.judge={{endpoint: '{faulty[0]}', model: '429-0'}}", "synth.sums.near_duplicates=true",
    )  # fmt: skip
    assert {asked: why[:30] for asked, why in reasons.items() if "judge" not in why} == {
        prompts[name]: "not as the protocol has it: ha" if name == "half" else why
        for name, why in (("half", ""), ("number", "not as the protocol has it: ex"), ("calls", "not as the protocol has it: Ty"))
    }  # fmt: skip
    cost = json.loads((tmp_path / "run" / "synth" / "sums.json").read_text())["cost"]
    assert (cost["prompt_tokens"], cost["completion_tokens"]) == (4 * 7, 5 * 3)
    assert len(kept) + len(reasons) == len(answers)


def test_a_call_of_a_tool_that_the_row_declares_is_an_answer(made, faulty, tmp_path):
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"town": "Lima"}'}}
    asked = [json.dumps({"n": n, "message": {"content": None, "tool_calls": [call]}}) for n in range(2)]
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    prompts = [{"prompt": asked[0], "tools": tools}, {"prompt": asked[1]}]
    (kept,), reasons = asked_of(made, faulty[0], tmp_path, prompts)
    (told,) = kept["messages"][1]["tool_calls"]
    assert (told["function"]["name"], json.loads(told["function"]["arguments"])) == ("weather", {"town": "Lima"})
    assert json.loads(kept["tools"]) == tools
    assert reasons == {asked[1]: "empty answer"}


def test_prompts_that_are_not_asked_are_told_and_columns_may_hold_anything(made, faulty, tmp_path):
    recipe, run, _ = made
    asked = [{"prompt": "One?", "kind": 3}, {"prompt": "One?", "kind": 3}, {"prompt": ""}, {"prompt": None}]
    named = [{"role": "user", "content": "Two?", "name": 5}]
    write(tmp_path / "asked.jsonl", [*asked, {"prompt": named}])
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("synth"))
    settings = [
        f"synth.sums.teacher={{endpoint: '{faulty[0]}', model: '429-0'}}", "synth.sums.method=distil", "synth.sums.verify=[]",
        f"synth.sums.prompts={{path: {tmp_path / 'asked.jsonl'}, split: all}}",
    ]  # fmt: skip
    options = [word for setting in settings for word in ("--set", setting)]
    command = ("data", "synth", recipe, "--out", tmp_path / "run", "--only", "sums", *options)
    assert "2 rows used, 3 not (" in hfpipe(*command).stdout
    assert [row["kind"] for row in rows(tmp_path / "run", "sums")] == ["3", None]
    record = json.loads((tmp_path / "run" / "synth" / "sums.json").read_text())
    assert (record["prompts"]["read"], record["prompts"]["used"], record["prompts"]["duplicates"]) == (5, 2, 1)


# --- a judge, checks and configuration ---


def test_of_several_answers_the_reward_models_best_is_kept(made, tmp_path):
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    recipe, run, _ = made
    tokenizer = AutoTokenizer.from_pretrained(run / "teacher")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id, **shape)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    settings = [f"synth.many.judge={{model: {tmp_path}/judge, threshold: -100}}", "synth.many.method=judged"]
    settings += ["synth.many.keep=best", "synth.many.samples=4", "synth.many.temperature=0.8"]
    options = [word for setting in settings for word in ("--set", setting)]
    hfpipe("data", "synth", recipe, "--out", run, "--only", "many", *options)
    best: dict[str, float] = {}
    scored = [row for name in ("many", "many.rejected") for row in rows(run, name) if row["score"] is not None]
    for row in scored:
        best[row["made_from"]] = max(row["score"], best.get(row["made_from"], row["score"]))
    kept = rows(run, "many")
    assert kept
    assert all(row["score"] == best[row["made_from"]] for row in kept)
    assert len({row["made_from"] for row in kept}) == len(kept)


@pytest.mark.parametrize(
    ("item", "row", "answer", "told"),
    [
        (
            {"check": "code"},
            {"tests": "assert double(2) == 4"},
            "```python\ndef double(x):\n    return 2 * x\n```",
            None,
        ),
        ({"check": "code"}, {"tests": "assert double(2) == 4"}, "def double(x):\n    return x", "code: AssertionError"),
        ({"check": "code"}, {}, "def double(x):\n    return x", "nothing to check with"),
        ({"check": "code"}, {"tests": ["x = 2", "assert double(x) == 4"]}, "def double(x):\n    return 2 * x", None),
        ({"check": "code"}, {"tests": ["assert double(2) == 4"]}, "def double(x):\n    return x", "AssertionError"),
        ({"check": "code"}, {"tests": []}, "def double(x):\n    return x", "nothing to check with"),
        ({"check": "code"}, {"tests": " "}, "def double(x):\n    return x", "nothing to check with"),
        ({"check": "code"}, {"tests": 5}, "def double(x):\n    return x", "nothing to check with"),
        ({"check": "json_schema"}, {"schema": "not JSON"}, '{"town": "Lima"}', "cannot be checked"),
        ({"check": "json_schema"}, {"schema": {"type": "city"}}, '{"town": "Lima"}', "cannot be checked"),
        ({"check": "json_schema"}, {"schema": {"type": "object"}}, "[" * 100_000, "cannot be checked"),
        ({"check": "json_schema", "value": {"required": ["city"]}}, {}, '{"city": "Lima"}', None),
        ({"check": "json_schema"}, {"schema": {"type": "object"}}, '{"number": NaN}', "json_schema"),
        ({"check": "json_schema"}, {"schema": '{"required": ["city"]}'}, '{"town": "Lima"}', "json_schema"),
        ({"check": "number"}, {"reference": talk("", "It is 7.")}, "I think 7", None),
        ({"check": "number"}, {"reference": talk("", "It is 7.")}, "I think 8", "number"),
        ({"check": "calculator"}, {}, "Half of 48 is 48 ÷ 2 = 24, and 48 + 24 = 72.", None),
        ({"check": "calculator"}, {}, "48 + 24 = 73", "an equation does not hold"),
        ({"check": "calculator"}, {"asked": "What is 1,200 divided by 4?"}, "300", None),
        (
            {"check": "calculator"},
            {"asked": "What is 1,200 divided by 4?"},
            "It is 1,200 / 4 = 300, so 3",
            "not the value",
        ),
    ],
)
def test_what_can_be_checked(item, row, answer, told):
    from hfpipe.evaluation.answers import Answer
    from hfpipe.synth_config import Verify
    from hfpipe.synthesis.verify import wrong

    whole = {"messages": talk(row.pop("asked", "How many?"), "")[:1], **row}
    found = wrong(Verify(**item), whole, Answer(messages=[{"role": "assistant", "content": answer}], stopped=True))
    assert found is None if told is None else told in found


@pytest.mark.parametrize(
    ("asked", "answer", "right"),
    [
        ("What is -5 + 3?", "It is -2.", True),
        ("What is -5 + 3?", "-5 + 3 = -2", True),
        ("What is -5 + 3?", "It is 8.", False),
        (".5 + 1", "1.5", True),
        (".5 + 1", "6", False),
        ("2^10 + 3", "13", False),
        ("What is 10 / 3?", "10 / 3 = 3.33", True),
        ("What is 10 / 3?", "It is 3.4.", False),
        ("What is 7 x 8?", "56", True),
        ("On 2024-10-12 Ann bought 3 bags of 4.", "3 * 4 = 12", True),
        ("On 2024-10-12 Ann bought 3 bags of 4.", "2002", False),
        ("How many?", "1. 3 + 4 = 7\n2. 7 + 1 = 8\nSo 8", True),
        ("How many?", "1. 3 + 4 = 8\nSo 7", False),
        ("How many?", "Step 1\n2 + 2 = 5\n7", False),
        ("How many?", "- 2 + 2 = 4\n- $3 + $3 = $6", True),
        ("How many?", "2 + 3 = 5 * 4 = 21", False),
        ("How many?", "So (3 + 4 = 7), and (3 + 4) * 2 = 14.", True),
        ("What is 5 - 8?", "It is −3.", True),
        ("What is 1234567 * 9?", "11111103", True),
        ("What is 1234567 * 9?", "11111104", False),
        ("What is 123456789 * 987654321?", "121932631112635269", True),
        ("What is 123456789 * 987654321?", "121932631112635268", False),
        ("How many?", "1234567 * 9 = 11111104", False),
        ("How many?", "1234567.5 * 9 = 11111107.5, and 0.1 * 3 * 10 = 3", True),
        ("How many?", "1234567.5 * 9 = 11111107.9", False),
        ("How many?", "2x + 3 = 7, so x = 2", False),  # nothing in it that can be checked
        (f"What is {'9' * 400} * {'9' * 400}?", "7", False),
    ],
)
def test_arithmetic_in_words_and_signs(asked, answer, right):
    from hfpipe.evaluation.answers import Answer
    from hfpipe.synth_config import Verify
    from hfpipe.synthesis.verify import wrong

    said = Answer(messages=[{"role": "assistant", "content": answer}], stopped=True)
    assert (wrong(Verify("calculator"), {"messages": talk(asked, "")[:1]}, said) is None) == right


@pytest.mark.parametrize(
    ("told", "grade"), [("8", 8), ("8/10", 8), ("On a scale of 1 to 10: 8.5.", 8.5), ("7 out of 10", 7), ("good", None)]
)
def test_a_grade_is_read_from_what_a_judge_says(told, grade, monkeypatch):
    from hfpipe.evaluation import judges

    monkeypatch.setattr(judges, "_ask", lambda *asked: told)  # the server's side; what is tried is how it is read
    assert judges.grade_of("http://localhost", "judge", lambda usage: None)({"prompt": "Hi"}, "Hello") == grade


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        (
            "synth.sums.verify=[{check: regex, value: '(('}]",
            "verify[0].value: check `regex` cannot take the value '(('",
        ),
        ("synth.sums.verify=[{check: contains, value: 42}]", "check `contains` cannot take the value 42"),
        ("synth.sums.verify=[{check: prefers}]", "compares two answers. To grade one, give `judge`"),
        ("synth.sums.verify=[{check: code, value: []}]", "expected tests, as text or a list of lines"),
        ("synth.talks.judge={endpoint: 'http://localhost:abc/v1', model: x}", "is no URL with a host and a port"),
        (
            "synth.sums={method: judged, teacher: {model: teacher}, prompts: {path: tinyworld/sums}, judge: {model: teacher}}",
            "judge.threshold is missing",
        ),
        ("synth.sums.metod=distil", "synth.sums.metod = 'distil' is not a key here"),
        ("synth.sums.verify=[]", "verify is missing"),
        ("synth.sums.verify=[{check: calculater}]", "Did you mean `calculator`?"),
        ("synth.sums.method=judged", "judge is missing"),
        ("synth.sums.keep=best", "needs a judge"),
        ("synth.sums.samples=3", "at temperature 0"),
        ("synth.sums.teacher={model: teachr}", "Did you mean `teacher`?"),
        ("synth.sums.teacher={model: tokenizer}", "leaves a tokenizer, not a model"),
        ("synth.sums.teacher={model: student}", "is made by `student`, which does not come before"),
        ("synth.sums.teacher={endpoint: localhost}", "expected a URL"),
        ("synth.sums.teacher={endpoint: 'http://localhost'}", "model is missing"),
        ("synth.sums.teacher={}", "names nobody"),
        ("synth.sums.prompts.path=synth/talks", "not made anew"),
        ("synth.back.instruction=Ask.", "has no {answer} in it"),
        ("student.data.train=[{path: synth/sum}]", "no synth section `sum`. Did you mean `sums`?"),
        ("student.data.eval=[{path: synth/sums}]", "measures no model"),
    ],
)
def test_faults_are_told_before_anything_is_asked(made, setting, told):
    with pytest.raises(UserError) as error:
        open_recipe(made[0], [setting], made[1])
    assert told in str(error.value)


def test_the_readme_shows_the_shipped_section():
    from hfpipe.yaml_files import load_yaml

    shipped = load_yaml(ROOT / "stage_configs" / "synth" / "synth.yaml")
    block = (ROOT / "README.md").read_text().split("```yaml\n# stage_configs/synth/synth.yaml\n")[1].split("```")[0]
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(block)
        file.flush()
        assert load_yaml(Path(file.name)) == shipped


SHORT = [
    "tokenizer.data={train: [{path: tinyworld/pretrain, limit: 2000}]}",
    "pretrain.data.train=[{path: tinyworld/pretrain, limit: 50}]",
    *(f"pretrain.model.config.{key}=64" for key in ("hidden_size", "intermediate_size")),
    "pretrain.model.config.num_hidden_layers=1",
    "pretrain.model.config.layer_types=[full_attention]",
    "sft.data.train=[{path: tinyworld/sums, limit: 8}]",  # learnt by heart
    "sft.regularize.freeze_embeddings=false",
    "sft.optimizer.lr=0.03",
    "sft.trainer.learning_rate=5.0e-3",
    "sft.trainer.per_device_train_batch_size=4",
    "sft.trainer.packing=false",
    "sft_more.trainer.max_steps=2",
    "sft_synth.trainer.max_steps=2",
    "synth.sums.prompts={path: tinyworld/sums, limit: 8}",
    "evaluate={samples: 0, max_rows: 4, probes: [{path: tinyworld/sums, split: test, limit: 4, capability: sums, check: exact}]}",
]


def test_the_recipe_in_short(tmp_path):
    done = hfpipe("run", "synth", "--out", tmp_path / "run", *(word for change in SHORT for word in ("--set", change)))
    kept = rows(tmp_path / "run", "sums")
    assert 4 < len(kept) <= 8
    assert {json.dumps(json.loads(row["verdict"])) for row in kept} == {
        '{"calculator": "passed", "tool_format": "passed"}'
    }
    assert set(rejected(tmp_path / "run", "sums")) >= {"another answer to its prompt is kept"}
    assert stage_json(tmp_path / "run" / "sft_synth")["sources"][0]["used"] == len(kept)
    steps = [stage_json(tmp_path / "run" / name)["metrics"]["steps"] for name in ("sft_more", "sft_synth")]
    assert steps == [2, 2]
    assert "sums" in done.stdout


DISTILL = """stage: distill
model: {from: RUN/student}
data: {train: [{path: FOLDER/asked.jsonl, split: all}], eval: [{path: FOLDER/asked.jsonl, split: all}]}
trainer:
  {teacher_model_name_or_path: RUN/teacher, max_steps: 60, learning_rate: 1.0e-2, per_device_train_batch_size: 7, lr_scheduler_type: constant,
   max_completion_length: 6, activation_checkpointing: false, bf16: false}
"""


def test_a_student_comes_nearer_to_its_teacher_on_its_own_answers(made, tmp_path):
    recipe, run, _ = made
    text = DISTILL.replace("RUN", str(run)).replace("FOLDER", str(recipe.parent))
    (tmp_path / "distill.yaml").write_text(text)
    (tmp_path / "pipeline.yaml").write_text(
        "name: near\nstages: [distill]\nevaluate: {samples: 1, max_new_tokens: 4}\n"
    )
    done = hfpipe("run", tmp_path, "--out", tmp_path / "run")
    metrics = stage_json(tmp_path / "run" / "distill")["metrics"]
    before, after = (metrics[key]["divergence"] for key in ("teacher_before", "teacher"))
    assert 0 < after < 0.8 * before
    assert f"from the teacher on 7 held-out prompts {before:.3f} -> {after:.3f} nats a token" in done.stdout
    assert f"trainer.teacher_model_name_or_path {run}/teacher" in stage_json(tmp_path / "run" / "distill")["data"]
    assert "distill    done" in hfpipe("plan", tmp_path, "--out", tmp_path / "run").stdout
    for teacher, told in (("org/x y", "neither a stage"), ("null", "is missing")):
        setting = f"distill.trainer.teacher_model_name_or_path={teacher}"
        assert told in hfpipe("plan", tmp_path, "--out", tmp_path / "other", "--set", setting, check=2).stderr


def test_who_is_asked_must_be_there(made, tmp_path):
    recipe = made[0]
    done = hfpipe("data", "synth", recipe, "--out", tmp_path / "new", check=2)
    assert f"hfpipe run {recipe} --out {tmp_path / 'new'} --to teacher" in done.stderr
    done = hfpipe("data", "synth", recipe, "--out", tmp_path / "new", "--only", "sum", check=2)
    assert "Did you mean `sums`?" in done.stderr
    done = hfpipe("data", "synth", "micro", "--out", tmp_path / "other", check=2)
    assert "has no `synth`" in done.stderr
