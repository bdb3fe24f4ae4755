"""Devices as data (devices.yaml), the machine at hand among them: rates, memory, price, and what is made of them in practice."""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfpipe.errors import UserError, nearest
from hfpipe.yaml_files import load_yaml

# Share of the dense peak that training reaches in the matrix products that are counted (model FLOPs, nothing recomputed).
# Published: 0.46 PaLM 540B (arXiv:2204.02311), 0.38 to 0.43 Llama 3 405B (arXiv:2407.21783). With plain transformers, without
# fused kernels or a tuned cluster, it is less, and far less for models below some 100M parameters.
UTILISATION = 0.35
# Of a CPU's float32 peak. `hfpipe run tiny`, pretraining: 2.5M tokens of a 2.2M-parameter model in 203 s on two cores.
CPU_UTILISATION = 0.4
_CPU = "cpu"
# FLOPs of one core and cycle in float32: two units of so many lanes, multiply and add.
_BF16 = {"avx512_bf16", "amx_bf16", "bf16", "sve_bf16"}  # as hfpipe.training.hardware.choose_bf16 has them
_LANES = (("avx512f", 64), ("avx2", 32), ("asimd", 16))


@dataclass(frozen=True)
class Devices:
    """`count` devices of one kind."""

    key: str
    name: str
    count: int
    bf16: float | None  # TFLOP/s of one device, dense, as the others
    fp16: float | None
    fp32: float
    memory: float  # GB of one device
    bandwidth: float | None  # GB/s of one device
    power: float | None  # W of one device
    price: float | None  # USD an hour for one device
    utilisation: float
    source: str
    price_source: str | None  # with its date
    has_bf16: bool  # whether a run there trains under bf16 autocast, unless the recipe says otherwise

    def rate(self, dtype: str) -> float:
        """FLOP/s that all of them make in practice for matrix products in `dtype`: bf16, fp16 or fp32."""
        peak = getattr(self, dtype) or self.fp32
        return peak * 1e12 * self.utilisation * self.count

    def seconds(self, flops: float, dtype: str) -> float:
        return flops / self.rate(dtype)

    def cost(self, seconds: float) -> float | None:
        """USD; None without a price."""
        return None if self.price is None else self.price * self.count * seconds / 3600

    @property
    def label(self) -> str:
        return f"{self.count} x {self.name}" if self.count > 1 else self.name


def find_devices(text: str, utilisation: float | None = None, price: float | None = None) -> Devices:
    """Of `h100x8`, `a100-40`, `cpu`; `utilisation` and `price` (USD for one device and hour) replace the table's.

    Raises:
        UserError: no such device, or none of them.
    """
    key, count = _split(text)
    if count < 1:
        raise UserError(f"--device {text}: expected one device or more.")
    raw = _this_machine() if key == _CPU else table()[key]
    source = raw["price_source"] and f"{raw['price_source']}, {raw['price_date']}"
    default = CPU_UTILISATION if key == _CPU else UTILISATION
    return Devices(
        key=key,
        count=count,
        utilisation=default if utilisation is None else utilisation,
        price=raw["price"] if price is None else price,
        price_source=source if price is None else "--price",
        has_bf16=raw.get("autocast", raw["bf16"] is not None),
        **{name: raw[name] for name in ("name", "bf16", "fp16", "fp32", "memory", "bandwidth", "power", "source")},
    )


@functools.cache
def table() -> dict[str, dict[str, Any]]:
    """Device -> what devices.yaml says of it."""
    return load_yaml(Path(__file__).with_name("devices.yaml"))


def _split(text: str) -> tuple[str, int]:
    known = [*table(), _CPU]
    given = text.strip().lower()
    if given in known:
        return given, 1
    found = re.fullmatch(r"(.+)x(\d+)", given)
    if found and found[1] == _CPU:
        raise UserError(
            f"--device {text}: this machine's CPU is one device, all its cores together. Give --device cpu."
        )
    if found and found[1] in known:
        return found[1], int(found[2])
    raise UserError(
        f"--device {text}: expected one of {', '.join(known)}, or several such as h100x8."
        f"{nearest(found[1] if found else given, known)}"
    )


def usable_cores() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _this_machine() -> dict[str, Any]:
    """This machine's CPU: its float32 peak by cores, clock and vector width, its memory; Linux tells of both."""
    info = _read("/proc/cpuinfo")
    flags = set((re.search(r"^(?:flags|Features)\s*:(.*)$", info, re.M) or ["", ""])[1].split())
    lanes = next((flops for flag, flops in _LANES if flag in flags), 16)
    clock = [float(value) for value in re.findall(r"^cpu MHz\s*:\s*([\d.]+)", info, re.M)]
    cores = usable_cores()
    gigahertz = (sum(clock) / len(clock) / 1000) if clock else 2.5
    total = re.search(r"^MemTotal:\s*(\d+) kB", _read("/proc/meminfo"), re.M)
    name = re.search(r"^model name\s*:\s*(.+)$", info, re.M)
    return {
        "name": f"this machine's CPU, {cores} cores",
        "autocast": bool(flags & _BF16),
        "bf16": None,  # what a small model makes of bf16 instructions is not told by their peak
        "fp16": None,
        "fp32": cores * gigahertz * lanes / 1000,
        "memory": int(total[1]) * 1024 / 1e9 if total else 0.0,
        "bandwidth": None,
        "power": None,
        "price": None,
        "price_source": None,
        "price_date": None,
        "source": f"/proc/cpuinfo: {name[1] if name else 'a CPU'}, {cores} cores x {gigahertz:.2f} GHz x {lanes} FLOPs a cycle",
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
