"""Publishing and pulling through the command line, by the unmodified client, against a Hub of the tests' own: LFS and Xet."""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard

from hfpipe import artifact, load_pipeline, load_run
from hfpipe.errors import UserError
from hfpipe.hub_client import Unreachable
from hfpipe.publishing.card import build_card
from hfpipe.publishing.hub import within
from hfpipe.training.hardware import energy_meter

from .conftest import ROOT, hfpipe, stage_json

STAGES = ("tokenizer", "pretrain", "midtrain", "sft", "dpo")
UPLOAD = "PUT /put|POST /cas/v1/xorbs"  # LFS, Xet
LEAVE = "POST .*/objects/batch|GET .*/xet-write-token/"  # to upload a large file
TOKEN = "hf_alice_write"
LFS = pytest.mark.parametrize("hub", ["lfs"], indirect=True)  # where the way of large files makes no difference


@pytest.fixture
def short_run(own_run) -> Path:
    """One of two stages."""
    for stage in STAGES[:-2]:
        shutil.rmtree(own_run / stage)
    artifact.write_json(own_run / "run.json", {"recipe": "micro", "stages": list(STAGES[-2:])})
    return own_run


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

    api = HfApi(hub.endpoint, token=TOKEN)
    [tag] = api.list_repo_refs(repo_id).tags
    assert tag.target_commit == hub.commits(repo_id, "main")[0].id
    info = api.model_info(repo_id, revision="dpo")
    assert info.private
    assert info.card_data.license == "mit"
    scores = {r.dataset_config: r.metric_value for r in info.card_data.eval_results if r.dataset_config}
    capabilities = json.loads((run / "dpo" / "eval.json").read_text())["capabilities"]
    assert scores == {name: told["score"] for name, told in capabilities.items()}

    published = [content for stage in (*STAGES, "main") for content in hub.files(repo_id, stage).values()]
    homes = (tmp_path, Path(hub_env["HF_HOME"]), hub.root)  # the run's, the client's and the Hub's
    written = [path.read_bytes() for home in homes for path in home.rglob("*") if path.is_file()]
    said = [text.encode() for text in (done.stdout, done.stderr, again.stdout)]
    assert not any(TOKEN.encode() in content for content in [*said, *written, *published]), "the token was written down"
    assert not any(str(tmp_path).encode() in content for content in published), "a folder of this machine was published"


def test_half_a_run_here_and_the_rest_elsewhere(hub, hub_env, repo_id, micro_run, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
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


def test_a_repo_for_each_stage(hub, hub_env, repo_id, own_run):
    settings = ["--set", f"hub.repo_id={repo_id}", "--set", "hub.layout=repos", "--set", "hub.private=false"]
    hfpipe("run", "micro", "--out", own_run, *settings, env=hub_env)
    for stage in STAGES[:-1]:
        assert hub.files(f"{repo_id}-{stage}")["stage.json"]
    last = f"{repo_id}-dpo"
    assert json.loads(hub.files(last)["run.json"])["hub"]["layout"] == "repos"
    out = own_run.parent / "pulled"
    hfpipe("pull", last, "--out", out, env=hub_env)
    assert stage_json(out / "sft")["weights"] == stage_json(own_run / "sft")["weights"]
    assert f"{repo_id}-sft@main" in hfpipe("status", out).stdout
    anonymous = hub_env | {"HF_TOKEN": ""}
    assert "every file verified" in hfpipe("pull", f"{repo_id}-sft", env=anonymous).stdout


@LFS
def test_the_repos_of_a_run_are_tagged_once_it_is_whole(hub, hub_env, repo_id, own_run, tmp_path):
    settings = ["--set", f"hub.repo_id={repo_id}", "--set", "hub.layout=repos"]
    last = shutil.move(own_run / "dpo", tmp_path / "dpo")
    hfpipe("run", "micro", "--out", own_run, "--to", "sft", *settings, env=hub_env)
    repos = {stage: hub.store.repos["model", f"{repo_id}-{stage}"] for stage in STAGES}
    assert [repo.tags for repo in repos.values()] == [{}] * 5
    shutil.move(last, own_run / "dpo")
    hfpipe("run", "micro", "--out", own_run, *settings, env=hub_env)
    [tag] = repos["dpo"].tags
    manifest = json.loads(hub.files(f"{repo_id}-dpo", tag)["run.json"])
    commits = {stage: repo.tags[tag] for stage, repo in repos.items()}
    assert commits == manifest["commits"] | {"dpo": repos["dpo"].branches["main"]}
    before = {stage: list(repo.commits) for stage, repo in repos.items()}
    assert "5 stages are published already" in push(own_run, hub_env).stdout
    assert before == {stage: list(repo.commits) for stage, repo in repos.items()}
    assert all(len(repo.tags) == 1 for repo in repos.values())
    chain = json.loads(hfpipe("lineage", f"{repo_id}-dpo", "--json", env=hub_env).stdout)
    assert [link["where"].partition("@")[0] for link in chain["links"]] == [f"{repo_id}-{s}" for s in reversed(STAGES)]
    assert chain["holds"]
    [snippet] = re.findall(r"```python\n(.*?)```", hub.files(f"{repo_id}-sft")["README.md"].decode(), re.S)
    assert f'"{repo_id}-sft", revision="main"' in snippet
    done = subprocess.run([sys.executable, "-c", snippet], env=os.environ | hub_env, capture_output=True, text=True)
    assert "<|assistant|>" in done.stdout, done.stderr


# --- said before anything trains ---


@pytest.mark.parametrize(
    ("token", "place", "found"),
    [
        ("", "alice/x", "no token to publish with"),
        ("hf_nobody_knows", "alice/x", "Invalid user token"),
        ("hf_alice_read", "alice/x", "may only read"),
        ("hf_alice_wröte", "alice/x", "the token holds a letter that no token has"),
        ("hf_bob_write", "alice/x", "403"),
        (TOKEN, "bob/x", "403"),
    ],
)
@LFS
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


@LFS
def test_a_branch_that_may_not_be_made_stops_the_run(hub, hub_env, repo_id, tmp_path):
    rule = hub.fault("POST .*/branch/dpo", status=403)
    out = tmp_path / "run"
    done = hfpipe("run", "micro", "--out", out, "--set", f"hub.repo_id={repo_id}", env=hub_env, check=2)
    assert rule["fired"] == 1
    assert "the Hub refuses: 403" in done.stderr
    assert not list(out.glob("*/"))


@LFS
def test_a_private_run_does_not_go_to_a_public_repo(hub, hub_env, repo_id, own_run):
    HfApi(hub.endpoint, token=TOKEN).create_repo(repo_id, private=False)
    assert "is public" in push(own_run, hub_env, "--repo-id", repo_id, check=2).stderr
    assert set(hub.files(repo_id)) <= {".gitattributes"}


@LFS
def test_in_python_private_is_private_whatever_the_recipe_says(hub, hub_env, repo_id, short_run, monkeypatch):
    record = artifact.read_json(short_run / "run.json")
    artifact.write_json(short_run / "run.json", {**record, "hub": {"repo_id": repo_id, "private": False}})
    for name, value in hub_env.items():
        monkeypatch.setenv(name, value)
    assert list(load_run(short_run).push(private=True, stages="sft").index) == ["sft"]
    assert hub.store.repos["model", repo_id].private
    load_run(short_run).push(f"{repo_id}-open", stages=["sft"])
    assert not hub.store.repos["model", f"{repo_id}-open"].private


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


@pytest.mark.parametrize("key", ["hub.token", "hub.repo_id", "sft.model.from"])
def test_a_token_in_a_recipe_is_not_repeated(key):
    secret = "AbCdEfGhIjKlMnOpQrStUvWxYz12345678"
    told = hfpipe("plan", "micro", "--set", f"{key}=https://me:hf_{secret}@there/", check=2).stderr
    assert key.partition(".")[2] in told
    assert "hf_..." in told
    assert secret not in told
    with pytest.raises(UserError) as error:
        load_pipeline("micro", {key: f"hf_{secret}"})
    assert secret not in "".join(traceback.format_exception(error.value))


# --- faults ---

SHORT = {  # name: (pattern, fault), and the push gets through all the same
    "409": ("POST .*/commit/", {"status": 409}),
    "412": ("POST .*/commit/", {"status": 412}),
    "429": ("POST .*/commit/", {"status": 429, "headers": {"Retry-After": "3"}}),
    "500": ("POST .*/commit/", {"status": 500}),
    "503 twice": ("POST .*/commit/", {"status": 503, "times": 2}),
    "503 of an upload": (UPLOAD, {"status": 503}),
    "503 of the leave to upload": (LEAVE, {"status": 503}),
    "429 of the leave to upload": (LEAVE, {"status": 429, "headers": {"Retry-After": "3"}}),
    "500 of what to upload": ("POST .*/preupload/", {"status": 500}),
    "503 of a listing": ("/tree/", {"status": 503}),
    "a cut commit": ("POST .*/commit/", {"cut_request": 100}),
    "a lost answer": ("POST .*/commit/", {"drop_response": True}),
    "a lost answer of main's commit": ("POST .*/commit/", {"drop_response": True, "skip": 2}),
    "a lost answer, and then 503": ("POST .*/commit/", {"drop_response": True}),
    "a cut upload": (UPLOAD, {"cut_request": 10_000}),
    "a lost answer of an upload": ("PUT /put|POST /cas/v1/shards", {"drop_response": True}),
    "a lost answer of the branch": ("POST .*/branch/", {"drop_response": True}),
    "a lost answer of the tag": ("POST .*/tag/", {"drop_response": True}),
}


@pytest.mark.parametrize("name", SHORT)
def test_a_fault_that_passes_costs_nothing(hub, hub_env, repo_id, short_run, name):
    pattern, fault = SHORT[name]
    rule = hub.fault(pattern, **fault)
    if "then 503" in name:
        hub.fault("/tree/", status=503, skip=1)
    done = push(short_run, hub_env, "--repo-id", repo_id, check=None)
    assert rule["fired"]
    assert done.returncode == 0, done.stderr
    if name.startswith("429") and not (hub.xet and "leave" in name):  # Xet's client tries again by its own clock
        refused, again, *_ = (request["time"] for request in hub.requests(pattern))
        assert again - refused >= 3, "it did not wait as it was told"
    for stage in STAGES[-2:]:
        assert_published(hub, repo_id, short_run, stage)
        assert made(hub, repo_id, stage) == 1, "a second commit"
    assert messages(hub, repo_id, "main") == ["dpo is the last stage so far, by hfpipe", "initial commit"]
    assert "published already" in push(short_run, hub_env).stdout


LONG = {
    "401": ("POST .*/commit/", 401, 2, "401"),
    "403": ("POST .*/commit/", 403, 2, "403"),
    "404": ("POST .*/commit/", 404, 2, "404"),
    "500": ("POST .*/commit/", 500, 1, "500"),
    "503": ("POST .*/commit/", 503, 1, "503"),
    "401 of the leave to upload": (LEAVE, 401, 2, "401"),
    "403 of the leave to upload": (LEAVE, 403, 2, "403"),
    "404 of what to upload": ("POST .*/preupload/", 404, 2, "404"),
    # Of Xet's storage: a status that Xet's client tells of that may be of a link that is too old, so it is tried again.
    "403 of an upload": (UPLOAD, 403, {"lfs": 2, "xet": 1}, "403"),
}


@pytest.mark.parametrize("name", LONG)
def test_a_fault_that_stays_is_told_and_loses_nothing(hub, hub_env, repo_id, own_run, name):
    pattern, status, code, found = LONG[name]
    hub.fault(pattern, status=status, times=10_000)
    done = push(own_run, hub_env, "--repo-id", repo_id, "--stage", "sft", check=None)
    assert done.returncode == (code if isinstance(code, int) else code["xet" if hub.xet else "lfs"]), done.stderr
    assert found in done.stderr
    assert "othing here is lost" in done.stderr
    assert "Traceback" not in done.stderr
    assert TOKEN not in done.stderr
    assert made(hub, repo_id) == 0
    assert "hub" not in stage_json(own_run / "sft")
    hub.faults.clear()
    push(own_run, hub_env, "--repo-id", repo_id, "--stage", "sft")
    assert_published(hub, repo_id, own_run, "sft")
    assert made(hub, repo_id) == 1


MOMENTS = {
    "in an upload": (UPLOAD, {"delay": 3.0}),
    "before the commit": ("POST .*/commit/", {"delay": 3.0}),
    "after the commit": ("POST .*/commit/", {"late": 3.0}),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_push_is_done_again_once(hub, hub_env, repo_id, own_run, moment):
    pattern, fault = MOMENTS[moment]
    rule = hub.fault(pattern, **fault)
    command = [sys.executable, "-m", "hfpipe", "push", str(own_run), "--repo-id", repo_id, "--stage", "sft"]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | hub_env, stdout=subprocess.DEVNULL)
    while not rule["fired"] or ("late" in fault and not made(hub, repo_id)):
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert made(hub, repo_id) == ("late" in fault)
    assert "hub" not in stage_json(own_run / "sft")
    push(own_run, hub_env, "--repo-id", repo_id, "--stage", "sft")
    assert_published(hub, repo_id, own_run, "sft")
    time.sleep(4)  # were the killed one's commit still on its way, it would arrive
    assert made(hub, repo_id) == 1


HANGS = {
    "in an upload": (UPLOAD, "delay"),
    "at a commit": ("POST .*/commit/", "delay"),
    "after a commit": ("POST .*/commit/", "late"),
    "at first": ("GET .*/refs", "delay"),
}


@pytest.mark.parametrize("moment", HANGS)
def test_a_hub_that_hangs_holds_nobody_up(hub, hub_env, repo_id, own_run, moment):
    pattern, fault = HANGS[moment]
    rule = hub.fault(pattern, **{fault: 60.0}, times=100)
    settings = ["--set", f"hub.repo_id={repo_id}", "--set", "hub.timeout_minutes=0.05"]
    done = hfpipe("run", "micro", "--out", own_run, *settings, env=hub_env)
    # Whatever the machine's load: nobody stayed for an answer, which comes after a minute.
    answered = [request["status"] for request in hub.requests(pattern) if request["fault"] == fault]
    assert rule["fired"] == len(answered) > 0
    assert set(answered) <= {None, 499}
    left = STAGES[1:] if pattern == UPLOAD else STAGES  # a tokenizer has no large file
    assert f"not published yet: {', '.join(left)}" in done.stdout
    assert f"`hfpipe push {own_run}` sends it" in done.stdout
    assert "took more than 3 s" in (own_run / "logs" / "push.log").read_text()
    hub.reset()
    push(own_run, hub_env)
    assert all(made(hub, repo_id, stage) == 1 for stage in STAGES)


@pytest.mark.parametrize("moment", ["at a commit", "at first"])
@LFS
def test_the_command_gives_up_a_hub_that_hangs(hub, hub_env, repo_id, short_run, moment):
    record = artifact.read_json(short_run / "run.json")
    section = {"repo_id": repo_id, "timeout_minutes": 0.1}
    artifact.write_json(short_run / "run.json", {**record, "hub": section})
    pattern, fault = HANGS[moment]
    rule = hub.fault(pattern, **{fault: 60.0}, times=100)
    command = [sys.executable, "-m", "hfpipe", "push", short_run]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | hub_env, capture_output=True, text=True)
    assert rule["fired"]
    assert {request["status"] for request in hub.requests(pattern)} <= {None, 499}, "it stayed for the answer"
    assert done.returncode == 1
    assert "took more than 6 s and was ended; nothing here is lost" in done.stderr
    assert re.search("last push ended with.*took more than 6 s", hfpipe("status", short_run).stdout)
    hub.reset()
    push(short_run, hub_env)
    assert all(made(hub, repo_id, stage) == 1 for stage in STAGES[-2:])


FOR_EVER = {  # name: (way of large files, setting, what is told)
    "lfs, by the watchdog": ("lfs", "hub.timeout_minutes=0.1", "took more than 6 s"),
    "xet, by the watchdog": ("xet", "hub.timeout_minutes=0.1", "took more than 6 s"),
    "xet, by a client that tries twice": ("xet", "hub.timeout_minutes=null", "503"),
    "lfs, by the client": ("lfs", "hub.timeout_minutes=null", "503"),  # after more than a minute
    "xet, by the client": ("xet", "hub.timeout_minutes=null", "503"),  # after four to five
}


@pytest.mark.parametrize(
    ("hub", "setting", "found"),
    [
        pytest.param(*told, id=name, marks=[pytest.mark.slow] if name.endswith("the client") else [])
        for name, told in FOR_EVER.items()
    ],
    indirect=["hub"],
)
def test_uploads_that_get_503_for_ever_fail_no_run(request, hub, hub_env, repo_id, own_run, setting, found):
    env = hub_env
    if "twice" not in request.node.callspec.id:  # as long as a user's client tries
        env = {name: value for name, value in env.items() if "_XET_CLIENT_RETRY_" not in name}
    if found != "503":  # a push more, so only where that is short
        shutil.rmtree(own_run / "dpo")
    rule = hub.fault(UPLOAD, status=503, times=10_000)
    settings = ["--set", f"hub.repo_id={repo_id}", "--set", setting]
    done = hfpipe("run", "micro", "--out", own_run, *settings, env=env)
    assert rule["fired"]
    assert "micro is complete" in done.stdout
    [left] = re.findall(r"not published yet: (.*)", done.stdout)
    assert left.startswith("pretrain, midtrain, sft, dpo (")  # a tokenizer has no large file
    assert found in left
    assert "Traceback" not in done.stdout + done.stderr
    told = hfpipe("status", own_run).stdout
    assert told.count("not published yet") == 4
    assert "4 to push" in told
    assert re.search(rf"last push ended with.*{found}", told)
    assert [stage for stage in STAGES if "hub" in stage_json(own_run / stage)] == ["tokenizer"]
    hub.faults.clear()
    push(own_run, hub_env)
    for stage in STAGES:
        assert_published(hub, repo_id, own_run, stage)
        assert made(hub, repo_id, stage) == 1
    assert "to push" not in hfpipe("status", own_run).stdout


@LFS
def test_with_the_hub_down_a_run_ends_well_and_says_what_is_left(hub, hub_env, repo_id, own_run):
    shutil.rmtree(own_run / "dpo")
    down = hub_env | {"HF_ENDPOINT": "http://127.0.0.1:1"}
    done = hfpipe("run", "micro", "--out", own_run, "--set", f"hub.repo_id={repo_id}", env=down)
    assert "the Hub is not reached" in done.stdout
    assert "the run goes on" in done.stdout
    assert "not published yet: tokenizer, pretrain, midtrain, sft, dpo" in done.stdout
    assert "micro is complete" in done.stdout
    told = hfpipe("status", own_run).stdout
    assert told.count("not published yet") == 5
    assert "5 to push" in told
    assert "last push ended with" in told
    push(own_run, hub_env)
    assert "to push" not in hfpipe("status", own_run).stdout
    assert_published(hub, repo_id, own_run, "dpo")


@LFS
def test_what_changed_is_published_anew_and_what_is_gone_goes(hub, hub_env, repo_id, own_run):
    push(own_run, hub_env, "--repo-id", repo_id)
    record = stage_json(own_run / "sft")
    (own_run / "sft" / "metrics.jsonl").unlink()
    assert json.loads(hfpipe("status", own_run, "--json").stdout)["to_push"] == ["sft"]
    told = push(own_run, hub_env).stdout
    assert "sft" in told
    assert "metrics.jsonl" not in hub.files(repo_id, "sft")
    # dpo names the commit of its parent, which is another one now
    assert (
        json.loads(hub.files(repo_id, "dpo")["stage.json"])["parent"]["commit"]
        == stage_json(own_run / "sft")["hub"]["commit"]
    )
    assert stage_json(own_run / "sft")["hub"]["commit"] != record["hub"]["commit"]
    assert made(hub, repo_id) == 2


@LFS
def test_a_push_reads_no_file_of_ours_more_than_twice(hub, hub_env, repo_id, own_run):
    code = (
        "import collections, sys; from hfpipe import artifact; from hfpipe.cli import main\n"
        "read, sha256 = collections.Counter(), artifact.file_sha256\n"
        "artifact.file_sha256 = lambda path: (read.update([str(path)]), sha256(path))[1]\n"
        "code = main(sys.argv[1:]); print(max(read.values())); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "push", own_run, "--repo-id", repo_id]
    command += [word for stage in STAGES for word in ("--stage", stage)]  # as a run names them
    done = subprocess.run(command, env=os.environ | hub_env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) == 2


# --- other people's repos, and repos that went away ---


@LFS
def test_what_others_have_put_there_is_not_touched(hub, hub_env, repo_id, short_run):
    api = HfApi(hub.endpoint, token=TOKEN)
    api.create_repo(repo_id, private=True)
    api.upload_file(path_or_fileobj=b"GGUF", path_in_repo="old-model.gguf", repo_id=repo_id)
    assert (
        "old-model.gguf, which hfpipe did not publish" in push(short_run, hub_env, "--repo-id", repo_id, check=2).stderr
    )
    settings = ["--set", f"hub.repo_id={repo_id}", "--set", "hub.layout=revisions"]
    done = hfpipe("run", "micro", "--out", short_run.parent / "new", *settings, env=hub_env, check=2)
    assert "Give another repo_id" in done.stderr
    assert len(hub.commits(repo_id)) == 2

    other = f"{repo_id}-other"
    push(short_run, hub_env, "--repo-id", other)
    for branch in ("sft", "main"):
        api.upload_file(path_or_fileobj=b"MIT", path_in_repo="LICENSE", repo_id=other, revision=branch)
    (short_run / "sft" / "metrics.jsonl").unlink()
    push(short_run, hub_env)
    for branch in ("sft", "main"):
        assert hub.files(other, branch)["LICENSE"] == b"MIT"
    assert "metrics.jsonl" not in hub.files(other, "sft")


@LFS
def test_a_branch_holds_nothing_before_its_stage_is_published(hub, hub_env, repo_id, short_run):
    push(short_run, hub_env, "--repo-id", repo_id, "--stage", "sft")
    hfpipe("run", "micro", "--out", short_run, "--only", "dpo", "--set", f"hub.repo_id={repo_id}", env=hub_env)
    assert set(hub.files(repo_id, "pretrain")) <= {".gitattributes"}
    assert "it holds no model" in hfpipe("pull", f"{repo_id}@pretrain", env=hub_env, check=2).stderr


@LFS
def test_a_repo_that_was_deleted_is_made_again(hub, hub_env, repo_id, short_run):
    push(short_run, hub_env, "--repo-id", repo_id)
    hub.store.repos.pop(("model", repo_id))
    push(short_run, hub_env)
    assert_published(hub, repo_id, short_run, "sft")


@LFS
def test_a_repo_that_may_only_be_read_stops_the_run(hub, hub_env, repo_id, tmp_path):
    HfApi(hub.endpoint, token="hf_bob_write").create_repo(f"bob/{tmp_path.name}-tokenizer", private=False)
    settings = ["--set", f"hub.repo_id=bob/{tmp_path.name}", "--set", "hub.layout=repos", "--set", "hub.private=false"]
    done = hfpipe("run", "micro", "--out", tmp_path / "run", *settings, "--to", "tokenizer", env=hub_env, check=2)
    assert "the Hub refuses" in done.stderr


@LFS
def test_a_hub_that_hangs_or_babbles_before_the_run_does_not_stop_it(hub, hub_env, repo_id, own_run):
    settings = ["--set", f"hub.repo_id={repo_id}"]
    portal = http.server.HTTPServer(("127.0.0.1", 0), Portal)
    threading.Thread(target=portal.serve_forever, daemon=True).start()
    env = hub_env | {"HF_ENDPOINT": f"http://127.0.0.1:{portal.server_port}"}
    done = hfpipe("run", "micro", "--out", own_run, *settings, env=env)
    portal.shutdown()
    assert "the Hub is not reached" in done.stdout
    assert "not published yet" in done.stdout
    with pytest.raises(Unreachable, match=r"no answer within 0\.2 s"):
        within(0.2, lambda: time.sleep(5))
    with pytest.raises(UserError, match="told"):
        within(5, lambda: (_ for _ in ()).throw(UserError("told")))


@pytest.mark.parametrize("limit_s", [2, pytest.param(60, marks=pytest.mark.slow)])  # the minute that it has, and less
@pytest.mark.parametrize("moment", ["GET /api/whoami-v2", "POST .*/branch/dpo"], ids=["at first", "at last"])
@LFS
def test_a_hub_that_hangs_when_a_run_asks_for_leave_is_waited_for_so_long(
    hub, hub_env, repo_id, own_run, moment, limit_s
):
    shutil.rmtree(own_run / "dpo")
    rule = hub.fault(moment, delay=90.0, times=100)
    code = (
        f"import sys, hfpipe.publishing.hub as hub; hub._PROBE_S = {limit_s}\n"  # no setting: a minute is right for all
        "from hfpipe.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "run", "micro", "--out", own_run, "--set", f"hub.repo_id={repo_id}"]
    command += ["--set", "hub.timeout_minutes=0.1"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | hub_env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert rule["fired"]
    assert {request["status"] for request in hub.requests(moment)} <= {None, 499}, "it stayed for the answer"
    [note] = re.findall(r"the Hub is not reached.*", done.stdout)
    assert note.startswith(f"the Hub is not reached (no answer within {limit_s} s); the run goes on")
    assert done.stdout.index(note) < done.stdout.index("dpo ")
    assert "micro is complete" in done.stdout
    hub.reset()
    push(own_run, hub_env)
    for stage in STAGES:
        assert_published(hub, repo_id, own_run, stage)
        assert made(hub, repo_id, stage) == 1


class Portal(http.server.BaseHTTPRequestHandler):
    """Answers everything with a page, as a hotel's network does."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<html>Please log in.</html>")

    do_POST = do_GET

    def log_message(self, *args):
        pass


@LFS
def test_no_folder_of_ours_is_published(hub, hub_env, repo_id, short_run):
    record, secret = stage_json(short_run / "sft"), "/home/me/My secret plan"
    record["data"] = {f"train[0] {secret}/rows.jsonl": "0" * 64, f"chat_template {secret}/t.jinja": "1" * 64}
    record["written"] |= {
        "tokenizer": {"chat_template": f"{secret}/t.jinja"},
        "rewards": {"model": f"{secret}/judge", "functions": [{"function": f"{secret}/r.py:f"}]},
    }
    record["sources"] = [{"path": f"{secret}/rows.jsonl", "role": "train", "text": f"{secret}/rows.jsonl [train]: text",
                          "examples": ["a row of ours"], "places": {"x": [f"{secret}/rows.jsonl line 3"]}}]  # fmt: skip
    record["chat"] = "<s>Hello</s> and/or 1/2"
    artifact.write_record(short_run / "sft" / "stage.json", record)
    push(short_run, hub_env, "--repo-id", repo_id)
    for branch in ("sft", "main", "dpo"):
        for name, content in hub.files(repo_id, branch).items():
            assert b"secret plan" not in content, name
            assert b"a row of ours" not in content, name
    told = json.loads(hub.files(repo_id, "sft")["stage.json"])
    assert set(told["data"]) == {"train[0] rows.jsonl", "chat_template t.jinja"}
    assert told["written"]["rewards"] == {"model": "judge", "functions": [{"function": "r.py:f"}]}
    assert told["chat"] == record["chat"]


# --- the card ---


def test_energy_is_told_where_it_can_be_read(own_run, tmp_path):
    counters = {tmp_path / "rapl" / f"intel-rapl:{n}": start for n, start in enumerate((900, 200))}
    for folder, start in counters.items():
        folder.mkdir(parents=True)
        (folder / "max_energy_range_uj").write_text("1000000000")
        (folder / "energy_uj").write_text(str(start * 10**6))
    (tmp_path / "rapl" / "intel-rapl:0:0").mkdir()  # a core's counter, part of its package's
    (tmp_path / "rapl" / "intel-rapl:0:0" / "energy_uj").write_text("5")
    spent = energy_meter(tmp_path / "rapl")
    for folder, now in zip(counters, (260, 560), strict=True):  # the first has run over
        (folder / "energy_uj").write_text(str(now * 10**6))
    energy = spent()
    assert energy == {"wh": 0.2, "how": "CPU, by RAPL"}  # 360 J and 360 J
    assert energy_meter(tmp_path / "nothing")() is None
    record, evaluation = stage_json(own_run / "sft"), json.loads((own_run / "sft" / "eval.json").read_text())
    assert not re.search(r"\d Wh", build_card(record, evaluation, "me/x"))
    record["metrics"]["energy"] = energy
    record["card"] = {"license": "mit", "language": ["en"], "carbon_intensity": 400}
    card = build_card(record, evaluation, "me/x@sft")
    assert "about 0.2 Wh, 0.08 g of CO2 (CPU, by RAPL)" in card
    told = ModelCard(card).data.to_dict()
    assert told["co2_eq_emissions"]["emissions"] == pytest.approx(0.08)
    assert (told["license"], told["language"]) == ("mit", ["en"])


def test_a_card_is_not_broken_by_what_data_and_models_say(own_run):
    record, evaluation = stage_json(own_run / "sft"), json.loads((own_run / "sft" / "eval.json").read_text())
    name = "a|b\n<script>alert(1)</script>"
    record["data"] = {f"train[0] {name}": "0" * 64}
    evaluation["capabilities"] = {name: {"score": 0.5, "n": 2, "low": 0.1, "high": 0.9}}
    card = build_card(record, evaluation, "me/x")
    body = card.partition("# micro: sft")[2]
    assert "<script>" not in body
    assert body.count("a\\|b &lt;script>alert(1)&lt;/script>") == 2
    assert ModelCard(card).data.eval_results[0].metric_value == 0.5
