"""Scaling laws: what loss N parameters and D tokens give, and how a budget is best divided between the two.

Chinchilla (Hoffmann et al. 2022, arXiv:2203.15556, section 3.3): L(N, D) = E + A / N^a + B / D^b, in nats a token of MassiveText
under its tokenizer; N counts all parameters. The terms have names here: `irreducible` E, `finite_model` A / N^a, `finite_data`
B / D^b. With C = 6 N D FLOPs the best division is, in closed form,
N = G (C / 6)^(b / (a + b)), D = (C / 6)^(a / (a + b)) / G, with G = (a A / (b B))^(1 / (a + b)).

Kaplan et al. 2020 (arXiv:2001.08361) had the exponents 0.73 for N (without embeddings) and 0.27 for D: larger models on less
data. Their learning rates were not lowered to the end of shorter runs, which made those look worse than they were.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from hfpipe.errors import UserError

FLOPS_PER_PARAMETER_AND_TOKEN = 6  # 2 forward, 4 backward
# Of Chinchilla's first two methods, and of the model: 70B parameters, 1.4T tokens.
TOKENS_PER_PARAMETER = 20
KAPLAN_EXPONENTS = {"params": 0.73, "tokens": 0.27}
KAPLAN_LOSS_EXPONENTS = {
    "params": 0.076,
    "tokens": 0.095,
}  # L ~ N^-0.076 with data to spare, D^-0.095 with model to spare


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^a + B / D^b."""

    E: float
    A: float
    B: float
    a: float
    b: float

    def terms(self, params: float, tokens: float) -> dict[str, float]:
        """Nats a token that the loss is made of."""
        return {
            "finite_model": self.A / params**self.a,
            "finite_data": self.B / tokens**self.b,
            "irreducible": self.E,
        }

    def loss(self, params: float, tokens: float) -> float:
        return sum(self.terms(params, tokens).values())

    def best(self, flops: float) -> tuple[float, float] | None:
        """Parameters and tokens of the lowest loss for a budget of FLOPs, by the closed form.

        None where one of them costs nothing by this law (A or B is 0): it would grow without end.
        """
        if not (self.A and self.B):
            return None
        g = (self.a * self.A / (self.b * self.B)) ** (1 / (self.a + self.b))
        product = flops / FLOPS_PER_PARAMETER_AND_TOKEN
        return g * product ** (self.b / (self.a + self.b)), product ** (self.a / (self.a + self.b)) / g


# As printed in the paper's body. The rounding matters: Besiroglu et al. 2024 (arXiv:2404.10102) show that with them the best
# models have far more than 20 tokens a parameter at large budgets, against the paper's own other two methods.
CHINCHILLA = Law(E=1.69, A=406.4, B=410.7, a=0.34, b=0.28)


def by_ratio(flops: float, tokens_per_parameter: float = TOKENS_PER_PARAMETER) -> tuple[float, float]:
    """Parameters and tokens of a budget under a fixed number of tokens a parameter."""
    params = math.sqrt(flops / (FLOPS_PER_PARAMETER_AND_TOKEN * tokens_per_parameter))
    return params, tokens_per_parameter * params


@dataclass(frozen=True)
class Budget:
    """What is known of a training; `complete` works out the rest. `devices` is a `hfpipe.plan.devices.Devices`."""

    params: float | None = None
    tokens: float | None = None
    flops: float | None = None
    hours: float | None = None
    dollars: float | None = None
    devices: Any = None

    def complete(self) -> Budget:
        """All figures of the training.

        FLOPs come from what is given, else from hours, else from money; of two unknowns the ratio of 20 tokens a parameter
        settles one.

        Raises:
            UserError: too little or too much is given.
        """
        given = [name for name in ("params", "tokens", "flops", "hours", "dollars") if getattr(self, name) is not None]
        if not given:
            raise UserError("Give one of --params, --tokens, --flops, --hours and --dollars; the rest follows.")
        for name in given:
            if not (value := getattr(self, name)) > 0 or math.isinf(value):
                raise UserError(f"--{name} {value:g}: expected a finite number above 0.")
        budgets = [name for name in given if name in ("flops", "hours", "dollars")]
        if len(budgets) > 1:
            raise UserError(f"--{budgets[0]} and --{budgets[1]} are both a budget: give one of them.")
        if budgets and self.params and self.tokens:
            raise UserError(
                f"--params and --tokens make the budget; --{budgets[0]} would be another one. Leave one out."
            )
        flops = self.flops or (self._bought(budgets[0]) if budgets else None)
        params, tokens = self.params, self.tokens
        if flops and params:
            tokens = flops / (FLOPS_PER_PARAMETER_AND_TOKEN * params)
        elif flops and tokens:
            params = flops / (FLOPS_PER_PARAMETER_AND_TOKEN * tokens)
        elif flops:
            params, tokens = by_ratio(flops)
        else:
            params = params or tokens / TOKENS_PER_PARAMETER
            tokens = tokens or params * TOKENS_PER_PARAMETER
            flops = FLOPS_PER_PARAMETER_AND_TOKEN * params * tokens
        seconds = self.devices.seconds(flops, "bf16") if self.devices else None
        return replace(
            self,
            params=params,
            tokens=tokens,
            flops=flops,
            hours=seconds and seconds / 3600,
            dollars=self.devices.cost(seconds) if seconds else None,
        )

    def _bought(self, budget: str) -> float:
        if self.devices is None:
            raise UserError(f"--{budget} needs --device, such as --device h100x8: how much work is done in an hour?")
        hours = self.hours
        if budget == "dollars":
            if not self.devices.price:
                raise UserError(
                    f"--dollars needs --price, in USD for one {self.devices.name} and hour: none is known here."
                )
            hours = self.dollars / (self.devices.price * self.devices.count)
        return self.devices.rate("bf16") * hours * 3600


def describe(budget: Budget, law: Law = CHINCHILLA) -> dict[str, Any]:
    """All that `hfpipe scale` says of a completed budget."""
    params, tokens, flops = budget.params, budget.tokens, budget.flops
    best, rule = law.best(flops), by_ratio(flops)
    kaplan = {name: 10**exponent for name, exponent in KAPLAN_EXPONENTS.items()}
    ours = best and {"params": 10 ** (law.b / (law.a + law.b)), "tokens": 10 ** (law.a / (law.a + law.b))}
    return {
        "params": params,
        "tokens": tokens,
        "flops": flops,
        "tokens_per_parameter": tokens / params,
        "device": budget.devices and budget.devices.label,
        "utilisation": budget.devices and budget.devices.utilisation,
        "hours": budget.hours,
        "dollars": budget.dollars,
        "law": {"E": law.E, "A": law.A, "B": law.B, "a": law.a, "b": law.b},
        "loss": law.loss(params, tokens),
        "loss_terms": law.terms(params, tokens),
        "best": best and {"params": best[0], "tokens": best[1], "loss": law.loss(*best)},
        "rule_of_20": {"params": rule[0], "tokens": rule[1], "loss": law.loss(*rule)},
        "ten_times_the_budget": {"chinchilla": ours, "kaplan": kaplan},
    }
