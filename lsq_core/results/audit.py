"""Was stored what was planned? A plan against a saved or re-made model, matrix by matrix.

What is stored is told from the stored tensors alone: their names, dtypes and shapes, of a saved
model by the header of its file. Whether its weights are still those that were saved is told by the
checksums in its manifest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lsq_core.bits import METADATA_FORMATS, config_of
from lsq_core.errors import InputError
from lsq_core.model.checkpoint import safetensors_header
from lsq_core.model.info import Matrix
from lsq_core.model.source import MANIFEST, ModelSource, check_config
from lsq_core.progress import Report, silent
from lsq_core.quantization.layout import ITEMSIZE, Stored, as_saved, stored_bytes
from lsq_core.quantization.registry import QUANTIZERS, About, about
from lsq_core.quantized.manifest import FORMAT, RUN, WEIGHTS, changed_files, read_manifest
from lsq_core.stages.saved import remake, saved_folder
from lsq_core.store.store import Store

#: Names of the tensors that matrices are stored in, by any quantizer.
PARTS = {
    name
    for known in QUANTIZERS.values()
    for config in known.options
    for metadata in METADATA_FORMATS
    for name in known.layout((128, 128), config, metadata)
}


@dataclass(frozen=True)
class Line:
    """One matrix: the configuration and bytes that were planned, and those that are stored.

    ``stored`` is a configuration's name, or in words what is there instead.
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
    """Every matrix that is planned or stored, and where the stored tensors were found."""

    source: str
    lines: tuple[Line, ...]
    #: Of a saved model's files: ``intact``, ``changed``, or ``unknown`` where an earlier version
    #: saved it without checksums; '' of a model made again.
    files: str = ""
    changed: tuple[str, ...] = ()

    @property
    def agrees(self) -> bool:
        """Whether all is as planned, and no file is known to have changed since."""
        return not self.wrong and not self.changed

    @property
    def wrong(self) -> list[Line]:
        """The lines in which plan and artifact differ."""
        return [line for line in self.lines if not line.agrees]

    @property
    def stored_bytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(line.stored_bytes for line in self.lines)

    @property
    def verdict(self) -> str:
        """Whether all is as planned, or the first that isn't; and whether files have changed."""
        return " ".join(filter(None, (self._of_matrices(), self._of_files())))

    def _of_files(self) -> str:
        if self.files == "unknown":
            return (
                "It has no checksums, because an earlier version saved it: whether its weights "
                "have changed since can't be told."
            )
        if self.changed:
            more = f" and {len(self.changed) - 1} more" if self.changed[1:] else ""
            return f"{self.changed[0]}{more} isn't what was saved: its SHA-256 differs."
        return "Its files are those that were saved, by their SHA-256." if self.files else ""

    def _of_matrices(self) -> str:
        count = len(self.lines)
        if not self.wrong:
            return f"All {count} matrices are as planned: {self.stored_bytes:,} bytes."
        first = self.wrong[0]
        are = "is" if len(self.wrong) == 1 else "are"
        return (
            f"{len(self.wrong)} of {count} matrices {are} not as planned: {first.module} holds "
            f"{first.stored} ({first.stored_bytes:,} bytes) where {first.planned} "
            f"({first.planned_bytes:,} bytes) was planned."
        )

    def to_json(self) -> dict:
        """Everything, as the command line prints it."""
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
    stored: Mapping[str, Stored],
    source: str,
    format: int = FORMAT,
) -> Audit:
    """Compare what was planned with what is stored.

    Parameters
    ----------
    plan
        What :meth:`lsq_core.planning.plan.Plan.to_json` gives: its ``modules``, ``metadata`` and
        ``quantizer``.
    matrices
        The model's matrices, for their shapes.
    stored
        The stored tensors of each packed matrix, and of a planned one that was not packed.
    format
        Of the saved model: what a matrix is stored in depends on it.

    Raises
    ------
    InputError
        When the plan names a module that the model doesn't have.
    """
    shapes = {matrix.name: matrix for matrix in matrices}
    strangers = sorted(set(plan["modules"]) - set(shapes))
    if strangers:
        raise InputError(f"The plan names {strangers[0]}, which the model doesn't have.")
    lines = [
        _line(shapes[name], entry, plan, stored.get(name, {}), format)
        for name, entry in plan["modules"].items()
    ]
    for name in sorted(set(stored) - set(plan["modules"])):
        bytes = stored_bytes(stored[name])
        lines.append(Line(name, None, "", "nothing", 0, "a packed matrix", bytes, False))
    return Audit(source, tuple(lines))


def _line(matrix: Matrix, entry: dict, plan: dict, stored: Stored, format: int) -> Line:
    config, metadata = config_of(entry), plan["metadata"]
    known = about(plan.get("quantizer", "hqq"))
    expected = as_saved(known.layout(matrix.shape, config, metadata), format)
    found = config.name if stored == expected else _told(matrix.shape, known, stored, format)
    if stored and stored != expected and found == config.name:
        found += " with other metadata"
    return Line(
        module=matrix.name,
        layer=matrix.layer,
        type=matrix.type,
        planned=config.name,
        planned_bytes=stored_bytes(expected),
        stored=found,
        stored_bytes=stored_bytes(stored),
        agrees=stored == expected,
    )


def _told(shape: tuple[int, int], known: About, stored: Stored, format: int) -> str:
    """The configuration that tensors are of, or in words what they are."""
    if not stored:
        return "nothing"
    if set(stored) == {"weight"}:
        return f"{stored['weight'][1]} weights"
    for config in known.options:
        layouts = (known.layout(shape, config, metadata) for metadata in METADATA_FORMATS)
        if any(as_saved(layout, format) == stored for layout in layouts):
            return config.name
    return f"no configuration ({stored_bytes(stored):,} bytes in {', '.join(sorted(stored))})"


def stored_in_file(path: Path, planned: Iterable[str]) -> dict[str, Stored]:
    """The tensors of each packed matrix in a saved model, from the file's header alone.

    Raises
    ------
    InputError
        When it is no whole safetensors file, or a matrix is stored in a dtype of no quantizer.
    """
    header = safetensors_header(path).items()
    found = _grouped(((name, tuple(e["shape"]), e["dtype"]) for name, e in header), set(planned))
    for module, stored in found.items():
        for part, (_, dtype) in stored.items():
            if dtype not in ITEMSIZE:
                raise InputError(
                    f"{path} holds {module}.{part} as {dtype}, which no quantizer stores; save it "
                    "again."
                )
    return found


def stored_in_model(model: object, planned: Iterable[str]) -> dict[str, Stored]:
    """The same of a quantized model in memory."""
    names = {
        "uint8": "U8",
        "int16": "I16",
        "int32": "I32",
        "float16": "F16",
        "bfloat16": "BF16",
        "float32": "F32",
    }
    kinds = {f"torch.{name}": short for name, short in names.items()}
    tensors = (
        (name, tuple(tensor.shape), kinds.get(str(tensor.dtype), str(tensor.dtype)))
        for name, tensor in model.state_dict().items()
    )
    return _grouped(tensors, set(planned))


def _grouped(
    tensors: Iterable[tuple[str, tuple[int, ...], str]], planned: set[str]
) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for name, shape, dtype in tensors:
        module, _, part = name.rpartition(".")
        if part in PARTS or (part == "weight" and module in planned):
            found.setdefault(module, {})[part] = (shape, dtype)
    return found


# --- of a folder, of a run --------------------------------------------------------------------


def audit_folder(folder: Path, store: Store) -> Audit:
    """Audit a saved model against the plan of its run, and its files by their checksums.

    Needs torch only where the store doesn't know the model.

    Where the store knows the run, that plan is the one it keeps, else the one in the folder.

    Raises
    ------
    InputError
        When it is no saved model, or nothing tells the shapes of its matrices.
    """
    manifest = read_manifest(folder, RUN)
    run = manifest["run"]
    known = store.model(manifest["fingerprint"])
    matrices = known.matrices if known else _matrices_of(folder)
    try:
        plan, where = store.run(run)["content"], f"the plan of run {run}"
    except InputError:
        plan, where = manifest, MANIFEST
    stored = stored_in_file(folder / WEIGHTS, plan["modules"])
    found = audit(plan, matrices, stored, f"{folder / WEIGHTS} against {where}", manifest["format"])
    changed = changed_files(folder, manifest)
    files = "unknown" if changed is None else "changed" if changed else "intact"
    return replace(found, files=files, changed=tuple(changed or ()))


def _matrices_of(folder: Path) -> tuple[Matrix, ...]:
    from lsq_core.model.architecture import describe
    from lsq_core.model.loading import skeleton

    check_config(folder, saved=True)

    source = ModelSource(str(folder))
    return describe(skeleton(source, folder), source).matrices


def audit_run(
    run: str,
    store: Store,
    source: ModelSource | None = None,
    device: str = "auto",
    dtype: str = "auto",
    report: Report = silent,
    trust_remote_code: bool = False,
) -> Audit:
    """Audit a run: its saved model where there is one, else the model made once more.

    Raises
    ------
    InputError
        When there is no such run, or its model is gone.
    """
    kept = store.run(run)
    folder = saved_folder(kept)
    if folder is not None:
        return audit_folder(folder, store)
    bench, model = remake(run, source, store, device, dtype, report, trust_remote_code)
    plan = kept["content"]
    stored = stored_in_model(model, plan["modules"])
    return audit(plan, bench.info.matrices, stored, f"run {run} made again, against its plan")
