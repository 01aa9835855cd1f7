"""A plan's JSON as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd


def plan_to_frame(content: Mapping[str, Any]) -> pd.DataFrame:
    """Return a plan as a frame: ``module, layer, type, config, z``, empty if it has no modules.

    ``content`` is the output of :meth:`Plan.to_json`. ``z`` is the score that ranked a module that
    the method promoted, NaN for the others.
    """
    flagged = content.get("flagged") or {}
    rows = [
        (name, entry["layer"], entry["type"], entry["config"], flagged.get(name, np.nan))
        for name, entry in (content.get("modules") or {}).items()
    ]
    frame = pd.DataFrame(rows, columns=["module", "layer", "type", "config", "z"])
    return frame.astype({"z": float})
