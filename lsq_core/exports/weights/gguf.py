"""GGUF files for llama.cpp.

A block of 32 weights in Q4_1 is ``d · code + m`` with ``d`` and ``m`` in fp16, which is HQQ's grid
with ``d = scale`` and ``m = −zero · scale``; Q5_1 is the same with 5-bit codes. So 4- and 5-bit
codes in groups of 32 are written unchanged, and so are those of larger groups where no K-quant
fits. Other configurations get the type nearest in size, quantized from the full-precision weights.
Sources: llama.cpp, ``ggml-common.h`` for the blocks, ``convert_hf_to_gguf.py`` for metadata and the
order of the rows of q and k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from lsq_core.errors import InputError, LsqError
from lsq_core.exports.names import gguf_architecture, gguf_name_map, gguf_tensor_name
from lsq_core.exports.weights.base import (
    Export,
    ExportMatrix,
    OriginalFiles,
    StoredType,
    WeightExporter,
)
from lsq_core.exports.weights.gguf_metadata import (
    check_rope,
    rope_factors,
    row_order,
    write_metadata,
)
from lsq_core.exports.weights.gguf_tokenizer import check_tokenizer, write_tokenizer
from lsq_core.model.dtypes import safetensors_name, torch_dtype
from lsq_core.model.identity import has_custom_code
from lsq_core.quantization.packed import unpack_bits

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lsq_core.quantization.packed import PackedMatrix

WEIGHTS_FILE = "model.gguf"
#: Supported model types of llama.cpp: those whose metadata and row order are implemented here.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
#: Weights per block of the simple types and of the K-quants.
_BLOCK, _SUPER_BLOCK = 32, 256
#: Types of unquantized weights.
_FLOAT_TYPES = ("F16", "BF16", "F32")
#: The package that writes K-quants, and the types it is used for, by bits.
_K_QUANT_PACKAGE = "auto_round"
_K_QUANTS = {1: "Q2_K", 2: "Q2_K", 3: "Q3_K", 4: "Q4_K", 5: "Q5_K", 6: "Q6_K"}
#: Types by bits where no K-quant is used, such as for rows that 256 does not divide; as in
#: llama.cpp, a larger one for 6 bits.
_LEGACY = {1: "Q4_0", 2: "Q4_0", 3: "Q4_0", 4: "Q4_1", 5: "Q5_1", 6: "Q8_0", 8: "Q8_0"}
#: Types whose blocks can hold this project's own codes, with a scale and minimum.
_EXACT = {4: "Q4_1", 5: "Q5_1"}


@dataclass(frozen=True)
class Gguf(WeightExporter):
    """Exact for 4 and 5 bits in groups of 32 or where no K-quant fits; otherwise requantized."""

    title: ClassVar[str] = "GGUF"
    bits: ClassVar[tuple[int, ...]] = (1, 2, 3, 4, 5, 6, 8)

    def check_model(self, files: OriginalFiles) -> None:
        """See :class:`WeightExporter`."""
        model_type = files.config.get("model_type")
        if has_custom_code(files.folder) or model_type not in MODEL_TYPES:
            raise InputError(
                f"The export to GGUF supports the architectures {', '.join(MODEL_TYPES)}, not "
                f"{model_type}; save it as lsq."
            )
        check_rope(files.config)
        check_tokenizer(files)

    def stored_type(self, matrix: ExportMatrix) -> StoredType:
        """See :class:`WeightExporter`; ``name`` is that of a GGUF tensor type."""
        name, exact = self._type_name(matrix)
        if name == self._float_type:
            return self.full_precision(matrix)
        return StoredType(name, _tensor_bytes(matrix.numel, name), exact)

    def full_precision(self, matrix: ExportMatrix) -> StoredType:
        """See :class:`WeightExporter`."""
        return StoredType(self._float_type, _tensor_bytes(matrix.numel, self._float_type), False)

    @property
    def _float_type(self) -> str:
        return self.dtype if self.dtype in _FLOAT_TYPES else "F32"

    def _type_name(self, matrix: ExportMatrix) -> tuple[str, bool]:
        """Return the type of a matrix, and whether it holds the plan's own codes."""
        bits, group_size = matrix.config.bits, matrix.config.group_size
        if matrix.in_features % _BLOCK:
            return self._float_type, False
        fits = matrix.in_features % _SUPER_BLOCK == 0 and find_spec(_K_QUANT_PACKAGE)
        if fits and bits in _K_QUANTS and not (bits in _EXACT and group_size == _BLOCK):
            return _K_QUANTS[bits], False
        # llama.cpp itself would use Q5_0 instead of Q4_K: larger, and requantized.
        return _LEGACY[bits], bits in _EXACT

    def write(self, export: Export, folder: Path) -> dict[str, int]:
        """See :class:`WeightExporter`; matrices are encoded and written one at a time."""
        from gguf import GGMLQuantizationType, GGUFWriter

        config = export.files.config
        writer = GGUFWriter(None, gguf_architecture(config))
        tensors = list(self._tensors(export))
        write_metadata(writer, export)
        write_tokenizer(writer, export.files, export.tokenizer)
        for tensor in tensors:
            size = _tensor_bytes(prod(tensor.shape), tensor.type)
            kind = GGMLQuantizationType[tensor.type]
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype("float32"), size, kind)
        writer.write_header_to_file(folder / WEIGHTS_FILE)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        written = {}
        for done, tensor in enumerate(tensors):
            export.report("export", done, len(tensors), tensor.name)
            data = tensor.make()
            writer.write_tensor_data(data)
            if tensor.module:
                written[tensor.module] = int(data.nbytes)
        writer.close()
        export.tokenizer.save_pretrained(
            folder
        )  # for evaluating the folder; the file has it as well
        return written

    def _tensors(self, export: Export) -> Iterator[_Tensor]:
        """Yield every tensor of the file; planned matrices are encoded when they are written."""
        from lsq_core.quantized.artifact import packed_names, stored_state

        config, packed = export.files.config, packed_names(export.quantized)
        names = gguf_name_map(config, config["num_hidden_layers"])
        for name, tensor in stored_state(export.quantized, torch_dtype(self.dtype)).items():
            if name in packed:
                continue
            order = row_order(config, name, tensor.shape[0])
            values = tensor if order is None else tensor[order]
            yield _float_tensor(gguf_tensor_name(names, name), values)
        for module, stored in export.types.items():
            shape = tuple(export.packed(module).shape)
            order = row_order(config, module, shape[0])
            make = partial(_matrix_rows, export, module, stored, order)
            name = gguf_tensor_name(names, f"{module}.weight")
            yield _Tensor(name, shape, stored.name, make, module)
        factors = rope_factors(config)
        if factors is not None:
            yield _Tensor("rope_freqs.weight", factors.shape, "F32", lambda: factors)

    def load(self, folder: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """See :class:`WeightExporter`; loaded by transformers, which restores names and order."""
        from gguf import GGUFReader
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=WEIGHTS_FILE, dtype=dtype)
        del model.config.quantization_config
        for tensor in GGUFReader(folder / WEIGHTS_FILE).tensors:
            if tensor.name == "rope_freqs.weight":  # which transformers ignores
                factors = torch.from_numpy(tensor.data.copy())
                model.model.rotary_emb.inv_freq.div_(factors)
        return model.to(device).eval().requires_grad_(False)


@dataclass(frozen=True, eq=False)
class _Tensor:
    """A tensor of the file: its shape (out, in), its type, and a function for its bytes by row."""

    name: str
    shape: tuple[int, ...]
    type: str
    make: Callable[[], np.ndarray]
    #: The module of a planned matrix.
    module: str = ""


def _float_tensor(name: str, values: Tensor) -> _Tensor:
    """Return an unquantized tensor; vectors are float32, as llama.cpp's operations require."""
    kind = safetensors_name(values.dtype) if values.dim() > 1 else "F32"
    kind = kind if kind in _FLOAT_TYPES else "F32"
    return _Tensor(name, tuple(values.shape), kind, lambda: _requantize(values.float(), kind))


def _tensor_bytes(numel: int, type_name: str) -> int:
    """Return the bytes of ``numel`` weights in a GGUF type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    return numel // block * size


# --- matrices -----------------------------------------------------------------------------


def _matrix_rows(
    export: Export, module: str, stored: StoredType, order: np.ndarray | None
) -> np.ndarray:
    """Return the bytes of a matrix, uint8 (rows, bytes of a row), in llama.cpp's row order."""
    if stored.exact:
        rows = exact_rows(export.packed(module), module)
    else:
        rows = _requantize(export.weight(module), stored.name)
    return np.ascontiguousarray(rows if order is None else rows[order])


def exact_rows(packed: PackedMatrix, name: str) -> np.ndarray:
    """Encode a 4- or 5-bit matrix in Q4_1 or Q5_1 with its own codes, uint8 (rows, bytes of a row).

    A block is d and m in fp16; in Q5_1, the fifth bits of its 32 codes in order; then 16 bytes with
    the other four bits of the first 16 codes in the lower halves and of the rest in the upper ones.

    Raises
    ------
    LsqError
        If a scale or minimum is beyond the range of fp16.
    """
    bits, repeats = packed.config.bits, packed.config.group_size // _BLOCK
    codes = unpack_bits(packed.codes.cpu(), bits, prod(packed.shape)).numpy().reshape(-1, _BLOCK)
    scale, zero = packed.scale.decode().cpu(), packed.zero.decode().cpu()
    grid = np.stack([scale.numpy(), (-zero * scale).numpy()], axis=1).repeat(repeats, axis=0)
    with np.errstate(over="ignore"):
        rounded = grid.astype("<f2")
    if not np.isfinite(rounded).all():
        raise LsqError(
            f"{name} has a scale or minimum of {np.abs(grid).max():.3g}, beyond the range of fp16, "
            f"in which {_EXACT[bits]} keeps them; save it as lsq."
        )
    fifth = [np.packbits(codes >> 4, axis=1, bitorder="little")] if bits == 5 else []
    first, second = np.split(codes & 15, 2, axis=1)
    blocks = np.concatenate([rounded.view(np.uint8), *fifth, first | second << 4], axis=1)
    return blocks.reshape(packed.shape[0], -1)


def _requantize(weight: Tensor, type_name: str) -> np.ndarray:
    """Convert full-precision weights (out, in) to a GGUF type, uint8 (out, bytes of a row)."""
    if type_name in _FLOAT_TYPES:
        return weight.to(torch_dtype(type_name)).contiguous().view(torch.uint8).numpy()
    if type_name in _K_QUANTS.values():
        from auto_round.export.export_to_gguf.packing import ggml_quant

        # It modifies its input.
        rows = ggml_quant(weight.clone(), type_name.lower(), device="cpu")
        return np.asarray(rows).reshape(weight.shape[0], -1)
    from gguf import GGMLQuantizationType, quantize

    return quantize(weight.numpy(), GGMLQuantizationType[type_name])
