"""What the stages share: packing, freezing, Muon, adapters, streams, several processes, extended tokenizers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from .conftest import hfpipe, stage_json


def tiny_llama(vocab_size: int = 64, **options):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **{"max_position_embeddings": 64, **shape, **options}))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.fixture
def after(micro_run, tmp_path):
    """A run's folder in which the stages up to `name` are finished."""

    def copy(name: str) -> Path:
        run = tmp_path / "micro"
        stages = ["tokenizer", "pretrain", "midtrain", "sft", "dpo"]
        for stage in stages[: stages.index(name) + 1]:
            shutil.copytree(micro_run / stage, run / stage)
        return run

    return copy


def tiny_gemma():
    """In the form of the recipe tiny: gemma3_text, its first layer with a sliding window."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"head_dim": 16, "num_key_value_heads": 1, "sliding_window": 3, "vocab_size": 64, "pad_token_id": 0}
    kinds = ["sliding_attention", "full_attention"]
    config = AutoConfig.for_model("gemma3_text", **shape, **more, layer_types=kinds)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma], ids=["llama, sdpa", "gemma3, eager, a window"])
def test_packed_documents_do_not_see_each_other(make, flatten):
    from hfpipe.training.collate import PackedCollator

    model = make().eval()
    first, second, third = [5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16]
    rows = [
        {"input_ids": first + second, "labels": first + second, "seq_lengths": [4, 3]},
        {"input_ids": third, "labels": third, "seq_lengths": [5]},
    ]
    batch = PackedCollator(pad_token_id=0, flatten=flatten)(rows)
    with torch.inference_mode():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        alone = [model(input_ids=torch.tensor([ids])).logits[0] for ids in (first, second, third)]
    found = packed.flatten(0, 1)
    places = (0, 4, 7) if flatten else (0, 4, batch["input_ids"].shape[1])
    for place, logits in zip(places, alone, strict=True):
        torch.testing.assert_close(found[place : place + len(logits)], logits)
    starts = batch["labels"][batch["position_ids"] == 0]
    assert (starts == -100).all()
    assert (batch["labels"] != -100).sum() == 3 + 2 + 4


def test_muon_takes_the_hidden_matrices_and_resumes_exactly():
    from transformers import TrainingArguments

    from hfpipe.sections import Optimizer
    from hfpipe.training.optim import build_muon

    args = TrainingArguments("unused", learning_rate=1e-3, use_cpu=True, weight_decay=0.1)
    section = Optimizer(type="muon", lr=0.02)

    def step(model, optimizer, seed):
        ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(seed))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    model = tiny_llama()
    optimizer = build_muon(model, section, args)
    muon, adamw = optimizer.parts
    assert sum(len(g["params"]) for g in muon.param_groups) == 2 * 7
    assert {p.ndim for g in adamw.param_groups for p in g["params"]} == {1, 2}
    assert len(optimizer.param_groups) == 3
    before = {n: p.clone() for n, p in model.named_parameters()}
    for seed in range(3):
        step(model, optimizer, seed)
    assert all(not torch.equal(before[n], p) for n, p in model.named_parameters())

    other = tiny_llama()
    other.load_state_dict(model.state_dict())
    resumed = build_muon(other, section, args)
    resumed.load_state_dict(json_safe(optimizer.state_dict()))
    step(model, optimizer, 9)
    step(other, resumed, 9)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert [g["lr"] for g in optimizer.param_groups] == [0.01, 5e-4, 5e-4]
    assert scheduler.get_last_lr() == [0.01, 5e-4, 5e-4]


@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "no bf16"])
@pytest.mark.parametrize("options", [{}, {"nesterov": False, "ns_steps": 3, "weight_decay": 0.1}])
def test_matrices_of_one_shape_orthogonalised_together_are_upstreams_muon(options, bf16, monkeypatch):
    from hfpipe.training import optim

    monkeypatch.setattr(optim, "choose_bf16", lambda: (bf16, "as asked"))  # for the kind of processor that is not here
    monkeypatch.setattr(optim, "_TOGETHER", 3 * 16 * 16)  # so that four of one shape take two turns

    def trained(optimizer_class):
        numbers = torch.Generator().manual_seed(0)
        shapes = [(16, 16)] * 4 + [(24, 16), (16, 40), (24, 16)]
        params = [torch.nn.Parameter(torch.randn(shape, generator=numbers)) for shape in shapes]
        optimizer = optimizer_class(params, lr=0.02, **options)
        for step in range(5):
            for number, p in enumerate(params):
                p.grad = None if (step, number) == (2, 1) else torch.randn(p.shape, generator=numbers)
            optimizer.step()
        return params, optimizer

    theirs, upstream = trained(torch.optim.Muon)
    ours, batched = trained(optim.BatchedMuon)
    assert batched.dtype == (torch.bfloat16 if bf16 else torch.float32)
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-3)  # five steps of 0.02, rounded to bfloat16
        assert (a - b).abs().mean() < (1e-4 if bf16 else 4e-4)  # of the same rounding, and of upstream's alone
    resumed = torch.optim.Muon(ours, lr=0.02, **options)
    resumed.load_state_dict(batched.state_dict())
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(upstream.state[a]["momentum_buffer"], resumed.state[b]["momentum_buffer"])


def json_safe(state):
    """Through a file and back, as a checkpoint goes."""
    import io

    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


def test_an_adapter_is_kept_beside_the_merged_model(after):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    run = after("midtrain")
    settings = [
        "--set",
        "sft.adapter={type: lora, r: 4, target_modules: all-linear}",
        "--set",
        "sft.regularize.freeze_embeddings=false",
    ]
    hfpipe("run", "micro", "--out", run, "--only", "sft", *settings)
    parent, merged = weights(run / "midtrain"), weights(run / "sft")
    changed = {name for name in parent if not torch.equal(parent[name], merged[name])}
    assert changed
    assert all("proj" in name for name in changed)
    ids = torch.tensor([[0, 20, 30, 40]])
    whole = AutoModelForCausalLM.from_pretrained(run / "sft").eval()
    adapted = AutoPeftModelForCausalLM.from_pretrained(run / "sft" / "adapter").eval()
    with torch.inference_mode():
        torch.testing.assert_close(whole(ids).logits, adapted(ids).logits, atol=1e-4, rtol=1e-3)
    hfpipe("run", "micro", "--out", run, *settings)
    assert abs(stage_json(run / "dpo")["metrics"]["pairs_before"]["margin"]) < 0.02


def test_streamed_text_trains(after):
    run = after("tokenizer")
    settings = ["pretrain.data.streaming=true", "pretrain.trainer.max_steps=6", "pretrain.trainer.num_train_epochs=1"]
    hfpipe("run", "micro", "--out", run, "--to", "pretrain", *(a for s in settings for a in ("--set", s)))
    metrics = stage_json(run / "pretrain")["metrics"]
    assert metrics["steps"] == 6
    assert metrics["validation"]["perplexity"] < 700


def test_what_became_of_streamed_rows_is_told(after, tmp_path):
    rows = [{"text": f"The {n} has {n} digits and is read while it trains."} for n in range(40)]
    rows[7] = {"text": " "}
    rows[9] = {"text": "Here a <|user|> forges a turn."}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = after("tokenizer")
    source = f"{{path: {tmp_path / 'rows.jsonl'}, split: all}}"
    settings = [f"pretrain.data.train=[{source}]", "pretrain.data.streaming=true", "pretrain.data.max_bad_rows=0.5"]
    settings += ["pretrain.trainer.max_steps=3", "pretrain.trainer.num_train_epochs=1"]
    options = [a for s in settings for a in ("--set", s)]
    told = hfpipe("run", "micro", "--out", run, "--to", "pretrain", *options).stdout
    line = next(line for line in told.splitlines() if "rows.jsonl [all]" in line)
    for words in ("text; 39 rows used", "1 left out (1 empty text)", "1 control tokens neutralised"):
        assert words in line, line
    streamed, *_ = stage_json(run / "pretrain")["sources"]
    assert (streamed["used"], streamed["left_out"], streamed["neutralised"]) == (39, {"empty text": 1}, 1)
    hfpipe("run", "micro", "--out", run, "--to", "pretrain", *options, "--set", "evaluate.samples=2")
    assert stage_json(run / "pretrain")["sources"][0] == streamed  # scored anew, not read anew


def test_a_stream_that_is_not_read_to_its_end_says_so(after):
    run = after("tokenizer")
    settings = ["pretrain.data.streaming=true", "pretrain.trainer.max_steps=2", "pretrain.trainer.num_train_epochs=1"]
    settings += ["pretrain.data.train=[{path: tinyworld/pretrain, limit: 4000}]"]
    told = hfpipe("run", "micro", "--out", run, "--to", "pretrain", *(a for s in settings for a in ("--set", s))).stdout
    line = next(line for line in told.splitlines() if "tinyworld/pretrain [train]" in line)
    assert line.endswith("; training ended before the source did")
    assert 900 < stage_json(run / "pretrain")["sources"][0]["used"] <= 1000  # packed together before any of them trains


def test_muon_trains_on_preferences_too(after, micro_run):
    run = after("sft")
    hfpipe("run", "micro", "--out", run, "--only", "dpo", "--set", "dpo.optimizer={type: muon, lr: 0.005}")
    assert stage_json(run / "dpo")["metrics"]["pairs"]["margin"] > 0.05
    assert stage_json(run / "dpo")["weights"] != stage_json(micro_run / "dpo")["weights"]


@pytest.mark.parametrize("streaming", [False, True])
def test_sources_come_at_their_weights(after, tmp_path, streaming):
    """By what the rows hold: each source's text is of one word that the other has not."""
    from hfpipe.config import load_recipe
    from hfpipe.stages import stage_types
    from hfpipe.training.job import make_job
    from hfpipe.training.models import load_tokenizer
    from hfpipe.training.prepare import prepare_rows
    from hfpipe.training.streams import stream_rows

    for word in ("red", "blue"):
        lines = "".join(json.dumps({"text": f"{n} {' '.join([word] * 40)}"}) + "\n" for n in range(300))
        (tmp_path / f"{word}.jsonl").write_text(lines)
    sources = ", ".join(
        f"{{path: {tmp_path / f'{word}.jsonl'}, split: all, weight: {weight}}}"
        for word, weight in (("red", 0.7), ("blue", 0.3))
    )
    settings = [
        "pretrain.trainer.max_steps=3",
        f"pretrain.data.train=[{sources}]",
        f"pretrain.data.streaming={str(streaming).lower()}",
    ]
    recipe = load_recipe("micro", stage_types(), settings)
    job = make_job(recipe, recipe.stages["pretrain"], after("tokenizer"))
    tokenizer = load_tokenizer(job)
    if streaming:
        rows = list(stream_rows(job, tokenizer, max_length=128, packing=True).train.take(600))
    else:
        rows = prepare_rows(job, tokenizer, max_length=128, packing=True).train
    tokens = {"red": 0, "blue": 0}
    for row in rows:
        text = tokenizer.decode(row["input_ids"])
        assert ("red" in text) != ("blue" in text)
        tokens["red" if "red" in text else "blue"] += len(row["input_ids"])
    # A stream draws its rows; what is prepared is counted out.
    assert tokens["red"] / sum(tokens.values()) == pytest.approx(0.7, abs=0.06 if streaming else 0.01)


def test_streaming_without_an_end_is_refused(after):
    run = after("tokenizer")
    done = hfpipe("run", "micro", "--out", run, "--to", "pretrain", "--set", "pretrain.data.streaming=true", check=2)
    assert "data.streaming needs trainer.max_steps" in done.stderr


def test_two_processes(after, micro_run):
    run = after("midtrain")
    settings = ["--set", "launch.processes=2", "--set", "sft.trainer.per_device_train_batch_size=4"]
    done = hfpipe("run", "micro", "--out", run, "--only", "sft", *settings)
    record = stage_json(run / "sft")
    alone = stage_json(micro_run / "sft")["metrics"]
    assert record["metrics"]["steps"] == alone["steps"], done.stdout  # the same rows in a step, half of them on each
    assert record["metrics"]["validation"]["loss"] == pytest.approx(alone["validation"]["loss"], abs=0.1)
    assert (run / "sft" / "model.safetensors").is_file()


def test_batch_in_tokens_that_does_not_fit_is_told(after):
    run = after("tokenizer")
    done = hfpipe("run", "micro", "--out", run, "--to", "pretrain", "--set", "pretrain.data.batch_tokens=3000", check=2)
    assert "data.batch_tokens = 3000 is not a multiple of 128 tokens: one row of data.max_length 128" in done.stderr
    assert not (run / "pretrain").exists()


def test_processes_share_a_batch_in_tokens(after, micro_run):
    run = after("tokenizer")
    done = hfpipe("run", "micro", "--out", run, "--only", "pretrain", "--set", "launch.processes=2")
    assert (
        "2,048 tokens = 2 x 8 rows of 128 x 1 accumulated, per_device_train_batch_size lowered from 16" in done.stdout
    )
    alone, shared = (stage_json(folder / "pretrain")["metrics"] for folder in (micro_run, run))
    assert shared["steps"] == alone["steps"]
    assert shared["validation"]["loss"] == pytest.approx(alone["validation"]["loss"], abs=0.1)


def test_values_that_upstream_refuses_are_told_before_training(after):
    run = after("tokenizer")
    done = hfpipe("run", "micro", "--out", run, "--set", "dpo.trainer.eval_strategy=steps",
                  "--set", "dpo.trainer.load_best_model_at_end=true", "--set", "dpo.trainer.save_steps=7", check=2)  # fmt: skip
    assert "dpo.yaml: trainer is refused by trl.DPOConfig" in done.stderr
    assert not (run / "pretrain").exists()


@pytest.fixture
def plain_model(tmp_path) -> Path:
    """A base model as the Hub has them: no chat template, no control tokens, eos but no pad."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    backend.train_from_iterator(["the cat sat on the mat"] * 50, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    folder = tmp_path / "plain"
    tokenizer.save_pretrained(folder)
    tiny_llama(len(tokenizer), max_position_embeddings=512).save_pretrained(folder)
    return folder


def test_midtraining_gives_a_plain_model_the_chat_format(plain_model, recipe, tmp_path):
    from transformers import AutoTokenizer

    folder = recipe()
    for name in ("tokenizer", "pretrain", "dpo"):
        (folder / f"{name}.yaml").unlink()
    head = (folder / "pipeline.yaml").read_text()
    head = head.replace("[tokenizer, pretrain, midtrain, sft, dpo]", "[midtrain, sft]")
    (folder / "pipeline.yaml").write_text(head)
    settings = [
        f"midtrain.model.from={plain_model}",
        "midtrain.tokenizer.chat_template=hfpipe",
        "midtrain.regularize.freeze_embeddings=true",
        "midtrain.trainer.max_length=512",
        "sft.trainer.max_length=512",
    ]
    run = tmp_path / "run"
    generation = plain_model / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": [0, 2]}))  # 2 is a letter
    done = hfpipe("run", folder, "--out", run, *(a for s in settings for a in ("--set", s)))
    assert "13 tokens added" in done.stdout
    stops = json.loads((run / "sft" / "generation_config.json").read_text())["eos_token_id"]
    assert 0 in stops
    assert 2 not in stops
    tokenizer = AutoTokenizer.from_pretrained(run / "sft")
    assert json.loads((run / "sft" / "generation_config.json").read_text())["pad_token_id"] == tokenizer.pad_token_id
    old, new = weights(plain_model)["model.embed_tokens.weight"], weights(run / "sft")["model.embed_tokens.weight"]
    assert tokenizer.convert_tokens_to_ids("<|end_assistant|>") >= len(old)
    assert torch.equal(old, new[: len(old)])
    assert not torch.equal(new[len(old) :].mean(0), old.mean(0))


def test_muon_under_an_adapter_trains_the_adapter(after):
    """The optimizer is built after the adapter is in place: it must hold what is trained."""
    run = after("midtrain")
    settings = ["sft.adapter={type: lora, r: 4, target_modules: all-linear}", "sft.regularize.freeze_embeddings=false"]
    settings += ["sft.optimizer={type: muon, lr: 0.01}", "sft.trainer.max_steps=4"]
    hfpipe("run", "micro", "--out", run, "--only", "sft", *(a for s in settings for a in ("--set", s)))
    parent, merged = weights(run / "midtrain"), weights(run / "sft")
    assert any(not torch.equal(parent[name], merged[name]) for name in parent)


def test_dpo_with_an_adapter_keeps_its_scores(after):
    run = after("sft")
    settings = ["dpo.adapter={type: lora, r: 4, target_modules: all-linear}", "dpo.regularize.freeze_embeddings=false"]
    hfpipe("run", "micro", "--out", run, "--only", "dpo", *(a for s in settings for a in ("--set", s)))
    metrics = stage_json(run / "dpo")["metrics"]
    assert abs(metrics["pairs_before"]["margin"]) < 0.02
    assert metrics["pairs"]["margin"] > 0.01
    assert (run / "dpo" / "adapter" / "adapter_config.json").is_file()


def test_adapters_that_rewrite_the_base_are_refused_for_preferences(after):
    run = after("sft")
    adapter = "dpo.adapter={type: lora, r: 4, init_lora_weights: pissa}"
    done = hfpipe("run", "micro", "--out", run, "--only", "dpo", "--set", adapter, check=2)
    assert "rewrites the base's weights, so the reference would be wrong" in done.stderr


def test_a_model_that_cannot_keep_packed_documents_apart_is_refused(after):
    run = after("tokenizer")
    config = "{model_type: bloom, hidden_size: 32, n_layer: 2, n_head: 2}"
    done = hfpipe("run", "micro", "--out", run, "--to", "pretrain", "--set", f"pretrain.model.config={config}",
                  "--set", "pretrain.model.attn_implementation=null", check=2)  # fmt: skip
    assert "bloom lets packed documents see each other" in done.stderr


def test_streaming_in_two_processes(after):
    run = after("tokenizer")
    settings = ["pretrain.data.streaming=true", "pretrain.trainer.max_steps=4", "launch.processes=2"]
    settings += ["pretrain.trainer.per_device_train_batch_size=8"]
    hfpipe("run", "micro", "--out", run, "--to", "pretrain", *(a for s in settings for a in ("--set", s)))
    assert stage_json(run / "pretrain")["metrics"]["steps"] == 4
    assert stage_json(run / "pretrain")["machine"]["processes"] == 2


def test_long_text_is_cut_into_pieces_that_lose_nothing(micro_run):
    from transformers import AutoTokenizer

    from hfpipe.data.report import SourceReport
    from hfpipe.training.encode import encode_rows

    tokenizer = AutoTokenizer.from_pretrained(micro_run / "tokenizer")
    text, report = "The sky is blue. " * 50, SourceReport("x", "train", "train")
    pieces = [ids["input_ids"] for _, ids in encode_rows([(1, {"text": text})], report, "text", tokenizer, 64)]
    assert max(map(len, pieces)) == 64
    assert tokenizer.decode([token for piece in pieces for token in piece]).removeprefix("<|begin|>") == text
    assert report.used == 1
