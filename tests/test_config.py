"""Recipes: what is refused, and how it is told."""

from __future__ import annotations

import pytest

from hfpipe import artifact
from hfpipe.config import load_recipe, shipped_recipes
from hfpipe.errors import ConfigErrors, UserError
from hfpipe.stages import stage_types
from hfpipe.yaml_files import load_yaml, parse_value

from .conftest import ROOT, hfpipe


def problems(folder, overrides=()) -> str:
    with pytest.raises(ConfigErrors) as caught:
        load_recipe(folder, stage_types(), overrides)
    return str(caught.value)


def test_every_shipped_recipe_loads():
    found = {p.parent.name for p in (ROOT / "stage_configs").glob("*/pipeline.yaml")}
    assert set(shipped_recipes()) == found >= {"micro", "tiny", "real-small"}
    for name in found:
        overrides = ["data_dir=somewhere"] if name == "real-small" else []
        recipe = load_recipe(name, stage_types(), overrides)
        assert set(recipe.stages) == set(recipe.pipeline.stages)


def test_all_errors_of_all_stages_at_once(recipe):
    folder = recipe()
    told = problems(
        folder,
        [
            "sft.trainer.learing_rate=1e-4",
            "dpo.trainer.beta=lots",
            "pretrain.model.config.hidden_sizes=64",
            "midtrain.data.max_bad_row=0.1",
            "tokenizer.tokenizer.vocab_size=many",
        ],
    )
    assert told.startswith("5 problems")
    assert (
        "sft.yaml: trainer.learing_rate = 0.0001 is not a field of trl.SFTConfig. Did you mean `learning_rate`?" in told
    )
    assert "dpo.yaml: trainer.beta = 'lots' is str; trl.DPOConfig expects float." in told
    assert "pretrain.yaml: model.config.hidden_sizes = 64 is not a field of the llama configuration." in told
    assert "midtrain.yaml: data.max_bad_row = 0.1 is not a key here" in told
    assert "Did you mean `max_bad_rows`?" in told
    assert "tokenizer.yaml: tokenizer.vocab_size = 'many' is str; expected int." in told


def test_a_faulty_section_hides_no_other_fault(recipe):
    folder = recipe(
        {
            "sft": "stage: sft\nmodel: {from: midtran}\ndata: {max_bad_row: 1}\nguards: 3\nadapter: {type: lora, rr: 3}\n"
            "trainer: {learing_rate: 1}\n",
            "pretrain": "stage: pretrain\nmodel: {from: tokenizer, form: x, config: {model_type: lama}}\n",
        }
    )
    (folder / "pipeline.yaml").write_text("name: a/b\nstages: [tokenizer, pretrain, sft]\nfoo: 1\nhub: {repo_id: x}\n")
    told = problems(folder)
    for words in (
        "sft.yaml: data.max_bad_row = 1 is not a key here",
        "sft.yaml: guards = 3: expected a mapping.",
        "sft.yaml: trainer.learing_rate = 1 is not a field",
        "sft.yaml: adapter.rr = 3 is not a field",
        "sft.yaml: model.from = 'midtran' is neither a stage",
        "pretrain.yaml: model.form = 'x' is not a key here",
        "pretrain.yaml: model.config.model_type = 'lama'",
        "pipeline.yaml: foo = 1 is not a key here",
        "pipeline.yaml: name = 'a/b'",
        "pipeline.yaml: hub.repo_id = 'x'",
    ):
        assert words in told, told
    assert told.startswith("10 problems")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sft.trainer.lr_scheduler_type=cosin", "Did you mean `cosine`?"),
        (
            "sft.trainer.output_dir=x",
            "trainer.output_dir is not the recipe's to set: hfpipe writes to the run's folder",
        ),
        ("sft.trainer.padding_free=true", "is not the recipe's to set"),
        ("sft.trainer.packing=3", "is int; trl.SFTConfig expects bool"),
        ("sft.model.from=midtran", "Did you mean `midtrain`?"),
        ("sft.model.from=./nowhere", "nor a folder that exists"),
        ("dpo.model.from=tokenizer", "`tokenizer` leaves a tokenizer, but a dpo stage needs a model"),
        ("midtrain.model.from=dpo", "the stages form a cycle: midtrain -> dpo -> sft -> midtrain"),
        ("pretrain.model.config.model_type=lama", "in transformers. Did you mean `llama`?"),
        ("pretrain.model.config.model_type=clip", "is not a model type with a causal language model"),
        ("pretrain.model.config.hidden_size=65", "hidden_size = 65 is not a multiple of num_attention_heads = 2."),
        ("pretrain.model.config.num_attention_heads=1", "is not a multiple of num_key_value_heads = 2."),
        ("pretrain.model.config.num_attention_heads=0", "num_attention_heads = 0: expected 1 or more."),
        ("pretrain.model.config={model_type: gpt2, n_head: 7}", "n_embd = 768 is not a multiple of n_head = 7."),
        ("sft.trainer.report_to=wandbb", "report_to = 'wandbb': expected all, none, or some of azure_ml, comet_ml,"),
        ("sft.trainer.report_to=[tensorbord]", "Did you mean `tensorboard`?"),
        ("sft.trainer.report_to=null", "report_to = None: expected all, none, or some of"),
        ("sft.adapter.type=lore", "adapter.type = 'lore': expected one of"),
        (
            "sft.stage=sfd",
            f"expected one of {', '.join(stage_types())}. Did you mean `sft`?",
        ),
        ("stf.trainer.learning_rate=1", "neither a stage nor a setting of this recipe. Did you mean `sft`?"),
        ("sft.trainer", "expected stage.section.key=value"),
        ("launch.processes=two", "pipeline.yaml: launch.processes = 'two' is str; expected int."),
        ("sft.trainer.learning_rate=-1e-3", "trainer.learning_rate = -0.001: expected 0 or more."),
        ("sft.trainer.learning_rate=.inf", "trainer.learning_rate = inf: expected a finite number."),
        ("sft.trainer.max_grad_norm=.nan", "trainer.max_grad_norm = nan: expected a finite number."),
        ("sft.data.train=[{path: a, weight: .nan}]", "data.train[0].weight = nan: expected a finite number."),
        ("sft.data.train=[{path: a, weight: .inf}]", "give every source a weight above 0, or none"),
        ("sft.data.train=[{path: ' '}]", "sft.yaml: data.train[0].path = ' ' cannot be looked up: it is empty."),
        ("sft.data.train=[{path: ~nobody-here/a}]", "cannot be looked up: Could not determine home directory."),
        (
            "sft.model.from=" + "a" * 5000,
            f"sft.yaml: model.from = '{'a' * 80}' cannot be looked up: File name too long.",
        ),
        ("sft.trainer.max_length=" + "[" * 3000, "is not readable as a YAML value."),
        ("sft.trainer.max_length=null", "trainer.max_length is null: give a number of tokens"),
        ("sft.stage=[sft]", "stage = ['sft']: expected one of"),
        ("sft.adapter.type=[lora]", "adapter.type = ['lora']: expected one of"),
        ("sft.optimizer.type=muoon", "optimizer.type = 'muoon': expected 'muon'"),
        ("sft.optimizer.lr=0.1", "optimizer has lr but no type"),
        ("sft.data.eval=[{path: tinyworld/sft, weight: 1}]", "data.eval: weight has no meaning here"),
        ("tokenizer.data.train=[{path: tinyworld/sft, weight: 1}]", "a tokenizer reads every source whole"),
        ("sft.data.train=[{path: a, weight: 1}, {path: b}]", "give every source a weight above 0, or none"),
        ("pretrain.trainer.gradient_accumulation_steps=2", "beside data.batch_tokens, which sets it"),
        ("sft.trainer.save_only_model=true", "a killed run could not go on from its checkpoints"),
        ("sft.trainer.num_train_epochs=0", "trains nothing: give more than 0"),
        ("dpo.trainer.weight_decay=0.1", "decay would shrink the frozen rows"),
        ("sft.regularize.freeze_layers=1", "regularize.freeze_layers = 1 beside adapter"),
        ("sft.trainer.disable_tqdm=false", "is not the recipe's to set"),
        ("sft.data.train=[]", "data.train is missing"),
        ("sft.data.train=[mine.jsonl]", "expected a mapping with keys of its own, such as {path: mine.jsonl}."),
        ("sft.data.max_bad_rows=-1", "data.max_bad_rows = -1.0: expected 0 or more."),
        ("sft.data.max_bad_rows=7", "expected at most 1; it is a share."),
        ("sft.model.config={model_type: llama}", "`midtrain` leaves one to go on from"),
        ("pretrain.model.config={}", "`tokenizer` leaves a tokenizer, so the model is made from scratch"),
        ("evaluate.max_new_tokens=0", "evaluate.max_new_tokens = 0: expected 1 or more."),
        ("name=a/../b", "it names a folder"),
        ("seed=-1", "seed = -1: expected 0 or more."),
        ("stages=[sft]", "select among them with --from, --to and --only"),
        ("evaluate=3", "evaluate = 3: expected a mapping with keys of its own."),
        ("synth=[1]", "pipeline.yaml: synth = [1]"),
        ("sft=3", "`sft` is a whole stage; name a key of it"),
        ("launch.processes=0", "expected 1 or more"),
        ("launch.processes=7", "pretrain.yaml: data.batch_tokens = 2048 is not a multiple of 896 tokens"),
        ("launch.accelerate_config=fsdp3", "Did you mean `fsdp2`?"),
        ("sft.adpter.r=4", "adpter is not a section of a sft stage. Did you mean `adapter`?"),
    ],
)
def test_one_fault_one_message(recipe, override, expected):
    adapter = ["sft.adapter={type: lora}"] if "layers" in override else []
    assert expected in problems(recipe(), [override, *adapter])


@pytest.mark.parametrize("reports", ["all", "none", "[all]", "[none]", "[]", "tensorboard", "[wandb, tensorboard]"])
def test_what_a_trainer_may_report_to(reports):
    assert load_recipe("micro", stage_types(), [f"sft.trainer.report_to={reports}"])


def test_a_file_is_named_by_an_override_as_in_pipeline_yaml(recipe):
    folder = recipe()
    (folder / "mine.yaml").write_text("max_new_tokens: 7\nsamples: 2\n")
    told = load_recipe(folder, stage_types(), ["evaluate=mine.yaml", "evaluate.samples=3"]).pipeline.evaluate
    assert (told.max_new_tokens, told.samples) == (7, 3)
    assert f"pipeline.yaml: evaluate: {folder / 'none.yaml'}" in problems(folder, ["evaluate=none.yaml"])


def test_a_stage_that_starts_from_nothing(recipe):
    folder = recipe({"sft": "stage: sft\nmodel: {}\n"})
    assert "sft.yaml: model.from is missing: a sft stage starts from a model." in problems(folder)


@pytest.mark.parametrize(
    ("stages", "expected"), [("sft", "expected a list"), ("[]", "a list"), ("[sft, sft]", "more than once")]
)
def test_stages_that_are_no_list_of_names(recipe, stages, expected):
    folder = recipe()
    (folder / "pipeline.yaml").write_text(f"name: x\nstages: {stages}\n")
    assert expected in problems(folder)


def test_a_listed_stage_without_a_file(recipe):
    folder = recipe()
    (folder / "sft.yaml").rename(folder / "sfft.yaml")
    told = problems(folder)
    assert "stages names `sft`" in told
    assert "Did you mean `sfft`?" in told


def test_yaml_reads_numbers_words_and_refuses_duplicates(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("rate: 1e-4\nanswer: no\n")
    assert load_yaml(file) == {"rate": 1e-4, "answer": "no"}
    file.write_text("rate: 1\nrate: 2\n")
    with pytest.raises(UserError, match=r"a\.yaml:2:1: .*duplicate key"):
        load_yaml(file)
    file.write_text("name: 2026-13-45\n")
    with pytest.raises(UserError, match=r"a\.yaml: a value looks like a date and is none"):
        load_yaml(file)
    with pytest.raises(UserError, match="'2026-13-45' is not readable as a YAML value"):
        parse_value("2026-13-45")
    file.write_text("[" * 3000)
    with pytest.raises(UserError, match=r"a\.yaml: not readable as YAML: brackets stand too deep"):
        load_yaml(file)
    file.write_text("a: [1, 2\nb: 3\n")
    with pytest.raises(UserError, match=r"a\.yaml:2:\d+: not readable as YAML"):
        load_yaml(file)


def test_model_types_that_have_no_folder_of_their_own_are_known(recipe):
    config = "pretrain.model.config={model_type: gemma3_text, hidden_size: 64, query_pre_attn_scalar: 16, hedim: 1}"
    told = problems(recipe(), [config])
    assert "pretrain.yaml: model.config.hedim = 1 is not a field of the gemma3_text configuration." in told
    assert told.count("model.config") == 1


def test_an_alias_is_a_copy(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("base: &b {lr: 1e-4}\none: {<<: *b, steps: 2}\ntwo: *b\n")
    read = load_yaml(file)
    assert read["one"] == {"lr": 1e-4, "steps": 2}
    read["two"]["lr"] = 1
    assert read["base"] == {"lr": 1e-4}
    file.write_text("a: &a\n  b: *a\n")
    with pytest.raises(UserError, match="stands inside what it names"):
        load_yaml(file)


def test_overrides_set_values_and_settings(recipe):
    folder = recipe()
    loaded = load_recipe(
        folder, stage_types(), ["sft.trainer.learning_rate=1e-4", "seed=3", "sft.adapter={type: lora, r: 2}"]
    )
    assert loaded.stages["sft"].trainer["learning_rate"] == 1e-4
    assert loaded.pipeline.seed == 3
    assert loaded.stages["sft"].adapter.options == {"r": 2}


def test_a_setting_without_a_value_names_itself():
    with pytest.raises(ConfigErrors, match="--set data_dir=VALUE") as caught:
        load_recipe("real-small", stage_types())
    assert len(caught.value.problems) == 1
    told = problems("real-small", ["data_dir=x", "sft.data.train=[{path: '{dta}/a'}, {path: '{dta}/b'}]"])
    assert told.count("needs the setting `dta`: add it to `settings` in pipeline.yaml.") == 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "tinny"], "No recipe `tinny`: neither a folder nor one of"),
        (["run", "tinny"], "Did you mean `tiny`?"),
        (["run", "tests"], "tests has no pipeline.yaml, so it is not a recipe"),
        (["run", "r" * 5000], "File name too long. The shipped ones: anneal"),
        (
            ["plan", "micro", "--set", f"launch.accelerate_config={'c' * 5000}"],
            "cannot be looked up: File name too long",
        ),
        (["run", "micro", "--from", "stf", "--out", "x"], "Did you mean `sft`?"),
        (["plan", "micro", "--set", "sft.seed=[", "--set", "dpo.seed=1"], "2 problems in the recipe"),
        (["run", "micro", "--from", "sft", "--out", "x"], "which is not finished"),
        (["run", "micro", "--from", "dpo", "--to", "sft", "--out", "x"], "comes before"),
        (["plan", "micro", "--set", "sft.trainer.x=1"], "trainer.x = 1 is not a field of trl.SFTConfig"),
    ],
)
def test_the_command_line_says_it_in_one_message(arguments, expected, tmp_path):
    out = tmp_path / "out"
    arguments = [str(out) if a == "x" else a for a in arguments]
    done = hfpipe(*arguments, check=2)
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()


def test_a_new_key_does_not_undo_what_has_been_trained():
    """Of every section, what counts where nothing is set: a key that came later belongs into artifact's `_LATER`."""
    held = {
        "model": "attn_implementation config dtype from_ trust_remote_code",
        "regularize": "freeze_embeddings freeze_layers l2_to_parent layerwise_lr_decay",
        "data": "eval max_bad_rows train",
    }
    muon = {"optimizer": "lr momentum nesterov ns_steps type weight_decay"}
    expected = {
        "tokenizer": {"tokenizer": "chat_template min_frequency type vocab_size", "data": held["data"]},
        "pretrain": held
        | muon
        | {"data": "batch_tokens eval max_bad_rows max_length streaming train", "tokenizer": "chat_template"},
        "sft": held | muon | {"tokenizer": "chat_template"},
        "reward": held | muon,
        "ppo": held
        | {"data": "eval max_bad_rows max_prompt_length train", "limits": "max_kl max_length_growth min_entropy"}
        | {"rewards": "control functions model weight"},
    }
    plain = [f"{name}.model.compile_blocks=false" for name in ("pretrain", "sft")]  # tiny sets it
    plain.append("reward.model.share_prefixes=false")  # and this
    recipe = load_recipe(ROOT / "stage_configs" / "tiny", stage_types(), plain)
    for name, sections in expected.items():
        counted = artifact.hashed_config(recipe.stages[name], seed=0, processes=1)
        found = {key: " ".join(sorted(v)) for key, v in counted.items() if isinstance(v, dict) and key != "trainer"}
        assert found == sections, name


def test_a_reference_that_upstream_loads_has_the_parents_context(recipe):
    longer = "dpo.model.rope_parameters={rope_type: linear, factor: 2.0}"
    told = problems(recipe(), [longer, "dpo.trainer.precompute_ref_log_probs=false"])
    assert (
        "dpo.yaml: model.rope_parameters in a dpo stage whose reference is loaded from the parent, without them" in told
    )
    assert not load_recipe(recipe(), stage_types(), [longer]).stages["dpo"].adapter


def test_a_package_that_reports_need_is_missed_before_anything_trains(tmp_path):
    asked = ("--set", "sft.trainer.report_to=dvclive", "--out", tmp_path / "run")
    hfpipe("plan", "micro", *asked)  # another machine may have it
    told = hfpipe("run", "micro", *asked, check=2).stderr
    assert "sft.yaml: trainer.report_to = 'dvclive' needs the package dvclive, which is not installed." in told
    assert not (tmp_path / "run" / "pretrain").exists()


@pytest.mark.parametrize(
    "config",
    [
        "{model_type: qwen3, hidden_size: 100, num_attention_heads: 6, num_key_value_heads: 6}",
        "{model_type: qwen3, hidden_size: 64, num_attention_heads: 4, num_key_value_heads: null}",
        "{model_type: deepseek_v3, hidden_size: 64, num_attention_heads: 4}",
    ],
)
def test_sizes_that_transformers_takes_are_taken(recipe, config):
    assert load_recipe(recipe(), stage_types(), [f"pretrain.model.config={config}"])
