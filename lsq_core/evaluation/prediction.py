"""Predicted perplexity of any plan, with a band, from the runs measured so far. Needs no torch.

What a plan costs is the log-perplexity it adds to full precision. Where a profile has the expected
KL divergence, its sum over the matrices, each at its configuration, is close to that cost itself.
Otherwise two figures of a plan stand in for it: the summed sensitivity of its modules and their
summed squared weight error. By the linearity theorem ([E]) the cost is proportional to such a sum
as long as it is small, so in logarithms the prediction starts as a line of slope one, shared
equally by the figures, at a height that the runs decide. A Gaussian process (kriging; Rasmussen &
Williams, *Gaussian Processes for Machine Learning*, 2006, ch. 2 and 5) then bends it towards the
runs: much where they lie close and agree, hardly where there are none, and its band widens
accordingly. Four runs are enough to begin with, and no run far away bends the line here, as it
would a polynomial.
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

#: Different plans that a prediction needs at least.
MIN_PLANS = 4
#: How often the band is meant to hold what is measured.
CONFIDENCE = 0.90
#: The metric that is the one feature where a profile has it, and those of the features otherwise.
BEST_METRIC = "expected_kl"
METRICS = ("sensitivity", "weight_error")

#: Least value of a feature, so that it has a logarithm.
_TINY = 1e-12
#: Prior variance of the slopes, in units of the process's own.
_SLOPE_VARIANCE = 0.25
#: Log-normal priors (median, spread of the logarithm): of the distance in log features over which
#: plans tell of each other (3 and 4 bits lie about 2 apart), and of the noise's share of variance.
_LENGTH_PRIOR = (2.0, 0.7)
_NOISE_PRIOR = (0.02, 2.0)
#: Variance of log costs below which runs count as agreeing exactly.
_MIN_VARIANCE = 1e-9
#: Costs are held between these, in nats. Less than 0.1 % is within the noise of an
#: evaluation; more than 16 is worse than guessing among any vocabulary.
_MIN_COST, _MAX_COST = 1e-3, 16.0


class TooFewRuns(InputError):
    """There is nothing to predict from yet; the message says what is there and what is needed."""


# --- features -------------------------------------------------------------------------------


def feature_tables(problem: Problem) -> np.ndarray:
    """What each matrix adds to each feature at each configuration, (n, options, features).

    The expected KL divergence if there is one, else sensitivity and squared weight error. Where
    sensitivity was not measured at a configuration, it is that at b4g64 scaled as the squared
    weight error. Experts that no calibration token reached have none, and add nothing.

    Raises
    ------
    InputError
        When the profile lacks one of the two.
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
    """Logs of a plan's features, each summed over its matrices, (k, features).

    ``choices`` (k, n) holds indices into the problem's options, a row a plan.
    """
    tables = feature_tables(problem)
    rows = np.arange(len(tables))
    sums = [tables[rows, choices, i].sum(axis=1) for i in range(tables.shape[2])]
    return np.log(np.maximum(np.stack(sums, axis=1), _TINY))


def _expected_log_cost(x: np.ndarray) -> np.ndarray:
    """Return the log cost (k,) that the linearity theorem expects, up to a constant."""
    return x.mean(axis=1)


# --- what was measured ----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class MeasuredPoints:
    """Runs of one model on one corpus by one protocol, newest first.

    ``features`` is (n, features); ``perplexity`` and ``full_precision``, that of the unquantized
    model in the run's dtype, are (n,). ``eight_bit`` (n,) marks plans with 8 bits everywhere: what
    they cost is the rounding of scale and zero, and of the evaluation, of which the features know
    nothing.
    """

    features: np.ndarray
    perplexity: np.ndarray
    full_precision: np.ndarray
    eight_bit: np.ndarray
    corpus: str = ""
    protocol: str = ""
    tokens: int | None = None
    #: The evaluations that they are, by identity.
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
    """The runs of a model that a prediction can learn from.

    Those by the same quantizer, grouping axis and metadata whose plan is known and has no
    configuration that the problem lacks, on one text by one protocol and token count: where
    several answer to ``corpus`` and ``protocol`` (or none is given), those with the most runs.
    ``protocol`` may be short: ``strided`` for ``strided-512/256``.

    Raises
    ------
    TooFewRuns
        When there are none.
    InputError
        When the problem lacks what the features need.
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
    """Of the runs on a corpus by a protocol, those of the evaluation that most of them share."""
    if corpus:
        runs = runs[runs["corpus"] == corpus]
    if protocol:
        families = [name.partition("-")[0] for name in runs["protocol"]]
        runs = runs[np.array(families, dtype=object) == protocol.partition("-")[0]]
    if runs.empty:
        raise too_few_runs_error(0, corpus, protocol)
    # The name of a corpus is not its text: its hash and the tokens read tell evaluations apart.
    evaluations = runs.groupby(["corpus_sha256", "protocol", "tokens"], dropna=False, sort=False)
    return max((rows for _, rows in evaluations), key=len)


def too_few_runs_error(plans: int, corpus: str | None, protocol: str | None) -> TooFewRuns:
    """What to say when so many different plans were run."""
    where = f" on {corpus}" if corpus else ""
    how = f" by {protocol}" if protocol else ""
    return TooFewRuns(
        f"Predictions{where}{how} need {MIN_PLANS} runs of different plans below 8 bits "
        f"({plans} so far). Run a sweep."
    )


# --- the process ----------------------------------------------------------------------------


class _Process:
    """A Gaussian process with a constant and a scale of its own, at a given length and noise.

    ``x`` is (n, features) and ``y`` (n,), what is left of the log costs after the expected slopes.
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
        """Matérn 5/2 and a line through the centre, (n, k)."""
        distance = np.linalg.norm(self.x[:, None] - other[None], axis=2) * np.sqrt(5) / self.length
        line = (self.x - self.centre) @ (other - self.centre).T
        return (1 + distance + distance**2 / 3) * np.exp(-distance) + _SLOPE_VARIANCE * line

    @property
    def negative_log_posterior(self) -> float:
        """Minus the log of the restricted likelihood times the priors, up to a constant."""
        likelihood = (len(self.x) - 1) * np.log(self.variance) / 2
        likelihood += np.log(np.diag(self.factor[0])).sum() + np.log(self.ones.sum()) / 2
        pairs = ((self.length, _LENGTH_PRIOR), (self.noise, _NOISE_PRIOR))
        priors = [np.log(value / median) / spread for value, (median, spread) in pairs]
        return likelihood + np.square(priors).sum() / 2

    def at(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of a new run at each of (k, features)."""
        kernel = self._kernel(x)
        own = 1 + _SLOPE_VARIANCE * ((x - self.centre) ** 2).sum(axis=1)
        known = (kernel * self._solve(kernel)).sum(axis=0)
        constant = (1 - self.ones @ kernel) ** 2 / self.ones.sum()
        share = np.maximum(own - known + constant, 0) + self.noise
        return self.constant + kernel.T @ self.weights, np.sqrt(self.variance * share)

    def leave_one_out_moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation at each x from the others alone, (n,) each.

        Equal x are left out together. Dubrule, *Cross validation of kriging in a unique
        neighborhood* (1983): with Q the inverse covariance without the constant's direction, a
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
    """Perplexity of each of k plans, its 90 % band, and whether it lies beyond what was run."""

    perplexity: np.ndarray
    low: np.ndarray
    high: np.ndarray
    extrapolated: np.ndarray

    def band(self, k: int) -> tuple[float, float, float]:
        """Perplexity of the k-th plan, and the ends of its band."""
        return float(self.perplexity[k]), float(self.low[k]), float(self.high[k])


def is_apart(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether the bands of two predictions, each ``perplexity, low, high``, don't overlap."""
    return a[2] < b[1] or b[2] < a[1]


def is_comparable(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two predictions, each ``perplexity, low, high``, tell of their difference.

    They do where their bands are apart, and where no side of a band is more than a tenth of what is
    predicted: two plans of nearly the same size share most of what their bands are wide for.
    """
    return is_apart(a, b) or not (is_wide(*a) or is_wide(*b))


def is_wide(perplexity: float, low: float, high: float) -> bool:
    """Whether a side of a band is more than a tenth of what is predicted."""
    return max(high - perplexity, perplexity - low) > perplexity / 10


@dataclass(frozen=True, eq=False)
class Predictor:
    """What :func:`fit` learned; ``points`` says from which runs.

    ``floor`` is what the 8-bit runs cost, in nats: least, median, most (zeros where there are
    none). No plan is predicted to cost less: however many bits are spent, this much remains.
    """

    points: MeasuredPoints
    process: _Process
    floor: tuple[float, float, float]

    @property
    def full_precision(self) -> float:
        """Perplexity of the unquantized model, which no prediction falls below."""
        return float(self.points.full_precision[0])

    @cached_property
    def _held_deviations(self) -> float:
        """The deviations on either side that would have held nine in ten of the runs left out.

        Conformal prediction by leaving one out (Vovk et al. 2005): the band then holds what it says
        also where runs are further off than the process takes for likely.
        """
        mean, deviation = self.process.leave_one_out_moments()
        off = np.sort(np.abs(self.process.y - mean) / deviation)
        return float(off[min(math.ceil((len(off) + 1) * CONFIDENCE), len(off)) - 1])

    def predict(self, x: np.ndarray) -> Prediction:
        """Perplexity of plans with these features (k, features)."""
        mean, deviation = self.process.at(x)
        run = self.process.x
        beyond = ((x < run.min(axis=0)) | (x > run.max(axis=0))).any(axis=1)
        return self._prediction_from_log_costs(mean + _expected_log_cost(x), deviation, beyond)

    def leave_one_out(self) -> tuple[np.ndarray, Prediction]:
        """What each run below 8 bits would have been predicted to be, had it not been seen.

        Runs of the same plan are left out together; length and noise stay as all runs have them.
        Gives which of ``points`` these are, (n,), and a prediction of each.
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
        """Perplexity of log costs with these means and deviations."""
        from scipy.special import stdtrit  # Student's t; scipy.stats has the same, a second later

        usual = stdtrit(len(self.process.x) - 1, (1 + CONFIDENCE) / 2)
        width = max(usual, self._held_deviations) * deviation
        # Costs below the least one count as that: what is predicted near it may cost nothing.
        low = np.where(mean - width < np.log(2 * _MIN_COST), -np.inf, mean - width)
        logs = (low, mean, mean + width)
        low, middle, high = (
            self.full_precision
            * np.exp(np.maximum(np.exp(np.minimum(log, np.log(_MAX_COST))), floor))
            for log, floor in zip(logs, self.floor, strict=True)
        )
        return Prediction(middle, low, high, beyond)

    def summary(self, problem: Problem, choice: np.ndarray) -> dict:
        """One plan's prediction by the names that the command line prints."""
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
    """Learn from runs; length and noise are the most plausible ones.

    Runs with 8 bits everywhere give the floor and nothing else.

    Raises
    ------
    TooFewRuns
        When fewer than ``MIN_PLANS`` different plans are left.
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


# --- the inverse question -------------------------------------------------------------------


def parse_loss(text: str) -> float:
    """Read ``1%`` as 0.01.

    Raises
    ------
    InputError
        When it is not a percentage above zero.
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
    """The least budget, in nominal bytes, whose plan is predicted within a loss.

    ``max_loss`` is relative: 0.01 is a perplexity 1 % above full precision; ``problem`` has the
    pins in it. Every start and move of the frontier is tried, so the answer is exact for methods
    that consist of these, and to within one move (0.003 bpp of a 7B model) for a knapsack, whose
    fill lies between.

    Raises
    ------
    InputError
        When no plan of the frontier is predicted so good.
    """
    budgets, choices = _boundaries(frontier)
    loss = predictor.predict(features(problem, choices)).perplexity / predictor.full_precision - 1
    for budget in budgets[loss <= max_loss]:
        # At a boundary a knapsack may know a plan as small that is better than its own moves'.
        choice = frontier.at(budget).choice[None]
        predicted = predictor.predict(features(problem, choice)).perplexity[0]
        if predicted <= (1 + max_loss) * predictor.full_precision:
            return float(budget)
    best = int(np.argmin(loss))
    raise InputError(
        f"No plan of this method is predicted within {100 * max_loss:.3g} % of full precision: the "
        f"best, at {problem.format_size(budgets[best])}, is predicted {100 * loss[best]:.3g} % "
        "above "
        "it; allow more."
    )


def _boundaries(frontier: Frontier) -> tuple[np.ndarray, np.ndarray]:
    """Budgets (k,) at which the plan changes, from small to large, and the plans (k, n)."""
    budgets, choices = [], []
    starts = [segment.start_bytes for segment in frontier.segments]
    for segment, following in zip(frontier.segments, [*starts[1:], np.inf], strict=True):
        choice = segment.start.copy()
        if segment.start_bytes < following:
            budgets.append(segment.start_bytes)
            choices.append(choice.copy())
        for move in segment.moves:
            choice[move.matrix] = move.stop
            if move.bytes_after < following:  # later ones give way to the next start
                budgets.append(move.bytes_after)
                choices.append(choice.copy())
    order = np.argsort(budgets, kind="stable")
    return np.array(budgets)[order], frontier.expand(np.array(choices)[order])
