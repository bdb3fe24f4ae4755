"""`model.share_prefixes`: pairs in half as many rows, to the same hidden states, gradients and losses."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from hfpipe.config import load_recipe
from hfpipe.errors import UserError
from hfpipe.stages import stage_types
from hfpipe.stages._run import run_stage
from hfpipe.training.job import Progress as Told
from hfpipe.training.job import make_job
from hfpipe.training.order import ByLength, lengths
from hfpipe.training.prefixes import check_shares, fold, share_prefixes

from .conftest import hfpipe, stage_json
from .test_nothing_lost import begun, kill, start, wait_for

TOLD = "what both sides of a pair begin with is read once"
SIZES = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "qwen3": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    "gemma3_text": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
        "num_key_value_heads": 2, "layer_types": ["full_attention", "full_attention"],
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
}  # fmt: skip


class Progress:
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


class Job:
    """The little of a stage's job that is asked for here."""

    class stage:
        file = "x.yaml"

        class model:
            share_prefixes = True


def make(kind, attention="eager", head=AutoModelForCausalLM, **more):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=90, **SIZES[kind], **more)
    return head.from_config(config, attn_implementation=attention).train()


def pairs(shared, chosen, rejected):
    """Upstream's rows of pairs with so many tokens in common and in each side, and their mask."""
    torch.manual_seed(1)
    width = max(*chosen, *rejected) + 2
    first = torch.randint(5, 90, (len(shared), width))
    second = first.clone()
    for n, common in enumerate(shared):
        second[n, common:] = (first[n, common:] + 7) % 85 + 5
    mask = (torch.arange(width) < torch.tensor([*chosen, *rejected])[:, None]).long()
    return torch.cat([first, second]) * mask, mask


# Something of each own, nothing of the chosen one's own, nothing of the rejected one's, both the same.
PAIRS = pairs([12, 14, 11, 15], [17, 14, 18, 15], [16, 18, 11, 15])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "gpt2"])
def test_hidden_states_and_gradients_are_the_same(kind, attention):
    model = make(kind, attention).eval()  # gpt2 has dropout
    (ids, mask), widths = PAIRS, []

    def passed():
        model.zero_grad()
        hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        ((hidden * mask[..., None]) ** 3).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        return (hidden * mask[..., None]).detach(), gradient

    alone = passed()
    share_prefixes(Job, model, Progress())
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: widths.append(args[0].shape))
    together = passed()
    assert widths == [(4, 21)]  # of 8 rows of 20
    for ours, theirs in zip(together, alone, strict=True):
        assert theirs.norm() > 1e-3
        assert torch.allclose(ours, theirs, atol=1e-5 * theirs.abs().max(), rtol=1e-4)


def test_a_reward_model_s_scores_are_the_same():
    """Its head calls the backbone otherwise than a language model's, and looks for the last token in upstream's rows."""
    model = make("llama", head=AutoModelForSequenceClassification, num_labels=1, pad_token_id=0)
    (ids, mask), rows = PAIRS, []
    alone = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    share_prefixes(Job, model, Progress())
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    assert torch.allclose(model(input_ids=ids, attention_mask=mask, use_cache=False).logits, alone, atol=1e-6)
    assert rows == [4]
    assert alone.std() > 0.01


def test_what_would_not_pay_or_is_no_pair_stays_as_it_is():
    ids, mask = PAIRS
    assert fold(*PAIRS) is not None
    assert fold(ids[:7], mask[:7]) is None  # an odd number of rows
    assert fold(ids.flip(1), mask.flip(1)) is None  # padded on the left
    assert fold(*pairs([2, 3], [12, 12], [12, 12])) is None  # hardly anything in common
    model, rows = make("llama").eval(), []
    share_prefixes(Job, model, Progress())
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    with torch.inference_mode():
        answers = model.generate(ids[:, :8], attention_mask=mask[:, :8], max_new_tokens=4, do_sample=False)
    assert set(rows) == {8}  # answers are of rows, not of pairs
    assert torch.equal(answers, make("llama").eval().generate(ids[:, :8], max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize(
    ("config", "attention", "told"),
    [
        (make("llama").config, "flash_attention_2", r"attn_implementation flash_attention_2\. Set model.attn_implementation"),
        (AutoConfig.for_model("gemma3_text"), "sdpa", r"layers of sliding_attention\. Leave it out"),
        (AutoConfig.for_model("mamba"), None, "layers of linear_attention"),
        (AutoConfig.for_model("mixtral"), "sdpa", "experts, whose balance is learnt"),
        (AutoConfig.for_model("mistral", sliding_window=64), None, "a sliding window of 64 tokens"),
    ],
)  # fmt: skip
def test_attention_that_takes_no_mask_of_ours_is_refused(config, attention, told):
    with pytest.raises(UserError, match=rf"x\.yaml: model\.share_prefixes .*{told}"):
        check_shares(config, attention, "x.yaml")


def test_a_model_that_would_read_it_otherwise_is_refused():
    """Falcon's ALiBi tells positions by places in the row."""
    with pytest.raises(UserError, match=r"x\.yaml: model\.share_prefixes: a falcon model reads .* Leave it out"):
        share_prefixes(Job, make("falcon", None), Progress())


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["sft.model.share_prefixes=true"], "in a sft stage, whose rows are no pairs of answers"),
        (["dpo.model.share_prefixes=true", "dpo.adapter={type: prompt, num_virtual_tokens: 4}"], "with a prompt adapter"),
        (["dpo.model={from: sft, share_prefixes: true, compile_blocks: true}"], "beside model.compile_blocks"),
        (["dpo.model.share_prefixes=true", "launch.accelerate_config=fsdp2"], "takes a model that is whole on each device"),
        (["dpo.model.share_prefixes=true", "dpo.model.attn_implementation=flex_attention"], "attn_implementation flex_attention"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_before_anything_trains(settings, told, tmp_path):
    asked = [word for one in settings for word in ("--set", one)]
    result = hfpipe("run", "micro", "--out", tmp_path / "run", *asked, check=2)
    assert "model.share_prefixes" in result.stderr
    assert told in result.stderr
    assert not list((tmp_path).glob("run/*/model.safetensors"))


REWARD = """stage: reward
model: {from: sft, share_prefixes: true}
data: {train: [{path: tinyworld/preferences, limit: 64}], eval: [{path: tinyworld/preferences, limit: 16}]}
trainer: {max_steps: 3, per_device_train_batch_size: 16, train_sampling_strategy: group_by_length, activation_checkpointing: false}
"""


@pytest.mark.parametrize("stage", ["dpo", "reward"])
def test_a_stage_s_own_passes_are_shared(stage, recipe, micro_run, tmp_path, monkeypatch):
    """All but those of a rehearsal, which asks for the most memory; the stage runs in this process, to be looked into."""
    folder, asked = recipe({"reward": REWARD}), []
    pipeline = folder / "pipeline.yaml"
    pipeline.write_text(pipeline.read_text().replace("sft, dpo", "sft, dpo, reward"))
    settings = ["dpo.model.share_prefixes=true", "dpo.trainer.max_steps=3"]
    loaded = load_recipe(folder, stage_types(), settings)
    run = begun(micro_run, tmp_path / "run", "dpo")

    def told(ids, mask):
        found = fold(ids, mask)
        asked.append((torch.is_grad_enabled(), found is not None))
        return found

    monkeypatch.setattr("hfpipe.training.prefixes.fold", told)  # the real one, its answers noted
    run_stage(make_job(loaded, loaded.stages[stage], run), Told(None))
    trained = [shared for gradients, shared in asked if gradients]
    assert trained == [True] * 3
    assert all(shared for _, shared in asked)
    assert len(asked) > (10 if stage == "dpo" else 3)  # the reference and what is held out


def test_where_nothing_is_worth_it_that_is_told_once(monkeypatch):
    monkeypatch.setattr("hfpipe.training.prefixes._TRIED", 3)  # batches, in place of fifty
    model, progress = make("llama"), Progress()
    share_prefixes(Job, model, progress)
    ids, mask = pairs([2, 3], [12, 12], [12, 12])
    for _ in range(5):
        model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    assert [note for note in progress.notes if "saves nothing: in 3 batches" in note] == progress.notes[1:]
    assert len(progress.notes) == 2


def test_a_dpo_stage_learns_the_same_and_goes_on_to_the_same_bits(micro_run, tmp_path):
    plain, whole, killed = (begun(micro_run, tmp_path / name, "dpo") for name in ("plain", "whole", "killed"))
    shared = ["--only", "dpo", "--set", "dpo.model.share_prefixes=true", "--set", "dpo.trainer.save_steps=4"]
    hfpipe("run", "micro", "--out", plain, "--only", "dpo", "--set", "dpo.trainer.save_steps=4")
    assert TOLD in hfpipe("run", "micro", "--out", whole, *shared).stdout
    start_from = load_file(micro_run / "sft" / "model.safetensors")
    ours, theirs = (
        torch.cat([(found[name] - start_from[name]).flatten() for name in sorted(start_from)])
        for found in (load_file(run / "dpo" / "model.safetensors") for run in (whole, plain))
    )
    assert not torch.equal(ours, theirs)
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.95
    losses = [stage_json(run / "dpo")["metrics"]["train_loss"] for run in (whole, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    process = start(killed, *shared)
    assert wait_for(process, lambda: list((killed / "dpo.partial" / "checkpoints").glob("checkpoint-*/checksums.json")))
    kill(process)
    assert "resumed from checkpoint-" in hfpipe("run", "micro", "--out", killed, *shared).stdout
    assert (killed / "dpo" / "model.safetensors").read_bytes() == (whole / "dpo" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("adapter", ["{type: lora, r: 4}", "{type: bottleneck}"])
def test_an_adapter_s_reference_is_the_base_also_so(adapter, micro_run, tmp_path):
    """The margin at the start is checked by the stage: policy and reference go through the same rows."""
    run = begun(micro_run, tmp_path / "run", "dpo")
    told = hfpipe(
        "run", "micro", "--out", run, "--only", "dpo", "--set", "dpo.model.share_prefixes=true", "--set", f"dpo.adapter={adapter}",
        "--set", "dpo.regularize={}",
    )  # fmt: skip
    assert TOLD in told.stdout
    metrics = stage_json(run / "dpo")["metrics"]
    assert abs(metrics["pairs_before"]["margin"]) < 0.01
    assert metrics["pairs"]["accuracy"] > 0.5


def test_a_step_has_pairs_of_about_one_length_in_their_one_row():
    from datasets import Dataset

    rows = [
        {"prompt_ids": [1] * own, "chosen_ids": [2] * common + [3] * a, "rejected_ids": [2] * common + [4] * b}
        for own, common, a, b in [(4, 3, 2, 5), (9, 0, 1, 1), (2, 6, 0, 3), (5, 5, 2, 2)]
    ]
    data = Dataset.from_list(rows)
    assert lengths(data, shared=True) == [14, 11, 11, 14]
    assert lengths(data, shared=False) == [12, 10, 11, 12]
    steps = list(ByLength(lengths(data, shared=True), 2, 0))
    assert {frozenset(steps[:2]), frozenset(steps[2:])} == {frozenset([0, 3]), frozenset([1, 2])}
