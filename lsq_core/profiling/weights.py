"""The weights of one matrix, read from its file on demand without torch.

Matrices are located in the safetensors files by name, so a histogram or a region can be read
without loading the model, however large it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from lsq_core.bits import QuantConfig, is_divisible
from lsq_core.errors import InputError
from lsq_core.model.checkpoint import read_entries
from lsq_core.model.info import Matrix
from lsq_core.model.source import ModelSource, find_model, weight_files

#: Percentiles shown in charts over the layers.
PERCENTILES = (0.1, 1.0, 25.0, 50.0, 75.0, 99.0, 99.9)
#: Maximum number of cells along one side of a surface: more would be indistinguishable.
MAX_CELLS = 128
#: Maximum number of groups in a sample of a matrix.
MAX_GROUPS = 4096
_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
#: Prefix of module names that the checkpoints of some models omit.
_PREFIX = re.compile(r"^(model|transformer)\.")


def weights_folder(source: ModelSource) -> Path | None:
    """Return the folder with a model's safetensors weights; None if this machine has none."""
    folder = find_model(source) if source.is_gguf else source.local_folder
    if folder is None:
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(source.name, "config.json", revision=source.revision)
        folder = Path(config).parent if isinstance(config, str) else None
    if folder is None or not folder.is_dir():
        return None
    files = weight_files(folder)
    return folder if files and files[0].suffix == ".safetensors" else None


@dataclass(frozen=True)
class StoredTensor:
    """The location of a tensor: its file, dtype, shape and byte offset."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def read(self) -> np.ndarray:
        """Memory-map the tensor without reading it; bfloat16 is returned as uint16."""
        if self.dtype not in _TYPES:
            raise InputError(
                f"{self.path} holds weights as {self.dtype}, which can't be shown; choose a model "
                "in 16 or 32 bits."
            )
        return np.memmap(self.path, _TYPES[self.dtype], "r", self.offset, self.shape)


class WeightReader:
    """The matrices of a model in a folder of safetensors files.

    Raises
    ------
    InputError
        If a file is damaged.
    """

    def __init__(self, folder: Path, matrices: Iterable[Matrix]) -> None:
        self._tensors = dict(_tensors(folder))
        self.matrices = tuple(m for m in matrices if self._find_tensor(m) is not None)

    def _find_tensor(self, matrix: Matrix) -> StoredTensor | None:
        """Return the tensor that holds a matrix, alone or in a stack; None if not found."""
        whole, expert = matrix.name, matrix.expert is not None
        name = whole.rpartition(".")[0] if expert else f"{whole}.weight"
        tensor = self._tensors.get(name) or self._tensors.get(_PREFIX.sub("", name))
        sides = {matrix.out_features, matrix.in_features}
        fits = tensor and len(tensor.shape) == 2 + expert and set(tensor.shape[-2:]) == sides
        return tensor if fits else None

    @cached_property
    def _transposed(self) -> dict[bool, bool]:
        """Whether matrices are stored as (in, out), keyed by whether they are part of a stack.

        The shape of square matrices does not show it, so they follow the others of their kind.
        """
        seen = {False: False, True: False}
        for matrix in self.matrices:
            if matrix.out_features != matrix.in_features:
                shape = (matrix.out_features, matrix.in_features)
                seen[matrix.expert is not None] |= self._find_tensor(matrix).shape[-2:] != shape
        return seen

    def region(
        self, matrix: Matrix, rows: slice = slice(None), columns: slice = slice(None)
    ) -> np.ndarray:
        """Read a matrix or a region of it, float32 (out, in); only that region is read.

        Raises
        ------
        InputError
            If the files lack the matrix under its module's name, or its dtype cannot be read.
        """
        stored = self._find_tensor(matrix)
        if stored is None:
            raise InputError(
                f"This model's files store {matrix.name} under another name or shape, so its "
                "weights can't be shown."
            )
        values = stored.read()
        values = values[matrix.expert] if matrix.expert is not None else values
        values = values.T if self._transposed[matrix.expert is not None] else values
        part = np.ascontiguousarray(values[rows, columns])
        if stored.dtype == "BF16":  # the upper half of a float32
            return (part.astype(np.uint32) << 16).view(np.float32)
        return part.astype(np.float32)


def _tensors(folder: Path) -> Iterator[tuple[str, StoredTensor]]:
    for name, entry in read_entries(folder, weight_files(folder)).items():
        yield name, StoredTensor(entry.file, entry.dtype, entry.shape, entry.start)


# --- distributions --------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of weights between ``edges`` (bins + 1,), and parameters of a normal fit.

    ``deviation`` is the population standard deviation.
    """

    edges: np.ndarray
    counts: np.ndarray
    mean: float
    deviation: float

    @property
    def expected(self) -> np.ndarray:
        """Expected counts (bins,) under a normal distribution with this mean and deviation."""
        from scipy.stats import norm

        share = np.diff(norm.cdf(self.edges, self.mean, self.deviation or 1.0))
        return self.counts.sum() * share


def histogram(weight: np.ndarray, bins: int = 240) -> Histogram:
    """Compute the histogram of all weights of a matrix.

    Raises
    ------
    InputError
        If a weight is NaN or infinite.
    """
    bad = weight.size - int(np.isfinite(weight).sum())
    if bad:
        raise InputError(
            f"The matrix holds {bad} NaN or infinite weights; check how the checkpoint was saved."
        )
    counts, edges = np.histogram(weight, bins)
    return Histogram(edges, counts, *(float(f(weight, dtype=float)) for f in (np.mean, np.std)))


def percentiles(weight: np.ndarray) -> np.ndarray:
    """Compute ``PERCENTILES`` of all weights of a matrix, (7,)."""
    return np.percentile(weight, PERCENTILES)


def downsample_max(weight: np.ndarray, cells: int = MAX_CELLS) -> tuple[np.ndarray, int, int]:
    """Downsample absolute values to at most ``cells`` × ``cells`` cells by taking block maxima.

    The maximum preserves outliers. Returns the cells, and the number of rows and of columns of
    weights in each cell.

    Example
    -------
    >>> downsample_max(np.diag([1.0, -5.0, 2.0]), cells=2)
    (array([[5., 0.],
           [0., 2.]]), 2, 2)
    """
    row_step, column_step = (-(-length // cells) for length in weight.shape)
    values = np.abs(weight)
    values = np.maximum.reduceat(values, np.arange(0, values.shape[0], row_step), axis=0)
    values = np.maximum.reduceat(values, np.arange(0, values.shape[1], column_step), axis=1)
    return values, row_step, column_step


# --- the quantization grid ------------------------------------------------------------------


def split_into_groups(weight: np.ndarray, config: QuantConfig, axis: int) -> np.ndarray:
    """Split a matrix into (groups, group size), as :func:`lsq_core.quantization.base.to_groups`.

    Raises
    ------
    InputError
        If the group size doesn't divide the matrix.
    """
    if not is_divisible(weight.size, config.group_size):
        raise InputError(
            f"A matrix of {weight.shape[0]}×{weight.shape[1]} cannot be divided into groups of "
            f"{config.group_size}; choose a configuration with a smaller group."
        )
    if axis == 1:
        return weight.reshape(-1, config.group_size)
    return weight.reshape(config.group_size, -1).T


def typical_group(groups: np.ndarray) -> int:
    """Return the index of the group with the median range."""
    spread = np.ptp(groups, axis=1)
    return int(np.argsort(spread, kind="stable")[len(spread) // 2])


def widest_group(groups: np.ndarray) -> int:
    """Return the index of the group with the widest range, usually one with an outlier."""
    return int(np.argmax(np.ptp(groups, axis=1)))


def grid_values(groups: np.ndarray, config: QuantConfig, quantizer: str) -> np.ndarray:
    """Return the value of each code of each group, (groups, 2^bits), ascending.

    RTN's grid is evenly spaced from the smallest to the largest weight of a group. Other quantizers
    compute their own, which needs torch. Scale and zero point are not quantized.
    """
    codes = np.arange(2**config.bits)
    if quantizer == "rtn":
        low, high = groups.min(axis=1, keepdims=True), groups.max(axis=1, keepdims=True)
        return low + (high - low) * codes / codes[-1]
    import torch

    from lsq_core.quantization.registry import get_quantizer

    group_tensor = torch.from_numpy(np.ascontiguousarray(groups, dtype=np.float32))
    return get_quantizer(quantizer).levels(group_tensor, config).numpy()


def sample_groups(groups: np.ndarray) -> np.ndarray:
    """Return all groups, or at most ``MAX_GROUPS`` evenly spread ones."""
    step = -(-len(groups) // MAX_GROUPS)
    return groups[::step]
