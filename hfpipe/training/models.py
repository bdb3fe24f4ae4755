"""Tokenizers and models: from the parent, from scratch, extended, frozen, saved."""

from __future__ import annotations

import copy
import dataclasses
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hfpipe.adapter_types import find_kind
from hfpipe.artifact import STAGE_FILE
from hfpipe.errors import UserError
from hfpipe.rope import changes, is_dynamic, misread, scales, unread
from hfpipe.training.compiled import compiled_blocks
from hfpipe.training.pieces import extend_with_pieces, new_pieces, start_pieces
from hfpipe.training.prefixes import check_shares
from hfpipe.training.quantised import hold_layout, load_options
from hfpipe.training.regularize import blocks_of, freeze, freeze_layers
from hfpipe.training.templates import load_chat_template, stop_token_ids
from hfpipe.training.tokenizers import extend_tokenizer, resize_embeddings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from hfpipe.training.job import Job, Progress


def load_tokenizer(job: Job, about_to_run: Collection[str] = ()) -> PreTrainedTokenizerBase:
    """The tokenizer that the stage trains with.

    It is that of the nearest ancestor that is finished and not `about_to_run` again, extended as the stages since ask.
    """
    from transformers import AutoTokenizer

    to_extend = [job]
    while parent := job.recipe.parent(to_extend[-1].stage):
        if parent.name not in about_to_run and (job.run / parent.name / STAGE_FILE).is_file():
            break
        to_extend.append(dataclasses.replace(job, stage=parent))
    origin = to_extend[-1].stage
    if origin.model.from_ is None and job.rehearsal is None:
        raise UserError(
            f"{job.stage.file}: its tokenizer is made by `{origin.name}`, and {job.run} holds no finished one. "
            f"Make it first: hfpipe run {shlex.quote(str(job.recipe.folder))} --out {shlex.quote(str(job.run))} --to {origin.name}"
        )
    tokenizer = _from_pretrained(AutoTokenizer, to_extend[-1])
    for ancestor in reversed(to_extend):
        _extend(ancestor, tokenizer)
    if tokenizer.pad_token_id is None:
        raise UserError(
            f"{job.stage.file}: the tokenizer of {job.stage.model.from_} has no pad token. "
            "Set tokenizer.chat_template (hfpipe or chatml) in the first stage that uses it: one is added then."
        )
    return tokenizer


def _extend(job: Job, tokenizer: PreTrainedTokenizerBase) -> None:
    section = job.stage.sections.get("tokenizer")
    if section and section.chat_template:
        extend_tokenizer(tokenizer, load_chat_template(section.chat_template))
    if getattr(section, "add_pieces", 0) and job.rehearsal is None:
        extend_with_pieces(job, tokenizer)


def load_model(job: Job, tokenizer: PreTrainedTokenizerBase, progress: Progress) -> PreTrainedModel:
    """The parent's model, or a new one from `model.config`, fitted to the tokenizer, stop tokens set, rows frozen."""
    from transformers import AutoModelForCausalLM

    section = job.stage.model
    if section.config:
        model = _from_scratch(job, tokenizer)
        progress.note(f"model: {section.config['model_type']} from scratch, {model.num_parameters():,} parameters")
    else:
        model = _load_parent(job, tokenizer, progress, AutoModelForCausalLM)
    model.config.pad_token_id = tokenizer.pad_token_id
    set_generation_config(model, tokenizer, () if section.config else _own_stops(model, tokenizer))
    freeze(job, model, tokenizer, progress)
    return model


def load_reward_model(job: Job, tokenizer: PreTrainedTokenizerBase, progress: Progress) -> PreTrainedModel:
    """The parent's model with a new head that gives one number at the last token, `score` of 1 x hidden_size."""
    from transformers import AutoModelForSequenceClassification
    from trl.trainer.reward_trainer import suppress_seqcls_warning

    with suppress_seqcls_warning():
        model = _load_parent(job, tokenizer, progress, AutoModelForSequenceClassification, num_labels=1)
    freeze(job, model, tokenizer, progress)
    return model


def _load_parent(
    job: Job, tokenizer: PreTrainedTokenizerBase, progress: Progress, auto_class: Any, **options: Any
) -> PreTrainedModel:
    """The parent's weights, in 4 bits where the adapter says so, with rows for the tokens that the stage adds."""
    adapter = job.stage.adapter
    if adapter and find_kind(adapter.type).four_bit:
        options |= load_options()
    model = _load_and_resize(job, tokenizer, auto_class, **options)
    old = parent_tokenizer(job)
    pieces = len(new_pieces(tokenizer, old))
    if added := len(tokenizer) - len(old) - pieces:
        progress.note(f"tokenizer: {added} tokens added, their rows start from the mean of the others")
    if pieces:
        progress.note(
            f"tokenizer: {pieces} pieces added, their rows start from the mean of those that they were before"
        )
    progress.note(f"model: {_named(job)}, {model.num_parameters():,} parameters")
    if "quantization_config" in options:
        dtype = str(options["quantization_config"].bnb_4bit_compute_dtype).removeprefix("torch.")
        progress.note(f"4 bits: {hold_layout(model)} linear layers in nf4, double quantisation, computed in {dtype}")
    return model


def load_parent(job: Job, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The stage's parent as a language model, before training, in 4 bits where the adapter says so."""
    from transformers import AutoModelForCausalLM

    from hfpipe.training.job import Progress

    return _load_parent(job, tokenizer, Progress(None), AutoModelForCausalLM)


def load_whole(job: Job, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The stage's parent as it is before training, not quantised."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if job.stage.type.leaves == "reward_model":
        return _load_and_resize(job, tokenizer, AutoModelForSequenceClassification, num_labels=1)
    model = _load_and_resize(job, tokenizer, AutoModelForCausalLM)
    set_generation_config(model, tokenizer, _own_stops(model, tokenizer))
    return model


def added_tokens(job: Job, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens the stage adds to its parent's."""
    return len(tokenizer) - len(parent_tokenizer(job))


def parent_tokenizer(job: Job) -> PreTrainedTokenizerBase:
    """The tokenizer of the model or tokenizer that the stage starts from, as it was left."""
    from transformers import AutoTokenizer

    return _from_pretrained(AutoTokenizer, job)


def _load_and_resize(job: Job, tokenizer: PreTrainedTokenizerBase, auto_class: Any, **options: Any) -> PreTrainedModel:
    from transformers import AutoConfig

    section = job.stage.model
    options["dtype"] = section.dtype or ("auto" if job.stage.adapter else "float32")
    if section.attn_implementation:
        options["attn_implementation"] = section.attn_implementation
    if scales(section):
        labels = {key: options.pop(key) for key in ("num_labels",) if key in options}
        options["config"] = _scaled(job, _from_pretrained(AutoConfig, job, **labels))
    loaded = _from_pretrained(auto_class, job, output_loading_info=True, **options)
    model, info = loaded if isinstance(loaded, tuple) else (loaded, {})  # a rehearsal's stand-in
    if model._hf_peft_config_loaded:
        raise UserError(
            f"{job.stage.file}: model.from = {section.from_!r} holds an adapter alone, and a stage starts from a whole "
            "model. Give one that has been merged."
        )
    if model.config.to_dict().get("quantization_config") and "quantization_config" not in options:
        raise UserError(
            f"{job.stage.file}: model.from = {section.from_!r} is quantised already, and a stage trains and merges whole "
            "weights. Give the model that it was made from; adapter.type: qlora keeps it in 4 bits while it trains."
        )
    missing = sorted(info.get("missing_keys", ())) if "CausalLM" in auto_class.__name__ else []  # others get a new head
    if missing:
        raise UserError(
            f"{job.stage.file}: model.from = {section.from_!r}: {len(missing)} of the tensors that its config.json asks for, such "
            f"as {missing[0]}, are not among its weights and would start at random. Give a whole language model."
        )
    old = parent_tokenizer(job)
    if added := len(tokenizer) - len(old):
        resize_embeddings(model, tokenizer, added)
        start_pieces(model, tokenizer, old)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def _scaled(job: Job, config: PreTrainedConfig) -> PreTrainedConfig:
    """A parent's configuration with the context that the stage gives it; UserError where its class refuses that."""
    told = config.to_dict()
    text = told.get("text_config", told)
    if fault := unread(job.stage.model, text):
        raise UserError(f"{job.stage.file}: {fault}")
    text |= changes(job.stage.model, text)
    longest = max(getattr(job.stage.data, "max_length", 0), job.stage.trainer.get("max_length") or 0)
    if is_dynamic(text) and longest > text["max_position_embeddings"]:
        raise UserError(
            f"{job.stage.file}: rope_type dynamic scales by the longest row met so far, so that with rows of {longest} "
            f"tokens, more than max_position_embeddings {text['max_position_embeddings']}, a resumed training would be "
            "another. It is for use after training: take yarn, linear or llama3 here, or shorter rows."
        )
    try:
        return type(config).from_dict(told)
    except (ValueError, KeyError) as error:
        raise UserError(f"{job.stage.file}: model.rope_parameters is refused: {_first_line(error)}") from error


def try_scaling(job: Job, about_to_run: Collection[str]) -> None:
    """Scale the context as the stage and its ancestors say, before any stage trains; UserError where that fails."""
    lineage = [job]
    while not lineage[-1].stage.model.config and (parent := job.recipe.parent(lineage[-1].stage)):
        lineage.append(dataclasses.replace(job, stage=parent))
    if lineage[-1].stage.model.config.get("rope_parameters") or any(scales(one.stage.model) for one in lineage):
        config = _origin_config(lineage[-1], about_to_run)
        for one in reversed(lineage):
            config = _scaled(one, config)


def _origin_config(origin: Job, about_to_run: Collection[str]) -> PreTrainedConfig:
    from transformers import AutoConfig

    if not origin.stage.model.config:
        return _from_pretrained(AutoConfig, origin)
    with torch.device("meta"):
        return _from_scratch(origin, load_tokenizer(origin, about_to_run)).config


def try_regularize(job: Job, about_to_run: Collection[str]) -> None:
    """Freeze, spread rates and find what is compiled on a model of the stage's shape without weights, before any stage trains.

    The shape is that of the nearest ancestor that is made from scratch or comes from outside the recipe.

    Raises:
        UserError: what `regularize`, `model.compile_blocks` or `model.share_prefixes` says does not fit the model.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    section, where = job.stage.sections["regularize"], f"{job.stage.file}"
    compiles, shares = job.stage.model.compile_blocks, job.stage.model.share_prefixes
    if not section.freeze_layers and section.layerwise_lr_decay == 1 and not compiles and not shares:
        return
    origin = job
    while not origin.stage.model.config and (parent := job.recipe.parent(origin.stage)):
        origin = dataclasses.replace(job, stage=parent)
    head = AutoModelForSequenceClassification if job.stage.type.leaves == "reward_model" else AutoModelForCausalLM
    config = _origin_config(origin, about_to_run)
    with torch.device("meta"):
        try:
            model = head.from_config(config, trust_remote_code=origin.stage.model.trust_remote_code)
        except ValueError as error:
            raise UserError(f"{where}: regularize: transformers makes no such model: {_first_line(error)}") from error
    freeze_layers(model, section.freeze_layers, where)
    if compiles:
        compiled_blocks(model, where)
    if shares:
        check_shares(model.config, job.stage.model.attn_implementation, where)
    if section.layerwise_lr_decay < 1:
        blocks_of(model, where)


def _own_stops(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens at which a parent stops: they may be more than its template tells, such as the end of a tool call."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return [i for i in own if i in tokenizer.added_tokens_decoder and i != tokenizer.pad_token_id]


def set_generation_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, more: Sequence[int] = ()) -> None:
    """Generation stops at every token that ends the assistant's turn, and at `more`; pad is never one of them."""
    stops = list(dict.fromkeys([*stop_token_ids(tokenizer), *more]))
    model.generation_config.eos_token_id = stops
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = stops
    model.config.bos_token_id = tokenizer.bos_token_id


def _from_scratch(job: Job, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    options = copy.deepcopy(job.stage.model.config)  # upstream fills in what it finds missing
    given = options.pop("vocab_size", None)
    if given is not None and given < len(tokenizer):
        raise UserError(
            f"{job.stage.file}: model.config.vocab_size = {given}, but the tokenizer has {len(tokenizer)} entries. "
            "Leave it out: the tokenizer's size is taken."
        )
    ids = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    try:
        config = AutoConfig.for_model(**options, vocab_size=given or len(tokenizer), **ids)
        if options.get("rope_parameters") and (problem := misread(config.to_dict(), type(config)().to_dict())):
            raise UserError(f"{job.stage.file}: {problem}")
        options = (
            {"attn_implementation": job.stage.model.attn_implementation} if job.stage.model.attn_implementation else {}
        )
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)
    except (ValueError, TypeError, ArithmeticError, AssertionError, StrictDataclassError) as error:
        told = error.__cause__ if isinstance(error, StrictDataclassError) else error
        raise UserError(f"{job.stage.file}: model.config is refused by transformers: {_first_line(told)}") from error


def _from_pretrained(auto_class: Any, job: Job, **options: Any) -> Any:
    if job.rehearsal and not _is_here(job):
        return job.rehearsal.load(auto_class, **options)
    from pickle import UnpicklingError

    from safetensors import SafetensorError

    path = job.parent_path
    try:
        return auto_class.from_pretrained(path, trust_remote_code=job.stage.model.trust_remote_code, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, UnpicklingError) as error:
        if "ignore_mismatched_sizes" in str(error):
            told = "Its weights have not the sizes that its config.json gives."
        elif isinstance(error, RuntimeError):
            raise  # such as memory that runs out
        elif isinstance(error, UnpicklingError):
            told = "Its weights are a pickle of more than tensors. Give them as safetensors."
        else:
            told = f"transformers says: {_first_line(error)}"
        what = "tokenizer" if "Tokenizer" in auto_class.__name__ else "model"
        raise UserError(
            f"{job.stage.file}: model.from = {job.stage.model.from_!r}: no {what} could be loaded from it. {told}"
        ) from error


def _is_here(job: Job) -> bool:
    """Whether what the stage starts from is a folder already."""
    if job.recipe.parent(job.stage):
        return (job.run / str(job.stage.model.from_) / STAGE_FILE).is_file()
    return job.stage.model.from_ is not None and Path(job.stage.model.from_).expanduser().is_dir()


def _named(job: Job) -> str:
    return f"{job.parent_id}@{job.parent_revision}" if job.parent_revision else job.parent_path


def _first_line(error: BaseException | None) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
