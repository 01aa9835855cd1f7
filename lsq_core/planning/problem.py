"""The input of a planner, which needs no torch, no store and no model in memory."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from lsq_core.bits import LADDER, Config, MixedRows, matrix_bytes, nominal_bytes
from lsq_core.errors import InputError
from lsq_core.model.info import Matrix
from lsq_core.planning.ties import merge_groups
from lsq_core.quantization.registry import planned_bytes
from lsq_core.units import format_bytes

#: Relative tolerance for budgets, which are typed with few digits.
TOLERANCE = 1e-9


@dataclass(frozen=True, eq=False)
class Interactions:
    """The effect on a loss of one block's ratios, individually and in pairs (M of method §7).

    Each unit is a tuple of indices of matrices that share a ratio: a single matrix, or the experts
    of one module type. ``matrix`` is M (u·r, u·r), with the options of a unit adjacent; for a
    one-hot δ the predicted loss is ½·δᵀMδ. It is None if only row scores were requested.
    """

    layer: int
    units: tuple[tuple[int, ...], ...]
    matrix: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Impact:
    """Measurements of a model's rows, used to plan rows at two bit widths.

    ``row_scores`` holds, for each matrix, the mean squared gradient of each output row, (out,).
    """

    row_scores: tuple[np.ndarray, ...]
    blocks: tuple[Interactions, ...]
    #: Identifies the measurements in cache keys.
    mark: str = ""


@dataclass(frozen=True, eq=False)
class Refinement:
    """The result of a refinement search within a budget (:mod:`lsq_core.refinement.search`).

    ``cost`` (n, options), in nats per token, is the cost that the best plan minimises within the
    budget, and ``bits_per_param`` is that plan's size. ``kl_start`` and ``kl`` are the KL
    divergences of the initial and the best plan on the calibration text, and ``steps`` is the
    number of steps between them.
    """

    cost: np.ndarray
    bits_per_param: float
    kl_start: float
    kl: float
    steps: int
    #: Identifies the search's last step in cache keys.
    mark: str = ""


@dataclass(frozen=True, eq=False)
class Problem:
    """The matrices of a model, the configurations that each can get, and their scores.

    ``scores`` maps a metric to values (n,) and ``by_config`` to values (n, options), both in the
    order of ``matrices`` with NaN for missing values. If the options are mixed rows, the columns of
    ``by_config`` are still the ladder's configurations. A choice (n,) holds indices of ``options``.
    """

    matrices: tuple[Matrix, ...]
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    by_config: dict[str, np.ndarray] = field(default_factory=dict)
    #: Lowest and highest option that pins allow for each matrix, int64 (n,); None without pins.
    pinned_low: np.ndarray | None = None
    pinned_high: np.ndarray | None = None
    #: Configurations, from fewest bits to most.
    options: tuple[Config, ...] = LADDER
    impact: Impact | None = None
    refinement: Refinement | None = None
    #: Matrices that must get the same option: disjoint groups of two or more indices. Pins allow
    #: the same options for all matrices of a group.
    groups: tuple[tuple[int, ...], ...] = ()
    #: Options that the plan's server supports, bool (n, options), and a clause that states them.
    permitted: np.ndarray | None = None
    permitted_by: str = ""

    def with_options(self, options: tuple[Config, ...]) -> Problem:
        """Return the problem with other options and no restrictions, or itself if they are equal.

        Scores by configuration are reduced to the new options unless these are mixed rows.

        Raises
        ------
        InputError
            If there are scores by configuration, but none for some of the new options.
        """
        if options == self.options:
            return self
        free = {"pinned_low": None, "pinned_high": None, "groups": (), "permitted": None}
        by_config = self._scores_at(options)
        return replace(self, options=options, by_config=by_config, permitted_by="", **free)

    def _scores_at(self, options: tuple[Config, ...]) -> dict[str, np.ndarray]:
        if isinstance(options[0], MixedRows) or not self.by_config:
            return self.by_config
        beyond = [option.name for option in options if option not in self.options]
        if beyond:
            raise InputError(
                f"This profile has no scores at {beyond[0]}, which is on the extended ladder; "
                "measure a profile with that ladder."
            )
        columns = [self.options.index(option) for option in options]
        return {name: table[:, columns] for name, table in self.by_config.items()}

    @cached_property
    def low(self) -> np.ndarray:
        """The lowest option that each matrix may get, int64 (n,)."""
        if self.pinned_low is not None:
            return self.pinned_low
        return np.zeros(len(self.matrices), dtype=np.int64)

    @cached_property
    def high(self) -> np.ndarray:
        """The highest option that each matrix may get, int64 (n,)."""
        if self.pinned_high is not None:
            return self.pinned_high
        return np.full(len(self.matrices), len(self.options) - 1)

    @cached_property
    def numel(self) -> np.ndarray:
        """Number of weights in each matrix, int64 (n,)."""
        return np.array([m.numel for m in self.matrices], dtype=np.int64)

    @cached_property
    def allowed(self) -> np.ndarray:
        """Whether each matrix may get each option, bool (n, options).

        The option's groups must fill the matrix, and pins, the server and all tied matrices must
        allow it.
        """
        fills = np.array([[c.fits(m) for c in self.options] for m in self.matrices])
        stops = np.arange(len(self.options))
        allowed = fills & (stops >= self.low[:, None]) & (stops <= self.high[:, None])
        if self.permitted is not None:
            allowed &= self.permitted
        for group in self.groups:
            allowed[list(group)] = allowed[list(group)].all(axis=0)
        return allowed

    @cached_property
    def items(self) -> np.ndarray:
        """The item of each matrix, int64 (n,).

        Tied matrices form one item; items are ordered by their first matrix.
        """
        first = np.arange(len(self.matrices))
        for group in self.groups:
            first[list(group)] = min(group)
        return np.unique(first, return_inverse=True)[1]

    @property
    def items_if_tied(self) -> np.ndarray | None:
        """The item of each matrix, or None if no matrices are tied."""
        return self.items if self.groups else None

    def sum_items(self, table: np.ndarray) -> np.ndarray:
        """Sum a table (n, options) over the matrices of each item; returns (items, options)."""
        if not self.groups:
            return table
        summed = np.zeros((self.items.max() + 1, table.shape[1]))
        np.add.at(summed, self.items, table)
        return summed

    def first_of_items(self, values: np.ndarray) -> np.ndarray:
        """Return the entry of each item's first matrix in values (n, …)."""
        return values[np.unique(self.items, return_index=True)[1]] if self.groups else values

    def tied_to(self, index: int) -> tuple[int, ...]:
        """Return the indices of all matrices in a matrix's item, including its own."""
        return self._groups_by_matrix.get(index, (index,))

    @cached_property
    def _groups_by_matrix(self) -> dict[int, tuple[int, ...]]:
        return {index: group for group in self.groups for index in group}

    @cached_property
    def tied_types(self) -> tuple[tuple[str, ...], ...]:
        """Module types in order of appearance, grouped if they are tied in some layer."""
        types = list(dict.fromkeys(m.type for m in self.matrices))
        place = {kind: k for k, kind in enumerate(types)}
        tied = {frozenset(place[self.matrices[i].type] for i in group) for group in self.groups}
        merged = merge_groups([*tied, *([k] for k in range(len(types)))])
        return tuple(tuple(types[k] for k in group) for group in merged)

    def at_most(self, stop: int) -> np.ndarray:
        """Return the given option for all matrices, (n,), clipped to what pins allow.

        If a server restricts the problem and the option is not allowed for a matrix, the highest
        allowed option below it is used, if there is one.
        """
        stops = np.clip(stop, self.low, self.high)
        if self.permitted is None:
            return stops
        below = self.allowed & (np.arange(len(self.options)) <= stops[:, None])
        last = len(self.options) - 1 - below[:, ::-1].argmax(axis=1)
        return np.where(below.any(axis=1), last, stops)

    @cached_property
    def bytes(self) -> np.ndarray:
        """Nominal bytes of each option, float64 (n, options)."""
        sizes = {  # a model has few shapes
            m.shape: [matrix_bytes(nominal_bytes, m, c) for c in self.options]
            for m in {m.shape: m for m in self.matrices}.values()
        }
        return np.array([sizes[m.shape] for m in self.matrices])

    def planned(self, metadata: str) -> np.ndarray:
        """Return the bytes of each option in this project's packed format, (n, options)."""
        if metadata not in self._planned:
            shapes = [m.shape for m in self.matrices]
            sizes = {
                shape: [planned_bytes("hqq", shape, option, metadata) for option in self.options]
                for shape in set(shapes)
            }
            self._planned[metadata] = np.array([sizes[shape] for shape in shapes])
        return self._planned[metadata]

    @cached_property
    def _planned(self) -> dict[str, np.ndarray]:
        """Cached planned bytes by metadata format."""
        return {}

    def planned_total(self, choice: np.ndarray, metadata: str) -> int:
        """Return the planned bytes of a choice (n,)."""
        return int(self.planned(metadata)[np.arange(len(choice)), choice].sum())

    @property
    def total(self) -> int:
        """Total number of weights in all matrices."""
        return int(self.numel.sum())

    def nominal(self, choice: np.ndarray) -> float:
        """Return the nominal bytes of a choice (n,)."""
        return float(self.bytes[np.arange(len(choice)), choice].sum())

    def check_allowed(self, choice: np.ndarray) -> None:
        """Raise :class:`InputError` for the first matrix that cannot have its option.

        Either the option's groups don't fill the matrix, or the server doesn't support it.
        """
        for i, (matrix, stop) in enumerate(zip(self.matrices, choice, strict=True)):
            if self.permitted is not None and not self.permitted[i, stop]:
                raise InputError(
                    f"{self.permitted_by}, so {matrix.name} "
                    f"({matrix.out_features}×{matrix.in_features}) cannot have "
                    f"{self.options[stop].name}; choose a base that the server supports for "
                    "every matrix, or a budget."
                )
            if not self.options[stop].fits(matrix):
                raise InputError(
                    f"{matrix.name} ({matrix.out_features}×{matrix.in_features}) cannot be cut "
                    f"into groups of {self.options[stop].group_size}; choose one with a smaller "
                    "group size, or mxq, which gives each matrix one that fits."
                )

    def check_options(self) -> None:
        """Raise :class:`InputError` for the first matrix without an allowed option."""
        for i, (matrix, allowed) in enumerate(zip(self.matrices, self.allowed, strict=True)):
            if not allowed.any():
                if self.permitted is not None or len(self.tied_to(i)) > 1:
                    raise InputError(self._nothing_in_common(i))
                sizes = sorted({option.group_size for option in self.options}, reverse=True)
                what = "rows" if isinstance(self.options[0], MixedRows) else "weights"
                raise InputError(
                    f"{matrix.name} ({matrix.out_features}×{matrix.in_features}) has {what} "
                    f"that cannot be divided into groups of {', '.join(map(str, sizes))}; choose a "
                    "smaller group size."
                )

    def _nothing_in_common(self, index: int) -> str:
        """Return an error message for a matrix left without an option by ties or a server."""
        matrix, others = self.matrices[index], [j for j in self.tied_to(index) if j != index]
        tied = f", tied to {self.matrices[others[0]].name}," if others else ""
        return (
            f"{matrix.name} ({matrix.out_features}×{matrix.in_features}){tied} has no "
            "configuration left"
            + (f": {self.permitted_by}" if self.permitted_by else " that fits both")
            + "; drop the tie, the server or a pin."
        )

    @property
    def feasible(self) -> tuple[float, float]:
        """Nominal bytes of the smallest and the largest plan.

        Raises
        ------
        InputError
            If there is no plan because some matrix has no allowed option.
        """
        self.check_options()
        smallest = np.where(self.allowed, self.bytes, np.inf).min(axis=1).sum()
        largest = np.where(self.allowed, self.bytes, -np.inf).max(axis=1).sum()
        return float(smallest), float(largest)

    def feasible_planned(self, metadata: str) -> tuple[int, int]:
        """Return the planned bytes of the smallest and the largest plan.

        Raises
        ------
        InputError
            As for :attr:`feasible`.
        """
        self.check_options()
        stored = self.planned(metadata)
        smallest = np.where(self.allowed, stored, np.inf).min(axis=1).sum()
        largest = np.where(self.allowed, stored, -np.inf).max(axis=1).sum()
        return int(smallest), int(largest)

    def format_size(self, nominal: float) -> str:
        """Format nominal bytes of the linear weights: ``3.18 bpp (9.02 MiB)``."""
        return f"{8 * nominal / self.total:.4g} bpp ({format_bytes(nominal)})"
