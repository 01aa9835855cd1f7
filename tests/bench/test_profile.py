"""The profile beside the authors' way, and what memory it takes.

The table of ``python -m lsq_core bench`` has the times; here it has to be right, and small.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lsq_core.bench import memory
from lsq_core.bench import profile as bench
from lsq_core.config import LADDER
from lsq_core.profile.agreement import rank_correlation
from lsq_core.profile.measure import calibration_of

#: What profiling 512 MiB may take beside Python and torch: the limits for 8 GiB, in proportion.
SHARE = 512 * 2**20 / (8 * memory.GIB)


@pytest.mark.slow
def test_scores_are_those_of_the_authors_way():
    """Slow: the demo's 168 matrices at twelve configurations, and at two of them the long way."""
    settings = replace(bench.SETTINGS, samples=5, block_tokens=256)
    ids = torch.from_numpy(calibration_of(bench.open_demo(), settings).ids)
    ours = bench.measure_ours(settings)
    theirs = {config: bench.theirs_at(config, ids) for config in (LADDER[0], LADDER[7])}
    compared = list(bench.compared(ours, theirs))
    assert len(compared) == 3 * 2 + 1
    for found, expected in compared:
        np.testing.assert_allclose(found, expected, rtol=0.01)
        assert rank_correlation(found, expected) >= 0.999
