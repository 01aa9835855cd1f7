"""Quantize with ``gptqmodel`` in a separate process, and read the tensors it saves.

The package modifies transformers when it is imported, starts threads and prints a lot; a separate
process isolates this. It loads the model from its folder, so the weights are in memory twice while
it runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from lsq_core import paths
from lsq_core.bits import QuantConfig
from lsq_core.errors import LsqError
from lsq_core.model.architecture import get_weight
from lsq_core.profiling.calibration import load_calibration
from lsq_core.progress import Progress
from lsq_core.quantization.base import StoredMatrix, to_groups
from lsq_core.quantization.registry import quantizer_spec
from lsq_core.quantization.task import QuantizationTask
from lsq_core.quantized.convert import replace_matrices

if TYPE_CHECKING:
    from lsq_core.model.info import Matrix
    from lsq_core.model.loading import LoadedModel

_CHILD = "lsq_core.quantization.gptqmodel.child"


@dataclass(frozen=True)
class GptqmodelRequest:
    """A request to the child process, with the paths of folders and of the calibration tokens."""

    method: str
    model: str
    device: str
    #: Bits and group size by full module name.
    modules: dict[str, tuple[int, int]]
    ids: str
    out: str


class GptqmodelQuantizer:
    """A quantizer of complete models; a subclass defines the method and the stored matrix."""

    matrix: ClassVar[type[StoredMatrix]]
    method: ClassVar[str]

    @staticmethod
    def scale_range(bits: int) -> tuple[float, float]:
        """Return the smallest and largest range of a group that the format's scales support."""
        raise NotImplementedError

    def quantize_model(self, task: QuantizationTask) -> nn.Module:
        """See :class:`ModelQuantizer`."""
        loaded, choice = task.loaded, task.choice

        for matrix, config in choice.items():
            self._check_magnitude(get_weight(loaded.model, matrix), matrix, config)
        with tempfile.TemporaryDirectory(prefix="lsq-gptqmodel-") as own:
            out = Path(own) / "quantized"
            _run_child(self._build_request(task, Path(own), out), loaded, task.progress)
            stored = _read_tensors(out)
        packed = {
            matrix: self._matrix(matrix, config, stored, loaded)
            for matrix, config in choice.items()
        }
        return replace_matrices(loaded.model, packed, _changed_parameters(stored, loaded.model))

    def _check_magnitude(self, weight: Tensor, matrix: Matrix, config: QuantConfig) -> None:
        """Raise :class:`LsqError` if the scales of a matrix exceed the range of the format.

        Unlike this project's packing, the format stores no power of two with a matrix.
        """
        largest = to_groups(weight.abs(), config.group_size, 1).amax(1).float()
        largest = largest[largest > 0]
        if not len(largest):
            return
        least, greatest = self.scale_range(config.bits)
        typical, most = 2 * float(largest.median()), 2 * float(largest.amax())
        if typical < least or most > greatest:
            size = f"as small as {typical:.2g}" if typical < least else f"as large as {most:.2g}"
            raise LsqError(
                f"{matrix.name} has groups with a range {size}, but scales of gptqmodel's "
                f"{self.method} cannot represent less than {least:.2g} or more than "
                f"{greatest:.2g} at {config.bits} bits; choose hqq, rtn or nf4, which support any "
                "magnitude."
            )

    def _build_request(self, task: QuantizationTask, folder: Path, out: Path) -> GptqmodelRequest:
        ids = folder / "ids.npy"
        np.save(ids, load_calibration(task.loaded, task.calibration).ids)
        return GptqmodelRequest(
            method=self.method,
            model=str(task.loaded.folder),
            device=task.loaded.device,
            modules={m.name: (c.bits, c.group_size) for m, c in task.choice.items()},
            ids=str(ids),
            out=str(out),
        )

    def _matrix(
        self, matrix: Matrix, config: QuantConfig, stored: dict[str, Tensor], loaded: LoadedModel
    ) -> StoredMatrix:
        """Create one stored matrix from its tensors, which are removed from ``stored``."""
        names = quantizer_spec(self.method).layout(matrix.shape, config, "its own")
        missing = [name for name in names if f"{matrix.name}.{name}" not in stored]
        if missing:
            raise LsqError(
                f"gptqmodel did not quantize {matrix.name}, so this model cannot be compared by "
                f"{self.method}; choose a quantizer that works on single matrices."
            )
        tensors = {n: stored.pop(f"{matrix.name}.{n}").to(loaded.device) for n in names}
        return self.matrix.from_tensors(tensors, matrix.shape, config, axis=1)


def _run_child(child_request: GptqmodelRequest, loaded: LoadedModel, progress: Progress) -> None:
    """Run the child process, which prints the number of each finished layer."""
    folder = Path(child_request.ids).parent
    request, log = folder / "request.json", folder / "log.txt"
    request.write_text(json.dumps(asdict(child_request)), "utf8")
    layers = loaded.info.layers
    progress(0, layers, "reading the model")
    # Its reader pool needs two threads, more than it uses by default on a machine with two cores.
    environment = os.environ | {
        "PYTHONPATH": str(paths.IMPORT_FOLDER),
        "GPTQMODEL_CPU_WORKERS": "2",
    }
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [sys.executable, "-m", _CHILD, str(request)],
            stdout=subprocess.PIPE,
            stderr=errors,
            stdin=subprocess.PIPE,  # closes when this process ends, and then the child exits
            text=True,
            cwd=folder,  # the package writes logs where it runs
            env=environment,
        ) as child,
    ):
        try:
            for line in child.stdout:
                done = int(line)
                progress(done, layers, f"layer {done} of {layers}")
            status = child.wait()
        finally:
            child.kill()
    if status != 0:
        raise LsqError(f"gptqmodel could not quantize {child_request.model}: {_last_error(log)}")


def _last_error(log: Path) -> str:
    """Return the last line of the log that reports an error; most lines are progress."""
    lines = log.read_text("utf8", errors="replace").replace("\r", "\n").splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    error_lines = [line for line in lines if "Error" in line.partition(":")[0]]
    return (error_lines or lines or ["it exited without an error message"])[-1]


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """Load all tensors of the safetensors files in a folder."""
    tensors_by_name = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors_by_name |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors_by_name


def _changed_parameters(stored: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the other parameters that changed, with the dtype and device of the model's own."""
    own = model.state_dict()
    return {
        name: tensor.to(own[name].device, own[name].dtype)
        for name, tensor in stored.items()
        if name in own and not torch.equal(own[name].cpu().to(tensor.dtype), tensor)
    }
