"""PPOTrainer against the PPOTrainer that TRL had until 1.12, in one run: reward at equal episodes, episodes a second.

    python -m venv trl112 && trl112/bin/pip install trl==1.12.0 torch==2.13.0 transformers==5.23.0
    python benchmarks/ppo_against_trl.py --trl112 trl112/bin/python [--seeds 3] [--rollouts 100]

Letters are rewarded that have the case of the prompt's first letter; a reward model is trained on pairs that this
orders, decoys among them. Every side starts from the same policy and reward model, in a process of its own, the sides
of a seed one after the other. Where `--trl112` is left out, our two critics are compared alone. `gc.collect`, which TRL
1.12 calls twice a rollout, does nothing on any side; one thread each.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

LENGTH = 16  # tokens of a completion
ROLLOUT = 64  # episodes
RECIPE = {"learning_rate": 5e-4, "gamma": 1.0, "lam": 0.95, "vf_coef": 0.1, "cliprange_value": 0.2}
KL, CLIP, EPOCHS = 0.02, 0.2, 4
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<eos>' }}{% endgeneration %}"
    "{% else %}{{ '?' + m.content + '!' }}{% endif %}{% endfor %}"
)


# --- the task ---


def score(prompt: str, completion: str) -> float:
    """The share of LENGTH places that hold a letter of the case of the prompt's first one."""
    return sum(c.isalpha() and c.islower() == prompt[0].islower() for c in completion[:LENGTH]) / LENGTH


def prompts(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(string.ascii_letters, k=draw.randint(2, 6))) for _ in range(count)]


def completion(draw: random.Random, prompt: str) -> str:
    """Letters at random, of one case, of few kinds, or cut short."""
    letters = draw.choice([string.ascii_letters, string.ascii_lowercase, string.ascii_uppercase])
    if draw.random() < 0.3:
        letters = "".join(draw.sample(letters, draw.randint(2, 8)))
    return "".join(draw.choices(letters, k=draw.choice([LENGTH, LENGTH - 1, draw.randint(1, LENGTH)])))


def build(folder: Path, options: argparse.Namespace) -> None:
    """A tokenizer, a policy that writes letters at random and a reward model, in `folder`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

    torch.manual_seed(0)
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *string.ascii_letters, "?", "!"])}
    built = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    built.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    built.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=built, pad_token="<pad>", eos_token="<eos>", padding_side="left", chat_template=TEMPLATE
    )
    shape = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=options.hidden, intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers, num_attention_heads=options.hidden // 16, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    policy, judge = LlamaForCausalLM(shape), LlamaForSequenceClassification(shape)
    judge.config.num_labels = 1
    judge.score = torch.nn.Linear(options.hidden, 1, bias=False)
    draw = random.Random(0)

    def encode(prompt: str, said: str) -> list[int]:
        return tokenizer(f"?{prompt}!{said}")["input_ids"] + [1] * (len(said) < LENGTH)

    def batch(rows: list[list[int]]) -> dict[str, torch.Tensor]:
        return dict(tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt"))

    steps = torch.optim.AdamW([*policy.parameters(), *judge.parameters()], lr=2e-3)
    for step in range(options.warmup):
        asked = prompts(64, step + 1000)
        rows = batch([encode(p, completion(draw, p)) for p in asked])
        loss = policy(**rows, labels=rows["input_ids"].masked_fill(rows["input_ids"] == 0, -100)).loss
        pairs = [sorted((completion(draw, p), completion(draw, p)), key=lambda c: -score(p, c)) for p in asked]
        better = judge(**batch([encode(p, pair[0]) for p, pair in zip(asked, pairs, strict=True)])).logits
        worse = judge(**batch([encode(p, pair[1]) for p, pair in zip(asked, pairs, strict=True)])).logits
        apart = torch.tensor([[score(p, a) > score(p, b)] for p, (a, b) in zip(asked, pairs, strict=True)])
        ranked = -(torch.nn.functional.logsigmoid(better - worse) * apart).mean()
        (loss + ranked).backward()
        steps.step()
        steps.zero_grad()
    print(
        f"policy: {policy.num_parameters():,} parameters, loss {loss:.2f}; reward model: "
        f"{((better > worse) & apart).sum() / apart.sum():.2f} of its last pairs right"
    )
    for model, name in ((policy, "policy"), (judge, "judge")):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


@torch.no_grad()
def true_reward(model: Any, tokenizer: Any) -> float:
    asked = prompts(512, 99)
    inputs = tokenizer([f"?{p}!" for p in asked], return_tensors="pt", padding=True, padding_side="left")
    torch.manual_seed(99)
    found = model.eval().generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=LENGTH, do_sample=True,
        top_k=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    said = tokenizer.batch_decode(found[:, inputs["input_ids"].size(1) :], skip_special_tokens=True)
    return statistics.mean(map(score, asked, said))


# --- the sides: each is built, trained and told of ---


def common(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    return {
        **RECIPE, "output_dir": str(folder / f"out-{options.side}"), "seed": options.seed, "use_cpu": True, "bf16": False,
        "per_device_train_batch_size": ROLLOUT, "gradient_accumulation_steps": 1, "temperature": 1.0, "report_to": "none",
        "lr_scheduler_type": "constant", "save_strategy": "no", "gradient_checkpointing": False, "disable_tqdm": True,
    }  # fmt: skip


def ours(folder: Path, options: argparse.Namespace, critic: str) -> tuple[Any, Any]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hfpipe.evaluation.reward_functions import by_model
    from hfpipe.training.ppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    rows = [
        {"prompt": [{"role": "user", "content": p}], "row": {}}
        for p in prompts(ROLLOUT * options.rollouts, options.seed)
    ]
    reward = by_model(str(folder / "judge"), tokenizer, "")
    args = PPOConfig(
        **common(folder, options), beta=KL, epsilon=CLIP, num_iterations=EPOCHS, max_completion_length=LENGTH,
        max_steps=options.rollouts * EPOCHS, logging_steps=EPOCHS, critic=critic,
    )  # fmt: skip
    trainer = PPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "policy", dtype="float32"),
        reward,
        args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        value_model=reward.model if critic == "separate" else None,
    )
    return trainer, lambda: ([line["reward"] for line in trainer.state.log_history if "reward" in line], trainer.model)


def trl112(folder: Path, options: argparse.Namespace) -> tuple[Any, Any]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    rows = [{"input_ids": tokenizer(f"?{p}!")["input_ids"]} for p in prompts(ROLLOUT * options.rollouts, options.seed)]
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / "policy", dtype="float32") for _ in range(2))
    judge, value = (AutoModelForSequenceClassification.from_pretrained(folder / "judge") for _ in range(2))
    args = PPOConfig(
        **common(folder, options), kl_coef=KL, cliprange=CLIP, num_ppo_epochs=EPOCHS, response_length=LENGTH,
        stop_token="eos", total_episodes=ROLLOUT * options.rollouts, num_sample_generations=0, logging_steps=1,
    )  # fmt: skip
    trainer = PPOTrainer(args, tokenizer, policy, reference, judge, Dataset.from_list(rows), value)
    return trainer, lambda: (
        [line["objective/scores"] for line in trainer.state.log_history if "objective/scores" in line],
        policy,
    )


SIDES = {
    "separate": lambda *given: ours(*given, "separate"),
    "head": lambda *given: ours(*given, "head"),
    "trl-1.12": trl112,
}


def run_side(folder: Path, options: argparse.Namespace) -> None:
    gc.collect = lambda *given: 0
    trainer, left = SIDES[options.side](folder, options)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory counts from here
    began, used = time.perf_counter(), time.process_time()
    trainer.train()
    seconds, cpu = time.perf_counter() - began, time.process_time() - used
    peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024
    rewards, policy = left()
    episodes = ROLLOUT * options.rollouts
    told = {
        "reward": statistics.mean(rewards[-10:]), "true_reward": true_reward(policy, trainer.processing_class),
        "per_s": episodes / seconds, "per_cpu_s": episodes / cpu, "peak_mib": peak,
    }  # fmt: skip
    print(json.dumps(told))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl112", help="the Python of an environment with TRL 1.12")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rollouts", type=int, default=100)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=400, help="steps that make policy and reward model")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="where policy and reward model are kept, and found again")
    options = parser.parse_args()
    if options.side:
        return run_side(options.folder, options)
    torch.set_num_threads(1)
    found: dict[str, list[SimpleNamespace]] = {side: [] for side in SIDES if side != "trl-1.12" or options.trl112}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / "judge").exists():
            build(folder, options)
        for seed in range(1, options.seeds + 1):
            for side, results in found.items():
                command = [options.trl112 if side == "trl-1.12" else sys.executable, __file__, "--side", side]
                command += ["--seed", str(seed), "--folder", str(folder), "--rollouts", str(options.rollouts)]
                quiet = {"OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}
                done = subprocess.run(command, env={**os.environ, **quiet}, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr)
                results.append(SimpleNamespace(**json.loads(done.stdout.splitlines()[-1])))
                told = results[-1]
                print(
                    f"seed {seed}  {side:9} reward {told.reward:6.2f}  true {told.true_reward:.2f}  "
                    f"{told.per_s:5.0f} episodes/s  {told.per_cpu_s:5.0f} episodes/CPU s  peak {told.peak_mib:.0f} MiB",
                    flush=True,
                )
    for side in found:
        if side == "separate":
            continue
        pairs = list(zip(found["separate"], found[side], strict=True))
        wall = [a.per_s / b.per_s for a, b in pairs]
        cpu = [a.per_cpu_s / b.per_cpu_s for a, b in pairs]
        print(
            f"separate / {side}: episodes/s {statistics.median(wall):.2f} ({min(wall):.2f} to {max(wall):.2f}), "
            f"episodes/CPU s {statistics.median(cpu):.2f} ({min(cpu):.2f} to {max(cpu):.2f})"
        )


if __name__ == "__main__":
    main()
