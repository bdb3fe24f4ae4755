"""`hfpipe plan` as a quote: what it reckons against what a run then does, and that it says what it does not know."""

from __future__ import annotations

import json
import shlex
import shutil

import pytest

from hfpipe.config import load_recipe
from hfpipe.data.size import estimate_size
from hfpipe.plan import describe_stage
from hfpipe.plan.quote import quote_stage
from hfpipe.plan.workload import guess_bytes_per_token
from hfpipe.sections import Source
from hfpipe.stages import stage_types

from .conftest import REAL, ROOT, hfpipe, needs_real_data, stage_json


def planned(recipe: str, *arguments) -> dict[str, dict]:
    told = json.loads(hfpipe("plan", recipe, *arguments, "--json").stdout)
    return {row["stage"]: row for row in told["stages"]} | {"total": told["total"]}


def test_steps_and_tokens_are_those_of_the_run(micro_run, tmp_path):
    """Before anything is prepared, from the first rows of each source, against what was trained."""
    plan = planned("micro", "--out", tmp_path / "none")
    for name in ("pretrain", "midtrain", "sft", "dpo"):
        metrics, row = stage_json(micro_run / name)["metrics"], plan[name]
        assert row["steps"] == pytest.approx(metrics["steps"], rel=0.15), name
        assert not row["exact"]
        assert row["parameters"] == plan["pretrain"]["parameters"]
    assert plan["pretrain"]["tokens"] == pytest.approx(
        stage_json(micro_run / "pretrain")["metrics"]["tokens"], rel=0.15
    )
    # A finished tokenizer knows its bytes a token, and that is nearer.
    nearer = planned("micro", "--out", micro_run, "--set", "pretrain.trainer.learning_rate=1e-3")["pretrain"]
    real = stage_json(micro_run / "pretrain")["metrics"]["tokens"]
    assert nearer["tokens"] == pytest.approx(real, rel=0.05)


def test_parameters_are_those_of_the_model(micro_run, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(micro_run / "sft")
    row = planned("micro", "--out", tmp_path / "none")["sft"]
    assert row["parameters"] == model.num_parameters()
    assert row["embedding"] == model.get_input_embeddings().weight.numel()
    special = len(AutoTokenizer.from_pretrained(micro_run / "sft").added_tokens_decoder)
    assert row["trainable"] == row["parameters"] - (768 - special) * 64


def test_max_steps_make_the_work_exact():
    row = planned("micro", "--set", "sft.trainer.max_steps=7", "--set", "sft.trainer.gradient_accumulation_steps=2")[
        "sft"
    ]
    assert row["exact"]
    assert (row["steps"], row["batch_rows"], row["batch_tokens"]) == (7, 16, 16 * 256)
    assert 0.7 * 7 * 16 * 256 < row["tokens"] <= 7 * 16 * 256


def test_devices_share_the_steps_and_cost_what_they_cost():
    one, eight = planned("tiny", "--device", "a100"), planned("tiny", "--device", "a100x8", "--price", "2")
    assert eight["sft"]["batch_rows"] == 8 * one["sft"]["batch_rows"]
    assert (eight["pretrain"]["batch_rows"], eight["pretrain"]["per_device_train_batch_size"]) == (16, 2)
    assert eight["sft"]["flops"] == pytest.approx(one["sft"]["flops"])
    assert eight["sft"]["seconds"] == pytest.approx(one["sft"]["seconds"] / 8)
    assert one["sft"]["seconds"] == pytest.approx(one["sft"]["flops"] / (312e12 * 0.35))
    assert eight["sft"]["dollars"] == pytest.approx(eight["sft"]["seconds"] / 3600 * 8 * 2)
    stages = ("pretrain", "midtrain", "sft", "dpo", "reward", "ppo")
    assert eight["total"]["seconds"] == pytest.approx(sum(eight[name]["seconds"] for name in stages))
    half = planned("tiny", "--device", "a100", "--utilisation", "0.7")
    assert half["sft"]["seconds"] == pytest.approx(one["sft"]["seconds"] / 2)


def test_devices_that_a_run_would_not_take_are_told():
    told = hfpipe("plan", "micro", "--device", "h100x8").stdout
    assert "8 devices need launch.processes: 8 in pipeline.yaml; as it is, a run takes 1" in told
    for device, told in (("h100x8", False), ("h100", True), ("cpu", False)):
        second = hfpipe("plan", "micro", "--device", device, "--set", "launch.processes=8").stdout.split("\n")[1]
        assert ("launch.processes is 8" in second) == told
        assert ("of all: --device h100x8" in second) == told


# What takes a whole model, out of the recipe.
WHOLE = [f"{stage}.regularize=null" for stage in ("midtrain", "sft", "dpo")]
WHOLE += [f"{stage}.optimizer=null" for stage in ("pretrain", "midtrain")]
FSDP1 = "distributed_type: FSDP\nfsdp_config: {{fsdp_version: 1, {}}}\n"


@pytest.mark.parametrize(
    ("launch", "trainer", "sharding"),
    [
        ("fsdp2", {}, "full"),
        ("zero3", {}, "full"),
        ("zero2", {}, "zero2"),
        ("zero1", {}, "zero1"),
        ("multi_gpu", {}, "ddp"),
        ("distributed_type: 'FSDP'\n", {}, "full"),
        ("distributed_type: FSDP\nfsdp_config: {fsdp_reshard_after_forward: false}\n", {}, "zero2"),
        (FSDP1.format("fsdp_sharding_strategy: SHARD_GRAD_OP"), {}, "zero2"),
        (FSDP1.format("fsdp_sharding_strategy: NO_SHARD"), {}, "ddp"),
        ("distributed_type: DEEPSPEED\ndeepspeed_config: {deepspeed_config_file: ZERO}\n", {}, "full"),
        ("multi_gpu", {"deepspeed": "ZERO"}, "full"),
        ("multi_gpu", {"fsdp": "full_shard"}, "full"),
        ("multi_gpu", {"fsdp": "true"}, "full"),
        ("multi_gpu", {"fsdp": "full_shard", "fsdp_config": "{reshard_after_forward: false}"}, "zero2"),
    ],
)
def test_memory_is_divided_as_the_launch_or_the_trainer_says(launch, trainer, sharding, tmp_path):
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    (tmp_path / "launch.yaml").write_text(launch.replace("ZERO", f"{tmp_path}/zero.json"))
    name = tmp_path / "launch.yaml" if ":" in launch else launch
    settings = [*WHOLE, f"launch={{processes: 4, accelerate_config: {name}}}"]
    settings += [f"pretrain.trainer.{k}={v.replace('ZERO', f'{tmp_path}/zero.json')}" for k, v in trainer.items()]
    chosen = [word for setting in settings for word in ("--set", setting)]
    row = planned("micro", "--device", "h100x4", "--out", tmp_path / "none", *chosen)["pretrain"]
    assert row["sharding"] == sharding
    whole, memory = row["parameters"], row["memory"]
    assert memory["optimizer"] == 8 * whole / (1 if sharding == "ddp" else 4)
    assert memory["gradients"] == {"ddp": 8, "zero1": 4, "zero2": 1, "full": 1}[sharding] * whole
    assert (memory["weights"] < 4 * whole) == (sharding == "full")


def test_dpo_and_ppo_pay_for_their_other_passes():
    plan = planned("tiny")
    dpo = plan["dpo"]["flops_by_part"]
    # One forward pass of the reference beside 6ND, once: about a third, attention's products aside.
    assert dpo["reference"] == pytest.approx(dpo["training"] / 3, rel=1e-6)
    ppo = plan["ppo"]["flops_by_part"]
    assert set(ppo) == {"training", "generation", "old_log_probs", "reference", "reward_model", "critic"}
    assert all(value > 0 for value in ppo.values())
    assert {"reference", "reward_model", "critic", "kv_cache"} <= set(plan["ppo"]["memory"])
    lora = planned("tiny", "--set", "dpo.adapter={type: lora, r: 8}", "--set", "dpo.regularize=null")["dpo"]
    assert lora["trainable"] == 4 * 2 * 8 * (192 + 192)
    assert lora["flops_by_part"]["training"] < 0.75 * dpo["training"]
    assert lora["memory"]["optimizer"] == 8 * lora["trainable"]


def test_what_is_not_known_is_said(recipe):
    """A model and rows of the Hub: no number is made up for either."""
    files = {"sft": "stage: sft\nmodel: {from: org/model}\ndata: {train: [{path: org/rows}]}\n"}
    loaded = load_recipe(recipe(files), stage_types())
    quote = quote_stage(loaded, loaded.stages["sft"])
    assert quote.unknown == ("the rows of org/rows are not known yet", "the shape of org/model is not known here")
    assert (quote.work.steps, quote.work.tokens, quote.flops, quote.seconds, quote.memory) == (None,) * 5
    notes = describe_stage(loaded, loaded.stages["sft"])["notes"]
    assert "unknown: the rows of org/rows are not known yet" in notes
    assert any(note.startswith("work: steps unknown of 8 rows, at most 1024 tokens each") for note in notes)
    limited = load_recipe(recipe(files), stage_types(), ["sft.trainer.max_steps=10"])
    assert quote_stage(limited, limited.stages["sft"]).work.steps == 10


def test_a_type_that_is_not_known(recipe, tmp_path):
    folder = recipe()
    stage = load_recipe(folder, stage_types(), ["pretrain.model.config={model_type: mixtral, hidden_size: 64}"]).stages[
        "pretrain"
    ]
    quote = quote_stage(load_recipe(folder, stage_types()), stage)
    assert quote.shape is None
    assert quote.memory is None
    assert quote.unknown == ("the shape of mixtral is not known here",)


def test_sampling_takes_a_cache_of_its_rollout_and_a_divided_reference(recipe):
    """By hand: 2 x rows x tokens x layers x width, in bf16; micro has 2 layers of 64, keys for every head."""
    grpo = "stage: grpo\nmodel: {from: sft}\ndata: {train: [{path: tinyworld/sft, limit: 64}], max_prompt_length: 56}\n"
    grpo += "rewards: {functions: [{check: contains, value: a}]}\n"
    grpo += "trainer: {max_steps: 4, max_completion_length: 8, beta: 0.1, num_generations: 4, per_device_train_batch_size: 4}\n"
    head = (folder := recipe({"grpo": grpo})) / "pipeline.yaml"
    head.write_text(head.read_text().replace("sft, dpo", "sft, dpo, grpo"))
    each = 2 * 64 * 2 * 64 * 2

    def memory(*settings):
        words = [word for setting in (*WHOLE, *settings) for word in ("--set", setting)]
        return planned(folder, "--device", "h100x2", *words)["grpo"]["memory"]

    assert memory()["kv_cache"] == 4 * each
    assert memory("grpo.trainer.gradient_accumulation_steps=3")["kv_cache"] == 12 * each
    assert memory("grpo.trainer.steps_per_generation=5")["kv_cache"] == 20 * each
    assert memory("grpo.trainer.generation_batch_size=48")["kv_cache"] == 24 * each  # of two devices
    whole, divided = memory(), memory("launch={processes: 2, accelerate_config: fsdp2}")
    assert divided["reference"] == whole["reference"] / 2


TEXT = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({**TEXT, "model_type": "mixtral", "num_local_experts": 4}, "the shape of mixtral is not known here"),
        (
            {
                "model_type": "gemma3",
                "text_config": {**TEXT, "model_type": "gemma3_text"},
                "vision_config": {"hidden_size": 64},
            },
            "the numbers are those of the text alone: the vision part is not counted here",
        ),
    ],
)
def test_what_is_not_counted_of_a_model_that_is_there_is_told(config, told, recipe, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    sft = f"stage: sft\nmodel: {{from: {tmp_path}}}\ndata: {{train: [{{path: tinyworld/sft, limit: 200}}]}}\n"
    loaded = load_recipe(recipe({"sft": sft}), stage_types())
    notes = describe_stage(loaded, loaded.stages["sft"])["notes"]
    assert f"unknown: {told}" in notes
    assert any(note.startswith("model: ") for note in notes) == ("text" in told)


def test_the_command_it_ends_with_can_be_pasted(tmp_path):
    folder = tmp_path / "my recipe"
    shutil.copytree(ROOT / "stage_configs" / "micro", folder)
    told = hfpipe("plan", folder).stdout.splitlines()[-1].partition("looked at by: ")[2]
    assert shlex.split(told) == ["hfpipe", "data", "check", str(folder)]


def test_it_reads_like_a_quote():
    told = hfpipe("plan", "tiny", "--device", "h100").stdout
    stages = told.split("\nsft ")[1].split("\ndpo ")[0].splitlines()
    assert len(stages) <= 6
    for words in (
        "model: gemma3_text, 2.07M parameters",
        "work: about",
        "time: about",
        "NVIDIA H100 SXM, at 35% of its bf16 peak",
    ):
        assert words in told
    assert "rows a pass fit into 80 GB" in told
    assert "total      about" in told
    assert "runpod.io/pricing" in told
    assert "no price is known: --price" in hfpipe("plan", "tiny", "--device", "mi300x").stdout
    small = hfpipe("plan", "tiny", "--device", "t4", "--set", "dpo.trainer.per_device_train_batch_size=4096").stdout
    assert "too much for 16 GB: lower per_device_train_batch_size to" in small


def test_a_large_model_on_a_small_card(recipe):
    big = "pretrain.model.config={model_type: llama, vocab_size: 128256}"
    row = planned(recipe(), "--set", big, "--device", "l4")["pretrain"]
    assert row["largest_per_device_train_batch_size"] == 0
    assert row["memory"]["weights"] > 24e9
    assert "not one row fits" in hfpipe("plan", recipe(), "--set", big, "--device", "l4").stdout


def test_bytes_a_token_are_guessed_near_what_was_measured(micro_run):
    assert guess_bytes_per_token(768) == pytest.approx(
        stage_json(micro_run / "tokenizer")["metrics"]["bytes_per_token"], rel=0.15
    )
    assert guess_bytes_per_token(1536) == pytest.approx(2.81, rel=0.05)  # tiny's, as the README prints it
    assert guess_bytes_per_token(50257) == pytest.approx(4.5, rel=0.05)


@pytest.mark.parametrize(("name", "split", "rows"), [("pretrain", "train", 26_000), ("sft", "validation", 300)])
def test_tinyworld_knows_its_rows(name, split, rows):
    size = estimate_size(Source(f"tinyworld/{name}"), None, split, 0)
    assert (size.rows, size.exact) == (rows, True)
    assert estimate_size(Source(f"tinyworld/{name}", limit=120), None, split, 0).rows == 120


@needs_real_data
@pytest.mark.parametrize("file", ["alpaca_en_demo.json", "gsm8k_train.jsonl", "c4_demo.jsonl", "dpo_en_demo.json"])
def test_rows_of_a_file_are_reckoned_from_its_first(file):
    from hfpipe.data.sources import load_source

    source = Source(str(REAL / file))
    size = estimate_size(source, None, "train", 0)
    real = sum(1 for _ in load_source(source).rows())
    assert size.exact == (real < 400)
    assert size.rows == (real if size.exact else pytest.approx(real, rel=0.25))


def test_a_short_file_is_counted(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"{i} " + "word " * 9}) + "\n" for i in range(30)))
    size = estimate_size(Source(str(file), split="all"), None, "train", 0)
    assert (size.rows, size.exact) == (30, True)
    assert size.bytes_per_row == pytest.approx(46.7, abs=1)
