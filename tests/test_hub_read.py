"""Reading from the Hub through the command line: pinned, verified, and without it only what was verified before."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

from hfpipe import artifact

from .conftest import hfpipe, stage_json
from .test_hub import LFS, STAGES, TOKEN, push

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


def test_a_stage_from_the_hub_is_pinned_and_needs_no_hub_again(hub, hub_env, repo_id, own_run, hub_recipe, tmp_path):
    push(own_run, hub_env, "--repo-id", repo_id)
    commit = stage_json(own_run / "midtrain")["hub"]["commit"]
    folder, out = hub_recipe(f"{repo_id}@midtrain"), tmp_path / "out"
    hfpipe("run", folder, "--out", out, env=hub_env)
    record = stage_json(out / "sft")
    assert record["parent"]["revision"] == commit
    assert record["pins"] == {f"{repo_id}@midtrain": commit}
    # the branch moves on: a finished stage keeps its commit, and asks nobody
    (own_run / "midtrain" / "metrics.jsonl").unlink()
    push(own_run, hub_env, "--stage", "midtrain")
    assert stage_json(own_run / "midtrain")["hub"]["commit"] != commit
    down = hub_env | {"HF_ENDPOINT": hub.endpoint.rpartition(":")[0] + ":1"}
    assert '"done"' in hfpipe("plan", folder, "--out", out, "--json", env=down).stdout
    # a new own_run takes the new one
    hfpipe("run", folder, "--out", tmp_path / "out2", env=hub_env)
    assert (
        stage_json(tmp_path / "out2" / "sft")["parent"]["revision"] == stage_json(own_run / "midtrain")["hub"]["commit"]
    )
    chain = json.loads(hfpipe("lineage", out / "sft", "--json", env=hub_env).stdout)
    assert [link["stage"] for link in chain["links"]] == ["sft", "midtrain", "pretrain", "tokenizer"]
    assert chain["links"][1]["where"] == f"{repo_id}@{commit}"
    assert chain["holds"]


SYNTH = """
rows:
  method: distil
  teacher: {{model: "{teacher}"}}
  prompts: {{path: tinyworld/sft, limit: 6}}
  max_new_tokens: 24
  temperature: 0
"""


def test_a_teacher_of_the_hub_is_the_one_in_its_folder(hub, hub_env, repo_id, own_run, hub_recipe, tmp_path):
    push(own_run, hub_env, "--repo-id", repo_id)
    commit = stage_json(own_run / "sft")["hub"]["commit"]
    said = []
    for name, teacher in (("hub", f"{repo_id}@sft"), ("folder", own_run / "sft")):
        folder = hub_recipe("midtrain", name=name)
        (folder / "synth.yaml").write_text(SYNTH.format(teacher=teacher))
        (folder / "sft.yaml").write_text(FROM_HUB.format(source=own_run / "midtrain"))
        (folder / "pipeline.yaml").write_text("name: mine\nstages: [sft]\nsynth: synth.yaml\nevaluate: {samples: 0}\n")
        hfpipe("data", "synth", folder, "--out", tmp_path / f"{name}-run", env=hub_env)
        made = tmp_path / f"{name}-run" / "synth"
        record = json.loads((made / "rows.json").read_text())
        assert record["pins"] == ({f"{repo_id}@sft": commit} if name == "hub" else {})
        tables = [
            pyarrow.parquet.read_table(made / f"{part}.parquet").to_pylist() for part in ("rows", "rows.rejected")
        ]
        rows = sorted((row for table in tables for row in table), key=lambda row: row["made_from"])
        assert len(rows) == record["asked"] == 6
        who = f"{repo_id}@{commit[:16]}" if name == "hub" else f"{own_run / 'sft'}@"
        assert all(row["made_by"].startswith(who) for row in rows)
        said.append([row["messages"] for row in rows])
    assert said[0] == said[1]


def test_with_the_hub_away_only_what_was_verified_is_used_and_it_is_said(
    hub, hub_env, repo_id, own_run, hub_recipe, tmp_path
):
    push(own_run, hub_env, "--repo-id", repo_id)
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
    assert stage_json(tmp_path / "b" / "sft")["parent"]["revision"] == stage_json(own_run / "midtrain")["hub"]["commit"]


CONTENT = {
    "small": r"GET .*/resolve/.*/tokenizer.json|GET .*/resolve-cache/.*/tokenizer.json",
    "large": "GET /get/|GET /cas/xorb/",  # LFS, Xet
}


@pytest.mark.parametrize("size", CONTENT)
def test_a_corrupt_download_is_fetched_again_or_refused(hub, hub_env, repo_id, own_run, tmp_path, size):
    push(own_run, hub_env, "--repo-id", repo_id)
    rule = hub.fault(CONTENT[size], corrupt=True)
    out = tmp_path / "pulled"
    hfpipe("pull", repo_id, "--out", out, env=hub_env)
    assert rule["fired"]
    for stage in STAGES:
        for name in stage_json(own_run / stage)["files"]:
            assert (out / stage / name).read_bytes() == (own_run / stage / name).read_bytes()
    shutil.rmtree(out)
    shutil.rmtree(hub_env["HF_HOME"])
    hub.fault(CONTENT[size], corrupt=True, times=10_000)
    done = hfpipe("pull", repo_id, "--out", out, env=hub_env, check=2)
    name, whole = ("tokenizer.json", []) if size == "small" else ("model.safetensors", ["tokenizer"])
    assert f"{name} arrived twice with other bytes than the Hub names" in done.stderr
    assert [folder.name for folder in out.glob("*/")] == whole


@LFS
def test_a_run_that_was_verified_is_restored_without_the_hub(hub, hub_env, repo_id, own_run, tmp_path):
    push(own_run, hub_env, "--repo-id", repo_id)
    down = hub_env | {"HF_HUB_OFFLINE": "1"}
    hfpipe("pull", f"{repo_id}@{hub.commits(repo_id)[0].id}", "--out", tmp_path / "never", env=down, check=2)
    hfpipe("pull", repo_id, "--out", tmp_path / "a", env=hub_env)
    done = hfpipe("pull", repo_id, "--out", tmp_path / "b", env=down)
    assert f"the Hub is not reached: {repo_id} is taken as it stood" in done.stderr
    assert done.stdout.count("restored, every file verified") == len(STAGES)
    # of `main` alone a model was verified: it is a run's all the same
    elsewhere = {"HF_HOME": str(tmp_path / "home"), "HFPIPE_CACHE": str(tmp_path / "cache")}
    code = "import sys, hfpipe; hfpipe.load_model(sys.argv[1]).model()"
    subprocess.run([sys.executable, "-c", code, repo_id], env=os.environ | hub_env | elsewhere, check=True)
    done = hfpipe("pull", repo_id, "--out", tmp_path / "c", env=down | elsewhere, check=2)
    assert "was never verified here" in done.stderr
    assert not list((tmp_path / "c").glob("*/"))


@LFS
def test_in_python_too_it_is_said_that_the_hub_is_away(hub, hub_env, repo_id, own_run, hub_recipe, tmp_path):
    push(own_run, hub_env, "--repo-id", repo_id)
    hfpipe("pull", repo_id, "--out", tmp_path / "a", env=hub_env)
    hfpipe("lineage", f"{repo_id}@sft", env=hub_env)
    calls = {
        f"pull({repo_id!r}, {str(tmp_path / 'b')!r})": repo_id,
        f"lineage({f'{repo_id}@sft'!r})": f"{repo_id}@sft",
        f"load_pipeline({str(hub_recipe(f'{repo_id}@sft'))!r}).plan({str(tmp_path / 'out')!r})": f"{repo_id}@sft",
    }
    code = "import sys; from hfpipe import lineage, load_pipeline, pull\n"
    code += "".join(f"{call}; print('---', file=sys.stderr)\n" for call in calls)
    command, down = [sys.executable, "-c", code], hub_env | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=os.environ | down, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for told, name in zip(done.stderr.split("---\n"), calls.values(), strict=False):  # nothing comes after the last
        assert told.count(f"hfpipe: the Hub is not reached: {name} is taken as it stood") == 1


@LFS
def test_a_hub_that_hangs_at_a_listing_is_not_reached(hub, hub_env, repo_id, own_run):
    push(own_run, hub_env, "--repo-id", repo_id)
    hub.fault("GET .*/tree/", delay=60.0, times=100)
    code = (
        "import sys, hfpipe.hub_client as client; client._LISTING_S = 1\n"  # two minutes are long for a test
        "from hfpipe.cli import main; sys.exit(main(['pull', sys.argv[1]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, repo_id], env=os.environ | hub_env, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "no answer within 1 s" in done.stderr


def test_a_model_that_is_its_own_parent_is_told_by_its_lineage(own_run):
    file = own_run / "sft" / "stage.json"
    record = stage_json(own_run / "sft")
    artifact.write_record(file, {**record, "parent": {**record["parent"], "from": "sft"}})
    told = hfpipe("lineage", own_run / "sft", check=2).stdout
    assert f"{own_run / 'sft'} stands among its own parents" in told


def test_a_parent_forged_with_its_record_is_told_by_what_the_child_started_from(own_run, tmp_path):
    assert "broken" not in hfpipe("lineage", own_run / "sft").stdout
    kept = stage_json(own_run / "midtrain")["fingerprint"]
    for number, forge in enumerate((forge_weights, forge_settings)):
        run = shutil.copytree(own_run, tmp_path / f"forged-{number}")
        record = artifact.read_record(run / "midtrain" / "stage.json")
        forge(run / "midtrain", record)
        artifact.write_record(run / "midtrain" / "stage.json", record)  # its own seal and hashes hold again
        assert "broken" not in hfpipe("lineage", run / "midtrain").stdout
        told = hfpipe("lineage", run / "sft", check=2).stdout
        held = ("other files than those that sft started from", f"{record['fingerprint'][:12]}, not {kept[:12]}")[
            number
        ]
        assert re.findall("broken +(.*)", told) == [f"parent: {run / 'midtrain'} holds {held}"]


@LFS
def test_a_parent_forged_on_the_hub_is_told_though_its_child_names_the_forged_commit(
    hub, hub_env, repo_id, own_run, tmp_path
):
    push(own_run, hub_env, "--repo-id", repo_id)

    def forge(stage: str, **changed: bytes) -> str:
        """A commit on top of a stage's branch with other bytes of some files, and a record that holds them and `parent`."""
        (tmp_path / stage).mkdir()
        record = json.loads(hub.files(repo_id, stage)["stage.json"])
        for name, content in changed.items():
            (tmp_path / stage / f"{name}.json").write_bytes(content)
        record["files"] |= artifact.checksums(tmp_path / stage, [f"{name}.json" for name in changed])
        record["parent"] |= parent
        artifact.write_record(tmp_path / stage / "stage.json", record)
        api = HfApi(hub.endpoint, token=TOKEN)
        return api.upload_folder(folder_path=tmp_path / stage, repo_id=repo_id, revision=stage).oid

    parent: dict[str, str] = {}
    config = hub.files(repo_id, "midtrain")["config.json"].replace(b"{", b'{"attention_bias": true,', 1)
    parent = {"commit": forge("midtrain", config=config)}
    assert "broken" not in hfpipe("lineage", f"{repo_id}@midtrain", env=hub_env).stdout
    forge("sft")
    told = hfpipe("lineage", f"{repo_id}@sft", env=hub_env, check=2).stdout
    [why] = re.findall("broken +(.*)", told)
    assert why == f"parent: {repo_id}@{parent['commit']} holds other files than those that sft started from"
    assert "broken" not in hfpipe("lineage", f"{repo_id}@dpo", env=hub_env).stdout  # which names the commits of before


def forge_weights(folder: Path, record: dict) -> None:
    weights = folder / "model.safetensors"
    save_file({name: torch.zeros_like(value) for name, value in load_file(weights).items()}, weights)
    record["files"] |= artifact.checksums(folder, [weights.name])
    record["weights"] = {weights.name: record["files"][weights.name]["sha256"]}


def forge_settings(folder: Path, record: dict) -> None:
    record["config"]["trainer"]["learning_rate"] = 1.0
    record["fingerprint"] = artifact.fingerprint(record["config"], record["data"], record["parent"]["fingerprint"])


def test_a_model_that_somebody_changed_is_told_by_its_lineage(hub, hub_env, repo_id, own_run, tmp_path):
    push(own_run, hub_env, "--repo-id", repo_id)
    forged = tmp_path / "config.json"
    forged.write_text((own_run / "sft" / "config.json").read_text().replace("{", '{"attention_bias": true,', 1))
    HfApi(hub.endpoint, token=TOKEN).upload_file(
        path_or_fileobj=forged, path_in_repo="config.json", repo_id=repo_id, revision="sft"
    )
    told = hfpipe("lineage", f"{repo_id}@sft", env=hub_env, check=2)
    assert re.search("broken +files: config.json", told.stdout)
    commit = stage_json(own_run / "sft")["hub"]["commit"]
    assert "broken" not in hfpipe("lineage", f"{repo_id}@{commit}", env=hub_env).stdout
    # and a push puts it right, by one more commit
    (own_run / "sft" / "metrics.jsonl").unlink()
    push(own_run, hub_env, "--stage", "sft")
    assert hub.files(repo_id, "sft")["config.json"] == (own_run / "sft" / "config.json").read_bytes()


@LFS
def test_the_cards_snippet_runs(hub, hub_env, repo_id, own_run):
    push(own_run, hub_env, "--repo-id", repo_id)
    for stage in STAGES:
        card = hub.files(repo_id, stage)["README.md"].decode()
        [snippet] = re.findall(r"```python\n(.*?)```", card, re.S)
        assert f'"{repo_id}", revision="{stage}"' in snippet
        done = subprocess.run([sys.executable, "-c", snippet], env=os.environ | hub_env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "<|assistant|>" in done.stdout or stage in ("tokenizer", "pretrain")


def test_a_chat_with_a_revision_on_the_hub(hub, hub_env, repo_id, own_run):
    push(own_run, hub_env, "--repo-id", repo_id)
    options = ["--prompt", "Hello!", "--max-new-tokens", "4", "--json"]
    for stage in ("midtrain", "sft"):
        told = hfpipe("chat", f"{repo_id}@{stage}", *options, env=hub_env).stdout
        assert told == hfpipe("chat", own_run / stage, *options).stdout
    assert "no model there" in hfpipe("chat", f"{repo_id}@nowhere", *options, env=hub_env, check=2).stderr


ADAPTED = FROM_HUB + "adapter: {{type: lora, r: 4, target_modules: all-linear}}\n"


@pytest.mark.parametrize("merged", [True, False], ids=["with the merged model", "alone"])
def test_an_adapter_names_its_bases_commit(hub, hub_env, repo_id, own_run, hub_recipe, tmp_path, merged):
    push(own_run, hub_env, "--repo-id", repo_id, "--stage", "midtrain", "--stage", "dpo")  # `main` is dpo
    commit = stage_json(own_run / "midtrain")["hub"]["commit"]
    out, mine = tmp_path / "out", f"{repo_id}-mine"
    recipe = hub_recipe(f"{repo_id}@midtrain", ADAPTED)
    hfpipe("run", recipe, "--out", out, "--set", f"sft.adapter.merge={str(merged).lower()}", env=hub_env)
    hub.reset()
    push(out, hub_env, "--repo-id", mine)
    assert hub.xet == bool(hub.requests("POST /cas/v1/xorbs"))
    there, at = hub.files(mine, "sft"), "adapter/" if merged else ""
    assert ("model.safetensors" in there) == merged
    for name in {*stage_json(out / "sft")["files"], f"{at}adapter_model.safetensors"} - {f"{at}adapter_config.json"}:
        assert there[name] == (out / "sft" / name).read_bytes(), name
    config = json.loads(there[f"{at}adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == (repo_id, commit)
    [snippet] = re.findall(r"```python\n(.*?)```", there["README.md"].decode(), re.S)
    assert f'"{mine}", revision="sft"' in snippet
    adapted = (
        "import sys, torch; from peft import PeftModel; from transformers import AutoModelForCausalLM\n"
        "base = AutoModelForCausalLM.from_pretrained(sys.argv[2], revision=sys.argv[3])\n"
        "before = base(**inputs).logits\n"
        "adapted = PeftModel.from_pretrained(base, sys.argv[1], revision='sft', subfolder=sys.argv[4] or None)\n"
        "torch.testing.assert_close(adapted(**inputs).logits, model(**inputs).logits, atol=1e-4, rtol=1e-4)\n"
        "assert not torch.allclose(before, model(**inputs).logits, atol=1e-3)\n"
    )
    command = [sys.executable, "-c", snippet + adapted, mine, repo_id, commit, at.rstrip("/")]
    done = subprocess.run(command, env=os.environ | hub_env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "<|assistant|>" in done.stdout
    ask = ("--prompt", "Hello!", "--max-new-tokens", "4", "--json")
    told = hfpipe("chat", f"{mine}@sft", *ask, env=hub_env).stdout
    assert told == hfpipe("chat", out / "sft", *ask, env=hub_env).stdout


def test_a_notebook_sees_that_a_branch_has_moved(hub, hub_env, repo_id, own_run):
    push(own_run, hub_env, "--repo-id", repo_id)
    code = (
        "import pathlib, sys, hfpipe, huggingface_hub as hub\n"
        "repo_id, revision = sys.argv[1], 'sft'\n"
        "def closes(): return hfpipe.load_model(f'{repo_id}@{revision}').tokenizer().eos_token\n"
        "before = closes()\n"
        "folder = pathlib.Path(hub.snapshot_download(repo_id, revision=revision))\n"
        "text = (folder / 'tokenizer_config.json').read_text().replace(before, '<|end|>')\n"
        "hub.upload_file(path_or_fileobj=text.encode(), path_in_repo='tokenizer_config.json', repo_id=repo_id, revision=revision)\n"
        "print(before, closes())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, repo_id], env=os.environ | hub_env, capture_output=True, text=True
    )
    assert done.stdout.split() == ["<|end_assistant|>", "<|end|>"], done.stderr


# --- data sets ---


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_of_the_hub(hub, hub_env, repo_id, tmp_path, streaming):
    api = HfApi(hub.endpoint, token=TOKEN)
    api.create_repo(repo_id, repo_type="dataset", private=True)
    texts = [f"The capital of country {n} is city {n * 7}." for n in range(200)]
    form = "parquet" if hub.xet else "jsonl"  # which is kept as a large file
    first = upload_texts(hub_env, repo_id, tmp_path / f"train.{form}", texts)
    assert hub.xet == any("/cas/" in entry["path"] for entry in hub.log)
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
    # the branch moves on: what is finished keeps the commit that it was begun with
    upload_texts(hub_env, repo_id, tmp_path / f"train-more.{form}", [f"Something else, {n}." for n in range(50)])
    assert record["pins"] == {f"datasets/{repo_id}": first}
    planned = json.loads(hfpipe("plan", folder, "--out", out, "--json", env=hub_env).stdout)["stages"]
    assert [row["status"] for row in planned] == ["done", "done"]
    # and by its commit, with nothing prepared, the rows of then are read
    pinned = ("--only", "pretrain", "--set", f"pretrain.data.train=[{{path: {repo_id}, revision: {first}}}]")
    of_then = shutil.copytree(out, tmp_path / "pinned", ignore=shutil.ignore_patterns("pretrain"))
    hfpipe("run", folder, "--out", of_then, *pinned, env=hub_env | {"HFPIPE_CACHE": str(tmp_path / "fresh")})
    assert stage_json(of_then / "pretrain")["sources"] == record["sources"]
    assert stage_json(of_then / "pretrain")["weights"] == record["weights"]
    down = hub_env | {"HF_ENDPOINT": "http://127.0.0.1:1", "HFPIPE_CACHE": str(tmp_path / "empty")}
    planned = json.loads(hfpipe("plan", folder, "--out", out, "--json", env=down).stdout)["stages"]
    assert [row["status"] for row in planned] == ["done", "done"]
    if streaming:
        hub.fault("/datasets/", status=503, times=10_000)
        told = hfpipe("run", folder, "--out", tmp_path / "out2", env=down, check=2).stderr
        assert f"{repo_id}@main" in told
        assert "no commit of that name was verified here before" in told
        told = hfpipe(
            "run", folder, "--out", tmp_path / "out3", env=hub_env, check=2
        ).stderr  # nothing is kept of a stream
        assert re.match(rf"hfpipe: \S+pretrain.yaml: data.train: {repo_id}: this Hub dataset cannot be loaded", told)
        return
    if not hub.xet:  # names and commits have nothing to do with it
        check_a_moved_branch_and_tag(api, hub_env, folder, out, repo_id, first)
    api.delete_file(f"train-more.{form}", repo_id=repo_id, repo_type="dataset")
    hfpipe("run", folder, "--out", tmp_path / "again", env=hub_env)
    # the Hub away: what was verified is used, and it is said
    hub.fault("/api/datasets/", status=503, times=10_000)
    done = hfpipe("run", folder, "--out", tmp_path / "out2", env=hub_env)
    assert f"the Hub is not reached: {repo_id}" in done.stdout
    assert stage_json(tmp_path / "out2" / "pretrain")["weights"] == record["weights"]
    hub.faults.clear()
    hub.store.repos.pop(("dataset", repo_id))
    told = hfpipe("lineage", out / "pretrain", env=hub_env, check=2).stdout
    assert "the Hub does not give" in told


CORRUPT = [("lfs", "jsonl"), ("lfs", "parquet"), ("xet", "parquet")]  # a small file comes the same way from both


@pytest.mark.parametrize(("hub", "form"), CORRUPT, indirect=["hub"])
def test_a_corrupt_dataset_is_fetched_again_or_refused(hub, hub_env, repo_id, tmp_path, form):
    HfApi(hub.endpoint, token=TOKEN).create_repo(repo_id, repo_type="dataset", private=True)
    file = tmp_path / f"train.{form}"
    commit = upload_texts(hub_env, repo_id, file, [f"The capital of country {n} is city {n * 7}." for n in range(200)])
    folder, out = tmp_path / "recipe", tmp_path / "out"
    folder.mkdir()
    (folder / "pipeline.yaml").write_text("name: rows\nstages: [tokenizer]\n")

    def run(path, out: Path, check: int = 0) -> subprocess.CompletedProcess:
        text = f"stage: tokenizer\ntokenizer: {{vocab_size: 300}}\ndata: {{train: [{{path: {path}}}]}}\n"
        (folder / "tokenizer.yaml").write_text(text)
        return hfpipe("run", folder, "--out", out, env=hub_env, check=check)

    content = CONTENT["large"] if form == "parquet" else r"GET .*/(resolve|resolve-cache)/.*/train.jsonl"
    rule = hub.fault(content, corrupt=True, times=10_000)
    done = run(repo_id, out, check=2)
    assert rule["fired"]
    [message] = done.stderr.splitlines()
    told = f"{repo_id}@{commit[:12]}: {file.name} arrived twice with other bytes than the Hub names. Try again."
    assert message.startswith("hfpipe: ")
    assert told in message
    assert not (out / "tokenizer").exists()
    assert not list(Path(os.environ["HFPIPE_CACHE"]).rglob(f"{commit}*.json")), "it counts as verified"
    kept = [path.stat().st_size for path in Path(hub_env["HF_HOME"]).rglob("*") if path.is_file()]
    assert file.stat().st_size not in kept, "other programs would read it from the cache"

    hub.reset()
    rule = hub.fault(content, corrupt=True)
    run(repo_id, out)
    assert rule["fired"] == 1
    run(file, tmp_path / "local")
    left = [(run / "tokenizer" / "tokenizer.json").read_bytes() for run in (out, tmp_path / "local")]
    assert left[0] == left[1]


def upload_texts(env: dict, repo_id: str, path: Path, texts: list[str]) -> str:
    """Write a file and put it into a repo of data, in a process of its own; returns the commit."""
    rows = [{"text": text} for text in texts]
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = (
        "import pathlib, sys; from huggingface_hub import HfApi; path = pathlib.Path(sys.argv[1])\n"
        "print(HfApi().upload_file(path_or_fileobj=path, path_in_repo=path.name, repo_id=sys.argv[2], repo_type='dataset').oid)"
    )
    command = [sys.executable, "-c", code, str(path), repo_id]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True, check=True).stdout.strip()


def check_a_moved_branch_and_tag(api: HfApi, env: dict, folder: Path, out: Path, repo_id: str, first: str) -> None:
    """Made anew, a stage reads what it was begun with, and says so; under another name it reads what that stands for."""
    there = {"repo_id": repo_id, "repo_type": "dataset"}
    moved = api.dataset_info(repo_id).sha
    assert moved != first
    assert hfpipe("run", folder, "--out", out, env=env).stdout.count("done already") == 2
    plan = ("plan", folder, "--out", out, "--set", "pretrain.trainer.max_steps=1")
    kept = f"{repo_id} is read at commit {first[:12]}, as it stood when this stage was first begun here"
    for command in (plan, ("run", *plan[1:])):
        told = hfpipe(*command, env=env).stdout
        assert kept in told
        assert f"{repo_id}@main is read" not in told  # the tokenizer, which stays
    assert stage_json(out / "pretrain")["data"] == {f"train[0] {repo_id}": f"{repo_id}@{first}"}
    api.create_tag(tag="v1", revision=first, **there)
    tagged = ("--only", "pretrain", "--set", f"pretrain.data.train=[{{path: {repo_id}, revision: v1}}]")
    hfpipe("run", folder, "--out", out, *tagged, env=env)
    api.delete_tag(tag="v1", **there)
    api.create_tag(tag="v1", revision=moved, **there)
    assert "done already" in hfpipe("run", folder, "--out", out, *tagged, env=env).stdout
    elsewhere = out.with_name("elsewhere")
    shutil.copytree(out, elsewhere, ignore=shutil.ignore_patterns("pretrain"))
    hfpipe("run", folder, "--out", elsewhere, *tagged, env=env)
    for run, commit in ((out, first), (elsewhere, moved)):
        assert stage_json(run / "pretrain")["data"] == {f"train[0] {repo_id}": f"{repo_id}@{commit}"}
        assert stage_json(run / "pretrain")["pins"] == {f"datasets/{repo_id}@v1": commit}
    shutil.rmtree(elsewhere)


# --- what must not be believed ---


@LFS
def test_there_already_means_the_same_weights(hub, hub_env, repo_id, own_run, tmp_path):
    push(own_run, hub_env, "--repo-id", repo_id)
    out = tmp_path / "pulled"
    hfpipe("pull", repo_id, "--out", out, env=hub_env)
    record = artifact.read_record(out / "sft" / "stage.json")
    assert record["hub"]["section"]["repo_id"] == repo_id
    del record["hub"]  # as a pull leaves it that was killed before its last word
    artifact.write_record(out / "sft" / "stage.json", record)
    assert hfpipe("pull", repo_id, "--out", out, env=hub_env).stdout.count("there already") == 5
    assert stage_json(out / "sft")["hub"]["commit"] == stage_json(own_run / "sft")["hub"]["commit"]
    weights = out / "sft" / "model.safetensors"
    save_file({name: torch.zeros_like(value) for name, value in load_file(weights).items()}, weights)
    record["files"] |= artifact.checksums(out / "sft", [weights.name])
    artifact.write_record(out / "sft" / "stage.json", record)
    assert "is there and is not what" in hfpipe("pull", repo_id, "--out", out, env=hub_env, check=2).stderr


HOSTILE = {
    "a stage outside": {"recipe": "x", "stages": ["../../x"], "commits": {"../../x": "0" * 40}},
    "a stage of ours": {"recipe": "x", "stages": ["run.json"], "commits": {"run.json": "0" * 40}},
    "no commits": {"recipe": "x", "stages": ["sft"]},
    "a branch for a commit": {"recipe": "x", "stages": ["sft"], "commits": {"sft": "main"}},
    "a number": {"recipe": "x", "stages": ["sft"], "commits": {"sft": 5}},
    "another program's": {"name": "x"},
}


@LFS
@pytest.mark.parametrize("name", HOSTILE)
def test_a_run_file_that_is_not_one_is_no_run(hub, hub_env, repo_id, micro_run, tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(micro_run / "sft" / file, folder)
    (folder / "run.json").write_text(json.dumps(HOSTILE[name]))
    code = "import sys; from huggingface_hub import HfApi as A; A().create_repo(sys.argv[1]); A().upload_folder(repo_id=sys.argv[1], folder_path=sys.argv[2])"
    subprocess.run([sys.executable, "-c", code, repo_id, folder], env=os.environ | hub_env, check=True)
    told = hfpipe("pull", repo_id, "--out", tmp_path / "out", env=hub_env).stdout  # a model that has such a file
    assert "every file verified" in told
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        micro_run / "sft" / "model.safetensors"
    ).read_bytes()


@LFS
def test_a_record_that_names_files_outside_is_refused(hub, hub_env, repo_id, own_run, tmp_path):
    push(own_run, hub_env, "--repo-id", repo_id)
    victim = tmp_path / "victim.txt"
    victim.write_text("mine")
    before = victim.stat().st_mtime_ns
    record = json.loads(hub.files(repo_id, "tokenizer")["stage.json"])
    record["files"]["../../victim.txt"] = {"sha256": "0" * 64, "bytes": 4, "mtime_ns": 1}
    artifact.write_record(tmp_path / "forged.json", record)
    api = HfApi(hub.endpoint, token=TOKEN)
    commit = api.upload_file(
        path_or_fileobj=tmp_path / "forged.json", path_in_repo="stage.json", repo_id=repo_id, revision="tokenizer"
    ).oid
    manifest = json.loads(hub.files(repo_id)["run.json"])
    manifest["commits"]["tokenizer"] = commit
    api.upload_file(path_or_fileobj=json.dumps(manifest).encode(), path_in_repo="run.json", repo_id=repo_id)
    done = hfpipe("pull", repo_id, "--out", tmp_path / "a" / "b", env=hub_env, check=2)
    assert "names files outside its folder" in done.stderr
    assert victim.stat().st_mtime_ns == before


@LFS
def test_a_foreign_record_or_no_hub_is_an_answer_and_not_a_traceback(hub, hub_env, repo_id, own_run, tmp_path):
    push(own_run, hub_env, "--repo-id", repo_id)
    HfApi(hub.endpoint, token=TOKEN).upload_file(
        path_or_fileobj=b'{"stage": 1}', path_in_repo="stage.json", repo_id=repo_id, revision="sft"
    )
    assert "was not made by hfpipe" in hfpipe("lineage", f"{repo_id}@sft", env=hub_env, check=2).stderr
    hfpipe("lineage", f"{repo_id}@dpo", env=hub_env)
    down = hub_env | {"HF_HUB_OFFLINE": "1"}
    told = hfpipe("lineage", f"{repo_id}@{stage_json(own_run / 'dpo')['hub']['commit']}", env=down)
    assert "not here" in told.stdout


ADAPTER_ALONE = FROM_HUB.replace('"{source}"', "midtrain") + "adapter: {{type: prompt, num_virtual_tokens: 4}}\n"


@LFS
def test_an_adapter_is_not_published_without_its_base(hub, hub_env, repo_id, own_run, recipe):
    folder = recipe({"sft": ADAPTER_ALONE.format()})
    (folder / "pipeline.yaml").write_text(
        "name: micro\nstages: [tokenizer, pretrain, midtrain, sft]\nevaluate: {samples: 0}\n"
    )
    shutil.rmtree(own_run / "dpo")
    hfpipe("run", folder, "--out", own_run, env=hub_env)
    told = push(own_run, hub_env, "--repo-id", repo_id, "--stage", "sft", check=2).stderr
    assert "holds an adapter on `midtrain`, which is not published" in told
    push(own_run, hub_env, "--repo-id", repo_id, "--stage", "midtrain", "--stage", "sft")
    config = json.loads(hub.files(repo_id, "sft")["adapter_config.json"])
    assert config["revision"] == stage_json(own_run / "midtrain")["hub"]["commit"]


def test_several_processes_fetch_once(hub, hub_env, repo_id, own_run):
    push(own_run, hub_env, "--repo-id", repo_id)
    code = "import sys; from hfpipe.hub_client import locate; print(locate(sys.argv[1]))"
    command = [sys.executable, "-c", code, f"{repo_id}@sft"]
    several = [subprocess.Popen(command, env=os.environ | hub_env, stdout=subprocess.PIPE) for _ in range(4)]
    assert len({process.communicate()[0] for process in several}) == 1
    assert [process.returncode for process in several] == [0] * 4


def test_a_folders_name_is_no_part_of_another_name():
    from hfpipe.publishing.package import _without_folders

    record = {"data": {"train[0] /data": "h", "train[1] /data/rows.jsonl": "h"}, "parent": {"from": "org/dataset@main"}}
    told = _without_folders({**record, "note": "read /data: 3 rows of /data/rows.jsonl"})
    assert told["parent"] == record["parent"]
    assert list(told["data"]) == ["train[0] data", "train[1] rows.jsonl"]
    assert told["note"] == "read data: 3 rows of rows.jsonl"
