"""``python -m lsq_core``: see :mod:`lsq_core.cli`."""

import sys

from lsq_core.cli import main

sys.exit(main())
