"""`model.compile_blocks`: the same training, compiled; and uncompiled, said so, where nothing compiles."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from hfpipe.errors import UserError
from hfpipe.training.compiled import _compile, _Failure, compiled_blocks
from hfpipe.training.job import Progress

from .conftest import hfpipe, stage_json
from .test_nothing_lost import begun, kill, start, wait_for

PLAIN = "the blocks train as they are"


def compiled(stage: str, *more: str) -> list[str]:
    """Arguments of a run of one stage, its rows of many lengths, compiled."""
    given = (f"{stage}.model.compile_blocks=true", *more)
    return ["--only", stage, *(word for one in given for word in ("--set", one))]


def moved(folder: Path, parent: Path) -> torch.Tensor:
    new, old = load_file(folder / "model.safetensors"), load_file(parent / "model.safetensors")
    return torch.cat([(new[name] - old[name]).flatten() for name in sorted(old)])


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_compiled_stage_learns_the_same(stage, micro_run, tmp_path):
    """Up to rounding: its steps go the way of those that are not compiled, and its losses are theirs."""
    run = begun(micro_run, tmp_path / "run", stage)
    told = hfpipe("run", "micro", "--out", run, *compiled(stage)).stdout
    blocks = stage_json(micro_run / stage)
    assert "compiled: the passes of 2 blocks in training" in told
    assert PLAIN not in told
    parent = micro_run / blocks["parent"]["from"]
    ours, theirs = moved(run / stage, parent), moved(micro_run / stage, parent)
    assert not torch.equal(ours, theirs)  # another program has run
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.95
    losses = [stage_json(folder / stage)["metrics"]["train_loss"] for folder in (run, micro_run)]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


def test_a_killed_compiled_stage_goes_on_to_the_same_bits(micro_run, tmp_path):
    """Pairs are of many lengths, and the resumed half begins with another than the whole did."""
    given = compiled("dpo", "dpo.trainer.save_steps=4")
    whole, killed = (begun(micro_run, tmp_path / name, "dpo") for name in ("whole", "killed"))
    told = hfpipe("run", "micro", "--out", whole, *given).stdout
    process = start(killed, *given)
    assert wait_for(process, lambda: list((killed / "dpo.partial" / "checkpoints").glob("checkpoint-*/checksums.json")))
    told += kill(process)
    assert not (killed / "dpo").exists()
    resumed = hfpipe("run", "micro", "--out", killed, *given).stdout
    assert "resumed from checkpoint-" in resumed
    assert PLAIN not in told + resumed
    assert (killed / "dpo" / "model.safetensors").read_bytes() == (whole / "dpo" / "model.safetensors").read_bytes()


def test_a_last_batch_too_small_for_the_program_gets_none_of_its_own(micro_run, tmp_path):
    """33 rows by 32: the one that is left would be compiled for half a minute."""
    run = begun(micro_run, tmp_path / "run", "sft")
    rows = "sft.data.train=[{path: tinyworld/sft, limit: 33}]"
    given = compiled("sft", rows, "sft.trainer.packing=false", "sft.trainer.per_device_train_batch_size=32")
    told = hfpipe("run", "micro", "--out", run, *given, env={"TORCH_LOGS": "recompiles,graph_code"}).stdout
    assert PLAIN not in told
    assert stage_json(run / "sft")["metrics"]["steps"] == 2
    log = (run / "logs" / "sft.log").read_text()
    assert log.count("TRACED GRAPH") == 1
    assert "Recompiling" not in log


def test_shorter_batches_run_the_program_and_only_fewer_rows_do_not(monkeypatch):
    ran, compile_ = [], torch.compile

    def counting(*args, **options):
        program = compile_(*args, **options)
        return lambda *given, **named: ran.append(given[0].shape[:2]) or program(*given, **named)

    monkeypatch.setattr(torch, "compile", counting)  # the real one, its calls counted
    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 64,
    }
    model = LlamaForCausalLM(LlamaConfig(attn_implementation="sdpa", **small)).train()
    failure = _Failure(Progress(None))
    for block in compiled_blocks(model, "x.yaml"):
        _compile(block, failure)
    for shape in ((4, 32), (4, 16), (3, 32), (4, 9)):
        ids = mask = torch.ones(shape, dtype=torch.long)
        model(input_ids=ids, attention_mask=mask).logits.sum().backward()  # none is needed, and sdpa gets none
        model(input_ids=ids, attention_mask=mask.index_fill(1, torch.tensor([0]), 0)).logits.sum().backward()
    assert not failure.happened
    assert set(ran) == {(4, 32), (4, 16), (4, 9)}
    assert len(ran) == 3 * 2 * 2  # shapes, masks and blocks
    torch.compiler.config.cache_key_tag = ""


# The gradients of two rows of tokens after the passes of given numbers of tokens, in a process of its own.
GRADIENTS = """
import hashlib, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from hfpipe.training.compiled import _compile, _Failure, compiled_blocks
torch.manual_seed(0)
size = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, attn_implementation="eager", **size)).train()
class Progress:
    def note(self, text):
        sys.exit(text)
for block in compiled_blocks(model, "here"):
    _compile(block, _Failure(Progress()))
for length in map(int, sys.argv[1:]):
    model.zero_grad()
    ids = torch.randint(0, 64, (32, length), generator=torch.Generator().manual_seed(32_000 + length))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
print(hashlib.sha256(b"".join(p.grad.numpy().tobytes() for p in model.parameters())).hexdigest())
"""


def test_what_another_training_compiled_first_changes_nothing(tmp_path):
    """Which program serves all lengths is decided by the first one; after so few tokens it is another than after 48.

    How few depends on the processor's vectors: 29 where they hold 512 bits, 9 where they hold 256.
    """

    def gradients(cache: str, *lengths: str) -> str:
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / cache)}
        command = [sys.executable, "-c", GRADIENTS, *lengths]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    alone = gradients("one", "48")
    other = next((first for first in ("29", "9") if gradients(first, first, "48") != alone), None)
    assert other  # else this test shows nothing
    assert gradients(other, "48") == alone


def test_the_longest_rows_come_first(micro_run, tmp_path):
    """Without a rehearsal too, as where a training is resumed; the stage runs in this process, to be looked into."""
    from hfpipe.config import load_recipe
    from hfpipe.stages import stage_types
    from hfpipe.stages._run import run_stage
    from hfpipe.training.job import Progress, make_job

    begun_with = []
    for rehearse in ("true", "false"):
        settings = ["model.compile_blocks=true", f"guards.rehearse={rehearse}", "trainer.max_steps=2"]
        recipe = load_recipe("micro", stage_types(), [f"dpo.{setting}" for setting in settings])
        run = begun(micro_run, tmp_path / rehearse, "dpo")
        try:
            run_stage(make_job(recipe, recipe.stages["dpo"], run), Progress(None))
            begun_with.append(torch.compiler.config.cache_key_tag)
        finally:
            torch.compiler.config.cache_key_tag = ""
    assert "tokens first" in begun_with[0]
    assert begun_with[0] == begun_with[1]


def test_without_a_compiler_the_same_command_trains_uncompiled(micro_run, tmp_path):
    """To the bits of a stage that asks for none, and the reason is told once."""
    run = begun(micro_run, tmp_path / "run", "sft")
    bare = {"CXX": str(tmp_path / "no-such-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "kernels")}
    told = hfpipe("run", "micro", "--out", run, *compiled("sft"), env=bare).stdout
    assert told.count(PLAIN) == 1
    assert (run / "sft" / "model.safetensors").read_bytes() == (micro_run / "sft" / "model.safetensors").read_bytes()


def test_an_adapter_is_compiled_with_its_block_and_merged_without(micro_run, tmp_path):
    run = begun(micro_run, tmp_path / "run", "sft")
    adapter = "sft.adapter={type: lora, r: 4, lora_alpha: 8, target_modules: all-linear}"
    more = (
        "sft.regularize=null",
        "sft.optimizer=null",
        "sft.trainer.max_steps=4",
        "sft.trainer.gradient_checkpointing=true",
    )
    told = hfpipe("run", "micro", "--out", run, *compiled("sft", adapter, *more)).stdout
    assert PLAIN not in told
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(5, 25).unsqueeze(0)
    merged = AutoModelForCausalLM.from_pretrained(run / "sft")(tokens).logits
    adapted = AutoPeftModelForCausalLM.from_pretrained(run / "sft" / "adapter")(tokens).logits
    parent = AutoModelForCausalLM.from_pretrained(run / "midtrain")(tokens).logits
    assert torch.allclose(merged, adapted, atol=1e-4)
    assert not torch.allclose(merged, parent, atol=1e-3)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["sft.trainer.torch_compile=true"], "trainer.torch_compile beside model.compile_blocks"),
        (
            ["sft.trainer.fsdp=full_shard", "sft.regularize=null"],
            "model.compile_blocks takes a model that is whole on each device",
        ),
    ],
)
def test_what_does_not_go_with_it_is_refused(overrides, expected, tmp_path):
    sets = [word for one in ("sft.model.compile_blocks=true", *overrides) for word in ("--set", one)]
    assert expected in hfpipe("plan", "micro", "--out", tmp_path / "none", *sets, check=2).stderr


def test_a_model_without_a_list_of_blocks_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=3, n_head=2, n_positions=16))
    assert len(compiled_blocks(model, "x.yaml")) == 3
    model.config.n_layer = 4  # as in a family that goes through its three blocks four times
    with pytest.raises(UserError, match=r"x\.yaml: model\.compile_blocks: a gpt2 model keeps its blocks in no list"):
        compiled_blocks(model, "x.yaml")
