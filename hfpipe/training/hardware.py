"""What the machine can do, and the reason for what is chosen."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


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


def free_memory() -> None:
    """Of a trainer and its optimizer that are done with."""
    import torch

    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def own_device() -> Any:
    """This process's device: of several processes each has its own."""
    import torch

    if not torch.accelerator.is_available():
        return torch.device("cpu")
    torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device(torch.accelerator.current_accelerator().type, torch.accelerator.current_device_index())


def scoring_options() -> dict[str, Any]:
    """How a model is loaded that only answers: on a device in bf16, in which it was trained, in half of float32's memory.

    What was trained whole is stored in float32, which may be more than one device holds, and which flash attention refuses.
    """
    import torch

    return {"dtype": torch.bfloat16} if has_accelerator() and choose_bf16()[0] else {}


def use_all_cores_alone() -> None:
    """Undo the one thread that `accelerate launch` gives a single process where the user asked for nothing.

    The pipeline's own children have all cores; with another number of threads sums round otherwise.
    """
    import torch

    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if not launched or os.environ.get("OMP_NUM_THREADS") != "1" or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return
    if has_accelerator():
        return
    try:
        asked = Path(f"/proc/{os.getppid()}/environ").read_bytes()  # the launcher's, as the user started it
    except OSError:
        return
    if b"OMP_NUM_THREADS=" not in asked:
        torch.set_num_threads(len(os.sched_getaffinity(0)))


def keep_freed_memory() -> None:
    """On a CPU, let glibc keep the memory of freed tensors for the next ones: a training step frees and takes the same again.

    Giving it back costs a fault for every page that is touched anew, a tenth of a small model's step. No other C library has
    these two options, by the numbers of malloc.h.
    """
    import ctypes

    if has_accelerator():
        return
    mmap_threshold, trim_threshold = -3, -1
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, (1 << 31) - 1)


def give_back_freed_memory() -> None:
    """Hand the memory of freed tensors back: to the card, or from glibc to the system."""
    import ctypes

    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # another C library has no such function
        ctypes.CDLL(None).malloc_trim(0)


def memory_meter() -> Callable[[], int]:
    """Start watching; the function that is returned gives the bytes taken at the most since, on top of what was taken then.

    Of an NVIDIA card what its tensors took, else what Linux holds for the process; 0 elsewhere.
    """
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        return lambda: torch.cuda.max_memory_allocated() - base
    base = _resident("VmRSS")
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    return lambda: _resident("VmHWM") - base


def _resident(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


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


def energy_meter(
    rapl: Path = Path("/sys/class/powercap"), every_s: float = 60.0
) -> Callable[[], dict[str, Any] | None]:
    """Start counting; the function that is returned stops, and gives the Wh since, or None where nothing here can be read.

    CPUs count by RAPL (packages; on most systems for root alone), NVIDIA cards by NVML where `pynvml` is installed. RAPL's
    counters run over within the hour, so they are read from time to time.
    """
    packages = {
        p: int((p / "max_energy_range_uj").read_text()) for p in rapl.glob("*-rapl:?") if _readable(p / "energy_uj")
    }
    last = {p: int((p / "energy_uj").read_text()) for p in packages}
    cards, joules, ended = _card_joules(), [0.0], threading.Event()

    def read() -> None:
        for package, before in last.items():
            last[package] = int((package / "energy_uj").read_text())
            joules[0] += (last[package] - before) % packages[package] / 1e6

    def watch() -> None:
        while not ended.wait(every_s):
            read()

    watcher = threading.Thread(target=watch, daemon=True)
    if packages:
        watcher.start()

    def spent() -> dict[str, Any] | None:
        ended.set()
        if packages:
            watcher.join()
            read()
        how = ["CPU, by RAPL"] if packages else []
        if cards is not None and (now := _card_joules()) is not None:
            joules[0] += now - cards
            how.append("GPU, by NVML")
        return {"wh": round(joules[0] / 3600, 4), "how": "; ".join(how)} if how else None

    return spent


def _readable(file: Path) -> bool:
    try:
        file.read_text()
    except OSError:
        return False
    return True


def _card_joules() -> float | None:
    """What the visible NVIDIA cards have used since their driver was loaded."""
    import torch

    if not torch.cuda.is_available():
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [
            pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(i).uuid}")
            for i in range(torch.cuda.device_count())
        ]
        return sum(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in handles) / 1000
    except Exception:  # no such package, an old card, a slice of one: not known, and no reason to fail
        return None


def describe_machine() -> dict[str, object]:
    """What `stage.json` records of the hardware."""
    import platform

    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return {"device": "cuda", "names": names, "cuda": torch.version.cuda}
    return {"device": "cpu", "machine": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
