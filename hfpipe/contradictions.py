"""Keys of a stage that are right alone and wrong together, told before anything is loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from hfpipe import adapter_types, annealing, upstream
from hfpipe.errors import nearest
from hfpipe.rope import scales
from hfpipe.sections import Evaluate, ExtendTokenizer, Stage, text_sources

_PRODUCT = ("lora", "qlora")  # kinds of adapter whose change to a weight is scaling * B @ A
# Options of PEFT's LoRA whose change to a weight is another than scaling * B @ A.
_NO_PRODUCT = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "loftq_config", "monteclora_config",
    "target_parameters", "use_bdlora", "use_dora", "use_qalora", "velora_config",
)  # fmt: skip
_STARTS = ("gaussian", "orthogonal")  # inits, beside true and false, that leave the base as it is
# Keys with the value that switches them off: those that act between backward pass and step, those that take a whole model.
_BEFORE_STEP = (("l2_to_parent", 0), ("layerwise_lr_decay", 1))
_NEED_WHOLE = (*_BEFORE_STEP, ("average_with_parent", 0), ("freeze_embeddings", False))


def split_batch(stage: Stage, processes: int) -> list[str]:
    """A batch in tokens that the processes of the recipe cannot share."""
    tokens, length = getattr(stage.data, "batch_tokens", None), getattr(stage.data, "max_length", 1)
    if tokens is None or tokens % (length * processes) == 0:
        return []
    return [
        f"{stage.file}: data.batch_tokens = {tokens} is not a multiple of {length * processes} tokens: one row of "
        f"data.max_length {length} in each of {processes} processes."
    ]


def sharded(stage: Stage, distributed_type: str | None) -> list[str]:
    """Keys that take a model which is whole on each device, where the recipe's launch or the trainer divides it."""
    divides = distributed_type in ("FSDP", "DEEPSPEED") or stage.trainer.get("fsdp") or stage.trainer.get("deepspeed")
    if not divides:
        return []
    section = stage.sections.get("regularize")
    keys = [
        f"regularize.{key} = {getattr(section, key)}"
        for key, off in _NEED_WHOLE
        if section and getattr(section, key) != off
    ]
    if getattr(stage.sections.get("optimizer"), "type", None) == "muon":
        keys.append("optimizer.type = 'muon'")  # its state, two optimizers', is no form that accelerate gathers
    if getattr(stage.sections.get("optimizer"), "keep_state", False):
        keys.append("optimizer.keep_state")
    if getattr(stage.sections.get("anneal"), "carry_optimizer", False):
        keys.append("anneal.carry_optimizer")
    if stage.model.compile_blocks:
        keys.append("model.compile_blocks")
    if stage.model.share_prefixes:
        keys.append("model.share_prefixes")
    if stage.type.name == "ppo":
        keys.append("stage: ppo, whose critic is trained beside the policy,")
    return [
        f"{stage.file}: {key} takes a model that is whole on each device: one process, or several under DDP. "
        "It does not go together with FSDP and DeepSpeed."
        for key in keys
    ]


def needle(evaluate: Evaluate) -> Iterator[str]:
    """What `evaluate.needle` can't be asked with."""
    if (section := evaluate.needle) is None:
        return
    if not section.lengths or min(section.lengths) < 1:
        yield f"lengths = {list(section.lengths)}: expected tokens of a whole prompt, such as [1024, 4096]."
    if not section.depths or not 0 <= min(section.depths) <= max(section.depths) <= 1:
        yield f"depths = {list(section.depths)}: expected shares of the length, from 0 to 1."
    if not re.fullmatch(r"[^{}]*{name}[^{}]* {word}[^{}]*", section.fact):
        yield f"fact = {section.fact!r}: expected a sentence with {{name}} and, later, {{word}}."
    if not evaluate.text:
        yield "evaluate.text is missing: the held-out text that the needle is hidden in."


def contradictions(stage: Stage) -> list[str]:
    """One line per pair of keys of which one would silently lose to the other."""
    of_data = (_length, _weights, _selection, _order, _rewards, _teacher, _pieces)
    of_training = (_reference, _optimizer, _compile, _share, _batch, _regularize, _pull, _checkpoints, _guards)
    checks = (*of_training, *of_data, adapter_types.contradictions, annealing.contradictions)
    return [f"{stage.file}: {problem}" for check in checks for problem in check(stage)]


def _reference(stage: Stage) -> Iterator[str]:
    """A second model that upstream loads from the parent's folder, as that is."""
    if stage.adapter is not None or not scales(stage.model):
        return
    fields = upstream.fields(str(stage.type.trainer).rpartition(".")[2])
    if stage.type.name in ("grpo", "rloo"):
        beta = stage.trainer.get("beta", fields["beta"].default)
    else:  # ppo's beta is another class's field
        beta = stage.trainer.get("beta", 1) if stage.type.name == "ppo" else 0
    loaded = beta or (stage.type.name in ("dpo", "kto") and stage.trainer.get("precompute_ref_log_probs") is False)
    if loaded:
        yield (
            f"model.rope_parameters in a {stage.type.name} stage whose reference is loaded from the parent, without them: the two would "
            "not be the same model at the start. Give the longer context in a stage of training on text or conversations before."
        )


def _optimizer(stage: Stage) -> Iterator[str]:
    section = stage.sections.get("optimizer")
    if section is None:
        return
    if section.type is None:
        if given := ", ".join(key for key in stage.raw.get("optimizer") or {} if key != "keep_state"):
            yield f"optimizer has {given} but no type; the one there is is `muon`."
        return
    for key in ("optim", "optim_args", "optim_target_modules"):
        if key in stage.trainer:
            yield f"trainer.{key} beside optimizer.type = '{section.type}': give one of the two."


def _compile(stage: Stage) -> Iterator[str]:
    whole = [key for key in ("torch_compile", "torch_compile_backend", "torch_compile_mode") if stage.trainer.get(key)]
    if stage.model.compile_blocks and whole:
        yield f"trainer.{whole[0]} beside model.compile_blocks, which compiles the model by parts: give one of the two."


def _share(stage: Stage) -> Iterator[str]:
    if not stage.model.share_prefixes:
        return
    if stage.type.rows != "preference":
        yield f"model.share_prefixes in a {stage.type.name} stage, whose rows are no pairs of answers: it is for reward and dpo."
    if stage.adapter is not None and adapter_types.looks_at_rows(stage.adapter):
        yield f"model.share_prefixes with a {stage.adapter.type} adapter, which acts by row: give one of the two."
    if stage.model.compile_blocks:
        yield "model.share_prefixes beside model.compile_blocks: passes of two forms would need two programs. Give one of the two."


def _batch(stage: Stage) -> Iterator[str]:
    if getattr(stage.data, "batch_tokens", None) and "gradient_accumulation_steps" in stage.trainer:
        yield "trainer.gradient_accumulation_steps beside data.batch_tokens, which sets it: give one of the two."


def _length(stage: Stage) -> Iterator[str]:
    epochs, steps = stage.trainer.get("num_train_epochs", 1), stage.trainer.get("max_steps", -1)
    if isinstance(epochs, int | float) and isinstance(steps, int) and epochs <= 0 and steps <= 0:
        yield f"trainer.num_train_epochs = {epochs} trains nothing: give more than 0, or trainer.max_steps."


def _regularize(stage: Stage) -> Iterator[str]:
    section = stage.sections.get("regularize")
    if section is None:
        return
    if section.freeze_layers and stage.adapter is not None:
        layers = list(section.freeze_layers) if isinstance(section.freeze_layers, tuple) else section.freeze_layers
        yield (
            f"regularize.freeze_layers = {layers} beside adapter: an adapter freezes the whole base and changes every "
            "block. adapter.layers_to_transform chooses the blocks."
        )
    decay = stage.trainer.get("weight_decay", 0)
    if section.freeze_embeddings and decay:
        yield (
            f"regularize.freeze_embeddings with trainer.weight_decay = {decay}: decay would shrink the frozen rows. "
            "Set weight_decay to 0 or freeze_embeddings to false."
        )
    optimizer = str(stage.trainer.get("optim"))
    for key, off in _BEFORE_STEP:
        value = getattr(section, key)
        if value != off and ("lomo" in optimizer or optimizer.endswith("_layerwise")):
            yield (
                f"regularize.{key} = {value} with trainer.optim = '{optimizer}', which steps inside the backward pass: "
                "take another."
            )


def _pull(stage: Stage) -> Iterator[str]:
    """What `regularize.l2_to_parent` cannot measure a distance of, and `average_with_parent` cannot average."""
    section = stage.sections.get("regularize")
    for key in ("l2_to_parent", "average_with_parent"):
        if value := getattr(section, key, 0):
            yield from (f"regularize.{key} = {value}{problem}" for problem in _not_held(stage))
    if getattr(section, "average_with_parent", 0) == 1:
        yield "regularize.average_with_parent = 1 would leave the parent as it is: give less."


def _not_held(stage: Stage) -> Iterator[str]:
    if stage.model.config:
        yield ": the model is made from scratch, by model.config: there is no parent to hold it to."
    if stage.adapter is None:
        return
    kind, options = stage.adapter.type, stage.adapter.options
    if kind not in _PRODUCT:
        yield f" beside adapter.type = {kind!r}: the delta is defined for {' and '.join(_PRODUCT)} alone."
    for key in _NO_PRODUCT:
        if options.get(key):
            yield f" beside adapter.{key}: the delta is not scaling * B @ A. Leave one of the two out."
    start = options.get("init_lora_weights", True)
    if not isinstance(start, bool) and start not in _STARTS:
        yield (
            f" with adapter.init_lora_weights = {start!r}, which changes the base too: the adapter's delta is not the "
            f"distance from the parent. Take true, {' or '.join(_STARTS)}."
        )


def _weights(stage: Stage) -> Iterator[str]:
    if any(source.weight is not None for source in stage.data.eval):
        yield "data.eval: weight has no meaning here: every held-out source is read whole. Remove it."
    weights = [source.weight for source in stage.data.train]
    if all(weight is None for weight in weights):
        return
    if not stage.type.trainer:
        yield "data.train: weight has no meaning here: a tokenizer reads every source whole. Remove it, or set limit."
    elif any(weight is None or not 0 < weight < math.inf for weight in weights):
        yield "data.train: give every source a weight above 0, or none of them."


def _selection(stage: Stage) -> Iterator[str]:
    """`balance` and `decontaminate` where nothing would follow from them."""
    if any(source.balance for source in stage.data.eval):
        yield "data.eval: balance has no meaning here: every held-out source is read as it is. Remove it."
    balanced = stage.data.balance or any(source.balance for source in stage.data.train)
    for key, given in (("balance", balanced), ("decontaminate", stage.data.decontaminate)):
        if given and not stage.type.trainer:
            yield f"data: {key} has no meaning here: a tokenizer reads every source whole. Remove it."
        elif given and getattr(stage.data, "streaming", False):
            yield f"data.{key} beside data.streaming: rows must be read through before training for it. Leave one of the two out."


def _order(stage: Stage) -> Iterator[str]:
    """`curriculum` and `phases`: each lays the rows out in the one order in which they are trained."""
    data, rows = stage.data, stage.type.rows
    sampling = stage.trainer.get("train_sampling_strategy")
    if sampling == "group_by_length" and getattr(data, "streaming", False):
        yield "trainer.train_sampling_strategy = 'group_by_length' beside data.streaming: lengths must be known before training."
    if sampling == "batch_rebalance" and rows == "preference":
        yield (
            "trainer.train_sampling_strategy = 'batch_rebalance' counts input_ids, which pairs do not have. "
            "Expected random, sequential or group_by_length."
        )
    key = "data.curriculum" if data.curriculum else "data.phases" if data.phases else None
    if key is None:
        return
    if not stage.type.trainer:
        yield f"{key} has no meaning here: a tokenizer reads every source whole. Remove it."
    if data.curriculum and data.phases:
        yield "data.curriculum beside data.phases: each is the order of all rows. Give one of the two."
    if getattr(data, "streaming", False):
        yield f"{key} beside data.streaming: rows must be read through before training for it. Leave one of the two out."
    for option in ("train_sampling_strategy", "shuffle_dataset"):
        if option in stage.trainer:
            yield f"trainer.{option} beside {key}, which sets the order: give one of the two."
    laid_out_whole = data.phases or data.curriculum.pace == "growing"
    if laid_out_whole and stage.trainer.get("auto_find_batch_size"):
        yield f"trainer.auto_find_batch_size beside {key}, which is laid out for a known batch: leave one of the two out."
    yield from _curriculum(stage) if data.curriculum else ()
    if data.phases and rows not in ("text", "messages", None):
        yield f"data.phases is for text and conversations, not for a {stage.type.name} stage's rows. Remove it."
    elif data.phases:
        yield from _phases(stage)


def _curriculum(stage: Stage) -> Iterator[str]:
    given, is_prompt = stage.data.curriculum, stage.type.rows == "prompt"
    if given.pace == "epoch" and "start" in stage.raw["data"]["curriculum"]:
        yield "data.curriculum.start belongs to pace: growing. Set that, or remove it."
    if given.by == "parent_loss" and stage.model.config:
        yield "data.curriculum.by = 'parent_loss': the model is made from scratch, by model.config: there is no parent."
    if given.by == "parent_loss" and is_prompt:
        yield "data.curriculum.by = 'parent_loss': a prompt has no answer to lose on. Take length or a column."
    if given.pace == "growing" and is_prompt:
        yield "data.curriculum.pace = 'growing': a rollout repeats its prompts by upstream's own sampler. Take epoch."


def _phases(stage: Stage) -> Iterator[str]:
    sources, phases = stage.data.train, stage.data.phases
    paths = [source.path for source in sources]
    if any(source.weight is not None for source in sources):
        yield "data.train: weight beside data.phases, which have weights of their own: give one of the two."
    if abs((total := sum(phase.share for phase in phases)) - 1) > 1e-6:
        yield f"data.phases: the shares sum to {total:g}; expected 1."
    length = stage.trainer.get("max_length") or getattr(stage.data, "max_length", 1024)
    for number, phase in enumerate(phases):
        where, weights = f"data.phases[{number}]", phase.weights
        if phase.max_length and phase.max_length > length:
            yield f"{where}.max_length = {phase.max_length}: expected at most the stage's max_length, {length}."
        if isinstance(weights, dict):
            for path in [path for path in weights if path not in paths]:
                yield f"{where}.weights: {path!r} is no path of data.train.{nearest(path, paths)}"
            if len(set(paths)) < len(paths):
                yield f"{where}.weights: two sources have the same path: give a list, a number for each source."
            weights = tuple(weights.values())
        elif weights and len(weights) != len(sources):
            yield f"{where}.weights: {len(weights)} numbers for {len(sources)} sources: give one for each; 0 leaves it out."
        numbers = [w for w in weights if isinstance(w, int | float) and not isinstance(w, bool) and 0 <= w < math.inf]
        if len(numbers) < len(weights) or (weights and not sum(numbers)):
            yield f"{where}.weights = {weights}: expected numbers of 0 or more, one of them above 0."


def _rewards(stage: Stage) -> Iterator[str]:
    section = stage.sections.get("rewards")
    if section is None:
        return
    if not section.model and not section.functions:
        yield "rewards: nothing to learn from. Give `model`, a reward stage or model, or `functions`: [{check: number}]."
    for number, item in enumerate(section.functions):
        if (item.check is None) == (item.function is None):
            yield f"rewards.functions[{number}]: give one of `check` and `function`."
        if item.function and item.value is not None:
            yield f"rewards.functions[{number}].value belongs to a check; a function reads the row itself."
    asked = (stage.raw.get("limits") or {}).get("max_kl")
    if asked is not None and not stage.trainer.get("beta", 0 if stage.type.name == "grpo" else 1):
        yield (
            f"limits.max_kl = {asked} with trainer.beta = 0: there is no reference to measure from. Set trainer.beta above 0, "
            "or leave the limit out."
        )


def _pieces(stage: Stage) -> Iterator[str]:
    section = stage.sections.get("tokenizer")
    if not isinstance(section, ExtendTokenizer):
        return
    if not section.add_pieces:
        for key in ("min_frequency", "from"):
            if key in (stage.raw.get("tokenizer") or {}):
                yield f"tokenizer.{key} without tokenizer.add_pieces: nothing is learnt. Say how many pieces to add."
        return
    if not text_sources(stage):
        yield "tokenizer.add_pieces: no source of data.train is text. Name some under tokenizer.from."
    for source in text_sources(stage):
        if source.split not in (None, "train"):
            yield f"tokenizer.from: split {source.split!r} of {source.path}: pieces are learnt from training text alone."
    if any(source.weight is not None or source.balance for source in section.from_):
        yield "tokenizer.from: weight and balance have no meaning here: every source is read whole. Set limit."


def _teacher(stage: Stage) -> Iterator[str]:
    if stage.type.name == "distill" and stage.guide is None:
        yield "trainer.teacher_model_name_or_path is missing: a stage of the recipe, a folder, or org/model@revision."


def _checkpoints(stage: Stage) -> Iterator[str]:
    if stage.trainer.get("save_only_model") and stage.trainer.get("save_strategy") != "no":
        yield (
            "trainer.save_only_model keeps no optimizer state, so a killed run could not go on from its checkpoints. "
            "Leave it out, or set trainer.save_strategy: 'no'."
        )


def _guards(stage: Stage) -> Iterator[str]:
    """A guard against overfitting that is asked for where nothing would be seen, or kept."""
    asked = (stage.raw.get("guards") or {}).get("overfit_patience")
    if asked and "no" in (stage.trainer.get("eval_strategy", "no"), stage.trainer.get("save_strategy")):
        yield "guards.overfit_patience needs evaluations and checkpoints: set trainer.eval_strategy: steps, with eval_steps."
