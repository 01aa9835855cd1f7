"""Compare a saved or rebuilt model with its plan, matrix by matrix.

The stored configuration is derived only from the names, dtypes and shapes of the stored tensors;
for a saved model, these are read from the header of its file. The checksums in its manifest show
whether its weights have changed since it was saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lsq_core.bits import METADATA_FORMATS, config_from_json
from lsq_core.errors import InputError
from lsq_core.model.checkpoint import safetensors_header
from lsq_core.model.dtypes import TORCH_NAMES, safetensors_name
from lsq_core.model.info import Matrix
from lsq_core.model.source import MANIFEST_FILE, ModelSource, check_config
from lsq_core.progress import ProgressCallback, ignore_progress
from lsq_core.quantization.layout import TensorLayout, layout_for_format, stored_bytes
from lsq_core.quantization.registry import QUANTIZERS, QuantizerSpec, quantizer_spec
from lsq_core.quantized.manifest import (
    FORMAT_VERSION,
    RUN_KEYS,
    WEIGHTS_FILE,
    changed_files,
    read_manifest,
)
from lsq_core.stages.saved import rebuild_run, saved_folder
from lsq_core.store.store import Store

#: Names of the tensors in which any quantizer stores matrices.
TENSOR_NAMES = {
    name
    for spec in QUANTIZERS.values()
    for config in spec.options
    for metadata in METADATA_FORMATS
    for name in spec.layout((128, 128), config, metadata)
}


@dataclass(frozen=True)
class MatrixAudit:
    """Planned and stored configuration and bytes of one matrix.

    ``stored`` is the name of a configuration, or else a description of what is stored.
    """

    module: str
    layer: int | None
    type: str
    planned: str
    planned_bytes: int
    stored: str
    stored_bytes: int
    agrees: bool


@dataclass(frozen=True)
class Audit:
    """Every planned or stored matrix, and the source of the stored tensors."""

    source: str
    lines: tuple[MatrixAudit, ...]
    #: State of a saved model's files: ``intact``, ``changed``, or ``unknown`` if an earlier version
    #: saved it without checksums; '' for a rebuilt model.
    files: str = ""
    changed: tuple[str, ...] = ()

    @property
    def agrees(self) -> bool:
        """Whether everything is as planned and no file is known to have changed."""
        return not self.mismatches and not self.changed

    @property
    def mismatches(self) -> list[MatrixAudit]:
        """The matrices whose stored tensors differ from the plan."""
        return [line for line in self.lines if not line.agrees]

    @property
    def stored_bytes(self) -> int:
        """The total bytes of all stored tensors."""
        return sum(line.stored_bytes for line in self.lines)

    @property
    def verdict(self) -> str:
        """A summary: the number of mismatches, the first one, and whether files have changed."""
        return " ".join(filter(None, (self._matrices_verdict(), self._files_verdict())))

    def _files_verdict(self) -> str:
        if self.files == "unknown":
            return (
                "It has no checksums, because an earlier version saved it: whether its weights "
                "have changed since can't be told."
            )
        if self.changed:
            more = f" and {len(self.changed) - 1} more" if self.changed[1:] else ""
            return f"{self.changed[0]}{more} has changed since it was saved: its SHA-256 differs."
        return "Its files are those that were saved, by their SHA-256." if self.files else ""

    def _matrices_verdict(self) -> str:
        count = len(self.lines)
        if not self.mismatches:
            return f"All {count} matrices are as planned: {self.stored_bytes:,} bytes."
        first = self.mismatches[0]
        are = "is" if len(self.mismatches) == 1 else "are"
        return (
            f"{len(self.mismatches)} of {count} matrices {are} not as planned: {first.module} "
            "holds "
            f"{first.stored} ({first.stored_bytes:,} bytes) where {first.planned} "
            f"({first.planned_bytes:,} bytes) was planned."
        )

    def to_json(self) -> dict:
        """Return the audit as JSON for the command line."""
        return {
            "source": self.source,
            "verdict": self.verdict,
            "agrees": self.agrees,
            "files": self.files,
            "changed": list(self.changed),
            "matrices": len(self.lines),
            "planned_bytes": sum(line.planned_bytes for line in self.lines),
            "stored_bytes": self.stored_bytes,
            "modules": [asdict(line) for line in self.lines],
        }


def audit(
    plan: dict,
    matrices: Iterable[Matrix],
    stored: Mapping[str, TensorLayout],
    source: str,
    format: int = FORMAT_VERSION,
) -> Audit:
    """Compare stored tensors with a plan.

    Parameters
    ----------
    plan
        The plan as JSON (:meth:`lsq_core.planning.plan.Plan.to_json`); ``modules``, ``metadata``
        and ``quantizer`` are used.
    matrices
        The model's matrices, for their shapes.
    stored
        The stored tensors of each packed matrix, and of planned matrices that are not packed.
    format
        The format version of the saved model, on which the tensors of a matrix depend.

    Raises
    ------
    InputError
        If the plan names a module that the model does not have.
    """
    shapes = {matrix.name: matrix for matrix in matrices}
    unknown_modules = sorted(set(plan["modules"]) - set(shapes))
    if unknown_modules:
        raise InputError(f"The plan names {unknown_modules[0]}, which the model doesn't have.")
    lines = [
        _audit_matrix(shapes[name], entry, plan, stored.get(name, {}), format)
        for name, entry in plan["modules"].items()
    ]
    for name in sorted(set(stored) - set(plan["modules"])):
        bytes = stored_bytes(stored[name])
        lines.append(MatrixAudit(name, None, "", "nothing", 0, "a packed matrix", bytes, False))
    return Audit(source, tuple(lines))


def _audit_matrix(
    matrix: Matrix, entry: dict, plan: dict, stored: TensorLayout, format: int
) -> MatrixAudit:
    config, metadata = config_from_json(entry), plan["metadata"]
    spec = quantizer_spec(plan.get("quantizer", "hqq"))
    expected = layout_for_format(spec.layout(matrix.shape, config, metadata), format)
    found = (
        config.name if stored == expected else _identify_config(matrix.shape, spec, stored, format)
    )
    if stored and stored != expected and found == config.name:
        found += " with other metadata"
    return MatrixAudit(
        module=matrix.name,
        layer=matrix.layer,
        type=matrix.type,
        planned=config.name,
        planned_bytes=stored_bytes(expected),
        stored=found,
        stored_bytes=stored_bytes(stored),
        agrees=stored == expected,
    )


def _identify_config(
    shape: tuple[int, int], spec: QuantizerSpec, stored: TensorLayout, format: int
) -> str:
    """Return the name of the configuration that tensors belong to, or else a description."""
    if not stored:
        return "nothing"
    if set(stored) == {"weight"}:
        return f"{stored['weight'][1]} weights"
    for config in spec.options:
        layouts = (spec.layout(shape, config, metadata) for metadata in METADATA_FORMATS)
        if any(layout_for_format(layout, format) == stored for layout in layouts):
            return config.name
    return f"no configuration ({stored_bytes(stored):,} bytes in {', '.join(sorted(stored))})"


def read_stored_layout(path: Path, planned: Iterable[str]) -> dict[str, TensorLayout]:
    """Return the tensors of each packed or planned matrix in a file, from its header alone.

    Raises
    ------
    InputError
        If it is not a complete safetensors file, or a matrix is stored in a dtype that no quantizer
        uses.
    """
    header = safetensors_header(path).items()
    found = _group_by_module(
        ((name, tuple(e["shape"]), e["dtype"]) for name, e in header), set(planned)
    )
    for module, stored in found.items():
        for part, (_, dtype) in stored.items():
            if dtype not in TORCH_NAMES:
                raise InputError(
                    f"{path} holds {module}.{part} as {dtype}, which no quantizer uses; save it "
                    "again."
                )
    return found


def model_stored_layout(model: object, planned: Iterable[str]) -> dict[str, TensorLayout]:
    """Return the tensors of each packed or planned matrix of a quantized model in memory."""
    tensors = (
        (name, tuple(tensor.shape), safetensors_name(tensor.dtype))
        for name, tensor in model.state_dict().items()
    )
    return _group_by_module(tensors, set(planned))


def _group_by_module(
    tensors: Iterable[tuple[str, tuple[int, ...], str]], planned: set[str]
) -> dict[str, TensorLayout]:
    found: dict[str, TensorLayout] = {}
    for name, shape, dtype in tensors:
        module, _, part = name.rpartition(".")
        if part in TENSOR_NAMES or (part == "weight" and module in planned):
            found.setdefault(module, {})[part] = (shape, dtype)
    return found


# --- folders and runs -------------------------------------------------------------------------


def audit_folder(folder: Path, store: Store) -> Audit:
    """Audit a saved model against the plan of its run, and verify its files' checksums.

    The plan is the one stored for the run, or the one in the folder if the run is not in the store.
    Needs torch only if the model is not in the store.

    Raises
    ------
    InputError
        If the folder contains no saved model, or the shapes of its matrices cannot be determined.
    """
    manifest = read_manifest(folder, RUN_KEYS)
    run = manifest["run"]
    spec = store.model(manifest["fingerprint"])
    matrices = spec.matrices if spec else _matrices_from_config(folder)
    try:
        plan, where = store.run(run)["content"], f"the plan of run {run}"
    except InputError:
        plan, where = manifest, MANIFEST_FILE
    stored = read_stored_layout(folder / WEIGHTS_FILE, plan["modules"])
    found = audit(
        plan, matrices, stored, f"{folder / WEIGHTS_FILE} against {where}", manifest["format"]
    )
    changed = changed_files(folder, manifest)
    files = "unknown" if changed is None else "changed" if changed else "intact"
    return replace(found, files=files, changed=tuple(changed or ()))


def _matrices_from_config(folder: Path) -> tuple[Matrix, ...]:
    from lsq_core.model.architecture import describe_model
    from lsq_core.model.loading import build_meta_model

    check_config(folder, saved=True)

    source = ModelSource(str(folder))
    return describe_model(build_meta_model(source, folder), source).matrices


def audit_run(
    run: str,
    store: Store,
    source: ModelSource | None = None,
    device: str = "auto",
    dtype: str = "auto",
    report: ProgressCallback = ignore_progress,
    trust_remote_code: bool = False,
) -> Audit:
    """Audit a run: its saved model if there is one, else the rebuilt model.

    Raises
    ------
    InputError
        If there is no such run, or its model can be neither found nor rebuilt.
    """
    run_row = store.run(run)
    folder = saved_folder(run_row)
    if folder is not None:
        return audit_folder(folder, store)
    session, model = rebuild_run(run, source, store, device, dtype, report, trust_remote_code)
    plan = run_row["content"]
    stored = model_stored_layout(model, plan["modules"])
    return audit(plan, session.info.matrices, stored, f"run {run} rebuilt, against its plan")
