"""The formats in which a quantized model can be saved. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from lsq_core.errors import InputError, choose

if TYPE_CHECKING:
    from lsq_core.exports.weights.base import WeightExporter

#: This project's own format, which is lossless and supports every configuration.
LSQ = "lsq"


@dataclass(frozen=True)
class WeightFormat:
    """The description of a format, available without importing its module."""

    title: str
    #: Programs that load it.
    programs: str
    #: Module and class of its exporter; none for this project's own format.
    import_path: str = ""
    #: Whether groups must lie within a row, so that some plans cannot be expressed.
    groups_in_rows: bool = True


#: Formats by name on the command line and in the app; classes are imported on first use.
FORMATS = {
    LSQ: WeightFormat("LSQ Explorer", "LSQ Explorer", groups_in_rows=False),
    "mlx": WeightFormat("MLX", "mlx-lm on Apple silicon", "lsq_core.exports.weights.mlx:Mlx"),
    "gguf": WeightFormat(
        "GGUF",
        "llama.cpp and tools built on it",
        "lsq_core.exports.weights.gguf:Gguf",
        groups_in_rows=False,
    ),
    "compressed-tensors": WeightFormat(
        "compressed-tensors",
        "transformers and vLLM",
        "lsq_core.exports.weights.compressed_tensors:CompressedTensors",
    ),
    "compressed-tensors-asym": WeightFormat(
        "compressed-tensors, asymmetric",
        "vLLM, not transformers 5.23",
        "lsq_core.exports.weights.compressed_tensors:CompressedTensorsAsymmetric",
    ),
}

#: Ways to handle a matrix whose group size does not divide its rows, in formats that keep groups
#: within a row.
CROSSING = {
    "refuse": "refuse the plan, naming the matrix",
    "split": "write smaller groups that fill the rows, where some do: the same weights, and more "
    "bytes of scales",
    "full": "leave the matrix in full precision",
}


@dataclass(frozen=True)
class ExportTarget:
    """Another tool's format, and how to handle groups that cross rows (``CROSSING``)."""

    format: str
    crossing: str = "refuse"


def weight_format(name: str) -> WeightFormat:
    """Return the description of a format.

    Raises
    ------
    InputError
        If there is no format with that name.
    """
    return choose(FORMATS, name, "a format")


def check_crossing(crossing: str) -> None:
    """Raise :class:`InputError` unless it is a way to write groups that cross rows."""
    choose(CROSSING, crossing, "a way to write groups that cross rows")


def get_exporter(name: str, crossing: str = "refuse", dtype: str = "F32") -> WeightExporter:
    """Create the exporter of another tool's format, for a checkpoint of a dtype.

    Raises
    ------
    InputError
        If there is no such format or ``crossing``, or the format is this project's own.
    """
    module, _, attribute = weight_format(name).import_path.partition(":")
    if not module:
        raise InputError(f"'{name}' is the format that models are saved in; nothing is exported.")
    check_crossing(crossing)
    return getattr(import_module(module), attribute)(crossing, dtype)
