"""The process that imports ``gptqmodel``: quantizes a model as asked, and saves what it stored.

Started by :mod:`lsq_core.quantization.gptqmodel.process`; takes a JSON file, writes the number
of each finished layer to standard output and everything else to standard error, and ends when its
standard input does.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from threading import Thread

#: Calibration sequences that run through a block at once; they are all of one length.
_BATCH = 8


def main(request: Path) -> None:
    """Quantize and save."""
    spec = json.loads(request.read_text("utf8"))
    progress_out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the package prints is not progress
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
    # The kernel that packs here is chosen for what it can store, on any device.
    kernel = {"gptq": BACKEND.GPTQ_TORCH, "awq": BACKEND.AWQ_TORCH}[spec["method"]]
    model.quantize(sequences, batch_size=_BATCH, backend=kernel, calibration_data_min_length=1)
    model.save(spec["out"])


def _exit_with_parent() -> None:
    """End when the other end of standard input is closed: nobody waits for the result then."""
    sys.stdin.read()
    os._exit(1)


def _dtype(spec: dict, torch: object) -> object:
    """AWQ has no float32; GPTQ is computed in it where there is memory for it, on a CPU."""
    if spec["method"] == "awq":
        return torch.bfloat16
    return torch.float32 if spec["device"] == "cpu" else torch.float16


def _settings(spec: dict) -> object:
    """The package's defaults, for the configurations that were asked for."""
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
