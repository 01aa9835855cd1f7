"""Which layers are sensitive, by the ranking of a metric, and which Algorithm 1 flags.

A sensitive layer is at the top of the ranking; a flagged one differs unusually from the layer
before it. Most sensitive layers are not flagged, and the first layer never is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from lsq_core.planning.detection import Detection

#: How many layers are named as the most sensitive.
TOP_LAYERS = 3


@dataclass(frozen=True)
class FlaggedLayers:
    """The layers that Algorithm 1 flags for any module type, in order.

    At ``jumps`` the score rises from the layer before for at least one of the module types that
    are flagged; at ``falls`` it falls back for all of them.
    """

    jumps: tuple[int, ...]
    falls: tuple[int, ...]


def rank_layers(scores: pd.DataFrame) -> pd.DataFrame:
    """Rank layers by the largest score of their modules: ``layer, type, value``, largest first.

    ``scores`` has ``layer, type, value``; missing scores rank nowhere, and of equal layers the
    first comes first.

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

    ``detections`` is of :func:`lsq_core.planning.methods.boost.detect_by_type`.
    """
    return {
        (kind, layers[i]): (float(found.z[i - 1]), bool(found.rises[i - 1]))
        for kind, (layers, found) in detections.items()
        for i in found.flagged
    }


def flagged_by_direction(detections: Mapping[str, tuple[list[int], Detection]]) -> FlaggedLayers:
    """Return the flagged layers of all module types, apart by whether their score rises."""
    flags = flags_by_module(detections)
    jumps = {layer for (_, layer), (_, rises) in flags.items() if rises}
    falls = {layer for _, layer in flags} - jumps
    return FlaggedLayers(tuple(sorted(jumps)), tuple(sorted(falls)))
