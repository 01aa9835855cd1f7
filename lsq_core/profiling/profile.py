"""A profile: every metric of every matrix of a model, with its provenance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from lsq_core.bits import LADDER, QuantConfig
from lsq_core.errors import LsqError
from lsq_core.model.info import Matrix

if TYPE_CHECKING:
    import pandas as pd
from lsq_core.profiling.metrics import DEFAULT_METRICS, METRICS
from lsq_core.profiling.settings import ProfileSettings


@dataclass(frozen=True, eq=False)
class Profile:
    """Every score of one model under one :class:`ProfileSettings`.

    ``values`` has a row for each figure: ``module, layer, type, metric, config, part, value``;
    ``config`` is '' where a metric has none.
    """

    id: str
    fingerprint: str
    settings: ProfileSettings
    matrices: tuple[Matrix, ...]
    values: pd.DataFrame
    provenance: dict = field(default_factory=dict)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics it holds; others can be added (:meth:`Store.merge_profile`)."""
        return tuple(self.values["metric"].unique())

    def scores(self, metric: str, config: QuantConfig | None = None) -> np.ndarray:
        """One score for each matrix (n,), NaN where there is none.

        Raises
        ------
        LsqError
            When the profile has no such metric.
        """
        config_name = config.name if config else ""
        rows = self.values[
            (self.values["metric"] == metric) & (self.values["config"] == config_name)
        ]
        if rows.empty:
            raise LsqError(f"The profile has no {metric} {config_name}; profile the model again.")
        by_name = dict(zip(rows["module"], rows["value"], strict=True))
        return np.array([by_name.get(m.name, np.nan) for m in self.matrices], dtype=float)

    def by_config(self, metric: str, ladder: Sequence[QuantConfig] = LADDER) -> np.ndarray:
        """Scores of a metric at every stop, (n, stops); NaN where a stop cannot be."""
        return np.stack([self.scores(metric, config) for config in ladder], axis=1)


def missing_metrics(found: Profile | None, wanted: Sequence[str] = ()) -> list[str]:
    """The usual metrics and those ``wanted`` that a profile hasn't, in the order of measuring.

    A profile lacks some while it is being measured, and where that was cut short.
    """
    held = found.metrics if found else ()
    return [m for m in METRICS if m in {*DEFAULT_METRICS, *wanted} and m not in held]
