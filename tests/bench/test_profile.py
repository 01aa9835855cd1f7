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
from lsq_core.profiling.calibration import calibration_of


@pytest.mark.bench
@pytest.mark.slow
def test_scores_are_those_of_the_authors_way():
    """Slow: the demo's 168 matrices at twelve configurations, and at two of them the long way."""
    settings = replace(bench.SETTINGS, samples=5, block_tokens=256)
    ids = torch.from_numpy(calibration_of(bench.open_demo(), settings.text).ids)
    ours = bench.measure_ours(settings)
    theirs = {config: bench.theirs_at(config, ids) for config in (LADDER[0], LADDER[7])}
    compared = list(bench.compared(ours, theirs))
    assert len(compared) == 3 * 2 + 1
    for found, expected in compared:
        np.testing.assert_allclose(found, expected, rtol=0.01)
        assert rank_correlation(found, expected) >= 0.999


@pytest.mark.bench
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(("text", "most"), [(False, 2.5), (True, 4.0)])
def test_profiling_takes_a_block_and_not_a_model(text, most, tmp_path):
    """Slow: 512 MiB of weights in 32 blocks, written, and profiled in a process of its own.

    The limits are those for 8 GiB, in GiB, in proportion to the weights; what Python, torch and
    transformers take comes on top. Few texts: what they take is no matter of the weights.
    """
    folder = tmp_path / "model"
    held = memory.write_random_model(folder, 512 * 2**20)
    assert held >= 500 * 2**20
    found = memory.measure(folder, held, memory.Options(text=text, quantizer="rtn", samples=8))
    assert found.peak - found.base <= most * memory.GIB * held / (8 * memory.GIB)
