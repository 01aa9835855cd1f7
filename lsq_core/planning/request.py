"""The request for a plan."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lsq_core.bits import Budget, mixed_rows
from lsq_core.errors import InputError
from lsq_core.planning.problem import TOLERANCE, Problem

#: Losses that high-impact ratios are measured by: on the block's own output, or on the model's.
LOSSES = ("block", "model")
#: Metrics that SensiBoost can read: the sensitivity by part, or by module.
SENSITIVITIES = ("sensitivity", "sensitivity_module")
#: How ratios are chosen: one for all, per matrix, or jointly for the matrices of a block.
RATIO_MODES = ("uniform", "diagonal", "full")


@dataclass(frozen=True)
class PlanRequest:
    """A method, and a base configuration, a budget, or both.

    ``top_m`` 0 promotes every outlier; ``metric`` is the one that SensiBoost reads; ``seed`` is
    that of the ablations; ``exact`` solves a knapsack to the optimum; ``pins`` are parsed by
    :class:`lsq_core.planning.pins.Pin`. The last six fields are documented in
    :class:`lsq_core.planning.methods.high_impact.HighImpact`. Each method declares the fields that
    it reads (:attr:`lsq_core.planning.methods.base.Planner.fields`).
    """

    method: str
    base: str | None = None
    budget: str | None = None
    boost_stop: int = 2
    top_m: int = 0
    metric: str = "sensitivity"
    seed: int = 0
    exact: bool = False
    pins: tuple[str, ...] = ()
    low_bits: int = 2
    high_bits: int = 3
    group_size: int = 128
    loss: str = "block"
    ratios: str = "full"
    clip: bool = False

    def __post_init__(self) -> None:
        self._check_types()
        object.__setattr__(self, "pins", tuple(self.pins))  # JSON gives a list
        if self.boost_stop < 0 or self.top_m < 0:
            raise InputError("boost-stop and top-m cannot be negative.")
        if self.seed < 0:
            raise InputError(f"A seed cannot be negative ({self.seed}).")
        mixed_rows(self.low_bits, self.high_bits, self.group_size)
        for name, value, offered in (
            ("loss", self.loss, LOSSES),
            ("ratios", self.ratios, RATIO_MODES),
            ("metric", self.metric, SENSITIVITIES),
        ):
            if value not in offered:
                raise InputError(f"{name} must be one of {', '.join(offered)}, not '{value}'.")

    def _check_types(self) -> None:
        """Raise :class:`InputError` for a field of the wrong type, as a file may have one."""
        for each in fields(self):
            value, kind = getattr(self, each.name), type(each.default)
            if each.name == "pins":
                is_valid = isinstance(value, list | tuple) and all(
                    isinstance(p, str) for p in value
                )
            elif each.default is None:
                is_valid = value is None or isinstance(value, str)
            else:
                kind = str if each.name == "method" else kind
                is_valid = type(value) is kind
            if not is_valid:
                raise InputError(f"A request's {each.name} cannot be {reprlib.repr(value)}.")

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> PlanRequest:
        """Read a request from the JSON of a plan.

        Raises
        ------
        InputError
            If it lacks the method, or has an unknown field or an invalid value.
        """
        unknown = sorted(set(content) - {each.name for each in fields(cls)})
        if unknown:
            raise InputError(f"A request has no field '{unknown[0]}'; remove it.")
        if "method" not in content:
            raise InputError("The plan's request lacks its method.")
        return cls(**content)

    def resolve_budget(self, problem: Problem) -> Budget | None:
        """Return the budget in nominal bytes, checked against the sizes that plans can have."""
        if self.budget is None:
            return None
        budget = Budget.parse(self.budget, problem.total)
        smallest, largest = problem.feasible
        # The largest plan is called 8.51 and has 8.508 bits: its name must not be out of reach.
        if not smallest * (1 - TOLERANCE) <= budget.nominal_bytes <= largest * 1.001:
            under = " with these pins" if self.pins else ""
            remedy = "drop a pin, or choose" if self.pins else "choose"
            raise InputError(
                f"A budget of {self.budget} is out of reach: plans for this model{under} take from "
                f"{problem.format_size(smallest)} to {problem.format_size(largest)}; {remedy} a "
                "budget "
                "between them."
            )
        return budget
