"""Quantization configurations, the ladder of twelve stops, and the accounts of what they store.

Three figures that must never be mixed (method §1):

* **nominal** - the papers' formula; every budget in bits per parameter means this;
* **planned bytes** - what this project's packing occupies, exactly, per matrix;
* **measured bytes** - the bytes of the tensors that were really stored, which must equal it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import ceil

from lsq_core.errors import InputError

#: How scale and zero are stored: 8-bit codes in groups of 128, or fp16 as they are.
METADATA_FORMATS = ("8bit", "fp16")

MIB = 2**20
GIB = 2**30
_UNITS = {"B": 1, "KiB": 1024, "MiB": MIB, "GiB": GIB}


@dataclass(frozen=True, order=True)
class QuantConfig:
    """Weight bits, weight group size, metadata bits, metadata group size: ``(b1, g1, b2, g2)``."""

    bits: int
    group_size: int
    meta_bits: int = 8
    meta_group_size: int = 128

    @property
    def name(self) -> str:
        """How a person types and reads it: ``b3g128``."""
        return f"b{self.bits}g{self.group_size}"

    @property
    def nominal_bits(self) -> float:
        """Bits per parameter by the papers' formula: ``b1 + 2·b2/g1 + 32/(g1·g2)``.

        >>> QuantConfig(3, 128).nominal_bits
        3.126953125
        """
        g1, g2 = self.group_size, self.meta_group_size
        return self.bits + 2 * self.meta_bits / g1 + 32 / (g1 * g2)

    @property
    def bits_with_fp16_metadata(self) -> float:
        """Bits per parameter when scale and zero stay fp16, as ``hqq`` 0.2.8 keeps them."""
        return self.bits + 32 / self.group_size

    @property
    def stop_name(self) -> str:
        """The ladder's name for it: the nominal bits with two decimals, ``3.13``."""
        return f"{self.nominal_bits:.2f}"

    @classmethod
    def parse(cls, text: str) -> QuantConfig:
        """Read ``b3g128``.

        Raises
        ------
        InputError
            When the text is not of that form or is no stop of the ladder.
        """
        match = re.fullmatch(r"b(\d+)g(\d+)", text.strip())
        config = cls(int(match[1]), int(match[2])) if match else None
        if config not in LADDER:
            raise InputError(
                f"'{text}' is not a configuration; write bits and group size as one of "
                f"{', '.join(c.name for c in LADDER)}."
            )
        return config


#: Twelve stops, two to eight bits, the coarser group first (method §1).
LADDER: tuple[QuantConfig, ...] = tuple(
    QuantConfig(bits, group) for bits in (2, 3, 4, 8) for group in (128, 64, 32)
)

#: The configuration at which Algorithm 1 reads sensitivity.
DETECTION_CONFIG = QuantConfig(4, 64)


def stop_index(name: str) -> int:
    """The ladder index (0 to 11) of a stop named ``3.13`` or ``b3g128``.

    Raises
    ------
    InputError
        When there is no such stop.
    """
    for index, config in enumerate(LADDER):
        if name in (config.stop_name, config.name):
            return index
    raise InputError(
        f"'{name}' is not a stop of the ladder; choose one of "
        f"{', '.join(c.stop_name for c in LADDER)}."
    )


def divides(numel: int, group_size: int) -> bool:
    """Whether groups of ``group_size`` weights, taken in order, fill a matrix without padding."""
    return numel % group_size == 0


def nominal_bytes(numel: int, config: QuantConfig) -> float:
    """Bytes of a matrix of ``numel`` weights by the papers' formula (may be a fraction)."""
    return numel * config.nominal_bits / 8


def fp16_metadata_bytes(numel: int, config: QuantConfig) -> float:
    """Bytes of a matrix if every group kept scale and zero as fp16."""
    return numel * config.bits_with_fp16_metadata / 8


def weight_only_bytes(numel: int, config: QuantConfig) -> float:
    """Bytes of the weight codes alone, without any metadata."""
    return numel * config.bits / 8


def planned_bytes(numel: int, config: QuantConfig, metadata: str = "8bit") -> int:
    """Bytes that our packing stores for a matrix: codes, scale, zero and their own ranges.

    The 8-bit format keeps one code for scale and one for zero per group, and one fp16 pair for
    each of them per metadata group, the last of which may be short. A bias is not counted.

    Raises
    ------
    InputError
        When the metadata format is unknown.
    """
    groups = ceil(numel / config.group_size)
    codes = ceil(numel * config.bits / 8)
    if metadata == "fp16":
        return codes + 4 * groups
    if metadata == "8bit":
        return codes + 2 * groups + 8 * ceil(groups / config.meta_group_size)
    raise InputError(f"'{metadata}' is not a metadata format; choose 8bit or fp16.")


@dataclass(frozen=True)
class Budget:
    """What may be spent on the planned linear weights, in nominal bytes (metadata included)."""

    nominal_bytes: float
    text: str

    @classmethod
    def parse(cls, text: str, numel: int) -> Budget:
        """Read ``3.2bpp``, ``9MiB``, ``1.5GiB``, ``800KiB``, ``9000000B`` for ``numel`` weights.

        Raises
        ------
        InputError
            When it is not a positive number with one of those units.
        """
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(bpp|B|KiB|MiB|GiB)\s*", text)
        if not match or float(match[1]) <= 0:
            raise InputError(
                f"'{text}' is not a budget; write bits per parameter as 3.2bpp, or the bytes of "
                "the linear weights as 9MiB or 1.5GiB."
            )
        amount, unit = float(match[1]), match[2]
        if unit == "bpp":
            return cls(amount * numel / 8, text.strip())
        return cls(amount * _UNITS[unit], text.strip())


def parse_bytes(text: str) -> int:
    """Read ``512MiB`` or ``2GiB``; ``0B`` is none.

    Raises
    ------
    InputError
        When it is not a number with a unit of bytes.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(B|KiB|MiB|GiB)\s*", text)
    if not match:
        raise InputError(f"'{text}' is not an amount of memory; write 512MiB or 2GiB.")
    return int(float(match[1]) * _UNITS[match[2]])


def format_bytes(count: float) -> str:
    """``9437184`` as ``9.00 MiB``: binary units, three significant figures or so."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", 1024)):
        if abs(count) >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"
