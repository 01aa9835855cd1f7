"""Planners: which matrix gets which configuration. Nothing here imports torch.

A new planner is one file beside these and one entry in ``PLANNERS``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np

from lsq_core.config import (
    LADDER,
    Budget,
    QuantConfig,
    fp16_metadata_bytes,
    nominal_bytes,
    planned_bytes,
    stop_index,
    weight_only_bytes,
)
from lsq_core.errors import InputError
from lsq_core.model import Matrix
from lsq_core.plan.boost import KurtBoost, KurtBoostAblation, SensiBoost, SensiBoostAblation
from lsq_core.plan.frontier import Frontier, Segment
from lsq_core.plan.mxq import Mxq
from lsq_core.plan.outliers import shallowness
from lsq_core.plan.problem import TOLERANCE, PlanRequest, Problem
from lsq_core.plan.uniform import Uniform, usable_bases


class Planner(Protocol):
    """One file a planner, one entry in ``PLANNERS``.

    A planner with a base answers every budget by a frontier; one without chooses for one budget.
    """

    name: str
    title: str
    #: What the profile must hold: names of ``lsq_core.profile.METRICS``.
    metrics: tuple[str, ...]
    #: Whether it starts from a base stop (and answers ``frontier``), or else ``choose``.
    has_base: bool

    def frontier(self, problem: Problem, request: PlanRequest, bases: list[int]) -> Frontier:
        """Every budget's plan, from each of the given base stops."""
        ...

    def choose(self, problem: Problem, request: PlanRequest, budget: float) -> np.ndarray:
        """The stops (n,) within a budget in nominal bytes."""
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
    configs: tuple[QuantConfig, ...]
    metadata: str = "8bit"
    axis: int = 1
    base: str | None = None
    reasons: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    #: Bytes of what plans don't touch, in the checkpoint's dtype.
    other_bytes: int = 0

    @property
    def method(self) -> str:
        """The planner's name."""
        return self.request.method

    @property
    def choice(self) -> dict[Matrix, QuantConfig]:
        """The configuration of each matrix."""
        return dict(zip(self.matrices, self.configs, strict=True))

    def _total(self, account: object) -> float:
        return sum(account(m.numel, c) for m, c in self.choice.items())

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
        return 8 * self._total(weight_only_bytes) / self.parameters

    @cached_property
    def bits_with_fp16_metadata(self) -> float:
        """Bits per planned parameter if scale and zero stayed fp16."""
        return 8 * self._total(fp16_metadata_bytes) / self.parameters

    @cached_property
    def planned_bytes(self) -> int:
        """What our packing of the linear weights occupies, exactly."""
        return int(self._total(lambda numel, c: planned_bytes(numel, c, self.metadata)))

    @property
    def model_bytes(self) -> int:
        """The whole model: planned bytes, and the rest in the checkpoint's dtype."""
        return self.planned_bytes + self.other_bytes

    @property
    def modules(self) -> dict[str, dict]:
        """Full module name to its configuration, as the command line prints it."""
        return {
            m.name: {
                "bits": c.bits,
                "group_size": c.group_size,
                "config": c.name,
                "layer": m.layer,
                "type": m.type,
            }
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
            "flagged": self.reasons,
            "notes": list(self.notes),
        }

    def to_json(self) -> dict:
        """Everything needed to apply the plan again; :meth:`from_json` reads it."""
        return self.summary() | {"request": asdict(self.request), "modules": self.modules}

    @classmethod
    def from_json(cls, content: dict, matrices: tuple[Matrix, ...], other_bytes: int) -> Plan:
        """A saved plan for the model that these matrices belong to.

        Raises
        ------
        InputError
            When the plan and the model don't name the same modules, or it is not a plan.
        """
        try:
            modules, request = content["modules"], PlanRequest(**content["request"])
            metadata, axis = content["metadata"], content["axis"]
            configs = {
                n: QuantConfig.parse(f"b{e['bits']}g{e['group_size']}") for n, e in modules.items()
            }
        except (KeyError, TypeError) as error:
            raise InputError(
                f"This is not a plan that LSQ Explorer wrote: {error} is missing."
            ) from error
        different = {m.name for m in matrices} ^ set(modules)
        if different:
            raise InputError(
                f"The plan is for another model: {min(different)} is in only one of the two."
            )
        return cls(
            request=request,
            matrices=matrices,
            configs=tuple(configs[m.name] for m in matrices),
            metadata=metadata,
            axis=axis,
            base=content.get("base"),
            reasons=content.get("flagged", {}),
            notes=tuple(content.get("notes", ())),
            other_bytes=other_bytes,
        )


def make_plan(
    problem: Problem,
    request: PlanRequest,
    *,
    metadata: str = "8bit",
    axis: int = 1,
    other_bytes: int = 0,
) -> Plan:
    """The plan that a method makes for a base stop, a budget, or a base capped by a budget.

    Raises
    ------
    InputError
        When the method is unknown, neither base nor budget is given, the budget is out of reach,
        or the base's groups don't fill a matrix.
    """
    planner = get_planner(request.method)
    budget = request.budget_for(problem)
    if budget is None and request.base is None:
        raise InputError("Give a base stop (such as 3.13), a budget (such as 3.2bpp), or both.")
    if planner.has_base:
        chosen = _along_frontier(planner, problem, request, budget)
    elif request.base is not None:
        raise InputError(f"{planner.title} takes a budget (such as 3.2bpp), not a base.")
    else:
        chosen = _Chosen(planner.choose(problem, request, budget.nominal_bytes))
    problem.check_allowed(chosen.stops)
    return Plan(
        request=request,
        matrices=problem.matrices,
        configs=tuple(LADDER[stop] for stop in chosen.stops),
        metadata=metadata,
        axis=axis,
        base=chosen.base,
        reasons=chosen.reasons,
        notes=chosen.notes,
        other_bytes=other_bytes,
    )


@dataclass(frozen=True, eq=False)
class _Chosen:
    """Stops (n,), the base they start from, what ranked each moved matrix, and plain words."""

    stops: np.ndarray
    base: str | None = None
    reasons: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def _along_frontier(
    planner: Planner, problem: Problem, request: PlanRequest, budget: Budget | None
) -> _Chosen:
    """Look a budget, or all of a fixed base's moves, up on the planner's frontier."""
    bases = [stop_index(request.base)] if request.base else usable_bases(problem)
    if not bases:
        raise InputError(
            "No single group size fills every matrix of this model; use mxq, which gives each "
            "matrix a configuration that fits."
        )
    for base in bases:
        problem.check_allowed(np.full(len(problem.matrices), base))
    frontier = planner.frontier(problem, request, bases)
    if budget is None:
        segment = frontier.segments[-1]
        stops, taken = segment.at(np.inf)
    else:
        if budget.nominal_bytes * (1 + TOLERANCE) < frontier.smallest:
            raise InputError(
                f"A budget of {budget.text} does not reach the base: uniform "
                f"{LADDER[bases[0]].stop_name} takes {problem.in_words(frontier.smallest)}."
            )
        segment = frontier.segment_for(budget.nominal_bytes)
        stops, taken = segment.at(budget.nominal_bytes)
    return _Chosen(
        stops,
        LADDER[segment.start[0]].stop_name,
        {problem.matrices[move.matrix].name: move.worth for move in taken},
        _notes(planner, problem, segment, len(taken), budget),
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


__all__ = [
    "PLANNERS",
    "Plan",
    "PlanRequest",
    "Planner",
    "Problem",
    "get_planner",
    "make_plan",
]
