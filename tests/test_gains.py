"""The gain of a run over the uniform run nearest in size."""

from __future__ import annotations

import pandas as pd
import pytest

from lsq_core.results.gains import (
    EQUAL_SIZE,
    against_nearest_uniform,
    first_pair,
    gain_at_equal_size,
    is_ablation,
    usable,
)

SIZE = "bits_per_param"


def runs(*rows: tuple[str, float, float], quantizer: str = "hqq") -> pd.DataFrame:
    """Return runs a, b, c, … from (method, bits, perplexity); full precision has 7.0."""
    frame = pd.DataFrame(rows, columns=["method", SIZE, "perplexity"])
    frame["increase"] = frame["perplexity"] / 7.0 - 1
    return frame.assign(evaluation=list("abcdefgh"[: len(rows)]), quantizer=quantizer)


UNIFORM = [("uniform", 3.13, 10.0), ("uniform", 4.13, 8.0)]


def test_gain_is_against_uniform_of_nearest_size():
    found = gain_at_equal_size(
        runs(
            *UNIFORM,
            ("sensiboost", 3.18, 9.0),  # -10 %
            ("kurtboost", 4.2, 7.6),  # -5 %, though the perplexity is lower
            ("sensiboost-ablation", 3.2, 1.0),  # a control
            ("gptq", 3.13, 1.0),  # has no plan
        ),
        SIZE,
    )
    assert (found.evaluation, found.uniform, found.candidates) == ("c", "a", 2)
    assert found.drop == pytest.approx(0.1)
    assert found.extra == pytest.approx(3.18 / 3.13 - 1)


def test_gain_ignores_runs_of_other_sizes():
    far = ("mxq", 3.13 * (1 + EQUAL_SIZE) + 0.01, 5.0)
    near = ("mxq", 3.13 * (1 + EQUAL_SIZE) - 0.01, 9.9)
    assert gain_at_equal_size(runs(*UNIFORM, far, near), SIZE).evaluation == "d"
    assert gain_at_equal_size(runs(*UNIFORM, far), SIZE) is None
    assert first_pair(runs(*UNIFORM, far), SIZE) == ("c", "a"), "the nearest in size"


def test_gain_leaves_out_broken_models():
    """Halving a perplexity of 500 is no gain; the limit is three times full precision's."""
    broken = [("uniform", 2.51, 500.0), ("mxq", 2.51, 200.0), ("mxq", 3.13, 9.9)]
    assert gain_at_equal_size(runs(*UNIFORM, *broken), SIZE).evaluation == "e"
    assert first_pair(runs(*UNIFORM, *broken[:2]), SIZE) is None
    assert len(usable(runs(("mxq", 3.0, 21.0), ("mxq", 3.0, 21.1)))) == 1
    unknown = runs(("mxq", 3.0, 21.1)).assign(increase=float("nan"))
    assert len(usable(unknown)) == 1, "without full precision nothing says that it is broken"


def test_gain_may_be_a_loss():
    found = gain_at_equal_size(runs(*UNIFORM, ("mxq", 3.13, 11.0)), SIZE)
    assert found.drop == pytest.approx(-0.1)
    assert found.extra == 0


def test_no_gain_without_uniform_runs_of_the_quantizer():
    assert first_pair(runs(("mxq", 3.13, 9.0), ("sensiboost", 3.2, 8.0)), SIZE) is None
    assert first_pair(runs(*UNIFORM), SIZE) is None
    both = pd.concat([runs(*UNIFORM), runs(("mxq", 3.13, 9.0), quantizer="rtn")])
    assert gain_at_equal_size(both, SIZE) is None
    assert against_nearest_uniform(both, SIZE).empty


def test_nearest_is_by_ratio_and_best_of_equal_uniform_runs():
    frame = runs(("uniform", 3.0, 10.0), ("uniform", 3.0, 9.0), ("mxq", 3.01, 8.0))
    assert first_pair(frame, SIZE) == ("c", "b")


def test_missing_sizes_and_perplexities_are_left_out():
    frame = runs(*UNIFORM, ("mxq", None, 1.0), ("mxq", 3.13, None), ("mxq", 3.14, 9.5))
    assert gain_at_equal_size(frame, SIZE).evaluation == "e"


def test_is_ablation():
    assert is_ablation("kurtboost-ablation")
    assert not is_ablation("kurtboost")
