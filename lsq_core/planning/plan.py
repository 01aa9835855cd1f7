"""A plan: one configuration for each matrix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from lsq_core.bits import (
    Config,
    fp16_metadata_bytes,
    matrix_bytes,
    nominal_bytes,
    weight_only_bytes,
)
from lsq_core.model.info import Matrix
from lsq_core.planning.request import PlanRequest
from lsq_core.planning.saved import encode_rows, read_plan
from lsq_core.quantization.registry import planned_bytes
from lsq_core.table import short_table
from lsq_core.units import format_bytes

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False)
class Plan:
    """One configuration for each matrix.

    ``ranking_scores`` holds, for each matrix that was promoted from the base, the score that
    ranked it: Algorithm 1's z-score, a standard score, or for an ablation the order of the draw.
    """

    request: PlanRequest
    matrices: tuple[Matrix, ...]
    configs: tuple[Config, ...]
    metadata: str = "8bit"
    axis: int = 1
    base: str | None = None
    ranking_scores: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    #: Bytes of the parameters that are not planned, in the checkpoint's dtype.
    other_bytes: int = 0
    #: The plan's cost, and a lower bound on the cost of any plan within the budget; None if the
    #: method minimises no cost.
    objective: float | None = None
    lower_bound: float | None = None
    #: The quantizer whose storage format the planned bytes refer to.
    quantizer: str = "hqq"
    #: Settings of the calibration corpus used for row scores or by the quantizer.
    calibration: dict | None = None
    #: The id of the profile that the plan was made from, None if there is none; not in the JSON.
    profile: str | None = None
    #: The high-impact rows of each matrix with mixed rows, by matrix name.
    rows: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def __repr__(self) -> str:
        counts = Counter(config.name for config in self.configs)
        used = ", ".join(f"{count} × {name}" for name, count in sorted(counts.items()))
        return short_table(
            f"Plan by {self.method} for {len(self.matrices)} matrices",
            {
                "base": self.base,
                "budget": self.request.budget,
                "bits per parameter": f"{self.bits_per_param:.4f} nominal, "
                f"{self.bits_with_fp16_metadata:.4f} with fp16 metadata",
                "linear weights": f"{format_bytes(self.planned_bytes)} planned ({self.quantizer})",
                "configurations": used,
                "notes": " ".join(self.notes),
            },
        )

    def to_frame(self) -> pd.DataFrame:
        """Return the plan as a table: ``module, layer, type, config, z``, one row per matrix.

        ``z`` is the score that ranked a matrix that the method promoted, NaN for the others.
        """
        from lsq_core.planning.frame import plan_to_frame

        return plan_to_frame(self.to_json())

    def figure(self) -> go.Figure:
        """Return the plan as a Plotly heatmap of configurations by layer and module type."""
        from lsq_core.charts.plans import plan_heatmap

        return plan_heatmap(self.to_frame())

    @property
    def method(self) -> str:
        """The planner's name."""
        return self.request.method

    @property
    def choice(self) -> dict[Matrix, Config]:
        """The configuration of each matrix."""
        return dict(zip(self.matrices, self.configs, strict=True))

    def _sum_bytes(self, count_bytes: Callable[..., float]) -> float:
        return sum(matrix_bytes(count_bytes, m, c) for m, c in self.choice.items())

    @cached_property
    def parameters(self) -> int:
        """Number of weights in all planned matrices."""
        return sum(m.numel for m in self.matrices)

    @cached_property
    def nominal_bytes(self) -> float:
        """Bytes of the linear weights according to the papers' formula."""
        return self._sum_bytes(nominal_bytes)

    @property
    def bits_per_param(self) -> float:
        """Nominal bits per planned parameter, metadata included."""
        return 8 * self.nominal_bytes / self.parameters

    @cached_property
    def weight_only_bits(self) -> float:
        """Bits per planned parameter for the codes alone."""
        index = sum(c.index_bytes(m) for m, c in self.choice.items())
        return 8 * (self._sum_bytes(weight_only_bytes) - index) / self.parameters

    @cached_property
    def bits_with_fp16_metadata(self) -> float:
        """Bits per planned parameter if scales and zero points stayed in fp16."""
        return 8 * self._sum_bytes(fp16_metadata_bytes) / self.parameters

    @cached_property
    def planned_bytes(self) -> int:
        """Exact bytes that the quantizer will store for the linear weights."""
        return sum(
            planned_bytes(self.quantizer, m.shape, c, self.metadata) for m, c in self.choice.items()
        )

    @property
    def model_bytes(self) -> int:
        """Bytes of the model: the planned bytes plus the rest in the checkpoint's dtype."""
        return self.planned_bytes + self.other_bytes

    @property
    def modules(self) -> dict[str, dict]:
        """The configuration of each module by full name, as printed by the command line."""
        return {
            m.name: c.json_fields
            | {"config": c.name, "layer": m.layer, "type": m.type}
            | ({"rows": encode_rows(self.rows[m.name], m)} if m.name in self.rows else {})
            for m, c in self.choice.items()
        }

    def summary(self) -> dict:
        """Return the method, settings and sizes under the names that the command line prints."""
        return {
            "method": self.method,
            "base": self.base,
            "bits_per_param": self.bits_per_param,
            "weight_only_bits": self.weight_only_bits,
            "bits_with_fp16_metadata": self.bits_with_fp16_metadata,
            "nominal_bytes": self.nominal_bytes,
            "planned_bytes": self.planned_bytes,
            "model_bytes": self.model_bytes,
            "metadata": self.metadata,
            "axis": self.axis,
            "quantizer": self.quantizer,
            "flagged": self.ranking_scores,
            "notes": list(self.notes),
        } | self._knapsack_bounds()

    def _knapsack_bounds(self) -> dict:
        """Return the plan's cost, certified bound and relative gap; empty if it has no cost."""
        if self.objective is None:
            return {}
        gap = (self.objective - self.lower_bound) / abs(self.objective) if self.objective else 0.0
        return {"objective": self.objective, "lower_bound": self.lower_bound, "gap": gap}

    def to_json(self) -> dict:
        """Return everything needed to apply the plan again, for :meth:`from_json`."""
        definition = {"request": self.request.to_json(), "modules": self.modules}
        return self.summary() | {"calibration": self.calibration} | definition

    @classmethod
    def from_json(cls, content: dict, matrices: tuple[Matrix, ...], other_bytes: int) -> Plan:
        """Read a saved plan for the model that these matrices belong to.

        Raises
        ------
        InputError
            If the content is not a plan or is a plan for another model; see
            :func:`lsq_core.planning.saved.read_plan`.
        """
        saved = read_plan(content, matrices)
        return cls(matrices=matrices, other_bytes=other_bytes, **vars(saved))
