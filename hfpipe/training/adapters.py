"""PEFT adapters: from a recipe's `adapter` section to a trainer, and from there to what a stage leaves.

Where the kind can be merged a stage leaves a whole model, and the adapter beside it in `adapter/`. Else its folder is that of
an adapter: `adapter_config.json`, its weights and the tokenizer, on a base that stays where it is.
"""

from __future__ import annotations

import copy
import shlex
import shutil
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

from hfpipe import artifact, upstream
from hfpipe.adapter_types import describe, find_kind, is_adapter_folder, is_merged
from hfpipe.errors import UserError
from hfpipe.hub_client import locate
from hfpipe.training import bottleneck  # noqa: F401  makes the method known to PEFT

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hfpipe.sections import Stage
    from hfpipe.training.job import Job, Progress

ADAPTER_FOLDER = "adapter"
ENCODER_FILE = "prompt_encoder.safetensors"
_OURS = Path(__file__).parents[1]
# How upstream's constructors refuse a value; the faults of a mistaken call are among them.
_MISTAKES = (TypeError, KeyError, AttributeError)
_REFUSALS = (ValueError, NotImplementedError, ImportError, *_MISTAKES)  # the second: PEFT, of what a method can't do


def build_adapter(stage: Stage, parent: str = "its parent") -> Any | None:
    """The PEFT configuration of the stage's `adapter` section, or None; `parent` is where its tokenizer is to be had.

    Raises:
        UserError: PEFT refuses it.
    """
    if stage.adapter is None:
        return None
    from peft import get_peft_config

    options = copy.deepcopy(stage.adapter.options)
    if options.get("prompt_tuning_init") == "TEXT":
        options.setdefault("tokenizer_name_or_path", parent)
    task = "SEQ_CLS" if stage.type.leaves == "reward_model" else "CAUSAL_LM"
    method = find_kind(stage.adapter.type).method
    try:
        return get_peft_config({"peft_type": method.upper(), "task_type": task, **options})
    except (TypeError, ValueError) as error:
        raise UserError(f"{stage.file}: adapter is refused by PEFT: {error}") from error


def build_trainer(
    job: Job, progress: Progress, trainer_class: type, model: PreTrainedModel, *args: Any, **options: Any
) -> Any:
    """A trainer of upstream's with the stage's adapter on the model.

    Raises:
        UserError: upstream refuses the trainer's values or the adapter for this model.
    """
    from hfpipe.training.head import keep_logits_on_cpu
    from hfpipe.training.prefixes import share_prefixes

    keep_logits_on_cpu()
    stage = job.stage
    share_prefixes(job, model, progress)
    if stage.adapter is None:
        try:
            return trainer_class(model, *args, **options)
        except _REFUSALS as error:
            raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
            if isinstance(error, _MISTAKES) and raised_in.is_relative_to(_OURS):
                raise  # a fault of ours
            told = f"{type(error).__name__}: {error}"
            raise UserError(f"{stage.file}: trainer is refused upstream for this model: {told}") from error
    config = build_adapter(stage, job.parent_path)
    if find_kind(stage.adapter.type).method == "p_tuning":
        trainer_class = type(trainer_class.__name__, (KeepsEncoder, trainer_class), {})
    _train_new_rows(job, config, model, options["processing_class"], progress)
    try:
        trainer = trainer_class(model, *args, peft_config=config, **options)
    except (ValueError, NotImplementedError) as error:  # PEFT: no such module, or none of its kind; TRL: no such pair
        raise UserError(f"{stage.file}: adapter is refused upstream for this model: {error}") from error
    _mend(trainer.model)
    if find_kind(stage.adapter.type).four_bit or trainer.args.bf16 or trainer.args.fp16:
        # In bfloat16 small updates are lost. TRL rounds an adapter on four bits to it, and PEFT leaves what trains whole
        # (a new head, modules_to_save) as its parent is; from a checkpoint all comes as float32.
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    trained, whole = trainer.model.get_nb_trainable_parameters()
    progress.note(f"adapter: {describe(stage.adapter)}; {trained:,} of {whole:,} parameters train")
    return trainer


class KeepsEncoder:
    """Mixed into a trainer: a checkpoint holds the network that writes the prompt; PEFT 0.21 keeps what it wrote alone."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        encoder = self.accelerator.unwrap_model(self.model).prompt_encoder
        save_file(encoder.state_dict(), Path(output_dir or self.args.output_dir) / ENCODER_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_encoder(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_encoder(self.state.best_model_checkpoint)

    def _load_encoder(self, checkpoint: str) -> None:
        self.model.prompt_encoder.load_state_dict(load_file(Path(checkpoint) / ENCODER_FILE))


def _train_new_rows(
    job: Job, config: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: Progress
) -> None:
    """Tokens that the stage adds have to be learnt, and an adapter freezes the embeddings: let their rows train with it."""
    from hfpipe.training.models import added_tokens

    added = added_tokens(job, tokenizer)
    names = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
    ends = [model.get_input_embeddings()]
    if not model.config.get_text_config().tie_word_embeddings and model.get_output_embeddings() is not None:
        ends.append(model.get_output_embeddings())
    ends = [names[id(module)] for module in ends]
    given = getattr(config, "trainable_token_indices", None)
    if not added or given or set(ends) <= set(getattr(config, "modules_to_save", None) or ()):
        return
    if "trainable_token_indices" not in upstream.fields(find_kind(job.stage.adapter.type).config):
        raise UserError(
            f"{job.stage.file}: this stage adds {added} tokens, whose rows a {job.stage.adapter.type} adapter would leave "
            f"untrained. Add them in a stage that is trained whole, take lora, qlora or dora, or name {' and '.join(ends)} in "
            "adapter.modules_to_save."
        )
    rows = range(len(tokenizer) - added, len(tokenizer))
    config.trainable_token_indices = {name: list(rows) for name in ends}
    progress.note(f"adapter: the rows of the {added} added tokens train with it (trainable_token_indices)")


def _mend(model: PeftModel) -> None:
    """What TRL 1.16 asks of a model and two of PEFT's wrappers do not hand on (each by a test of its kind)."""
    from peft.tuners.adaption_prompt import AdaptionPromptModel
    from peft.utils import TrainableTokensWrapper

    if isinstance(model.base_model, AdaptionPromptModel):
        model.base_model.forward = model.base_model.model.forward  # it kept the one before TRL gave the model its own
    head = model.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper):
        head.bias = getattr(head.original_module, "bias", None)  # of tied embeddings there is none


# --- what a stage leaves ---


def save_adapted(
    job: Job,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write the adapter, and the merged model where the kind allows one, into the job's working folder.

    `state`: the model's, gathered, where it is divided among devices.
    """
    for config in model.peft_config.values():
        config.base_model_name_or_path, config.revision = job.parent_id, job.parent_revision
    if not is_merged(job.stage.adapter):
        _save_adapter(job, model, tokenizer, job.work, state)
        return
    _save_adapter(job, model, tokenizer, job.work / ADAPTER_FOLDER, state)
    try:
        merged = merge(job, model, tokenizer, apart=state is not None or model.device.type != "cpu")
    except (ValueError, NotImplementedError) as error:  # PEFT: a method, or this form of it, that has no merge
        if "NaN" in str(error):  # the adapter itself is broken, and no result
            raise
        progress.note(f"adapter: PEFT can't merge it ({error}), so the stage leaves it alone, on its base")
        shutil.rmtree(job.work / ADAPTER_FOLDER)
        _save_adapter(job, model, tokenizer, job.work, state)
        return
    merged.config.use_cache = True
    merged.save_pretrained(str(job.work))


def _save_adapter(
    job: Job, model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path, state: dict[str, torch.Tensor] | None
) -> None:
    """The adapter with what a folder needs to be loaded by itself; its base stays where it is."""
    model.save_pretrained(str(folder), **({} if state is None else {"state_dict": state}))
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's form, not filled in
    tokenizer.save_pretrained(str(folder))
    if job.stage.type.leaves == "model":
        model.generation_config.save_pretrained(str(folder))


def merge(job: Job, model: PeftModel, tokenizer: PreTrainedTokenizerBase, apart: bool) -> PreTrainedModel:
    """The model with the adapter written into its weights; the trainer's own stays as it was trained.

    `apart`: on the base loaded anew, in this machine's memory, since a device need not hold the model twice and may hold only
    a part of it. Four-bit weights would be rounded again, so for those the base is whole, and merged in float32.
    """
    four_bit = find_kind(job.stage.adapter.type).four_bit
    if not apart and not four_bit:
        stored = next(p.dtype for p in model.parameters() if p.is_floating_point() and not p.requires_grad)
        return copy.deepcopy(model).merge_and_unload(safe_merge=True).to(stored)
    from peft import PeftModel

    from hfpipe.training.models import load_whole

    base = load_whole(job, tokenizer)
    dtype = base.dtype
    if four_bit:
        base = base.float()
    adapted = PeftModel.from_pretrained(base, str(job.work / ADAPTER_FOLDER), torch_device="cpu")
    return adapted.merge_and_unload(safe_merge=True).to(dtype)


# --- and how it is loaded again ---


def load_pretrained(auto_class: Any, folder: str | Path, **options: Any) -> Any:
    """`auto_class.from_pretrained`, and for a folder that holds an adapter alone its base with the adapter on it.

    Raises:
        UserError: the base is not there any more, or is another one by now.
    """
    folder = Path(folder)
    if not is_adapter_folder(folder):
        return auto_class.from_pretrained(str(folder), **options)
    from peft import PeftConfig, PeftModel
    from transformers import AutoTokenizer, GenerationConfig

    config = PeftConfig.from_pretrained(str(folder))
    reads_scores = config.task_type == "SEQ_CLS"
    if reads_scores:
        options["num_labels"] = 1
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    base = auto_class.from_pretrained(str(locate(_base_of(folder, config), config.revision)), **options)
    if len(tokenizer) > base.get_input_embeddings().num_embeddings:
        base.resize_token_embeddings(len(tokenizer), mean_resizing=False)  # their rows are the adapter's
    base.config.pad_token_id = tokenizer.pad_token_id
    model = PeftModel.from_pretrained(base, str(folder))
    if not reads_scores:
        model.generation_config = base.generation_config = GenerationConfig.from_pretrained(str(folder))
    return model


def _base_of(folder: Path, config: Any) -> str:
    """Where the base of an adapter is: the stage beside it that it was made from, else what PEFT wrote down."""
    record = artifact.read_record(folder / artifact.STAGE_FILE) or {}
    parent = record.get("parent") or {}
    beside = folder.parent / str(parent.get("from"))
    base = str(beside) if (beside / artifact.STAGE_FILE).is_file() else str(config.base_model_name_or_path)
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise UserError(f"{folder} is an adapter on {base}, which is not there any more. Put that model back.")
    now = (artifact.read_record(Path(base) / artifact.STAGE_FILE) or {}).get("fingerprint")
    if now and parent and now != parent["fingerprint"]:
        raise UserError(
            f"{folder} is an adapter on {base}, and that has been made anew since. Make the adapter anew too: "
            f"hfpipe run {shlex.quote(record['recipe'])} --out {shlex.quote(str(folder.parent))} --only {record['stage']}"
        )
    return base
