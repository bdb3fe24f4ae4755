"""The sections a recipe may have: frozen dataclasses, one field per key (a trailing `_` avoids a Python keyword)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hfpipe.sections.data import (
    DEFAULT_SPLIT,
    SHARDS,
    Corpus,
    Curation,
    Curriculum,
    Data,
    HeldOutText,
    Phase,
    PromptData,
    Source,
    TextData,
)  # fmt: skip
from hfpipe.sections.evaluation import LLC, Evaluate, Needle, Probe
from hfpipe.sections.fields import above, at_least


@dataclass(frozen=True)
class Model:
    """Where a stage's model comes from: a stage of the recipe, a folder, or a Hub id with its revision."""

    from_: str | None = None  # `name`, `path/to/folder` or `org/model@revision`
    config: dict[str, Any] = field(default_factory=dict)  # from scratch: model_type and that configuration's own fields
    rope_parameters: dict[str, Any] = field(default_factory=dict)  # over the parent's own (hfpipe/rope.py)
    max_position_embeddings: int | None = at_least(1, None)  # in place of the parent's
    dtype: str | None = None  # of the weights; None: float32 when trained whole, as stored under an adapter
    attn_implementation: str | None = None
    compile_blocks: bool = False  # the blocks' passes in training, once for all shapes (hfpipe/training/compiled.py)
    share_prefixes: bool = False  # what both sides of a pair begin with is read once (hfpipe/training/prefixes.py)
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Tokenizer:
    type: Literal["bpe", "unigram", "wordpiece"] = "bpe"  # all byte-level
    vocab_size: int = at_least(1, 32768)
    min_frequency: int = at_least(1, 2)
    chat_template: str = "hfpipe"  # a name of chat_templates/ or a path


@dataclass(frozen=True)
class ExtendTokenizer:
    chat_template: str | None = None  # given: add our control tokens and this template to the parent's tokenizer
    add_pieces: int = at_least(
        0, 0
    )  # new pieces of a byte-pair tokenizer, learnt from text (hfpipe/training/pieces.py)
    min_frequency: int = at_least(1, 2)  # the least count of a new piece in that text
    from_: tuple[Source, ...] = ()  # the text; default: what is text among data.train


@dataclass(frozen=True)
class Optimizer:
    """`muon`: torch.optim.Muon on the hidden matrices, AdamW at trainer.learning_rate on the rest."""

    type: Literal["muon"] | None = None
    lr: float = at_least(0, 0.02)
    momentum: float = at_least(0, 0.95)
    nesterov: bool = True
    weight_decay: float = at_least(0, 0.0)
    ns_steps: int = at_least(1, 5)
    keep_state: bool = False  # beside the weights, for a stage with anneal.carry_optimizer; never published


@dataclass(frozen=True)
class Anneal:
    """Go on from the learning rate at which the parent's schedule stood, to zero by `trainer.lr_scheduler_type`."""

    share: float | None = above(0, None, at_most=1)  # of the tokens that the parent has trained on: sets the steps
    carry_optimizer: bool = False  # begin with the parent's optimizer state


@dataclass(frozen=True)
class Regularize:
    """What holds a stage to its parent, against forgetting (hfpipe/training/regularize.py)."""

    l2_to_parent: float = at_least(0, 0.0)  # times the sum of squared distances from the parent's weights: a loss
    average_with_parent: float = at_least(0, 0.0, at_most=1)  # the parent's share of the weights that are left
    freeze_layers: int | tuple[str, ...] = (
        0  # the first N blocks; -N: the last N; or names: [embed_tokens, layers.*.mlp]
    )
    freeze_embeddings: bool = False  # rows of ordinary tokens; the control tokens' rows go on training
    layerwise_lr_decay: float = above(0, 1.0, at_most=1)  # learning rate of a block, as a share of the next one's


@dataclass(frozen=True)
class Guards:
    """What is watched while a stage trains (hfpipe/training/guards.py). `null` lifts a guard."""

    loss_spike: float | None = above(1, 3.0)  # a loss so many times the median of the last 50 steps has diverged
    spike_rule: Literal["sure", "plain"] = "sure"  # sure: and is far above what comes now and then; plain: that alone
    lr_factor: float = above(0, 0.5, at_most=1)  # on the learning rate, from where the training has gone back to
    max_rollbacks: int = at_least(0, 3)  # then the stage stops, with its history
    overfit_patience: int | None = at_least(1, 3)  # rises of the validation loss in a row; needs trainer.eval_strategy
    rehearse: bool = True  # a step, an evaluation and a save at the largest batch, before training


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter: keys that are not here are fields of PEFT's configuration class for the type, kept in `options`."""

    type: str  # a name of hfpipe.adapter_types, or any of PEFT's methods
    preset: Literal["lora_without_regret"] | None = None
    merge: bool | None = None  # leave the merged model, for the next stage; None: where the type can be merged
    options: dict[str, Any] = field(default_factory=dict)
    from_preset: dict[str, Any] = field(default_factory=dict)  # what the preset has set, trainer's keys among it


@dataclass(frozen=True)
class RewardFunction:
    """One of the two: a check of `hfpipe.evaluation.checks`, or a function with the arguments of TRL's reward functions."""

    check: str | None = None  # its value is read from the row's own answer, unless given here
    value: Any = None
    function: str | None = None  # package.module:name, or path/to/file.py:name
    weight: float = 1.0


@dataclass(frozen=True)
class Rewards:
    """What reinforcement learning is steered by; the weighted sum where there are several."""

    model: str | None = None  # a reward stage of the recipe, a folder, or org/model@revision
    weight: float = 1.0  # of the reward model
    functions: tuple[RewardFunction, ...] = ()
    control: Literal["random_reward"] | None = (
        None  # the same rewards, dealt out at random: what is left is no learning
    )


@dataclass(frozen=True)
class Limits:
    """Where reinforcement learning stops: the reward is being hacked in a way that can be seen. `null` lifts a limit."""

    max_kl: float | None = at_least(0, 50.0)  # nats of a completion from the reference, mean of a logging interval
    min_entropy: float | None = at_least(0, 0.001)  # nats per token
    max_length_growth: float | None = at_least(1, 3.0)  # mean length of a completion against the first interval's


@dataclass(frozen=True)
class Launch:
    processes: int | None = at_least(1, None)  # default: what accelerate_config says, else 1
    accelerate_config: str | None = None  # a file, or one that TRL ships: fsdp2, zero3, multi_gpu ...
    hang_minutes: float = at_least(
        0.01, 60
    )  # a stage that stands still as long is told of, and ended after twice as long


@dataclass(frozen=True)
class Hub:
    """Where finished stages are published. Nothing is, unless `repo_id` says where."""

    repo_id: str | None = None  # `me/tiny`
    private: bool = True
    layout: Literal["revisions", "repos"] = "revisions"  # me/tiny@sft, or me/tiny-sft
    license: str | None = None  # of the card, as the Hub spells it: apache-2.0
    language: tuple[str, ...] = ()  # of the card: en
    carbon_intensity: float | None = at_least(0, None)  # of the card: g of CO2 for a kWh of the electricity used
    timeout_minutes: float | None = above(0, None)  # for one stage; None: 10, and the time of its bytes at 1 MB/s


@dataclass(frozen=True)
class Plan:
    """What `hfpipe plan` and the head of a run warn of (hfpipe/plan/advice.py), but for what is silenced by name."""

    silence: tuple[
        Literal[
            "learning_rate",
            "learning_rate_order",
            "few_examples",
            "many_epochs",
            "no_replay",
            "large_batch",
            "context",
            "long_decay",
            "tokens_per_parameter",
            "repeated_source",
        ],
        ...,
    ] = ()


@dataclass(frozen=True)
class Pipeline:
    name: str
    stages: tuple[str, ...]
    seed: int = at_least(0, 0)
    settings: dict[str, Any] = field(default_factory=dict)  # `{name}` in a path of any stage
    launch: Launch = Launch()
    evaluate: Evaluate = field(default_factory=Evaluate)
    hub: Hub = Hub()
    plan: Plan = Plan()
    synth: dict[str, Any] = field(default_factory=dict)  # name -> hfpipe.synth_config.Synth, or a file of them
    curate: dict[str, Any] | None = None  # Curation, or a file of it; the folder it fills is `{shards}` in a path


@dataclass(frozen=True)
class StageType:
    """What a file of hfpipe/stages declares: what it takes, what it leaves, which sections its YAML may have."""

    name: str
    teaches: str
    leaves: str  # tokenizer | model | reward_model
    parents: tuple[str, ...]  # what `model.from` may leave; () where there is none
    sections: dict[str, type]
    rows: str | None = None  # form of its training rows: text | messages | preference | unpaired | prompt
    trainer: str | None = None  # the upstream class behind `trainer:`
    adapter: bool = False
    managed: dict[str, str] = field(default_factory=dict)  # fields of `trainer` that are not the recipe's to set


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe, resolved."""

    name: str
    type: StageType
    file: Path
    sections: dict[str, Any]  # section name -> frozen dataclass
    trainer: dict[str, Any]
    adapter: Adapter | None
    raw: dict[str, Any]  # as written, overrides and settings applied: what is fingerprinted and saved

    @property
    def model(self) -> Model:
        return self.sections.get("model", Model())

    @property
    def guide(self) -> tuple[str, str, str] | None:
        """The second model that it learns from: the recipe's key for it, its name, and what it must be."""
        if rewards := getattr(self.sections.get("rewards"), "model", None):
            return "rewards.model", rewards, "reward_model"
        teacher = self.trainer.get("teacher_model_name_or_path")
        return ("trainer.teacher_model_name_or_path", teacher, "model") if teacher else None

    @property
    def data(self) -> Any:
        """The stage's `Data`, or a class derived from it; an empty one where a stage reads none."""
        return self.sections.get("data", Data())


@dataclass(frozen=True)
class Recipe:
    name: str
    folder: Path
    pipeline: Pipeline
    stages: dict[str, Stage]
    overrides: tuple[str, ...] = ()

    def guide_stage(self, stage: Stage) -> Stage | None:
        """The stage of this recipe that leaves the reward model or the teacher that `stage` names."""
        return self.stages.get(stage.guide[1]) if stage.guide else None

    def needed(self, stage: Stage) -> list[Stage]:
        """The stages of this recipe that `stage` starts from or is steered by."""
        return [found for found in (self.parent(stage), self.guide_stage(stage)) if found]

    def parent(self, stage: Stage) -> Stage | None:
        """The stage of this recipe that `model.from` names, if it names one."""
        return self.stages.get(stage.model.from_ or "")


def text_sources(stage: Stage) -> tuple[Source, ...]:
    """What `tokenizer.add_pieces` learns from: `tokenizer.from`, or what is text among `data.train`."""
    listed = getattr(stage.sections.get("tokenizer"), "from_", ())
    return listed or tuple(s for s in stage.data.train if (s.as_ or stage.type.rows) == "text")
