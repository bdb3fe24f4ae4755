"""A longer context: RoPE scaled by transformers' own names, documents kept whole in their rows, a needle in a haystack."""

from __future__ import annotations

import copy
import json
import re

import pytest

from hfpipe.config import load_recipe
from hfpipe.errors import UserError
from hfpipe.evaluation.needle import ask_needles, build_needles
from hfpipe.plan.quote import quote_stage
from hfpipe.stages import stage_types

from .conftest import ROOT, hfpipe, stage_json

SHAPE = (
    "hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 48, max_position_embeddings: 64"
)
TRAINER = "{max_steps: 2, per_device_train_batch_size: 1, learning_rate: 1.0e-2, save_strategy: 'no'}"
BASES = {
    "llama": f"{{model_type: llama, {SHAPE}, rope_parameters: {{rope_type: default, rope_theta: 500.0}}}}",
    "gemma": f"{{model_type: gemma3_text, {SHAPE}, num_key_value_heads: 2, head_dim: 16, sliding_window: 16, "
    "layer_types: [full_attention], rope_parameters: {full_attention: {rope_type: default, rope_theta: 500.0}}}",
    "learnt": "{model_type: gpt2, n_embd: 32, n_layer: 1, n_head: 2, n_positions: 512}",
}
# stage -> what the recipe gives, and the whole of what transformers is to have for it
SCALED = {
    "linear": ("{rope_type: linear, factor: 4.0}", {"rope_type": "linear", "factor": 4.0}),
    "dynamic": ("{rope_type: dynamic, factor: 4.0}", {"rope_type": "dynamic", "factor": 4.0}),
    "yarn": (
        "{rope_type: yarn, factor: 4.0, beta_fast: 16}",
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16, "original_max_position_embeddings": 64},
    ),
    "llama3": (
        "{rope_type: llama3, factor: 4.0, low_freq_factor: 1.0, high_freq_factor: 4.0}",
        {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 64},
    ),
    "theta": ("{rope_theta: 8000.0}", {"rope_type": "default", "rope_theta": 8000.0}),
    "gemma_yarn": (
        "{rope_type: yarn, factor: 4.0}",
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ),
}


def stage(model: str, length: int = 128) -> str:
    return f"stage: pretrain\nmodel: {model}\ndata: {{max_length: {length}, train: [{{path: tinyworld/needles, limit: 40}}]}}\ntrainer: {TRAINER}\n"


def long_stage(kind: str) -> str:
    parent, length = ("gemma" if kind.startswith("gemma") else "llama"), (64 if kind == "dynamic" else 128)
    positions = "" if kind == "dynamic" else ", max_position_embeddings: 256"
    return stage(f"{{from: {parent}, rope_parameters: {SCALED[kind][0]}{positions}}}", length)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    names = ["tokenizer", *BASES, *SCALED, "after"]
    files = {
        "pipeline": f"name: contexts\nstages: [{', '.join(names)}]\nseed: 3\nevaluate:\n  samples: 0\n  max_rows: 4\n"
        "  text: [{path: tinyworld/long_needles, split: validation, limit: 8}]\n"
        "  needle: {lengths: [40, 600], depths: [0, 0.5, 1], per_cell: 2}\n",
        "tokenizer": "stage: tokenizer\ntokenizer: {vocab_size: 600}\ndata: {train: [{path: tinyworld/needles, limit: 200}]}\n",
        "after": stage("{from: yarn}"),
    }
    files |= {name: stage(f"{{from: tokenizer, config: {config}}}", 64) for name, config in BASES.items()}
    files |= {name: long_stage(name) for name in SCALED}
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "contexts"
    done = hfpipe("run", folder, "--out", run)
    (run / "stdout.txt").write_text(done.stdout)
    return run


def expected_config(run, kind):
    """The parent's configuration with the whole of its scaling, as a user of transformers would write it."""
    from transformers import AutoConfig

    parent = "gemma" if kind.startswith("gemma") else "llama"
    told = AutoConfig.from_pretrained(run / parent).to_dict()
    given = {"rope_theta": 500.0, **SCALED[kind][1]}
    told["rope_parameters"] = given if parent == "llama" else told["rope_parameters"] | {"full_attention": given}
    told["max_position_embeddings"] = 64 if kind == "dynamic" else 256
    return AutoConfig.for_model(**told)


@pytest.mark.parametrize("kind", SCALED)
def test_the_saved_model_has_upstreams_scaling(run, kind):
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = expected_config(run, kind)
    saved = AutoModelForCausalLM.from_pretrained(run / kind, dtype=torch.float32).eval()
    assert saved.config.rope_parameters == config.rope_parameters
    assert saved.config.max_position_embeddings == config.max_position_embeddings
    rotary, prefix = saved.model.rotary_emb, "full_attention_" if kind.startswith("gemma") else ""
    nested = {"layer_type": "full_attention"} if prefix else {}
    default = 1.0 / 500.0 ** (torch.arange(0, 16, 2) / 16)
    if kind == "theta":
        wanted, attention = 1.0 / 8000.0 ** (torch.arange(0, 16, 2) / 16), 1.0
    elif kind == "linear":
        wanted, attention = default / 4, 1.0
    else:
        wanted, attention = ROPE_INIT_FUNCTIONS[SCALED[kind][1]["rope_type"]](config, "cpu", **nested)
    assert torch.allclose(getattr(rotary, f"{prefix}inv_freq"), wanted)
    assert getattr(rotary, f"{prefix}attention_scaling") == pytest.approx(attention)
    # The same weights under a configuration written by hand give the same logits, past the parent's positions too.
    by_hand = AutoModelForCausalLM.from_config(config).eval()
    by_hand.load_state_dict(saved.state_dict())
    ids = torch.arange(100)[None] % saved.config.vocab_size
    with torch.no_grad():
        assert torch.equal(by_hand(ids).logits, saved(ids).logits)
        plain = AutoModelForCausalLM.from_pretrained(run / ("gemma" if prefix else "llama"), dtype=torch.float32).eval()
        plain.load_state_dict(saved.state_dict())
        assert not torch.allclose(plain(ids).logits, saved(ids).logits, atol=1e-5)


def test_a_scaled_stage_trains_and_hands_on_its_context(run):
    from safetensors.torch import load_file

    before, after = (load_file(run / name / "model.safetensors") for name in ("llama", "yarn"))
    assert all((before[name] != after[name]).any() for name in before if "norm" not in name)
    assert stage_json(run / "yarn")["metrics"]["steps"] == 2
    for name in ("yarn", "after"):
        config = json.loads((run / name / "config.json").read_text())
        assert config["rope_parameters"]["original_max_position_embeddings"] == 64
        assert config["max_position_embeddings"] == 256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("yarn.model.rope_parameters={rope_type: yarm, factor: 2.0}", "expected one of default, linear, dynamic, yarn"),
        ("yarn.model.rope_parameters={rope_type: yarn}", "factor is missing: rope_type yarn needs it"),
        ("yarn.model.rope_parameters={rope_type: yarn, factr: 2.0}", "factr = 2.0 is not a field of transformers' RopeP"),
        ("yarn.model.rope_parameters={rope_type: linear, factor: 0.5}", "factor = 0.5: expected 1 or more"),
        ("yarn.model.rope_parameters={rope_type: linear, factor: 2.0, beta_fast: 9}", "beta_fast = 9 has no meaning for"),
        ("yarn.model.rope_parameters={rope_type: llama3, factor: 2.0, low_freq_factor: 1.0}", "high_freq_factor is mis"),
        ("gemma_yarn.model.rope_parameters={full_attention: {rope_type: yarn}}", "full_attention.factor is missing"),
        ("yarn.model.rope_parameters={1: 2}", "yarn.yaml: model.rope_parameters.1 = 2 is not a field of transformers'"),
        ("gemma_yarn.model.rope_parameters={full_attention: {1: 2}}", "rope_parameters.full_attention.1 = 2 is not a fie"),
        ("yarn.model.from=learnt", "a gpt2 has no RoPE"),
        ("llama.model.max_position_embeddings=128", "put max_position_embeddings into model.config"),
        ("evaluate.needle.lengths=[0]", "evaluate.needle: lengths = [0]"),
        ("evaluate.needle.depths=[0, 2]", "depths = [0.0, 2.0]: expected shares"),
        ("evaluate.needle.fact=Take {word}.", "expected a sentence with {name} and, later, {word}"),
        ("evaluate.text=[]", "evaluate.text is missing"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_by_the_plan(folder, changes, message):
    with pytest.raises(UserError) as told:
        load_recipe(folder, stage_types(), [changes])
    assert message in str(told.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("dynamic.data.max_length=128", "rope_type dynamic scales by the longest row met so far"),
        (
            "yarn.model.rope_parameters={full_attention: {rope_type: yarn, factor: 4.0}}",
            "yarn.yaml: model.rope_parameters.full_attention: a llama has one RoPE for all its layers",
        ),
        (
            "gemma_yarn.model.rope_parameters={chunked_attention: {rope_type: yarn, factor: 4.0}}",
            "gemma_yarn.yaml: model.rope_parameters is for chunked_attention, of which a gemma3_text has no RoPE: give it by "
            "layer type: full_attention, sliding_attention.",
        ),
        (
            "llama.model.config.rope_parameters={full_attention: {rope_type: default, rope_theta: 500.0}}",
            "llama.yaml: model.config.rope_parameters: give them to a llama without layer types: it has one RoPE.",
        ),
        (
            "gemma.model.config.rope_parameters={rope_type: default, rope_theta: 500.0}",
            "gemma.yaml: model.config.rope_parameters: give them to a gemma3_text by layer type: full_attention, sliding_at",
        ),
        ("evaluate.needle.fact=Here in this small town, of which we have told you so much, and where we are so very fond of each other, as everybody knows, lives our good old {name} {word}.", "no prompt of 40 tokens"),
    ],
)  # fmt: skip
def test_what_only_the_model_tells_stops_the_run_before_it_trains(folder, tmp_path, changes, message):
    done = hfpipe("run", folder, "--out", tmp_path / "run", "--set", changes, check=2)
    assert message in done.stdout + done.stderr
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_the_planner_knows_the_longer_context(folder):
    recipe = load_recipe(folder, stage_types())
    assert quote_stage(recipe, recipe.stages["llama"]).shape.max_positions == 64
    assert quote_stage(recipe, recipe.stages["after"]).shape.max_positions == 256
    long, short = (hfpipe("plan", folder, "--set", f"yarn.data.max_length={n}").stdout for n in (512, 256))
    assert "512 tokens, but the model was made for 256" in " ".join(long.split())
    assert "made for 256" not in short


# --- rows ---


def test_a_document_that_fits_a_row_stays_whole_and_a_longer_one_is_told_of(run, folder, tmp_path):
    from transformers import AutoTokenizer

    from hfpipe.training.job import make_job
    from hfpipe.training.prepare import prepare_rows
    from hfpipe.training.tokenizers import encode_text

    tokenizer = AutoTokenizer.from_pretrained(run / "llama")
    texts = [f"Meet Ana {n}. " + "She sings at home. " * n for n in range(1, 21)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    changes = [f"yarn.data.train=[{{path: {tmp_path}/texts.jsonl, split: all}}]"]
    recipe = load_recipe(folder, stage_types(), changes)
    documents = encode_text(tokenizer, texts)
    longest = sorted(map(len, documents))[-4]  # three are longer
    job = make_job(recipe, recipe.stages["yarn"], tmp_path / "run", parent_fingerprint="")
    prepared = prepare_rows(job, tokenizer, max_length=longest, packing=True)
    kept = []
    for row in prepared.train:
        assert len(row["input_ids"]) == sum(row["seq_lengths"]) <= longest
        start = 0
        for length in row["seq_lengths"]:
            kept.append(row["input_ids"][start : start + length])
            start += length
    assert any(len(row["seq_lengths"]) > 1 for row in prepared.train)
    assert all(kept.count(document) == 1 for document in documents if len(document) <= longest)
    assert sum(map(len, kept)) == sum(map(len, documents))
    assert "3 longer than a row cut into several" in prepared.report["sources"][0]["text"]


# --- the needle ---


def test_needles_have_their_length_and_depth(run, folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run / "llama")
    recipe = load_recipe(folder, stage_types())
    rows = build_needles(recipe, tokenizer)
    assert rows == build_needles(recipe, tokenizer)
    assert len(rows) == 2 * 3 * 2
    for row in rows:
        text, fact = tokenizer.decode(row["ids"]), f"{row['prompt']} {row['check']['value']}."
        assert len(row["ids"]) == row["length"]
        assert text.count(fact) == 1
        assert text.endswith(row["prompt"])
        name = row["prompt"].split()[-2]
        assert text.count(name) == 2  # in the needle and in the question
        place = text.index(fact) / (len(text) - len(fact) - len(row["prompt"]))
        assert place == pytest.approx(row["depth"], abs=0.05 if row["length"] > 64 else 0.5)


HAY = {
    "sentences without white space": "今天天气很好。我们去河边散步！你要一起来吗？" * 60,
    "no sentence at all": "今天天气很好我们去河边散步" * 80,
    "words without a full stop": "and then we went on to the next house where nobody was at home " * 80,
    "lines": "".join(f"    total[{n}] = price[{n}] * count\n" for n in range(200)),
}


@pytest.mark.parametrize("kind", HAY)
def test_needles_have_their_depth_in_text_without_sentences(run, folder, tmp_path, kind):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run / "llama")
    (tmp_path / "hay.jsonl").write_text(json.dumps({"text": HAY[kind]}) + "\n")
    changes = [
        f"evaluate.text=[{{path: {tmp_path}/hay.jsonl, split: all}}]",
        "evaluate.needle={lengths: [900], depths: [0, 0.25, 0.5, 0.75, 1], per_cell: 2}",
    ]
    for row in build_needles(load_recipe(folder, stage_types(), changes), tokenizer):
        text, fact = tokenizer.decode(row["ids"]), f" {row['prompt']} {row['check']['value']}."
        before, _, after = text.partition(fact)
        assert len(row["ids"]) == row["length"]
        assert len(before) / (len(text) - len(fact) - len(row["prompt"])) == pytest.approx(row["depth"], abs=0.06)
        if row["depth"] == 0:  # the text itself begins anywhere
            continue
        assert not before.endswith("\ufffd")  # no character is cut in two
        assert not after.startswith("\ufffd")
        if kind == "words without a full stop":
            assert after.startswith(" ")
        elif kind == "lines":
            assert after.startswith(("\n", f" {row['prompt']}"))


def test_a_model_that_knows_the_words_finds_all_of_them(run, folder):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run / "llama")
    model = AutoModelForCausalLM.from_pretrained(run / "llama", dtype=torch.float32)
    rows = build_needles(
        load_recipe(folder, stage_types(), ["evaluate.needle={lengths: [40, 96], depths: [0, 1], per_cell: 2}"]),
        tokenizer,
    )
    wrong = copy.deepcopy(rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=60)
    batches = []
    for row in rows:
        answer = tokenizer(f" {row['check']['value']}.", add_special_tokens=False)["input_ids"]
        batches.append((torch.tensor([row["ids"] + answer]), len(row["ids"])))
    for _ in range(60):
        for ids, start in batches:
            loss = model(ids, labels=ids.masked_fill(torch.arange(ids.shape[1]) < start, -100)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        decay.step()
    told, grid = ask_needles(model.eval(), tokenizer, rows)
    assert [row["score"] for row in told] == [1.0] * 8
    assert grid["lengths"] == [40, 96]
    assert grid["depths"] == [0, 1]
    assert grid["cells"][1][1] == {"score": 1.0, "n": 2, "low": pytest.approx(0.3424), "high": 1.0}
    for row in wrong[:2]:  # the first cell's
        row["check"]["value"] = "zebra"
    assert ask_needles(model, tokenizer, wrong)[1]["cells"][0][0]["score"] == 0


def test_every_stage_is_scored_on_the_needle(run):
    report = (run / "report.html").read_text()
    assert "long_context" in (run / "stdout.txt").read_text()
    for name in (*BASES, *SCALED):
        scores = json.loads((run / name / "eval.json").read_text())
        across = [cell and cell["n"] for row in scores["needle"]["cells"] for cell in row]
        beyond = None if name == "learnt" else 2  # what has learnt 512 positions can't read 600
        assert across == [2, beyond] * 3
        assert scores["capabilities"]["long_context"]["n"] == sum(filter(None, across))
        assert f">{name}</text>" in report or f">{name}</th>" in report
    assert report.count("beyond its positions") == 3


# --- the recipe ---


def test_the_readme_shows_the_recipe():
    block = next(
        b for b in re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL) if "yarn" in b
    )
    shown = {line.partition("  #")[0].rstrip() for line in block.splitlines()[1:]}
    assert shown <= set((ROOT / "stage_configs" / "long-context" / "long.yaml").read_text().splitlines())


def test_the_recipe_in_short(tmp_path):
    changes = [
        "tokenizer.data.train=[{path: tinyworld/needles, limit: 300}]",
        "pretrain.data.train=[{path: tinyworld/needles, limit: 200}]",
        "long.data.train=[{path: tinyworld/long_needles, limit: 20}, {path: tinyworld/needles, limit: 60}]",
        "long.data.phases=[{share: 0.5, weights: [0, 1], max_length: 128}, {share: 0.5, weights: [1, 0]}]",
        "evaluate.needle={lengths: [64, 512], depths: [0.5], per_cell: 2}",
    ]
    settings = [part for change in changes for part in ("--set", change)]
    done = hfpipe("run", "long-context", "--out", tmp_path / "run", *settings)
    assert "longer than a row" not in done.stdout  # every document whole
    assert "order: phase 1: " in done.stdout
    short, long = (stage_json(tmp_path / "run" / "long")["sources"][at]["phases"] for at in (1, 0))
    assert short[0] > 0 < long[1]  # each phase has its own lengths
    assert short[1] == long[0] == 0
    parent, alone = (tmp_path / "run" / name / "model.safetensors" for name in ("pretrain", "stretched"))
    from safetensors.torch import load_file

    assert all((load_file(alone)[name] == tensor).all() for name, tensor in load_file(parent).items())
    config = json.loads((tmp_path / "run" / "stretched" / "config.json").read_text())
    assert config["rope_parameters"]["full_attention"]["factor"] == 4.0
