"""``lsq`` and ``python -m lsq_core``, the same program: see :mod:`lsq_core.cli.program`."""

import os
import sys

from lsq_core.cli.program import main


def run() -> int:
    """Run the command given on the command line and return its exit status."""
    # How many times PyTorch's threads spin before they sleep while waiting for one another (GNU
    # OpenMP). On two cores, one of two simultaneous evaluations took 2.4 s with this setting and
    # 5.2 s without; alone, 1.22 s and 1.17 s. Sleeping at once (OMP_WAIT_POLICY=PASSIVE) took
    # 2.2 s and 1.42 s. Must be set before torch is imported.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    return main()


if __name__ == "__main__":
    sys.exit(run())
