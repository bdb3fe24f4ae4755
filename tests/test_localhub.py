"""The tests' own Hub, seen by the unmodified client in a process of its own, as a user's commands are."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from .conftest import ROOT

# By `hub.xet`.
UPLOADS = ("PUT /put/", "POST /cas/v1/xorbs/")
DOWNLOADS = ("GET /get/", "GET /cas/xorb/")
lfs_only = pytest.mark.parametrize("hub", ["lfs"], indirect=True)  # of tests without large files
CLIENT = """
import json, sys
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors, snapshot_download

def status(call, *arguments, **options):
    try:
        call(*arguments, **options)
        return 200
    except errors.HfHubHTTPError as error:
        return error.response.status_code
    except Exception as error:
        return type(error).__name__

def add(path, text):
    return CommitOperationAdd(path, text.encode())

def show(value):
    print(json.dumps(value))

repo, *arguments = sys.argv[1:]
api = HfApi()
"""


def start(code: str, env: dict[str, str], *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", CLIENT + code, *map(str, arguments)]
    return subprocess.Popen(command, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def client(code: str, env: dict[str, str], *arguments: object):
    """Runs Python code with `api`, `repo` and `arguments`; returns what it showed."""
    process = start(code, env, *arguments)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    return json.loads(stdout.splitlines()[-1])


@pytest.fixture
def folder(tmp_path):
    """A folder as a stage leaves it, with a file that LFS sends in three parts."""
    files = {
        "README.md": b"---\nlicense: mit\nlibrary_name: transformers\ntags: [sft]\n---\n# A model\n",
        "config.json": b'{"model_type": "llama"}',
        "empty.txt": b"",
        "data/needle.txt": b"a needle in the hay",
        "data/small.bin": b"another needle" + os.urandom(100_000),
        "model.safetensors": os.urandom(12_000_000),
    }
    for name, content in files.items():
        path = tmp_path / "stage" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "stage"


def contents(folder) -> dict[str, bytes]:
    """The files of a folder, without what clients and the Hub put there for themselves."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {path: content for path, content in files.items() if not path.startswith(".")}


PUSH = "api.create_repo(repo, private=True, exist_ok=True)\n"
PUSH += "sha = api.upload_folder(repo_id=repo, folder_path=arguments[0], commit_message='sft').oid\n"


def test_push_verify_tag_pull(hub, hub_env, repo_id, folder, tmp_path):
    code = PUSH + (
        "same = api.verify_repo_checksums(repo, revision=sha, local_dir=arguments[0])\n"
        "api.create_tag(repo, tag='v1', revision=sha)\n"
        "refs, info = api.list_repo_refs(repo), api.model_info(repo, files_metadata=True)\n"
        "path = snapshot_download(repo, revision='v1', local_dir=arguments[1])\n"
        "show({'sha': sha, 'same': [len(same.mismatches), same.missing_paths], 'info': [info.sha, info.private],\n"
        "      'tags': {tag.name: tag.target_commit for tag in refs.tags}, 'card': info.card_data.to_dict(),\n"
        "      'lfs': sorted(file.rfilename for file in info.siblings if file.lfs),\n"
        "      'history': [commit.title for commit in api.list_repo_commits(repo)]})\n"
    )
    seen = client(code, hub_env, repo_id, folder, tmp_path / "pulled")
    sha, files = seen["sha"], contents(folder)
    assert seen["same"] == [0, [".gitattributes"]]
    assert seen["info"] == [sha, True]
    assert seen["tags"] == {"v1": sha}
    assert seen["card"] == {"license": "mit", "library_name": "transformers", "tags": ["sft"]}
    assert seen["lfs"] == ["data/small.bin", "model.safetensors"]
    assert seen["history"] == [commit.message for commit in hub.commits(repo_id)] == ["sft", "initial commit"]
    assert hub.commits(repo_id)[0].id == sha
    assert contents(tmp_path / "pulled") == files
    assert {path: text for path, text in hub.files(repo_id, "v1").items() if path != ".gitattributes"} == files
    assert len(hub.requests(UPLOADS[hub.xet])) == (1 if hub.xet else 4)
    assert not [entry for entry in hub.log if entry["port"] == "storage" and entry["auth"] == "alice"]
    on_disk = b"".join(path.read_bytes() for path in hub.root.rglob("*") if path.is_file())
    assert all(text in on_disk for text in (b"a needle in the hay", b"another needle", sha.encode()))

    hub.reset()
    assert client(PUSH + "show(sha)", hub_env, repo_id, folder) == sha
    assert not hub.requests(UPLOADS[hub.xet])
    assert len(hub.commits(repo_id)) == 2


@lfs_only
def test_a_commit_is_one_transaction_on_one_branch(hub, hub_env, repo_id):
    code = """
api.create_repo(repo, repo_type="dataset")
api.create_branch(repo, branch="stage/sft", repo_type="dataset")
api.create_branch(repo, branch="stage/sft", repo_type="dataset", exist_ok=True)

def commit(*operations, **options):
    return api.create_commit(repo, operations, commit_message="m", commit_description="d", repo_type="dataset", **options)

first = commit(add("a.txt", "1"), add("b/c.txt", "2"), add("b/d.txt", "3"), add("keep.txt", "4"), revision="stage/sft").oid
second = commit(CommitOperationDelete("a.txt"), CommitOperationDelete("b/"), revision="stage/sft", parent_commit=first).oid
api.create_branch(repo, branch="old", revision=first, repo_type="dataset")
api.create_tag(repo, tag="v0", revision=first, repo_type="dataset")
again = status(api.create_tag, repo, tag="v0", repo_type="dataset")
api.delete_branch(repo, branch="old", repo_type="dataset")
api.delete_tag(repo, tag="v0", repo_type="dataset")
missing, late = CommitOperationDelete("nothing.txt"), add("late.txt", "5")
show([first, second, again,
      status(commit, late, revision="stage/sft", parent_commit=first),
      status(commit, late, missing, revision="stage/sft"),
      status(commit, late, revision="nowhere"),
      [file.path for file in api.list_repo_tree(repo, "b", revision=first, repo_type="dataset")],
      [file.path for file in api.get_paths_info(repo, ["b", "b/c.txt", "x"], revision=first, repo_type="dataset")],
      [api.revision_exists(repo, name, repo_type="dataset") for name in ("stage/sft", second[:8], "old", "v0", "nowhere")],
      api.repo_exists(repo)])
"""
    first, second, *seen = client(code, hub_env, repo_id)
    assert seen == [
        *(409, 412, 404, 404, ["b/c.txt", "b/d.txt"], ["b", "b/c.txt"]),
        *([True, True, False, False, False], False),
    ]
    history = hub.commits(repo_id, "stage/sft", repo_type="dataset")
    assert [(commit.id, commit.message) for commit in history[:2]] == [(second, "m\n\nd"), (first, "m\n\nd")]
    assert set(hub.files(repo_id, "stage/sft", repo_type="dataset")) == {".gitattributes", "keep.txt"}
    assert set(hub.files(repo_id, repo_type="dataset")) == {".gitattributes"}


RIGHTS = {
    # Token: whoami, and making repos of one's own and of another | reading, writing what is alice's: private; public
    "hf_alice_write": [200, 200, 403, 200, 200, 200, 200],
    "hf_alice_read": [200, 403, 403, 200, 403, 200, 403],
    "hf_bob_write": [200, 403, 200, 404, 404, 200, 403],
    "hf_unknown": [401] * 7,
    "": ["LocalTokenNotFoundError", 401, 401, 401, 401, 200, 401],
}


@lfs_only
def test_who_may_do_what(hub, hub_env, repo_id):
    client("show([api.create_repo(repo + '-private', private=True), api.create_repo(repo)])", hub_env, repo_id)
    code = """
name = repo.split("/")[1] + "-new"
seen = [status(api.whoami), status(api.create_repo, "alice/" + name), status(api.create_repo, "bob/" + name)]
for known in (repo + "-private", repo):
    seen.append(status(api.model_info, known))
    seen.append(status(api.create_commit, known, [add("x.txt", "1")], commit_message="x"))
show(seen)
"""
    processes = {token: start(code, hub_env | {"HF_TOKEN": token}, repo_id) for token in RIGHTS}
    assert {token: json.loads(process.communicate()[0]) for token, process in processes.items()} == RIGHTS


@lfs_only
def test_an_invalid_card_is_refused(hub, hub_env, repo_id):
    code = """
api.create_repo(repo)
try:
    api.create_commit(repo, [add("README.md", "---\\na: [\\n---\\n")], commit_message="x")
except ValueError as error:
    show(str(error))
"""
    assert "expected the node content" in client(code, hub_env, repo_id)
    assert len(hub.commits(repo_id)) == 1


@pytest.mark.parametrize(
    "fault", [{"status": 503}, {"status": 429, "headers": {"Retry-After": "1"}}, {"cut_request": 300_000}]
)
def test_an_upload_that_fails_once_is_tried_again(hub, hub_env, repo_id, folder, fault):
    rule = hub.fault(UPLOADS[hub.xet] + "|preupload", skip=1, **fault)
    client(PUSH + "show(sha)", hub_env, repo_id, folder)
    assert rule["fired"] == 1
    assert hub.files(repo_id).items() >= contents(folder).items()
    [entry] = [entry for entry in hub.log if entry["fault"]]
    assert entry["status"] == fault.get("status", 499)


@lfs_only
def test_faults_of_a_commit(hub, hub_env, repo_id):
    for fault in ({"status": 403}, {"cut_request": 10}, {"drop_response": True}):
        hub.fault("POST .*/commit/", **fault)
    code = """
api.create_repo(repo)
for text in "abcd":
    seen = status(api.create_commit, repo, [add("x.txt", text)], commit_message=text)
    arguments.append([seen, [commit.title for commit in api.list_repo_commits(repo)][:-1]])
show(arguments)
"""
    lost = "RemoteProtocolError"
    assert client(code, hub_env, repo_id) == [[403, []], [lost, []], [lost, ["c"]], [200, ["d", "c"]]]
    assert hub.files(repo_id)["x.txt"] == b"d"
    assert [rule["fired"] for rule in hub.faults] == [1, 1, 1]
    with pytest.raises(TypeError, match="not nothing_such"):
        hub.fault("", nothing_such=1)


@pytest.mark.parametrize(("fault", "commits"), [({"delay": 1.0}, 1), ({"late": 1.0}, 2)])
def test_what_a_client_leaves_that_is_killed_in_the_middle(hub, hub_env, repo_id, folder, fault, commits):
    rule = hub.fault("POST .*/commit/", **fault)
    process = start(PUSH, hub_env, repo_id, folder)
    while not rule["fired"]:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.communicate()
    while hub.requests("POST .*/commit/")[0]["status"] is None:
        time.sleep(0.05)
    assert hub.requests("POST .*/commit/")[0]["status"] == 499
    assert len(hub.commits(repo_id)) == commits
    hub.reset()
    client(PUSH + "show(sha)", hub_env, repo_id, folder)
    assert hub.files(repo_id).items() >= contents(folder).items()
    assert not hub.requests(UPLOADS[hub.xet])


def test_faults_of_a_download(hub, hub_env, repo_id, folder, tmp_path):
    client(PUSH + "show(sha)", hub_env, repo_id, folder)
    pull = "show(snapshot_download(repo, local_dir=arguments[0]))\n"
    rule = hub.fault(DOWNLOADS[hub.xet], skip=1, cut_response=50_000)
    client(pull, hub_env, repo_id, tmp_path / "cut")
    assert rule["fired"] == 1
    assert contents(tmp_path / "cut") == contents(folder)
    hub.fault("GET .*/resolve/.*/config.json", corrupt=True)
    hub.fault(DOWNLOADS[hub.xet], corrupt=True, times=9)
    pull += "show([bad['path'] for bad in api.verify_repo_checksums(repo, local_dir=arguments[0]).mismatches])\n"
    wrong = client(pull, hub_env, repo_id, tmp_path / "corrupt")
    # Neither over plain HTTP nor of Xet's uncompressed chunks does the client check more than the size.
    got, sent = contents(tmp_path / "corrupt"), contents(folder)
    assert wrong == sorted(path for path in sent if got[path] != sent[path])
    assert {"config.json", "model.safetensors"} <= set(wrong)
    assert {path: len(text) for path, text in got.items()} == {path: len(text) for path, text in sent.items()}


def test_it_runs_by_itself(tmp_path):
    command = [sys.executable, "-m", "tests.localhub", "--root", str(tmp_path / "hub"), "--xet"]
    server = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE, text=True
    )
    lines = [server.stdout.readline() for _ in range(12)]
    env = dict(line.removeprefix("export ").strip().replace("''", "").split("=", 1) for line in lines)
    assert client("show(api.whoami()['name'])", env | {"HF_HOME": str(tmp_path)}, "") == "alice"
    server.send_signal(signal.SIGINT)
    assert server.wait(60) == 0
