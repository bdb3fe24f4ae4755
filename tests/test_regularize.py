"""What holds a stage to its parent: the pull of L2, frozen layers, rates that fall with depth; in every stage that has a parent."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from hfpipe.config import load_recipe
from hfpipe.errors import UserError
from hfpipe.stages import stage_types
from hfpipe.training.job import make_job
from hfpipe.training.models import try_regularize
from hfpipe.training.optim import build_muon
from hfpipe.training.regularize import PullToParent, freeze_layers, spread_rates, take_in

from .conftest import hfpipe, stage_json
from .test_config import problems
from .test_nothing_lost import kill, start
from .test_reinforce import VOWELS
from .test_training import json_safe, tiny_llama, weights

LORA = "{type: lora, r: 2, lora_alpha: 6, target_modules: all-linear}"
TRAINER = (
    "{learning_rate: RATE, lr_scheduler_type: constant, max_steps: STEPS, per_device_train_batch_size: 4, logging_steps: 1, "
    "max_length: 256, save_strategy: 'no'}"
)
ROLLOUTS = (
    "{learning_rate: 1.0e-3, max_steps: 2, per_device_train_batch_size: 8, num_generations: 2, max_completion_length: 8, "
    "logging_steps: 1, save_strategy: 'no', beta: 0.05}"
)
SAVED = "{learning_rate: 5.0e-3, max_steps: 40, per_device_train_batch_size: 8, logging_steps: 1, save_steps: 5, max_length: 256}"
PLAIN = (
    "{learning_rate: 0.02, optim: sgd, max_steps: 6, per_device_train_batch_size: 4, logging_steps: 1, max_length: 256}"
)
HELD = "{l2_to_parent: 0.1, freeze_layers: 1, layerwise_lr_decay: 0.5}"
AVERAGED = "{average_with_parent: 0.25}"
# name -> (kind of stage, regularize, the rest)
STAGES = {
    "free": ("sft", "{}", ""),
    "pulled": ("sft", "{l2_to_parent: 1.0, freeze_embeddings: true}", ""),
    "muon": ("sft", "{l2_to_parent: 0.5, layerwise_lr_decay: 0.5}", "optimizer: {type: muon, lr: 0.01}"),
    "first": ("midtrain", "{freeze_layers: 1}", ""),
    "last": ("sft", "{freeze_layers: -1}", ""),
    "named": ("sft", "{freeze_layers: [embed_tokens, 'layers.[01].mlp', layers.1.self_attn.q_proj]}", ""),
    "decayed": ("sft", "{layerwise_lr_decay: 0.1}", "trainer: STEP"),
    "lora": ("sft", "{l2_to_parent: 0.1, layerwise_lr_decay: 0.5}", f"adapter: {LORA}"),
    "saved": ("sft", "{l2_to_parent: 0.05, average_with_parent: 0.2, layerwise_lr_decay: 0.7}", f"trainer: {SAVED}"),
    "plain": ("sft", "{l2_to_parent: 10.0}", f"trainer: {PLAIN}"),
    "lora-reward": ("reward", "{l2_to_parent: 0.1}", f"adapter: {LORA}"),
    "averaged": ("sft", AVERAGED, ""),
    "lora-free": ("sft", "{}", f"adapter: {LORA}"),
    "lora-averaged": ("sft", AVERAGED, f"adapter: {LORA}"),
    "reward-free": ("reward", "{}", ""),
    "reward-averaged": ("reward", AVERAGED, ""),
    "ppo-free": ("ppo", "{}", f"trainer: {ROLLOUTS}"),
    "ppo-averaged": ("ppo", AVERAGED, f"trainer: {ROLLOUTS}"),
    "dpo": ("dpo", HELD, ""),
    "kto": ("kto", HELD, ""),
    "reward": ("reward", HELD, ""),
    "grpo": ("grpo", HELD, f"trainer: {ROLLOUTS}"),
    "rloo": ("rloo", HELD, f"trainer: {ROLLOUTS}"),
    "ppo": ("ppo", HELD, f"trainer: {ROLLOUTS}"),
}  # fmt: skip
ROWS = {"dpo": "preferences", "kto": "preferences", "reward": "preferences"}


def write(folder: Path, parent: Path, stages: dict[str, tuple[str, str, str]] = STAGES) -> Path:
    """A recipe whose stages all start from the folder `parent`."""
    folder.mkdir(exist_ok=True)
    head = f"name: held\nstages: [{', '.join(stages)}]\nevaluate: {{samples: 0}}\n"
    (folder / "pipeline.yaml").write_text(head)
    for name, (kind, regularize, rest) in stages.items():
        text = (
            f"stage: {kind}\nmodel: {{from: {parent}, attn_implementation: eager}}\nregularize: {regularize}\n{rest}\n"
        )
        rows = f"[{{path: tinyworld/{ROWS.get(kind, 'sft')}, limit: 60}}]"
        text += f"data: {{train: {rows}, eval: {rows if name in ('free', 'averaged') else []}}}\n"
        if kind in ("grpo", "rloo", "ppo"):
            (folder / "vowels.py").write_text(VOWELS)
            text += f'rewards: {{functions: [{{function: "{folder / "vowels.py"}:vowels"}}]}}\n'
        elif "trainer:" not in rest:
            text += f"trainer: {TRAINER.replace('RATE', '1.0e-2').replace('STEPS', '4')}\n"
        text = text.replace("trainer: STEP", f"trainer: {TRAINER.replace('RATE', '1.0e-3').replace('STEPS', '1')}")
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def held(micro_run, tmp_path_factory):
    """Run of a recipe with every key in every kind of stage, each from micro's sft: (the run, the parent's weights)."""
    root = tmp_path_factory.mktemp("held")
    hfpipe("run", write(root / "recipe", micro_run / "sft"), "--out", root / "run")
    return root / "run", weights(micro_run / "sft")


def logged(folder: Path, key: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if "loss" in line]


def squared(new: dict[str, torch.Tensor], old: dict[str, torch.Tensor]) -> float:
    return sum((new[name].double() - old[name].double()).square().sum().item() for name in old if name in new)


# --- the pull ---


def test_the_weights_stay_nearer_and_the_penalty_is_logged(held):
    run, parent = held
    free, pulled = weights(run / "free"), weights(run / "pulled")
    assert squared(pulled, parent) < 0.5 * squared(free, parent)
    told = logged(run / "pulled", "l2_to_parent")
    assert len(told) == 4
    assert told[-1] == pytest.approx(squared(pulled, parent), rel=1e-4)  # l2 is 1
    assert "l2_to_parent" not in (run / "free" / "metrics.jsonl").read_text()
    assert logged(run / "pulled", "loss")[0] == logged(run / "free", "loss")[0]  # the logged loss is the stage's own


def test_frozen_rows_stay_where_they_are_under_the_pull(held, micro_run):
    from transformers import AutoTokenizer

    run, parent = held
    special = sorted(AutoTokenizer.from_pretrained(micro_run / "sft").added_tokens_decoder)
    same = (weights(run / "pulled")["model.embed_tokens.weight"] == parent["model.embed_tokens.weight"]).all(dim=1)
    assert not same[special].all()
    same[special] = True
    assert same.all()


@pytest.mark.parametrize(
    ("name", "l2"),
    [
        ("muon", 0.5),
        ("lora", 0.1),
        ("lora-reward", 0.1),
        *((name, 0.1) for name, (_, keys, _) in STAGES.items() if keys == HELD),
    ],
)
def test_the_penalty_is_the_squared_distance_in_every_stage(held, name, l2):
    """Under LoRA that of the merged weights; of a reward model without its head."""
    run, parent = held
    told = logged(run / name, "l2_to_parent")[-1]
    left = weights(run / name)
    assert ("score.weight" in left) == ("reward" in name)
    assert told == pytest.approx(l2 * squared(left, parent), rel=1e-3)
    assert told > 0


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_trainer_takes_the_steps_of_the_loss_with_the_penalty(accumulation, tmp_path):
    """Weights after three clipped steps of SGD against autograd on the written-out loss, from weights that have left the parent."""
    from transformers import Trainer, TrainingArguments

    l2, rate, clip = 0.7, 0.05, 0.5
    rows = torch.randint(0, 64, (3 * accumulation * 2, 12), generator=torch.Generator().manual_seed(1))
    model, other = tiny_llama(), tiny_llama()
    parents = [p.detach().clone() for p in other.parameters()]
    args = TrainingArguments(
        str(tmp_path), learning_rate=rate, max_grad_norm=clip, optim="sgd", lr_scheduler_type="constant", max_steps=3,
        per_device_train_batch_size=2, gradient_accumulation_steps=accumulation, use_cpu=True, save_strategy="no",
        train_sampling_strategy="sequential", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = Trainer(model, args, train_dataset=data)
    pull = PullToParent(trainer.model, l2)
    take_in(trainer, pull)
    with torch.no_grad():
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            drift = torch.full_like(p, 0.01)
            p.add_(drift), q.add_(drift)
    trainer.train()
    told = []
    for step in range(3):
        batch = rows[step * accumulation * 2 :][: accumulation * 2]
        loss = other(input_ids=batch, labels=batch).loss
        pairs = zip(other.parameters(), parents, strict=True)
        (loss + l2 * sum((p - w).square().sum() for p, w in pairs)).backward()
        nn.utils.clip_grad_norm_(other.parameters(), clip)
        with torch.no_grad():
            for p in other.parameters():
                p -= rate * p.grad
        other.zero_grad()
        told.append(loss.item())
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)
    logs = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["loss"] for line in logs] == pytest.approx(told, abs=1e-3)
    assert logs[-1]["l2_to_parent"] == pytest.approx(pull.value())
    assert min(line["grad_norm"] for line in logs) > clip  # the penalty's gradient was there to be clipped


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"target_modules": ["q_proj", "embed_tokens"]}])
def test_lora_s_gradient_is_that_of_its_delta(options):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        tiny_llama(), LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **options})
    )
    start, low = PullToParent(model, 0.3), []
    assert start.copies == []
    assert start.value() == 0
    for a, b, scaling in start.pairs:
        nn.init.normal_(b, std=0.1)
        low.append((a, b, scaling))
        a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    penalty = 0.3 * sum((scaling * b @ a).square().sum() for a, b, scaling in low)
    assert start.value() == pytest.approx(penalty.item(), rel=1e-5)
    start.add_gradient(loss_scale=2.0)
    for a, b, _ in low:
        of_a, of_b = torch.autograd.grad(penalty, (a, b), retain_graph=True)
        torch.testing.assert_close(a.grad, 1 + 2 * of_a, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(b.grad, 1 + 2 * of_b, atol=1e-6, rtol=1e-5)


def test_a_killed_stage_goes_on_to_the_same_bits(held, micro_run, tmp_path):
    """The parent's weights are read from the parent again, not from the checkpoint."""
    whole, run = held[0] / "saved", tmp_path / "run"
    folder = write(tmp_path / "recipe", micro_run / "sft", {"saved": STAGES["saved"]})
    process = start(run, recipe=str(folder))
    while not list(run.glob("saved.partial/checkpoints/checkpoint-*")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    kill(process)
    assert "resumed from checkpoint-" in hfpipe("run", folder, "--out", run).stdout
    assert stage_json(run / "saved")["weights"] == stage_json(whole)["weights"]
    assert logged(run / "saved", "l2_to_parent") == logged(whole, "l2_to_parent")


def test_two_processes_feel_one_pull(held, micro_run, tmp_path):
    """Of twice the pull, 2 * 10 * 0.02 of the distance at each step, the distance would be another at once."""
    folder = write(tmp_path / "recipe", micro_run / "sft", {"plain": STAGES["plain"]})
    two = ["--set", "launch.processes=2", "--set", "plain.trainer.per_device_train_batch_size=2"]
    hfpipe("run", folder, "--out", tmp_path / "two", *two)
    one, two = (logged(run / "plain", "l2_to_parent") for run in (held[0], tmp_path / "two"))
    assert two == pytest.approx(one, rel=0.05)


# --- the average with the parent ---


@pytest.mark.parametrize(
    ("free", "averaged"),
    [("free", "averaged"), *((name, name.replace("free", "averaged")) for name in STAGES if name.endswith("-free"))],
)
def test_a_stage_leaves_the_average_of_what_it_trained_and_its_parent(held, free, averaged):
    """Under LoRA of the merged weights; a reward model's new head is left as trained."""
    run, parent = held
    trained, left = weights(run / free), weights(run / averaged)
    assert logged(run / averaged, "loss") == logged(run / free, "loss")
    for key, weight in trained.items():
        old = parent.get(key, weight)
        torch.testing.assert_close(left[key], 0.75 * weight + 0.25 * old, atol=1e-6, rtol=1e-5)
    assert any(not torch.equal(left[key], weight) for key, weight in trained.items())
    assert stage_json(run / averaged)["config"]["regularize"]["average_with_parent"] == 0.25


def test_what_is_measured_after_the_stage_is_the_average(held):
    run, _ = held
    shown = {name: stage_json(run / name)["metrics"]["validation"]["loss"] for name in ("free", "averaged")}
    assert shown["free"] != shown["averaged"]  # though both have trained the same


# --- frozen layers ---


@pytest.mark.parametrize(
    ("name", "frozen"),
    [
        ("first", ["layers.0."]),
        ("last", ["layers.1."]),
        ("named", ["embed_tokens", "layers.0.mlp", "layers.1.mlp", "layers.1.self_attn.q_proj"]),
        *((name, ["layers.0."]) for name, (_, keys, _) in STAGES.items() if keys == HELD),
    ],
)
def test_what_is_frozen_stays_and_the_rest_moves(held, name, frozen):
    run, parent = held
    left = weights(run / name)
    for key, old in parent.items():
        assert torch.equal(old, left[key]) == any(part in key for part in frozen), key


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (3, "freeze_layers = 3, but the model has 2 blocks."),
        (-3, "freeze_layers = -3, but the model has 2 blocks."),
        (["layer.0"], "names 'layer.0', but the model has no module or weight of that name. Did you mean `layers.0`?"),
        (
            ["embed_token"],
            "Did you mean `embed_tokens`? It has model, model.embed_tokens, model.layers, model.layers.*,",
        ),
        (["q_projj", "mlp"], "Did you mean `q_proj`?"),
        (["rotary_emb"], "names 'rotary_emb', which has no weights."),
        (["model"], "freeze_layers = ['model'] freezes all there is to train."),
        (["layers", "norm", "lm_head"], "freezes all there is to train."),
    ],
)
def test_layers_that_do_not_fit_the_model(layers, expected, micro_run, tmp_path):
    """Told before anything trains, with the shape of the nearest ancestor: here of pretraining's model, tied."""
    folder = write(tmp_path / "recipe", micro_run / "sft", {"sft": ("sft", json.dumps({"freeze_layers": layers}), "")})
    recipe = load_recipe(folder, stage_types())
    with pytest.raises(UserError) as caught:
        try_regularize(make_job(recipe, recipe.stages["sft"], tmp_path / "run"), [])
    assert str(caught.value).startswith(f"{folder / 'sft.yaml'}: regularize.freeze_layers")
    assert expected in str(caught.value)


def test_layers_are_looked_at_before_the_first_stage_trains(tmp_path):
    done = hfpipe("run", "micro", "--out", tmp_path / "run", "--set", "dpo.regularize.freeze_layers=5", check=2)
    assert "dpo.yaml: regularize.freeze_layers = 5, but the model has 2 blocks." in done.stderr
    assert not (tmp_path / "run" / "pretrain").exists()


def test_blocks_of_another_family_are_found():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=3, n_head=2, n_positions=16))
    freeze_layers(model, -1, "x.yaml")
    freeze_layers(model, ("wpe", "h.0.attn.c_attn.bias"), "x.yaml")
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    expected = {name for name in dict(model.named_parameters()) if ".h.2." in name or "wpe" in name}
    assert frozen == expected | {"transformer.h.0.attn.c_attn.bias"}


# --- rates that fall with depth ---


def test_lower_blocks_move_less(held):
    """AdamW's first step moves a weight by the learning rate: 1e-3, a tenth for the block below, a hundredth for the embeddings."""
    run, parent = held
    left = weights(run / "decayed")
    moved = {key: (left[key] - old).abs().max().item() for key, old in parent.items()}
    for key, distance in moved.items():
        share = 0.1 if ".layers.0." in key else 0.01 if "embed_tokens" in key else 1  # micro's head is tied
        assert distance == pytest.approx(1e-3 * share, rel=0.05), key
    assert logged(run / "decayed", "learning_rate") == [1e-3]


def rates(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, tuple[float, float]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names.get(id(p), "critic"): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }


def test_groups_keep_their_weight_decay_and_what_the_model_does_not_hold_keeps_its_rate():
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments("unused", learning_rate=1e-2, weight_decay=0.1, use_cpu=True)
    model, critic = tiny_llama(), nn.Parameter(torch.zeros(3, 3))
    optimizer = Trainer(model, args).create_optimizer()
    optimizer.add_param_group({"params": [critic], "lr": 0.5, "weight_decay": 0.2})
    spread_rates(optimizer, model, 0.5, "x.yaml")
    found = rates(optimizer, model)
    assert found["model.layers.1.mlp.up_proj.weight"] == (1e-2, 0.1)
    assert found["model.layers.0.mlp.up_proj.weight"] == (5e-3, 0.1)
    assert found["model.layers.0.input_layernorm.weight"] == (5e-3, 0)
    assert found["model.embed_tokens.weight"] == (2.5e-3, 0.1)
    assert found["model.norm.weight"] == (1e-2, 0)
    assert found["lm_head.weight"] == (1e-2, 0.1)
    assert found["critic"] == (0.5, 0.2)
    assert set(found) == {name for name, _ in model.named_parameters()} | {"critic"}
    assert optimizer.param_groups[0]["lr"] == 1e-2  # the one that the Trainer logs


def test_muon_s_rates_fall_too_and_schedules_and_checkpoints_keep_the_ratio():
    from transformers import TrainingArguments

    from hfpipe.sections import Optimizer

    def build():
        model = tiny_llama()
        args = TrainingArguments("unused", learning_rate=1e-3, use_cpu=True)
        optimizer = build_muon(model, Optimizer(type="muon", lr=0.02), args)
        spread_rates(optimizer, model, 0.5, "x.yaml")
        return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def step(model, optimizer, schedule):
        ids = torch.arange(32).view(2, 16)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step(), optimizer.zero_grad(), schedule.step()

    whole = build()
    before = [group["lr"] for group in whole[1].param_groups]
    assert before[0] == 0.02
    assert {(g["lr"]) for g in whole[1].param_groups} == {0.02, 0.01, 1e-3, 5e-4, 2.5e-4}
    for _ in range(2):
        step(*whole)
    assert [group["lr"] for group in whole[1].param_groups] == pytest.approx([lr / 3 for lr in before])
    resumed = build()
    resumed[0].load_state_dict(whole[0].state_dict())
    for part, state in zip(resumed[1:], whole[1:], strict=True):
        part.load_state_dict(json_safe(state.state_dict()))
    step(*whole)
    step(*resumed)
    assert all(torch.equal(a, b) for a, b in zip(whole[0].parameters(), resumed[0].parameters(), strict=True))


# --- what is refused in a recipe ---


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sft.regularize.l2_to_parent=-1", "regularize.l2_to_parent = -1.0: expected 0 or more."),
        ("sft.regularize.l2_to_parent=.inf", "regularize.l2_to_parent = inf: expected a finite number."),
        ("sft.regularize.l2_to_parent=lots", "regularize.l2_to_parent = 'lots' is str; expected float."),
        ("sft.regularize.layerwise_lr_decay=0", "regularize.layerwise_lr_decay = 0.0: expected more than 0."),
        ("sft.regularize.layerwise_lr_decay=1.1", "regularize.layerwise_lr_decay = 1.1: expected at most 1"),
        ("sft.regularize.freeze_layers=1.5", "regularize.freeze_layers = 1.5: expected int or a list of str."),
        ("sft.regularize.freeze_layers=[1]", "regularize.freeze_layers = [1]: expected int or a list of str."),
        ("sft.regularize.freeze_layers=mlp", "regularize.freeze_layers = 'mlp': expected int or a list of str."),
        ("sft.regularize.freeze_layer=1", "Did you mean `freeze_layers`?"),
        ("sft.freeze.layers=1", "freeze is not a section of a sft stage."),
        ("sft.regularize.average_with_parent=-0.1", "regularize.average_with_parent = -0.1: expected 0 or more"),
        ("sft.regularize.average_with_parent=1", "average_with_parent = 1 would leave the parent as it is: give less."),
        ("pretrain.regularize.average_with_parent=0.1", "average_with_parent = 0.1: the model is made from scratch"),
        ("pretrain.regularize.l2_to_parent=0.1", "the model is made from scratch, by model.config"),
        ("sft.trainer.optim=lomo", "regularize.l2_to_parent = 0.1 with trainer.optim = 'lomo'"),
        ("sft.trainer.optim=galore_adamw_layerwise", "which steps inside the backward pass"),
        ("launch.accelerate_config=fsdp2", "regularize.l2_to_parent = 0.1 takes a model that is whole on each device"),
        ("launch.accelerate_config=fsdp2 sft.regularize.freeze_embeddings=true", "regularize.freeze_embeddings = True takes a model that"),
        ("launch.accelerate_config=fsdp2 sft.optimizer.type=muon", "optimizer.type = 'muon' takes a model that is whole"),
        ("launch.accelerate_config=zero3", "does not go together with FSDP and DeepSpeed"),
        ("sft.trainer.fsdp=true", "takes a model that is whole on each device"),
        ("sft.adapter={type: lora, use_dora: true}", "beside adapter.use_dora: the delta is not scaling * B @ A."),
        ("sft.adapter={type: lora, init_lora_weights: pissa_niter_4}", "which changes the base too"),
    ],
)  # fmt: skip
def test_one_fault_one_message(recipe, override, expected):
    held = [] if "regularize" in override else ["sft.regularize.l2_to_parent=0.1"]
    assert expected in problems(
        recipe(), [*held, *override.split(" sft.")[:1], *(f"sft.{one}" for one in override.split(" sft.")[1:])]
    )
