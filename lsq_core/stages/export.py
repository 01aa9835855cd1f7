"""Write quantized models in the formats of other tools, decode and evaluate them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lsq_core.errors import translate_resource_errors
from lsq_core.evaluation.protocol import EvaluationRequest
from lsq_core.exports.weights.base import (
    Export,
    ExportMatrix,
    OriginalFiles,
    StoredType,
    WeightExporter,
    check_bytes,
    check_modules,
    choose_types,
    export_matrices,
)
from lsq_core.exports.weights.manifest import is_exported_folder, read_export, write_export
from lsq_core.exports.weights.registry import ExportTarget, get_exporter
from lsq_core.files import resolve_path
from lsq_core.model import gguf
from lsq_core.model.source import ModelSource, read_config
from lsq_core.planning.plan import Plan
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.progress import ProgressCallback, ignore_progress
from lsq_core.quantized.manifest import EVALUATION_KEYS, read_manifest
from lsq_core.stages.evaluate import digest, figures
from lsq_core.stages.measure import measure
from lsq_core.stages.model import OpenModel
from lsq_core.stages.run import (
    QuantizedRun,
    check_plan,
    make_manifest,
    quantize_plan,
)
from lsq_core.stages.saved import evaluate_alone, load_saved, open_original
from lsq_core.store.connection import new_id
from lsq_core.store.store import Store
from lsq_core.targets import check_folder_target
from lsq_core.units import format_bytes
from lsq_core.untrusted import wrap_library_errors

if TYPE_CHECKING:
    from torch import nn

#: Suffixes of the files that contain weights.
_WEIGHT_SUFFIXES = (".safetensors", ".gguf")
#: Columns of a run that an export sets itself.
_OWN_COLUMNS = ("format", "exported_from", "model_bytes")


@dataclass(frozen=True, eq=False)
class PreparedExport:
    """A format that can express a plan, and how each matrix will be stored in it."""

    name: str
    exporter: WeightExporter
    types: Mapping[str, StoredType]

    @property
    def planned_bytes(self) -> int:
        """Bytes that the planned matrices will take."""
        return sum(stored.bytes for stored in self.types.values())

    @property
    def needs_original(self) -> bool:
        """Whether some matrices are converted from the full-precision weights."""
        return not all(stored.exact for stored in self.types.values())

    @property
    def note(self) -> str:
        """A summary: format, bytes, stored types, and matrices made from full precision."""
        title, counts = self.exporter.title, {}
        for stored in self.types.values():
            counts[stored.name] = counts.get(stored.name, 0) + 1
        used = ", ".join(f"{count} × {name}" for name, count in sorted(counts.items()))
        again = sum(not stored.exact for stored in self.types.values())
        share = "all" if again == len(self.types) else again
        how = f"; {share} of them made from the weights in full precision" if again else ""
        return f"{title}: {format_bytes(self.planned_bytes)} for {used}{how}"


def prepare_export(
    target: ExportTarget,
    files: OriginalFiles,
    matrices: Iterable[ExportMatrix],
    quantizer: str,
    axis: int,
) -> PreparedExport:
    """Choose how each matrix of a plan is stored in a format, before any work starts.

    Raises
    ------
    InputError
        If there is no such format, or it cannot hold the model or express the plan.
    """
    exporter = get_exporter(target.format, target.crossing, files.dtype)
    exporter.check_model(files)
    types = choose_types(exporter, matrices, quantizer, axis)
    return PreparedExport(target.format, exporter, types)


def prepare_plan_export(model: OpenModel, plan: Plan, target: ExportTarget) -> PreparedExport:
    """Prepare the export of a model quantized by a plan; see :func:`prepare_export`."""
    matrices = [
        ExportMatrix(m.name, m.out_features, m.in_features, config, m.expert is not None)
        for m, config in plan.choice.items()
    ]
    files = original_files(model)
    prepared = prepare_export(target, files, matrices, plan.quantizer, plan.axis)
    model.report("note", 0, 1, prepared.note)
    return prepared


def original_files(model: OpenModel) -> OriginalFiles:
    """Return the files of a model in full precision."""
    from lsq_core.model.dtypes import safetensors_name
    from lsq_core.model.loading import most_stored_dtype, stored_dtype

    folder = model.folder
    dtype = most_stored_dtype(folder) or stored_dtype(folder)
    file = gguf.find_file(model.source.name) if model.source.is_gguf else None
    named = "F32" if dtype is None else safetensors_name(dtype)
    return OriginalFiles(read_config(folder), folder, named, file)


# --- a run and its export ---------------------------------------------------------------------


def run_plan_and_export(
    model: OpenModel,
    plan: Plan,
    quantizer: str,
    request: EvaluationRequest,
    folder: Path,
    target: ExportTarget,
    plan_name: str = "",
    settings: ProfileSettings | None = None,
) -> dict:
    """Quantize by a plan, export to a folder, and measure both and full precision in one pass.

    Returns the run's figures like :func:`lsq_core.stages.measure.run_plan`, with those of its
    export under ``export``.

    Raises
    ------
    InputError, LsqError
        As :func:`lsq_core.stages.measure.run_plan` and :func:`prepare_export`.
    """
    plan = check_plan(model, plan, quantizer, settings)
    prepared = prepare_plan_export(model, plan, target)
    if not is_exported_folder(folder):
        check_folder_target(folder)
    made = quantize_plan(model, plan, quantizer, None, plan_name, settings=settings)
    exported = export_run(model, made, folder, target, prepared)
    own, other = measure(model, [made, exported], [request])
    figures_of_export = _export_figures(read_export(folder), folder) | _without_plan(other, plan)
    return own | {"export": figures_of_export}


def _without_plan(outcome: dict, plan: Plan) -> dict:
    """Return an outcome's figures without plan fields, which are those of the original run."""
    return {key: value for key, value in outcome.items() if key not in plan.to_json()}


def export_run(
    model: OpenModel,
    made: QuantizedRun,
    folder: Path | str,
    target: ExportTarget,
    prepared: PreparedExport | None = None,
) -> QuantizedRun:
    """Write a run's model in another format, and decode it as a separate run.

    A folder already written by an interrupted job is not written again.

    Raises
    ------
    InputError, LsqError
        If the format cannot express the plan, the folder exists or cannot be written, or the disk
        or memory is full.
    """
    folder = resolve_path(folder)
    prepared = prepared or prepare_plan_export(model, made.plan, target)
    run = digest(made.run, prepared.name, prepared.exporter.crossing)[:12]
    if not (is_exported_folder(folder) and read_export(folder)["run"] == run):
        manifest = make_manifest(model, made.plan, made.run)
        original = model.loaded.model if prepared.needs_original else None
        _write_export(
            prepared,
            Export(
                made.model,
                original,
                model.loaded.tokenizer,
                original_files(model),
                prepared.types,
                manifest | {"run": run, "exported_from": made.run},
                model.report,
            ),
            folder,
        )
    start_time = time.perf_counter()
    manifest = read_export(folder)
    decoded = load_exported(folder, manifest, model.device, model.dtype)
    row = made.row | _export_row(manifest, folder)
    row["quantize_seconds"] = made.row["quantize_seconds"] + time.perf_counter() - start_time
    return replace(made, run=run, model=decoded, row=row)


def _export_row(manifest: dict, folder: Path) -> dict:
    """Return the columns in which an export's row differs from that of its original run."""
    return {
        "format": manifest["exported_as"],
        "exported_from": manifest["exported_from"],
        "measured_bytes": manifest["exported_bytes"],
        "model_bytes": manifest["exported_model_bytes"],
        "saved_to": str(folder),
    }


def _export_figures(manifest: dict, folder: Path) -> dict:
    """Return an export's figures other than its evaluation."""
    return {
        "run": manifest["run"],
        "exported_from": manifest["exported_from"],
        "format": manifest["exported_as"],
        "types": manifest["types"],
        "measured_bytes": manifest["exported_bytes"],
        "measured_model_bytes": manifest["exported_model_bytes"],
        "saved_to": str(folder),
    }


def _write_export(prepared: PreparedExport, export: Export, folder: Path) -> None:
    """Write a folder atomically, including the plan and its provenance."""
    from lsq_core.quantized.artifact import atomic_folder

    check_folder_target(folder)
    check_modules(export)
    folder.parent.mkdir(parents=True, exist_ok=True)
    export.report("export", 0, 1, f"writing {prepared.exporter.title} to {folder}")
    with atomic_folder(folder, prepared.planned_bytes) as unfinished:
        written = prepared.exporter.write(export, unfinished)
        check_bytes(prepared.types, written)
        weights = [path for path in unfinished.iterdir() if path.suffix in _WEIGHT_SUFFIXES]
        manifest = {
            **export.provenance,
            "exported_as": prepared.name,
            "crossing": prepared.exporter.crossing,
            "exported_bytes": sum(written.values()),
            "exported_model_bytes": sum(path.stat().st_size for path in weights),
            "types": {name: asdict(stored) for name, stored in prepared.types.items()},
        }
        write_export(unfinished, manifest)
    export.report("export", 1, 1, f"wrote {format_bytes(manifest['exported_model_bytes'])}")


# --- folders ------------------------------------------------------------------------------


def load_exported(
    folder: Path, manifest: dict, device: str = "auto", dtype: str = "auto"
) -> nn.Module:
    """Load the model as programs for the folder's format decode it.

    Raises
    ------
    InputError, LsqError
        If the folder cannot be read, or there is too little memory.
    """
    from lsq_core.model.loading import pick_device, pick_dtype

    name = manifest["exported_as"]
    target = pick_device(device)
    compute = pick_dtype(dtype, target, None)
    exporter = get_exporter(name)
    with (
        wrap_library_errors(lambda reason: f"{folder} cannot be loaded as {name}: {reason}."),
        translate_resource_errors(device),
    ):
        return exporter.load(folder, compute, target)


def export_saved(
    folder: Path,
    out: Path,
    target: ExportTarget,
    store: Store,
    source: ModelSource | None = None,
    device: str = "auto",
    dtype: str = "auto",
    report: ProgressCallback = ignore_progress,
    trust_remote_code: bool = False,
) -> dict:
    """Write a saved model in another format; return the figures recorded in the new folder.

    ``source`` is the full-precision model, by default the source recorded when it was quantized.

    Raises
    ------
    InputError, LsqError
        As :func:`prepare_export`; or if the folder exists, or the original model is missing.
    """
    out = resolve_path(out)
    check_folder_target(out)
    get_exporter(target.format, target.crossing)  # reject a wrong name before anything is loaded
    manifest = read_manifest(folder, (*EVALUATION_KEYS, "source", "revision"))
    source = source or ModelSource(manifest["source"], manifest["revision"], trust_remote_code)
    original = open_original(source, manifest["fingerprint"], store, device, dtype, report)
    saved = load_saved(folder, device, dtype, report, trust_remote_code)
    files, matrices = original_files(original), export_matrices(saved.model)
    grid = manifest["quantizer"], manifest["axis"]
    prepared = prepare_export(target, files, matrices, *grid)
    report("note", 0, 1, prepared.note)
    full = original.loaded.model if prepared.needs_original else None
    provenance = {k: v for k, v in manifest.items() if k not in ("sha256", "format")}
    provenance |= {"run": new_id(), "exported_from": manifest["run"]}
    export = Export(saved.model, full, saved.tokenizer, files, prepared.types, provenance, report)
    _write_export(prepared, export, out)
    return _export_figures(read_export(out), out)


def evaluate_exported(
    folder: Path,
    request: EvaluationRequest,
    store: Store,
    device: str = "auto",
    dtype: str = "auto",
    report: ProgressCallback = ignore_progress,
) -> dict:
    """Evaluate the model decoded from an exported folder, and store the result as a run."""
    from lsq_core.model.loading import load_tokenizer

    manifest = read_export(folder)
    report("load", 0, 1, f"decoding {folder}")
    model = load_exported(folder, manifest, device, dtype)
    first = next(model.parameters())
    where = {"device": str(first.device), "dtype": str(first.dtype)[6:]}
    tokenizer = load_tokenizer(ModelSource(str(folder)), folder)
    evaluation = evaluate_alone(model, tokenizer, request, where, report)
    row = {k: v for k, v in _export_row(manifest, folder).items() if k in _OWN_COLUMNS}
    store.add_evaluation(manifest, manifest["exported_bytes"], str(folder), evaluation, row)
    kept = {key: manifest[key] for key in ("method", "bits_per_param")}
    found = figures(evaluation, manifest["fingerprint"], manifest["source"], store)
    return {"model": str(folder)} | kept | _export_figures(manifest, folder) | found
