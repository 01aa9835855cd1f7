"""``lsq`` and ``python -m lsq_core``, the same program: see :mod:`lsq_core.cli.program`."""

import os
import sys

from lsq_core.cli.program import main


def run() -> int:
    """Run the command on the command line; returns the exit status."""
    # How often PyTorch's threads look before they sleep when they wait for one another (GNU
    # OpenMP). On two cores an evaluation beside another one took 2.4 s with it and 5.2 s without,
    # alone 1.22 s and 1.17 s; sleeping at once, as OMP_WAIT_POLICY=PASSIVE has it, 2.2 s and
    # 1.42 s. To be set before torch is imported.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    return main()


if __name__ == "__main__":
    sys.exit(run())
