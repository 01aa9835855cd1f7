"""A profile: every metric of every matrix of a model, with its provenance."""

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
    """Every score of one model under one :class:`ProfileSettings`.

    ``values`` has a row per score: ``module, layer, type, metric, config, part, value``;
    ``config`` is '' for a score that depends on no configuration.
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
        """Every score: ``module, layer, type, metric, config, part, value``, a row for each."""
        return self.values.copy()

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics it holds; others can be added (:meth:`Store.merge_profile`)."""
        return tuple(self.values["metric"].unique())

    def scores(self, metric: str, config: QuantConfig | None = None) -> np.ndarray:
        """Return one score per matrix (n,), NaN for a missing one.

        Raises
        ------
        LsqError
            If the profile has no such metric.
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
        """The ladder that it is of; its quantizer may lack some of the configurations."""
        return get_ladder(self.settings.ladder)

    def by_config(self, metric: str, ladder: Sequence[QuantConfig] | None = None) -> np.ndarray:
        """Return a metric's scores at every configuration, (n, ladder); NaN for a missing one.

        ``ladder`` is the profile's own if not given.
        """
        configs = self.ladder if ladder is None else ladder
        return np.stack([self.scores(metric, config) for config in configs], axis=1)


def join_layers(parts: Sequence[Profile]) -> Profile:
    """Return one profile of parts that hold the same metrics, each of other layers, in order.

    Its provenance is that of the first, with the seconds of all.
    """
    import pandas as pd

    seconds = sum(part.provenance["seconds"] for part in parts)
    return replace(
        parts[0],
        values=pd.concat([part.values for part in parts], ignore_index=True),
        provenance=parts[0].provenance | {"seconds": seconds},
    )


def current_scores(values: pd.DataFrame, provenance: Mapping[str, Any]) -> pd.DataFrame:
    """Return the scores of stored ones whose metric is still defined as it was then.

    A metric that is defined otherwise now is one that the profile lacks, until it is measured
    again: scores by two definitions are not to be compared, and no plan is to be made from both.
    """
    outdated = [m for m in values["metric"].unique() if not is_current(m, provenance)]
    return values[~values["metric"].isin(outdated)].reset_index(drop=True)


def is_current(metric: str, provenance: Mapping[str, Any]) -> bool:
    """Return whether a metric is defined as it was when a profile's scores were measured."""
    recorded = metric_provenance(metric, provenance).get("definitions", {}).get(metric, "")
    return metric not in METRICS or recorded == METRICS[metric].definition


def metric_provenance(metric: str, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return how one metric of a profile was measured, from the provenance of the profile."""
    facts = provenance.get("added", {}).get(metric, provenance)
    return {name: fact for name, fact in facts.items() if name != "added"}


def missing_metrics(found: Profile | None, wanted: Sequence[str] = ()) -> list[str]:
    """Return the default and the ``wanted`` metrics that a profile lacks, in measuring order.

    A profile lacks some while it is being measured, or if that was interrupted.
    """
    held = found.metrics if found else ()
    return [m for m in METRICS if m in {*default_metrics(), *wanted} and m not in held]
