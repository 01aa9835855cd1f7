"""What a planner is given and what it is asked: no torch, no store, no model in memory."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from lsq_core.bits import LADDER, Config, MixedRows, matrix_bytes, nominal_bytes
from lsq_core.errors import InputError
from lsq_core.model.info import Matrix
from lsq_core.quantization.registry import planned_bytes
from lsq_core.units import format_bytes

#: Budgets are typed with few digits; a plan that exceeds one by less than this is within it.
TOLERANCE = 1e-9


@dataclass(frozen=True, eq=False)
class Interactions:
    """How the ratios in one decoder block act on a loss, alone and together (M of method §7).

    ``units`` are what shares a ratio, as indices of matrices: single ones, or the experts of one
    module type. ``matrix`` is (u·r, u·r), the options of a unit side by side; the loss that it
    predicts of a one-hot δ is ½·δᵀMδ. None where only row scores were asked for.
    """

    layer: int
    units: tuple[tuple[int, ...], ...]
    matrix: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Impact:
    """What is known of a model's rows, for planning them at two widths.

    ``row_scores`` holds the mean squared gradient of each output row, (out,), in the order of the
    matrices.
    """

    row_scores: tuple[np.ndarray, ...]
    blocks: tuple[Interactions, ...]
    #: What tells it from another, where it is remembered by that.
    mark: str = ""


@dataclass(frozen=True, eq=False)
class Problem:
    """The matrices of a model, what each can be given, and what has been measured of them.

    ``scores`` maps a metric to (n,) figures, ``by_config`` to (n, 12), both in the order of
    ``matrices`` and NaN where there is none. A choice (n,) holds indices into ``options``; on the
    ladder they are called stops.
    """

    matrices: tuple[Matrix, ...]
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    by_config: dict[str, np.ndarray] = field(default_factory=dict)
    #: First and last option that pins allow each matrix, int64 (n,); None without pins.
    pinned_low: np.ndarray | None = None
    pinned_high: np.ndarray | None = None
    #: From few bits to many.
    options: tuple[Config, ...] = LADDER
    impact: Impact | None = None

    def with_options(self, options: tuple[Config, ...]) -> Problem:
        """The same with other options; pins are of the options that they were made with."""
        if options == self.options:
            return self
        return replace(self, options=options, pinned_low=None, pinned_high=None)

    @cached_property
    def low(self) -> np.ndarray:
        """The lowest stop that may be chosen for each matrix, int64 (n,)."""
        if self.pinned_low is not None:
            return self.pinned_low
        return np.zeros(len(self.matrices), dtype=np.int64)

    @cached_property
    def high(self) -> np.ndarray:
        """The highest stop that may be chosen for each matrix, int64 (n,)."""
        if self.pinned_high is not None:
            return self.pinned_high
        return np.full(len(self.matrices), len(self.options) - 1)

    @cached_property
    def numel(self) -> np.ndarray:
        """Weights of each matrix, int64 (n,)."""
        return np.array([m.numel for m in self.matrices], dtype=np.int64)

    @cached_property
    def allowed(self) -> np.ndarray:
        """Whether an option's groups fill a matrix and pins allow it, bool (n, options)."""
        fills = np.array([[c.fits(m) for c in self.options] for m in self.matrices])
        stops = np.arange(len(self.options))
        return fills & (stops >= self.low[:, None]) & (stops <= self.high[:, None])

    @cached_property
    def bytes(self) -> np.ndarray:
        """Nominal bytes of each option, float64 (n, options)."""
        return np.array(
            [[matrix_bytes(nominal_bytes, m, c) for c in self.options] for m in self.matrices]
        )

    def planned(self, metadata: str) -> list[list[int]]:
        """Bytes of each option in this project's packing, (n, options)."""
        shapes = [m.shape for m in self.matrices]
        sizes = {
            shape: [planned_bytes("hqq", shape, option, metadata) for option in self.options]
            for shape in set(shapes)
        }
        return [sizes[shape] for shape in shapes]

    @property
    def total(self) -> int:
        """Weights of all matrices together."""
        return int(self.numel.sum())

    def nominal(self, choice: np.ndarray) -> float:
        """Nominal bytes of a choice of stops (n,)."""
        return float(self.bytes[np.arange(len(choice)), choice].sum())

    def check_allowed(self, choice: np.ndarray) -> None:
        """Raise :class:`InputError` naming the first matrix that its stop's groups don't fill."""
        for matrix, stop in zip(self.matrices, choice, strict=True):
            if not self.options[stop].fits(matrix):
                raise InputError(
                    f"{matrix.name} ({matrix.out_features}×{matrix.in_features}) cannot be cut "
                    f"into groups of {self.options[stop].group_size}; choose one with a smaller "
                    "group size, or mxq, which gives each matrix one that fits."
                )

    def check_options(self) -> None:
        """Raise :class:`InputError` naming the first matrix that no option's groups fill."""
        for matrix, allowed in zip(self.matrices, self.allowed, strict=True):
            if not allowed.any():
                sizes = sorted({option.group_size for option in self.options}, reverse=True)
                what = "rows" if isinstance(self.options[0], MixedRows) else "weights"
                raise InputError(
                    f"{matrix.name} ({matrix.out_features}×{matrix.in_features}) has {what} "
                    f"that cannot be cut into groups of {', '.join(map(str, sizes))}; choose a "
                    "smaller group size."
                )

    @property
    def feasible(self) -> tuple[float, float]:
        """Nominal bytes of the smallest and the largest plan.

        Raises
        ------
        InputError
            When there is none, because no option's groups fill some matrix.
        """
        self.check_options()
        smallest = np.where(self.allowed, self.bytes, np.inf).min(axis=1).sum()
        largest = np.where(self.allowed, self.bytes, -np.inf).max(axis=1).sum()
        return float(smallest), float(largest)

    def format_size(self, nominal: float) -> str:
        """Bytes of the linear weights as people read them: ``3.18 bpp (9.02 MiB)``."""
        return f"{8 * nominal / self.total:.4g} bpp ({format_bytes(nominal)})"
