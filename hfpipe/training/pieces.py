"""New pieces for an old tokenizer: byte-pair merging goes on, on new text, from where it stopped.

The new merges come after the old ones, which keep their order and go first: text in which no new merge applies is split
as before, and every piece can be reached, unlike tokens added whole, which would be cut out of the middle of words.
After Purason et al. 2025, Teaching Old Tokenizers New Words (arXiv:2512.03989).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from hfpipe import artifact, paths
from hfpipe.errors import UserError
from hfpipe.sections import text_sources
from hfpipe.training.identity import hash_source
from hfpipe.training.tokenizers import embedding_values

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hfpipe.training.job import Job

_PLANE = 0x20000  # each old piece is one letter, from here on, while merges are learnt
_NOT_BYTES = ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
_VERSION = 1  # raise when the same text comes to give other pieces


def extend_with_pieces(job: Job, tokenizer: PreTrainedTokenizerBase) -> int:
    """Add the pieces that the stage's `tokenizer` section asks for; returns how many there are.

    Fewer come where the text has no more pairs of `min_frequency`. What is learnt is kept in the cache.

    Raises:
        UserError: the tokenizer is of another kind, or no text is left to learn from.
    """
    section, sources = job.stage.sections["tokenizer"], text_sources(job.stage)
    where = f"{job.stage.file}: tokenizer.add_pieces"
    state = _checked_state(tokenizer, where)
    hashes = [hash_source(source, "train", job.recipe.pipeline.seed) for source in sources]
    identity = [
        _VERSION,
        state,
        hashes,
        [dataclasses.asdict(s) for s in sources],
        section.add_pieces,
        section.min_frequency,
    ]
    kept = paths.cache_dir() / "pieces" / f"{artifact.digest(identity)[:32]}.json"
    found = artifact.read_record(kept)
    if found is None:
        merges = learn_merges(tokenizer, _texts(job), section.add_pieces, section.min_frequency)
        if not merges:
            raise UserError(
                f"{where}: no pair of pieces comes {section.min_frequency} times in the text. Give more text."
            )
        kept.parent.mkdir(parents=True, exist_ok=True)
        found = {"merges": merges}
        artifact.write_record(kept, found)
    return append_merges(tokenizer, found["merges"])


def _checked_state(tokenizer: PreTrainedTokenizerBase, where: str) -> dict[str, Any]:
    """The tokenizer's JSON; UserError where merging cannot go on in it."""
    if not tokenizer.is_fast:
        raise UserError(
            f"{where}: {type(tokenizer).__name__} keeps no merges to go on from: a fast tokenizer is needed."
        )
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = state["model"]["type"]
    if kind != "BPE":
        raise UserError(
            f"{where}: the tokenizer's model is {kind}, and only byte-pair merging (BPE) can go on. Leave it out."
        )
    if not state["pre_tokenizer"] or any(state["model"].get(key) for key in _NOT_BYTES):
        raise UserError(
            f"{where}: this BPE does not split text into words of bytes before it merges (as GPT-2's, Llama 3's and "
            "Qwen's do): pieces would be learnt across words. Leave it out."
        )
    ids = set(tokenizer.get_vocab().values())
    if ids != set(range(len(ids))):
        raise UserError(f"{where}: the tokenizer's ids have gaps, so that new ones could not follow. Leave it out.")
    return state


def _texts(job: Job) -> Iterator[str]:
    from hfpipe.data.report import SourceReport
    from hfpipe.training.prepare import read_source, refuse_bad_rows

    for source in text_sources(job.stage):
        report = SourceReport.of(source, "train")
        for _, row in read_source(source, report, wanted="text", job=job):
            report.used += 1
            yield row["text"]
        refuse_bad_rows(report, job, job.stage.data.max_bad_rows)


def learn_merges(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], add: int, min_frequency: int = 2
) -> list[list[str]]:
    """The merges that come next for `texts`, the commonest first: as many as make `add` new pieces.

    `tokenizers` does the counting: each old piece is spelt as one letter, and a BPE is trained on words of those.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    names = {i: piece for piece, i in tokenizer.get_vocab().items()}
    spelt = []
    texts = iter(texts)
    while batch := list(itertools.islice(texts, 1000)):
        plain = tokenizer(batch, add_special_tokens=False, split_special_tokens=True, verbose=False)
        spelt += [_spell(encoding) for encoding in plain.encodings]
    letters = len(set().union(*spelt) - {" "})
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # Twice as many as asked for: two ways to merge the same piece count as two here.
    size = letters + 2 * add
    trainer = trainers.BpeTrainer(vocab_size=size, min_frequency=min_frequency, show_progress=False)
    learner.train_from_iterator(spelt, trainer)
    special, known, merges = tokenizer.get_added_vocab(), set(names.values()), {}
    for pair in json.loads(learner.to_str())["model"]["merges"]:
        left, right = ("".join(names[ord(letter) - _PLANE] for letter in part) for part in pair)
        if {left, right, left + right} & special.keys():
            continue  # a text that spells out a control token
        add -= left + right not in known
        known.add(left + right)
        merges[left, right] = None
        if add == 0:
            break
    return [list(pair) for pair in merges]


def _spell(encoding: Any) -> str:
    letters, before = [], None
    for i, word in zip(encoding.ids, encoding.word_ids, strict=True):
        letters.append((" " if word != before else "") + chr(_PLANE + i))
        before = word
    return "".join(letters)


def append_merges(tokenizer: PreTrainedTokenizerBase, merges: list[list[str]]) -> int:
    """Give the tokenizer `merges` after its own, and their pieces the next ids; returns how many pieces are new."""
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = state["model"]["vocab"]
    # Upstream gives the next added token the id of the vocabulary's size: that has to count the ones there are.
    vocab |= {token["content"]: token["id"] for token in state["added_tokens"]}
    before = len(vocab)
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    state["model"]["merges"] += merges
    tokenizer.backend_tokenizer.model = Tokenizer.from_str(json.dumps(state)).model
    return len(vocab) - before


def new_pieces(tokenizer: PreTrainedTokenizerBase, old: PreTrainedTokenizerBase) -> dict[int, list[int]]:
    """The pieces that `tokenizer` has beyond `old`: their ids, each with the ids of what `old` splits it into."""
    special, model = tokenizer.get_added_vocab(), getattr(old, "backend_tokenizer", None)
    added = {piece: i for piece, i in tokenizer.get_vocab().items() if i >= len(old) and piece not in special}
    return {i: [token.id for token in model.model.tokenize(piece)] for piece, i in added.items()} if model else {}


def start_pieces(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, old: PreTrainedTokenizerBase) -> None:
    """Set the rows of new pieces in the input and output embeddings, each to the mean of its old pieces' rows."""
    import torch

    pieces = new_pieces(tokenizer, old)
    with torch.no_grad():
        for values in embedding_values(model):
            for piece, parts in pieces.items():
                values[piece] = values[parts].float().mean(0).to(values.dtype)


def fertility(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> dict[str, float]:
    """How finely texts are split: `tokens_per_word` (words parted by white space) and `bytes_per_token` (of UTF-8)."""
    tokens = sum(
        map(len, tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids)
    )
    words, size = (sum(map(len, parts)) for parts in ([t.split() for t in texts], [t.encode() for t in texts]))
    return {"tokens_per_word": round(tokens / max(words, 1), 3), "bytes_per_token": round(size / max(tokens, 1), 3)}
