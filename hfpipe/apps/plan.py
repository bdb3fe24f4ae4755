"""`hfpipe plan`: what a run would do and why, and a quote for it: work, time, money, memory, disk."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from hfpipe.pipeline import plan_rows
from hfpipe.plan.devices import Devices, find_devices
from hfpipe.progress import duration, money
from hfpipe.sections import Recipe
from hfpipe.training.identity import processes_now


def plan(recipe: Recipe, run: Path, options: argparse.Namespace) -> None:
    devices = find_devices(options.device or "cpu", options.utilisation, options.price)
    rows = plan_rows(recipe, run, devices)
    if options.rehearse:
        from hfpipe.apps.rehearse import rehearse

        rehearse(recipe, run, rows, devices)
    ahead = [row for row in rows if row["trains"] and row.get("seconds")]
    seconds = sum(row["seconds"] for row in ahead)
    measured_on = (row.get("measured", {}).get("device", "cpu") for row in rows)
    label = next((device for device in measured_on if device != "cpu"), devices.label)
    if options.json:
        total = {"seconds": seconds, "dollars": devices.cost(seconds), "device": label}
        sources = {"device_source": devices.source, "price_source": devices.price_source}
        told = {"recipe": recipe.name, "run": str(run), "notes": _notes(recipe, devices)}
        print(json.dumps({**told, "total": total | sources, "stages": rows}, indent=2))
        return
    print("\n".join([f"{recipe.name} -> {run}", *_notes(recipe, devices)]))
    for row in rows:
        print(f"{row['stage']:<10} {row['status']}{': ' if row['why'] else ''}{'; '.join(row['why'])}")
        for line in row["notes"]:
            print(f"{'':<10}   {line}")
    if ahead:
        cost = devices.cost(seconds)
        price = f", {money(cost)} ({devices.price_source})" if cost is not None else ""
        print(
            f"{'total':<10} about {duration(max(seconds, 1))} of training on {label}{_measured(rows)}{price}; "
            "scoring comes on top"
        )
    print(f"The rows themselves are looked at by: hfpipe data check {shlex.quote(str(options.recipe))}")


def _notes(recipe: Recipe, devices: Devices) -> list[str]:
    processes = processes_now(recipe)
    if devices.count == processes or devices.key == "cpu":
        return []
    if devices.count == 1:
        return [
            f"note: launch.processes is {processes}, a device each, and this is the time and the price of one {devices.name}; "
            f"of all: --device {devices.key}x{processes}"
        ]
    return [
        f"note: {devices.count} devices need launch.processes: {devices.count} in pipeline.yaml; "
        f"as it is, a run takes {processes}"
    ]


def _measured(rows: list[dict[str, Any]]) -> str:
    """How much of the total rests on a rehearsal."""
    tried = [row["measured"] for row in rows if "measured" in row]
    good = sum("failed" not in found for found in tried)
    return f" ({good} of {len(tried)} stages measured)" if tried else ""
