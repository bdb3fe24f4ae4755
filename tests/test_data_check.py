"""`hfpipe data check`: each planted fault is found where it is, clean data gives a clean report; and what recipes make of it."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfpipe.cli import main

from .conftest import REAL, hfpipe, needs_real_data, stage_json
from .sequences import RECIPE, write_data
from .test_nothing_lost import checkpoints, start, wait_for

WORDS = [
    a + b + c for a in ("ka", "lo", "mi", "tu", "re") for b in ("ban", "dor", "fel", "gim") for c in ("", "s", "en")
]
SECRETS = (
    "jane.roe@mailhost.net",
    "+49 30 901820 14",
    "(212) 736-5000",
    "sk-proj-Ab3dEf6hIj9lMn2pQr5tUv8x",
    "hf_AbCdEfGhIjKlMnOpQrStUvWxYz123456",
)


PAIR = {"user": "prompt", "assistant": "completion"}


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words)).capitalize() + "."


def talk(rng: random.Random, words: int = 30, **columns) -> dict:
    return {"prompt": sentence(rng, 14)[:-1] + "?", "completion": sentence(rng, words), **columns}


def talks(seed: int, count: int) -> list[dict]:
    rng = random.Random(seed)
    return [talk(rng, topic=("travel", "food", "music")[n % 3]) for n in range(count)]


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def check(*arguments: object) -> str:
    """What is printed, its lines joined where they were wrapped."""
    return re.sub(r"\n  +(?=\S)", " ", hfpipe("data", "check", *arguments).stdout)


def sources(*arguments: object) -> list[dict]:
    return json.loads(hfpipe("data", "check", *arguments, "--json").stdout)["sources"]


def topics(found: dict) -> dict[str, str]:
    return {line["topic"]: line["text"] for line in found["attention"]}


# Loose files


def test_clean_data_gives_a_clean_report(tmp_path):
    path = write(tmp_path / "talks.jsonl", talks(0, 300))
    held_out = write(tmp_path / "test.jsonl", talks(1, 100))
    printed = check(path, held_out)
    assert "Nothing deserves attention." in printed
    table = [line.split() for line in printed.splitlines()]
    assert table[0][:2] == ["role", "source"] or table[0][0] == "source"
    trained, kept = sources(path, held_out)
    assert (trained["rows"], kept["rows"], kept["role"]) == (300, 100, "eval")
    assert trained["form"] == "prompt/completion"
    assert trained["estimated"] == "from bytes"
    assert trained["columns"] == {"topic": {"travel": 100, "food": 100, "music": 100}}
    assert trained["turns"] == {"2": 300}
    assert 0.6 < trained["trained"] < 0.75
    assert trained["length"]["p5"] <= trained["length"]["p50"] <= trained["length"]["p100"]
    assert trained["exact"]["rows"] == trained["near"]["rows"] == trained["refusals"] == 0


@pytest.mark.parametrize("recipe", ["micro", "tiny"])
def test_the_built_in_world_is_clean_though_it_repeats_itself(recipe):
    printed = check(recipe)
    assert "Nothing deserves attention." in printed
    assert len(printed.splitlines()) < 30


def test_each_fault_of_a_file_is_found_where_it_is(tmp_path):
    rows = talks(0, 200)
    rows[20] = dict(rows[3])  # exact
    rows[21] = {**rows[4], "completion": rows[4]["completion"].upper().replace(".", " !")}  # the same words
    for n in range(30, 40):  # nearly the same
        rows[n] = {**rows[60 + n], "completion": rows[60 + n]["completion"].replace(".", " indeed.")}
    rows[5]["completion"] = ""
    rows[6]["completion"] = "Write to jane.roe@mailhost.net, call +49 30 901820 14 or (212) 736-5000."
    rows[7]["completion"] = 'client = Client("sk-proj-Ab3dEf6hIj9lMn2pQr5tUv8x")'
    rows[8]["completion"] = "token: hf_AbCdEfGhIjKlMnOpQrStUvWxYz123456"
    rows[9]["completion"] += "<|im_end|>"
    rng = random.Random(9)
    for n in range(100, 110):
        rows[n]["completion"] = sentence(rng, 60)[:-1]  # no full stop
    for n in range(120, 180):
        rows[n]["completion"] = f"I'm sorry, but I can't help with that. {sentence(rng, 9)}"
    for row in rows:
        row["topic"] = "travel"
    rows[199]["topic"] = "music"
    [found] = sources(write(tmp_path / "talks.jsonl", rows))
    told = topics(found)
    assert told["unusable"] == "1 empty assistant turn (talks.jsonl line 6)"
    assert found["exact"] == {
        "rows": 2,
        "places": ["talks.jsonl line 21 = talks.jsonl line 4", "talks.jsonl line 22 = talks.jsonl line 5"],
    }
    assert found["near"]["rows"] == 10
    assert "talks.jsonl line 91 ~ talks.jsonl line 31" in found["near"]["places"]
    assert told["near"].startswith("10 rows of 199")
    assert {kind: seen["places"] for kind, seen in found["personal"].items()} == {
        "e-mail": ["talks.jsonl line 7"],
        "phone": ["talks.jsonl line 7"],
        "key": ["talks.jsonl line 8", "talks.jsonl line 9"],
    }
    assert told["control"] == "`<|im_end|>` in 1 row: talks.jsonl line 10"
    assert told["cut"].startswith("10 of 199: talks.jsonl line 101")
    assert told["refusals"] == "60 of 199"
    assert told["uneven"] == "`topic`: 198 rows of travel, 1 of music"


def test_answers_judged_alike_are_told(tmp_path):
    rows = [{"prompt": f"Word {n}?", "completion": f"It is {n}.", "label": n != 7} for n in range(9)]
    [found] = sources(write(tmp_path / "judged.jsonl", rows))
    assert found["labels"] == {"good": 8, "bad": 1}
    assert "one_sided" not in topics(found)
    [found] = sources(write(tmp_path / "judged.jsonl", rows[:7]))
    assert topics(found)["one_sided"] == "all 7 are good"


def test_personal_data_is_never_printed_whole(tmp_path):
    rows = talks(0, 40)
    for n, secret in enumerate(SECRETS):
        rows[n]["completion"] += f" {secret} "
        rows[n + 10]["contact"] = secret  # a column's values are listed
        rows[n + 20] = {**rows[n], "topic": "x"}
    path = write(tmp_path / "talks.jsonl", rows)
    for arguments in ([path], [path, "--json"], [path, "--held-out", path, "--json"]):
        printed = hfpipe("data", "check", *arguments).stdout
        assert "talks.jsonl" in printed
        for secret in SECRETS:
            assert secret not in printed
    assert set(sources(path)[0]["columns"]["contact"]) >= {"[e-mail j…]", "[key sk-…]", "[key hf_…]"}


def test_placeholders_and_numbers_are_no_personal_data(tmp_path):
    said = (
        "Write to me@example.com or you@yourdomain.com, call (555) 123-4567 or 212-555-0199.",
        "12 + 345 678 901 = 345 678 913, which is +345 more, on 2024-11-24 at 10:30, version 1.2.3.4",
        "The token: a word of a vocabulary. secret = some_long_identifier_of_a_function_name",
        "x<|y, <b>bold</b>, [1] and [INSTRUCTION]",
    )
    rows = [{**row, "completion": text} for row, text in zip(talks(0, 4), said, strict=True)]
    assert "Nothing deserves attention." in check(write(tmp_path / "a.jsonl", rows))


def test_what_a_folder_or_a_named_file_holds_out_is_not_in_the_rest(tmp_path):
    train, test = talks(0, 60), talks(1, 20)
    train[10] = {**test[3], "completion": "Another answer to the same question."}
    long = sentence(random.Random(5), 80)
    train[11]["completion"] = f"As one reads: {long}"
    test[4]["prompt"] = long
    test[5]["prompt"] = train[12]["prompt"] = "Hello there!"  # too short to give anything away
    folder = tmp_path / "set"
    write(folder / "train.jsonl", train)
    write(folder / "test.jsonl", test)
    found, kept = sources(folder)
    assert (found["split"], kept["split"], kept["role"]) == ("train", "test", "eval")
    assert found["shown"] == {f"{folder} [test]": 2}
    assert found["overlaps"][f"{folder} [test]"]["places"] == [
        "train.jsonl line 11 = test.jsonl line 4",
        "train.jsonl line 12 = test.jsonl line 5",
    ]
    probes = [{"messages": [{"role": "user", "content": test[3]["prompt"]}], "check": {"type": "number", "value": 3}}]
    printed = check(folder / "train.jsonl", "--held-out", write(tmp_path / "probes.jsonl", probes))
    assert "1 row with 1 of the 1 rows of" in printed
    assert "line 11 = probes.jsonl line 1" in printed


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        ({"role": "user", "content": None}, "Nothing deserves attention"),
        (
            {"role": "user", "content": [{"type": "text", "text": "Where is the harbour of this old town?"}]},
            "1 row with",
        ),
        ({"content": "Where?"}, "probes.jsonl line 2: expected `prompt` as text, or `messages` of objects with role"),
        ("Where?", "probes.jsonl line 2: expected `prompt` as text, or `messages` of objects with role"),
    ],
)
def test_probes_of_which_a_turn_says_nothing(tmp_path, capsys, turn, said):
    rows = [*talks(0, 30), {"prompt": "Where is the harbour of this old town?", "completion": "Down by the river."}]
    train = write(tmp_path / "train.jsonl", rows)
    first = {"role": "user", "content": "And what is the name of that hill?"}
    probes = [{"messages": [one], "check": {"type": "number", "value": 3}} for one in (first, turn)]
    code = main(["data", "check", str(train), "--held-out", str(write(tmp_path / "probes.jsonl", probes))])
    told = "".join(capsys.readouterr())
    assert said in told
    assert code == (2 if "expected" in said else 0)


def test_templates_are_not_contamination(tmp_path):
    """The same long wording around another name in every row: nothing is given away."""
    ask = "Please answer with the capital, the continent and the language of the country that I name now, which is {}."
    rows = [{"prompt": ask.format(f"{w}ia{n}"), "completion": f"{w}opolis."} for n, w in enumerate(WORDS * 3)]
    [found, _] = sources(write(tmp_path / "a.jsonl", rows[:140]), write(tmp_path / "test.jsonl", rows[140:]))
    assert found["shown"] == {}


def test_texts_in_other_scripts_and_very_short_ones(tmp_path):
    rows = [{"text": t} for t in ("日本語の文章です。" * 9, "Привет, как дела? " * 9, "a", "!", "¿", "1")]
    [found] = sources(write(tmp_path / "a.jsonl", rows))
    assert found["rows"] == 6
    assert {"ja", "ru"} <= set(found["languages"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tinny"], "Did you mean `tiny`?"),
        (["no/such.jsonl"], "no/such.jsonl: no such file or folder"),
        (["tiny", "--held-out", "a.jsonl"], "--held-out goes with loose files"),
        (["tinyworld/sft", "--set", "seed=1"], "--set goes with a recipe"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, said):
    assert said in hfpipe("data", "check", *arguments, check=2).stderr


def test_it_needs_no_torch_and_plan_points_to_it():
    code = "import sys; from hfpipe.cli import main; assert main(['data', 'check', 'tinyworld/letters']) == 0\n"
    code += "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "hfpipe data check micro" in hfpipe("plan", "micro").stdout


# Real data


# Each fault that is looked for is also planted above.
@needs_real_data
def test_real_data():
    found = sources("real-small", "--set", f"data_dir={REAL}")
    by_name = {(s["stage"], s["role"], Path(s["path"]).name): s for s in found}
    gsm8k = by_name["sft", "train", "gsm8k_train.jsonl"]
    assert gsm8k["shown"] == {f"{REAL}/dpo_en_demo.json [validation]": 1}  # in a prompt with worked examples
    assert by_name["pretrain", "train", "c4_demo.jsonl"]["personal"]["e-mail"]["rows"] == 7
    assert set(topics(by_name["sft", "eval", "gsm8k_train.jsonl"])) == set()
    printed = hfpipe("data", "check", "real-small", "--set", f"data_dir={REAL}").stdout
    assert len(printed.splitlines()) < 80
    raw = "".join(file.read_text(errors="replace") for file in REAL.iterdir())
    mails = set(re.findall(r"[\w.]+@[\w.]+\.\w+", raw))
    assert len(mails) > 10
    assert not [mail for mail in mails if mail in printed or mail in json.dumps(found)]


# Recipes


@pytest.fixture
def nano(tmp_path, monkeypatch):
    """A very small recipe whose sft stage trains on `talks`, two rows a step, once: `nano(talks, "data keys")`."""
    monkeypatch.setenv("HFPIPE_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data"
    write_data(data, 0)

    def make(talks: list[dict], keys: str = "", name: str = "recipe") -> Path:
        write(data / "talks.jsonl", talks)
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for stage, text in RECIPE.items():
            (folder / f"{stage}.yaml").write_text(text.replace("DATA", str(data)))
        sft = "stage: sft\nmodel: {from: pretrain}\n"
        sft += f"data: {{{keys} train: [{{path: {data}/talks.jsonl, split: all}}]}}\n"
        sft += "trainer: {max_length: 512, packing: false, per_device_train_batch_size: 2, num_train_epochs: 1, save_steps: 5}\n"
        (folder / "sft.yaml").write_text(sft)
        (folder / "pipeline.yaml").write_text(
            "name: nano\nstages: [tokenizer, pretrain, sft]\nevaluate:\n  samples: 1\n  max_new_tokens: 4\n"
            f"  probes: [{{path: {data}/probes.jsonl}}]\n"
        )
        return folder

    probe = {
        "messages": [{"role": "user", "content": "How many legs has a spider of the woods?"}],
        "capability": "facts",
    }
    write(data / "probes.jsonl", [{**probe, "check": {"type": "number", "value": 8}}])
    return make


def asked_of(probe_words: str = "How many LEGS has a spider, of the woods?!") -> dict:
    return {"prompt": probe_words, "completion": "8, says jane.roe@mailhost.net."}


def few(count: int) -> list[dict]:
    return [{"prompt": f"{n}?", "completion": f"It is {n}.", "topic": "a" if n % 4 else "b"} for n in range(count)]


def trained_rows(cache: Path, run: Path) -> list[str]:
    """The rows that the sft stage's trainer is given, decoded."""
    from datasets import load_from_disk
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run / "sft")
    folders = [load_from_disk(str(f / "train")) for f in (cache / "prepared").iterdir() if (f / "train").is_dir()]
    return [text for rows in folders for text in map(tokenizer.decode, rows["input_ids"]) if "It is" in text]


def test_a_recipe_s_faults_are_told_by_stage(nano, tmp_path):
    long = {"prompt": "Tell me more.", "completion": sentence(random.Random(0), 700)}
    folder = nano([*few(40), asked_of(), long])
    printed = check(folder)
    assert "sft: talks.jsonl [all]: 1 row with 1 of the 1 rows of probes" in printed
    assert "line 41 = probes.jsonl line 1" in printed
    assert "about 1 of 42 are longer than 512 tokens; the stage would stop" in printed
    assert "jane.roe" not in printed
    assert "no tokenizer in the run yet" in printed
    run = tmp_path / "run"
    hfpipe("run", folder, "--out", run, "--to", "tokenizer")
    [found] = [s for s in sources(folder, "--out", run) if s["stage"] == "sft"]
    assert found["estimated"] == ""  # counted by the run's own tokenizer
    assert found["tokens"] > 800


def test_decontaminate_removes_what_was_found_and_writes_it_down(nano, tmp_path):
    rows = [*few(40), asked_of()]
    run = tmp_path / "run"
    hfpipe("run", nano(rows), "--out", run)
    [kept] = [s for s in stage_json(run / "sft")["sources"] if s["role"] == "train"]
    assert (kept["used"], kept["contaminated"]) == (41, 0)
    folder = nano(rows, "decontaminate: true,")
    assert "data.decontaminate (absent) -> True" in hfpipe("plan", folder, "--out", run).stdout
    done = hfpipe("run", folder, "--out", run)
    assert "1 left out that show what is held out" in done.stdout
    [kept] = [s for s in stage_json(run / "sft")["sources"] if s["role"] == "train"]
    assert (kept["used"], kept["contaminated"], kept["left_out"]) == (40, 1, {})
    text = (run / "logs" / "sft.decontaminated.jsonl").read_text()
    assert "jane.roe@" not in text
    [removed] = map(json.loads, text.splitlines())
    assert (removed["place"], removed["held_out_place"]) == ("talks.jsonl line 41", "probes.jsonl line 1")
    assert removed["row"]["messages"][0]["content"] == asked_of()["prompt"]
    assert "rows of probes" not in check(folder, "--out", run)  # they are left out
    shutil.rmtree(run / "logs")  # prepared already: written from there
    (tmp_path / "data" / "probes.jsonl").write_text(
        (tmp_path / "data" / "probes.jsonl").read_text().replace("spider", "beetle")
    )
    assert "held out probes" in hfpipe("plan", folder, "--out", run).stdout
    hfpipe("run", folder, "--out", run)
    [kept] = [s for s in stage_json(run / "sft")["sources"] if s["role"] == "train"]
    assert (kept["used"], kept["contaminated"]) == (41, 0)


def test_what_a_run_tells_of_its_rows_is_masked(nano, tmp_path):
    """The first batch and rows that cannot be used: on the screen, in the logs, `stage.json` and the report."""
    rows = [{**row, "prompt": f"{row['prompt']} I am {SECRETS[0]}, {SECRETS[3]}"} for row in few(12)]
    rows = [{"messages": [{"role": r, "content": row[k]} for r, k in PAIR.items()]} for row in rows]
    rows.append({"messages": [{"role": f"assistant {SECRETS[0]}", "content": "Yes."}]})
    run = tmp_path / "run"
    done = hfpipe("run", nano(rows, "max_bad_rows: 0.5,"), "--out", run)
    assert "I am [e-mail j…], [key sk-…]" in done.stdout
    assert "1 unknown role `assistant [e-mail j…]`" in done.stdout
    told = [file for file in run.rglob("*") if file.suffix in (".json", ".jsonl", ".html", ".log", ".md")]
    assert {file.name for file in told} >= {"stage.json", "report.html", "sft.jsonl", "data.jsonl"}
    everything = done.stdout + done.stderr + "".join(file.read_text() for file in told)
    assert not [secret for secret in SECRETS if secret in everything]


def test_balance_repeats_rare_rows_the_same_ones_each_time(nano, tmp_path):
    rows = [{"prompt": f"{n}?", "completion": f"It is {n}.", "topic": "a" if n < 30 else "b"} for n in range(37)]
    rows.append({"prompt": "37?", "completion": "It is 37.", "topic": "c"})
    seen = []
    for turn in range(2):
        run, cache = tmp_path / f"run{turn}", tmp_path / "cache"
        shutil.rmtree(cache, ignore_errors=True)
        done = hfpipe("run", nano(rows, "balance: topic,"), "--out", run)
        assert "32 of rare values repeated" in done.stdout
        given = trained_rows(cache, run)
        counts = Counter(int(re.search(r"It is (\d+)", text)[1]) for text in given)
        assert all(counts[n] == 1 for n in range(30))
        assert sorted(counts[n] for n in range(30, 37)) == [4] * 5 + [5] * 2  # 30 of b, as many as of a
        assert counts[37] == 10  # ten times at the most
        record = stage_json(run / "sft")
        [source] = [s for s in record["sources"] if s["role"] == "train"]
        assert (source["used"], source["repeated"]) == (38, 32)
        assert record["metrics"]["steps"] == 35  # 70 rows, two a step
        seen.append((given, record["weights"]))
    assert seen[0] == seen[1]


def test_a_killed_run_goes_on_through_balanced_rows(nano, tmp_path):
    folder = nano(few(60), "balance: topic,")
    whole, run = tmp_path / "whole", tmp_path / "run"
    hfpipe("run", folder, "--out", whole)
    shutil.copytree(whole, run)
    shutil.rmtree(run / "sft")
    process = start(run, recipe=str(folder))
    assert wait_for(process, lambda: checkpoints(run, "sft"))
    import os

    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    if not (run / "sft").exists():
        assert "resumed from checkpoint-" in hfpipe("run", folder, "--out", run).stdout
    assert stage_json(run / "sft")["weights"] == stage_json(whole / "sft")["weights"]


def test_keys_that_would_do_nothing_are_refused(nano, recipe, tmp_path):
    folder = nano(few(40), "balance: tpoic,")
    assert "no row has a column `tpoic`; found" in (error := hfpipe("run", folder, check=2, cwd=tmp_path).stderr)
    assert "Did you mean `topic`?" in error
    for setting, said in (
        ("sft.data.eval=[{path: tinyworld/sft, balance: kind}]", "balance has no meaning here"),
        ("tokenizer.data.decontaminate=true", "decontaminate has no meaning here"),
        ("tokenizer.data.balance=kind", "balance has no meaning here"),
        ("sft.data.balence=kind", "Did you mean `balance`?"),
    ):
        assert said in hfpipe("plan", "micro", "--set", setting, check=2).stderr
    streamed = ["--set", "pretrain.data.streaming=true", "--set", "pretrain.trainer.max_steps=5"]
    error = hfpipe("plan", "micro", *streamed, "--set", "pretrain.data.balance=kind", check=2).stderr
    assert "data.balance beside data.streaming" in error


def test_a_run_finished_before_there_were_these_keys_stays_finished():
    from hfpipe.artifact import hashed_config
    from hfpipe.config import load_recipe
    from hfpipe.stages import stage_types

    for stage in load_recipe("tiny", stage_types()).stages.values():
        config = hashed_config(stage, 0, 1)
        assert "balance" not in json.dumps(config)
        assert "decontaminate" not in json.dumps(config)
    changed = load_recipe("tiny", stage_types(), ["sft.data.balance=kind"]).stages["sft"]
    assert hashed_config(changed, 0, 1)["data"]["balance"] == "kind"


# Counting in bounded memory


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 40), max_size=30), max_size=12), st.integers(1, 100))
def test_counting_in_bounded_memory_is_exact(parts, limit):
    from hfpipe.data.groups import Groups

    groups, first, expected, row = Groups(limit), {}, {}, 0
    for part in parts:
        groups.add(np.array(part, dtype=np.uint64) * np.uint64(2**57 + 1), np.arange(row, row + len(part)))
        for key in part:
            if key in first:
                expected[row] = first[key]
            first.setdefault(key, row)
            row += 1
    found = {r: f for rows, firsts in groups.repeats() for r, f in zip(rows.tolist(), firsts.tolist(), strict=True)}
    assert found == expected


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_near_duplicates_do_not_depend_on_the_memory_given(seed):
    from hfpipe.data.groups import NearDuplicates
    from hfpipe.data.shingles import hash_words

    rng = random.Random(seed)
    texts = [sentence(rng, 40) for _ in range(30)]
    texts += [f"{text} {rng.choice(WORDS)}" for text in texts[:10]]
    found = []
    for limit in (1, 1 << 20):
        near = NearDuplicates(limit)
        for start_ in range(0, len(texts), 7):
            part = texts[start_ : start_ + 7]
            near.add(hash_words(part), np.arange(start_, start_ + len(part)))
        found.append([part.tolist() for part in near.pairs()])
    assert found[0] == found[1] == [list(range(30, 40)), list(range(10))]


def test_thinned_ngrams_still_find_what_is_shown(monkeypatch):
    from hfpipe.data import held_out
    from hfpipe.data.held_out import HeldOut

    monkeypatch.setattr(held_out, "_MOST", 2000)  # a size at which thinning begins, in place of gigabytes of text
    rng = random.Random(0)
    texts = [sentence(rng, 300) for _ in range(60)]
    index = HeldOut()
    index.add("a", ((f"a line {n}", {"text": text}) for n, text in enumerate(texts, 1)))
    assert index._part > 4
    rows = [{"text": f"{sentence(rng, 50)} {texts[7][:-1]} {sentence(rng, 50)}"}, {"text": sentence(rng, 300)}]
    assert [(match.row, match.item) for match in index.find(rows)] == [(0, 7)]


def test_a_turn_of_weight_0_is_no_trained_share(tmp_path):
    turns = [{"role": "user", "content": "a" * 50}, {"role": "assistant", "content": "b" * 50}]
    shares = []
    for weight in (1, 0):
        row = {"messages": [*turns[:1], turns[1] | {"weight": weight}, *turns]}
        (tmp_path / "talk.jsonl").write_text(json.dumps(row) + "\n")
        (found,) = json.loads(hfpipe("data", "check", tmp_path / "talk.jsonl", "--json").stdout)["sources"]
        shares.append(found["trained"])
    assert shares[1] == pytest.approx(shares[0] / 2, abs=1e-4)
