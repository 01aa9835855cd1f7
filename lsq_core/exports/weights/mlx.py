"""Folders for MLX, whose affine quantization can represent HQQ's grid directly.

MLX computes a weight as ``code · scale + bias``, which is ``(code − zero) · scale`` for ``bias =
−zero · scale``. Both store the codes of a row as one bit stream, lowest bits first, so a matrix's
codes are the same bytes in both. Source: ``mlx.core.quantize`` and ``mlx_lm.utils``, 0.32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

from lsq_core.errors import InputError, LsqError
from lsq_core.exports.weights.base import Export, ExportMatrix, OriginalFiles, StoredType
from lsq_core.exports.weights.packed_folder import PackedFolder
from lsq_core.model.dtypes import item_bytes

if TYPE_CHECKING:
    from torch import Tensor

#: Model types whose modules have the same names in mlx-lm, verified by comparing logits.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
#: The smallest group size that MLX has kernels for.
_SMALLEST_GROUP = 32


@dataclass(frozen=True)
class Mlx(PackedFolder):
    """Exact except that scale and bias are rounded to fp16, unless the checkpoint is float32."""

    title: ClassVar[str] = "MLX"
    header: ClassVar[str] = "mlx"
    parts: ClassVar[tuple[str, ...]] = ("weight", "scales", "biases")

    @property
    def scale_dtype(self) -> str:
        """The dtype of scale and bias; bfloat16 is too coarse for the scales of 8-bit codes."""
        return "F32" if self.dtype in ("F32", "F64") else "F16"

    def check_model(self, files: OriginalFiles) -> None:
        """See :class:`WeightExporter`."""
        super().check_model(files)
        if files.config.get("model_type") not in MODEL_TYPES:
            raise InputError(
                f"The export to MLX supports the modules of {', '.join(MODEL_TYPES)}, not of "
                f"{files.config.get('model_type')}; save it as lsq."
            )

    def stored_type(self, matrix: ExportMatrix) -> StoredType:
        """See :class:`WeightExporter`."""
        group_size = self.group_size(matrix, _SMALLEST_GROUP)
        if group_size is None:
            return self.full_precision(matrix)
        bits, groups = matrix.config.bits, matrix.numel // group_size
        size = matrix.numel * bits // 8 + 2 * item_bytes(self.scale_dtype) * groups
        return StoredType(f"{bits} bits, groups of {group_size}", size, True, bits, group_size)

    def encode(self, export: Export, name: str, stored: StoredType) -> dict[str, Tensor]:
        """See :class:`PackedFolder`."""
        import torch

        from lsq_core.model.dtypes import torch_dtype

        packed = export.packed(name)
        rows, repeats = packed.shape[0], packed.config.group_size // stored.group_size
        scale, zero = packed.scale.decode().cpu(), packed.zero.decode().cpu()
        scales = torch.stack([scale, -zero * scale]).repeat_interleave(repeats, dim=1)
        rounded = scales.to(torch_dtype(self.scale_dtype)).view(2, rows, -1)
        if not bool(rounded.isfinite().all()):
            raise LsqError(
                f"{name} has a scale or zero point of {float(scales.abs().max()):.3g}, beyond the "
                f"range of {self.scale_dtype} in MLX; save it as lsq."
            )
        words = packed.codes.cpu().clone().view(torch.uint32).view(rows, -1)
        return {"weight": words, "scales": rounded[0], "biases": rounded[1]}

    def decode(self, tensors: Mapping[str, Tensor], bits: int, group_size: int) -> Tensor:
        """See :class:`PackedFolder`; uses MLX itself if it is installed."""
        import torch

        if find_spec("mlx") is not None:
            return _decode_by_mlx(tensors, bits, group_size)
        from lsq_core.quantization.packed import unpack_bits

        words, scales = tensors["weight"], tensors["scales"].float()
        rows, count = words.shape[0], words.numel() * 32 // bits
        codes = unpack_bits(words.view(torch.uint8).flatten(), bits, count).float()
        groups = codes.view(*scales.shape, group_size)
        weights = groups * scales[..., None] + tensors["biases"].float()[..., None]
        return weights.view(rows, -1)

    def config(self, config: dict[str, Any], export: Export) -> dict[str, Any]:
        """See :class:`PackedFolder`."""
        modules = {
            name: {"group_size": stored.group_size, "bits": stored.bits, "mode": "affine"}
            for name, stored in export.types.items()
            if stored.bits
        }
        sizes = [(m["bits"], m["group_size"]) for m in modules.values()]
        bits, group_size = max(set(sizes), key=sizes.count) if sizes else (4, 64)
        # Modules without entry and scales are left alone, so the default applies to nothing here.
        quantization = {"group_size": group_size, "bits": bits, "mode": "affine"} | modules
        return _with_rope(config) | {
            "quantization": quantization,
            "quantization_config": quantization,
        }

    def quantized_modules(self, config: dict[str, Any]) -> dict[str, tuple[int, int]]:
        """See :class:`PackedFolder`."""
        entries = config.get("quantization", {})
        return {
            name: (entry["bits"], entry["group_size"])
            for name, entry in entries.items()
            if isinstance(entry, dict)
        }


def _with_rope(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config with rotary settings in the form of mlx-lm and transformers before 5."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" in config:
        return config
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    scaled = scaling.get("rope_type", "default") != "default"
    return config | {
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": scaling if scaled else None,
    }


def _decode_by_mlx(tensors: Mapping[str, Tensor], bits: int, group_size: int) -> Tensor:
    """Return the weight of a matrix, float32, decoded by ``mlx.core.dequantize``."""
    import mlx.core as mx
    import numpy as np
    import torch

    words, scales, biases = (mx.array(tensors[part].numpy()) for part in Mlx.parts)
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    weights = mx.dequantize(words, scales, biases, group_size=group_size, bits=bits)
    return torch.from_numpy(np.array(weights))
