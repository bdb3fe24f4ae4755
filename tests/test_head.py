"""The log-probabilities that TRL's trainers learn from on a CPU: upstream's own, of the positions that are scored."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from trl.kernels.chunked_logprob import OPTIONAL_OUTPUTS, ChunkedLogProbFunction
from trl.trainer import utils

from hfpipe.training import head

from .conftest import stage_json
from .test_nothing_lost import begun

WORDS, WIDTH, POSITIONS = 97, 16, 40


@pytest.fixture
def in_place(monkeypatch):
    """The replacement in place, and upstream's own back at the end."""
    for name in ("_ChunkedLogProbFunction", "_use_triton"):
        monkeypatch.setattr(utils, name, getattr(utils, name))  # itself: only to be put back after the test
    head.keep_logits_on_cpu()


@pytest.fixture
def model(in_place):
    torch.manual_seed(0)
    size = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, **size))
    utils.add_fused_lm_head(model, outputs=OPTIONAL_OUTPUTS)
    return model


def tensors(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, requires_grad=True)
        for shape in ((POSITIONS, WIDTH), (WORDS, WIDTH), (WORDS,))
    )
    return hidden, weight, bias, torch.randint(WORDS, (POSITIONS,), generator=generator)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(("temperature", "scale"), [(1.0, 1.0), (0.7, 2.5)])
@pytest.mark.parametrize("biased", [False, True])
def test_values_and_gradients_are_upstream_s(softcap, temperature, scale, biased):
    found = []
    for function in (ChunkedLogProbFunction.apply, head.score):
        hidden, weight, bias, targets = tensors()
        bias = bias if biased else None
        got = function(hidden, weight, bias, targets, temperature, 32, softcap, scale, OPTIONAL_OUTPUTS)
        (got[0].sum() + 0.3 * got[1].sum()).backward()
        given = [one for one in (hidden, weight, bias) if one is not None]
        found.append([*(one.detach() for one in got), *(one.grad for one in given)])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_what_is_not_wanted_is_not_made():
    assert head.score(*tensors(), 1.0, 32)[1:] == (None, None, None, None)


@pytest.mark.parametrize("kept", [head.KEPT, 0], ids=["kept", "upstream's tiles"])
def test_only_scored_positions_are_projected(model, monkeypatch, kept):
    """The loss is that of the whole logits, whichever way goes over the positions."""
    ids = torch.randint(WORDS, (3, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :7] = -100
    expected = model(input_ids=ids, labels=labels).loss
    seen = []

    def counted(way, function):
        return lambda *given: seen.append((way, len(given[0]))) or function(*given)

    tiles = type("Tiles", (), {"apply": counted("tiles", head._upstream.apply)})
    monkeypatch.setattr(head, "KEPT", kept)  # a size at which logits are not kept, in place of gigabytes of them
    monkeypatch.setattr(head, "score", counted("kept", head.score))  # the real one, its positions counted
    monkeypatch.setattr(head, "_upstream", tiles)  # the real one, its positions counted
    output = model(input_ids=ids, labels=labels, fused_lm_head=True)
    assert seen == [("kept" if kept else "tiles", 3 * 5)]
    torch.testing.assert_close(output.loss, expected)
    assert output.log_probs.shape == (3, 11)
    assert bool((output.log_probs[:, :6] == 0).all())


def test_a_batch_without_a_trained_token_has_a_loss_of_nothing(model):
    ids = torch.randint(WORDS, (2, 6))
    output = model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
    output.loss.backward()
    assert output.loss == 0
    assert all(bool((p.grad == 0).all()) for p in model.parameters() if p.grad is not None)


def test_products_in_half_precision_stay_near(model):
    ids = torch.randint(WORDS, (2, 12))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
    assert rounded.dtype == torch.float32
    whole = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
    torch.testing.assert_close(rounded, whole, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_stage_scores_this_way(stage, micro_run, tmp_path, monkeypatch):
    """As many positions as are trained, in every step; the stage runs in this process, to be looked into."""
    from hfpipe.config import load_recipe
    from hfpipe.stages import stage_types
    from hfpipe.stages._run import run_stage
    from hfpipe.training.job import Progress, make_job

    upstream, sizes = head.score, []
    monkeypatch.setattr(head, "score", lambda *a: sizes.append(len(a[0])) or upstream(*a))  # the real one, counted
    for name in ("_ChunkedLogProbFunction", "_use_triton"):
        monkeypatch.setattr(utils, name, getattr(utils, name))  # itself: only to be put back after the test
    settings = [f"{stage}.trainer.max_steps=2", f"{stage}.trainer.report_to=none"]
    recipe = load_recipe("micro", stage_types(), settings)
    run = begun(micro_run, tmp_path / "run", stage)
    run_stage(make_job(recipe, recipe.stages[stage], run), Progress(None))
    assert stage_json(run / stage)["metrics"]["steps"] == 2
    rows = recipe.stages[stage].trainer["per_device_train_batch_size"] * recipe.stages[stage].trainer["max_length"]
    assert sizes
    assert max(sizes) < rows * (2 if stage == "dpo" else 1) * 0.8


def test_pairs_keep_their_own_reference(micro_run, tmp_path, monkeypatch):
    """The reference reads pairs by length; each pair's log-probabilities are what the parent alone gives to it."""
    import hfpipe.training.fit as fit
    from hfpipe.config import load_recipe
    from hfpipe.stages import stage_types
    from hfpipe.stages.dpo import train
    from hfpipe.training.job import Progress, make_job

    for name in ("_ChunkedLogProbFunction", "_use_triton"):
        monkeypatch.setattr(utils, name, getattr(utils, name))  # itself: only to be put back after the test
    built = []
    monkeypatch.setattr(fit, "fit", lambda job, trainer, *_: built.append(trainer) or {})  # looked at as it was built
    recipe = load_recipe("micro", stage_types(), ["dpo.trainer.bf16=false", "dpo.trainer.report_to=none"])
    run = begun(micro_run, tmp_path / "run", "dpo")
    train(make_job(recipe, recipe.stages["dpo"], run), Progress(None))
    parent = AutoModelForCausalLM.from_pretrained(run / "sft").eval()
    told, alone = [], []
    for pair in built[0].train_dataset.select(range(24)):
        for answer in ("chosen", "rejected"):
            prompt, said = pair["prompt_ids"], pair[f"{answer}_ids"]
            with torch.no_grad():
                every = parent(torch.tensor([prompt + said])).logits[0].log_softmax(-1)
            alone.append(sum(every[len(prompt) + i - 1, word].item() for i, word in enumerate(said)))
            told.append(pair[f"ref_{answer}_logps"])
    assert told == pytest.approx(alone, rel=0.01)  # some may come from a cache, where bf16 wrote them
    assert len({round(value) for value in alone}) > 10
