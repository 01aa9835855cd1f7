"""SensiBoost, KurtBoost and their ablations ([A] Algorithm 1 and §4 of the method)."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from lsq_core.errors import LsqError
from lsq_core.planning.detection import Detection, detect_outliers
from lsq_core.planning.frontier import Frontier, Segment, build_moves
from lsq_core.planning.methods.base import LadderPlanner
from lsq_core.planning.methods.uniform import sort_by_bytes, uniform_start
from lsq_core.planning.problem import Problem
from lsq_core.planning.request import PlanRequest

#: Metrics whose neighbours are divided; the others' are subtracted.
_RATIO_METRICS = ("sensitivity", "sensitivity_module")


def layer_series(problem: Problem, metric: str) -> dict[str, tuple[list[int], np.ndarray]]:
    """For each module type the layers that have it, in order, and the metric of each.

    Experts of a layer count as one: their mean, leaving out those that no token reached.
    """
    by_type: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for matrix, score in zip(problem.matrices, problem.scores[metric], strict=True):
        by_type[matrix.type][matrix.layer].append(score)
    series = {}
    for kind, layers in by_type.items():
        order = sorted(layers)
        means = [np.mean([v for v in layers[i] if np.isfinite(v)] or [np.nan]) for i in order]
        series[kind] = (order, np.array(means))
    return series


def detect_by_type(
    problem: Problem, metric: str, top_m: int
) -> dict[str, tuple[list[int], Detection]]:
    """Algorithm 1 for each module type: its layers and what was found among them."""
    ratios = metric in _RATIO_METRICS
    return {
        kind: (layers, detect_outliers(scores, ratios=ratios, top_m=top_m))
        for kind, (layers, scores) in layer_series(problem, metric).items()
    }


def flagged_layers(problem: Problem, metric: str, top_m: int) -> dict[str, dict[int, float]]:
    """For each module type the flagged layers with their z-scores, strongest first."""
    return {
        kind: {layers[i]: float(detection.z[i - 1]) for i in detection.flagged}
        for kind, (layers, detection) in detect_by_type(problem, metric, top_m).items()
    }


class _Boost(LadderPlanner):
    """A base stop for all, and more bits for chosen layers of each module type."""

    has_base = True
    metrics: tuple[str, ...] = ()

    def boosted_layers(self, problem: Problem, request: PlanRequest) -> dict[str, dict[int, float]]:
        """For each module type the layers to boost and what ranks them, first to last."""
        raise NotImplementedError

    def frontier(self, problem: Problem, request: PlanRequest, bases: list[int]) -> Frontier:
        """A start for each base, then the boosted matrices, largest z first."""
        boosted_layers = self.boosted_layers(problem, request)
        ranked = sorted(
            (
                (boosted_layers[m.type][m.layer], index)
                for index, m in enumerate(problem.matrices)
                if m.layer in boosted_layers.get(m.type, {})
            ),
            key=lambda pair: (-pair[0], pair[1]),
        )
        segments = []
        for base in bases:
            start = uniform_start(problem, base)
            top = min(base + request.boost_stop, len(problem.options) - 1)
            target_stops = np.clip(top, problem.low, problem.high)
            raised = [(index, int(target_stops[index]), priority) for priority, index in ranked]
            moves = build_moves(start, raised, problem.bytes)
            segments.append(Segment(start, problem.nominal(start), moves))
        return Frontier(sort_by_bytes(segments), problem.bytes)


class SensiBoost(_Boost):
    """More bits for the layers that Algorithm 1 flags by activation sensitivity."""

    name = "sensiboost"
    title = "SensiBoost"
    metrics = ("sensitivity",)

    def boosted_layers(self, problem: Problem, request: PlanRequest) -> dict[str, dict[int, float]]:
        """Flagged layers by type; see :class:`_Boost`."""
        return flagged_layers(problem, request.metric, request.top_m)


class KurtBoost(_Boost):
    """More bits for the layers that Algorithm 1 flags by weight kurtosis."""

    name = "kurtboost"
    title = "KurtBoost"
    metrics = ("kurtosis",)

    def boosted_layers(self, problem: Problem, request: PlanRequest) -> dict[str, dict[int, float]]:
        """Flagged layers by type; see :class:`_Boost`."""
        return flagged_layers(problem, "kurtosis", request.top_m)


class _Ablation(_Boost):
    """As many layers of each type as the method boosts, drawn from those neither method picked."""

    metrics = ("sensitivity", "kurtosis")
    method: type[_Boost]

    def boosted_layers(self, problem: Problem, request: PlanRequest) -> dict[str, dict[int, float]]:
        """Drawn layers by type; the order of the draw ranks them.

        Raises
        ------
        LsqError
            When a type has fewer layers left than the method boosts.
        """
        wanted = self.method().boosted_layers(problem, request)
        sensitive = flagged_layers(problem, request.metric, 0)
        heavy_tailed = flagged_layers(problem, "kurtosis", 0)
        random = np.random.default_rng(request.seed)
        drawn = {}
        for kind, (layers, _) in layer_series(problem, "kurtosis").items():
            free = [i for i in layers if i not in sensitive[kind] and i not in heavy_tailed[kind]]
            count = len(wanted[kind])
            if count > len(free):
                raise LsqError(
                    f"An ablation of {self.method.title} needs {count} layers of {kind} that "
                    f"neither method picked, and {len(free)} are left; lower top-m."
                )
            order = random.choice(free, size=count, replace=False) if count else []
            drawn[kind] = {int(layer): float(count - i) for i, layer in enumerate(order)}
        return drawn


class SensiBoostAblation(_Ablation):
    """The control for SensiBoost: as many layers, others."""

    name = "sensiboost-ablation"
    title = "SensiBoost ablation"
    method = SensiBoost


class KurtBoostAblation(_Ablation):
    """The control for KurtBoost: as many layers, others."""

    name = "kurtboost-ablation"
    title = "KurtBoost ablation"
    method = KurtBoost
