"""What a push promises beyond getting through: no secret, no lie about what stands there, nothing unasked; and the card."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from hfpipe import artifact
from hfpipe.publishing.card import build_card

from .conftest import hfpipe, stage_json
from .test_hub import LFS, STAGES, TOKEN, assert_published, made, messages, push
from .test_hub_read import upload_texts


@pytest.mark.parametrize("status", [403, 503])
@LFS
def test_a_refusal_beside_a_run_fails_nothing_and_no_token_is_written(hub, hub_env, repo_id, own_run, tmp_path, status):
    """The Hub itself repeats the token in what it answers."""
    shutil.rmtree(own_run / "dpo")
    env = hub_env | {"HFPIPE_CACHE": str(tmp_path / "cache")}
    rule = hub.fault(
        "POST .*/commit/", status=status, times=10_000, headers={"X-Error-Message": f"{TOKEN} may not do that"}
    )
    done = hfpipe("run", "micro", "--out", own_run, "--set", f"hub.repo_id={repo_id}", env=env)
    assert rule["fired"]
    assert "micro is complete" in done.stdout
    assert "not published yet: tokenizer, pretrain, midtrain, sft, dpo" in done.stdout
    told = hfpipe("status", own_run, env=env)
    assert f"{status}" in told.stdout
    pushed = push(own_run, env, check=2 if status == 403 else 1)
    assert "may not do that" in pushed.stderr or status == 503
    said = [text.encode() for one in (done, told, pushed) for text in (one.stdout, one.stderr)]
    folders = (tmp_path, own_run, Path(env["HF_HOME"]), hub.root)
    written = {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}
    assert own_run / "logs" / "push.log" in written
    assert [path for path, content in written.items() if TOKEN.encode() in content] == []
    assert not any(TOKEN.encode() in text for text in said)


READS = ("pull", "lineage", "chat", "run")
REFUSED = {  # name: (requests that are, how many of them get through first, what is tried)
    "names": ("GET /api/", 0, READS),
    "files": ("(GET|HEAD) .*/resolve", 0, READS),
    "rows": ("GET .*/resolve/.*train.jsonl", 3, READS[3:]),
}


def test_what_reads_from_a_hub_that_repeats_the_token_tells_and_writes_none(hub, hub_env, repo_id, own_run, tmp_path):
    push(own_run, hub_env, "--repo-id", repo_id)
    folder, rows = stream_recipe(tmp_path / "recipe", repo_id, own_run / "sft"), tmp_path / "train.jsonl"
    HfApi(hub.endpoint, token=TOKEN).create_repo(repo_id, repo_type="dataset", private=True)
    upload_texts(hub_env, repo_id, rows, [f"Row {n} of all." for n in range(200)])
    options = {
        "pull": (repo_id, "--out", tmp_path / "pulled"),
        "lineage": (f"{repo_id}@sft",),
        "chat": (f"{repo_id}@sft", "--prompt", "Hello!"),
        "run": (folder, "--out", tmp_path / "run"),
    }
    said = []
    for pattern, skip, reads in REFUSED.values():
        for read in reads:
            hub.reset()
            told = {"X-Error-Message": f"{TOKEN} may not do that"}
            rule = hub.fault(pattern, status=403, times=10_000, skip=skip, headers=told)
            done = hfpipe(read, *options[read], env=hub_env, check=None)
            assert rule["fired"], done.stdout
            assert done.returncode in (1, 2)
            said.append(done.stdout + done.stderr)
    assert sum("hf_... may not do that" in text for text in said) >= len(said) - 1, said
    folders = (tmp_path, Path(hub_env["HF_HOME"]), Path(os.environ["HFPIPE_CACHE"]), hub.root)
    written = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert [path for path in written if TOKEN.encode() in path.read_bytes()] == []
    assert not any(TOKEN in text for text in said)


def stream_recipe(folder: Path, repo_id: str, model: Path) -> Path:
    folder.mkdir()
    (folder / "pipeline.yaml").write_text("name: rows\nstages: [pretrain]\nevaluate: {samples: 0}\n")
    (folder / "pretrain.yaml").write_text(
        f"stage: pretrain\nmodel: {{from: {model}}}\n"
        f"data: {{train: [{{path: {repo_id}}}], max_length: 64, streaming: true}}\n"
        "trainer: {max_steps: 2, per_device_train_batch_size: 2}\n"
    )
    return folder


@LFS
def test_without_hub_in_the_recipe_the_hub_is_not_asked(hub, hub_env, own_run):
    """A token and a Hub are there."""
    shutil.rmtree(own_run / "dpo")
    hfpipe("run", "micro", "--out", own_run, env=hub_env)
    hfpipe("status", own_run, env=hub_env)
    assert hub.requests() == []


@LFS
def test_a_file_of_another_kind_stays_here_though_the_record_names_it(hub, hub_env, repo_id, own_run):
    (own_run / "sft" / "extra.bin").write_bytes(b"a pickle, perhaps")
    record = stage_json(own_run / "sft")
    record["files"] |= artifact.checksums(own_run / "sft", ["extra.bin"])
    artifact.write_record(own_run / "sft" / "stage.json", record)
    push(own_run, hub_env, "--repo-id", repo_id, "--stage", "sft")
    for branch in ("sft", "main"):
        there = hub.files(repo_id, branch)
        assert "model.safetensors" in there
        assert "extra.bin" not in there
        assert "extra.bin" not in json.loads(there["stage.json"])["files"]


@LFS
def test_a_hub_that_keeps_other_bytes_is_told(hub, hub_env, repo_id, own_run, monkeypatch):
    add_commit = hub.store.add_commit

    def other_bytes(repo, branch, tree, message, author):
        if message.startswith("sft"):
            tree = {**tree, "config.json": hub.store.regular_entry(b"{}")}
        return add_commit(repo, branch, tree, message, author)

    with monkeypatch.context() as patch:
        patch.setattr(hub.store, "add_commit", other_bytes)  # a Hub at fault: no request could make it so
        done = push(own_run, hub_env, "--repo-id", repo_id, "--stage", "sft", check=1)
    assert "config.json stand in commit" in done.stderr
    assert "hub" not in stage_json(own_run / "sft")
    push(own_run, hub_env, "--repo-id", repo_id, "--stage", "sft")
    assert_published(hub, repo_id, own_run, "sft")


@LFS
def test_a_tag_that_somebody_moved_is_put_back(hub, hub_env, repo_id, own_run):
    push(own_run, hub_env, "--repo-id", repo_id)
    api = HfApi(hub.endpoint, token=TOKEN)
    [tag] = api.list_repo_refs(repo_id).tags
    api.delete_tag(repo_id, tag=tag.name)
    api.create_tag(repo_id, tag=tag.name, revision="sft")
    assert api.list_repo_refs(repo_id).tags[0].target_commit != tag.target_commit
    push(own_run, hub_env)
    assert api.list_repo_refs(repo_id).tags[0].target_commit == tag.target_commit == hub.commits(repo_id)[0].id
    assert all(made(hub, repo_id, stage) == 1 for stage in STAGES)
    assert len(messages(hub, repo_id, "main")) == 2  # the first is the Hub's own


@LFS
def test_a_run_is_pulled_by_its_tag_and_by_its_commit(hub, hub_env, repo_id, own_run, tmp_path):
    push(own_run, hub_env, "--repo-id", repo_id)
    [tag] = HfApi(hub.endpoint, token=TOKEN).list_repo_refs(repo_id).tags
    for number, revision in enumerate((tag.name, tag.target_commit)):
        out = tmp_path / f"{number}"
        done = hfpipe("pull", f"{repo_id}@{revision}", "--out", out, env=hub_env)
        assert done.stdout.count("restored, every file verified") == len(STAGES)
        assert stage_json(out / "dpo")["weights"] == stage_json(own_run / "dpo")["weights"]


@LFS
def test_a_card_is_made_of_the_records_beside_it_alone(hub, hub_env, repo_id, own_run):
    push(own_run, hub_env, "--repo-id", repo_id)
    for stage in STAGES:
        there = hub.files(repo_id, stage)
        record, evaluation = (json.loads(there.get(name, b"{}")) for name in ("stage.json", "eval.json"))
        card = there["README.md"].decode()
        assert card == build_card(record, evaluation, f"{repo_id}@{stage}")
        named = [*record["data"].values()] if stage != "tokenizer" else []
        named += [f"torch {record['versions']['torch']}", f"{record['machine']['cores']} CPU cores"]
        if stage == "sft":
            named += ["<|user|>", f"{record['metrics']['steps']} steps", "| learning_rate | 0.001 |"]
            named += [record["parent"]["commit"][:12], *(f"| {name} |" for name in evaluation["capabilities"])]
        assert [text for text in named if text[:16] not in card] == []


STAGE = {
    "midtrain": "data: {{train: [{{path: tinyworld/midtrain, limit: 64}}]}}\n",
    "reward": "data: {{train: [{{path: tinyworld/preferences, limit: 64}}]}}\n",
    "dpo": "data: {{train: [{{path: tinyworld/preferences, limit: 64}}]}}\n",
    "grpo": "data: {{train: [{{path: tinyworld/sums, limit: 64}}], max_prompt_length: 64}}\n"
    "rewards: {{functions: [{{check: length, value: {{max_words: 5}}}}]}}\n",
}


@pytest.mark.parametrize("stage", STAGE)
@LFS
def test_any_stage_starts_from_a_model_of_the_hub(hub, hub_env, repo_id, own_run, tmp_path, stage):
    push(own_run, hub_env, "--repo-id", repo_id)
    folder = tmp_path / "recipe"
    folder.mkdir()
    (folder / "pipeline.yaml").write_text(f"name: mine\nstages: [{stage}]\nevaluate: {{samples: 0}}\n")
    size = "max_completion_length: 8, num_generations: 4, " if stage == "grpo" else "max_length: 128, "
    text = 'stage: {stage}\nmodel: {{from: "{source}"}}\n' + STAGE[stage]
    text += "trainer: {{max_steps: 1, {size}per_device_train_batch_size: 8}}\n"
    (folder / f"{stage}.yaml").write_text(text.format(stage=stage, source=f"{repo_id}@sft", size=size))
    hfpipe("run", folder, "--out", tmp_path / "out", env=hub_env)
    commit = stage_json(own_run / "sft")["hub"]["commit"]
    record = stage_json(tmp_path / "out" / stage)
    assert (record["parent"]["revision"], record["pins"]) == (commit, {f"{repo_id}@sft": commit})
    if stage == "reward":
        check_snippet_of_a_reward_model(hub, hub_env, f"{repo_id}-mine", tmp_path / "out")


def check_snippet_of_a_reward_model(hub, env: dict[str, str], repo_id: str, run: Path) -> None:
    push(run, env, "--repo-id", repo_id)
    [snippet] = re.findall(r"```python\n(.*?)```", hub.files(repo_id, "reward")["README.md"].decode(), re.S)
    assert "AutoModelForSequenceClassification" in snippet
    snippet += "print(model(**tokenizer('Hello!', return_tensors='pt')).logits.shape)"
    done = subprocess.run([sys.executable, "-c", snippet], env=os.environ | env, capture_output=True, text=True)
    assert "torch.Size([1, 1])" in done.stdout, done.stderr


def test_raw_data_that_changed_are_told_by_the_lineage(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"Row {n} of all."}) + "\n" for n in range(100)))
    folder = tmp_path / "recipe"
    folder.mkdir()
    (folder / "pipeline.yaml").write_text("name: rows\nstages: [tokenizer]\n")
    data = f"data: {{train: [{{path: {rows}}}]}}"
    (folder / "tokenizer.yaml").write_text(f"stage: tokenizer\ntokenizer: {{vocab_size: 300}}\n{data}\n")
    hfpipe("run", folder, "--out", tmp_path / "out")
    assert "broken" not in hfpipe("lineage", tmp_path / "out" / "tokenizer").stdout
    rows.write_text(rows.read_text().replace("Row 7 ", "Row 8 "))
    told = hfpipe("lineage", tmp_path / "out" / "tokenizer", check=2).stdout
    assert "its content is" in told
