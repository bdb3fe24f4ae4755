"""A new domain: pieces learnt from where the old merges stop, rows that start from their parts, both domains scored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfpipe.data import tinyworld
from hfpipe.errors import UserError
from hfpipe.training.pieces import append_merges, extend_with_pieces, fertility, learn_merges, new_pieces, start_pieces
from hfpipe.training.templates import load_chat_template
from hfpipe.training.tokenizers import encode_text, extend_tokenizer, resize_embeddings, train_tokenizer

from .conftest import ROOT, hfpipe, stage_json

OLD = [row["text"] for row in tinyworld.rows("pretrain", size=300)]
NEW = [row["text"] for row in tinyworld.rows("foreign", size=150)]
SMALLEST = 13 + 256  # control tokens and bytes: no merge at all


def train(texts, vocab_size, type="bpe"):
    return train_tokenizer(texts, type=type, vocab_size=vocab_size, chat_template=load_chat_template("hfpipe"))


def model_of(tokenizer):
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"]


@pytest.fixture(scope="module")
def extended():
    """(before, after): a tokenizer of the old domain, and the same with 80 pieces of the new one."""
    before, after = train(OLD, 400), train(OLD, 400)
    assert append_merges(after, learn_merges(after, NEW, 80)) == 80
    return before, after


# --- the tokenizer ---


@pytest.mark.parametrize("first", [SMALLEST, 300])
def test_to_go_on_is_to_have_trained_longer(first):
    """On the text that it was trained with, a tokenizer comes out as if it had been trained to the end at once."""
    begun, whole = train(NEW, first), train(NEW, 360)
    merges = learn_merges(begun, NEW, 360 - first)
    assert learn_merges(begun, NEW, 360 - first) == merges
    append_merges(begun, merges)
    assert model_of(begun)["merges"] == model_of(whole)["merges"]
    assert begun.get_vocab() == whole.get_vocab()


def test_old_merges_and_ids_stay_and_the_old_domain_is_split_as_before(extended, tmp_path):
    from transformers import AutoTokenizer

    before, after = extended
    merges = model_of(before)["merges"]
    assert model_of(after)["merges"][: len(merges)] == merges
    assert before.get_vocab().items() <= after.get_vocab().items()
    added = after.get_vocab().keys() - before.get_vocab().keys()
    assert sorted(after.get_vocab()[piece] for piece in added) == list(range(400, 480))
    old, now = encode_text(before, OLD), encode_text(after, OLD)
    assert all(a == b for a, b in zip(old, now, strict=True) if max(b) < 400)
    assert sum(i >= 400 for ids in now for i in ids) < 0.02 * sum(map(len, now))
    lines = [line for text in OLD for line in text.split("\n")]  # a document may have any number of them
    pairs = zip(encode_text(before, lines), encode_text(after, lines), strict=True)
    assert sum(a == b for a, b in pairs) > 0.75 * len(lines)
    assert fertility(after, NEW)["tokens_per_word"] < 0.75 * fertility(before, NEW)["tokens_per_word"]
    # Tokens that are added later take ids of their own, here and after a reload.
    after.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert encode_text(again, NEW) == encode_text(after, NEW)
    assert extend_tokenizer(again, load_chat_template("chatml")) == 2
    assert sorted(again.get_vocab().values()) == list(range(482))


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2Tokenizer"])
def test_hub_tokenizers_keep_their_class_and_their_pieces(name, tmp_path):
    import transformers

    begun = model_of(train(OLD, 400))
    vocab = {piece: i - 13 for piece, i in begun["vocab"].items() if i >= 13}
    vocab["<|endoftext|>"] = len(vocab)
    tokenizer = getattr(transformers, name)(vocab=vocab, merges=[tuple(pair) for pair in begun["merges"]])
    extend_tokenizer(tokenizer, load_chat_template("hfpipe"))  # ids of added tokens between the old pieces' and the new
    size = len(tokenizer)
    assert append_merges(tokenizer, learn_merges(tokenizer, NEW, 60)) == len(tokenizer) - size == 60
    tokenizer.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is type(tokenizer)
    assert encode_text(again, NEW) == encode_text(tokenizer, NEW)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert extend_tokenizer(again, load_chat_template("chatml")) == 2
    assert sorted(again.get_vocab().values()) == list(range(len(again)))


def test_a_tokenizer_that_falls_back_on_bytes_is_refused(small):
    from transformers import LlamaTokenizer

    with pytest.raises(UserError, match="does not split text into words of bytes"):
        extend_with_pieces(
            small.job("domain"), LlamaTokenizer(vocab={"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}, merges=[])
        )


@given(st.text(st.characters(codec="utf-8")) | st.sampled_from(NEW))
@settings(max_examples=100, deadline=None)
def test_any_text_comes_back_unchanged(extended, text):
    _, after = extended
    (ids,) = encode_text(after, [text])
    assert after.decode(ids[1:]) == text


def test_a_text_that_spells_a_control_token_makes_no_piece_of_it():
    tokenizer = train(["a"], SMALLEST)
    merges = learn_merges(tokenizer, ["<|user|> <|user|>"] * 9, 20)
    assert merges
    assert all("".join(pair) not in tokenizer.get_added_vocab() for pair in merges)


def test_fertility_counts_words_and_bytes():
    tokenizer = train(["a"], SMALLEST)  # a token a byte
    assert fertility(tokenizer, ["aé b", "c"]) == {"tokens_per_word": 2.0, "bytes_per_token": 1.0}


@pytest.mark.parametrize("type", ["unigram", "wordpiece"])
def test_only_byte_pair_merging_goes_on(type, small):
    with pytest.raises(UserError, match=rf"(?i)domain\.yaml: tokenizer\.add_pieces: .* is {type}, and only byte-pair"):
        extend_with_pieces(small.job("domain"), train(OLD, 400, type))


# --- the embeddings ---


@pytest.mark.parametrize("tied", [True, False])
def test_a_piece_starts_from_the_mean_of_its_old_pieces(tied):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    before, after = train(["a"], SMALLEST), train(["a"], SMALLEST)
    append_merges(after, learn_merges(after, NEW, 50))
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=SMALLEST, tie_word_embeddings=tied, **shape)).eval()
    ids = torch.tensor(encode_text(before, OLD[:1]))
    with torch.no_grad():
        logits = model(ids).logits
        resize_embeddings(model, after, 50)
        start_pieces(model, after, before)
        now = model(ids).logits
    # The old tokenizer has bytes alone: a piece was split into its letters.
    parts = {i: before.convert_tokens_to_ids(list(p)) for p, i in after.get_vocab().items() if i >= SMALLEST}
    assert len(parts) == 50
    assert new_pieces(after, before) == parts
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):
        for piece, old in parts.items():
            torch.testing.assert_close(end.weight[piece], end.weight[old].mean(0))
    # Old text: the old tokens' logits stay, and a new one's is the mean of its parts', so by Jensen's inequality the
    # loss grows by no more than the log of one and the mean chances of the parts.
    torch.testing.assert_close(now[..., :SMALLEST], logits)
    chances = logits.softmax(-1)
    most = torch.log1p(torch.stack([chances[..., old].mean(-1) for old in parts.values()]).sum(0))
    grown = logits.log_softmax(-1)[..., 0] - now.log_softmax(-1)[..., 0]
    assert (grown > 0).all()
    assert (grown <= most + 1e-5).all()


# --- the recipe ---

SMALLER = {
    "limit: 4000": "limit: 300", "limit: 8000": "limit: 300", "limit: 3000": "limit: 200", "add_pieces: 400": "add_pieces: 60",
    "vocab_size: 768": "vocab_size: 400", "hidden_size: 96": "hidden_size: 48", "num_hidden_layers: 3": "num_hidden_layers: 1",
    "intermediate_size: 256": "intermediate_size: 64", "max_steps: 250": "max_steps: 12", "max_rows: 200": "max_rows: 20",
    "no_pieces]": "no_pieces, sft]", "samples: 4": "samples: 1",
}  # fmt: skip
SFT = """
stage: sft
model: {from: domain}
data: {train: [{path: tinyworld/foreign, as: text, limit: 50}]}
regularize: {freeze_embeddings: true}
trainer: {max_steps: 3, max_length: 128, per_device_train_batch_size: 2, activation_checkpointing: false}
"""


class Small:
    """The recipe `domain`, shrunk, with a stage after it that knows nothing of the new pieces."""

    def __init__(self, folder: Path):
        self.recipe, self.run = folder / "recipe", folder / "run"
        shutil.copytree(ROOT / "stage_configs" / "domain", self.recipe)
        (self.recipe / "sft.yaml").write_text(SFT)
        for file in self.recipe.glob("*.yaml"):
            text = file.read_text()
            for large, little in SMALLER.items():
                text = text.replace(large, little)
            file.write_text(text)
        self.output = hfpipe("run", self.recipe, "--out", self.run).stdout

    def tokenizer(self, stage):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.run / stage)

    def job(self, stage):
        from hfpipe.config import load_recipe
        from hfpipe.stages import stage_types
        from hfpipe.training.job import make_job

        recipe = load_recipe(self.recipe, stage_types())
        return make_job(recipe, recipe.stages[stage], self.run)

    def scores(self, stage):
        return json.loads((self.run / stage / "eval.json").read_text())


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return Small(tmp_path_factory.mktemp("domain"))


def test_the_recipe_extends_scores_both_domains_and_goes_on(small):
    from transformers import AutoModelForCausalLM

    vocab = {stage: len(small.tokenizer(stage)) for stage in ("pretrain", "domain", "no_pieces", "sft")}
    assert vocab == {"pretrain": 400, "domain": 460, "no_pieces": 400, "sft": 460}
    assert AutoModelForCausalLM.from_pretrained(small.run / "sft").config.vocab_size == 460
    for stage in ("pretrain", "domain", "no_replay", "no_pieces", "sft"):
        scored = small.scores(stage)["held_out_domains"]
        assert scored.keys() == {"old", "new"}
        assert all(scores["bits_per_byte"] > 0 and scores["perplexity"] > 1 for scores in scored.values())
    before, after = (small.scores(stage)["held_out_domains"]["new"] for stage in ("pretrain", "domain"))
    assert after["tokens"] < before["tokens"]
    assert after["bits_per_byte"] < before["bits_per_byte"]
    fertile = stage_json(small.run / "domain")["metrics"]["fertility"]
    assert fertile == small.scores("domain")["fertility"]
    held_out = [row["text"] for row in tinyworld.rows("foreign", "validation", size=300)][:20]
    assert fertile["new"] == {
        "before": fertility(small.tokenizer("pretrain"), held_out), "after": fertility(small.tokenizer("domain"), held_out),
    }  # fmt: skip
    assert fertile["new"]["after"]["tokens_per_word"] < fertile["new"]["before"]["tokens_per_word"]
    assert "fertility" not in small.scores("no_pieces")
    assert "60 pieces added, their rows start from the mean of those that they were before" in "".join(
        file.read_text() for file in (small.run / "logs").glob("domain*")
    )


def test_the_scorecard_shows_both_domains(small):
    new = small.scores("domain")["held_out_domains"]["new"]["bits_per_byte"]
    (row,) = (line for line in small.output.splitlines() if line.startswith("bits per byte new"))
    assert f"{new:.2f}" in row.split()
    assert "not to be compared between stages of different tokenizers" in small.output
    words = small.scores("domain")["fertility"]["new"]
    told = f"new {words['before']['tokens_per_word']:.2f} -> {words['after']['tokens_per_word']:.2f} tokens a word"
    assert told in small.output
    report = (small.run / "report.html").read_text()
    assert "perplexity old" in report
    assert f"{words['after']['tokens_per_word']:.2f} ({words['after']['bytes_per_token']:.2f})" in report


def test_before_anything_has_trained_the_tokenizer_is_the_one_that_comes(small):
    from hfpipe.training.models import load_tokenizer

    foreseen = load_tokenizer(small.job("sft"), about_to_run=["pretrain", "domain", "sft"])
    assert foreseen.backend_tokenizer.to_str() == small.tokenizer("domain").backend_tokenizer.to_str()
    shown = hfpipe("inspect", small.recipe / "domain.yaml", "--out", small.run, "--row", 1, "--json").stdout
    assert max(i for _, i, _ in json.loads(shown)["sides"]["row"]) >= 400


def test_a_second_run_does_nothing_and_other_pieces_are_another_stage(small):
    planned = hfpipe("plan", small.recipe, "--out", small.run).stdout.splitlines()
    assert sum(line.endswith(" done") for line in planned) == 6
    said = hfpipe("plan", small.recipe, "--out", small.run, "--set", "domain.tokenizer.add_pieces=61").stdout
    assert "changed: tokenizer.add_pieces 60 -> 61" in said


def test_a_stage_without_pieces_has_the_identity_that_it_had():
    from hfpipe.artifact import hashed_config
    from hfpipe.config import load_recipe
    from hfpipe.stages import stage_types

    recipe = load_recipe("tiny", stage_types())
    assert hashed_config(recipe.stages["sft"], 0, 1)["tokenizer"] == {"chat_template": None}


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("{min_frequency: 3}", "tokenizer.min_frequency without tokenizer.add_pieces"),
        ("{add_pieces: 5, from: [{path: tinyworld/foreign, split: validation}]}", "from training text alone"),
        ("{add_pieces: 5, from: [{path: tinyworld/foreign, weight: 1}]}", "weight and balance have no meaning here"),
        ("{add_pieces: 5, from: [{path: tinyworld/foriegn}]}", "Did you mean `foreign`?"),
    ],
)
def test_what_is_wrong_together_is_told_at_once(section, said, tmp_path):
    folder = shutil.copytree(ROOT / "stage_configs" / "domain", tmp_path / "recipe")
    text = (folder / "no_pieces.yaml").read_text()
    (folder / "no_pieces.yaml").write_text(text + f"tokenizer: {section}\n")
    assert said in hfpipe("plan", folder, check=2).stderr


def test_the_readme_shows_the_recipe():
    shown = (ROOT / "README.md").read_text().partition("# stage_configs/domain/domain.yaml\n")[2].partition("```")[0]
    ours = (ROOT / "stage_configs" / "domain" / "domain.yaml").read_text()
    lines = [line.partition("  #")[0].rstrip() for line in shown.splitlines()]
    assert len(lines) > 8
    assert set(lines) <= set(ours.splitlines())


def test_no_sentence_of_the_new_language_is_in_two_splits():
    seen = {}
    for split in ("train", "validation", "test"):
        for row in tinyworld.rows("foreign", split, size=300):
            for sentence in row["text"].rstrip(".").split(". "):
                assert seen.setdefault(sentence, split) == split
    assert len(set(seen.values())) == 3
