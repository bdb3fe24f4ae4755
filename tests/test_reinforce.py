"""grpo and rloo: learning what is rewarded, by checks, functions and reward models; whole rollouts; limits; a control."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import signal
import time

import pytest
from transformers import AutoTokenizer

from hfpipe import artifact
from hfpipe.config import load_recipe
from hfpipe.errors import UserError
from hfpipe.evaluation.reward_functions import build_rewards, by_check, by_function
from hfpipe.sections import RewardFunction
from hfpipe.stages import stage_types
from hfpipe.training.identity import identify
from hfpipe.training.templates import encode_batch

from .conftest import CALL, REAL, hfpipe, learn_by_heart, needs_real_data, stage_json
from .test_nothing_lost import start
from .test_rewards import REWARD

STAGE = """stage: TYPE
model: {from: PARENT, attn_implementation: eager}
data: {train: [{path: tinyworld/sft, limit: 400}], eval: [{path: tinyworld/sft, limit: 32}]}
rewards: {functions: [{function: "FILE:vowels"}]}
trainer: {learning_rate: 5.0e-3, per_device_train_batch_size: 32, num_generations: 4, max_completion_length: 16, max_steps: 16, save_steps: 4, beta: 0.0, activation_checkpointing: false, logging_steps: 4}
"""
TOOL = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Works out a sum.",
        "parameters": {"type": "object", "properties": {"arguments": {"type": "string"}}},
    },
}
VOWELS = '''def vowels(completions, **columns):
    """The share of e among the letters."""
    texts = [messages[0]["content"] for messages in completions]
    return [text.count("e") / max(len(text), 1) for text in texts]
'''


@pytest.fixture
def steered(micro_run, tmp_path):
    """Writes a recipe of one stage on micro's sft and returns its folder: `steered("grpo", limits="{...}")`."""
    (tmp_path / "vowels.py").write_text(VOWELS)

    def write(kind: str, **changed: str):
        text = STAGE.replace("TYPE", kind).replace("PARENT", str(micro_run / "sft"))
        text = text.replace("FILE", str(tmp_path / "vowels.py"))
        lines = [line for line in text.splitlines(keepends=True) if line.partition(":")[0] not in changed]
        folder = tmp_path / "recipe"
        folder.mkdir(exist_ok=True)
        (folder / "rl.yaml").write_text("".join(lines) + "".join(f"{key}: {value}\n" for key, value in changed.items()))
        (folder / "pipeline.yaml").write_text(
            "name: steered\nstages: [rl]\nevaluate: {samples: 1, max_new_tokens: 4}\n"
        )
        return folder

    return write


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_what_is_rewarded_is_learnt(steered, tmp_path, kind):
    told = hfpipe("run", steered(kind), "--out", tmp_path / "run").stdout
    assert "limits.max_kl is not watched: with trainer.beta = 0" in told
    left = tmp_path / "run" / "rl"
    metrics = stage_json(left)["metrics"]
    assert metrics["held_out_before"]["n"] == metrics["held_out"]["n"] == 32
    assert metrics["held_out"]["reward"] > metrics["held_out_before"]["reward"] + 0.05
    gain = metrics["held_out"]["gain"]
    assert gain["difference"] == pytest.approx(
        metrics["held_out"]["reward"] - metrics["held_out_before"]["reward"], abs=2e-4
    )
    assert f"({gain['difference']:+.2f}, {gain['low']:+.2f} to {gain['high']:+.2f})" in told
    rewards = [line["reward"] for line in lines(left / "metrics.jsonl") if "reward" in line]
    assert rewards[-1] > rewards[0] + 0.05
    kept = lines(left / "rollouts.jsonl")
    assert {"step", "prompt", "completion", "rewards", "advantage"} <= kept[0].keys()
    assert {row["step"] for row in kept} >= {4, 8, 12, 16}
    row = kept[-1]
    text = row["completion"][0]["content"]
    assert row["rewards"]["vowels"] == pytest.approx(text.count("e") / max(len(text), 1), abs=1e-5)


def test_the_control_learns_nothing_and_the_scorecard_says_what_was_gained_beyond(steered, tmp_path):
    folder = steered("grpo")
    # Sampled: of chance, too, the likeliest answer may become any.
    several = "num_generations: 4, num_generations_eval: 4"
    written = (folder / "rl.yaml").read_text().replace("num_generations: 4", several)
    (folder / "rl.yaml").write_text(written)
    (folder / "chance.yaml").write_text(written.replace("rewards: {", "rewards: {control: random_reward, "))
    (folder / "pipeline.yaml").write_text(
        "name: steered\nstages: [rl, chance]\nevaluate: {samples: 1, max_new_tokens: 4}\n"
    )
    hfpipe("run", folder, "--out", tmp_path / "run")
    told = {name: stage_json(tmp_path / "run" / name)["metrics"] for name in ("rl", "chance")}
    assert told["chance"]["held_out"]["reward"] < told["chance"]["held_out_before"]["reward"] + 0.05
    gained = told["rl"]["held_out"]["reward"] - told["chance"]["held_out"]["reward"]
    assert gained > 0.05
    assert f"gained: rl beyond chance: held-out reward {gained:+.2f}" in hfpipe("report", tmp_path / "run").stdout


def test_a_killed_run_goes_on_to_the_same_bits(steered, tmp_path):
    folder = steered("grpo", trainer="{learning_rate: 1.0e-3, per_device_train_batch_size: 16, num_generations: 4, "
                     "max_completion_length: 8, num_iterations: 2, max_steps: 24, save_steps: 4, beta: 0.05, "
                     "activation_checkpointing: false, logging_steps: 4}")  # fmt: skip
    hfpipe("run", folder, "--out", tmp_path / "whole")
    run = tmp_path / "run"
    process = start(run, recipe=str(folder))
    while not list(run.glob("rl.partial/checkpoints/checkpoint-*")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    time.sleep(0.4)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = hfpipe("run", folder, "--out", run)
    assert "resumed from checkpoint-" in done.stdout
    assert stage_json(run / "rl")["weights"] == stage_json(tmp_path / "whole" / "rl")["weights"]
    assert [row["step"] for row in lines(run / "rl" / "rollouts.jsonl")] == [
        row["step"] for row in lines(tmp_path / "whole" / "rl" / "rollouts.jsonl")
    ]


def test_no_checkpoint_within_a_rollout(steered, tmp_path):
    folder = steered("grpo")
    done = hfpipe("run", folder, "--out", tmp_path / "run", "--set", "rl.trainer.num_iterations=3", check=2)
    assert "trainer.save_steps = 4, but 3 steps share one rollout" in done.stderr
    assert "Give a multiple of 3, such as 3." in done.stderr
    done = hfpipe(
        "run", folder, "--out", tmp_path / "run", "--set", "rl.data.train=[{path: tinyworld/sft, limit: 7}]", check=2
    )
    assert "7 prompts, but one rollout takes 8" in done.stderr


@pytest.mark.parametrize(
    ("limits", "said"),
    [("{min_entropy: 50}", "entropy is"), ("{max_kl: 0.0001}", "nats from the reference, more than limits.max_kl")],
)
def test_a_hacked_reward_stops_the_stage(steered, tmp_path, limits, said):
    done = hfpipe(
        "run", steered("grpo", limits=limits), "--out", tmp_path / "run", "--set", "rl.trainer.beta=0.01", check=1
    )
    assert "rl failed: RewardHacked:" in done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run" / "rl.partial" / "rollouts.jsonl").is_file()


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        ("{}", "rewards: nothing to learn from"),
        ("{functions: [{check: nunber}]}", "No check `nunber`"),
        (
            "{functions: [{check: length}]}",
            "functions[0]: check `length` reads no value from a row's answer: give `value`",
        ),
        ("{functions: [{check: length, value: 5}]}", "`length` cannot take the value 5: expected {min_words: 1, max"),
        ("{functions: [{check: length, value: {max_word: 5}}]}", "cannot take the value {'max_word': 5}"),
        ("{functions: [{check: number, value: twelve}]}", "`number` cannot take the value 'twelve'"),
        ("{functions: [{check: json_schema, value: {type: objekt}}]}", "cannot take the value {'type': 'objekt'}"),
        ("{functions: [{check: json_schema}]}", "check `json_schema` reads no value"),
        ("{functions: [{check: tool_call, value: calculator}]}", "`tool_call` cannot take the value 'calculator'"),
        ("{functions: [{function: nowhere:reward}]}", "function 'nowhere:reward': ModuleNotFoundError"),
        ("{functions: [{function: nowhere.py:reward}]}", "no such file, neither beside rl.yaml nor in the working"),
        ("{functions: [{function: mine.py:vowls}]}", "mine.py has no function `vowls`. Did you mean `vowels`?"),
        ("{functions: [{function: mine.py:closed}]}", "log_metric by name: let it take **columns."),
        ("{functions: [{check: number, function: a:b}]}", "give one of `check` and `function`"),
        (
            "{functions: [{check: stops}]}\nlimits: {max_kl: 9}",
            "limits.max_kl = 9 with trainer.beta = 0: there is no reference",
        ),
        ("{model: nowhere}", "rewards.model = 'nowhere' is neither a stage of this recipe"),
        ("{model: rl}", "`rl` leaves a model, not a reward model"),
    ],
)
def test_rewards_that_are_not_there(steered, rewards, said):
    folder = steered("grpo", rewards=rewards)
    (folder / "mine.py").write_text(f"{VOWELS}\n\ndef closed(completions): pass\n")
    done = hfpipe("plan", folder, check=2)
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_another_function_is_another_stage(steered, tmp_path):
    folder = steered("grpo")
    hfpipe("run", folder, "--out", tmp_path / "run", "--set", "rl.trainer.max_steps=4")
    plan = ["plan", folder, "--out", tmp_path / "run", "--set", "rl.trainer.max_steps=4"]
    assert "rl         done" in hfpipe(*plan).stdout
    (tmp_path / "vowels.py").write_text(VOWELS.replace('"e"', '"a"'))
    assert "vowels.py:vowels changed" in hfpipe(*plan).stdout


def test_a_function_is_looked_for_beside_its_stage(steered, tmp_path):
    folder = steered("grpo", rewards="{functions: [{function: mine.py:vowels}]}")
    (folder / "mine.py").write_text("raise ValueError('not this one')")
    assert "function 'mine.py:vowels': ValueError: not this one" in hfpipe("plan", folder, check=2).stderr
    (folder / "mine.py").rename(tmp_path / "mine.py")
    (tmp_path / "mine.py").write_text(VOWELS)
    told = []
    for text in (VOWELS, VOWELS.replace('"e"', '"a"')):
        (folder / "mine.py").write_text(text)
        recipe = load_recipe(folder, stage_types())
        told.append(identify(recipe, recipe.stages["rl"], None).data_hashes["rewards.functions mine.py:vowels"])
    assert told[0] == artifact.file_sha256(tmp_path / "mine.py") != told[1]


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize(
    ("gives", "said"),
    [
        ("0.5", "w: it gave 0.5; expected a list with one number or None for each of the 2 completions."),
        ("['a', 'b']", "w: it gave ['a', 'b']; expected a list"),
        ("[1.0]", "w: it gave 1 values; expected a list with one number or None for each of the 2 completions."),
        ("None", "w: it gave None; expected a list"),
        ("{}['oops']", "w: KeyError: 'oops' (mine.py line 1)"),
        ("exit(3)", "w: SystemExit: 3 (mine.py line 1)"),
        (
            "[1, float('-inf')]",
            "w: it gave -inf for completion 1 of the 2, against which no other one counts; expected a",
        ),
        ("[None, 2]", None),
    ],
)
def test_what_a_function_gives(later, gives, said):
    found = {}
    exec(compile(f"{'async ' * later}def mine(completions, **columns): return {gives}", "mine.py", "exec"), found)
    reward = by_function(found["mine"], "w")
    assert reward.__name__ == "mine"
    assert inspect.iscoroutinefunction(reward) == later

    def call():
        scores = reward(prompts=[], completions=["a", "b"], completion_ids=[], row=[])
        return asyncio.run(scores) if later else scores

    if said is None:
        assert call() == [None, 2.0]
        return
    with pytest.raises(UserError) as error:
        call()
    assert said in str(error.value)


@pytest.mark.parametrize("gives", ["None", "float('nan')"])
def test_no_reward_for_anything_is_told_with_held_out_prompts_too(steered, tmp_path, gives):
    (tmp_path / "vowels.py").write_text(f"def vowels(completions, **columns): return [{gives}] * len(completions)\n")
    steps = ["--set", "rl.trainer.max_steps=2", "--set", "rl.trainer.save_steps=2"]
    done = hfpipe("run", steered("grpo"), "--out", tmp_path / "run", *steps, check=2)
    assert "no completion has had a reward: vowels gave None or NaN for all" in done.stderr


def test_a_function_at_fault_ends_the_stage_in_one_message(steered, tmp_path):
    (tmp_path / "vowels.py").write_text(VOWELS.replace("texts = ", "texts = {}['oops'] or "))
    folder = steered("grpo")
    done = hfpipe("run", folder, "--out", tmp_path / "run", "--set", "rl.data.eval=[]", check=2)
    file = tmp_path / "vowels.py"
    told = f"rl.yaml: rewards.functions[0]: function '{file}:vowels': KeyError: 'oops' ({file} line 3)"
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_checks_as_rewards():
    def scored(check, said, answer, **options):
        reward = by_check(RewardFunction(check=check, **options), {7})
        reference = [answer] if isinstance(answer, dict) else [{"role": "assistant", "content": answer}]
        message = said if isinstance(said, dict) else {"role": "assistant", "content": said}
        return reward([[]], [[message]], [[1, 7]], [reference if answer else None], [{}])[0]

    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert scored("number", "So it is 1,234.", "#### 1234") == 1
    assert scored("number", "So it is 12.", "#### 1234") == 0
    assert scored("number", "So it is 12.", "Who knows?") is None
    assert scored("tool_call", called, called) == 1
    assert scored("tool_call", "12 * 34", called) == 0
    assert scored("tool_call", called, "no call") is None
    both = {**called, "tool_calls": [CALL, {**CALL, "function": {**CALL["function"], "arguments": "5 + 6"}}]}
    assert scored("tool_call", both, both) == 1  # a turn may make several calls
    assert scored("tool_call", called, both) == scored("tool_call", both, called) == 0
    schema = {"type": "object", "required": ["a"]}
    assert scored("json_schema", '{"a": 1}', None, value=schema) == 1
    assert scored("json_schema", '{"b": 1}', None, value=schema) == 0
    assert scored("regex", "Answer: 4", None, value=r"^Answer: \d+$") == 1
    assert scored("length", "one two three", None, value={"max_words": 2}) == 0
    assert scored("length", "one two", None, value={"max_words": 2}) == 1
    assert scored("stops", "anything", None) == 1


@pytest.fixture(scope="module")
def calls_what_it_is_shown(micro_run, tmp_path_factory):
    """A model that calls the calculator where its prompt shows one; rows with and without."""
    rows = []
    for name in ("Ann", "Ben", "Eva", "Tom"):
        asked, called = {"role": "user", "content": f"{name}, what is 12 * 34?"}, {"role": "assistant", "content": ""}
        called["tool_calls"] = [CALL]
        rows.append({"messages": [asked, called], "tools": [TOOL]})
        rows.append({"messages": [asked, {"role": "assistant", "content": "I can't."}], "tools": None})
    folder = tmp_path_factory.mktemp("shown")
    learn_by_heart(micro_run, rows, folder / "model")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("kind", ["grpo", "rloo", "ppo", "distill"])
def test_a_prompt_shows_its_row_s_tools_and_calls_are_parsed(steered, calls_what_it_is_shown, tmp_path, kind):
    folder, rows = calls_what_it_is_shown, calls_what_it_is_shown / "rows.jsonl"
    data = f"[{{path: {rows}, split: all}}]"
    recipe = steered(
        kind,
        model=f"{{from: {folder / 'model'}}}",
        data=f"{{train: {data}, eval: {data}}}",
        rewards="{functions: [{check: tool_call}, {check: contains, value: can't}]}",
        trainer="{learning_rate: 1.0e-6, per_device_train_batch_size: 8, max_completion_length: 16, max_steps: 1, "
        "save_steps: 4, activation_checkpointing: false}",
        limits="{min_entropy: null}",
    )
    if kind == "distill":
        stage = recipe / "rl.yaml"
        text = stage.read_text().replace("rewards: ", "# rewards: ").replace("limits: ", "# limits: ")
        stage.write_text(text.replace("{learning", f"{{teacher_model_name_or_path: {folder / 'model'}, learning"))
    hfpipe("run", recipe, "--out", tmp_path / "run")
    metrics = stage_json(tmp_path / "run" / "rl")["metrics"]
    if kind == "distill":
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        told = [json.loads(line)["messages"] for line in rows.read_text().splitlines()]
        lengths = [sum(mask) for _, mask in encode_batch(tokenizer, [{"messages": talk} for talk in told])]
        logged = lines(tmp_path / "run" / "rl" / "metrics.jsonl")[0]
        longest, shortest = logged["completions/max_length"], logged["completions/min_length"]
        assert longest - shortest == max(lengths) - min(lengths) > 5
        assert logged["completions/mean_length"] == (longest + shortest) / 2
    else:
        assert metrics["held_out_before"]["reward"] == 1.0


@pytest.mark.parametrize("column", ["answer", "solution", "reference", "remark"])
def test_what_prompts_are_compared_with_is_in_a_column(steered, tmp_path, column):
    rows = [{"prompt": f"What is {n} plus 2?", column: str(n + 2)} for n in range(32)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = steered(
        "grpo",
        data=f"{{train: [{{path: {tmp_path / 'rows.jsonl'}, split: all}}]}}",
        rewards="{functions: [{check: number}]}",
    )
    steps = ["--set", "rl.trainer.max_steps=2", "--set", "rl.trainer.save_steps=2"]
    done = hfpipe("run", folder, "--out", tmp_path / "run", *steps, check=2 if column == "remark" else 0)
    if column == "remark":
        assert "no completion has had a reward: number gave None or NaN for all" in done.stderr
        assert not (tmp_path / "run" / "rl").exists()
    else:
        assert lines(tmp_path / "run" / "rl" / "metrics.jsonl")[0]["reward"] >= 0


@needs_real_data
@pytest.mark.parametrize("kind", ["grpo", "rloo", "ppo"])
def test_gsm8k_as_it_is(steered, tmp_path, kind):
    folder = steered(
        kind,
        data=f"{{train: [{{path: {REAL / 'gsm8k_train.jsonl'}, limit: 16}}]}}",
        rewards="{functions: [{check: number}, {check: length, value: {max_words: 200}, weight: 0.1}]}",
    )
    hfpipe(
        "run", folder, "--out", tmp_path / "run", "--set", "rl.trainer.max_steps=4", "--set", "rl.trainer.save_steps=4"
    )
    logged = lines(tmp_path / "run" / "rl" / "metrics.jsonl")[0]
    assert {"rewards/number/mean", "rewards/length/mean"} <= logged.keys()
    kept = lines(tmp_path / "run" / "rl" / "rollouts.jsonl")
    assert all(row["rewards"]["number"] in (0, 1) for row in kept)  # every row has a number to compare with


def test_a_reward_model_of_the_recipe(micro_run, steered, tmp_path):
    folder = steered("grpo", rewards="{model: judge}")
    (folder / "judge.yaml").write_text(REWARD.replace("from: sft", f"from: {micro_run / 'sft'}"))
    (folder / "pipeline.yaml").write_text(
        "name: steered\nstages: [judge, rl]\nevaluate: {samples: 1, max_new_tokens: 4}\n"
    )
    short = ["--set", "judge.trainer.max_steps=4", "--set", "rl.trainer.max_steps=4"]
    done = hfpipe("run", folder, "--out", tmp_path / "run", "--only", "rl", *short, check=2)
    assert "`rl` is steered by `judge`, which is not finished or has changed" in done.stderr
    hfpipe("run", folder, "--out", tmp_path / "run", *short)
    plan = hfpipe("plan", folder, "--out", tmp_path / "run", *short, "--set", "judge.trainer.learning_rate=1e-4").stdout
    assert "rl         downstream: `judge` runs again" in plan

    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from hfpipe.training.job import make_job
    from hfpipe.training.templates import stop_token_ids

    recipe = load_recipe(folder, stage_types(), [s for s in short if s != "--set"])
    job = make_job(recipe, recipe.stages["rl"], tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "judge")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "judge").eval()
    ((reward,), weights) = build_rewards(job, tokenizer, set(stop_token_ids(tokenizer)))
    assert weights == [1.0]
    prompt = [{"role": "user", "content": "What is 2 plus 2?"}]
    for answer in ({"role": "assistant", "content": "4"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}):
        whole = tokenizer.apply_chat_template([*prompt, answer], return_dict=True, return_tensors="pt")["input_ids"]
        asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        sampled = [t for t in whole[0].tolist()[len(asked) :] if t != tokenizer.convert_tokens_to_ids("<|end|>")]
        (found,) = reward(prompts=[prompt], completions=[[answer]], completion_ids=[sampled], row=[{}])
        assert found == pytest.approx(model(whole).logits.item(), abs=1e-4)


def test_prompts_are_inspected(steered):
    shown = hfpipe("inspect", steered("grpo") / "rl.yaml", "--row", "1").stdout
    assert "<|assistant|>" in shown
    assert ", 0 trained" in shown
