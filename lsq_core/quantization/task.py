"""A model to quantize, and what a quantizer of whole models is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

from torch import nn

from lsq_core.bits import Config
from lsq_core.model.info import Matrix
from lsq_core.model.loading import LoadedModel
from lsq_core.progress import Progress, no_progress
from lsq_core.quantization.base import HighImpactRows, StoredMatrix
from lsq_core.quantization.cache import PackedMatrixCache
from lsq_core.settings import CalibrationSettings, GridSettings


@dataclass(frozen=True, eq=False)
class QuantizationTask:
    """What a quantizer needs to quantize a model.

    ``choice`` has the configuration of each matrix, and ``rows`` the high-impact rows of those
    that mix two. ``text`` is read by calibrated quantizers alone. One that takes long keeps what
    it has so far in ``folder``, which is for this task alone, and resumes from there; the
    ``cache`` counts the seconds that this saves, and holds the matrices of other plans of this
    very model.
    """

    loaded: LoadedModel
    choice: Mapping[Matrix, Config]
    grid: GridSettings
    text: CalibrationSettings = field(default_factory=CalibrationSettings)
    rows: HighImpactRows = field(default_factory=dict)
    progress: Progress = no_progress
    cache: PackedMatrixCache = field(default_factory=lambda: PackedMatrixCache(0))
    folder: Path | None = None


class ModelQuantizer(Protocol):
    """A quantizer that works on the whole model: one file, and one entry in ``QUANTIZERS``."""

    #: What it stores a matrix as that has one configuration.
    matrix: ClassVar[type[StoredMatrix]]

    def quantize_model(self, task: QuantizationTask) -> nn.Module:
        """A quantized copy of the task's model; the original stays as it was.

        Raises
        ------
        InputError, LsqError
            When the model or the text cannot be taken.
        """
        ...
