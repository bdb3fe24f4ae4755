"""After every stage that leaves a causal LM: losses on held-out rows, the probes, and a few sampled answers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfpipe import artifact
from hfpipe.evaluation.answers import Question, generate_all, parse, said
from hfpipe.evaluation.diagnostics import diagnose
from hfpipe.evaluation.needle import ask_needles, build_needles
from hfpipe.evaluation.probes import capabilities, load_probes, score_probes
from hfpipe.evaluation.text_metrics import text_metrics
from hfpipe.sections import HeldOutText, TextData

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hfpipe.training.job import Job
    from hfpipe.training.prepare import Prepared

_TEXT_LENGTH = 512  # tokens of a held-out document that are read at once
_BATCH_TOKENS = 8192


def prepare_held_out(job: Job, tokenizer: PreTrainedTokenizerBase) -> Prepared | None:
    """The recipe's held-out pretraining text (`evaluate.text` of pipeline.yaml) as packed rows."""
    from hfpipe.training.prepare import prepare_held_out_text

    sources = job.recipe.pipeline.evaluate.text
    if not sources or job.stage.type.leaves != "model":
        return None
    return prepare_held_out_text(job, tokenizer, TextData(train=sources, max_length=_TEXT_LENGTH))


def _held_out_by_name(job: Job) -> dict[str, list[HeldOutText]]:
    """The sources of `evaluate.text` by their domain, those without one by their path."""
    named: dict[str, list[HeldOutText]] = {}
    for source in job.recipe.pipeline.evaluate.text:
        named.setdefault(source.domain or source.path, []).append(source)
    return named


def _score_domains(job: Job, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, float]]:
    """`held_out_loss` of the held-out text of each named domain."""
    from hfpipe.training.prepare import prepare_held_out_text

    scores = {}
    for name, sources in _held_out_by_name(job).items():
        if sources[0].domain:
            text = prepare_held_out_text(job, tokenizer, TextData(train=tuple(sources), max_length=_TEXT_LENGTH))
            scores[name] = held_out_loss(model, tokenizer, text.train, count_bytes=True)
    return scores


def _score_fertility(job: Job, tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, dict[str, float]]]:
    """`fertility` of held-out text, `data.eval` where there is no other, by the parent's tokenizer and the stage's own."""
    from hfpipe.data.report import SourceReport
    from hfpipe.training.models import parent_tokenizer
    from hfpipe.training.pieces import fertility
    from hfpipe.training.prepare import read_source

    tokenizers, limit = {"before": parent_tokenizer(job), "after": tokenizer}, job.recipe.pipeline.evaluate.max_rows
    own = {s.path: [s] for s in job.stage.data.eval if (s.as_ or job.stage.type.rows) == "text"}
    found = {}
    for name, sources in (_held_out_by_name(job) or own).items():
        texts = []
        for source in sources:
            rows = read_source(source, SourceReport.of(source, "eval"), wanted="text", job=job)
            texts += [row["text"] for _, row in itertools.islice(rows, source.limit or limit)]
        found[name] = {when: fertility(used, texts) for when, used in tokenizers.items()}
    return found


def evaluate_model(
    job: Job, folder: Path, prepare: Callable[[Job, PreTrainedTokenizerBase], Prepared]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Score the weights in `folder` and write `eval.json`, `probes.jsonl` and `samples.jsonl`.

    Returns the scores, and what became of the rows of each of the stage's sources.

    `prepare` gives the stage's rows for a tokenizer.

    Losses are mean negative log-likelihoods in nats per trained token; `perplexity` is their exponential.
    `capabilities` are described in `hfpipe.evaluation.probes`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hfpipe.training.adapters import load_pretrained
    from hfpipe.training.hardware import free_memory, own_device, scoring_options

    free_memory()
    section = job.stage.model
    options: dict[str, Any] = {"trust_remote_code": section.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(str(folder), **options)
    if section.attn_implementation:
        options["attn_implementation"] = section.attn_implementation
    model = load_pretrained(AutoModelForCausalLM, str(folder), **options, **scoring_options()).to(own_device()).eval()
    prepared = prepare(job, tokenizer)
    scores: dict[str, Any] = {}
    if prepared.eval is not None and job.stage.type.rows != "prompt":  # prompts have no answers to lose on
        scores["validation"] = held_out_loss(model, tokenizer, prepared.eval)
    text = prepare_held_out(job, tokenizer)
    if text is not None:
        scores["held_out_text"] = held_out_loss(model, tokenizer, text.train, count_bytes=True)
        scores |= {"held_out_domains": found} if (found := _score_domains(job, model, tokenizer)) else {}
    if getattr(job.stage.sections.get("tokenizer"), "add_pieces", 0):
        scores["fertility"] = _score_fertility(job, tokenizer)
    asked = load_probes(job.recipe.pipeline.evaluate.probes, f"{job.recipe.name}: evaluate.probes")
    told: list[dict[str, Any]] = []
    if asked:
        scores["capabilities"], told = score_probes(
            model, tokenizer, asked, job.recipe.pipeline.evaluate.max_new_tokens
        )
    if job.recipe.pipeline.evaluate.needle:
        needles, scores["needle"] = ask_needles(model, tokenizer, build_needles(job.recipe, tokenizer))
        found = capabilities(needles, [row["score"] for row in needles])
        scores["capabilities"], told = scores.get("capabilities", {}) | found, told + needles
    if told:
        artifact.write_jsonl(folder / "probes.jsonl", told)
    wanted = job.recipe.pipeline.evaluate.metrics
    if wanted and (told := _held_out_answers(model, tokenizer, prepared.report["samples"], job)):
        likelihoods = _reference_log_likelihoods(model, tokenizer, prepared.report["samples"])
        scores["text_metrics"] = text_metrics(wanted, *zip(*told, strict=True), log_likelihoods=likelihoods)
    rows = prepared.eval if job.stage.type.rows != "prompt" else None
    held_out = (document["input_ids"] for document in _documents(rows or ()))
    if told := diagnose(job.recipe.pipeline.evaluate, model, held_out):
        scores["diagnostics"] = told
    samples = sample_answers(model, tokenizer, prepared.report["samples"], job)
    artifact.write_jsonl(folder / "samples.jsonl", samples)
    artifact.write_json(folder / "eval.json", {"fingerprint": job.fingerprint, **scores, "samples": samples})
    return scores, prepared.report["sources"]


def held_out_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Any, count_bytes: bool = False
) -> dict[str, float]:
    """Token-weighted loss and perplexity over the documents of packed rows, or over the better or good answers.

    With `count_bytes`, `bits_per_byte` too: comparable between tokenizers.
    """
    total, tokens, size = 0.0, 0, 0
    for batch in _batches(rows):
        losses, trained = _token_losses(model, tokenizer, batch)
        total += losses.sum().item()
        tokens += int(trained.sum())
        if count_bytes:
            size += sum(_predicted_bytes(tokenizer, document["input_ids"]) for document in batch)
    loss = total / max(tokens, 1)
    scores = {"loss": round(loss, 4), "perplexity": round(math.exp(min(loss, 50)), 3), "tokens": tokens}
    return scores | ({"bits_per_byte": round(total / math.log(2) / max(size, 1), 4)} if count_bytes else {})


def _token_losses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: list[dict[str, Any]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """[documents, tokens - 1] of losses in nats, 0 where a token is not trained, and which are."""
    import torch

    from hfpipe.training.collate import PaddedCollator

    inputs = {k: v.to(model.device) for k, v in PaddedCollator(tokenizer.pad_token_id)(batch).items()}
    labels = inputs.pop("labels")[:, 1:]
    with torch.inference_mode():
        # From the right: a prompt that was learnt stands before the text, and has logits of its own.
        logits = model(**inputs, use_cache=False).logits[:, -labels.shape[1] - 1 : -1].float()
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none"
        )
    return losses.view_as(labels), labels != -100


def _predicted_bytes(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> int:
    """UTF-8 bytes of a document after its first token, which nothing predicts."""
    whole, first = (len(tokenizer.decode(part).encode()) for part in (ids, ids[:1]))
    return whole - first


def _batches(rows: Any) -> Iterator[list[dict[str, Any]]]:
    """Documents of like length together, as many at a time as fit `_BATCH_TOKENS`."""
    batch: list[dict[str, Any]] = []
    for document in sorted(_documents(rows), key=lambda d: len(d["input_ids"])):
        if batch and (len(batch) + 1) * len(document["input_ids"]) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(document)
    if batch:
        yield batch


def _documents(rows: Any) -> Iterator[dict[str, Any]]:
    for row in rows:
        if "prompt_ids" in row:
            good = row["chosen_ids"] if "chosen_ids" in row else row["completion_ids"] if row["label"] else None
            if good is not None:
                labels = [*[-100] * len(row["prompt_ids"]), *good]
                yield {"input_ids": [*row["prompt_ids"], *good], "labels": labels}
            continue
        start = 0
        for length in row["seq_lengths"]:
            part = slice(start, start + length)
            yield {"input_ids": row["input_ids"][part], "labels": row["labels"][part]}
            start += length


def sample_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], job: Job
) -> list[dict[str, Any]]:
    """Greedy answers to a few held-out prompts: `{"asked", "prompt", "answer", "reference"}`.

    `prompt` and `answer` show the special tokens, `asked` is the prompt without them, its turns parted by ` / `.
    """
    evaluate = job.recipe.pipeline.evaluate
    found = [_prompt(tokenizer, row) for row in _spread(rows, 2 * evaluate.samples)]
    prompts = list({asked: (asked, *rest) for asked, *rest in found}.values())[: evaluate.samples]  # none twice
    if not prompts:
        return []
    answers = generate_all(model, tokenizer, [ids for _, ids, _ in prompts], evaluate.max_new_tokens)
    return [
        {
            "asked": asked,
            "prompt": tokenizer.decode(ids),
            "answer": tokenizer.decode(answer),
            "reference": reference,
        }
        for (asked, ids, reference), answer in zip(prompts, answers, strict=True)
    ]


def _held_out_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], job: Job
) -> list[tuple[str, str]]:
    """(answer, reference) of every kept held-out row that is no plain text, as `said` puts them."""
    prompts = [_prompt(tokenizer, row) for row in rows if "text" not in row]
    budget = job.recipe.pipeline.evaluate.max_new_tokens
    answers = generate_all(model, tokenizer, [ids for _, ids, _ in prompts], budget)
    questions = Question([])
    return [
        (said(parse(tokenizer, ids, answer, questions)), reference)
        for (_, ids, reference), answer in zip(prompts, answers, strict=True)
    ]


def _reference_log_likelihoods(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]
) -> list[list[float]]:
    """What the model gives to each token of the references of `_held_out_answers`, in nats."""
    from hfpipe.training.templates import encode_completions, encode_prompts

    talks = [
        {"prompt": prompt, "completion": [answer], "tools": row.get("tools")}
        for row in rows
        if "text" not in row
        for prompt, answer in (_last_answer(row),)
    ]
    prompts = encode_prompts(tokenizer, talks)
    found = []
    for prompt, answer in zip(prompts, encode_completions(tokenizer, talks, prompts, "completion"), strict=True):
        document = {"input_ids": [*prompt, *answer], "labels": [*[-100] * len(prompt), *answer]}
        losses, trained = _token_losses(model, tokenizer, [document])
        found.append((-losses[trained]).tolist())
    return found


def _spread(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """`count` rows, of as many kinds as there are."""
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_kind.setdefault(str(row.get("kind")), []).append(row)
    turns = [row for group in zip(*_padded(list(by_kind.values())), strict=True) for row in group if row]
    return turns[:count]


def _padded(groups: list[list[Any]]) -> list[list[Any]]:
    longest = max(map(len, groups), default=0)
    return [[*group, *[None] * (longest - len(group))] for group in groups]


def _prompt(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> tuple[str, list[int], str]:
    """What a sample starts from, in words and as ids, and what the data goes on with."""
    from hfpipe.training.templates import encode_prompts
    from hfpipe.training.tokenizers import encode_text

    if "text" in row:
        words = row["text"].split(" ")
        start = " ".join(words[:8])
        return start, encode_text(tokenizer, [start])[0], " ".join(words[8:40])
    prompt, answer = _last_answer(row)
    ids = encode_prompts(tokenizer, [{"prompt": prompt, "tools": row.get("tools")}])[0]
    return " / ".join(map(said, prompt)), ids, said(answer)


def _last_answer(row: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The assistant's last message, of a preference the chosen one, of a judged answer that, and what stands before it."""
    if "messages" not in row:
        answers = row.get("chosen") or row.get("completion") or row.get("reference")
        return row["prompt"], answers[0] if answers else {"role": "assistant", "content": ""}
    last = max(i for i, m in enumerate(row["messages"]) if m["role"] == "assistant")
    return row["messages"][:last], row["messages"][last]
