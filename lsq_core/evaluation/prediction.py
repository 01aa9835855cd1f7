"""Predict the perplexity of any plan, with a band, from the runs measured so far, without torch.

The cost of a plan is its log-perplexity above full precision. If a profile has the expected KL
divergence, its sum over the matrices at their configurations is close to this cost. Otherwise two
proxies are used: the plan's summed sensitivity and its summed squared weight error. By the
linearity theorem ([E]) the cost is proportional to such a sum while it is small, so in logarithms
the prediction starts as a line of slope one, shared equally by the proxies, with an intercept
fitted to the runs. A Gaussian process (kriging; Rasmussen & Williams, *Gaussian Processes for
Machine Learning*, 2006, ch. 2 and 5) then corrects the line towards the runs: strongly where they
are dense and agree, hardly where there are none, and the band widens accordingly. Four runs are
enough to start with, and unlike in a polynomial fit, distant runs don't distort the line locally.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from lsq_core.bits import DETECTION_CONFIG, QuantConfig
from lsq_core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from lsq_core.planning.frontier import Frontier
    from lsq_core.planning.problem import Problem
    from lsq_core.store.store import Store

#: The fewest different plans that a prediction needs.
MIN_PLANS = 4
#: Nominal coverage of the band.
CONFIDENCE = 0.90
#: The metric used as the only feature if a profile has it, and those used otherwise.
BEST_METRIC = "expected_kl"
METRICS = ("sensitivity", "weight_error")

#: Smallest feature value, so that logarithms are finite.
_TINY = 1e-12
#: Prior variance of the slopes, relative to the process variance.
_SLOPE_VARIANCE = 0.25
#: Log-normal priors (median, standard deviation of the logarithm) of the length scale in log
#: features (3 and 4 bits are about 2 apart) and of the noise variance relative to the process's.
_LENGTH_PRIOR = (2.0, 0.7)
_NOISE_PRIOR = (0.02, 2.0)
#: Added to the process variance, so that runs that agree exactly don't make it zero.
_MIN_VARIANCE = 1e-9
#: Costs are clipped to this range, in nats. Less than 0.1 % is within the noise of an evaluation;
#: more than 16 is worse than guessing uniformly from any vocabulary.
_MIN_COST, _MAX_COST = 1e-3, 16.0


class TooFewRuns(InputError):
    """There are too few runs to predict from; the message gives their number and the minimum."""


# --- features -------------------------------------------------------------------------------


def feature_tables(problem: Problem) -> np.ndarray:
    """Return each matrix's contributions to the features, (n, options, features).

    The features are the expected KL divergence if available, else sensitivity and squared weight
    error. Sensitivity not measured at a configuration is that at b4g64, scaled by the ratio of
    squared weight errors. Experts that no calibration token reached have no sensitivity and
    contribute zero.

    Raises
    ------
    InputError
        If the profile has neither the expected KL divergence nor both of the other two.
    """
    if BEST_METRIC in problem.by_config:
        return np.nan_to_num(problem.by_config[BEST_METRIC])[..., None]
    missing = [m.replace("_", " ") for m in METRICS if m not in problem.by_config]
    if missing:
        raise InputError(
            f"The profile has no {' and no '.join(missing)}, so perplexity cannot be predicted "
            "from it; choose another calibration text."
        )
    error = problem.by_config["weight_error"] ** 2
    known = problem.by_config["sensitivity"]
    reference = problem.options.index(DETECTION_CONFIG)
    scaled = known[:, [reference]] * error / error[:, [reference]]
    sensitivity = np.where(np.isnan(known), scaled, known)
    return np.stack([np.nan_to_num(sensitivity), error], axis=2)


def features(problem: Problem, choices: np.ndarray) -> np.ndarray:
    """Return the logarithms of plans' features, each summed over the matrices, (k, features).

    ``choices`` (k, n) holds indices into the problem's options, one row per plan.
    """
    tables = feature_tables(problem)
    rows = np.arange(len(tables))
    sums = [tables[rows, choices, i].sum(axis=1) for i in range(tables.shape[2])]
    return np.log(np.maximum(np.stack(sums, axis=1), _TINY))


def _expected_log_cost(x: np.ndarray) -> np.ndarray:
    """Return the log cost (k,) that the linearity theorem expects, up to a constant."""
    return x.mean(axis=1)


# --- measured runs --------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class MeasuredPoints:
    """Runs of one model on one corpus by one protocol, newest first.

    ``features`` is (n, features); ``perplexity`` and ``full_precision`` (the perplexity of the
    unquantized model in the run's dtype) are (n,). ``eight_bit`` (n,) marks plans with 8 bits
    everywhere, whose cost comes from rounding of scale and zero point and of the evaluation, which
    the features don't capture.
    """

    features: np.ndarray
    perplexity: np.ndarray
    full_precision: np.ndarray
    eight_bit: np.ndarray
    corpus: str = ""
    protocol: str = ""
    tokens: int | None = None
    #: Identities of the runs' evaluations.
    evaluations: tuple[str, ...] = ()

    @cached_property
    def cost(self) -> np.ndarray:
        """Log-perplexity above full precision, nats, (n,)."""
        return np.log(self.perplexity / self.full_precision)


def load_measured_points(
    store: Store,
    fingerprint: str,
    problem: Problem,
    *,
    quantizer: str,
    axis: int,
    metadata: str,
    corpus: str | None = None,
    protocol: str | None = None,
) -> MeasuredPoints:
    """Return the runs of a model that predictions can be fitted to.

    These have the same quantizer, grouping axis and metadata, a known plan whose configurations
    are all options of the problem, and the same text, protocol and token count. If several
    evaluations match ``corpus`` and ``protocol`` (None matches any), the one with the most runs is
    used. ``protocol`` may be a short name: ``strided`` for ``strided-512/256``.

    Raises
    ------
    TooFewRuns
        If there are none.
    InputError
        If the problem lacks the metrics that the features need.
    """
    runs = store.results(fingerprint, origin=None)
    configs = store.run_configs(fingerprint)
    same = (runs["quantizer"] == quantizer) & (runs["axis"] == axis)
    same &= (runs["metadata"] == metadata) & runs["run"].isin(configs)
    stops = {config.name: i for i, config in enumerate(problem.options)}
    on_ladder = {run for run, plan in configs.items() if stops.keys() >= set(plan.values())}
    same &= runs["run"].isin(on_ladder)
    runs = largest_comparable_group(runs[same & runs["perplexity_full"].notna()], corpus, protocol)
    plans = [configs[run] for run in runs["run"]]
    choices = np.array([[stops[plan[m.name]] for m in problem.matrices] for plan in plans])
    first = runs.iloc[0]
    return MeasuredPoints(
        features(problem, choices),
        runs["perplexity"].to_numpy(float),
        runs["perplexity_full"].to_numpy(float),
        (choices >= stops[QuantConfig(8, 128).name]).all(axis=1),
        corpus=first["corpus"],
        protocol=first["protocol"],
        tokens=next(map(int, runs["tokens"].dropna()), None),  # unknown for published runs
        evaluations=tuple(runs["evaluation"]),
    )


def largest_comparable_group(
    runs: pd.DataFrame, corpus: str | None, protocol: str | None
) -> pd.DataFrame:
    """Return the runs on a corpus by a protocol that share the most common evaluation."""
    if corpus:
        runs = runs[runs["corpus"] == corpus]
    if protocol:
        families = [name.partition("-")[0] for name in runs["protocol"]]
        runs = runs[np.array(families, dtype=object) == protocol.partition("-")[0]]
    if runs.empty:
        raise too_few_runs_error(0, corpus, protocol)
    # A corpus name doesn't determine its text; its hash and the token count do.
    evaluations = runs.groupby(["corpus_sha256", "protocol", "tokens"], dropna=False, sort=False)
    return max((rows for _, rows in evaluations), key=len)


def too_few_runs_error(plans: int, corpus: str | None, protocol: str | None) -> TooFewRuns:
    """Return the error for having runs of only ``plans`` different plans."""
    where = f" on {corpus}" if corpus else ""
    how = f" by {protocol}" if protocol else ""
    return TooFewRuns(
        f"Predictions{where}{how} need {MIN_PLANS} runs of different plans below 8 bits "
        f"({plans} so far). Run a sweep."
    )


# --- the process ----------------------------------------------------------------------------


class _Process:
    """A Gaussian process with fitted mean and variance, for a given length scale and noise.

    ``x`` is (n, features); ``y`` (n,) are the log costs minus the expected ones.
    """

    def __init__(self, x: np.ndarray, y: np.ndarray, length: float, noise: float) -> None:
        from scipy.linalg import cho_factor

        self.x, self.y, self.centre = x, y, x.mean(axis=0)
        self.length, self.noise = length, noise
        self.factor = cho_factor(self._kernel(x) + noise * np.eye(len(x)), lower=True)
        self.ones = self._solve(np.ones(len(x)))
        self.constant = self.ones @ y / self.ones.sum()
        self.weights = self._solve(y - self.constant)
        self.variance = (y - self.constant) @ self.weights / (len(x) - 1) + _MIN_VARIANCE

    def _solve(self, right: np.ndarray) -> np.ndarray:
        from scipy.linalg import cho_solve

        return cho_solve(self.factor, right)

    def _kernel(self, other: np.ndarray) -> np.ndarray:
        """Return the kernel (n, k): Matérn 5/2 plus a linear kernel around the centre."""
        distance = np.linalg.norm(self.x[:, None] - other[None], axis=2) * np.sqrt(5) / self.length
        line = (self.x - self.centre) @ (other - self.centre).T
        return (1 + distance + distance**2 / 3) * np.exp(-distance) + _SLOPE_VARIANCE * line

    @property
    def negative_log_posterior(self) -> float:
        """Negative log of the restricted likelihood times the priors, up to a constant."""
        likelihood = (len(self.x) - 1) * np.log(self.variance) / 2
        likelihood += np.log(np.diag(self.factor[0])).sum() + np.log(self.ones.sum()) / 2
        pairs = ((self.length, _LENGTH_PRIOR), (self.noise, _NOISE_PRIOR))
        priors = [np.log(value / median) / spread for value, (median, spread) in pairs]
        return likelihood + np.square(priors).sum() / 2

    def at(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return a new run's mean and standard deviation at each row of ``x`` (k, features)."""
        kernel = self._kernel(x)
        own = 1 + _SLOPE_VARIANCE * ((x - self.centre) ** 2).sum(axis=1)
        known = (kernel * self._solve(kernel)).sum(axis=0)
        constant = (1 - self.ones @ kernel) ** 2 / self.ones.sum()
        share = np.maximum(own - known + constant, 0) + self.noise
        return self.constant + kernel.T @ self.weights, np.sqrt(self.variance * share)

    def leave_one_out_moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean and standard deviation at each x predicted from the others, (n,) each.

        Equal x are left out together. Dubrule, *Cross validation of kriging in a unique
        neighborhood* (1983): if Q is the inverse covariance with the constant projected out, a
        group's residual is Q_gg⁻¹ (Q y)_g and its covariance Q_gg⁻¹.
        """
        inverse = self._solve(np.eye(len(self.x)))
        inverse -= np.outer(self.ones, self.ones) / self.ones.sum()
        weighted_residual = inverse @ self.y
        mean, deviation = self.y.copy(), np.empty(len(self.y))
        _, groups = np.unique(self.x.round(9), axis=0, return_inverse=True)
        for group in range(groups.max() + 1):
            here = np.flatnonzero(groups.ravel() == group)
            spread = np.linalg.inv(inverse[np.ix_(here, here)])
            mean[here] -= spread @ weighted_residual[here]
            deviation[here] = np.sqrt(self.variance * np.diag(spread))
        return mean, deviation


@dataclass(frozen=True, eq=False)
class Prediction:
    """Perplexity of each of k plans, its 90 % band, and whether it is extrapolated."""

    perplexity: np.ndarray
    low: np.ndarray
    high: np.ndarray
    extrapolated: np.ndarray

    def band(self, k: int) -> tuple[float, float, float]:
        """Return the k-th plan's perplexity and the ends of its band."""
        return float(self.perplexity[k]), float(self.low[k]), float(self.high[k])


def is_apart(a: Sequence[float], b: Sequence[float]) -> bool:
    """Return whether the bands of two predictions (``perplexity, low, high``) don't overlap."""
    return a[2] < b[1] or b[2] < a[1]


def is_comparable(a: Sequence[float], b: Sequence[float]) -> bool:
    """Return whether the difference of two predictions (``perplexity, low, high``) is meaningful.

    It is if their bands don't overlap, or if neither is wide (:func:`is_wide`): two plans of nearly
    the same size share most of the uncertainty that their bands express.
    """
    return is_apart(a, b) or not (is_wide(*a) or is_wide(*b))


def is_wide(perplexity: float, low: float, high: float) -> bool:
    """Return whether either side of a band is wider than a tenth of the predicted perplexity."""
    return max(high - perplexity, perplexity - low) > perplexity / 10


@dataclass(frozen=True, eq=False)
class Predictor:
    """A model fitted by :func:`fit` to the runs ``points``.

    ``floor`` is the minimum, median and maximum cost of the 8-bit runs in nats (zeros without any).
    They bound the low end, middle and high end of predicted costs from below, since this cost
    remains at any number of bits.
    """

    points: MeasuredPoints
    process: _Process
    floor: tuple[float, float, float]

    @property
    def full_precision(self) -> float:
        """Perplexity of the unquantized model, a lower bound on all predictions."""
        return float(self.points.full_precision[0])

    @cached_property
    def _held_deviations(self) -> float:
        """Half-width, in deviations, of a band that covers 90 % of the runs when left out.

        Leave-one-out conformal prediction (Vovk et al. 2005): the band then has its nominal
        coverage even if runs deviate more than the process considers likely.
        """
        mean, deviation = self.process.leave_one_out_moments()
        off = np.sort(np.abs(self.process.y - mean) / deviation)
        return float(off[min(math.ceil((len(off) + 1) * CONFIDENCE), len(off)) - 1])

    def predict(self, x: np.ndarray) -> Prediction:
        """Predict the perplexity of plans with the features ``x`` (k, features)."""
        mean, deviation = self.process.at(x)
        run = self.process.x
        beyond = ((x < run.min(axis=0)) | (x > run.max(axis=0))).any(axis=1)
        return self._prediction_from_log_costs(mean + _expected_log_cost(x), deviation, beyond)

    def leave_one_out(self) -> tuple[np.ndarray, Prediction]:
        """Predict each run below 8 bits from the others.

        Runs of the same plan are left out together; length scale and noise remain those fitted to
        all runs. Returns the runs' indices in ``points`` (n,), and their predictions.
        """
        below_8bit = ~self.points.eight_bit
        mean, deviation = self.process.leave_one_out_moments()
        none_beyond = np.zeros(len(mean), dtype=bool)
        x = self.points.features[below_8bit]
        return np.flatnonzero(below_8bit), self._prediction_from_log_costs(
            mean + _expected_log_cost(x), deviation, none_beyond
        )

    def _prediction_from_log_costs(
        self, mean: np.ndarray, deviation: np.ndarray, beyond: np.ndarray
    ) -> Prediction:
        """Convert means and deviations of log costs to perplexities with bands."""
        from scipy.special import stdtrit  # Student's t; scipy.stats has the same, a second later

        usual = stdtrit(len(self.process.x) - 1, (1 + CONFIDENCE) / 2)
        width = max(usual, self._held_deviations) * deviation
        # Costs are clipped to a minimum, so a plan predicted near it may in fact cost nothing.
        low = np.where(mean - width < np.log(2 * _MIN_COST), -np.inf, mean - width)
        logs = (low, mean, mean + width)
        low, middle, high = (
            self.full_precision
            * np.exp(np.maximum(np.exp(np.minimum(log, np.log(_MAX_COST))), floor))
            for log, floor in zip(logs, self.floor, strict=True)
        )
        return Prediction(middle, low, high, beyond)

    def summary(self, problem: Problem, choice: np.ndarray) -> dict:
        """Return one plan's prediction under the names printed by the command line."""
        found = self.predict(features(problem, choice[None]))
        return {
            "perplexity": float(found.perplexity[0]),
            "low": float(found.low[0]),
            "high": float(found.high[0]),
            "full_precision": self.full_precision,
            "extrapolated": bool(found.extrapolated[0]),
            "runs": len(self.points.perplexity),
            "corpus": self.points.corpus,
            "protocol": self.points.protocol,
            "tokens": self.points.tokens,
        }


def fit(points: MeasuredPoints) -> Predictor:
    """Fit a predictor to runs, with length scale and noise at their posterior mode.

    Runs with 8 bits everywhere only determine the floor.

    Raises
    ------
    TooFewRuns
        If the remaining runs have fewer than ``MIN_PLANS`` different plans.
    """
    from scipy.optimize import minimize

    below_8bit = ~points.eight_bit
    x = points.features[below_8bit]
    plans = len(np.unique(x.round(9), axis=0))
    if plans < MIN_PLANS:
        raise too_few_runs_error(plans, points.corpus, points.protocol)
    y = np.log(np.clip(points.cost[below_8bit], _MIN_COST, _MAX_COST)) - _expected_log_cost(x)
    found = minimize(
        lambda logs: _Process(x, y, *np.exp(logs)).negative_log_posterior,
        np.log([_LENGTH_PRIOR[0], _NOISE_PRIOR[0]]),
        method="L-BFGS-B",
        bounds=[(-3, 4), (-12, 3)],
    )
    eight_bit = np.maximum(points.cost[points.eight_bit], 0)
    floor = np.quantile(eight_bit, (0, 0.5, 1)) if len(eight_bit) else np.zeros(3)
    return Predictor(points, _Process(x, y, *np.exp(found.x)), tuple(floor.tolist()))


# --- the inverse problem --------------------------------------------------------------------


def parse_loss(text: str) -> float:
    """Parse a percentage: ``1%`` is 0.01.

    Raises
    ------
    InputError
        If it is not a percentage above zero.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*%\s*", text)
    if not match or float(match[1]) <= 0:
        raise InputError(
            f"'{text}' is not a valid loss; write a positive percentage of perplexity, such as 1%."
        )
    return float(match[1]) / 100


def smallest_budget_within(
    frontier: Frontier, predictor: Predictor, problem: Problem, max_loss: float
) -> float:
    """Return the smallest budget, in nominal bytes, whose plan is predicted to be within a loss.

    ``max_loss`` is relative: 0.01 is a perplexity 1 % above full precision. ``problem`` includes
    the pins. Every start and move of the frontier is tried, so the answer is exact for methods that
    consist of these, and within one move (0.003 bpp for a 7B model) for a knapsack, which can fill
    budgets in between.

    Raises
    ------
    InputError
        If no plan of the frontier is predicted to be within the loss.
    """
    budgets, choices = _boundaries(frontier)
    loss = predictor.predict(features(problem, choices)).perplexity / predictor.full_precision - 1
    for budget in budgets[loss <= max_loss]:
        # At a boundary, a knapsack may find a better plan of this size than its moves reach.
        choice = frontier.at(budget).choice[None]
        predicted = predictor.predict(features(problem, choice)).perplexity[0]
        if predicted <= (1 + max_loss) * predictor.full_precision:
            return float(budget)
    best = int(np.argmin(loss))
    raise InputError(
        f"No plan of this method is predicted within {100 * max_loss:.3g} % of full precision: the "
        f"best, at {problem.format_size(budgets[best])}, is predicted to be "
        f"{100 * loss[best]:.3g} % above it; allow a larger loss."
    )


def _boundaries(frontier: Frontier) -> tuple[np.ndarray, np.ndarray]:
    """Return the budgets (k,) at which the plan changes, ascending, and the plans (k, n)."""
    budgets, choices = [], []
    starts = [segment.start_bytes for segment in frontier.segments]
    for segment, following in zip(frontier.segments, [*starts[1:], np.inf], strict=True):
        choice = segment.start.copy()
        if segment.start_bytes < following:
            budgets.append(segment.start_bytes)
            choices.append(choice.copy())
        for move in segment.moves:
            choice[move.matrix] = move.stop
            if move.bytes_after < following:  # later moves are superseded by the next start
                budgets.append(move.bytes_after)
                choices.append(choice.copy())
    order = np.argsort(budgets, kind="stable")
    return np.array(budgets)[order], frontier.expand(np.array(choices)[order])
