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

#: Losses for measuring high-impact ratios: on the block's own output or on the model's.
LOSSES = ("block", "model")
#: Metrics that SensiBoost can use: sensitivity by part or by module.
SENSITIVITIES = ("sensitivity", "sensitivity_module")
#: How ratios are chosen: one for all matrices, per matrix, or jointly for the matrices of a block.
RATIO_MODES = ("uniform", "diagonal", "full")
#: The method whose plan is refined if a request names none.
DEFAULT_START = "kl-aware"
#: Fields that hold any number of strings.
_TEXTS = ("pins", "ties")
#: Descriptions of the other fields' types for error messages.
_KINDS = {str: "text", int: "a whole number", bool: "true or false"}
#: Fields that are written to JSON only if they differ from these defaults, because earlier versions
#: don't know them.
_OPTIONAL = {"ties": (), "serve": None, "start": None, "ladder": PAPER}


@dataclass(frozen=True)
class PlanRequest:
    """A method, and a base configuration, a budget, or both.

    ``boost_stop`` is the number of options by which a boost raises a matrix, and a ``top_m`` of 0
    promotes every outlier. ``metric`` is used by SensiBoost and its variants, ``seed`` by the
    ablations, and ``exact`` solves a knapsack to the optimum. ``pins`` are parsed by
    :class:`lsq_core.planning.pins.Pin`. The six fields from ``low_bits`` to ``clip`` are documented
    in :class:`lsq_core.planning.methods.high_impact.HighImpact`. ``ties`` are modules that share a
    configuration (:class:`lsq_core.planning.ties.Tie`). ``serve`` is the server that the plan is
    for (:data:`lsq_core.planning.servers.SERVERS`), which may tie modules too. ``start`` is the
    method whose plan is refined, None for the default (:attr:`refined_from`). ``ladder`` names the
    set of configurations to choose from (:data:`lsq_core.bits.LADDERS`). Each method declares the
    fields that it uses (:attr:`lsq_core.planning.methods.base.Planner.fields`).
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
        for name in _TEXTS:  # JSON has lists
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
        """Raise :class:`InputError` for a field of the wrong type, which a file may contain."""
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
            If the method is missing, a field is unknown or a value is invalid.
        """
        unknown = sorted(set(content) - {each.name for each in fields(cls)})
        if unknown:
            raise InputError(f"A request has no field '{unknown[0]}'; remove it.")
        if "method" not in content:
            raise InputError("The plan's request has no method.")
        return cls(**content)

    def to_json(self) -> dict[str, Any]:
        """Return the request as JSON for :meth:`from_json`.

        Ties, server, start and ladder are omitted if they have their default values.
        """
        content = asdict(self)
        return {k: v for k, v in content.items() if k not in _OPTIONAL or v != _OPTIONAL[k]}

    @property
    def has_ties(self) -> bool:
        """Whether the request has ties or a server, either of which may tie modules."""
        return bool(self.ties) or self.serve is not None

    def without_ties(self) -> PlanRequest:
        """Return the request without its ties and server."""
        return replace(self, ties=(), serve=None)

    @property
    def refined_from(self) -> str:
        """The method whose plan a refinement starts from."""
        return self.start or DEFAULT_START

    @property
    def ties_name(self) -> str:
        """The server constraints and ties that bind modules, in words."""
        server = [f"the constraints of {get_server(self.serve).title}"] if self.serve else []
        return " and ".join([*server, *["the ties"] * bool(self.ties)])

    @property
    def restrictions(self) -> str:
        """The restrictions on plans, in words: ``with these pins``; empty without any."""
        ties = ["ties"] * bool(self.ties) + ["pins"] * bool(self.pins)
        served = [f"for {get_server(self.serve).title}"] if self.serve else []
        return " ".join([*served, *([f"with these {' and '.join(ties)}"] if ties else [])])

    def parse_budget(self, numel: int) -> Budget | None:
        """Return the budget for ``numel`` weights, or None if the request has none.

        A budget may name a configuration of the request's ladder.

        Raises
        ------
        InputError
            If the text is not a budget.
        """
        if self.budget is None:
            return None
        return Budget.parse(self.budget, numel, get_ladder(self.ladder))

    def resolve_budget(self, problem: Problem, metadata: str = "8bit") -> Budget | None:
        """Return the budget, checked against the range of possible plan sizes.

        ``metadata`` affects the planned bytes, which a budget in bytes bounds.

        Raises
        ------
        InputError
            If the text is not a budget, or the budget is outside that range.
        """
        budget = self.parse_budget(problem.total)
        if budget is None:
            return None
        if budget.planned_bytes is None:
            smallest, largest = problem.feasible
            # The largest plan is named 8.51 but has 8.508 bits; its name must be accepted.
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
                f"A budget of {self.budget} is out of reach: plans for this model{under} range "
                f"from {ends[0]} to {ends[1]}; {remedy} a budget between them."
            )
        return budget
