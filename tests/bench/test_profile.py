"""The profile's agreement with the authors' method, and its peak memory.

``python -m lsq_core bench`` measures the times.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lsq_core.bench import memory
from lsq_core.bench import profile as bench
from lsq_core.bits import LADDER
from lsq_core.profiling.agreement import rank_correlation
from lsq_core.profiling.calibration import load_calibration


@pytest.mark.bench
@pytest.mark.slow
def test_profile_scores_match_reference_method():
    """Slow: the demo's 168 matrices at twelve configurations, two of them by the authors' method.

    Weights in bfloat16 sometimes lie exactly between two codes. How such a tie is broken depends on
    the machine's float32 summation order, and HQQ's steps can then reach another zero point for a
    group: on one machine this changed the scores of one of the 168 matrices by 2.6 %.
    """
    settings = replace(bench.SETTINGS, samples=5, block_tokens=256)
    ids = torch.from_numpy(load_calibration(bench.open_demo(), settings.text).ids)
    ours = bench.measure_ours(settings)
    theirs = {config: bench.theirs_at(config, ids) for config in (LADDER[0], LADDER[7])}
    compared = list(bench.compared(ours, theirs))
    assert len(compared) == 3 * 2 + 1
    for measured, expected in compared:
        close = np.isclose(measured, expected, rtol=0.01, atol=0)
        assert (~close).sum() <= 1
        np.testing.assert_allclose(measured, expected, rtol=0.05)
        assert rank_correlation(measured, expected) >= 0.999


@pytest.mark.bench
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(("text", "limit_gib"), [(False, 2.5), (True, 4.0)])
def test_profile_peak_memory_within_limit(text, limit_gib, tmp_path):
    """Slow: writes 512 MiB of weights in 32 blocks and profiles them in a separate process.

    The limits, in GiB, are for 8 GiB of weights and are scaled to the weights here; the memory of
    Python, torch and transformers is excluded. Four texts suffice, since the memory for texts does
    not depend on the weights.
    """
    folder = tmp_path / "model"
    weight_bytes = memory.write_random_model(folder, 512 * 2**20)
    assert weight_bytes >= 500 * 2**20
    measured = memory.measure(
        folder, weight_bytes, memory.Options(text=text, quantizer="rtn", samples=4)
    )
    assert measured.peak - measured.base <= limit_gib * memory.GIB * weight_bytes / (8 * memory.GIB)
