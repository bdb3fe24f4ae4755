"""Options that several commands have, and the types of their values; imports nothing but argparse."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

_UNITS = {"k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 on")
    return int(text)


def number(text: str, units: dict[str, float] = _UNITS) -> float:
    """Of `280e9`, `125M`, `1.4T`."""
    digits, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1.0)
    try:
        value = float(digits) * unit
    except ValueError:
        value = float("nan")
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number such as 280e9, 125M or 1.4T")
    return value


def count(text: str) -> float:
    """`number` for what is counted, where `125m` and `1.3b` can mean nothing else."""
    return number(text, _UNITS | {"m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12})


def share(text: str) -> float:
    value = number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share, above 0 and at most 1")
    return value


def add_probe_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--probes", metavar="FILE", help="a jsonl file of probes or a probes.yaml; default: tinyworld's"
    )
    command.add_argument("--json", action="store_true", help="machine-readable output")


def add_device_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", metavar="NAME", help="h100, h100x8, a100-40, l4, rtx4090, mi300x, cpu ...")
    command.add_argument("--utilisation", type=share, metavar="SHARE", help="of the device's peak, such as 0.4")
    command.add_argument("--price", type=number, metavar="USD", help="of one device and hour, in place of the table's")


class _Budget(argparse.Action):
    """`1e21`, `24h` or `$100` as the option that each of them stands for."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, value: Any, option: str | None = None) -> None:
        name, digits = "flops", value
        if value.startswith("$"):
            name, digits = "dollars", value[1:]
        elif value.endswith("h"):
            name, digits = "hours", value[:-1]
        try:
            setattr(namespace, name, number(digits))
        except argparse.ArgumentTypeError:
            raise argparse.ArgumentError(
                self, f"{value} is not FLOPs such as 1e21, hours such as 24h or $100"
            ) from None


def add_budget_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--params", type=count, metavar="N", help="parameters, such as 125M or 7e9")
    command.add_argument("--tokens", type=count, metavar="D", help="tokens of training, such as 2.5B")
    command.add_argument("--flops", type=number, metavar="C", help="a budget of FLOPs, such as 1e21")
    command.add_argument("--hours", type=number, metavar="H", help="a budget of hours on --device")
    command.add_argument("--dollars", type=number, metavar="USD", help="a budget of money on --device")
    command.add_argument("--budget", action=_Budget, metavar="C", help="one of the three before: 1e21, 24h or '$100'")
    add_device_options(command)


def add_scale_options(command: argparse.ArgumentParser) -> None:
    add_budget_options(command)
    command.add_argument("--fit", nargs="+", type=Path, metavar="RUN", help="fit a law of your own to finished runs")
    command.add_argument("--json", action="store_true", help="machine-readable output")


def add_new_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", help="the recipe's folder; it must not be there yet")
    add_budget_options(command)
    command.add_argument(
        "--from", dest="origin", metavar="MODEL", help="a model's folder, or org/model@revision: no pretraining"
    )
    command.add_argument("--data", metavar="DIR", help="a folder of your own files, or tinyworld; default: by the size")
    command.add_argument(
        "--stages", metavar="A,B", help="such as tokenizer,pretrain,sft; default: those that there is data for"
    )


def add_check_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("what", nargs="+", metavar="RECIPE | FILE", help="a recipe, or files, folders, tinyworld/NAME")
    command.add_argument("--out", type=Path, help="the run whose tokenizer counts; default: runs/RECIPE")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for run")
    command.add_argument(
        "--held-out", action="append", default=[], metavar="FILE", help="rows or probes that the files should not show"
    )
    command.add_argument("--json", action="store_true", help="machine-readable output")


def add_prepare_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("what", metavar="RECIPE | FILE", help="a recipe with `curate`, or a YAML file of its own")
    command.add_argument("--out", type=Path, help="the run's folder; default: runs/RECIPE")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for run; curate.KEY too")
    command.add_argument(
        "--tokenizer", type=Path, metavar="FOLDER", help="default: what the file says, else the recipe's"
    )
    command.add_argument("--json", action="store_true", help="machine-readable output")
