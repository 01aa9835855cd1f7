"""The profile beside the authors' way, and what memory it takes.

The table of ``python -m lsq_core bench`` has the times; here it has to be right, and small.
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
    """Slow: the demo's 168 matrices at twelve configurations, and at two of them the long way.

    Weights in bfloat16 lie exactly between two codes now and then. Which way such a tie goes
    depends on the order in which a machine adds float32 numbers, and HQQ's steps can carry one
    group to another zero point: on one machine that moved one of the 168 matrices by 2.6 %.
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
    """Slow: 512 MiB of weights in 32 blocks, written, and profiled in a process of its own.

    The limits are those for 8 GiB, in GiB, in proportion to the weights; what Python, torch and
    transformers take comes on top. Few texts: what they take is no matter of the weights.
    """
    folder = tmp_path / "model"
    weight_bytes = memory.write_random_model(folder, 512 * 2**20)
    assert weight_bytes >= 500 * 2**20
    measured = memory.measure(
        folder, weight_bytes, memory.Options(text=text, quantizer="rtn", samples=4)
    )
    assert measured.peak - measured.base <= limit_gib * memory.GIB * weight_bytes / (8 * memory.GIB)
