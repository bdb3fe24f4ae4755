"""`hfpipe scale`: what a model of some size and so many tokens should reach, cost, and how a budget is best spent."""

from __future__ import annotations

import argparse
import json
from typing import Any

from hfpipe.errors import UserError
from hfpipe.plan.devices import find_devices
from hfpipe.plan.fitting import Fit, fit, read_points
from hfpipe.plan.scaling import KAPLAN_LOSS_EXPONENTS, TOKENS_PER_PARAMETER, Budget, describe
from hfpipe.progress import duration, money, quantity


def scale(options: argparse.Namespace) -> None:
    """Print the law at a point, or with `--fit` a law of the runs' own, and there too the point if one is given."""
    devices = find_devices(options.device, options.utilisation, options.price) if options.device else None
    names = ("params", "tokens", "flops", "hours", "dollars")
    budget = Budget(**{name: getattr(options, name) for name in names}, devices=devices)
    runs = [run for run in options.fit or () if not run.is_file()]  # runs/* may name a file among them
    for run in runs:
        if not run.is_dir():
            raise UserError(f"--fit {run}: no such folder. Give folders of finished runs, such as runs/*.")
    if options.fit and not runs:
        raise UserError(f"--fit {options.fit[0]}: a file. Give folders of finished runs, such as runs/*.")
    found = fit(*read_points(runs)) if runs else None
    told: dict[str, Any] = {"fit": _as_json(found)} if found else {}
    asked = any(getattr(options, name) is not None for name in names)
    if asked or not found:
        completed = budget.complete()
        told |= describe(completed, found.law) if found else describe(completed)
    if options.json:
        print(json.dumps(told, indent=2))
        return
    lines = _fitted(found) if found else []
    if asked:
        lines += ["", *_table(told, found is not None)] if lines else _table(told, False)
    print("\n".join(lines))


def _table(told: dict[str, Any], own: bool) -> list[str]:
    terms, best, rule = told["loss_terms"], told["best"], told["rule_of_20"]
    ratio = told["tokens_per_parameter"]
    rows = [
        ("parameters", quantity(told["params"]), ""),
        ("tokens", quantity(told["tokens"]), f"{ratio:.3g} a parameter; {_against(ratio)}"),
        ("FLOPs", f"{told['flops']:.3g}", "6 for each parameter and token: 2 forward, 4 backward"),
    ]
    if told["device"]:
        cost = "no price is known: give --price" if told["dollars"] is None else money(told["dollars"])
        used = f"at {told['utilisation']:.0%} of its bf16 peak; --utilisation if you know better"
        rows += [("time", duration(told["hours"] * 3600), f"on {told['device']}, {used}"), ("cost", cost, "")]
    law = "the law fitted to your runs" if own else "Chinchilla's law, nats a token of its own data and tokenizer"
    what = "a larger model" if terms["finite_model"] > terms["finite_data"] else "more data"
    helps = f"; {what} helps most" if best else ""
    rows += [
        ("loss", f"{sum(terms.values()):.3f}", law),
        ("  finite model", f"{terms['finite_model']:.3f}", "what a model without end would save"),
        ("  finite data", f"{terms['finite_data']:.3f}", f"what data without end would save{helps}"),
        ("  irreducible", f"{terms['irreducible']:.3f}", "the text's own uncertainty"),
        ("best by the law", *_best(best)),
        (
            f"best by {TOKENS_PER_PARAMETER} to 1",
            f"{quantity(rule['params'])} on {quantity(rule['tokens'])}",
            f"loss {rule['loss']:.3f}; the rule is by the paper's other methods; the printed constants are rounded and drift from it",
        ),
    ]
    if best:
        tenfold = told["ten_times_the_budget"]
        grown = "how parameters and tokens should grow, by the law's exponents"
        falls = "as parameters^-{params} or tokens^-{tokens}".format(**KAPLAN_LOSS_EXPONENTS)
        kaplan = f"whose loss falls {falls}: by 5% for twice the parameters"
        rows.append(("ten times the FLOPs", _times(tenfold["chinchilla"]), grown))
        rows.append(("  by Kaplan 2020", _times(tenfold["kaplan"]), kaplan))
    width, middle = max(len(row[0]) for row in rows), max(len(row[1]) for row in rows)
    return [f"{name:<{width}}  {value:<{middle}}  {why}".rstrip() for name, value, why in rows]


def _best(best: dict[str, float] | None) -> tuple[str, str]:
    if best is None:
        return (
            "not known",
            "these runs do not tell the best division: by them parameters, or tokens, cost no loss at all",
        )
    ratio = best["tokens"] / best["params"]
    why = f"for these FLOPs: loss {best['loss']:.3f}, {ratio:.3g} tokens a parameter"
    return f"{quantity(best['params'])} on {quantity(best['tokens'])}", why


def _times(factors: dict[str, float]) -> str:
    return f"{factors['params']:.1f} x on {factors['tokens']:.1f} x"


def _against(ratio: float) -> str:
    if ratio < TOKENS_PER_PARAMETER / 2:
        return "a smaller model on more tokens would be better at this cost"
    if ratio > TOKENS_PER_PARAMETER * 5:
        return "a larger model would be better at this cost, and dearer to use"
    return f"about {TOKENS_PER_PARAMETER} is best for the cost of training"


def _as_json(found: Fit) -> dict[str, Any]:
    law = found.law
    return {
        "law": {name: getattr(law, name) for name in ("E", "A", "B", "a", "b")},
        "fitted": list(found.free),
        "why": found.why,
        "intervals_95": {name: list(interval) for name, interval in found.intervals.items()},
        "relative_error": found.error,
        "points": [point._asdict() for point in found.points],
        "notes": list(found.notes),
    }


def _fitted(found: Fit) -> list[str]:
    lines = [f"{'parameters':>10}  {'tokens':>8}  {'loss':>6}  {'law':>6}  run"]
    for point in found.points:
        told = f"{quantity(point.params):>10}  {quantity(point.tokens):>8}  {point.loss:>6.3f}"
        lines.append(f"{told}  {found.law.loss(point.params, point.tokens):>6.3f}  {point.run}")
    lines += ["", f"L = E + A / N^a + B / D^b, fitted: {', '.join(found.free)} ({found.why})"]
    for name in ("E", "A", "B", "a", "b"):
        value, interval = getattr(found.law, name), found.intervals.get(name)
        given = "Chinchilla's" if name in ("a", "b") else "in E"
        how = f"95% {interval[0]:.4g} to {interval[1]:.4g}" if interval else "" if name in found.free else given
        lines.append(f"  {name}  {value:<8.4g}  {how}".rstrip())
    return [*lines, f"  mean relative error {found.error:.2%} over {len(found.points)} runs", *found.notes]
