"""``python -m lsq_core``: see :mod:`lsq_core.cli`."""

import os
import sys

from lsq_core.cli import main

# How often PyTorch's threads look before they sleep when they wait for one another (GNU OpenMP, by
# default some 100,000 times, with a core each). Beside another process, such as the app's, that
# makes both two to fifteen times as fast, and alone 4 % slower at most. To be set before torch.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

sys.exit(main())
