"""Compare every method's plan within one budget: predicted and measured figures.

Nothing is measured for this: methods whose metrics the profile lacks are left out with a reason.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from lsq_core.bits import LADDER, PAPER
from lsq_core.errors import InputError, LsqError
from lsq_core.evaluation.prediction import (
    BEST_METRIC,
    Predictor,
    TooFewRuns,
    features,
    is_apart,
    largest_comparable_group,
)
from lsq_core.planning.constraints import restrict
from lsq_core.planning.frontier import Frontier
from lsq_core.planning.limit import OutOfReach, nominal_limit
from lsq_core.planning.make import make_frontier
from lsq_core.planning.methods import PLANNERS, get_planner, mixes_rows
from lsq_core.planning.problem import Problem
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.metrics import METRICS
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.results.gains import EQUAL_SIZE, is_ablation
from lsq_core.stages.model import OpenModel
from lsq_core.stages.plan import build_problem, missing_metrics
from lsq_core.stages.predict import fit_predictor
from lsq_core.stages.profile import find_planning_profile

if TYPE_CHECKING:
    import pandas as pd

#: Range of the ratio of measured KL divergence to the expected sum (SmolLM2's 27 shipped plans
#: within three times full precision's perplexity; README, *Predicted perplexity*).
_KL_SPREAD = (0.59, 1.35)


_MIXED_ROWS = "no prediction for rows with different bits"
_REFINED = "searched for by measuring"


@dataclass(frozen=True)
class ComparableRun:
    """A run's perplexity; ``same_plan`` is whether it has the plan it is compared with."""

    run: str
    perplexity: float
    bits_per_param: float
    same_plan: bool


@dataclass(frozen=True)
class RankedMethod:
    """The size of a method's plan within a budget, and its expected and measured loss.

    ``expected_kl`` is the sum over all matrices, in nats per token, or None if the profile lacks
    it. ``predicted`` is a perplexity with its band: middle, low, high.
    """

    method: str
    bits_per_param: float
    planned_bytes: int
    expected_kl: float | None = None
    predicted: tuple[float, float, float] | None = None
    measured: ComparableRun | None = None

    @property
    def title(self) -> str:
        """The method's title."""
        return get_planner(self.method).title

    @property
    def cost(self) -> float:
        """The value it is ranked by: predicted perplexity, else expected KL, else infinity."""
        known = self.predicted[0] if self.predicted else self.expected_kl
        return math.inf if known is None or math.isnan(known) else known

    def is_clearly_better(self, other: RankedMethod) -> bool:
        """Return whether the two bands don't overlap and this one is lower."""
        if self.predicted and other.predicted:
            return is_apart(self.predicted, other.predicted) and self.cost < other.cost
        low, high = _KL_SPREAD
        return high * self.cost < low * other.cost and math.isfinite(other.cost)


@dataclass(frozen=True)
class MethodRanking:
    """The methods, best first; ``left_out`` gives the reason for each method without a plan.

    ``basis`` is the quantity they are ranked by: ``perplexity``, ``expected_kl`` or ''. ``reason``
    explains why no perplexity is predicted.
    """

    methods: tuple[RankedMethod, ...]
    left_out: Mapping[str, str]
    basis: str
    reason: str = ""

    def leader_over(self, method: str) -> RankedMethod | None:
        """Return the best other method, ablations excluded, if it is clearly better, else None."""
        own = next((each for each in self.methods if each.method == method), None)
        others = [m for m in self.methods if not is_ablation(m.method) and m.method != method]
        if own is None or not others or not self.basis:
            return None
        return others[0] if others[0].is_clearly_better(own) else None

    def to_json(self) -> dict:
        """Return the ranking as printed by the command line with ``--json``."""
        rows = [
            {
                "method": each.method,
                "bits_per_param": each.bits_per_param,
                "planned_bytes": each.planned_bytes,
                "expected_kl": each.expected_kl,
                "predicted": each.predicted
                and dict(zip(("perplexity", "low", "high"), each.predicted, strict=True)),
                "measured": each.measured and vars(each.measured),
            }
            for each in self.methods
        ]
        return {
            "methods": rows,
            "left_out": dict(self.left_out),
            "basis": self.basis,
            "reason": self.reason,
        }


def requests_within(request: PlanRequest) -> list[PlanRequest]:
    """Return the request for every method that plans from a profile alone."""
    requests = []
    for name, planner in PLANNERS.items():
        if mixes_rows(name) or planner.reads_refinement:
            continue
        base = request.base if planner.has_base else None
        requests.append(replace(request, method=name, base=base, exact=False))
    return requests


def rank_methods(
    problem: Problem,
    requests: Sequence[PlanRequest],
    metadata: str,
    predictor: Predictor | str,
    runs: Mapping[str, tuple[pd.Series, dict[str, str]]],
    frontier_of: Callable[[PlanRequest], Frontier],
) -> MethodRanking:
    """Rank the plans of requests, each with its own method and a budget.

    Parameters
    ----------
    problem
        The unrestricted problem with a profile's scores.
    predictor
        A predictor fitted to the runs so far, or the reason why there is none.
    runs
        The comparable runs with their configurations (:func:`measured_runs`).
    frontier_of
        Returns a request's frontier; raises :class:`LsqError` if the method has none here.
    """
    ranked = []
    left_out = {name: _MIXED_ROWS for name in PLANNERS if mixes_rows(name)}
    left_out |= {name: _REFINED for name, own in PLANNERS.items() if own.reads_refinement}
    for request in requests:
        missing = missing_metrics(problem, request)
        if missing:
            names = " and ".join(METRICS[name].label for name in missing)
            left_out[request.method] = f"needs {names}, which the profile lacks"
            continue
        try:
            restricted = restrict(problem, request)
            budget = request.resolve_budget(restricted, metadata)
            frontier = frontier_of(request)
            limit = nominal_limit(frontier, restricted, budget, metadata)
        except OutOfReach:
            least = 8 * frontier.smallest / problem.total
            left_out[request.method] = f"needs at least {least:.2f} bits"
            continue
        except LsqError as error:
            left_out[request.method] = str(error)
            continue
        choice = frontier.at(limit).choice
        bits = 8 * problem.nominal(choice) / problem.total
        ranked.append(
            RankedMethod(
                request.method,
                bits,
                problem.planned_total(choice, metadata),
                _expected_kl(problem, choice),
                _predict(problem, choice, predictor),
                _find_run(problem, request, choice, bits, runs),
            )
        )
    has_kl = any(each.expected_kl is not None for each in ranked)
    basis = "perplexity" if isinstance(predictor, Predictor) else "expected_kl" if has_kl else ""
    ranked.sort(key=lambda each: each.cost)
    reason = predictor if isinstance(predictor, str) else ""
    return MethodRanking(tuple(ranked), left_out, basis, reason)


def _expected_kl(problem: Problem, choice: np.ndarray) -> float | None:
    table = problem.by_config.get(BEST_METRIC)
    return None if table is None else float(np.nansum(table[np.arange(len(choice)), choice]))


def _predict(
    problem: Problem, choice: np.ndarray, predictor: Predictor | str
) -> tuple[float, float, float] | None:
    if isinstance(predictor, str):
        return None
    return predictor.predict(features(problem, choice[None])).band(0)


def measured_runs(
    runs: pd.DataFrame,
    configs: Mapping[str, dict[str, str]],
    settings: ProfileSettings,
    corpus: str | None,
    protocol: str | None = None,
) -> dict[str, tuple[pd.Series, dict[str, str]]]:
    """Return a model's comparable runs, newest first, each with its configurations.

    They have the profile's quantizer, axis and metadata, and the same text and protocol: if several
    match, those with the most runs. ``runs`` are from
    :meth:`lsq_core.store.store.Store.results`, ``configs`` from ``run_configs``.
    """
    same = (runs["quantizer"] == settings.quantizer) & (runs["axis"] == settings.axis)
    same &= (runs["metadata"] == settings.metadata) & runs["run"].isin(configs)
    try:
        group = largest_comparable_group(runs[same & runs["perplexity"].notna()], corpus, protocol)
    except TooFewRuns:
        return {}
    return {row["run"]: (row, configs[row["run"]]) for _, row in group.iterrows()}


def _find_run(
    problem: Problem,
    request: PlanRequest,
    choice: np.ndarray,
    bits: float,
    runs: Mapping[str, tuple[pd.Series, dict[str, str]]],
) -> ComparableRun | None:
    """Return the run of this plan, else the closest of about equal size by the same method.

    The latter must have the same pins, ties and server, without which plans are not comparable.
    """
    names = {m.name: LADDER[stop].name for m, stop in zip(problem.matrices, choice, strict=True)}
    near: list[tuple[float, ComparableRun]] = []
    for run, (row, configs) in runs.items():
        run_bits = float(row["bits_per_param"])
        if abs(run_bits - bits) < 1e-6 and configs == names:
            return ComparableRun(run, float(row["perplexity"]), run_bits, same_plan=True)
        away = abs(run_bits / bits - 1)
        if away <= EQUAL_SIZE and _is_alike(row, request):
            near.append((away, ComparableRun(run, float(row["perplexity"]), run_bits, False)))
    return min(near, key=lambda pair: pair[0])[1] if near else None


def _is_alike(run: pd.Series, request: PlanRequest) -> bool:
    """Return whether a run's plan was requested with the same method and restrictions."""
    asked = json.loads(run["request"]) if isinstance(run["request"], str) else {}
    same = all(tuple(asked.get(name) or ()) == getattr(request, name) for name in ("pins", "ties"))
    return same and run["method"] == request.method and asked.get("serve") == request.serve


def rank_model_methods(
    model: OpenModel,
    request: PlanRequest,
    settings: ProfileSettings,
    corpus: str | None = None,
    protocol: str | None = None,
) -> MethodRanking:
    """Rank every method within a request's budget, from the stored profile and runs.

    Raises
    ------
    InputError
        If there is no budget or no profile, or the budget is out of reach.
    """
    if request.budget is None:
        raise InputError("Give a budget, such as 3.2bpp or 50MiB, to rank the methods within it.")
    profile = find_planning_profile(model, settings)
    if profile is None:
        raise InputError(
            "Ranking needs a profile of the model, and there is none with these settings yet; "
            "measure one with lsq profile."
        )
    problem = build_problem(model.info, profile).with_options(LADDER)  # all methods have it
    request = replace(request, ladder=PAPER)
    request.resolve_budget(restrict(problem, request), settings.metadata)
    try:
        predictor: Predictor | str = fit_predictor(model, problem, settings, corpus, protocol)
    except InputError as error:
        predictor = str(error)
    if isinstance(predictor, Predictor):
        corpus, protocol = predictor.points.corpus, predictor.points.protocol
    store, fingerprint = model.store, model.info.fingerprint
    runs = measured_runs(
        store.results(fingerprint, origin=None),
        store.run_configs(fingerprint),
        settings,
        corpus,
        protocol,
    )

    def frontier_of(one: PlanRequest) -> Frontier:
        return make_frontier(restrict(problem, one), one)

    return rank_methods(
        problem, requests_within(request), settings.metadata, predictor, runs, frontier_of
    )
