"""What is watched while a stage trains, with each fault planted: a loss that diverges, overfitting, a mask, too little memory."""

from __future__ import annotations

import json
import math
import os
import random
import re
import resource
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hfpipe import StageFailed, UserError, artifact, load_pipeline
from hfpipe.config import load_recipe
from hfpipe.stages import stage_types
from hfpipe.training.guards import spike

from .conftest import stage_json
from .sequences import newest_child

NAN, TINY = "X", "Y"  # tokens that stand in one row each; what their embeddings are is planted
ANIMALS, PLACES = ("cat", "dog", "hen", "fox", "pig", "cow"), ("mat", "bed", "hay", "log", "mud", "box")
SENTENCES = [f"The {a} is on the {p}." for a in ANIMALS for p in PLACES]  # 36
TRAINER = "num_train_epochs: 1, save_steps: 8, logging_steps: 1, per_device_train_batch_size: 1, learning_rate: 2.0e-2, bf16: false"
STAGE = """stage: pretrain
model: {from: MODEL}
data: {max_length: 14, train: [{path: DATA/NAME.jsonl, split: all}], eval: [{path: DATA/NAME.jsonl, split: all, limit: 4}]}
trainer: {TRAINER}
"""


def rows(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A recipe of stages that each begin from the same small model, some of whose embeddings are no numbers to train on."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    place = tmp_path_factory.mktemp("guards")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special, alphabet = ["<|begin|>", "<|endoftext|>", "<|pad|>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator(SENTENCES, trainer)
    names = {"bos_token": "<|begin|>", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.save_pretrained(place / "model")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), rms_norm_eps=0.0, attention_dropout=0.1, **shape))
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids(NAN)] = math.nan
        # It is divided by its own size on the way in, so the loss is finite, and its gradient holds that size to the power -3.
        model.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids(TINY)] *= 1e-13
    model.save_pretrained(place / "model")

    (place / "data").mkdir()
    rng = random.Random(0)
    rows(place / "data" / "nan.jsonl", [*SENTENCES, f"{NAN}{SENTENCES[0]}"])
    rows(place / "data" / "infinite.jsonl", [*SENTENCES, f"{TINY}{SENTENCES[0]}"])
    rows(place / "data" / "spike.jsonl", [*SENTENCES, "".join(rng.choices("!#$%&*+,-/:;<=>?@[]^_0123456789", k=11))])
    rows(place / "data" / "explode.jsonl", SENTENCES)
    words = [" ".join(rng.choices(ANIMALS + PLACES, k=5)) for _ in range(16)]
    rows(place / "data" / "overfit.jsonl", words[:8])
    rows(place / "data" / "others.jsonl", [text[::-1] for text in words[8:]])
    recipe = place / "recipe"
    recipe.mkdir()
    stages = ("nan", "infinite", "spike", "overfit", "explode")
    (recipe / "pipeline.yaml").write_text(f"name: planted\nstages: [{', '.join(stages)}]\nevaluate: {{samples: 0}}\n")
    for name in stages:
        text = STAGE.replace("MODEL", str(place / "model")).replace("DATA", str(place / "data")).replace("NAME", name)
        text = text.replace("TRAINER", TRAINER)
        if name == "overfit":
            text = text.replace("overfit.jsonl, split: all, limit: 4", "others.jsonl, split: all")
            text = text.replace("save_steps: 8", "save_steps: 25, eval_strategy: steps, eval_steps: 10")
            text = (
                text.replace("num_train_epochs: 1", "num_train_epochs: 50, lr_scheduler_type: constant")
                + "guards: {overfit_patience: 2}\n"
            )
        if name == "explode":
            text = text.replace("learning_rate: 2.0e-2", "learning_rate: 1.0e+3")
        (recipe / f"{name}.yaml").write_text(text)
    return place


@pytest.fixture(scope="module")
def run(place) -> Path:
    """Every stage but the one that is past help, through the Python API."""
    load_pipeline(place / "recipe").run(place / "run", to="overfit")
    return place / "run"


def notes(run: Path, stage: str) -> list[str]:
    events = map(json.loads, (run / "logs" / f"{stage}.jsonl").read_text().splitlines())
    return [event["text"] for event in events if event["event"] == "note"]


def losses(run: Path, stage: str) -> dict[int, float]:
    lines = map(json.loads, (run / stage / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.parametrize(
    ("stage", "why"),
    [("nan", "its loss is nan"), ("infinite", "its gradient is inf"), ("spike", "against a median of ")],
)
def test_a_step_that_diverges_is_gone_back_from_and_left_out(run, stage, why):
    record = stage_json(run / stage)
    back = record["metrics"]["rollbacks"][0]
    assert why in back["why"]
    step, to = back["step"], back["to"]
    assert back["skipped"] == [max(step - 1, 1), step]
    assert to == max((n for n in (8, 16, 24, 32) if n < step - 1), default=0)  # not one made since the step before
    assert back["text"] in notes(run, stage)
    assert record["metrics"]["steps"] == 37
    assert len(record["metrics"]["rollbacks"]) == 1  # one row is bad, and it is seen once
    curve = losses(run, stage)
    assert all(map(math.isfinite, curve.values()))
    assert curve[37] < curve[1] / 2
    weights = load_file(run / stage / "model.safetensors")
    bad = torch.stack([~tensor.isfinite().all() for name, tensor in weights.items() if "embed_tokens" not in name])
    assert not bad.any()


def test_the_learning_rate_is_lowered_from_where_it_went_back_to(run):
    lines = map(json.loads, (run / "nan" / "metrics.jsonl").read_text().splitlines())
    rates = {line["step"]: line["learning_rate"] for line in lines if "learning_rate" in line}
    to = stage_json(run / "nan")["metrics"]["rollbacks"][0]["to"]
    for step, rate in rates.items():  # the schedule falls linearly from 2e-2 to 0 at step 37
        assert rate == pytest.approx(2e-2 * (38 - step) / 37 * (0.5 if step > to else 1))


def test_the_history_is_in_the_report(run):
    html = (run / "report.html").read_text()
    assert "What the guards did" in html
    for stage in ("nan", "infinite", "spike"):
        assert f"{stage}: step {stage_json(run / stage)['metrics']['rollbacks'][0]['step']} has diverged" in html
    assert "overfit: overfitting: validation loss rose 2 times in a row" in html


def test_overfitting_stops_at_the_best_checkpoint(run):
    metrics = stage_json(run / "overfit")["metrics"]
    found = metrics["overfitting"]
    evaluations = found["evaluations"]
    best = min(evaluations, key=lambda one: one[1])
    assert found["best_step"] == best[0] < found["step"] == evaluations[-1][0] < 400
    assert evaluations[-3][1] < evaluations[-2][1] < evaluations[-1][1]  # rose twice in a row
    assert evaluations[-1][2] < evaluations[-3][2]  # while training loss fell
    assert metrics["validation"]["loss"] == pytest.approx(best[1], rel=1e-3)  # what the stage leaves is the best
    assert found["text"] in notes(run, "overfit")


def test_a_training_that_goes_on_diverging_stops_with_its_history(run, place):
    with pytest.raises(StageFailed) as failed:
        load_pipeline(place / "recipe").run(run)
    told = str(failed.value)
    assert "explode failed: Diverged: step" in told
    assert "It has gone back 3 times (guards.max_rollbacks)" in told
    assert told.count("has diverged: its loss is ") == 4
    assert "Lower trainer.learning_rate tenfold" in told
    assert not (run / "explode").exists()


UNEVEN = {
    # 72 easy steps, then rows that were never seen
    "phases": "data: {max_length: 14, train: [{path: DATA/explode.jsonl, split: all}, {path: DATA/others.jsonl, split: all}], "
    "phases: [{share: 0.9, weights: [1, 0]}, {share: 0.1, weights: [0, 1]}]}\ntrainer: {max_steps: 80, TRAINER}",
    "curriculum": "data: {max_length: 14, train: [{path: DATA/graded.jsonl, split: all}], curriculum: {by: hard}}\n"
    "trainer: {TRAINER}",
}


@pytest.mark.parametrize(
    ("late", "loss", "high"),
    [
        ([1.0] * 20, 3.1, True),
        ([1.0] * 20, 2.9, False),
        ([0.1] * 20, 0.9, False),  # near 0, many times the median is little
        ([0.1] * 20, 1.2, True),
        ([1.0] * 17 + [2.5] * 3, 3.1, False),  # rows of a rare kind: they come again and again
        ([1.0] * 17 + [2.5] * 3, 3.8, True),
        ([1.0] * 18 + [9.0] * 2, 3.1, True),  # one or two that were high hide no other
    ],
)
def test_a_spike_is_told_from_what_comes_again(late, loss, high):
    assert bool(spike(loss, [2.0] * 10 + late, 3.0)) == high
    assert not spike(loss, [], 3.0)


def test_what_is_new_to_a_model_is_no_spike_in_the_first_steps():
    """Losses of a fine-tuning's steps 1 to 3, with eight rows in each: seen, and taken for a divergence."""
    chance = math.log(1536)
    assert spike(4.489, [1.407, 1.1], 3.0)
    assert not spike(4.489, [1.407, 1.1], 3.0, chance=chance)
    assert spike(chance + 0.1, [1.407, 1.1], 3.0, chance=chance)
    assert spike(4.489, [1.2] * 10, 3.0, chance=chance)  # by then it is known what rows there are


@pytest.mark.parametrize(
    ("losses", "loss", "high"),
    [
        ([0.1] * 20, 0.31, True),
        ([0.1] * 20, 0.29, False),
        ([1.0] * 17 + [2.5] * 3, 3.1, True),
        ([0.2] * 5, 0.7, True),
    ],
)
def test_by_the_plain_rule_a_spike_is_so_many_times_the_median(losses, loss, high):
    assert bool(spike(loss, losses, 3.0, "plain")) == high
    assert not spike(loss, losses, 3.0)


def test_the_plain_rule_takes_one_high_loss_also_among_pairs(place, micro_run):
    """The false labels of the test below, by the other rule: the second one ends the stage."""
    recipe = judge_of_false_labels(place, micro_run, "plain", "guards: {spike_rule: plain, max_rollbacks: 1}\n")
    with pytest.raises(StageFailed, match="has gone back 1 times"):
        load_pipeline(recipe).run(place / "run-plain")
    back = next(text for text in notes(place / "run-plain", "judge") if "has diverged" in text)
    told = r"step (\d+) has diverged: its loss is ([\d.]+), against a median of ([\d.]+) in the .*; steps (\d+) to (\d+) are"
    step, loss, median, first, last = map(float, re.match(told, back).groups())
    assert loss > 3 * median
    assert (first, last) == (step - 1, step)


@pytest.mark.parametrize("kind", UNEVEN)
def test_rows_that_become_harder_by_plan_are_no_spike(place, kind):
    easy = [{"text": text, "hard": 0} for text in SENTENCES * 2]
    hard = [{"text": json.loads(line)["text"], "hard": 1} for line in (place / "data" / "others.jsonl").open()]
    # Duplicates are left out, so the easy ones are given numbers.
    graded = [{**row, "text": f"{row['text'][:-1]} {number // 36}."} for number, row in enumerate(easy)] + hard
    (place / "data" / "graded.jsonl").write_text("".join(json.dumps(row) + "\n" for row in graded))
    recipe = place / kind
    recipe.mkdir()
    (recipe / "pipeline.yaml").write_text(f"name: {kind}\nstages: [uneven]\nevaluate: {{samples: 0}}\n")
    trainer = TRAINER.replace("num_train_epochs: 1, ", "" if kind == "phases" else "num_train_epochs: 1, ")
    body = UNEVEN[kind].replace("DATA", str(place / "data")).replace("TRAINER", trainer)
    (recipe / "uneven.yaml").write_text(f"stage: pretrain\nmodel: {{from: {place / 'model'}}}\n{body}\n")
    load_pipeline(recipe).run(place / f"run-{kind}")
    curve = losses(place / f"run-{kind}", "uneven")
    before = sorted(curve[step] for step in range(23, 73))
    assert curve[73] > max(3 * before[25], 1 + before[25])  # a spike it would be, if it were not planned
    assert "rollbacks" not in stage_json(place / f"run-{kind}" / "uneven")["metrics"]


def judge_of_false_labels(place: Path, micro_run: Path, name: str, guards: str = "") -> Path:
    """One of twelve pairs is the wrong way round: where the others' losses are near 0, it alone is many times their median."""
    pairs = [(f"{a} {p}?", "Yes.", "No.") for a in ANIMALS for p in PLACES for _ in "ab"]
    turned = [
        (f"{asked}{n}", *((bad, good) if n % 12 == 11 else (good, bad))) for n, (asked, good, bad) in enumerate(pairs)
    ]
    lines = [json.dumps({"prompt": asked, "chosen": good, "rejected": bad}) + "\n" for asked, good, bad in turned]
    (place / "data" / "pairs.jsonl").write_text("".join(lines))
    recipe = place / name
    recipe.mkdir()
    (recipe / "pipeline.yaml").write_text(f"name: {name}\nstages: [judge]\nevaluate: {{samples: 0}}\n")
    trainer = TRAINER.replace("num_train_epochs: 1", "num_train_epochs: 2").replace("2.0e-2", "5.0e-3")
    (recipe / "judge.yaml").write_text(
        f"stage: reward\nmodel: {{from: {micro_run / 'sft'}}}\n{guards}"
        f"data: {{train: [{{path: {place / 'data' / 'pairs.jsonl'}, split: all}}]}}\ntrainer: {{{trainer}}}\n"
    )
    return recipe


def test_a_false_label_among_pairs_is_no_spike(place, micro_run):
    load_pipeline(judge_of_false_labels(place, micro_run, "pairs")).run(place / "run-pairs")
    curve = losses(place / "run-pairs", "judge")
    assert max(list(curve.values())[60:]) > 1 + 3 * sorted(curve.values())[len(curve) // 2]
    assert "rollbacks" not in stage_json(place / "run-pairs" / "judge")["metrics"]


def test_pairs_whose_loss_stays_high_are_gone_back_from(place, micro_run):
    """Which answer is the better one is chance, and the head, which alone is trained, goes far with every step."""
    rng = random.Random(0)
    asked = [f"{a} {p}?{number}" for a in ANIMALS for p in PLACES for number in range(4)]
    answers = [rng.sample(["Yes.", "No."], 2) for _ in asked]
    pairs = [{"prompt": q, "chosen": good, "rejected": bad} for q, (good, bad) in zip(asked, answers, strict=True)]
    (place / "data" / "random.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    recipe = place / "unsteady"
    recipe.mkdir()
    (recipe / "pipeline.yaml").write_text("name: unsteady\nstages: [judge]\nevaluate: {samples: 0}\n")
    trainer = TRAINER.replace("2.0e-2", "1.0e+5, max_grad_norm: 0, optim: sgd").replace("size: 1", "size: 8")
    (recipe / "judge.yaml").write_text(
        f"stage: reward\nmodel: {{from: {micro_run / 'sft'}}}\nguards: {{max_rollbacks: 1}}\n"
        "regularize: {freeze_layers: [embed_tokens, layers.0, layers.1]}\n"
        f"data: {{train: [{{path: {place / 'data' / 'random.jsonl'}, split: all}}]}}\ntrainer: {{{trainer}}}\n"
    )
    with pytest.raises(StageFailed, match=r"has gone back 1 times"):
        load_pipeline(recipe).run(place / "run-unsteady")
    back = next(text for text in notes(place / "run-unsteady", "judge") if "has diverged" in text)
    told = r"step (\d+) has diverged: its loss is [\d.e+]+, against (at most|a median of) [\d.]+ in the .*; steps (\d+) to (\d+) are"
    step, _, first, last = re.match(told, back).groups()
    assert int(last) == int(step) > 3
    assert int(first) == int(step) - 3  # three that were too high, and the one before them


def test_an_evaluation_after_the_last_checkpoint_finds_it_the_best(place, tmp_path):
    from hfpipe.training.checkpoints import seal, set_damaged_aside

    changes = {"explode.trainer.learning_rate": 1e-2, "explode.trainer.eval_strategy": "epoch"}
    changes["explode.trainer.num_train_epochs"] = 2
    load_pipeline(place / "recipe", changes).run(tmp_path / "run", only="explode")
    lines = map(json.loads, (tmp_path / "run" / "explode" / "metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines if "eval_loss" in line] == [36, 72]
    # Killed between putting the old one away and the new one in its place, the old one is taken.
    (tmp_path / "replaced-checkpoint-8").mkdir()
    (tmp_path / "replaced-checkpoint-8" / "trainer_state.json").write_text("{}")
    seal(tmp_path / "replaced-checkpoint-8")
    assert set_damaged_aside(tmp_path) == []
    assert [p.name for p in tmp_path.glob("*checkpoint*")] == ["checkpoint-8"]


def test_a_run_killed_while_it_goes_back_comes_to_the_same_bits(run, place):
    killed, over = place / "killed", threading.Event()

    def kill() -> None:
        while not over.is_set():
            if (killed / "nan.partial" / "checkpoints" / "rollbacks.json").is_file():
                os.kill(newest_child(killed)[0], signal.SIGKILL)
                return
            time.sleep(0.002)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        with pytest.raises(StageFailed, match="SIGKILL"):
            load_pipeline(place / "recipe").run(killed, to="nan")
    finally:
        over.set()
        thread.join()
    assert not (killed / "nan").exists()
    load_pipeline(place / "recipe").run(killed, to="nan")
    assert "has diverged" not in " ".join(notes(killed, "nan"))  # it went on from the history
    whole, after = stage_json(run / "nan"), stage_json(killed / "nan")
    assert after["weights"] == whole["weights"]
    assert after["metrics"]["rollbacks"] == whole["metrics"]["rollbacks"]


def test_a_rehearsal_changes_no_bit(run, place):
    without = {"nan.guards.rehearse": False}
    load_pipeline(place / "recipe", without).run(place / "unrehearsed", to="nan")
    rehearsed, not_rehearsed = stage_json(run / "nan"), stage_json(place / "unrehearsed" / "nan")
    assert rehearsed["weights"] == not_rehearsed["weights"]
    assert rehearsed["fingerprint"] == not_rehearsed["fingerprint"]
    doing = [json.loads(line) for line in (run / "logs" / "nan.jsonl").read_text().splitlines()]
    assert sum("rehearsing" in event.get("text", "") for event in doing) == 1  # not again after going back


@pytest.fixture
def little_memory(run):
    """The fork server, and so every stage that it starts, may take 1.5 GB more than it has.

    Of what can be written: the address space of a process also has what each thread's allocator only reserves.
    """
    from multiprocessing import forkserver

    server = forkserver._forkserver._forkserver_pid
    has = next(line for line in Path(f"/proc/{server}/status").read_text().splitlines() if line.startswith("VmData"))
    before = resource.prlimit(server, resource.RLIMIT_DATA)
    resource.prlimit(server, resource.RLIMIT_DATA, (int(has.split()[1]) * 1024 + 1_500_000_000, before[1]))
    yield
    resource.prlimit(server, resource.RLIMIT_DATA, before)


def test_a_save_that_fails_does_so_before_training(place, run):
    """The fork server's children, the stages, may write no file beyond 64 kB (`ulimit -f`): the weights take more."""
    from multiprocessing import forkserver

    server = forkserver._forkserver._forkserver_pid
    before = resource.prlimit(server, resource.RLIMIT_FSIZE)
    resource.prlimit(server, resource.RLIMIT_FSIZE, (64_000, before[1]))
    try:
        with pytest.raises(StageFailed, match="may not become as large as that"):
            load_pipeline(place / "recipe").run(place / "unsaved", to="nan")
    finally:
        resource.prlimit(server, resource.RLIMIT_FSIZE, before)
    events = [json.loads(line) for line in (place / "unsaved" / "logs" / "nan.jsonl").read_text().splitlines()]
    assert "rehearsing" in [event["text"] for event in events if event["event"] == "doing"][-1]
    assert "step" not in {event["event"] for event in events}
    load_pipeline(place / "recipe").run(place / "unsaved", to="nan")
    assert stage_json(place / "unsaved" / "nan")["weights"] == stage_json(run / "nan")["weights"]


LARGE = """stage: pretrain
model: {from: MODEL, attn_implementation: eager}
data: {max_length: 512, train: [{path: DATA/long.jsonl, split: all}], eval: [{path: DATA/long.jsonl, split: all}]}
trainer: {max_steps: 1, bf16: false, SIZES}
"""


@pytest.mark.parametrize(
    ("key", "sizes"),
    [
        ("train", "per_device_train_batch_size: 192, per_device_eval_batch_size: 1"),
        ("eval", "per_device_train_batch_size: 1, per_device_eval_batch_size: 2048"),
    ],
)
def test_too_little_memory_is_told_with_the_batch_that_fits(place, little_memory, key, sizes):
    rows(place / "data" / "long.jsonl", [" ".join(SENTENCES[n:] + SENTENCES[:n]) for n in range(4)])
    recipe = place / f"large-{key}"
    recipe.mkdir()
    (recipe / "pipeline.yaml").write_text("name: large\nstages: [large]\nevaluate: {samples: 0, max_rows: 4}\n")
    text = LARGE.replace("MODEL", f"{place / 'model'}").replace("DATA", f"{place / 'data'}").replace("SIZES", sizes)
    (recipe / "large.yaml").write_text(text)
    with pytest.raises(UserError) as refused:
        load_pipeline(recipe).run(place / f"run-{key}")
    told = str(refused.value)
    assert "there is not enough memory, as a rehearsal before training has found" in told
    fits = int(re.search(rf"trainer.per_device_{key}_batch_size: (\d+) fits", told)[1])
    changed = {f"large.trainer.per_device_{key}_batch_size": fits}
    if key == "train":
        steps = int(re.search(r"gradient_accumulation_steps: (\d+) for as many rows a step as now", told)[1])
        assert fits * steps == 192
        changed["large.trainer.gradient_accumulation_steps"] = steps
    load_pipeline(recipe, changed).run(place / f"run-{key}")
    assert stage_json(place / f"run-{key}" / "large")["metrics"]["steps"] == 1


SILENT = """{{ '<|begin|>' }}{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ '<|assistant|>' }}
{{- message.content }}{% if not loop.last %}{{ '<|end_assistant|>' }}{% endif %}{% endgeneration %}
{%- if loop.last %}{{ '<|end_assistant|>' }}{% endif %}{% else %}{{ '<|user|>' + message.content + '<|end_user|>' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""


def test_the_first_batch_is_looked_at(place):
    talks = [[{"role": "user", "content": f"{a}?"}, {"role": "assistant", "content": "No."}] for a in ANIMALS]
    (place / "data" / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    recipe = place / "talking"
    recipe.mkdir()
    (recipe / "silent.jinja").write_text(SILENT)
    (recipe / "pipeline.yaml").write_text("name: talking\nstages: [sound, silent]\nevaluate: {samples: 0}\n")
    for name, template in (("sound", "hfpipe"), ("silent", f"{recipe / 'silent.jinja'}")):
        (recipe / f"{name}.yaml").write_text(
            f"stage: sft\nmodel: {{from: {place / 'model'}}}\ntokenizer: {{chat_template: {template}}}\n"
            f"data: {{train: [{{path: {place / 'data' / 'talks.jsonl'}, split: all}}]}}\n"
            "trainer: {max_steps: 1, per_device_train_batch_size: 2}\n"
        )
    with pytest.raises(UserError) as refused:
        load_pipeline(recipe).run(place / "talks")
    assert "2 of its 2 conversations train no token that ends a turn (<|end_assistant|>" in str(refused.value)
    assert "⟦<|assistant|>No.⟧<|end_assistant|>" in str(refused.value)
    (told,) = [note for note in notes(place / "talks", "sound") if note.startswith("first batch")]
    # Of <|begin|><|user|>cat?<|end_user|><|assistant|>No.<|end_assistant|><|end|> the last but one part is trained.
    assert re.fullmatch(
        r"first batch: 2 rows, \d+ tokens, \d+% trained, 2 ends of turns among them; trained between ⟦ and ⟧: "
        r"<\|begin\|><\|user\|>\w+\?<\|end_user\|>⟦<\|assistant\|>No\.<\|end_assistant\|>⟧<\|end\|>",
        told,
    )


def test_a_guard_that_nothing_would_feed_is_refused(place):
    with pytest.raises(UserError, match=r"guards\.overfit_patience needs evaluations and checkpoints"):
        load_recipe(place / "recipe", stage_types(), ["nan.guards.overfit_patience=2"])
    with pytest.raises(UserError, match=r"nan\.yaml: guards\.loss_spike = 1"):
        load_recipe(place / "recipe", stage_types(), ["nan.guards.loss_spike=1"])


def test_guards_as_they_are_change_no_fingerprint(place):
    def config(*overrides: str) -> dict:
        return artifact.hashed_config(load_recipe(place / "recipe", stage_types(), overrides).stages["nan"], 0, 1)

    assert "guards" not in config()
    assert config() == config("nan.guards.max_rollbacks=9", "nan.guards.rehearse=false")  # neither decides a result
    assert config() != config("nan.guards.loss_spike=null")
    assert config("nan.trainer.eval_strategy=steps") != config()  # an evaluation may end the training
    lifted = "nan.guards.overfit_patience=null"
    assert config("nan.trainer.eval_strategy=steps", lifted) == config(lifted)
