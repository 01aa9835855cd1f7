"""What a planner is given and what it is asked: no torch, no store, no model in memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from lsq_core.config import LADDER, Budget, divides, format_bytes, nominal_bytes
from lsq_core.errors import InputError
from lsq_core.model import Matrix

#: Budgets are typed with few digits; a plan that exceeds one by less than this is within it.
TOLERANCE = 1e-9


@dataclass(frozen=True, eq=False)
class Problem:
    """The matrices of a model and what has been measured of them.

    ``scores`` maps a metric to (n,) figures, ``by_config`` to (n, 12), both in the order of
    ``matrices`` and NaN where there is none.
    """

    matrices: tuple[Matrix, ...]
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    by_config: dict[str, np.ndarray] = field(default_factory=dict)
    #: First and last ladder index that pins allow each matrix, int64 (n,); None without pins.
    pinned_low: np.ndarray | None = None
    pinned_high: np.ndarray | None = None

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
        return np.full(len(self.matrices), len(LADDER) - 1)

    @cached_property
    def numel(self) -> np.ndarray:
        """Weights of each matrix, int64 (n,)."""
        return np.array([m.numel for m in self.matrices], dtype=np.int64)

    @cached_property
    def allowed(self) -> np.ndarray:
        """Whether a stop's groups fill a matrix and pins allow it, bool (n, 12)."""
        fills = np.array([[divides(m.numel, c.group_size) for c in LADDER] for m in self.matrices])
        stops = np.arange(len(LADDER))
        return fills & (stops >= self.low[:, None]) & (stops <= self.high[:, None])

    @cached_property
    def bytes(self) -> np.ndarray:
        """Nominal bytes at each stop, float64 (n, 12)."""
        return np.array([[nominal_bytes(m.numel, c) for c in LADDER] for m in self.matrices])

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
            if not divides(matrix.numel, LADDER[stop].group_size):
                raise InputError(
                    f"{matrix.name} ({matrix.out_features}×{matrix.in_features}) cannot be cut "
                    f"into groups of {LADDER[stop].group_size}; choose a stop with a smaller "
                    "group size, or mxq, which gives each matrix one that fits."
                )

    @property
    def feasible(self) -> tuple[float, float]:
        """Nominal bytes of the smallest and the largest plan."""
        smallest = np.where(self.allowed, self.bytes, np.inf).min(axis=1).sum()
        largest = np.where(self.allowed, self.bytes, -np.inf).max(axis=1).sum()
        return float(smallest), float(largest)

    def in_words(self, nominal: float) -> str:
        """Bytes of the linear weights as people read them: ``3.18 bpp (9.02 MiB)``."""
        return f"{8 * nominal / self.total:.4g} bpp ({format_bytes(nominal)})"


@dataclass(frozen=True)
class PlanRequest:
    """What a person asks for: a method, and a base stop, a budget, or both.

    ``top_m`` 0 keeps every outlier; ``metric`` is what SensiBoost reads; ``seed`` is for the
    ablations; ``exact`` has a knapsack solved to the optimum; ``pins`` are read by
    :class:`lsq_core.plan.pins.Pin`.
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "pins", tuple(self.pins))  # JSON gives a list
        if self.boost_stop < 0 or self.top_m < 0:
            raise InputError("boost-stop and top-m are counts; they cannot be negative.")

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
