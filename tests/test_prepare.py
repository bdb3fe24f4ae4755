"""`hfpipe data prepare` on a few documents: where it writes, what it refuses, what it leaves out and what it prints."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from hfpipe.cli import main
from hfpipe.data.tinyworld import rows

from .conftest import ROOT, hfpipe, stage_json

CURATED = ROOT / "stage_configs" / "curate" / "curated.yaml"
TEXTS = [
    "Ana sings in the garden, and the others listen to the end.",
    "Before noon a small boat came up the river with bread for the village.",
    "Snow had closed the pass, so they stayed another week.",
    "Who wrote this letter, and why did nobody open it?",
]


def write(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def curate(tmp_path):
    """Writes curate.yaml beside a corpus of four texts and a tokenizer; returns its path."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=280, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    )
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    write(tmp_path / "corpus" / "a.jsonl", [{"text": text} for text in TEXTS])

    def make(**given: str) -> Path:
        keys = {
            "output_folder": f"{tmp_path}/out",
            "sources": f"[{{path: {tmp_path}/corpus}}]",
            "tokenizer": f"{tmp_path}/tokenizer",
            "executor": "{tasks: 2, workers: 1}",
        } | given
        file = tmp_path / "curate.yaml"
        file.write_text("".join(f"{key}: {value}\n" for key, value in keys.items()))
        return file

    return make


def kept(out: Path) -> list[str]:
    return sorted(row["text"] for f in out.glob("*/*.parquet") for row in pyarrow.parquet.read_table(f).to_pylist())


def test_the_home_folder_is_found_and_the_json_stands_alone(curate, tmp_path):
    file = curate(output_folder="~/out", tokenizer="~/tokenizer")
    (tmp_path / "elsewhere").mkdir()
    home = {"HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = hfpipe("data", "prepare", file, "--json", cwd=tmp_path / "elsewhere", env=home)
    assert json.loads(done.stdout)["documents"] == len(TEXTS)
    assert kept(tmp_path / "out") == TEXTS
    assert not list((tmp_path / "elsewhere").iterdir())
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"output_folder": "s3://bucket/out"}, "output_folder = 's3://bucket/out': expected a folder of this machine"),
        ({"output_folder": "HERE/corpus/out"}, "output_folder HERE/corpus/out and the source HERE/corpus are one in the"),
        ({"output_folder": "HERE"}, "are one in the other"),
        ({"executor": "{workers: 0}"}, "executor.workers = 0: expected 1 or more"),
        ({"executor": "{start_method: threads}"}, "executor.start_method = 'threads': expected one of"),
        ({"minhash": "{n_grams: 0}"}, "minhash.n_grams = 0: expected 1 or more"),
        ({"minhash": "{num_buckets: 0}"}, "minhash.num_buckets = 0: expected 1 or more"),
        ({"minhash": "{hashes_per_bucket: 0}"}, "minhash.hashes_per_bucket = 0: expected 1 or more"),
        (
            {"filters": "[{type: GopherRepetitionFilter, top_n_grams: [2, 0.2]}]"},
            "filters[0].top_n_grams = [2, 0.2]: expected a list of pairs of a length and a share, such as [[2, 0.2]",
        ),
        (
            {"filters": "[{type: GopherQualityFilter, stop_words: [1]}]"},
            "filters[0].stop_words = [1]: expected a list of texts",
        ),
        ({"sources": "[{path: HERE/corpus, revision: abc}]"}, "sources[0]: HERE/corpus: `revision` and `name` are for"),
        ({"sources": "[{path: HERE/empty.jsonl}]"}, "no row in them can be used: they are empty"),
        ({"sources": "[{path: HERE/chat.jsonl}]"}, "no row in them can be used: 2 no text in a known form"),
        ({"tokenizer": "HERE/damaged"}, "damaged/tokenizer.json cannot be read"),
    ],
)  # fmt: skip
def test_what_cannot_be_prepared_is_told_and_leaves_nothing(curate, tmp_path, capfd, given, said):
    (tmp_path / "empty.jsonl").touch()
    write(tmp_path / "chat.jsonl", [{"prompt": "Hi.", "chosen": "Hello.", "rejected": "No."}] * 2)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "tokenizer.json").write_text((tmp_path / "tokenizer" / "tokenizer.json").read_text()[:99])
    file = curate(**{key: value.replace("HERE", str(tmp_path)) for key, value in given.items()})
    before = sorted(tmp_path.rglob("*"))
    assert main(["data", "prepare", str(file)]) == 2
    assert said.replace("HERE", str(tmp_path)) in capfd.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_is_no_recipe_and_a_recipe_without_a_curation_are_told(tmp_path, capsys):
    assert main(["data", "prepare", str(tmp_path)]) == 2
    assert f"{tmp_path} has no pipeline.yaml, so it is not a recipe" in capsys.readouterr().err
    assert main(["data", "prepare", "micro"]) == 2
    assert "micro/pipeline.yaml has no `curate`: name a file, curate: curate.yaml." in capsys.readouterr().err
    assert main(["data", "prepare", str(tmp_path / "curate.yaml"), "--set", "curate.minhash=null"]) == 2
    assert "--set and --out are for a recipe" in capsys.readouterr().err


def test_the_recipe_curate_is_prepared_and_then_run(tmp_path):
    """The two lines of its header, from a folder of one's own, with sources and steps that are few."""
    clean, pages = list(rows("pretrain", size=150)), list(rows("web", size=150))
    write(tmp_path / "text.jsonl", [*clean, *pages, *clean[:20]])
    own = f"[{{path: {tmp_path}/text.jsonl}}]"
    settings = [f"curate.sources={own}", f"tokenizer.data.train={own}", f"raw.data.train={own}"]
    settings += ["curate.executor.workers=1", "evaluate.samples=1"]
    settings += ["curated.trainer.max_steps=2"]
    options = ["--out", "mine", *(word for setting in settings for word in ("--set", setting))]
    made_by = "It is made by: hfpipe data prepare curate (with the same --out and --set, if any)"
    for command in (["run", "curate"], ["data", "check", "curate"], ["inspect", CURATED]):
        told = hfpipe(*command, *options, cwd=tmp_path, check=2).stderr.splitlines()
        assert told == [f"hfpipe: mine/shards is not there yet. {made_by}"]
    planned = {
        row["stage"]: row
        for row in json.loads(hfpipe("plan", "curate", "--json", *options, cwd=tmp_path).stdout)["stages"]
    }
    assert f"mine/shards is not there yet. {made_by}" in planned["curated"]["notes"]
    assert planned["curated"]["parameters"] == planned["raw"]["parameters"]
    assert not any("mine/shards" in note for note in planned["raw"]["notes"])
    assert not (tmp_path / "mine").exists()
    found = json.loads(hfpipe("data", "prepare", "curate", "--json", *options, cwd=tmp_path).stdout)
    assert found["documents"] == 320
    left_out = {item["step"]: item["documents"] for item in found["left_out"]}
    assert left_out["FineWebQualityFilter"] > 140
    junk = {row["text"] for row in pages}
    texts = kept(tmp_path / "mine" / "shards")
    assert len(texts) == len(set(texts)) == 320 - sum(left_out.values()) > 140
    assert len(junk & {*texts}) < 5
    made = (tmp_path / "mine" / "shards" / "_summary.json").stat().st_mtime_ns
    hfpipe("run", "curate", "--only", "curated", *options, cwd=tmp_path)  # `raw` is trained as any other stage
    planned = hfpipe("plan", "curate", *options, cwd=tmp_path).stdout
    assert [line.split()[1] for line in planned.splitlines() if line[:1].isalpha()][1:4] == ["done", "new:", "done"]
    curated = stage_json(tmp_path / "mine" / "curated")
    assert curated["data"].keys() == {"train[0] mine/shards", "eval[0] mine/shards"}
    other = f"mine/shards was made by another `curate` (mask_personal True -> False). {made_by}"
    options_now = [*options, "--set", "curate.mask_personal=false"]
    assert " ".join(other.split()) in " ".join(hfpipe("plan", "curate", *options_now, cwd=tmp_path).stdout.split())
    assert hfpipe("run", "curate", *options_now, cwd=tmp_path, check=2).stderr == f"hfpipe: {other}\n"
    hfpipe("data", "prepare", "curate", *options, cwd=tmp_path)  # nothing to do
    assert (tmp_path / "mine" / "shards" / "_summary.json").stat().st_mtime_ns == made


def test_a_file_of_which_nothing_can_be_used_does_not_end_the_others(curate, tmp_path):
    corpus = tmp_path / "corpus"
    (corpus / "b.jsonl").touch()
    write(corpus / "c.jsonl", [{"text": " "}, {"text": ""}])
    write(corpus / "d.jsonl", [{"prompt": "Hi.", "chosen": "Hello.", "rejected": "No."}] * 3)
    for tasks in (2, 8):  # files to each task, and each file to all tasks
        assert main(["data", "prepare", str(curate(executor=f"{{tasks: {tasks}, workers: 1}}"))]) == 0
        assert kept(tmp_path / "out") == TEXTS
        summary = json.loads((tmp_path / "out" / "_summary.json").read_text())
        [left_out] = summary["left_out"]
        assert (left_out["step"], left_out["documents"]) == ("sources", 5)
        assert left_out["reasons"]["no text in a known form"] == 3
        assert summary["documents"] == len(TEXTS)


@pytest.mark.parametrize(("minhash", "step"), [("{n_grams: 5}", "near duplicates"), ("null", "duplicates")])
def test_exact_duplicates_go_whatever_their_length(curate, tmp_path, minhash, step):
    texts = ["hi there"] * 10 + ["Hi  there"] + ["1 + 1", "1 - 1", "?", "?"] + TEXTS + TEXTS[:1]
    write(tmp_path / "corpus" / "a.jsonl", [{"text": text} for text in texts])
    hfpipe("data", "prepare", curate(minhash=minhash, executor="{tasks: 3, workers: 2}"))
    found = kept(tmp_path / "out")
    assert sorted(text.lower().replace("  ", " ") for text in found) == sorted(
        text.lower() for text in {"hi there", "1 + 1", "1 - 1", "?", *TEXTS}
    )
    summary = json.loads((tmp_path / "out" / "_summary.json").read_text())
    assert [(item["step"], item["documents"]) for item in summary["left_out"]] == [(step, 12)]
    assert len(list((tmp_path / "out" / "_excluded" / step.replace(" ", "_")).glob("*.jsonl"))) >= 1


PEAKS = """
import re, sys
from pathlib import Path
from hfpipe.cli import main

for file in sys.argv[1:]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    assert main(["data", "prepare", file, "--json"]) == 0
    peak = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())
    print(int(peak[1]) / 1024, file=sys.stderr)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a process's peak can begin anew on Linux alone")
def test_memory_does_not_grow_with_the_corpus(curate, tmp_path):
    """48 megabytes more of text than fill all buffers take less than half of that: no document is held."""
    rng, words, files = random.Random(0), " ".join(TEXTS).split(), []
    for number, megabytes in enumerate((2, 16, 16, 64)):  # with less the peaks are up to 27 MiB apart
        texts = [" ".join(rng.choices(words, k=150)) for _ in range(1300 * megabytes)]
        write(tmp_path / f"{number}.jsonl", [{"text": text} for text in texts])
        own = {"sources": f"[{{path: {tmp_path}/{number}.jsonl}}]", "output_folder": f"{tmp_path}/out-{number}"}
        files.append(curate(**own).rename(tmp_path / f"{number}.yaml"))
    done = subprocess.run([sys.executable, "-c", PEAKS, *files], cwd=ROOT, capture_output=True, text=True, check=True)
    _, *small, large = map(float, done.stderr.split())
    assert len(kept(tmp_path / "out-3")) > 1300 * 64 * 0.9
    assert large - max(small) < 24, f"{small} and {large} MiB"
