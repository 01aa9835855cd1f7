"""SensiBoost, KurtBoost and their ablations ([A], Algorithm 1; method §4)."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from lsq_core.bits import PAPER
from lsq_core.errors import LsqError
from lsq_core.planning.detection import Detection, detect_outliers
from lsq_core.planning.frontier import Frontier, Segment, build_moves
from lsq_core.planning.methods.base import LadderPlanner
from lsq_core.planning.methods.uniform import sort_by_bytes, uniform_start
from lsq_core.planning.problem import Problem
from lsq_core.planning.request import SENSITIVITIES, PlanRequest


def compares_by_ratio(metric: str) -> bool:
    """Return whether Algorithm 1 divides neighbouring layers' scores rather than subtracting them.

    [A] divides sensitivities, which span orders of magnitude, and subtracts kurtosis.
    """
    return metric in SENSITIVITIES


def layer_series(problem: Problem, metric: str) -> dict[str, tuple[list[int], np.ndarray]]:
    """Return, for each module type, the layers that have it, in order, and their scores.

    The scores of a layer's experts are averaged, leaving out experts that no token reached.
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
    """Run Algorithm 1 on each module type and return its layers and the detection."""
    ratios = compares_by_ratio(metric)
    return {
        kind: (layers, detect_outliers(scores, ratios=ratios, top_m=top_m))
        for kind, (layers, scores) in layer_series(problem, metric).items()
    }


def flagged_layers(problem: Problem, metric: str, top_m: int) -> dict[str, dict[int, float]]:
    """Return the flagged layers of each module type with their z-scores, strongest first."""
    return {
        kind: {layers[i]: float(detection.z[i - 1]) for i in detection.flagged}
        for kind, (layers, detection) in detect_by_type(problem, metric, top_m).items()
    }


class Boost(LadderPlanner):
    """A method that gives selected layers of each module type more bits than the base."""

    has_base = True
    ladders = (PAPER,)  # boosts are counted in steps of the paper's ladder
    fields = ("boost_stop", "top_m")

    def boosted_layers(self, problem: Problem, request: PlanRequest) -> dict[str, dict[int, float]]:
        """Return the layers of each module type to boost, with their priorities."""
        raise NotImplementedError

    def frontier(self, problem: Problem, request: PlanRequest, bases: list[int]) -> Frontier:
        """Return a start for each base, with moves of boosted matrices, highest priority first."""
        ranked = rank_items(problem, self.boosted_layers(problem, request))
        size, segments = problem.sum_items(problem.bytes), []
        for base in bases:
            start = uniform_start(problem, base)
            top = min(base + request.boost_stop, len(problem.options) - 1)
            target_stops = problem.first_of_items(problem.at_most(top))
            raised = [(item, int(target_stops[item]), priority) for item, priority in ranked]
            start_items = problem.first_of_items(start)
            moves = build_moves(start_items, raised, size)
            segments.append(Segment(start_items, problem.nominal(start), moves))
        return Frontier(sort_by_bytes(segments), size, items=problem.items_if_tied)


def rank_items(
    problem: Problem, boosted_layers: dict[str, dict[int, float]]
) -> list[tuple[int, float]]:
    """Return the items to promote with their priorities, highest first.

    Tied matrices are promoted together if any of them is, at the highest of their priorities.
    """
    priorities: dict[int, float] = {}
    for item, matrix in zip(problem.items.tolist(), problem.matrices, strict=True):
        priority = boosted_layers.get(matrix.type, {}).get(matrix.layer)
        if priority is not None:
            priorities[item] = max(priority, priorities.get(item, priority))
    return sorted(priorities.items(), key=lambda pair: (-pair[1], pair[0]))


class SensiBoost(Boost):
    """Boosts the layers that Algorithm 1 flags by activation sensitivity."""

    name = "sensiboost"
    title = "SensiBoost"
    meaning = "More bits for the layers that Algorithm 1 flags by activation sensitivity."
    summary = (
        "All matrices start from the same configuration; layers whose activation sensitivity "
        "jumps from that of the previous layer (z > 3) get a few more steps. Each module type is "
        "examined separately."
    )
    source = "Zhang et al., Towards Superior Quantization Accuracy (arXiv 2503.06518), Algorithm 1"
    use = (
        "Bases of 3.5 to 4.5 bits: on SmolLM2 (4,096 tokens of WikiText-2) perplexity 49.1 "
        "against 53.1 for uniform 3.51, for 1.2 % more bits."
    )
    limits = (
        "With fewer than twelve layers none can exceed the threshold, and the first layer is "
        "never flagged. It does not help if the base itself is too small: on SmolLM2 at 3.15 "
        "bits perplexity was 420, against 344 for uniform 3.13."
    )
    color, symbol = "#CC6699", "diamond"
    metrics = ("sensitivity",)
    fields = ("boost_stop", "top_m", "metric")

    def boosted_layers(self, problem: Problem, request: PlanRequest) -> dict[str, dict[int, float]]:
        """Return the flagged layers of each module type with their z-scores."""
        return flagged_layers(problem, request.metric, request.top_m)


class KurtBoost(Boost):
    """Boosts the layers that Algorithm 1 flags by weight kurtosis."""

    name = "kurtboost"
    title = "KurtBoost"
    meaning = "More bits for the layers that Algorithm 1 flags by weight kurtosis."
    summary = (
        "Like SensiBoost, but with the kurtosis of the weights instead of sensitivity: layers "
        "with heavy tails get more bits. It needs only the weights, no calibration text."
    )
    source = "Zhang et al., Towards Superior Quantization Accuracy (arXiv 2503.06518), Algorithm 1"
    use = (
        "Bases of 3.5 to 4.5 bits without calibration text: on SmolLM2 (4,096 tokens of "
        "WikiText-2) perplexity 48.6 against 53.1 for uniform 3.51, for 1.7 % more bits."
    )
    limits = (
        "Kurtosis ignores the activations that the weights are applied to. On SmolLM2 at 3.16 "
        "bits perplexity was 399, against 344 for uniform 3.13."
    )
    color, symbol = "#3D9BD1", "square"
    metrics = ("kurtosis",)

    def boosted_layers(self, problem: Problem, request: PlanRequest) -> dict[str, dict[int, float]]:
        """Return the flagged layers of each module type with their z-scores."""
        return flagged_layers(problem, "kurtosis", request.top_m)


class _Ablation(Boost):
    """Boosts as many layers per module type as ``method``, drawn at random.

    Layers flagged by sensitivity or kurtosis are excluded from the draw.
    """

    metrics = ("sensitivity", "kurtosis")
    fields = ("boost_stop", "top_m", "metric", "seed")
    method: type[Boost]

    def boosted_layers(self, problem: Problem, request: PlanRequest) -> dict[str, dict[int, float]]:
        """Return randomly drawn layers of each module type, ranked in the order of the draw.

        Raises
        ------
        LsqError
            If a module type has fewer unflagged layers than ``method`` boosts.
        """
        wanted = self.method().boosted_layers(problem, request)
        sensitive = flagged_layers(problem, request.metric, 0)
        heavy_tailed = flagged_layers(problem, "kurtosis", 0)
        random = np.random.default_rng(request.seed)
        series = layer_series(problem, "kurtosis")
        drawn = {}
        for kinds in problem.tied_types:  # tied types are promoted together, so they share a draw
            picked = {i for kind in kinds for i in (*sensitive[kind], *heavy_tailed[kind])}
            layers = sorted({layer for kind in kinds for layer in series[kind][0]})
            free = [layer for layer in layers if layer not in picked]
            count = len({layer for kind in kinds for layer in wanted[kind]})
            if count > len(free):
                raise LsqError(
                    f"An ablation of {self.method.title} needs {count} layers of "
                    f"{' and '.join(kinds)} that neither method picked, and {len(free)} are left; "
                    "lower top-m."
                )
            order = random.choice(free, size=count, replace=False) if count else []
            ranks = {int(layer): float(count - i) for i, layer in enumerate(order)}
            drawn |= dict.fromkeys(kinds, ranks)
        return drawn


class SensiBoostAblation(_Ablation):
    """Control for SensiBoost: the same number of other layers, drawn at random."""

    name = "sensiboost-ablation"
    title = "SensiBoost ablation"
    meaning = "The control for SensiBoost: the same number of layers, drawn at random."
    summary = (
        "Boosts as many layers of each module type as SensiBoost, drawn at random from those "
        "that neither method flags. It is a control: any gain that it also shows is not due to "
        "the choice of layers."
    )
    source = "Zhang et al., Towards Superior Quantization Accuracy (arXiv 2503.06518), ablation"
    use = "Checking whether SensiBoost's choice of layers matters."
    limits = (
        "A single draw is not conclusive; run several seeds. Small models may have too few layers "
        "left to draw from."
    )
    color, symbol = "#CC6699", "diamond-open"
    method = SensiBoost


class KurtBoostAblation(_Ablation):
    """Control for KurtBoost: the same number of other layers, drawn at random."""

    name = "kurtboost-ablation"
    title = "KurtBoost ablation"
    meaning = "The control for KurtBoost: the same number of layers, drawn at random."
    summary = (
        "Boosts as many layers of each module type as KurtBoost, drawn at random from those "
        "that neither method flags. It is a control: any gain that it also shows is not due to "
        "the choice of layers."
    )
    source = "Zhang et al., Towards Superior Quantization Accuracy (arXiv 2503.06518), ablation"
    use = "Checking whether KurtBoost's choice of layers matters."
    limits = (
        "A single draw is not conclusive; run several seeds. Small models may have too few layers "
        "left to draw from."
    )
    color, symbol = "#3D9BD1", "square-open"
    method = KurtBoost
