"""Publishing and pulling through the command line, by the unmodified client, against a Hub of the tests' own: LFS and Xet."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from hfpipe import artifact

from .conftest import ROOT, hfpipe, stage_json

STAGES = ("tokenizer", "pretrain", "midtrain", "sft", "dpo")
UPLOAD = "PUT /put|POST /cas/v1/xorbs"  # LFS, Xet
TOKEN = "hf_alice_write"


@pytest.fixture
def run(micro_run, tmp_path) -> Path:
    """A finished run that a test may change, with weights that no other test has: a Hub takes the same bytes only once."""
    run = Path(shutil.copytree(micro_run, tmp_path / "micro"))
    for stage in STAGES[1:]:
        weights, record = run / stage / "model.safetensors", stage_json(run / stage)
        save_file(load_file(weights), weights, metadata={"format": "pt", "test": str(tmp_path)})
        record["files"] |= artifact.checksums(run / stage, [weights.name])
        artifact.write_record(run / stage / artifact.STAGE_FILE, record)
    return run


def push(run: Path, env: dict[str, str], *arguments: object, check: int | None = 0) -> subprocess.CompletedProcess:
    return hfpipe("push", run, *arguments, env=env, check=check)


def messages(hub, repo_id: str, branch: str) -> list[str]:
    return [commit.message for commit in hub.commits(repo_id, branch)]


def made(hub, repo_id: str, branch: str = "sft") -> int:
    """How many commits of ours a branch has."""
    return sum(message == f"{branch}, by hfpipe" for message in messages(hub, repo_id, branch))


def assert_published(hub, repo_id: str, run: Path, stage: str) -> None:
    """The branch holds what `stage.json` names, byte by byte, and nothing else of the folder."""
    there, record = hub.files(repo_id, stage), stage_json(run / stage)
    assert record["hub"]["commit"] == hub.commits(repo_id, stage)[0].id
    for name in record["files"]:
        assert there[name] == (run / stage / name).read_bytes(), name
    told = {"README.md", "stage.json"} | {n for n in ("eval.json", "metrics.jsonl") if (run / stage / n).is_file()}
    assert set(there) - {".gitattributes"} == set(record["files"]) | told


# --- a whole run ---


def test_a_run_is_published_while_it_trains(hub, hub_env, repo_id, tmp_path):
    run = tmp_path / "run"
    settings = ["--set", f"hub.repo_id={repo_id}", "--set", "hub.license=mit"]
    done = hfpipe("run", "micro", "--out", run, *settings, env=hub_env)
    lines = done.stdout.splitlines()
    for stage in STAGES:
        assert_published(hub, repo_id, run, stage)
        assert made(hub, repo_id, stage) == 1
        assert any(line.startswith(stage) and f"published: {repo_id}@{stage}" in line for line in lines)
    first = next(n for n, line in enumerate(lines) if "published:" in line)
    assert first < next(n for n, line in enumerate(lines) if re.match(r"dpo +\d+ steps", line)), "it waited for the end"
    ours, main = hub.files(repo_id, "dpo"), hub.files(repo_id, "main")
    manifest = json.loads(main.pop("run.json"))
    assert {k: v for k, v in main.items() if k != "README.md"} == {k: v for k, v in ours.items() if k != "README.md"}
    assert manifest["commits"] == {stage: hub.commits(repo_id, stage)[0].id for stage in STAGES}
    parent = json.loads(ours["stage.json"])["parent"]
    assert (parent["repo_id"], parent["commit"]) == (repo_id, manifest["commits"]["sft"])

    again = hfpipe("run", "micro", "--out", run, *settings, env=hub_env)
    assert "published:" not in again.stdout
    assert "5 stages are published already" in push(run, hub_env).stdout
    assert all(made(hub, repo_id, stage) == 1 for stage in STAGES)
    told = json.loads(hfpipe("status", run, "--json", env={"HF_ENDPOINT": "http://127.0.0.1:1"}).stdout)
    assert told["to_push"] == []
    assert [row["commit"] for row in told["stages"]] == list(manifest["commits"].values())

    from huggingface_hub import HfApi

    api = HfApi(hub.endpoint, token=TOKEN)
    [tag] = api.list_repo_refs(repo_id).tags
    assert tag.target_commit == hub.commits(repo_id, "main")[0].id
    info = api.model_info(repo_id, revision="dpo")
    assert info.private
    assert info.card_data.license == "mit"
    scores = {r.dataset_config: r.metric_value for r in info.card_data.eval_results if r.dataset_config}
    capabilities = json.loads((run / "dpo" / "eval.json").read_text())["capabilities"]
    assert scores == {name: told["score"] for name, told in capabilities.items()}

    said = [done.stdout, done.stderr, again.stdout]
    said += [p.read_bytes().decode(errors="replace") for p in run.rglob("*") if p.is_file()]
    said += [
        content.decode(errors="replace")
        for stage in (*STAGES, "main")
        for content in hub.files(repo_id, stage).values()
    ]
    assert not any(TOKEN in text for text in said), "the token was written down"
    assert not any(str(tmp_path) in text for text in said[-1:]), "a folder of this machine was published"


@pytest.mark.parametrize("hub", ["lfs"], indirect=True)
def test_half_a_run_here_and_the_rest_elsewhere(hub, hub_env, repo_id, micro_run, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    for name in ("run.json", "tokenizer", "pretrain", "midtrain"):
        copy = shutil.copytree if (micro_run / name).is_dir() else shutil.copy
        copy(micro_run / name, here / name)
    hfpipe("run", "micro", "--out", here, "--to", "midtrain", "--set", f"hub.repo_id={repo_id}", env=hub_env)
    elsewhere = hub_env | {"HF_HOME": str(tmp_path / "home2"), "HF_HUB_CACHE": str(tmp_path / "home2" / "hub")}
    elsewhere["HFPIPE_CACHE"] = str(tmp_path / "cache2")
    told = hfpipe("pull", repo_id, "--out", there, env=elsewhere).stdout
    assert "not published there: sft, dpo" in told
    planned = json.loads(hfpipe("plan", "micro", "--out", there, "--json", env=elsewhere).stdout)["stages"]
    assert [row["status"] for row in planned] == ["done", "done", "done", "new", "new"]
    assert hfpipe("pull", repo_id, "--out", there, env=elsewhere).stdout.count("there already") == 3
    hfpipe("run", "micro", "--out", there, "--set", f"hub.repo_id={repo_id}", env=elsewhere)
    for stage in STAGES[1:]:
        assert stage_json(there / stage)["weights"] == stage_json(micro_run / stage)["weights"]
    assert made(hub, repo_id, "midtrain") == 1
    chain = json.loads(hfpipe("lineage", f"{repo_id}@dpo", "--json", env=hub_env).stdout)
    assert [link["stage"] for link in chain["links"]] == list(reversed(STAGES))
    assert chain["holds"]


def test_a_repo_for_each_stage(hub, hub_env, repo_id, run):
    settings = ["--set", f"hub.repo_id={repo_id}", "--set", "hub.layout=repos", "--set", "hub.private=false"]
    hfpipe("run", "micro", "--out", run, *settings, env=hub_env)
    for stage in STAGES[:-1]:
        assert hub.files(f"{repo_id}-{stage}")["stage.json"]
    last = f"{repo_id}-dpo"
    assert json.loads(hub.files(last)["run.json"])["layout"] == "repos"
    out = run.parent / "pulled"
    hfpipe("pull", last, "--out", out, env=hub_env)
    assert stage_json(out / "sft")["weights"] == stage_json(run / "sft")["weights"]
    assert f"{repo_id}-sft@main" in hfpipe("status", out).stdout
    anonymous = hub_env | {"HF_TOKEN": ""}
    assert "every file verified" in hfpipe("pull", f"{repo_id}-sft", env=anonymous).stdout


# --- said before anything trains ---


@pytest.mark.parametrize(
    ("token", "place", "found"),
    [
        ("", "alice/x", "no token to publish with"),
        ("hf_nobody_knows", "alice/x", "Invalid user token"),
        ("hf_alice_read", "alice/x", "may only read"),
        ("hf_bob_write", "alice/x", "403"),
        (TOKEN, "bob/x", "403"),
    ],
)
@pytest.mark.parametrize("hub", ["lfs"], indirect=True)
def test_a_push_that_would_be_refused_stops_the_run_at_once(hub, hub_env, tmp_path, token, place, found):
    env = hub_env | {"HF_TOKEN": token}
    began = time.monotonic()
    done = hfpipe("run", "micro", "--out", tmp_path / "run", "--set", f"hub.repo_id={place}", env=env, check=2)
    assert found in done.stderr
    assert "hub.repo_id" in done.stderr
    assert time.monotonic() - began < 20
    assert not list((tmp_path / "run").glob("*/")) if (tmp_path / "run").exists() else True
    if token:
        assert token not in done.stderr + done.stdout


@pytest.mark.parametrize("hub", ["lfs"], indirect=True)
def test_a_private_run_does_not_go_to_a_public_repo(hub, hub_env, repo_id, run):
    from huggingface_hub import HfApi

    HfApi(hub.endpoint, token=TOKEN).create_repo(repo_id, private=False)
    assert "is public" in push(run, hub_env, "--repo-id", repo_id, check=2).stderr
    assert set(hub.files(repo_id)) <= {".gitattributes"}


def test_bad_arguments(micro_run, tmp_path):
    for arguments, found in (
        (("push", micro_run), "no repo to push to"),
        (("push", micro_run, "--repo-id", "me/x", "--stage", "stf"), "Did you mean `sft`?"),
        (("push", tmp_path), "is not a run's folder"),
        (("status", tmp_path), "is not a run's folder"),
        (("lineage", tmp_path), "was not made by hfpipe"),
        (("run", "micro", "--out", tmp_path / "x", "--set", "hub.layout=branches"), "hub.layout = 'branches'"),
        (("plan", "micro", "--set", "hub.repo_id=tiny"), "expected NAMESPACE/NAME, such as me/micro"),
    ):
        assert found in hfpipe(*arguments, check=2).stderr


# --- faults ---

SHORT = {  # name: (pattern, fault), and the push gets through all the same
    "409": ("POST .*/commit/", {"status": 409}),
    "412": ("POST .*/commit/", {"status": 412}),
    "429": ("POST .*/commit/", {"status": 429, "headers": {"Retry-After": "1"}}),
    "500": ("POST .*/commit/", {"status": 500}),
    "503 twice": ("POST .*/commit/", {"status": 503, "times": 2}),
    "503 of an upload": (UPLOAD, {"status": 503}),
    "503 of a listing": ("/tree/", {"status": 503}),
    "a cut commit": ("POST .*/commit/", {"cut_request": 100}),
    "a lost answer": ("POST .*/commit/", {"drop_response": True}),
    "a lost answer, and then 503": ("POST .*/commit/", {"drop_response": True}),
    "a cut upload": (UPLOAD, {"cut_request": 10_000}),
    "a lost answer of the branch": ("POST .*/branch/", {"drop_response": True}),
    "a lost answer of the tag": ("POST .*/tag/", {"drop_response": True}),
}


@pytest.mark.parametrize("name", SHORT)
def test_a_fault_that_passes_costs_nothing(hub, hub_env, repo_id, run, name):
    pattern, fault = SHORT[name]
    rule = hub.fault(pattern, **fault)
    if "then 503" in name:
        hub.fault("/tree/", status=503, skip=1)
    done = push(run, hub_env, "--repo-id", repo_id, check=None)
    assert rule["fired"]
    assert done.returncode == 0, done.stderr
    for stage in STAGES:
        assert_published(hub, repo_id, run, stage)
        assert made(hub, repo_id, stage) == 1, "a second commit"
    assert "published already" in push(run, hub_env).stdout


LONG = {
    "401": ("POST .*/commit/", 401, 2, "401"),
    "403": ("POST .*/commit/", 403, 2, "403"),
    "404": ("POST .*/commit/", 404, 2, "404"),
    "500": ("POST .*/commit/", 500, 1, "500"),
    "503": ("POST .*/commit/", 503, 1, "503"),
    "403 of an upload": (UPLOAD, 403, (1, 2), "403"),
}


@pytest.mark.parametrize("name", LONG)
def test_a_fault_that_stays_is_told_and_loses_nothing(hub, hub_env, repo_id, run, name):
    pattern, status, code, found = LONG[name]
    hub.fault(pattern, status=status, times=10_000)
    done = push(run, hub_env, "--repo-id", repo_id, "--stage", "sft", check=None)
    assert done.returncode in (code if isinstance(code, tuple) else (code,)), done.stderr
    assert found in done.stderr
    assert "othing here is lost" in done.stderr
    assert "Traceback" not in done.stderr
    assert TOKEN not in done.stderr
    assert made(hub, repo_id) == 0
    assert "hub" not in stage_json(run / "sft")
    hub.faults.clear()
    push(run, hub_env, "--repo-id", repo_id, "--stage", "sft")
    assert_published(hub, repo_id, run, "sft")
    assert made(hub, repo_id) == 1


@pytest.mark.parametrize("moment", [UPLOAD, "POST .*/commit/"], ids=["in an upload", "before the commit"])
def test_a_killed_push_is_done_again_once(hub, hub_env, repo_id, run, moment):
    rule = hub.fault(moment, delay=3.0)
    command = [sys.executable, "-m", "hfpipe", "push", str(run), "--repo-id", repo_id, "--stage", "sft"]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | hub_env, stdout=subprocess.DEVNULL)
    while not rule["fired"]:
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert "hub" not in stage_json(run / "sft")
    push(run, hub_env, "--repo-id", repo_id, "--stage", "sft")
    assert_published(hub, repo_id, run, "sft")
    time.sleep(3.5 - min(3.5, time.monotonic() % 1))  # were the killed one's commit still on its way, it would arrive
    assert made(hub, repo_id) == 1


def test_a_hub_that_hangs_holds_nobody_up(hub, hub_env, repo_id, run):
    hub.fault("POST .*/commit/", delay=60.0, times=100)
    began = time.monotonic()
    settings = ["--set", f"hub.repo_id={repo_id}", "--set", "hub.timeout_minutes=0.05"]
    done = hfpipe("run", "micro", "--out", run, *settings, env=hub_env)
    assert time.monotonic() - began < 40
    assert "not published yet: tokenizer, pretrain, midtrain, sft, dpo" in done.stdout
    assert f"`hfpipe push {run}` sends it" in done.stdout
    assert "took more than 3 s" in (run / "logs" / "push.log").read_text()
    hub.reset()
    push(run, hub_env)
    assert all(made(hub, repo_id, stage) == 1 for stage in STAGES)


@pytest.mark.parametrize("hub", ["lfs"], indirect=True)
def test_with_the_hub_down_a_run_ends_well_and_says_what_is_left(hub, hub_env, repo_id, run):
    shutil.rmtree(run / "dpo")
    down = hub_env | {"HF_ENDPOINT": "http://127.0.0.1:1"}
    done = hfpipe("run", "micro", "--out", run, "--set", f"hub.repo_id={repo_id}", env=down)
    assert "the Hub is not reached" in done.stdout
    assert "the run goes on" in done.stdout
    assert "not published yet: tokenizer, pretrain, midtrain, sft, dpo" in done.stdout
    assert "micro is complete" in done.stdout
    told = hfpipe("status", run).stdout
    assert told.count("not published yet") == 5
    assert "5 to push" in told
    assert "last push ended with" in told
    push(run, hub_env)
    assert "to push" not in hfpipe("status", run).stdout
    assert_published(hub, repo_id, run, "dpo")


@pytest.mark.parametrize("hub", ["lfs"], indirect=True)
def test_what_changed_is_published_anew_and_what_is_gone_goes(hub, hub_env, repo_id, run):
    push(run, hub_env, "--repo-id", repo_id)
    record = stage_json(run / "sft")
    (run / "sft" / "metrics.jsonl").unlink()
    assert json.loads(hfpipe("status", run, "--json").stdout)["to_push"] == ["sft"]
    told = push(run, hub_env).stdout
    assert "sft" in told
    assert "metrics.jsonl" not in hub.files(repo_id, "sft")
    # dpo names the commit of its parent, which is another one now
    assert (
        json.loads(hub.files(repo_id, "dpo")["stage.json"])["parent"]["commit"]
        == stage_json(run / "sft")["hub"]["commit"]
    )
    assert stage_json(run / "sft")["hub"]["commit"] != record["hub"]["commit"]
    assert made(hub, repo_id) == 2


# --- what is read from the Hub ---

FROM_HUB = """
stage: sft
model: {{from: "{source}"}}
data:
  train: [{{path: tinyworld/sft, limit: 64}}]
  eval: [{{path: tinyworld/sft, limit: 8}}]
trainer: {{max_steps: 2, max_length: 128, per_device_train_batch_size: 8}}
"""


@pytest.fixture
def hub_recipe(tmp_path):
    def write(source: str, stage: str = FROM_HUB, name: str = "mine") -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "pipeline.yaml").write_text("name: mine\nstages: [sft]\nevaluate: {samples: 0}\n")
        (folder / "sft.yaml").write_text(stage.format(source=source))
        return folder

    return write


def test_a_stage_from_the_hub_is_pinned_and_needs_no_hub_again(hub, hub_env, repo_id, run, hub_recipe, tmp_path):
    push(run, hub_env, "--repo-id", repo_id)
    commit = stage_json(run / "midtrain")["hub"]["commit"]
    folder, out = hub_recipe(f"{repo_id}@midtrain"), tmp_path / "out"
    hfpipe("run", folder, "--out", out, env=hub_env)
    record = stage_json(out / "sft")
    assert record["parent"]["revision"] == commit
    assert record["pins"] == {f"{repo_id}@midtrain": commit}
    # the branch moves on: a finished stage keeps its commit, and asks nobody
    (run / "midtrain" / "metrics.jsonl").unlink()
    push(run, hub_env, "--stage", "midtrain")
    assert stage_json(run / "midtrain")["hub"]["commit"] != commit
    down = hub_env | {"HF_ENDPOINT": hub.endpoint.rpartition(":")[0] + ":1"}
    assert '"done"' in hfpipe("plan", folder, "--out", out, "--json", env=down).stdout
    # a new run takes the new one
    hfpipe("run", folder, "--out", tmp_path / "out2", env=hub_env)
    assert stage_json(tmp_path / "out2" / "sft")["parent"]["revision"] == stage_json(run / "midtrain")["hub"]["commit"]
    chain = json.loads(hfpipe("lineage", out / "sft", "--json", env=hub_env).stdout)
    assert [link["stage"] for link in chain["links"]] == ["sft", "midtrain", "pretrain", "tokenizer"]
    assert chain["links"][1]["where"] == f"{repo_id}@{commit}"
    assert chain["holds"]


def test_with_the_hub_away_only_what_was_verified_is_used_and_it_is_said(
    hub, hub_env, repo_id, run, hub_recipe, tmp_path
):
    push(run, hub_env, "--repo-id", repo_id)
    hub.fault(r"GET .*(/revision/|/api/models/)", status=503, times=10_000)
    folder = hub_recipe(f"{repo_id}@midtrain")
    done = hfpipe("run", folder, "--out", tmp_path / "a", env=hub_env, check=2)
    assert "no commit of that name was verified here before" in done.stderr
    assert not (tmp_path / "a" / "sft").exists()
    hub.reset()
    hfpipe("pull", f"{repo_id}@midtrain", env=hub_env)
    hub.fault(r"/api/models/", status=503, times=10_000)
    done = hfpipe("run", folder, "--out", tmp_path / "b", env=hub_env)
    assert f"the Hub is not reached: {repo_id}@midtrain is taken as it stood" in done.stdout
    assert stage_json(tmp_path / "b" / "sft")["parent"]["revision"] == stage_json(run / "midtrain")["hub"]["commit"]


def test_a_corrupt_download_is_fetched_again_or_refused(hub, hub_env, repo_id, run, tmp_path):
    push(run, hub_env, "--repo-id", repo_id)
    content = r"GET .*/resolve/.*/tokenizer.json|GET .*/resolve-cache/.*/tokenizer.json"
    rule = hub.fault(content, corrupt=True)
    out = tmp_path / "pulled"
    hfpipe("pull", repo_id, "--out", out, env=hub_env)
    assert rule["fired"]
    for stage in STAGES:
        for name in stage_json(run / stage)["files"]:
            assert (out / stage / name).read_bytes() == (run / stage / name).read_bytes()
    shutil.rmtree(out)
    shutil.rmtree(hub_env["HF_HOME"])
    hub.fault(content, corrupt=True, times=10_000)
    done = hfpipe("pull", repo_id, "--out", out, env=hub_env, check=2)
    assert "tokenizer.json arrived twice with other bytes than the Hub names" in done.stderr
    assert not list(out.glob("*/"))


def test_a_model_that_somebody_changed_is_told_by_its_lineage(hub, hub_env, repo_id, run, tmp_path):
    from huggingface_hub import HfApi

    push(run, hub_env, "--repo-id", repo_id)
    forged = tmp_path / "config.json"
    forged.write_text((run / "sft" / "config.json").read_text().replace("{", '{"attention_bias": true,', 1))
    HfApi(hub.endpoint, token=TOKEN).upload_file(
        path_or_fileobj=forged, path_in_repo="config.json", repo_id=repo_id, revision="sft"
    )
    told = hfpipe("lineage", f"{repo_id}@sft", env=hub_env, check=2)
    assert re.search("broken +files: config.json", told.stdout)
    commit = stage_json(run / "sft")["hub"]["commit"]
    assert "broken" not in hfpipe("lineage", f"{repo_id}@{commit}", env=hub_env).stdout
    # and a push puts it right, by one more commit
    (run / "sft" / "metrics.jsonl").unlink()
    push(run, hub_env, "--stage", "sft")
    assert hub.files(repo_id, "sft")["config.json"] == (run / "sft" / "config.json").read_bytes()


def test_the_cards_snippet_runs(hub, hub_env, repo_id, run):
    push(run, hub_env, "--repo-id", repo_id)
    for stage in STAGES:
        card = hub.files(repo_id, stage)["README.md"].decode()
        [snippet] = re.findall(r"```python\n(.*?)```", card, re.S)
        assert f'"{repo_id}", revision="{stage}"' in snippet
        done = subprocess.run([sys.executable, "-c", snippet], env=os.environ | hub_env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "<|assistant|>" in done.stdout or stage in ("tokenizer", "pretrain")


ADAPTED = FROM_HUB + "adapter: {{type: lora, r: 4, target_modules: all-linear}}\n"


def test_an_adapter_names_its_bases_commit(hub, hub_env, repo_id, run, hub_recipe, tmp_path):
    push(run, hub_env, "--repo-id", repo_id)
    commit = stage_json(run / "midtrain")["hub"]["commit"]
    out = tmp_path / "out"
    hfpipe("run", hub_recipe(f"{repo_id}@midtrain", ADAPTED), "--out", out, env=hub_env)
    push(out, hub_env, "--repo-id", f"{repo_id}-mine")
    there = hub.files(f"{repo_id}-mine", "sft")
    assert "model.safetensors" in there
    assert "adapter/adapter_model.safetensors" in there
    config = json.loads(there["adapter/adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == (repo_id, commit)
    code = (
        "import sys; from peft import PeftConfig, PeftModel; from transformers import AutoModelForCausalLM\n"
        "there = {'revision': 'sft', 'subfolder': 'adapter'}; config = PeftConfig.from_pretrained(sys.argv[1], **there)\n"
        "base = AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path, revision=config.revision)\n"
        "print(PeftModel.from_pretrained(base, sys.argv[1], **there).num_parameters())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, f"{repo_id}-mine"], env=os.environ | hub_env, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()


# --- data sets ---


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_of_the_hub(hub, hub_env, repo_id, tmp_path, streaming):
    from huggingface_hub import HfApi

    api = HfApi(hub.endpoint, token=TOKEN)
    api.create_repo(repo_id, repo_type="dataset", private=True)
    texts = [f"The capital of country {n} is city {n * 7}." for n in range(200)]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    first = api.upload_file(path_or_fileobj=rows, path_in_repo="train.jsonl", repo_id=repo_id, repo_type="dataset").oid
    folder = tmp_path / "recipe"
    folder.mkdir()
    (folder / "pipeline.yaml").write_text("name: rows\nstages: [tokenizer, pretrain]\nevaluate: {samples: 0}\n")
    (folder / "tokenizer.yaml").write_text(
        f"stage: tokenizer\ntokenizer: {{vocab_size: 300}}\ndata: {{train: [{{path: {repo_id}, revision: main}}]}}\n"
    )
    (folder / "pretrain.yaml").write_text(
        "stage: pretrain\nmodel: {from: tokenizer, config: {model_type: llama, hidden_size: 16, intermediate_size: 32, "
        "num_hidden_layers: 1, num_attention_heads: 2}}\n"
        f"data: {{train: [{{path: {repo_id}}}], max_length: 64, streaming: {str(streaming).lower()}}}\n"
        "trainer: {max_steps: 2, per_device_train_batch_size: 2}\n"
    )
    out = tmp_path / "out"
    hfpipe("run", folder, "--out", out, env=hub_env)
    record = stage_json(out / "pretrain")
    assert record["data"] == {f"train[0] {repo_id}": f"{repo_id}@{first}"}
    assert record["metrics"]["steps"] == 2
    links = json.loads(hfpipe("lineage", out / "pretrain", "--json", env=hub_env).stdout)["links"]
    assert any("pinned" in check["why"] for check in links[0]["checks"])
    if streaming:
        return
    # the Hub away: what was verified is used, and it is said
    hub.fault("/api/datasets/", status=503, times=10_000)
    done = hfpipe("run", folder, "--out", tmp_path / "out2", env=hub_env)
    assert f"the Hub is not reached: {repo_id}" in done.stdout
    assert stage_json(tmp_path / "out2" / "pretrain")["weights"] == record["weights"]
