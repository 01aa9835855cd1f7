"""Settings shared by quantizers and profiles."""

from __future__ import annotations

from dataclasses import dataclass

from lsq_core.bits import METADATA_FORMATS
from lsq_core.errors import InputError


@dataclass(frozen=True)
class GridSettings:
    """How weights are grouped, and how scale and zero point are stored.

    ``axis`` 1 groups along rows, and 0 down columns; ``metadata`` is one of
    :data:`lsq_core.bits.METADATA_FORMATS`.

    Raises
    ------
    InputError
        If there is no such axis or format.
    """

    axis: int = 1
    metadata: str = "8bit"

    def __post_init__(self) -> None:
        if self.axis not in (0, 1):
            raise InputError(f"The grouping axis is 0 or 1, not {self.axis}.")
        if self.metadata not in METADATA_FORMATS:
            raise InputError(f"'{self.metadata}' is not a metadata format; choose 8bit or fp16.")


@dataclass(frozen=True)
class CalibrationSettings:
    """The calibration text, and how much of it is used (method §2).

    ``samples`` texts are drawn from ``corpus`` with ``seed`` and cut to blocks of
    ``block_tokens`` tokens.
    """

    corpus: str = "stdlib"
    samples: int = 128
    block_tokens: int = 512
    seed: int = 42
