"""A quantization task, and the interface of quantizers that work on a complete model."""

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
    """A model and how to quantize it.

    Parameters
    ----------
    choice
        The configuration of each matrix to quantize.
    calibration
        The calibration text; only calibrated quantizers use it.
    rows
        The high-impact rows of each matrix whose configuration mixes two widths, by matrix name.
    cache
        Matrices quantized for other plans of the same model. It also counts the seconds saved by
        resuming.
    folder
        Folder in which a slow quantizer saves checkpoints to resume from; None for no checkpoints.
    """

    loaded: LoadedModel
    choice: Mapping[Matrix, Config]
    grid: GridSettings = field(default_factory=GridSettings)
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    rows: HighImpactRows = field(default_factory=dict)
    progress: Progress = no_progress
    cache: PackedMatrixCache = field(default_factory=lambda: PackedMatrixCache(0))
    folder: Path | None = None


class ModelQuantizer(Protocol):
    """A quantizer of complete models: one file, and one entry in ``QUANTIZERS``."""

    #: Class of its stored matrices with a single bit width.
    matrix: ClassVar[type[StoredMatrix]]

    def quantize_model(self, task: QuantizationTask) -> nn.Module:
        """Return a quantized copy of the task's model; the original is not modified.

        Raises
        ------
        InputError, LsqError
            If the quantizer does not support the model or the calibration text.
        """
        ...
