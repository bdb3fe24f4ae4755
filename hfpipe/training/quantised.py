"""QLoRA's base (Dettmers et al. 2023, arXiv:2305.14314): linear layers in 4-bit NormalFloat, by bitsandbytes."""

from __future__ import annotations

from typing import Any

import torch

from hfpipe.errors import UserError
from hfpipe.training.hardware import choose_bf16


def load_options() -> dict[str, Any]:
    """What `from_pretrained` needs to load a base in 4 bits: nf4, its constants quantised too, on this process's device.

    The compute dtype is what the hardware is quick in and precise enough for.
    """
    from accelerate import PartialState
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype(),
    )
    device = PartialState().device if torch.accelerator.is_available() else torch.device("cpu")
    return {"quantization_config": config, "device_map": {"": device}}


def try_out() -> None:
    """One small layer in 4 bits, forwards and backwards.

    Raises:
        UserError: this machine, or its bitsandbytes, can't do that.
    """
    try:
        from bitsandbytes.nn import Linear4bit

        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        layer = Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=compute_dtype()).to(device)
        x = torch.ones(1, 64, device=device, dtype=compute_dtype(), requires_grad=True)
        layer(x).sum().backward()
    # No package; no library of its kernels; a kernel that fails, or is not there for this device; torch without that device.
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        raise UserError(
            f"bitsandbytes can't keep weights in 4 bits on this machine ({type(error).__name__}: {error}). Take adapter.type: "
            "lora, or another machine."
        ) from error


def compute_dtype() -> torch.dtype:
    """bfloat16 where there is such hardware; else float16 on a GPU and float32 on a CPU."""
    if choose_bf16()[0]:
        return torch.bfloat16
    return torch.float16 if torch.accelerator.is_available() else torch.float32


def hold_layout(model: torch.nn.Module) -> int:
    """Keep bitsandbytes 0.50 from packing weights anew at the first evaluation on a CPU with avx512_bf16.

    What it packs for that kernel it then reads as if it had not: every gradient and every merge after it is wrong. Returns
    the number of 4-bit layers.
    """
    from bitsandbytes.nn import Linear4bit

    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    return len(layers)
