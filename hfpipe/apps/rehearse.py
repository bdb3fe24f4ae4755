"""`hfpipe plan --rehearse`: each stage's quote for this machine from real steps, each stage in a child of its own. No torch here."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from hfpipe.errors import UserError
from hfpipe.faults import ended
from hfpipe.plan.costs import precomputes
from hfpipe.plan.devices import Devices
from hfpipe.plan.quote import Quote, quote_stage
from hfpipe.plan.workload import BY_REWARDS
from hfpipe.processes import ForkedProcess, start_server
from hfpipe.progress import duration, money, quantity
from hfpipe.sections import Recipe
from hfpipe.stages._rehearse import measure

_LONGEST_S = 600  # of one stage, imports among it
_ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg", "/dev/accel", "/dev/dri")
_ELSEWHERE = "--rehearse measures this machine, which is no {}: leave --device out."


def rehearse(recipe: Recipe, run: Path, rows: list[dict[str, Any]], devices: Devices) -> None:
    """Put what is measured into the rows of a plan: `measured`, `seconds` and `dollars` from it, and its line of time."""
    if devices.key != "cpu" and not any(Path(place).exists() for place in _ACCELERATORS) and sys.platform == "linux":
        raise UserError(_ELSEWHERE.format(devices.name))
    start_server(Path(os.devnull))
    for row in rows:
        stage = recipe.stages[row["stage"]]
        if not stage.type.trainer or not row["trains"]:
            continue
        quote = quote_stage(recipe, stage, run, devices)
        if stage.type.name in BY_REWARDS:
            found = {"failed": "its steps wait for answers, whose length is the model's own; the time is reckoned"}
        else:
            found = _in_child(recipe, run, stage.name, quote)
        row["measured"] = found
        if "failed" in found:
            row["notes"].append(f"not rehearsed: {found['failed']}")
            continue
        if found["device"] == "cpu" != devices.key:
            raise UserError(_ELSEWHERE.format(devices.name))
        line = _apply(recipe, row, found, quote, devices)
        row["notes"] = [line if note.startswith("time: ") else note for note in row["notes"]]
        row["notes"] += [] if line in row["notes"] else [line]


def _in_child(recipe: Recipe, run: Path, name: str, quote: Quote) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile() as log:
        answers, its_end = multiprocessing.Pipe(duplex=False)
        child = ForkedProcess(measure, (recipe, run, name, quote, its_end, Path(log.name)))
        its_end.close()
        try:
            if not answers.poll(_LONGEST_S):
                return {"failed": f"no step was done within {duration(_LONGEST_S)}"}
            return answers.recv()
        except EOFError:  # it died
            child.wait(_LONGEST_S)
            return {"failed": ended(child.poll() or 1, Path(log.name).read_text(errors="replace"), 1 << 40)}
        finally:
            child.kill()


def _apply(recipe: Recipe, row: dict[str, Any], found: dict[str, Any], quote: Quote, devices: Devices) -> str:
    """Time and cost by the measurement; what a stage does once before its steps was not measured: the reference's passes."""
    work, parts = quote.work, quote.flops or {}
    more = 1 + parts["reference"] / parts["training"] if parts and precomputes(recipe.stages[row["stage"]]) else 1.0
    each = found["seconds_per_step"]
    known = parts and (devices.key != "cpu" or found["device"] == "cpu")  # of another device the peak is not given
    if known:
        done = parts["training"] / work.steps / devices.count
        peak = devices.rate(quote.dtype) / devices.utilisation / devices.count
        found["utilisation"] = done / each / peak
    share = f", {found['utilisation']:.0%} of its peak" if known else ""
    made_up = f" of {' and '.join(found['made_up'])}" if found["made_up"] else ""
    told = f"measured on this machine: {found['steps']} steps{made_up}, {1000 * each:,.3g} ms a step, "
    told += f"{quantity(found['tokens_per_s'])} tokens/s{share}, {found['memory'] / 1e6:,.0f} MB"
    if not work.steps:
        return f"time: {told}"
    row["seconds"] = each * work.steps * more
    row["dollars"] = devices.cost(row["seconds"])
    cost = f" and {money(row['dollars'])}" if row["dollars"] is not None else ""
    beside = "; the reference's passes, reckoned, among it" if more > 1 else ""
    return f"time: about {duration(max(row['seconds'], 1))}{cost}, {told}{beside}"
