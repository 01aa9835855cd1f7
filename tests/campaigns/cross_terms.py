"""Measure the cross terms of the expected KL divergence, and whether plans gain from them.

``python -m tests.campaigns.cross_terms --calibration TEXT`` takes about five minutes on two cores.
To second order, the divergence of a plan is ``½·E[(Σ ⟨g, Δ⟩)²]`` per token, summed over matrices;
KL-aware minimises ``½·Σ E[⟨g, Δ⟩²]``, without the products of different matrices. Both are computed
from the same gradients and compared on measured plans. Plans are also chosen by either on half of
the sequences and evaluated on the other half.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from lsq_core.bits import LADDER
from lsq_core.model.source import ModelSource
from lsq_core.planning.plan import Plan
from lsq_core.planning.problem import Problem
from lsq_core.profiling.backward import SEQUENCE_TOKENS
from lsq_core.profiling.measure import measure_profile
from lsq_core.profiling.metrics import METRICS
from lsq_core.profiling.metrics.expected_kl import ExpectedKl
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.session import Session
from lsq_core.shipped import import_measurements
from lsq_core.store.store import Store

BUDGETS = (3.0, 3.25, 3.5, 4.0)
#: Weights of the products of different matrices when choosing plans; 0 is KL-aware's sum.
SHARES = (0.0, 0.25, 0.5, 1.0)
SPLITS = 3
#: Maximum number of passes that give each matrix its best configuration, given the others'.
_PASSES = 40
#: Bisection steps for the price of a byte.
_HALVINGS = 28


class _RecordedKl(ExpectedKl):
    """The metric, recording its products by matrix as (sequences, draws, ladder)."""

    recorded: dict = {}  # noqa: RUF012

    def products(self, context) -> Iterator:
        for matrix, configs, products in super().products(context):
            columns = [configs.index(c) if c in configs else None for c in LADDER]
            missing = np.full(products.shape[:2], np.nan)
            self.recorded[matrix] = np.stack(
                [missing if k is None else products[..., k].numpy() for k in columns], axis=-1
            )
            yield matrix, configs, products


@dataclass(frozen=True, eq=False)
class Samples:
    """``⟨g, Δ⟩`` (n, samples, options), scaled so that a mean square is a KL in nats per token."""

    values: np.ndarray

    @cached_property
    def alone(self) -> np.ndarray:
        """The expected KL (n, options) of each matrix quantized alone."""
        return np.square(self.values).mean(axis=1)

    def of(self, choice: np.ndarray) -> np.ndarray:
        """Return the values (n, samples) of a choice (n,)."""
        return self.values[np.arange(len(choice)), :, choice]

    def joint(self, choice: np.ndarray) -> float:
        """Return the expected KL of a choice, including products of different matrices."""
        return float(np.square(self.of(choice).sum(axis=0)).mean())

    def summed(self, choice: np.ndarray) -> float:
        """Return the expected KL without those products: the sum over matrices."""
        return float(np.square(self.of(choice)).mean(axis=1).sum())

    def joint_error(self, choice: np.ndarray) -> float:
        """Return the standard error of :meth:`joint`."""
        squares = np.square(self.of(choice).sum(axis=0))
        return float(squares.std() / np.sqrt(len(squares)))


def choose(samples: Samples, problem: Problem, share: float, budget: float) -> np.ndarray:
    """Return a choice (n,) within a budget in nominal bytes, a local optimum at a price per byte.

    Minimises the sum over matrices plus ``share`` times the products of different matrices.
    """
    low, high = np.log(1e-12), np.log(1e-3)
    start = problem.at_most(len(LADDER) - 1)
    best = _descend(samples, problem, share, float(np.exp(high)), start)
    assert problem.nominal(best) <= budget, "the highest price does not reach the budget"
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        choice = _descend(samples, problem, share, float(np.exp(middle)), start)
        if problem.nominal(choice) <= budget:
            best, high = choice, middle
        else:
            low = middle
    return best


def _descend(
    samples: Samples, problem: Problem, share: float, price: float, start: np.ndarray
) -> np.ndarray:
    choice = start.copy()
    total = samples.of(choice).sum(axis=0)
    for _ in range(_PASSES):
        before = choice.copy()
        for i, own in enumerate(samples.values):
            others = total - own[:, choice[i]]
            cost = samples.alone[i] + share * 2 * (own * others[:, None]).mean(axis=0)
            cost = np.where(problem.allowed[i], cost + price * problem.bytes[i], np.inf)
            choice[i] = cost.argmin()
            total = others + own[:, choice[i]]
        if np.array_equal(before, choice):
            break
    return choice


def measured_plans(session: Session) -> Iterator[tuple[np.ndarray, float]]:
    """Yield the choice (n,) and KL of each run on the papers' ladder whose KL was measured."""
    info = session.info
    found = session.store.query(
        "SELECT p.content, e.kl FROM evaluations e JOIN runs r ON e.run = r.id "
        "JOIN plans p ON r.plan = p.id WHERE e.fingerprint = ? AND e.kl IS NOT NULL",
        [info.fingerprint],
    )
    for content, kl in found.itertuples(index=False):
        choice = Plan.from_json(json.loads(content), info.matrices, info.other_bytes).choice
        if set(choice.values()) <= set(LADDER):
            yield np.array([LADDER.index(choice[m]) for m in info.matrices]), kl


def compare_measured(session: Session, samples: Samples) -> None:
    """Print how the two estimates differ and how close each is to the measured KL."""
    found = list(measured_plans(session))
    joint = np.array([samples.joint(choice) for choice, _ in found])
    summed = np.array([samples.summed(choice) for choice, _ in found])
    error = np.array([samples.joint_error(choice) for choice, _ in found])
    kl = np.array([kl for _, kl in found])
    usual = (kl > 0.03) & (kl < 2)
    print(
        f"{len(found)} plans: joint over sum {np.median(joint / summed):.2f} in the median "
        f"({min(joint / summed):.2f} to {max(joint / summed):.2f}); they differ by "
        f"{np.median(abs(joint - summed) / error):.1f} standard errors of the joint one in the "
        f"median, {max(abs(joint - summed) / error):.1f} at most"
    )
    for name, estimate in (("sum", summed), ("joint", joint)):
        ratio = (kl / estimate)[usual]
        print(
            f"{usual.sum()} plans of 0.03 to 2 nats, measured over {name}: "
            f"{np.median(ratio):.2f} in the median, standard deviation of the logarithm "
            f"{np.log(ratio).std():.3f}"
        )


def compare_chosen(problem: Problem, by_sequence: np.ndarray) -> None:
    """Print the joint estimate of plans chosen on half of the sequences, on both halves."""
    random = np.random.default_rng(0)
    count = by_sequence.shape[1]
    halves = [np.split(random.permutation(count), [count // 2]) for _ in range(SPLITS)]
    halves += [(other, own) for own, other in halves]
    for bits in BUDGETS:
        for share in SHARES:
            pairs = []
            for own, other in halves:
                chosen_on, judged_on = (_flatten(by_sequence[:, part]) for part in (own, other))
                choice = choose(chosen_on, problem, share, bits * problem.total / 8)
                size = 8 * problem.nominal(choice) / problem.total
                pairs.append((size, chosen_on.joint(choice), judged_on.joint(choice)))
            size, chosen, judged = np.mean(pairs, axis=0)
            print(
                f"within {bits} bits, share {share}: {size:.3f} bits, {chosen:.4f} where chosen, "
                f"{judged:.4f} held out"
            )


def _flatten(by_sequence: np.ndarray) -> Samples:
    return Samples(by_sequence.reshape(len(by_sequence), -1, by_sequence.shape[-1]))


def main() -> None:
    """Measure the gradients once, then print both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--calibration", default="stdlib")
    options = parser.parse_args()
    METRICS["expected_kl"] = _RecordedKl
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "lsq.duckdb")
        import_measurements(store)
        session = Session(ModelSource(options.model), store, "cpu")
        settings = ProfileSettings(calibration=options.calibration)
        measure_profile(session.loaded, settings, "", metrics=["expected_kl"])
        matrices = session.info.matrices
        by_sequence = np.stack([_RecordedKl.recorded[m] for m in matrices])
        by_sequence = by_sequence / np.sqrt(2 * SEQUENCE_TOKENS)
        compare_measured(session, _flatten(by_sequence))
        compare_chosen(Problem(matrices), by_sequence)


if __name__ == "__main__":
    main()
