"""A plan's JSON as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd


def plan_to_frame(content: Mapping[str, Any]) -> pd.DataFrame:
    """A plan as a frame: ``module, layer, type, config, z``, without rows if it has no modules.

    ``content`` is what :meth:`Plan.to_json` gave; ``z`` is what ranked a module
    that the method raised, else NaN.
    """
    flagged = content.get("flagged") or {}
    rows = [
        (name, entry["layer"], entry["type"], entry["config"], flagged.get(name, np.nan))
        for name, entry in (content.get("modules") or {}).items()
    ]
    frame = pd.DataFrame(rows, columns=["module", "layer", "type", "config", "z"])
    return frame.astype({"z": float})
