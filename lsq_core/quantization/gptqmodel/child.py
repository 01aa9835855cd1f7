"""The process that imports ``gptqmodel``, quantizes a model and saves it.

Started by :mod:`lsq_core.quantization.gptqmodel.process`; reads a JSON request, prints the number
of each finished layer to standard output and everything else to standard error, and exits when
its standard input is closed.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from threading import Thread

#: Calibration sequences per batch; all have the same length.
_BATCH = 8


def main(request: Path) -> None:
    """Quantize and save."""
    spec = json.loads(request.read_text("utf8"))
    progress_out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # the package's own output is not progress
    Thread(target=_exit_with_parent, daemon=True).start()

    import numpy as np
    import torch
    from gptqmodel import BACKEND, GPTQModel

    dtype = _dtype(spec, torch)
    model = GPTQModel.load(spec["model"], _settings(spec), dtype=dtype)
    model.layer_callback = lambda layer_idx, submodule_finalized: (
        print(layer_idx + 1, file=progress_out) if submodule_finalized else None
    )
    ids = torch.from_numpy(np.load(spec["ids"]))
    sequences = [
        {"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in ids
    ]
    # The kernel only packs here; it is chosen for the formats it can store, on any device.
    kernel = {"gptq": BACKEND.GPTQ_TORCH, "awq": BACKEND.AWQ_TORCH}[spec["method"]]
    model.quantize(sequences, batch_size=_BATCH, backend=kernel, calibration_data_min_length=1)
    model.save(spec["out"])


def _exit_with_parent() -> None:
    """Exit when standard input is closed, which means that the parent process has ended."""
    sys.stdin.read()
    os._exit(1)


def _dtype(spec: dict, torch: object) -> object:
    """Return the dtype: AWQ does not support float32; GPTQ uses it on a CPU, with enough memory."""
    if spec["method"] == "awq":
        return torch.bfloat16
    return torch.float32 if spec["device"] == "cpu" else torch.float16


def _settings(spec: dict) -> object:
    """Return the package's default settings for the requested configurations."""
    from gptqmodel import QuantizeConfig

    modules = {name: tuple(config) for name, config in spec["modules"].items()}
    (bits, group_size), _ = Counter(modules.values()).most_common(1)[0]
    others = {
        f"^{re.escape(name)}$": {"bits": config[0], "group_size": config[1]}
        for name, config in modules.items()
        if config != (bits, group_size)
    }
    method = (
        {"quant_method": "awq", "format": "gemm", "sym": False}
        if spec["method"] == "awq"
        else {"quant_method": "gptq", "format": "gptq"}
    )
    return QuantizeConfig(
        bits=bits,
        group_size=group_size,
        dynamic=others or None,
        device=spec["device"],
        offload_to_disk=False,
        **method,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
