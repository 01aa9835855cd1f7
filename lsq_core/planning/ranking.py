"""The most sensitive layers by a metric, and the layers that Algorithm 1 flags.

A sensitive layer is at the top of the ranking; a flagged layer differs unusually from the one
before it. Most sensitive layers are not flagged, and the first layer never is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from lsq_core.planning.detection import Detection

#: Number of layers reported as the most sensitive.
TOP_LAYERS = 3


@dataclass(frozen=True)
class FlaggedLayers:
    """The layers that Algorithm 1 flags for any module type, in order.

    In ``jumps``, the score rises from the previous layer for at least one flagged module type; in
    ``falls``, it rises for none of them.
    """

    jumps: tuple[int, ...]
    falls: tuple[int, ...]


def rank_layers(scores: pd.DataFrame) -> pd.DataFrame:
    """Rank layers by their modules' largest score, largest first.

    ``scores`` and the result have columns ``layer, type, value``. Missing scores are ignored, and
    layers with equal scores stay in layer order.

    >>> scores = pd.DataFrame({"layer": [0, 0, 1], "type": ["q", "k", "q"], "value": [3.0, 9.0, 5]})
    >>> rank_layers(scores)["layer"].tolist()
    [0, 1]
    """
    known = scores.dropna(subset=["value"])
    largest = known.loc[known.groupby("layer")["value"].idxmax(), ["layer", "type", "value"]]
    return largest.sort_values("value", ascending=False, kind="stable").reset_index(drop=True)


def flags_by_module(
    detections: Mapping[str, tuple[list[int], Detection]],
) -> dict[tuple[str, int], tuple[float, bool]]:
    """Return the z-score of each flagged (module type, layer), and whether the score rises there.

    ``detections`` is the result of :func:`lsq_core.planning.methods.boost.detect_by_type`.
    """
    return {
        (kind, layers[i]): (float(found.z[i - 1]), bool(found.rises[i - 1]))
        for kind, (layers, found) in detections.items()
        for i in found.flagged
    }


def flagged_by_direction(detections: Mapping[str, tuple[list[int], Detection]]) -> FlaggedLayers:
    """Return the flagged layers of all module types, split by whether the score rises."""
    flags = flags_by_module(detections)
    jumps = {layer for (_, layer), (_, rises) in flags.items() if rises}
    falls = {layer for _, layer in flags} - jumps
    return FlaggedLayers(tuple(sorted(jumps)), tuple(sorted(falls)))
