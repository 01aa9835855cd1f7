"""Quantization configurations, the ladders of configurations, and their sizes.

Three kinds of size that must never be mixed (method §1):

* **nominal** - the papers' formula; every budget in bits per parameter refers to it;
* **planned bytes** - the exact size of a matrix as a quantizer stores it
  (:func:`lsq_core.quantization.registry.planned_bytes`);
* **measured bytes** - the size of the tensors actually stored, which must equal the planned bytes.

A matrix has one :class:`QuantConfig`, or :class:`MixedRows`: one configuration for its high-impact
rows and another for the rest (method §7).

The papers plan on a ladder of twelve configurations. The extended ladder adds 1, 5 and 6 bits: the
papers' ladder has nothing between 4.51 and 8.13 bits per parameter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import ceil, floor, inf
from typing import Any, Protocol

from lsq_core.errors import InputError, choose
from lsq_core.units import BYTE_UNITS

#: How scale and zero are stored: as 8-bit codes in groups of 128, or unquantized in fp16.
METADATA_FORMATS = ("8bit", "fp16")
#: The ``bits`` of weights left unquantized in fp16, without scale and zero.
FP16_BITS = 16


class HasShape(Protocol):
    """An object with the shape of a matrix."""

    out_features: int
    in_features: int


@dataclass(frozen=True, order=True)
class QuantConfig:
    """Weight bits, weight group size, metadata bits, metadata group size: ``(b1, g1, b2, g2)``."""

    bits: int
    group_size: int
    meta_bits: int = 8
    meta_group_size: int = 128

    @property
    def name(self) -> str:
        """The name shown and typed by users: ``b3g128``."""
        return f"b{self.bits}g{self.group_size}"

    @property
    def nominal_bits(self) -> float:
        """Bits per parameter by the papers' formula: ``b1 + 2·b2/g1 + 32/(g1·g2)``.

        >>> QuantConfig(3, 128).nominal_bits
        3.126953125
        """
        if self.bits == FP16_BITS:
            return float(FP16_BITS)
        g1, g2 = self.group_size, self.meta_group_size
        return self.bits + 2 * self.meta_bits / g1 + 32 / (g1 * g2)

    @property
    def bits_with_fp16_metadata(self) -> float:
        """Bits per parameter with scale and zero stored in fp16, as in ``hqq`` 0.2.8."""
        return self.bits if self.bits == FP16_BITS else self.bits + 32 / self.group_size

    def parts(self, shape: HasShape) -> tuple[tuple[int, QuantConfig], ...]:
        """Return the parts of a matrix as (weights, configuration); here a single part."""
        return ((shape.out_features * shape.in_features, self),)

    def index_bytes(self, shape: HasShape) -> int:
        """Return the size of the row index: 0, since all rows are alike."""
        return 0

    def fits(self, shape: HasShape) -> bool:
        """Return whether groups fill a matrix without padding."""
        return is_divisible(shape.out_features * shape.in_features, self.group_size)

    @property
    def json_fields(self) -> dict[str, float]:
        """The fields stored in a plan's JSON in addition to the name."""
        return {"bits": self.bits, "group_size": self.group_size}

    @property
    def stop_name(self) -> str:
        """The name of its ladder stop: the nominal bits with two decimals, ``3.13``."""
        return f"{self.nominal_bits:.2f}"

    @classmethod
    def parse(cls, text: str) -> QuantConfig:
        """Parse a name such as ``b3g128``.

        Raises
        ------
        InputError
            If the text does not have that form or names no configuration of any ladder.
        """
        for config in EXTENDED_LADDER:
            if config.name == text.strip():
                return config
        raise InputError(
            f"'{text}' is not a configuration; write bits and group size as one of "
            f"{', '.join(c.name for c in EXTENDED_LADDER)}."
        )


GROUP_SIZES = (128, 64, 32)


def _ladder(widths: tuple[int, ...]) -> tuple[QuantConfig, ...]:
    """Return every width with every group size, in ascending bits per parameter."""
    return tuple(QuantConfig(bits, group) for bits in widths for group in GROUP_SIZES)


#: The papers' twelve stops, two to eight bits, larger groups first (method §1).
LADDER = _ladder((2, 3, 4, 8))
#: The same plus the other widths supported by ``hqq``, except 1.58 bits: three-valued codes don't
#: take a whole number of bits.
EXTENDED_LADDER = _ladder((1, 2, 3, 4, 5, 6, 8))
#: Names of the ladders in settings and on the command line; the papers' is the default.
PAPER, EXTENDED = "paper", "extended"
LADDERS = {PAPER: LADDER, EXTENDED: EXTENDED_LADDER}


def get_ladder(name: str) -> tuple[QuantConfig, ...]:
    """Return the ladder with this name.

    Raises
    ------
    InputError
        If there is no such ladder.
    """
    return choose(LADDERS, name, "a ladder")


#: The possible fractions of high-impact rows in a matrix ([C]; 𝔹 in method §7).
RATIOS = (0.02, 0.05, 0.10, 0.15, 0.20)
#: Possible bits of the other rows, and of the high-impact rows; 16 leaves the latter in fp16.
LOW_BITS = (2, 3)
HIGH_BITS = (3, 4, FP16_BITS)
#: Largest number of rows whose indices take two bytes each; above it they take four.
_MAX_INT16_ROWS = 2**15


@dataclass(frozen=True, order=True)
class MixedRows:
    """A fraction ``ratio`` of high-impact output rows at ``high_bits``, the rest at ``bits``.

    The index of the high-impact rows is stored with the codes: as a bitmap or a sorted list of row
    numbers, whichever is smaller.
    """

    bits: int
    high_bits: int
    ratio: float
    group_size: int

    @cached_property
    def low(self) -> QuantConfig:
        """The configuration of the other rows."""
        return QuantConfig(self.bits, self.group_size)

    @cached_property
    def high(self) -> QuantConfig:
        """The configuration of the high-impact rows."""
        return QuantConfig(self.high_bits, self.group_size)

    @property
    def name(self) -> str:
        """The name shown and typed by users: ``b2h3r10g128`` has 10 % of the rows at 3 bits."""
        return f"b{self.bits}h{self.high_bits}r{100 * self.ratio:02.0f}g{self.group_size}"

    @property
    def stop_name(self) -> str:
        """The ratio, in which the options of a plan differ: ``10 %``."""
        return f"{100 * self.ratio:.0f} %"

    @property
    def nominal_bits(self) -> float:
        """Bits per parameter of a large matrix, excluding its row index."""
        return (1 - self.ratio) * self.low.nominal_bits + self.ratio * self.high.nominal_bits

    def high_rows(self, out_features: int) -> int:
        """Return the number of high-impact rows among ``out_features``, rounded to nearest."""
        return int(self.ratio * out_features + 0.5)

    def parts(self, shape: HasShape) -> tuple[tuple[int, QuantConfig], ...]:
        """Return the parts of a matrix as (weights, configuration), high-impact rows first."""
        high = self.high_rows(shape.out_features)
        both = ((high, self.high), (shape.out_features - high, self.low))
        return tuple((rows * shape.in_features, config) for rows, config in both if rows)

    def index_bytes(self, shape: HasShape) -> int:
        """Return the size in bytes of the index of high-impact rows.

        >>> from types import SimpleNamespace
        >>> MixedRows(2, 3, 0.02, 128).index_bytes(SimpleNamespace(out_features=4096))
        164
        """
        bitmap, listed = self.index_sizes(shape.out_features)
        return min(bitmap, listed)

    def index_sizes(self, out_features: int) -> tuple[int, int]:
        """Return the bytes of a bitmap of all rows and of a list of the high-impact ones."""
        itemsize = 2 if out_features <= _MAX_INT16_ROWS else 4
        return ceil(out_features / 8), itemsize * self.high_rows(out_features)

    def fits(self, shape: HasShape) -> bool:
        """Return whether groups fill the rows, so that none spans both kinds of rows."""
        return is_divisible(shape.in_features, self.group_size)

    @property
    def json_fields(self) -> dict[str, float]:
        """The fields stored in a plan's JSON in addition to the name."""
        return {
            "bits": self.bits,
            "high_bits": self.high_bits,
            "ratio": self.ratio,
            "group_size": self.group_size,
        }


#: A configuration that can be assigned to a matrix.
Config = QuantConfig | MixedRows


def mixed_rows(low_bits: int, high_bits: int, group_size: int) -> tuple[MixedRows, ...]:
    """Return a matrix's options for two widths, smallest ratio first.

    Raises
    ------
    InputError
        If a width or the group size is not supported.
    """
    above = [bits for bits in HIGH_BITS if bits > low_bits]
    for name, value, offered in (
        ("low-bits", low_bits, LOW_BITS),
        ("high-bits", high_bits, above),
        ("group-size", group_size, GROUP_SIZES),
    ):
        if value not in offered:
            raise InputError(f"{name} must be one of {', '.join(map(str, offered))}, not {value}.")
    return tuple(MixedRows(low_bits, high_bits, ratio, group_size) for ratio in RATIOS)


#: Mixed rows for every pair of widths, group size and ratio.
MIXED_ROW_CONFIGS: tuple[MixedRows, ...] = tuple(
    option
    for low, high, group in product(LOW_BITS, HIGH_BITS, GROUP_SIZES)
    if high > low
    for option in mixed_rows(low, high, group)
)

_MIXED_NAME = r"b([0-9]{1,2})h([0-9]{1,2})r([0-9]{1,3})g([0-9]{1,3})"


def is_mixed(name: str) -> bool:
    """Return whether a configuration name denotes mixed rows."""
    return re.fullmatch(_MIXED_NAME, name) is not None


def config_from_json(entry: Mapping[str, Any]) -> Config:
    """Return the configuration given by a module's entry in a plan's JSON.

    Raises
    ------
    InputError
        If there is no such configuration.
    KeyError
        If the entry lacks the bits, the group size, or the ratio of mixed rows.
    """
    if "high_bits" not in entry:
        return QuantConfig.parse(f"b{entry['bits']}g{entry['group_size']}")
    options = mixed_rows(entry["bits"], entry["high_bits"], entry["group_size"])
    for config in options:
        if config.ratio == entry["ratio"]:
            return config
    ratios = ", ".join(f"{r:g}" for r in RATIOS)
    raise InputError(f"{entry['ratio']} is not a ratio; choose one of {ratios}.")


def parse_config(text: str) -> Config:
    """Parse a configuration's name: ``b3g128`` or ``b2h3r10g128``.

    Raises
    ------
    InputError
        If there is no such configuration.
    """
    match = re.fullmatch(_MIXED_NAME, text.strip())
    if match is None:
        return QuantConfig.parse(text)
    bits, high, percent, group = map(int, match.groups())
    return config_from_json(
        {"bits": bits, "high_bits": high, "ratio": percent / 100, "group_size": group}
    )


#: The configuration whose sensitivity Algorithm 1 uses.
DETECTION_CONFIG = QuantConfig(4, 64)


def stop_index(name: str, ladder: tuple[QuantConfig, ...] = LADDER) -> int:
    """Return the index in a ladder of a stop named like ``3.13`` or ``b3g128``.

    Raises
    ------
    InputError
        If the ladder has no such stop.
    """
    for index, config in enumerate(ladder):
        if name in (config.stop_name, config.name):
            return index
    if any(name in (config.stop_name, config.name) for config in EXTENDED_LADDER):
        raise InputError(f"'{name}' is on the extended ladder; plan with --ladder extended.")
    raise InputError(
        f"'{name}' is not a configuration; choose one of {', '.join(c.stop_name for c in ladder)}."
    )


def is_divisible(numel: int, group_size: int) -> bool:
    """Return whether consecutive groups of ``group_size`` weights fill a matrix without padding."""
    return numel % group_size == 0


def nominal_bytes(numel: int, config: QuantConfig) -> float:
    """Return the bytes of ``numel`` weights by the papers' formula (may be fractional)."""
    return numel * config.nominal_bits / 8


def fp16_metadata_bytes(numel: int, config: QuantConfig) -> float:
    """Return the bytes of a matrix with scale and zero of every group in fp16."""
    return numel * config.bits_with_fp16_metadata / 8


def weight_only_bytes(numel: int, config: QuantConfig) -> float:
    """Return the bytes of the weight codes alone, without metadata."""
    return numel * config.bits / 8


def matrix_bytes(
    count_bytes: Callable[[int, QuantConfig], float], shape: HasShape, config: Config
) -> float:
    """Return the bytes of an entire matrix: its parts and the index of its high-impact rows.

    ``count_bytes`` is one of the functions above: bytes of a number of weights at a configuration.
    """
    parts = sum(count_bytes(numel, part) for numel, part in config.parts(shape))
    return parts + config.index_bytes(shape)


def snap_to_stop(bits: float, ladder: tuple[QuantConfig, ...] = LADDER) -> float:
    """Return the exact size of the stop that rounds to ``bits`` at four decimals, else ``bits``.

    Sizes are shown and typed with at most four decimals, and the rounded size may be below the
    stop.

    >>> snap_to_stop(3.2539)
    3.25390625
    """
    return next((c.nominal_bits for c in ladder if round(c.nominal_bits, 4) == bits), bits)


def find_stop(text: str, ladder: tuple[QuantConfig, ...] = LADDER) -> QuantConfig | None:
    """Return the stop named by ``3.25``, ``3.25bpp`` or ``b3g64``, or None if there is none."""
    name = text.strip().removesuffix("bpp").rstrip()
    return next((c for c in ladder if name in (c.stop_name, c.name)), None)


@dataclass(frozen=True)
class Budget:
    """A size limit for the linear weights, metadata included; one of the two sizes is set.

    A budget in bits per parameter limits the nominal bytes. A budget in bytes limits the planned
    bytes, which the quantizer stores: ``50MiB`` is meant as the actual size in memory.
    """

    text: str
    nominal_bytes: float | None = None
    planned_bytes: float | None = None

    @classmethod
    def parse(cls, text: str, numel: int, ladder: tuple[QuantConfig, ...] = LADDER) -> Budget:
        """Parse ``3.2bpp``, ``9MiB``, ``1.5GiB``, ``800KiB`` or ``9000000B`` for ``numel`` weights.

        The name of a stop of ``ladder`` (``3.25bpp``, ``3.25`` or ``b3g64``) means the exact size
        of that stop, which differs from its two-decimal name by up to 0.004 bits; ``3.250bpp`` is
        a number.

        >>> Budget.parse("3.25bpp", 8).nominal_bytes, Budget.parse("3.250bpp", 8).nominal_bytes
        (3.25390625, 3.25)
        >>> Budget.parse("1.5KiB", 8).planned_bytes
        1536

        Raises
        ------
        InputError
            If the text is not a positive number with one of those units.
        """
        stop = find_stop(text, ladder)
        if stop is not None:
            return cls(text.strip(), nominal_bytes=stop.nominal_bits * numel / 8)
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(bpp|B|KiB|MiB|GiB)\s*", text)
        if not match or float(match[1]) <= 0:
            raise InputError(
                f"'{text}' is not a budget; write bits per parameter as 3.2bpp, a configuration as "
                "3.25, or the bytes of the linear weights as 9MiB or 1.5GiB."
            )
        amount, unit = float(match[1]), match[2]
        if unit == "bpp":
            nominal = snap_to_stop(amount, ladder) * numel / 8
            return cls(text.strip(), nominal_bytes=nominal)
        planned = amount * BYTE_UNITS[unit]
        return cls(text.strip(), planned_bytes=planned if planned == inf else floor(planned))
