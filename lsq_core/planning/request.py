"""The request for a plan."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from lsq_core.bits import PAPER, Budget, get_ladder, mixed_rows
from lsq_core.errors import InputError
from lsq_core.planning.problem import TOLERANCE, Problem
from lsq_core.planning.servers import get_server
from lsq_core.units import format_bytes

#: Losses that high-impact ratios are measured by: on the block's own output, or on the model's.
LOSSES = ("block", "model")
#: Metrics that SensiBoost can read: the sensitivity by part, or by module.
SENSITIVITIES = ("sensitivity", "sensitivity_module")
#: How ratios are chosen: one for all, per matrix, or jointly for the matrices of a block.
RATIO_MODES = ("uniform", "diagonal", "full")
#: The method whose plan is refined where a request names none.
DEFAULT_START = "kl-aware"
#: Fields that hold any number of texts.
_TEXTS = ("pins", "ties")
#: What the values of the other fields are, in words.
_KINDS = {str: "text", int: "a whole number", bool: "true or false"}
#: Fields that a request's JSON has only where they differ from these; earlier versions know none.
_OPTIONAL = {"ties": (), "serve": None, "start": None, "ladder": PAPER}


@dataclass(frozen=True)
class PlanRequest:
    """A method, and a base configuration, a budget, or both.

    ``top_m`` 0 promotes every outlier; ``metric`` is the one that SensiBoost and its variants read;
    ``seed`` is that of the ablations; ``exact`` solves a knapsack to the optimum; ``pins`` are
    parsed by :class:`lsq_core.planning.pins.Pin`. The six fields from ``low_bits`` on are
    documented in :class:`lsq_core.planning.methods.high_impact.HighImpact`. ``ties`` are modules
    that share a configuration (:class:`lsq_core.planning.ties.Tie`); ``serve`` is the server that
    the plan is for (:data:`lsq_core.planning.servers.SERVERS`), which ties modules too; ``start``
    is the method whose plan is refined, None for the usual one (:attr:`refined_from`). ``ladder``
    names the configurations that are chosen from (:data:`lsq_core.bits.LADDERS`). Each method
    declares the fields that it reads (:attr:`lsq_core.planning.methods.base.Planner.fields`).
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
    ties: tuple[str, ...] = ()
    serve: str | None = None
    start: str | None = None
    ladder: str = PAPER

    def __post_init__(self) -> None:
        self._check_types()
        for name in _TEXTS:  # JSON gives lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.serve is not None:
            get_server(self.serve)
        get_ladder(self.ladder)
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
            if each.name in _TEXTS:
                wanted = "a list of texts"
                is_valid = isinstance(value, list | tuple) and all(
                    isinstance(p, str) for p in value
                )
            elif each.default is None:
                wanted = "text" if each.name != "budget" else "text such as '3.2bpp'"
                is_valid = value is None or isinstance(value, str)
            else:
                kind = str if each.name == "method" else kind
                wanted = _KINDS[kind]
                is_valid = type(value) is kind
            if not is_valid:
                raise InputError(
                    f"A request's {each.name} has to be {wanted}, not {reprlib.repr(value)}."
                )

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

    def to_json(self) -> dict[str, Any]:
        """Return what :meth:`from_json` reads; ties, server and ladder only where given."""
        content = asdict(self)
        return {k: v for k, v in content.items() if k not in _OPTIONAL or v != _OPTIONAL[k]}

    @property
    def has_ties(self) -> bool:
        """Whether modules have to share configurations, by ties or for a server."""
        return bool(self.ties) or self.serve is not None

    def without_ties(self) -> PlanRequest:
        """Return the request for a plan that is free of ties and server."""
        return replace(self, ties=(), serve=None)

    @property
    def refined_from(self) -> str:
        """The method whose plan a refinement starts from."""
        return self.start or DEFAULT_START

    @property
    def ties_name(self) -> str:
        """What ties modules, in words."""
        server = [f"the constraints of {get_server(self.serve).title}"] if self.serve else []
        return " and ".join([*server, *["the ties"] * bool(self.ties)])

    @property
    def restrictions(self) -> str:
        """What plans are restricted by, in words: ``with these pins``; empty if by nothing."""
        ties = ["ties"] * bool(self.ties) + ["pins"] * bool(self.pins)
        served = [f"for {get_server(self.serve).title}"] if self.serve else []
        return " ".join([*served, *([f"with these {' and '.join(ties)}"] if ties else [])])

    def parse_budget(self, numel: int) -> Budget | None:
        """Return the budget for ``numel`` weights, None without one; its stops are the ladder's.

        Raises
        ------
        InputError
            When it is not a budget.
        """
        if self.budget is None:
            return None
        return Budget.parse(self.budget, numel, get_ladder(self.ladder))

    def resolve_budget(self, problem: Problem, metadata: str = "8bit") -> Budget | None:
        """Return the budget, checked against the sizes that plans can have.

        ``metadata`` decides the planned bytes, which a budget in bytes bounds.

        Raises
        ------
        InputError
            When it is not a budget, or no plan is as small or as large.
        """
        budget = self.parse_budget(problem.total)
        if budget is None:
            return None
        if budget.planned_bytes is None:
            smallest, largest = problem.feasible
            # The largest plan is called 8.51 and has 8.508 bits: its name must not be out of reach.
            within = smallest * (1 - TOLERANCE) <= budget.nominal_bytes <= largest * 1.001
            ends = [problem.format_size(size) for size in (smallest, largest)]
        else:
            smallest, largest = problem.feasible_planned(metadata)
            within = smallest <= budget.planned_bytes <= largest * 1.001
            ends = [f"{format_bytes(size)} planned" for size in (smallest, largest)]
        if not within:
            under = f" {self.restrictions}" if self.restrictions else ""
            remedy = "drop a pin, or choose" if self.pins else "choose"
            raise InputError(
                f"A budget of {self.budget} is out of reach: plans for this model{under} take from "
                f"{ends[0]} to {ends[1]}; {remedy} a budget between them."
            )
        return budget
