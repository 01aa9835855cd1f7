"""Folders with a config.json and packed matrices in model.safetensors, as for MLX and vLLM."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lsq_core.errors import InputError
from lsq_core.exports.weights.base import Export, OriginalFiles, StoredType, WeightExporter
from lsq_core.model.identity import has_custom_code

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

WEIGHTS_FILE = "model.safetensors"
GENERATION_CONFIG_FILE = "generation_config.json"
#: Entries of a config.json that describe how weights are quantized.
QUANTIZATION_KEYS = ("quantization", "quantization_config")


@dataclass(frozen=True)
class PackedFolder(WeightExporter):
    """An exporter that stores each matrix as several tensors in one safetensors file."""

    #: Format given in the file's header.
    header: ClassVar[str] = "pt"
    #: Names of a packed matrix's tensors, which follow the module's name.
    parts: ClassVar[tuple[str, ...]]

    def encode(self, export: Export, name: str, stored: StoredType) -> dict[str, Tensor]:
        """Return the tensors of a packed matrix by the names in :attr:`parts`."""
        raise NotImplementedError

    def decode(self, tensors: Mapping[str, Tensor], bits: int, group_size: int) -> Tensor:
        """Return the weight (out, in), float32, from the tensors of a packed matrix."""
        raise NotImplementedError

    def config(self, config: dict[str, Any], export: Export) -> dict[str, Any]:
        """Return the ``config.json`` to write, based on the original one."""
        raise NotImplementedError

    def quantized_modules(self, config: dict[str, Any]) -> dict[str, tuple[int, int]]:
        """Return the bits and group size of each packed module in a written ``config.json``."""
        raise NotImplementedError

    def check_model(self, files: OriginalFiles) -> None:
        """See :class:`WeightExporter`."""
        if has_custom_code(files.folder):
            raise InputError(
                f"The model in {files.folder} uses custom code, which programs for {self.title} "
                "cannot run; save it as lsq."
            )

    def write(self, export: Export, folder: Path) -> dict[str, int]:
        """See :class:`WeightExporter`."""
        from safetensors.torch import save_file

        from lsq_core.model.dtypes import torch_dtype
        from lsq_core.quantized.artifact import packed_names, stored_state

        state = stored_state(export.quantized, torch_dtype(self.dtype))
        for name in packed_names(export.quantized):
            state.pop(name, None)
        written = {}
        for done, (name, stored) in enumerate(export.types.items()):
            export.report("export", done, len(export.types), name)
            if stored.bits:
                tensors = self.encode(export, name, stored)
            else:
                tensors = {"weight": export.weight(name).to(torch_dtype(self.dtype))}
            written[name] = sum(tensor.nbytes for tensor in tensors.values())
            state |= {f"{name}.{part}": t.contiguous() for part, t in tensors.items()}
        save_file(state, folder / WEIGHTS_FILE, metadata={"format": self.header})
        config = json.loads((export.files.folder / "config.json").read_text("utf8"))
        (folder / "config.json").write_text(json.dumps(self.config(config, export), indent=2))
        if (export.files.folder / GENERATION_CONFIG_FILE).is_file():
            shutil.copy(export.files.folder / GENERATION_CONFIG_FILE, folder)
        export.tokenizer.save_pretrained(folder)
        return written

    def load(self, folder: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """See :class:`WeightExporter`; decodes one matrix at a time."""
        from accelerate import init_empty_weights
        from safetensors import safe_open
        from transformers import AutoConfig, AutoModelForCausalLM

        from lsq_core.quantized.artifact import assign_tensors

        content = json.loads((folder / "config.json").read_text("utf8"))
        modules = self.quantized_modules(content)
        plain = {key: value for key, value in content.items() if key not in QUANTIZATION_KEYS}
        config = AutoConfig.for_model(**plain)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config)
        model.tie_weights()
        state = {}
        with safe_open(folder / WEIGHTS_FILE, "pt") as file:
            packed = {f"{name}.{part}" for name in modules for part in self.parts}
            for key in set(file.keys()) - packed:
                state[key] = file.get_tensor(key)
            for name, (bits, group_size) in modules.items():
                tensors = {part: file.get_tensor(f"{name}.{part}") for part in self.parts}
                state[f"{name}.weight"] = self.decode(tensors, bits, group_size).to(dtype)
        assign_tensors(model, state, dtype)
        return model.to(device).eval().requires_grad_(False)
