"""Classes and functions shared by the exporters of all formats."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lsq_core.bits import Config, MixedRows
from lsq_core.errors import InputError, LsqError
from lsq_core.model.dtypes import item_bytes
from lsq_core.progress import ProgressCallback, ignore_progress
from lsq_core.quantization.registry import quantizer_spec

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lsq_core.quantization.packed import PackedMatrix


@dataclass(frozen=True)
class ExportMatrix:
    """A matrix of a plan: its full module name, shape and configuration."""

    name: str
    out_features: int
    in_features: int
    config: Config
    #: Whether it is one expert of a stack.
    in_stack: bool = False

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class StoredType:
    """How a format stores a matrix, and in how many bytes.

    ``exact`` means that it holds the plan's own codes, with scale and offset rounded to the
    format's dtype; any other type is derived from the full-precision weights.
    """

    name: str
    bytes: int
    exact: bool
    bits: int = 0
    group_size: int = 0


@dataclass(frozen=True, eq=False)
class OriginalFiles:
    """The files of a model in full precision.

    ``config`` is its ``config.json``; ``dtype`` that of most of its weights, by its name in a
    safetensors header; ``gguf_file`` the GGUF file that it was dequantized from, if any.
    """

    config: Mapping[str, Any]
    folder: Path
    dtype: str
    gguf_file: Path | None = None


@dataclass(frozen=True, eq=False)
class Export:
    """A quantized model to be written in another format.

    ``original`` is the model in full precision, needed unless all types are exact, and ``files``
    are its files. ``provenance`` is written to the export.
    """

    quantized: nn.Module
    original: nn.Module | None
    tokenizer: object
    files: OriginalFiles
    types: Mapping[str, StoredType]
    provenance: Mapping[str, Any]
    report: ProgressCallback = ignore_progress

    def packed(self, name: str) -> PackedMatrix:
        """Return the stored matrix of a module."""
        return self.quantized.get_submodule(name).packed

    def weight(self, name: str) -> Tensor:
        """Return the weight (out, in) of a module in full precision, float32 on the CPU."""
        return self.original.get_submodule(name).weight.detach().cpu().float()


@dataclass(frozen=True)
class WeightExporter:
    """An exporter: one file, and one entry in ``FORMATS``.

    ``crossing`` is a key of ``CROSSING``; ``dtype`` that of :class:`OriginalFiles`, in which
    unquantized weights are written.
    """

    crossing: str
    dtype: str

    title: ClassVar[str]
    #: Code widths in bits that the format supports.
    bits: ClassVar[tuple[int, ...]] = (2, 3, 4, 5, 6, 8)

    def check_model(self, files: OriginalFiles) -> None:
        """Raise :class:`InputError` if the format cannot store the model."""
        raise NotImplementedError

    def stored_type(self, matrix: ExportMatrix) -> StoredType:
        """Return how a planned matrix is stored.

        Raises
        ------
        InputError
            If the format cannot store it.
        """
        raise NotImplementedError

    def write(self, export: Export, folder: Path) -> dict[str, int]:
        """Write all files to an empty folder and return the bytes of each matrix."""
        raise NotImplementedError

    def load(self, folder: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """Load a written folder as a model in ``dtype``, decoded as by the format's programs."""
        raise NotImplementedError

    def full_precision(self, matrix: ExportMatrix) -> StoredType:
        """Return the type of a matrix that is not quantized."""
        return StoredType(self.dtype, matrix.numel * item_bytes(self.dtype), exact=False)

    def group_size(self, matrix: ExportMatrix, smallest: int = 1) -> int | None:
        """Return the group size, within rows, to write a matrix with; None for full precision.

        Raises
        ------
        InputError
            If the matrix's groups cross rows and this is refused, or they are to be split and no
            group size of at least ``smallest`` divides its rows.
        """
        own, width = matrix.config.group_size, matrix.in_features
        if width % own == 0:
            return own
        if self.crossing == "full":
            return None
        fitting = [g for g in (64, 32) if g < own and width % g == 0 and g >= smallest]
        if self.crossing == "split" and fitting:
            return fitting[0]
        ways = "leave it in full precision with --crossing full"
        if fitting:
            ways = f"write groups of {fitting[0]} with --crossing split, or {ways}"
        raise InputError(
            f"{self.title} keeps groups within a row, and {matrix.name} "
            f"({matrix.out_features}×{width}) has rows that groups of {own} do not fill: {ways}."
        )


def export_matrices(quantized: nn.Module) -> list[ExportMatrix]:
    """Return the packed matrices of a quantized model."""
    from lsq_core.quantized.modules import PackedStack, packed_modules

    found = []
    for name, module in packed_modules(quantized).items():
        parent = quantized.get_submodule(name.rpartition(".")[0])
        shape, in_stack = (module.out_features, module.in_features), isinstance(parent, PackedStack)
        found.append(ExportMatrix(name, *shape, module.config, in_stack))
    return found


def check_modules(export: Export) -> None:
    """Raise :class:`InputError` if a module stores its weight transposed, as in GPT-2."""
    for name in export.types:
        if export.quantized.get_submodule(name).transposed:
            raise InputError(
                f"{name} is a Conv1D, which keeps its weight transposed, and only linear modules "
                "can be exported; save it as lsq."
            )


def choose_types(
    exporter: WeightExporter, matrices: Iterable[ExportMatrix], quantizer: str, axis: int
) -> dict[str, StoredType]:
    """Return how each matrix of a plan is stored in a format, by name.

    Raises
    ------
    InputError
        If the format cannot express the plan.
    """
    spec, title = quantizer_spec(quantizer), exporter.title
    if not spec.supports_metadata or spec.calibrated:
        raise InputError(
            f"{title} is written from the grids of hqq and rtn, and this plan is quantized by "
            f"{quantizer}; quantize with one of those, or save it as lsq."
        )
    if axis != 1:
        raise InputError(
            f"{title} keeps groups along the rows of a matrix, and axis 0 takes them down its "
            "columns; plan with --axis 1, or save it as lsq."
        )
    types = {}
    for matrix in matrices:
        _check_matrix(exporter, matrix)
        types[matrix.name] = exporter.stored_type(matrix)
    return types


def _check_matrix(exporter: WeightExporter, matrix: ExportMatrix) -> None:
    title = exporter.title
    if isinstance(matrix.config, MixedRows):
        raise InputError(
            f"{title} gives all rows of a matrix the same bits, and {matrix.name} has "
            f"{matrix.config.name}; choose another method, or save it as lsq."
        )
    if matrix.in_stack:
        raise InputError(
            f"{matrix.name} is one of a stack of experts, and the export to {title} only writes "
            "linear modules; save it as lsq."
        )
    if matrix.config.bits not in exporter.bits:
        raise InputError(
            f"{title} has no codes of {matrix.config.bits} bit, which {matrix.name} has; plan "
            "without them, or save it as lsq."
        )


def check_bytes(types: Mapping[str, StoredType], written: Mapping[str, int]) -> None:
    """Raise :class:`LsqError` unless each matrix takes the predicted number of bytes."""
    for name, stored in types.items():
        if written.get(name) != stored.bytes:
            raise LsqError(
                f"{name} takes {written.get(name)} bytes as {stored.name} and {stored.bytes} were "
                "planned; this is a defect of LSQ Explorer, please report it."
            )
