"""A plan: one configuration for each matrix, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property

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


@dataclass(frozen=True, eq=False)
class Plan:
    """One configuration for each matrix, and why.

    ``reasons`` holds, for each matrix that was moved from its base, what ranked it (its z-score;
    for an ablation the order of the draw).
    """

    request: PlanRequest
    matrices: tuple[Matrix, ...]
    configs: tuple[Config, ...]
    metadata: str = "8bit"
    axis: int = 1
    base: str | None = None
    ranking_scores: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    #: Bytes of what plans don't touch, in the checkpoint's dtype.
    other_bytes: int = 0
    #: A knapsack's cost of this plan, and what no plan within the budget can cost less than.
    objective: float | None = None
    lower_bound: float | None = None
    #: Whose storage the planned bytes are of.
    quantizer: str = "hqq"
    #: The text that its rows were scored on or that its quantizer reads, by its settings' names.
    calibration: dict | None = None
    #: The id of the profile that it was made from, None where its method needs none.
    profile: str | None = None
    #: The high-impact rows of each matrix that has mixed rows, by its name.
    rows: dict[str, tuple[int, ...]] = field(default_factory=dict)

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
        """Weights of all planned matrices."""
        return sum(m.numel for m in self.matrices)

    @cached_property
    def nominal_bytes(self) -> float:
        """Bytes of the linear weights by the papers' formula."""
        return self._sum_bytes(nominal_bytes)

    @property
    def bits_per_param(self) -> float:
        """Nominal bits per planned parameter, metadata included."""
        return 8 * self.nominal_bytes / self.parameters

    @cached_property
    def weight_only_bits(self) -> float:
        """Bits per planned parameter of the codes alone."""
        index = sum(c.index_bytes(m) for m, c in self.choice.items())
        return 8 * (self._sum_bytes(weight_only_bytes) - index) / self.parameters

    @cached_property
    def bits_with_fp16_metadata(self) -> float:
        """Bits per planned parameter if scale and zero stayed fp16."""
        return 8 * self._sum_bytes(fp16_metadata_bytes) / self.parameters

    @cached_property
    def planned_bytes(self) -> int:
        """What the quantizer will store for the linear weights, exactly."""
        return sum(
            planned_bytes(self.quantizer, m.shape, c, self.metadata) for m, c in self.choice.items()
        )

    @property
    def model_bytes(self) -> int:
        """The whole model: planned bytes, and the rest in the checkpoint's dtype."""
        return self.planned_bytes + self.other_bytes

    @property
    def modules(self) -> dict[str, dict]:
        """Full module name to its configuration, as the command line prints it."""
        return {
            m.name: c.json_fields
            | {"config": c.name, "layer": m.layer, "type": m.type}
            | ({"rows": encode_rows(self.rows[m.name], m)} if m.name in self.rows else {})
            for m, c in self.choice.items()
        }

    def summary(self) -> dict:
        """Method and every account of its size, by the names the command line prints."""
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
        """What only a knapsack's plan has: its cost, the certified bound and the relative gap."""
        if self.objective is None:
            return {}
        gap = (self.objective - self.lower_bound) / abs(self.objective) if self.objective else 0.0
        return {"objective": self.objective, "lower_bound": self.lower_bound, "gap": gap}

    def to_json(self) -> dict:
        """Everything needed to apply the plan again; :meth:`from_json` reads it."""
        definition = {"request": asdict(self.request), "modules": self.modules}
        return self.summary() | {"calibration": self.calibration} | definition

    @classmethod
    def from_json(cls, content: dict, matrices: tuple[Matrix, ...], other_bytes: int) -> Plan:
        """A saved plan for the model that these matrices belong to.

        Raises
        ------
        InputError
            When it is not a plan, or one for another model; see
            :func:`lsq_core.planning.saved.read_plan`.
        """
        saved = read_plan(content, matrices)
        return cls(matrices=matrices, other_bytes=other_bytes, **vars(saved))
