"""A profile: the scores of every matrix of a model, with their provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lsq_core.bits import QuantConfig, get_ladder
from lsq_core.errors import LsqError
from lsq_core.model.info import Matrix
from lsq_core.profiling.metrics import METRICS, default_metrics
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.table import short_table

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Profile:
    """All scores of one model under one :class:`ProfileSettings`.

    ``values`` has one row per score, with columns ``module, layer, type, metric, config, part,
    value``; ``config`` is '' for scores that do not depend on a configuration.
    """

    id: str
    fingerprint: str
    settings: ProfileSettings
    matrices: tuple[Matrix, ...]
    values: pd.DataFrame
    provenance: dict = field(default_factory=dict)

    def __repr__(self) -> str:
        return short_table(
            f"Profile {self.id} of {len(self.matrices)} matrices",
            {
                "metrics": ", ".join(self.metrics),
                "quantizer": f"{self.settings.quantizer}, axis {self.settings.axis}, "
                f"{self.settings.metadata} metadata",
                "calibration": f"{self.settings.calibration}, {self.settings.samples} samples, "
                f"blocks of {self.settings.block_tokens} tokens",
            },
        )

    def to_frame(self) -> pd.DataFrame:
        """Return ``module, layer, type, metric, config, part, value``, one row per score."""
        return self.values.copy()

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics in the profile; others can be added (:meth:`Store.merge_profile`)."""
        return tuple(self.values["metric"].unique())

    def scores(self, metric: str, config: QuantConfig | None = None) -> np.ndarray:
        """Return one score per matrix (n,), NaN where missing.

        Raises
        ------
        LsqError
            If the profile has no scores for this metric and configuration.
        """
        config_name = config.name if config else ""
        rows = self.values[
            (self.values["metric"] == metric) & (self.values["config"] == config_name)
        ]
        if rows.empty:
            raise LsqError(f"The profile has no {metric} {config_name}; profile the model again.")
        by_name = dict(zip(rows["module"], rows["value"], strict=True))
        return np.array([by_name.get(m.name, np.nan) for m in self.matrices], dtype=float)

    @property
    def ladder(self) -> tuple[QuantConfig, ...]:
        """The profile's ladder; its quantizer may not support every configuration."""
        return get_ladder(self.settings.ladder)

    def by_config(self, metric: str, ladder: Sequence[QuantConfig] | None = None) -> np.ndarray:
        """Return a metric's scores at every configuration, (n, ladder); NaN where missing.

        ``ladder`` defaults to the profile's own.
        """
        configs = self.ladder if ladder is None else ladder
        return np.stack([self.scores(metric, config) for config in configs], axis=1)


def join_layers(parts: Sequence[Profile]) -> Profile:
    """Join profiles that hold the same metrics for different layers, given in layer order.

    The provenance is that of the first, with the total seconds of all.
    """
    import pandas as pd

    seconds = sum(part.provenance["seconds"] for part in parts)
    return replace(
        parts[0],
        values=pd.concat([part.values for part in parts], ignore_index=True),
        provenance=parts[0].provenance | {"seconds": seconds},
    )


def current_scores(values: pd.DataFrame, provenance: Mapping[str, Any]) -> pd.DataFrame:
    """Return the stored scores whose metric definition has not changed since.

    A profile lacks a metric whose definition has changed until it is measured again: scores under
    two definitions must not be compared or combined in a plan.
    """
    outdated = [m for m in values["metric"].unique() if not is_current(m, provenance)]
    return values[~values["metric"].isin(outdated)].reset_index(drop=True)


def is_current(metric: str, provenance: Mapping[str, Any]) -> bool:
    """Return whether a metric's definition is the one that a profile was measured with."""
    recorded = metric_provenance(metric, provenance).get("definitions", {}).get(metric, "")
    return metric not in METRICS or recorded == METRICS[metric].definition


def metric_provenance(metric: str, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return the provenance of one metric, extracted from that of its profile."""
    facts = provenance.get("added", {}).get(metric, provenance)
    return {name: fact for name, fact in facts.items() if name != "added"}


def missing_metrics(found: Profile | None, wanted: Sequence[str] = ()) -> list[str]:
    """Return the default and the ``wanted`` metrics that a profile lacks, in measuring order.

    A profile may lack default metrics while it is being measured or if that was interrupted.
    """
    held = found.metrics if found else ()
    return [m for m in METRICS if m in {*default_metrics(), *wanted} and m not in held]
