"""The same path on real data, each file in the form it came in: what is seen, used, left out; no text in two splits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hfpipe.data.sources import load_source
from hfpipe.data.splits import split_key
from hfpipe.sections import Source

from .conftest import REAL, hfpipe, needs_real_data, stage_json

pytestmark = needs_real_data

FORMS = {
    "wikitext2_valid.txt": "plain text, 60 articles",
    "c4_demo.jsonl": "text",
    "glaive_toolcall_en_demo.json": "sharegpt",
    "alpaca_en_demo.json": "alpaca",
    "gsm8k_train.jsonl": "question/answer",
    "dpo_en_demo.json": "preference with a conversation",
    "hh_harmless_800.jsonl": "preference, transcripts",
}


@pytest.fixture(scope="module")
def short_run(tmp_path_factory) -> Path:
    """The real-small recipe cut to a few steps a stage."""
    run = tmp_path_factory.mktemp("real") / "run"
    steps = [f"{s}.trainer.max_steps={n}" for s, n in (("pretrain", 12), ("midtrain", 3), ("sft", 3), ("dpo", 2))]
    small = ["pretrain.model.config.hidden_size=64", "pretrain.model.config.intermediate_size=128"]
    fewer = [
        "evaluate.max_rows=12",
        "evaluate.max_new_tokens=8",
        "dpo.trainer.max_length=512",
        "dpo.data.max_bad_rows=0.9",
    ]
    limits = ["dpo.data.eval=[{path: '{data_dir}/hh_harmless_800.jsonl', limit: 20}]"]
    limits += [
        "dpo.data.train=[{path: '{data_dir}/dpo_en_demo.json', limit: 60}, {path: '{data_dir}/hh_harmless_800.jsonl', limit: 60}]"
    ]
    settings = [a for s in [f"data_dir={REAL}", *steps, *small, *fewer, *limits] for a in ("--set", s)]
    done = hfpipe("run", "real-small", "--out", run, *settings)
    (run / "stdout.txt").write_text(done.stdout)
    return run


def test_the_run_says_which_form_each_file_has(short_run):
    told = (short_run / "stdout.txt").read_text()
    for name, form in FORMS.items():
        line = next(line for line in told.splitlines() if f"{name} [train]" in line)
        assert f": {form}; " in line
        assert "rows used" in line
        assert "in the other splits" in line
    assert "longer than max_length" in told
    assert "duplicates left out" in told


def test_the_mixture_has_the_weights_of_the_recipe(short_run):
    """0.7 and 0.3 of the tokens, up to a document: the whole of the one, a part of the other."""
    sources = [s for s in stage_json(short_run / "pretrain")["sources"] if s["role"] == "train"]
    tokens = {Path(s["path"]).name: s["tokens"] * s["taken"] for s in sources}
    assert tokens["wikitext2_valid.txt"] / sum(tokens.values()) == pytest.approx(0.7, abs=0.01)
    assert tokens["c4_demo.jsonl"] / sum(tokens.values()) == pytest.approx(0.3, abs=0.01)
    assert [s["taken"] == 1 for s in sources] == [True, False]


def test_every_stage_is_scored_on_held_out_text(short_run):
    for name in ("pretrain", "midtrain", "sft", "dpo"):
        metrics = stage_json(short_run / name)["metrics"]
        assert metrics["held_out_text"]["perplexity"] < 4096
        assert metrics["validation"]["tokens"] > 100
    pairs = stage_json(short_run / "dpo")["metrics"]
    assert abs(pairs["pairs_before"]["margin"]) < 0.05
    assert 0 <= pairs["pairs"]["accuracy"] <= 1


def test_tools_of_a_sharegpt_file_reach_the_model(short_run):
    samples = [json.loads(line) for line in (short_run / "midtrain" / "samples.jsonl").read_text().splitlines()]
    assert any('"parameters"' in sample["prompt"] for sample in samples)


def test_no_text_is_in_two_splits():
    keys: dict[str, dict[str, str]] = {"text": {}, "prompt": {}}
    for name in FORMS:
        kind = "text" if name.endswith("txt") or name.startswith("c4") else "prompt"
        for split in ("train", "validation", "test"):
            rows = list(load_source(Source(str(REAL / name)), split=split).rows())
            assert rows, (name, split)
            for row in rows:
                key = split_key(row)
                assert keys[kind].setdefault(key, split) == split, (name, key[:80])
    assert len(keys["prompt"]) > 3000
