"""`hfpipe data prepare`: what each filter leaves out, shards that survive a kill, and a stage that trains on them."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hfpipe import artifact
from hfpipe.cli import main
from hfpipe.data.splits import split_of

from .conftest import ROOT, hfpipe, stage_json
from .sequences import MODEL
from .test_nothing_lost import checkpoints, kill, start, wait_for

ENGLISH = (
    "the of and that have with this from they would there their about which people water house garden children school "
    "river morning evening bread village window mountain summer winter letter mother brother teacher always never often "
    "walked looked talked carried opened closed answered remembered small large quiet green early late old young"
)
GERMAN = (
    "der die das und nicht mit einem eine werden haben sich auch nach über zwischen Straße Haus Garten Kinder Schule "
    "Wasser Fenster Morgen Abend immer niemals gegangen gesprochen geöffnet klein groß ruhig früh spät alt jung"
)
FILTERS = """
filters:
  - {type: GopherQualityFilter, min_doc_words: 40}
  - {type: GopherRepetitionFilter, dup_line_frac: 0.3}
  - {type: C4QualityFilter, min_num_sentences: 3}
  - {type: FineWebQualityFilter, short_line_thr: 0.5}
  - {type: LanguageFilter, languages: [en]}
mask_personal: true
decontaminate: true
minhash: {n_grams: 5, num_buckets: 14, hashes_per_bucket: 8}
executor: {type: local, tasks: 4, workers: 2}
"""


def document(rng: random.Random, words: str = ENGLISH, sentences: int = 8) -> str:
    made = (" ".join(rng.choices(words.split(), k=rng.randint(9, 14))) for _ in range(sentences))
    return " ".join(f"{sentence[0].upper()}{sentence[1:]}." for sentence in made)


def lines(rng: random.Random, count: int, length: int) -> str:
    return "\n".join(f"{' '.join(rng.choices(ENGLISH.split(), k=length)).capitalize()}." for _ in range(count))


def write(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_repetition_is_judged_as_upstream_judges_it():
    """Texts in which passages come again, of every length, beside signs, numbers and letters of several alphabets."""
    from datatrove.data import Document
    from datatrove.pipeline.filters import GopherRepetitionFilter

    from hfpipe.training import curate, gopher

    rng, found = random.Random(1), {True: 0}
    words = [*ENGLISH.split(), *GERMAN.split(), "don't", "...", "a", "aa", "3.14", "日本", "🙂", "x" * 40]
    options = {"language": curate.Words(), "dup_line_char_frac": 0.9, "dup_line_frac": 0.9}
    ours, theirs = gopher.GopherRepetitionFilter(**options), GopherRepetitionFilter(**options)
    for _ in range(1500):
        text = rng.choices(words, k=rng.randint(0, 200))
        for _ in range(rng.randint(0, 6) if text else 0):
            start = rng.randrange(len(text))
            place = rng.randrange(len(text))
            text[place:place] = text[start : start + rng.randint(1, 14)]
        doc = Document(text=rng.choice([" ", " ", "", "\n"]).join(text), id="")
        verdict = theirs.filter(doc)
        assert ours.filter(doc) == verdict, doc.text
        reason = verdict if verdict is True else verdict[1]
        found[reason] = found.get(reason, 0) + 1
    assert found[True] > 200, found
    assert found.keys() >= {f"top_{n}_gram" for n in (2, 3, 4)} | {f"duplicated_{n}_n_grams" for n in range(5, 11)}


def test_quality_is_judged_as_upstream_judges_it():
    """Texts of words, numbers, signs, bullets and ellipses in all shares, under limits that each may be turned off."""
    from datatrove.data import Document
    from datatrove.pipeline.filters import GopherQualityFilter

    from hfpipe.training import curate, gopher

    rng, found = random.Random(2), {}
    limits = {
        "min_doc_words": 20, "max_doc_words": 150, "min_avg_word_length": 3, "max_avg_word_length": 7,
        "max_symbol_word_ratio": 0.1, "max_bullet_lines_ratio": 0.9, "max_ellipsis_lines_ratio": 0.3,
        "max_non_alpha_words_ratio": 0.8, "min_stop_words": 2,
    }  # fmt: skip
    kinds = [
        ENGLISH.split(),
        GERMAN.split(),
        ["3.14", "7"],
        ["#", "…", "..."],
        ["日本", "🙂", "²", "-", "—"],
        ["a", "I"],
    ]
    kinds.append(["incomprehensibilities", "x" * 40])
    for _ in range(3000):
        options = {key: rng.choice([value, value, value, None]) for key, value in limits.items()}
        shares = [rng.random() ** rng.choice([1, 4]) for _ in kinds]
        words = [rng.choice(kind) for kind in rng.choices(kinds, weights=shares, k=rng.randint(1, 170))]
        for _ in range(rng.choice([0, 0, 1, 5])):
            words.insert(rng.randrange(len(words)), rng.choice(["\n• ", "\n- ", "...\n", "…\n", "\n"]))
        doc = Document(text=" ".join(words), id="")
        theirs = GopherQualityFilter(**options, language=curate.Words())
        verdict = theirs.filter(doc) if doc.text.strip() else (False, "gopher_short_doc")  # upstream divides by zero
        assert gopher.GopherQualityFilter(**options, language=curate.Words()).filter(doc) == verdict, doc.text
        reason = verdict if verdict is True else verdict[1]
        found[reason] = found.get(reason, 0) + 1
    assert found[True] > 100, found
    assert len(found) == 11, found


@settings(max_examples=500, deadline=None)
@given(st.text(st.sampled_from('abÀÉZ.!?。"” \n,1 日…')))
@example("A.B. C. d")
def test_sentences_are_those_of_upstream(text):
    from datatrove.utils.word_tokenizers import WhitespaceTokenizer

    from hfpipe.training.curate import Words

    assert Words().sent_tokenize(text) == WhitespaceTokenizer().sent_tokenize(text)


class Corpus:
    """A recipe beside its curate.yaml, and a corpus of clean documents with planted faults."""

    def __init__(self, folder: Path):
        rng = random.Random(0)
        self.folder, self.out, self.run = folder, folder / "prepared", folder / "run"
        self.clean = [document(rng) for _ in range(220)]
        self.near = [(text := document(rng), text.rsplit(" ", 1)[0] + " garden.") for _ in range(6)]
        self.held_out = [document(rng) for _ in range(5)]
        self.personal = [f"{document(rng)} Write to jane{n}@mailhost.net." for n in range(6)]
        self.planted = {
            "GopherQualityFilter": [document(rng, sentences=1) for _ in range(7)],
            "GopherRepetitionFilter": [
                "\n".join([line] * 6) for line in (document(rng, sentences=3) for _ in range(5))
            ],
            "C4QualityFilter": [f"{document(rng)} {{" for _ in range(4)],
            "FineWebQualityFilter": [lines(rng, 20, 4) for _ in range(3)],
            "LanguageFilter": [document(rng, GERMAN).replace(" ", " the of ", 1) for _ in range(8)],
        }
        near = [text for pair in self.near for text in pair]
        texts = [*self.clean, *near, *self.personal, *self.held_out, *(t for own in self.planted.values() for t in own)]
        rng.shuffle(texts)
        self.texts = texts
        for number in range(6):
            write(folder / "corpus" / f"part-{number}.jsonl", texts[number::6])
        write(folder / "held-out.jsonl", self.held_out)
        recipe = folder / "recipe"
        recipe.mkdir()
        (recipe / "pipeline.yaml").write_text(
            "name: nano\nstages: [tokenizer, pretrain]\nevaluate: {samples: 1, max_new_tokens: 4}\n"
        )
        (recipe / "tokenizer.yaml").write_text(
            f"stage: tokenizer\ntokenizer: {{vocab_size: 320}}\ndata: {{train: [{{path: {folder}/corpus}}]}}\n"
        )
        (recipe / "pretrain.yaml").write_text(
            f"stage: pretrain\nmodel: {{from: tokenizer, config: {MODEL}}}\n"
            f"data: {{max_length: 64, train: [{{path: {self.out}}}], eval: [{{path: {folder}/held-out.jsonl, split: all}}]}}\n"
            "trainer: {max_steps: 24, save_steps: 2, per_device_train_batch_size: 2, learning_rate: 1.0e-2}\n"
        )
        (recipe / "curate.yaml").write_text(
            f"output_folder: {self.out}\nsources: [{{path: {folder}/corpus}}]\ntokenizer: {self.run}/tokenizer\n{FILTERS}"
        )
        raw = f"pretrain.data.train=[{{path: {folder}/corpus}}]"
        hfpipe("run", recipe, "--out", self.run, "--to", "tokenizer", "--set", raw)
        self.printed = hfpipe("data", "prepare", recipe / "curate.yaml").stdout
        self.summary = json.loads((self.out / "_summary.json").read_text())

    def rows(self, split: str, folder: Path | None = None) -> list[dict]:
        files = sorted((folder or self.out).glob(f"{split}/*.parquet"))
        return [row for file in files for row in pyarrow.parquet.read_table(file).to_pylist()]

    def excluded(self, name: str) -> set[str]:
        found = self.out.glob(f"_excluded/*{name}/*.jsonl")
        return {json.loads(line)["text"] for file in found for line in file.read_text().splitlines()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    return Corpus(tmp_path_factory.mktemp("corpus"))


def split(text: str) -> str:
    return split_of({"text": text})


def test_each_filter_leaves_out_what_is_planted_and_counts_it(corpus):
    counts = {item["step"]: item["documents"] for item in corpus.summary["left_out"]}
    for name, texts in corpus.planted.items():
        assert corpus.excluded(name) == set(texts), name
        assert counts[name] == len(texts)
        assert f"{name:<24}{len(texts):>10} left out" in corpus.printed
    shown = {text for text in corpus.held_out if split(text) == "train"}
    assert corpus.excluded("decontaminate") == shown
    assert counts["decontaminate"] == len(shown) > 0
    assert counts["near duplicates"] == len(corpus.near)
    kept = [row["text"] for name in ("train", "validation", "test") for row in corpus.rows(name)]
    assert [len({*pair} & {*kept}) for pair in corpus.near] == [1] * len(corpus.near)
    assert len(kept) + sum(counts.values()) == corpus.summary["documents"] == len(corpus.texts)
    assert not [text for text in kept if "@mailhost.net" in text]
    assert sum("[e-mail j…]" in text for text in kept) == corpus.summary["masked"] == len(corpus.personal)


def test_only_the_train_part_is_in_train(corpus):
    unchanged = {*corpus.clean} - {text for pair in corpus.near for text in pair}
    for name in ("train", "validation", "test"):
        found = {row["text"] for row in corpus.rows(name)}
        assert found & unchanged == {text for text in corpus.clean if split(text) == name}
        assert corpus.summary["splits"][name]["documents"] == len(corpus.rows(name))
    assert not {row["text"] for row in corpus.rows("train")} & {*corpus.held_out}


def test_the_ids_are_those_that_a_stage_would_make(corpus):
    from transformers import AutoTokenizer

    from hfpipe.data.report import SourceReport
    from hfpipe.sections import Source
    from hfpipe.training.encode import encode_rows
    from hfpipe.training.tokenizers import encode_text

    tokenizer = AutoTokenizer.from_pretrained(corpus.run / "tokenizer")
    rows = corpus.rows("train")
    assert [row["input_ids"] for row in rows] == encode_text(tokenizer, [row["text"] for row in rows])
    assert corpus.summary["splits"]["train"]["tokens"] == sum(len(row["input_ids"]) for row in rows)
    other = [("row 1", {**rows[0], "input_ids": [5, 6, 7]})]  # ids of no text: they are taken as they are
    report = SourceReport.of(Source("shards"), "train")
    [(_, encoded)] = encode_rows(other, report, "text", tokenizer, 64)
    assert encoded["input_ids"] == encoded["labels"] == [5, 6, 7]


def test_killed_and_going_on_gives_the_same_shards(corpus, tmp_path):
    out = tmp_path / "again"
    file = corpus.folder / "recipe" / "again.yaml"
    file.write_text((corpus.folder / "recipe" / "curate.yaml").read_text().replace(str(corpus.out), str(out)))
    command = [sys.executable, "-m", "hfpipe", "data", "prepare", str(file)]
    scratch, stopped = Path(f"{out}.partial") / "scratch", 0
    for done in ("read/completions/*", "buckets/completions/*", "write/completions/*"):
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE, text=True)
        stopped += wait_for(process, lambda done=done: list(scratch.glob(done)))
        kill(process)
    assert stopped
    assert not out.exists()
    kept = {file.name: file.stat().st_mtime_ns for file in scratch.glob("read/completions/*")}
    hfpipe("data", "prepare", file)
    assert kept
    shards = [{n: f["sha256"] for n, f in artifact.checksums(f).items() if "parquet" in n} for f in (out, corpus.out)]
    assert shards[0] == shards[1]
    assert len(shards[0]) >= 9
    assert not Path(f"{out}.partial").exists()
    before = (out / "_summary.json").stat().st_mtime_ns
    hfpipe("data", "prepare", file)  # nothing to do
    assert (out / "_summary.json").stat().st_mtime_ns == before
    file.unlink()


def test_a_stage_streams_the_shards_and_goes_on(corpus, tmp_path):
    recipe, streamed = str(corpus.folder / "recipe"), ["--set", "pretrain.data.streaming=true"]
    whole, run = (Path(shutil.copytree(corpus.run, tmp_path / name)) for name in ("whole", "run"))
    hfpipe("run", recipe, "--out", whole, *streamed)
    process = start(run, *streamed, recipe=recipe)
    assert wait_for(process, lambda: len(checkpoints(run, "pretrain")) > 1)
    kill(process)
    hfpipe("run", recipe, "--out", run, *streamed)
    assert stage_json(run / "pretrain")["metrics"]["resumed_from_step"] > 0
    assert stage_json(run / "pretrain")["weights"] == stage_json(whole / "pretrain")["weights"]


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_shards_of_another_tokenizer_are_refused(corpus, tmp_path, streaming):
    raw = ["--set", "tokenizer.tokenizer.vocab_size=300", "--set", f"pretrain.data.streaming={streaming}"]
    done = hfpipe("run", corpus.folder / "recipe", "--out", tmp_path / "run", *raw, check=2)
    assert "its shards hold the ids of tokenizer" in done.stderr
    assert not (tmp_path / "run" / "pretrain").exists()


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (
            "min_doc_words: 40",
            "min_doc_word: 40",
            "min_doc_word = 40 is not a field of datatrove's GopherQualityFilter",
        ),
        ("min_doc_words: 40", "min_doc_words: few", "min_doc_words = 'few' is str"),
        ("GopherQualityFilter", "GopherQuality", "Did you mean `GopherQualityFilter`?"),
        ("languages: [en]", "languages: [xx]", "py3langid knows no language xx"),
        ("num_buckets: 14", "num_bucket: 14", "minhash.num_bucket = 14 is not a field of datatrove's MinhashConfig"),
        ("type: local", "type: [local]", "executor.type = \"['local']\": expected one of local, slurm, ray"),
        ("type: local", "type: lokal", "executor.type = 'lokal': expected one of local, slurm, ray"),
        ("tasks: 4", "tasks: 0", "executor.tasks = 0: expected 1 or more"),
        ("type: local, tasks: 4, workers: 2", "type: slurm, tasks: 4", "executor.time is missing"),
        ("mask_personal", "mask_personals", "is not a key here"),
        ("/tokenizer\n", "/tokenizers\n", "holds no tokenizer.json"),
        ("/corpus}", "/corpora}", "no such file or folder"),
        ("prepared\n", "recipe\n", "holds something else"),
    ],
)
def test_a_file_at_fault_is_told(corpus, capsys, before, after, said):
    file = corpus.folder / "recipe" / "bad.yaml"
    text = (corpus.folder / "recipe" / "curate.yaml").read_text()
    file.write_text(text.replace(before, after, 1))
    assert before in text
    assert main(["data", "prepare", str(file)]) == 2
    assert said in capsys.readouterr().err
    assert not list(corpus.folder.glob("*.partial"))
    file.unlink()


def test_without_a_recipe_nothing_is_held_out(corpus, tmp_path, capsys):
    shutil.copy(corpus.folder / "recipe" / "curate.yaml", tmp_path / "curate.yaml")
    assert main(["data", "prepare", str(tmp_path / "curate.yaml")]) == 2
    assert "no pipeline.yaml is beside this file" in capsys.readouterr().err
