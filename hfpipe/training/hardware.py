"""What the machine can do, and the reason for what is chosen."""

from __future__ import annotations

from pathlib import Path


def cpu_flags() -> frozenset[str]:
    """Instruction sets of the CPU as Linux names them; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    words = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(words.partition(":")[2].split())


def has_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()


def choose_bf16() -> tuple[bool, str]:
    """Whether to train under bfloat16 autocast, and why."""
    import torch

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return True, f"bf16: {name} has it"
        return False, f"fp32: {name} has no bf16"
    if has_accelerator():
        return True, f"bf16: {torch.accelerator.current_accelerator()} has it"
    found = sorted(cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16", "sve_bf16"})
    if found:
        return True, f"bf16: the CPU has {', '.join(found)}"
    return False, "fp32: the CPU has no bf16 instructions (avx512_bf16, amx_bf16)"


def describe_machine() -> dict[str, object]:
    """What `stage.json` records of the hardware."""
    import os
    import platform

    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return {"device": "cuda", "names": names, "cuda": torch.version.cuda}
    return {"device": "cpu", "machine": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
