"""Methods compared at equal size: which runs are compared, and how many are needed."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from lsq_core.results import compare
from lsq_core.results.compare import (
    MIN_COMPARISONS,
    WinTieLoss,
    interpolate_perplexity,
    win_tie_loss_at_equal_bytes,
)
from lsq_core.ui.compare.views import describe_too_few

FRONT = np.array([[2.25, 40.0], [3.13, 12.0], [3.25, 10.0], [3.51, 9.0], [3.4, 20.0]])


def runs(*rows: tuple[str, float, float]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["method", "bits_per_param", "perplexity"])
    same = dict.fromkeys(("fingerprint", "corpus", "corpus_sha256", "protocol"), "x")
    return frame.assign(**same, tokens=100, base=None, request=None)


@pytest.mark.parametrize(
    ("size", "perplexity"),
    [
        (3.25, 10.0),
        (3.2502, 10.0),  # the same size up to the rounding of its label
        (3.19, math.sqrt(120)),  # halfway between two neighbours, in the logarithm
        (3.38, math.sqrt(90)),  # a run beaten by a smaller one is no neighbour
        (2.5, math.nan),  # its neighbours are 39 % apart
        (2.0, math.nan),  # no extrapolation
        (4.0, math.nan),
    ],
)
def test_perplexity_at_size(size, perplexity):
    assert interpolate_perplexity(FRONT, size) == pytest.approx(perplexity, nan_ok=True)


def test_win_tie_loss_ignores_distant_sizes():
    """Once, 3.129 bits were compared with 2.510 because the nearest plan was 0.0006 bits larger."""
    uniform = [("uniform", 2.5078, 30.0), ("uniform", 3.1296, 9.0)]
    found = runs(("sensiboost", 3.129, 10.0), *uniform)
    assert win_tie_loss_at_equal_bytes(found, "sensiboost", "uniform") == WinTieLoss(0, 0, 1)
    found = runs(("sensiboost", 2.9, 10.0), *uniform)
    assert win_tie_loss_at_equal_bytes(found, "sensiboost", "uniform").total == 0


def test_figure_6_marks_too_few_comparisons():
    uniform = [("uniform", 3.13, 12.0), ("uniform", 3.25, 11.0)]
    boosted_runs = [("sensiboost", 3.13 + 0.02 * k, 8.0) for k in range(MIN_COMPARISONS - 1)]
    found = compare.figure_6(runs(*boosted_runs, *uniform))
    assert found["total"].tolist() == [MIN_COMPARISONS - 1]
    assert not found["enough"].any()
    assert f"n = {MIN_COMPARISONS - 1}" in describe_too_few(found)
    found = compare.figure_6(runs(*boosted_runs, ("sensiboost", 3.24, 8.0), *uniform))
    assert found["enough"].all()
    assert describe_too_few(found) == ""
