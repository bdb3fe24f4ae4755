"""Sources: files of every kind, bad input, splits that share no text, and the real files under shared/data/real."""

import gzip
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from hfpipe.data.rows import row_problem
from hfpipe.data.sources import content_hash, load_source, read_rows
from hfpipe.data.splits import SPLITS, normalise, split_key, split_of
from hfpipe.errors import UserError
from hfpipe.sections import Source

from .conftest import REAL, hfpipe


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HFPIPE_CACHE", str(tmp_path / "cache"))


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(path, split="all", **given):
    loaded = load_source(Source(path=str(path)), split=split, **given)
    return loaded, list(loaded.rows())


def message_of(act):
    with pytest.raises(UserError) as error:
        act()
    return str(error.value)


# Files of every kind

PAIRS = [{"prompt": "Hi", "completion": 'He said "a,\nb"'}, {"prompt": "Ünï", "completion": "Yes"}]


def write_json(path):
    path.write_text(json.dumps(PAIRS, indent=1))


def write_object(path):
    path.write_text(json.dumps({"version": 1, "data": PAIRS}))


def write_lines(path):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in PAIRS) + "\n\n", encoding="utf-8-sig")


def write_gz(path):
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in PAIRS).encode()))


def write_parquet(path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(PAIRS), path)


def write_table(path):
    import csv

    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, PAIRS[0], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(PAIRS)


@pytest.mark.parametrize(
    ("name", "writer"),
    [
        ("a.json", write_json),
        ("a.json", write_object),
        ("a.json", write_lines),
        ("a.jsonl", write_lines),
        ("a.ndjson", write_lines),
        ("a.jsonl.gz", write_gz),
        ("a.parquet", write_parquet),
        ("a.csv", write_table),
        ("a.tsv", write_table),
    ],
)
def test_every_kind_of_file_gives_the_same_numbered_rows(tmp_path, name, writer):
    writer(tmp_path / name)
    assert list(read_rows(str(tmp_path / name))) == [(1, PAIRS[0]), (2, PAIRS[1])]


def test_what_datasets_saves_to_disk_is_read(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = [{"prompt": f"q{n}", "completion": "a"} for n in range(6)]
    saved = Dataset.from_list(rows)
    saved.save_to_disk(tmp_path / "one", num_shards=2)
    saved.map(lambda row: {"completion": "b"}, cache_file_name=str(tmp_path / "one" / "cache-0f.arrow"))
    assert [row for _, row in read_rows(str(tmp_path / "one"))] == rows
    DatasetDict({"train": saved, "test": saved.select([1, 4])}).save_to_disk(tmp_path / "two")
    train, test = json.loads(hfpipe("data", "check", tmp_path / "two", "--json").stdout)["sources"]
    assert [(found["split"], found["rows"]) for found in (train, test)] == [("train", 6), ("test", 2)]
    assert [row for _, row in read_rows(str(tmp_path / "two"), split="test")] == [rows[1], rows[4]]


def test_a_folder_is_read_in_natural_order_without_its_readme(tmp_path):
    for number in (10, 9, 1):
        write(tmp_path / f"part{number}.jsonl", {"text": str(number)})
    (tmp_path / "README.md").write_text("About")
    write(tmp_path / ".cache" / "part2.jsonl", {"text": "hidden"})
    assert [row["text"] for _, row in read_rows(str(tmp_path))] == ["1", "9", "10"]


@pytest.mark.parametrize(
    ("text", "form", "documents"),
    [
        (
            " \n = A = \n\n a\n = = B = = \n b\n\n = C = \n c\n",
            "plain text, 2 articles",
            ["= A = \n\n a\n = = B = = \n b", "= C = \n c"],
        ),
        ("One\ntwo\n\n \nthree\n", "plain text, 2 paragraphs", ["One\ntwo", "three"]),
        ("a line\n" * 999 + "the last\n" * 2, "plain text, 1001 text lines", ["a line", "the last"]),
    ],
)
def test_plain_text_is_read_as_documents(tmp_path, text, form, documents):
    (tmp_path / "a.txt").write_text(text)
    loaded, rows = load(tmp_path / "a.txt")
    assert loaded.form_seen == form
    assert [row["text"] for row in rows] == documents


def test_a_markdown_file_is_one_document(tmp_path):
    (tmp_path / "a.md").write_text("# A\n\nText.\n")
    assert list(read_rows(str(tmp_path / "a.md"))) == [(1, {"text": "# A\n\nText."})]


def test_json_lines_are_read_lazily(tmp_path):
    path = tmp_path / "long.jsonl"
    with path.open("w") as file:
        file.writelines(f'{{"text": "{number} {"word " * 40}"}}\n' for number in range(200_000))
    tracemalloc.start()
    assert next(itertools.islice(read_rows(str(path)), 199_999, None))[0] == 200_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 40e6
    assert peak < 1e6


# Bad input


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.json", b"\n", "a.json is empty"),
        ("a.json", b"[]", "a.json is empty"),
        ("a.txt", b" \n\n", "a.txt is empty"),
        ("a.csv", b"text\n", "a.csv is empty"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text" "b"}\n', "a.jsonl: malformed JSON at line 3, column 9"),
        ("a.jsonl", b'[{"text": "a"},\n{"text": "b"}]', "such a file's name ends in .json"),
        (
            "a.jsonl",
            b'[{"text": "a"}, {"text": "b"}]',
            "line 1 is list, expected an object with named fields. It begins",
        ),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b", "text": "c"}', "a.jsonl: line 2 has the key `text` twice"),
        ("a.jsonl", b'{"messages": [{}, {"role": "a", "role": "b"}]}', "a.jsonl: line 1 has the key `role` twice"),
        ("a.json", b'[{"a": [{}]},\n{"a": [{"b": 1, "b": 1}]}]', "a.json: row 2 has the key `b` twice"),
        ("a.json", b'{"n": 1, "rows": [{"a": 1, "a": 2}]}', "a.json: row 1 has the key `a` twice"),
        ("a.json", b'{"rows": [], "rows": [{"a": 1}]}', "a.json: an object has the key `rows` twice"),
        ("a.csv", b"question,answer,answer\na,b,c\n", "a.csv: line 1 names the column `answer` twice"),
        ("a.csv", b"question;answer\na;b\n", "expected a comma between the columns, found a semicolon"),
        ("a.tsv", b"question,answer\na,b\n", "expected a tab between the columns, found a comma"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', "a.jsonl: line 2 is list, expected an object"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl: JSON at line 1 cannot be read"),
        ("a.json", b'[{"text": "a"},\n {"text" "b"}]', "a.json: malformed JSON at line 2, column 10"),
        ("a.json", b'{"a": [], "b": []}', "found an object with 2"),
        ("a.json", b"3", "expected an array of rows, found int"),
        ("a.json", b'[{"text": "a"}, 3]', "a.json: row 2 is int"),
        (
            "a.jsonl",
            b'\xef\xbb\xbf{"text": "a"}\n{"text": "\xff"}\n',
            "a.jsonl: invalid UTF-8 at line 2 (byte 27 is 0xff)",
        ),
        ("a.txt", b"One\n\ntw\xe9\n", "a.txt: invalid UTF-8 at line 3 (byte 7 is 0xe9)"),
        ("a.csv", b"text,kind\na,b\nc\n", "a.csv: line 3 has not the 2 fields of the header"),
        ("a.csv", b'text\n"a\n', "a.csv: malformed near line"),
        ("a.parquet", b"no", "a.parquet is not a parquet file that can be read"),
        ("a.arrow", b"no", "a.arrow is not an Arrow stream that can be read"),
        ("a.jsonl.gz", b"no", "a.jsonl.gz cannot be read"),
        ("a.jsnol", b"{}", "a.jsnol: unknown extension; known: .jsonl"),
        ("a.jsnol", b"{}", "Did you mean `.json"),
    ],
)
def test_a_bad_file_is_refused_with_its_place(tmp_path, name, content, found):
    (tmp_path / name).write_bytes(content)
    assert found in message_of(lambda: list(read_rows(str(tmp_path / name))))


def test_what_is_not_there_is_named_with_what_is_near(tmp_path):
    write(tmp_path / "train.jsonl", {"text": "a"})
    message = message_of(lambda: read_rows(str(tmp_path / "trian.jsonl")))
    assert "no such file or folder" in message
    assert "Did you mean `train.jsonl`?" in message
    assert "There is no folder" in message_of(lambda: read_rows(str(tmp_path / "dta" / "a.jsonl")))


@pytest.mark.parametrize("given", ["data/a.jsonl", "data"])
def test_a_link_to_nothing_is_told(tmp_path, given):
    write(tmp_path / "data" / "b.jsonl", {"text": "b"})
    (tmp_path / "data" / "a.jsonl").symlink_to("gone.jsonl")
    told = hfpipe("data", "check", tmp_path / given, check=2).stderr
    assert "a.jsonl: this is a link to gone.jsonl, which is not there" in told
    assert "Did you mean" not in told
    assert told.count("\n") == 1


def test_a_folder_without_data_or_of_several_kinds_is_refused(tmp_path):
    (tmp_path / "model.bin").write_text("x")
    assert "no data files in this folder" in message_of(lambda: read_rows(str(tmp_path)))
    write(tmp_path / "a.jsonl", {"text": "a"})
    (tmp_path / "b.txt").write_text("b")
    assert "several kinds in one folder (.jsonl, .txt)" in message_of(lambda: read_rows(str(tmp_path)))


def test_an_error_begins_with_the_recipe_s_file_and_key(tmp_path):
    path = write(tmp_path / "a.jsonl", {"premise": "a"})
    message = message_of(lambda: load_source(Source(path=path), where="sft.yaml: data.train[0]"))
    assert message.startswith(f"sft.yaml: data.train[0]: {path}: rows in no known form. Keys found: premise.")


def test_rows_that_the_stage_cannot_use_are_refused_before_they_are_read(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "a"})
    message = message_of(lambda: load_source(Source(path=path), wanted="messages"))
    assert "its rows are `text`" in message
    assert "`as: text`" in message
    assert load_source(Source(path=path, as_="text"), wanted="messages").wanted == "text"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ({"split": "trian"}, "no split `trian`; there are train, validation, test and all. Did you mean `train`?"),
        ({"limit": 0}, "limit is 0"),
        ({"revision": "main"}, "`revision` and `name` are for datasets of the Hub"),
    ],
)
def test_a_source_that_makes_no_sense_is_refused(tmp_path, source, found):
    path = write(tmp_path / "a.jsonl", {"text": "a"})
    assert found in message_of(lambda: load_source(Source(path=path, **source)))


def run(code, *arguments, **environment):
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


def test_a_hub_id_while_offline_says_what_to_do():
    code = "import hfpipe.data.sources as s; next(s.read_rows('nobody/no-such-rows'))"
    for call in (code, code.replace("next(s.read_rows(", "s.content_hash(").replace("))", ")")):
        error = run(call, HF_HUB_OFFLINE="1").stderr
        assert "nobody/no-such-rows is not a local file or folder" in error
        assert "the Hub cannot be reached" in error


def test_local_files_and_tinyworld_need_no_heavy_library(tmp_path):
    path = write(tmp_path / "a.jsonl", *({"prompt": f"q{n}", "completion": "a"} for n in range(9)))
    code = """if True:
        import sys
        from hfpipe.data.sources import content_hash, load_source
        from hfpipe.sections import Source
        for path in sys.argv[1:]:
            content_hash(path, split="train")
            next(load_source(Source(path=path)).rows())
        print(sorted({"torch", "datasets", "transformers", "pyarrow", "numpy"} & set(sys.modules)))
    """
    result = run(code, path, "tinyworld/sft")
    assert result.stdout.strip() == "[]", result.stderr


# What is used, and what is not


def test_rows_not_used_are_counted_with_their_place_and_reason(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": "Hi", "completion": ""},
        {"prompt": "Hi"},
        {"prompt": "HI", "completion": " hello "},
        {"prompt": "Hi!", "completion": "Hello"},
        {"prompt": "Go", "completion": ""},
        {"prompt": "So", "completion": ""},
    )
    loaded, rows = load(path)
    assert [row["messages"][0]["content"] for row in rows] == ["Hi", "Hi!"]
    assert list(loaded.located_rows()) == [("a.jsonl line 1", rows[0]), ("a.jsonl line 5", rows[1])]
    assert loaded.counts.faults == {"empty assistant turn": 3, "no `completion`": 1}
    assert loaded.counts.duplicates == 1
    assert loaded.counts.places["empty assistant turn"] == ["a.jsonl line 2", "a.jsonl line 6", "a.jsonl line 7"]
    assert loaded.counts.examples == [
        "a.jsonl line 2: empty assistant turn",
        "a.jsonl line 3: no `completion`",
        "a.jsonl line 6: empty assistant turn",
    ]
    assert loaded.describe() == (
        f"{path}: prompt/completion, all: 2 rows used, 5 not (3 empty assistant turn, 1 no `completion`, 1 duplicate)"
    )
    assert json.loads(json.dumps(loaded.report()))["used"] == 2


@pytest.mark.parametrize("label", ["good", 2, -1])
def test_a_label_that_is_no_judgement_is_a_fault(tmp_path, label):
    labels = (0, True, "false", label)
    rows = [{"prompt": f"Hi {n}", "completion": "Hello", "label": given} for n, given in enumerate(labels)]
    path = write(tmp_path / "kto.jsonl", *rows)
    loaded, judged = load(path, wanted="unpaired")
    assert [row["label"] for row in judged] == [False, True, False]
    assert loaded.counts.faults == {"`label` is neither true nor false": 1}
    assert f"label is {label!r}, expected true or false" in loaded.counts.examples[0]
    assert "rename the column if it means something else" in message_of(lambda: load(path, wanted="messages"))


def test_a_limit_stops_reading(tmp_path):
    path = write(tmp_path / "a.jsonl", *({"text": f"row {n}"} for n in range(50)))
    loaded = load_source(Source(path=path, limit=7, split="all"))
    assert len(list(loaded.rows())) == 7
    assert loaded.counts.read == 7


def test_a_split_without_rows_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "alone"})
    empty = next(split for split in SPLITS if split != split_of({"text": "alone"}))
    message = message_of(lambda: load(path, empty))
    assert "All 1 rows fall into other splits" in message
    path = write(tmp_path / "b.jsonl", {"text": " "})
    assert "The first: b.jsonl line 1: empty text." in message_of(lambda: load(path))


# Splits


def test_a_split_ignores_case_punctuation_width_and_what_follows_the_question():
    asked = {"role": "user", "content": "What is 2 + 2, then?"}
    shouted = {"role": "user", "content": "WHAT  is ２ + 2 then"}
    answer = {"role": "assistant", "content": "4"}
    system = {"role": "system", "content": "Be a pirate."}
    rows = [
        {"messages": [asked, answer]},
        {"messages": [system, shouted, answer, asked, answer]},
        {"prompt": [shouted], "chosen": [answer], "rejected": [asked]},
        {"prompt": [system, asked], "completion": [answer], "label": True},
    ]
    assert {split_key(row) for row in rows} == {"what is 2 2 then"}
    assert len({split_of(row) for row in rows}) == 1


def test_splits_are_disjoint_complete_and_about_80_10_10_across_files(tmp_path):
    questions = [f"What is {n} times {n % 7}?" for n in range(3000)]
    sft = write(tmp_path / "sft.jsonl", *({"question": q, "answer": "a"} for q in questions[:2000]))
    pairs = ({"prompt": q.upper(), "chosen": "a", "rejected": "b"} for q in questions[1000:])
    dpo = write(tmp_path / "dpo.jsonl", *pairs)
    keys = {(path, split): [split_key(row) for row in load(path, split)[1]] for path in (sft, dpo) for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not {*keys[sft, one], *keys[dpo, one]} & {*keys[sft, other], *keys[dpo, other]}
    assert sum(map(len, keys.values())) == 4000
    assert 0.77 < len(keys[sft, "train"]) / 2000 < 0.83
    assert 0.08 < len(keys[sft, "test"]) / 2000 < 0.12


def test_bad_rows_are_counted_in_one_split_each(tmp_path):
    rows = [{"prompt": f"q{n}", "completion": [3, "", None][n % 3]} for n in range(300)]
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "q", "completion": "a"},
        *rows,
        *({"prompt": f"r{n}", "completion": "a"} for n in range(90)),
    )
    counts = [load(path, split)[0].counts for split in SPLITS]
    assert sum(sum(c.faults.values()) for c in counts) == 300
    assert all(c.read == 391 == c.other_splits + c.used + c.duplicates + sum(c.faults.values()) for c in counts)


def test_a_folder_s_own_splits_are_used_and_kept_whole(tmp_path):
    same = {"text": "the same"}
    write(tmp_path / "train-00000-of-00002.jsonl", same, same)
    write(tmp_path / "train-00001-of-00002.jsonl", {"text": "more"})
    write(tmp_path / "dev.jsonl", same)
    assert len(load(tmp_path, "train")[1]) == 3
    assert load(tmp_path, "validation")[1] == [same]
    assert len(load(tmp_path, "all")[1]) == 4
    assert "no split `test`; there are validation, train and all" in message_of(lambda: load(tmp_path, "test"))
    write(tmp_path / "extra.jsonl", same)
    assert "extra.jsonl belongs to no split" in message_of(lambda: load(tmp_path, "train"))


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ("train eval", "train test"),
        ("train eval test", "train validation test"),
        ("train val evaluation", "train validation test"),
        ("mydata_train mydata_test", "train test"),
        ("training testing", "train test"),
        ("my.dev-2 Train-00000-of-00001", "validation train"),
        ("train_test_split_test train_test_split_train", "test train"),
        ("train/a test/a", "train test"),
        ("latest trainer_notes", "all"),
        ("test_data/a test_data/b", "all"),
        ("train-1 train-2", "all"),
        ("code maths unit_test", "all"),
        ("dev_tools unit_test", "all"),
        ("2019/rows test-2020/rows", "all"),
    ],
)
def test_the_splits_that_names_say(tmp_path, names, found):
    for name in names.split():
        write(tmp_path / "rows" / f"{name}.jsonl", {"prompt": f"Which is {name}?", "completion": name})
    sources = json.loads(hfpipe("data", "check", tmp_path / "rows", "--json").stdout)["sources"]
    assert sorted(source["split"] for source in sources) == sorted(found.split())
    if found != "all":
        firsts = dict(zip(found.split(), names.split(), strict=True))
        for split, name in firsts.items():
            assert [row["messages"][1]["content"] for row in load(tmp_path / "rows", split)[1]] == [name]


def test_a_file_beside_a_split_is_not_merged_with_it(tmp_path):
    write(tmp_path / "train.jsonl", {"text": "a"})
    write(tmp_path / "held_out.jsonl", {"text": "b"})
    told = hfpipe("data", "check", tmp_path, check=2).stderr
    assert "held_out.jsonl belongs to no split, though train.jsonl does" in told
    assert told.count("\n") == 1


def test_titles_of_prose_are_no_splits(tmp_path):
    for name in ("Test cricket", "Mirror", "Sea", "Sky", "Training a dog"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert len(load(tmp_path)[1]) == 5
    (tmp_path / "Sea.txt").unlink()
    assert "Mirror.txt belongs to no split" in message_of(lambda: load(tmp_path))


def test_tinyworld_s_own_splits_are_used():
    loaded, rows = load("tinyworld/sft", "validation", seed=3)
    assert loaded.counts.read == loaded.counts.used == len(rows) > 0
    assert not {json.dumps(row) for row in rows} & {json.dumps(row) for row in load("tinyworld/sft", "test", seed=3)[1]}


def test_the_same_source_gives_the_same_rows_again(tmp_path):
    path = write(tmp_path / "a.jsonl", *({"text": f"row {n % 80}"} for n in range(100)))
    loaded, rows = load(path, "train")
    assert list(loaded.rows()) == rows
    assert loaded.counts == load(path, "train")[0].counts


# Hashes


def test_a_hash_follows_the_bytes_and_is_remembered(tmp_path):
    path = write(tmp_path / "data" / "a.jsonl", {"text": "a"})
    first = content_hash(path)
    assert content_hash(path) == first
    (memory,) = (tmp_path / "cache" / "hashes").iterdir()
    other = hashlib.sha256(b"other").hexdigest()
    memory.write_text(f"{other} {hashlib.sha256(other.encode()).hexdigest()[:16]}")
    assert content_hash(path) != first  # it was not read again
    memory.write_text(f"{other} damaged")
    assert content_hash(path) == first
    folder = content_hash(str(tmp_path / "data"))
    write(Path(path), {"text": "ab"})
    assert content_hash(path) != first
    assert content_hash(str(tmp_path / "data")) != folder
    other = write(tmp_path / "copy" / "a.jsonl", {"text": "a"})
    assert content_hash(other) == first


def test_a_hash_of_tinyworld_follows_its_arguments():
    given = [{}, {"seed": 1}, {"split": "test"}, {"size": 9}]
    assert len({content_hash("tinyworld/sft", **arguments) for arguments in given}) == 4


def test_a_pinned_hub_dataset_is_its_own_hash():
    assert content_hash("org/rows", revision="0" * 40, name="en") == f"org/rows@{'0' * 40} en"


# Real files: form seen, rows, used, faults, duplicates

FILES = {
    "alpaca_en_demo.json": ("alpaca", 999, 985, {}, 14),
    "c4_demo.jsonl": ("text", 300, 300, {}, 0),
    "dpo_en_demo.json": ("preference with a conversation", 300, 295, {}, 5),
    "glaive_toolcall_en_demo.json": ("sharegpt", 300, 265, {}, 35),
    "gsm8k_train.jsonl": ("question/answer", 2164, 2164, {}, 0),
    "hh_harmless_800.jsonl": (
        "preference, transcripts",
        800,
        796,
        {"empty assistant turn": 2, "roles out of order: assistant after assistant": 2},
        0,
    ),
    "kto_en_demo.json": ("unpaired preference, conversation", 300, 300, {}, 0),
    "wikitext2_valid.txt": ("plain text, 60 articles", 60, 60, {}, 0),
}


def real(name):
    if not (REAL / name).is_file():
        # The slices are other people's data and are not shipped with the project.
        pytest.skip(f"{REAL / name} is absent (HFPIPE_REAL_DATA names the folder)")
    return REAL / name


@pytest.mark.parametrize("name", FILES)
def test_a_real_file_is_recognised_and_every_row_accounted_for(name):
    loaded, rows = load(real(name))
    counts = loaded.counts
    seen = (loaded.form_seen, counts.read, counts.used, counts.faults, counts.duplicates)
    assert seen == FILES[name]
    assert not any(map(row_problem, rows))


@pytest.mark.parametrize("name", FILES)
def test_no_held_out_text_of_a_real_file_is_in_train(name):
    parts = {split: load(real(name), split)[1] for split in SPLITS}
    keys = {split: {split_key(row) for row in rows} for split, rows in parts.items()}
    assert all(not keys[one] & keys[other] for one, other in itertools.combinations(SPLITS, 2))
    assert sum(map(len, parts.values())) == FILES[name][2]
    if name == "wikitext2_valid.txt":
        train = normalise(" ".join(row["text"] for row in parts["train"]))
        assert not any(normalise(row["text"]) in train for row in parts["validation"] + parts["test"])


def test_glaive_keeps_its_tools_and_calls():
    raw = json.loads(real("glaive_toolcall_en_demo.json").read_text())
    _, rows = load(REAL / "glaive_toolcall_en_demo.json")
    calls = [m for row in rows for m in row["messages"] if m.get("tool_calls")]
    assert all(isinstance(m["tool_calls"][0]["function"]["arguments"], dict) for m in calls)
    values = {turn["value"] for row in raw for turn in row["conversations"] if turn["from"] == "function_call"}
    assert {json.dumps(json.loads(value)) for value in values} == {
        json.dumps({key: m["tool_calls"][0]["function"][key] for key in ("name", "arguments")}) for m in calls
    }
    offered = {json.dumps(row) for row in raw if json.loads(row["tools"])}
    assert sum("tools" in row for row in rows) == len(offered) > 100


def test_gsm8k_keeps_the_answer_and_loses_the_annotations():
    path = real("gsm8k_train.jsonl")
    _, rows = load(path)
    assert not any("<<" in row["messages"][1]["content"] for row in rows)
    assert all(row["messages"][1]["content"].splitlines()[-1] == row["answer"].splitlines()[-1] for row in rows)
    assert [row["answer"] for row in rows] == [row["answer"] for _, row in read_rows(str(path))]
