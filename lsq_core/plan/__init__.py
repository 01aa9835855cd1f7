"""Planners: which matrix gets which configuration. Nothing here imports torch.

A new planner is one file beside these and one entry in ``PLANNERS``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np

from lsq_core.config import (
    Budget,
    Config,
    fp16_metadata_bytes,
    nominal_bytes,
    of_matrix,
    stop_index,
    weight_only_bytes,
)
from lsq_core.errors import InputError, LsqError
from lsq_core.model import Matrix
from lsq_core.plan.boost import KurtBoost, KurtBoostAblation, SensiBoost, SensiBoostAblation
from lsq_core.plan.exact import solve_exactly
from lsq_core.plan.frontier import Frontier, Segment
from lsq_core.plan.high_impact import HighImpact, high_rows
from lsq_core.plan.loss_aware import LossAware
from lsq_core.plan.mxq import KurtMilp, KurtScaled, Mxq, SensiMilp
from lsq_core.plan.outliers import shallowness
from lsq_core.plan.pins import with_pins
from lsq_core.plan.problem import PlanRequest, Problem
from lsq_core.plan.saved import read_plan, rows_text
from lsq_core.plan.sensi_knapsack import SensiKnapsack
from lsq_core.plan.uniform import Uniform, uniform_start, usable_bases
from lsq_core.quantize import planned_bytes


class Planner(Protocol):
    """One file a planner, one entry in ``PLANNERS``: it answers every budget by a frontier."""

    name: str
    title: str
    #: What the profile must hold: names of ``lsq_core.profile.METRICS``.
    metrics: tuple[str, ...]
    #: Whether its plans start from a base stop; one that does not has a cost to minimise.
    has_base: bool
    #: Whether it reads :class:`~lsq_core.plan.problem.Impact`.
    reads_rows: bool

    def options(self, request: PlanRequest) -> tuple[Config, ...]:
        """What a matrix can be given, from few bits to many."""
        ...

    def frontier(self, problem: Problem, request: PlanRequest, bases: list[int]) -> Frontier:
        """Every budget's plan, from each of the given base stops where it starts from one."""
        ...


PLANNERS: dict[str, Planner] = {
    planner.name: planner
    for planner in (
        Uniform(),
        SensiBoost(),
        KurtBoost(),
        SensiBoostAblation(),
        KurtBoostAblation(),
        Mxq(),
        KurtScaled(),
        SensiMilp(),
        KurtMilp(),
        SensiKnapsack(),
        LossAware(),
        HighImpact(),
    )
}


def get_planner(name: str) -> Planner:
    """The planner of that name.

    Raises
    ------
    InputError
        When there is none.
    """
    if name not in PLANNERS:
        raise InputError(f"'{name}' is not a method; choose one of {', '.join(PLANNERS)}.")
    return PLANNERS[name]


@dataclass(frozen=True, eq=False)
class Plan:
    """One configuration for each matrix, and why.

    ``reasons`` holds, for each matrix that was moved from its base, what ranked it (its z-score;
    for an ablation the order of the draw).
    """

    request: PlanRequest
    matrices: tuple[Matrix, ...]
    configs: tuple[Config, ...]
    metadata: str = "8bit"
    axis: int = 1
    base: str | None = None
    reasons: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    #: Bytes of what plans don't touch, in the checkpoint's dtype.
    other_bytes: int = 0
    #: A knapsack's cost of this plan, and what no plan within the budget can cost less than.
    objective: float | None = None
    lower_bound: float | None = None
    #: Whose storage the planned bytes are of.
    quantizer: str = "hqq"
    #: The text that its rows were scored on or that its quantizer reads, by its settings' names.
    calibration: dict | None = None
    #: The high-impact rows of each matrix that has mixed rows, by its name.
    rows: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """The planner's name."""
        return self.request.method

    @property
    def choice(self) -> dict[Matrix, Config]:
        """The configuration of each matrix."""
        return dict(zip(self.matrices, self.configs, strict=True))

    def _total(self, account: Callable[..., float]) -> float:
        return sum(of_matrix(account, m, c) for m, c in self.choice.items())

    @cached_property
    def parameters(self) -> int:
        """Weights of all planned matrices."""
        return sum(m.numel for m in self.matrices)

    @cached_property
    def nominal_bytes(self) -> float:
        """Bytes of the linear weights by the papers' formula."""
        return self._total(nominal_bytes)

    @property
    def bits_per_param(self) -> float:
        """Nominal bits per planned parameter, metadata included."""
        return 8 * self.nominal_bytes / self.parameters

    @cached_property
    def weight_only_bits(self) -> float:
        """Bits per planned parameter of the codes alone."""
        index = sum(c.index_bytes(m) for m, c in self.choice.items())
        return 8 * (self._total(weight_only_bytes) - index) / self.parameters

    @cached_property
    def bits_with_fp16_metadata(self) -> float:
        """Bits per planned parameter if scale and zero stayed fp16."""
        return 8 * self._total(fp16_metadata_bytes) / self.parameters

    @cached_property
    def planned_bytes(self) -> int:
        """What the quantizer will store for the linear weights, exactly."""
        return sum(
            planned_bytes(self.quantizer, m.shape, c, self.metadata) for m, c in self.choice.items()
        )

    @property
    def model_bytes(self) -> int:
        """The whole model: planned bytes, and the rest in the checkpoint's dtype."""
        return self.planned_bytes + self.other_bytes

    @property
    def modules(self) -> dict[str, dict]:
        """Full module name to its configuration, as the command line prints it."""
        return {
            m.name: c.stored_as
            | {"config": c.name, "layer": m.layer, "type": m.type}
            | ({"rows": rows_text(self.rows[m.name], m)} if m.name in self.rows else {})
            for m, c in self.choice.items()
        }

    def summary(self) -> dict:
        """Method and every account of its size, by the names the command line prints."""
        return {
            "method": self.method,
            "base": self.base,
            "bits_per_param": self.bits_per_param,
            "weight_only_bits": self.weight_only_bits,
            "bits_with_fp16_metadata": self.bits_with_fp16_metadata,
            "nominal_bytes": self.nominal_bytes,
            "planned_bytes": self.planned_bytes,
            "model_bytes": self.model_bytes,
            "metadata": self.metadata,
            "axis": self.axis,
            "quantizer": self.quantizer,
            "flagged": self.reasons,
            "notes": list(self.notes),
        } | self._knapsack()

    def _knapsack(self) -> dict:
        """What only a knapsack's plan has: its cost, the certified bound and the relative gap."""
        if self.objective is None:
            return {}
        gap = (self.objective - self.lower_bound) / abs(self.objective) if self.objective else 0.0
        return {"objective": self.objective, "lower_bound": self.lower_bound, "gap": gap}

    def to_json(self) -> dict:
        """Everything needed to apply the plan again; :meth:`from_json` reads it."""
        told = {"request": asdict(self.request), "modules": self.modules}
        return self.summary() | {"calibration": self.calibration} | told

    @classmethod
    def from_json(cls, content: dict, matrices: tuple[Matrix, ...], other_bytes: int) -> Plan:
        """A saved plan for the model that these matrices belong to.

        Raises
        ------
        InputError
            When it is not a plan, or one for another model; see
            :func:`lsq_core.plan.saved.read_plan`.
        """
        saved = read_plan(content, matrices)
        return cls(matrices=matrices, other_bytes=other_bytes, **vars(saved))


def make_plan(
    problem: Problem,
    request: PlanRequest,
    *,
    metadata: str = "8bit",
    axis: int = 1,
    other_bytes: int = 0,
    frontier: Frontier | None = None,
) -> Plan:
    """The plan that a method makes for a base stop, a budget, or a base capped by a budget.

    ``frontier`` is what :func:`make_frontier` gave for the same request with its pins, where it is
    at hand; else it is made.

    Raises
    ------
    InputError
        When the method is unknown, neither base nor budget is given, the budget is out of reach,
        or the base's groups don't fill a matrix.
    """
    planner = get_planner(request.method)
    problem = problem.with_options(planner.options(request))
    pinned = with_pins(problem, request.pins)
    budget = request.budget_for(pinned)
    if budget is None and request.base is None:
        raise InputError("Give a base stop (such as 3.13), a budget (such as 3.2bpp), or both.")
    if not planner.has_base and (budget is None or request.base is not None):
        raise InputError(f"{planner.title} takes a budget (such as 3.2bpp), not a base.")
    if request.exact and planner.has_base:
        raise InputError(f"{planner.title} has no cost to minimise; only knapsacks can be exact.")
    frontier = frontier or make_frontier(pinned, request)
    if request.exact and frontier.cost is None:
        raise InputError(
            f"{planner.title} chooses matrices together; its search has no exact variant."
        )
    chosen = _look_up(planner, pinned, frontier, request, budget)
    pinned.check_allowed(chosen.stops)
    return Plan(
        request=request,
        matrices=problem.matrices,
        configs=tuple(problem.options[stop] for stop in chosen.stops),
        metadata=metadata,
        axis=axis,
        base=chosen.base,
        reasons=chosen.reasons,
        notes=chosen.notes + _price_of_pins(problem, request, chosen, frontier),
        other_bytes=other_bytes,
        objective=chosen.objective,
        lower_bound=chosen.lower_bound,
        rows=high_rows(problem, chosen.stops),
    )


def make_frontier(problem: Problem, request: PlanRequest) -> Frontier:
    """Every budget's plan by a method; its pins, if any, are in the problem already.

    Raises
    ------
    InputError
        When the base's groups, or every stop's, fail to fill some matrix.
    """
    planner = get_planner(request.method)
    problem = problem.with_options(planner.options(request))
    if not planner.has_base:
        return planner.frontier(problem, request, [])
    bases = [stop_index(request.base)] if request.base else usable_bases(problem)
    if not bases:
        raise InputError(
            "No single group size fills every matrix of this model; use mxq, which gives each "
            "matrix a configuration that fits."
        )
    for base in bases:
        problem.check_allowed(uniform_start(problem, base))
    return planner.frontier(problem, request, bases)


@dataclass(frozen=True, eq=False)
class _Chosen:
    """Stops (n,), the base they start from, what ranked each moved matrix, and plain words."""

    stops: np.ndarray
    base: str | None = None
    reasons: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    objective: float | None = None
    lower_bound: float | None = None


def _look_up(
    planner: Planner,
    problem: Problem,
    frontier: Frontier,
    request: PlanRequest,
    budget: Budget | None,
) -> _Chosen:
    """The frontier's plan for a budget, or all of a fixed base's moves."""
    limit = budget.nominal_bytes if budget else np.inf
    if budget is not None:
        frontier.check_reaches(budget, problem)
    answer = frontier.at(limit)
    if not planner.has_base:
        if request.exact:
            return _exactly(frontier, limit)
        return _Chosen(
            answer.choice,
            notes=frontier.notes,
            objective=answer.objective,
            lower_bound=answer.lower_bound,
        )
    moves = answer.segment.moves[: answer.taken]
    start = answer.segment.start
    free = np.flatnonzero((problem.low < start) | (start < problem.high))
    base = problem.options[start[free[0]]].stop_name if len(free) else request.base
    return _Chosen(
        answer.choice,
        request.base if request.base else base,
        {problem.matrices[move.matrix].name: move.worth for move in moves},
        _notes(planner, problem, answer.segment, len(moves), budget),
    )


def _exactly(frontier: Frontier, limit: float) -> _Chosen:
    exact = solve_exactly(frontier, limit)
    notes = frontier.notes
    if exact.reason:
        notes += (f"Not proven optimal: {exact.reason}.",)
    return _Chosen(
        exact.choice, notes=notes, objective=exact.objective, lower_bound=exact.lower_bound
    )


def _notes(
    planner: Planner, problem: Problem, segment: Segment, taken: int, budget: Budget | None
) -> tuple[str, ...]:
    """Plain words about what a boost could not do, and what of the budget it leaves."""
    if not planner.metrics:
        return ()
    shallow = shallowness(1 + max(m.layer for m in problem.matrices))
    notes = [shallow] if shallow else []
    if not segment.moves:
        notes.append(f"{planner.title} boosts no layer here, so this is the uniform plan.")
    elif not taken:
        notes.append("The budget leaves no room for a boost: this is the uniform plan.")
    elif budget is not None and taken == len(segment.moves):
        left = budget.nominal_bytes - segment.moves[-1].bytes_after
        notes.append(
            f"{8 * left / problem.total:.3f} bpp of the budget stay unspent: "
            f"{planner.title} has nothing more to raise from this base."
        )
    return tuple(notes)


def _price_of_pins(
    problem: Problem, request: PlanRequest, chosen: _Chosen, frontier: Frontier
) -> tuple[str, ...]:
    """What the pins cost: bytes where they were added to a base, else cost at the same budget."""
    if not request.pins:
        return ()
    try:
        free = make_frontier(problem, request)
    except LsqError:
        return ("Without the pins this method has no plan.",)
    budget = request.budget_for(problem)
    limit = budget.nominal_bytes if budget else np.inf
    if not free.reaches(limit):
        return ("Without the pins no plan from this base is within the budget.",)
    answer = free.at(limit)
    if frontier.cost is None and frontier.losses is None:
        more = 8 * (problem.nominal(chosen.stops) - problem.nominal(answer.choice)) / problem.total
        return (f"The pins change the plan by {more:+.4f} bpp.",)
    without = answer.objective
    if without is None or chosen.objective is None:
        return ()
    share = 100 * (chosen.objective / without - 1) if without else 0.0
    return (f"The pins cost {share:+.2f} % of what the method minimises, at the same budget.",)


__all__ = [
    "PLANNERS",
    "Plan",
    "PlanRequest",
    "Planner",
    "Problem",
    "get_planner",
    "make_frontier",
    "make_plan",
]
