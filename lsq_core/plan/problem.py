"""What a planner is given and what it is asked: no torch, no store, no model in memory."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import numpy as np

from lsq_core.config import (
    LADDER,
    Budget,
    Config,
    MixedRows,
    format_bytes,
    mixed_rows,
    nominal_bytes,
    of_matrix,
)
from lsq_core.errors import InputError
from lsq_core.model import Matrix
from lsq_core.quantize import planned_bytes

#: Budgets are typed with few digits; a plan that exceeds one by less than this is within it.
TOLERANCE = 1e-9
#: What high-impact ratios are measured by: the block's own output, or the whole model's.
LOSSES = ("block", "model")
#: What SensiBoost can read: the sensitivity by part, or by module.
SENSITIVITIES = ("sensitivity", "sensitivity_module")
#: How they are chosen: one for all, each matrix for itself, or as they act together in a block.
RATIO_CHOICES = ("uniform", "diagonal", "full")


@dataclass(frozen=True, eq=False)
class Interactions:
    """How the ratios in one decoder block act on a loss, alone and together (M of method §7).

    ``units`` are what shares a ratio, as indices of matrices: single ones, or the experts of one
    module type. ``matrix`` is (u·r, u·r), the options of a unit side by side; the loss that it
    predicts of a one-hot δ is ½·δᵀMδ. None where only row scores were asked for.
    """

    layer: int
    units: tuple[tuple[int, ...], ...]
    matrix: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Impact:
    """What is known of a model's rows, for planning them at two widths.

    ``row_scores`` holds the mean squared gradient of each output row, (out,), in the order of the
    matrices.
    """

    row_scores: tuple[np.ndarray, ...]
    blocks: tuple[Interactions, ...]
    #: What tells it from another, where it is remembered by that.
    mark: str = ""


@dataclass(frozen=True, eq=False)
class Problem:
    """The matrices of a model, what each can be given, and what has been measured of them.

    ``scores`` maps a metric to (n,) figures, ``by_config`` to (n, 12), both in the order of
    ``matrices`` and NaN where there is none. A choice (n,) holds indices into ``options``; on the
    ladder they are called stops.
    """

    matrices: tuple[Matrix, ...]
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    by_config: dict[str, np.ndarray] = field(default_factory=dict)
    #: First and last option that pins allow each matrix, int64 (n,); None without pins.
    pinned_low: np.ndarray | None = None
    pinned_high: np.ndarray | None = None
    #: From few bits to many.
    options: tuple[Config, ...] = LADDER
    impact: Impact | None = None

    def with_options(self, options: tuple[Config, ...]) -> Problem:
        """The same with other options; pins are of the options that they were made with."""
        if options == self.options:
            return self
        return replace(self, options=options, pinned_low=None, pinned_high=None)

    @cached_property
    def low(self) -> np.ndarray:
        """The lowest stop that may be chosen for each matrix, int64 (n,)."""
        if self.pinned_low is not None:
            return self.pinned_low
        return np.zeros(len(self.matrices), dtype=np.int64)

    @cached_property
    def high(self) -> np.ndarray:
        """The highest stop that may be chosen for each matrix, int64 (n,)."""
        if self.pinned_high is not None:
            return self.pinned_high
        return np.full(len(self.matrices), len(self.options) - 1)

    @cached_property
    def numel(self) -> np.ndarray:
        """Weights of each matrix, int64 (n,)."""
        return np.array([m.numel for m in self.matrices], dtype=np.int64)

    @cached_property
    def allowed(self) -> np.ndarray:
        """Whether an option's groups fill a matrix and pins allow it, bool (n, options)."""
        fills = np.array([[c.fits(m) for c in self.options] for m in self.matrices])
        stops = np.arange(len(self.options))
        return fills & (stops >= self.low[:, None]) & (stops <= self.high[:, None])

    @cached_property
    def bytes(self) -> np.ndarray:
        """Nominal bytes of each option, float64 (n, options)."""
        return np.array(
            [[of_matrix(nominal_bytes, m, c) for c in self.options] for m in self.matrices]
        )

    def planned(self, metadata: str) -> list[list[int]]:
        """Bytes of each option in this project's packing, (n, options)."""
        shapes = [m.shape for m in self.matrices]
        sizes = {
            shape: [planned_bytes("hqq", shape, option, metadata) for option in self.options]
            for shape in set(shapes)
        }
        return [sizes[shape] for shape in shapes]

    @property
    def total(self) -> int:
        """Weights of all matrices together."""
        return int(self.numel.sum())

    def nominal(self, choice: np.ndarray) -> float:
        """Nominal bytes of a choice of stops (n,)."""
        return float(self.bytes[np.arange(len(choice)), choice].sum())

    def check_allowed(self, choice: np.ndarray) -> None:
        """Raise :class:`InputError` naming the first matrix that its stop's groups don't fill."""
        for matrix, stop in zip(self.matrices, choice, strict=True):
            if not self.options[stop].fits(matrix):
                raise InputError(
                    f"{matrix.name} ({matrix.out_features}×{matrix.in_features}) cannot be cut "
                    f"into groups of {self.options[stop].group_size}; choose a stop with a smaller "
                    "group size, or mxq, which gives each matrix one that fits."
                )

    def check_options(self) -> None:
        """Raise :class:`InputError` naming the first matrix that no option's groups fill."""
        for matrix, allowed in zip(self.matrices, self.allowed, strict=True):
            if not allowed.any():
                sizes = sorted({option.group_size for option in self.options}, reverse=True)
                what = "rows" if isinstance(self.options[0], MixedRows) else "weights"
                raise InputError(
                    f"{matrix.name} ({matrix.out_features}×{matrix.in_features}) has {what} "
                    f"that cannot be cut into groups of {', '.join(map(str, sizes))}; choose a "
                    "smaller group size."
                )

    @property
    def feasible(self) -> tuple[float, float]:
        """Nominal bytes of the smallest and the largest plan.

        Raises
        ------
        InputError
            When there is none, because no option's groups fill some matrix.
        """
        self.check_options()
        smallest = np.where(self.allowed, self.bytes, np.inf).min(axis=1).sum()
        largest = np.where(self.allowed, self.bytes, -np.inf).max(axis=1).sum()
        return float(smallest), float(largest)

    def in_words(self, nominal: float) -> str:
        """Bytes of the linear weights as people read them: ``3.18 bpp (9.02 MiB)``."""
        return f"{8 * nominal / self.total:.4g} bpp ({format_bytes(nominal)})"


class OnLadder:
    """A planner that gives each matrix a stop of the ladder, as all but one do."""

    reads_rows = False

    def options(self, request: PlanRequest) -> tuple[Config, ...]:
        """What a matrix can be given."""
        return LADDER


@dataclass(frozen=True)
class PlanRequest:
    """What a person asks for: a method, and a base stop, a budget, or both.

    ``top_m`` 0 keeps every outlier; ``metric`` is what SensiBoost reads; ``seed`` is for the
    ablations; ``exact`` has a knapsack solved to the optimum; ``pins`` are read by
    :class:`lsq_core.plan.pins.Pin`. The last six are those of the high-impact ratio:
    :class:`lsq_core.plan.high_impact.HighImpact` says what they mean.
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
            raise InputError("boost-stop and top-m are counts; they cannot be negative.")
        if self.seed < 0:
            raise InputError(f"A seed cannot be negative, and {self.seed} is.")
        mixed_rows(self.low_bits, self.high_bits, self.group_size)
        for name, value, offered in (
            ("loss", self.loss, LOSSES),
            ("ratios", self.ratios, RATIO_CHOICES),
            ("metric", self.metric, SENSITIVITIES),
        ):
            if value not in offered:
                raise InputError(f"{name} is one of {', '.join(offered)}, not '{value}'.")

    def _check_types(self) -> None:
        """A request may come from a file: a field of another type is named, not met later."""
        for each in fields(self):
            value, kind = getattr(self, each.name), type(each.default)
            if each.name == "pins":
                fine = isinstance(value, list | tuple) and all(isinstance(p, str) for p in value)
            elif each.default is None:
                fine = value is None or isinstance(value, str)
            else:
                kind = str if each.name == "method" else kind
                fine = type(value) is kind
            if not fine:
                raise InputError(f"A request's {each.name} cannot be {reprlib.repr(value)}.")

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> PlanRequest:
        """A request as a plan's JSON has it.

        Raises
        ------
        InputError
            When it lacks the method, has a field that no request has, or a value it cannot have.
        """
        unknown = sorted(set(content) - {each.name for each in fields(cls)})
        if unknown:
            raise InputError(f"A request has no field '{unknown[0]}'; remove it from the plan.")
        if "method" not in content:
            raise InputError("The plan's request lacks its method.")
        return cls(**content)

    def budget_for(self, problem: Problem) -> Budget | None:
        """The budget in nominal bytes, checked against what is feasible for this model."""
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
                f"{problem.in_words(smallest)} to {problem.in_words(largest)}; {remedy} a budget "
                "between them."
            )
        return budget
