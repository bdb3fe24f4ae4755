"""`bottleneck`: Houlsby adapters (Houlsby et al. 2019, arXiv:1902.00751) as a method of PEFT's, which has none of its own.

A small network with a residual, `h + up(f(down(h)))`, follows the last linear layer of each attention and of each MLP, before
the block's own residual is added. What departs from the paper: `up` starts at zero, so that an untrained adapter changes
nothing at all; the layer norms stay as they are (name them in `modules_to_save` to train them too).

Importing this file makes the method known to PEFT: `PeftModel.from_pretrained` and what builds on it then load such adapters.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D


class Method(enum.StrEnum):
    """Beside `peft.PeftType`, whose members are all of PEFT's own."""

    BOTTLENECK = "BOTTLENECK"


_FUNCTIONS = {"relu": nn.functional.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu, "tanh": torch.tanh}
# The last linear layer of the attention and of the MLP, as the families of transformers name them.
_LAST_LAYERS = (
    ("o_proj", "down_proj"),  # llama, mistral, qwen, gemma, smollm ...
    ("attn.c_proj", "mlp.c_proj"),  # gpt2
    ("dense", "dense_4h_to_h"),  # gpt_neox, falcon, bloom
    ("dense", "fc2"),  # phi
    ("out_proj", "fc2"),  # opt
    ("out_proj", "fc_out"),  # gptj, codegen
)


@dataclass
class BottleneckConfig(PeftConfig):
    """Options of a bottleneck adapter, by PEFT's names."""

    r: int = field(default=16, metadata={"help": "Width of the bottleneck."})
    non_linearity: Literal["relu", "gelu", "silu", "tanh"] = field(
        default="gelu", metadata={"help": "The function in the bottleneck."}
    )
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Linear layers to follow; default: the last of each attention and MLP."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Layers to leave out."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Blocks to adapt, from 0."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of blocks."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules that are trained whole."})
    init_weights: bool = field(default=True, metadata={"help": "Start as no change at all."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = Method.BOTTLENECK
        if self.r < 1:
            raise ValueError(f"`r` must be 1 or more, got {self.r}")
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A linear layer, quantised or not, whose output goes through the active bottlenecks."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig):
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down, self.bottleneck_up = nn.ModuleDict(), nn.ModuleDict()
        self.functions: dict[str, str] = {}
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add a bottleneck of its own name."""
        base = self.get_base_layer()
        width = base.nf if isinstance(base, Conv1D) else base.out_features
        self.functions[adapter_name] = config.non_linearity
        self.bottleneck_down[adapter_name] = nn.Linear(width, config.r)
        self.bottleneck_up[adapter_name] = nn.Linear(config.r, width)
        if config.init_weights:
            nn.init.zeros_(self.bottleneck_up[adapter_name].weight)
            nn.init.zeros_(self.bottleneck_up[adapter_name].bias)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        hidden = self.base_layer(*args, **kwargs)
        if self.disable_adapters:
            return hidden
        for name in self.active_adapters:
            if name in self.bottleneck_down:
                down, up = self.bottleneck_down[name], self.bottleneck_up[name]
                inner = _FUNCTIONS[self.functions[name]](down(hidden.to(down.weight.dtype)))
                hidden = hidden + up(inner).to(hidden.dtype)
        return hidden

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError("A bottleneck can't be merged into weights.")  # PEFT's word where there is no merge


class BottleneckModel(BaseTuner):
    """Puts a bottleneck behind every target layer of a model."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer

    def _prepare_adapter_config(self, peft_config: BottleneckConfig, model_config: dict) -> BottleneckConfig:
        if peft_config.target_modules is None:
            names = [name for name, _ in self.model.named_modules()]
            for pair in _LAST_LAYERS:
                if all(any(name.endswith(f".{last}") for name in names) for last in pair):
                    peft_config.target_modules = set(pair)
                    return peft_config
            raise ValueError(
                f"the last layers of a {model_config.get('model_type')}'s attention and MLP are not known: name them in "
                "`target_modules`"
            )
        return peft_config

    def _create_and_replace(
        self,
        config: BottleneckConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, config)
            return
        if not isinstance(target, nn.Linear | Conv1D):
            raise ValueError(f"`{current_key}` is a {type(target).__name__}; a bottleneck follows linear layers")
        layer = BottleneckLayer(target, adapter_name, config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # as everywhere in PEFT: of several adapters the active one trains
        self._replace_module(parent, target_name, layer, target)


# `peft.utils.register_peft_method` (PEFT 0.21) takes the names of its own enum alone; these tables are what it fills.
PEFT_TYPE_TO_CONFIG_MAPPING.setdefault(Method.BOTTLENECK, BottleneckConfig)
PEFT_TYPE_TO_TUNER_MAPPING.setdefault(Method.BOTTLENECK, BottleneckModel)
PEFT_TYPE_TO_PREFIX_MAPPING.setdefault(Method.BOTTLENECK, BottleneckModel.prefix)
