"""Find the plan to export to another tool, from a file or a run, and its model."""

from __future__ import annotations

from pathlib import Path

from lsq_core.errors import InputError
from lsq_core.files import resolve_path
from lsq_core.model.info import ModelInfo
from lsq_core.model.source import ModelSource
from lsq_core.planning.plan import Plan
from lsq_core.planning.saved import read_plan_file
from lsq_core.stages.model import OpenModel
from lsq_core.store.store import Store


def find_plan(
    reference: str | Path, store: Store, source: ModelSource | None = None
) -> tuple[Plan, ModelInfo]:
    """Return the plan of a file or run, and the description of its model; needs no weights.

    ``source`` is the model if the plan does not identify it.

    Raises
    ------
    InputError
        If there is no such file or run, it has no plan, or the model is unknown or a different one.
    """
    content, fingerprint = _read(reference, store)
    info = _find_model(content, fingerprint, store, source)
    return Plan.from_json(content, info.matrices, info.other_bytes), info


def _read(reference: str | Path, store: Store) -> tuple[object, str | None]:
    """Return a plan's JSON, and the fingerprint of its model if known."""
    path = resolve_path(reference)
    if path.is_file():
        content = read_plan_file(path)
        fingerprint = content.get("fingerprint") if isinstance(content, dict) else None
        return content, fingerprint if isinstance(fingerprint, str) and fingerprint else None
    found = store.run_plan(str(reference))
    if found is None:
        raise InputError(
            f"There is no file and no run '{reference}'; plan --out writes a plan, and results "
            "--json lists the runs."
        )
    content, fingerprint = found
    if "modules" not in content:
        raise InputError(f"The plan of run '{reference}' was not published.")
    return content, fingerprint


def _find_model(
    content: object, fingerprint: str | None, store: Store, source: ModelSource | None
) -> ModelInfo:
    stored = store.model(fingerprint) if fingerprint else None
    if source is None and stored is not None:
        return stored
    name = content.get("model") if isinstance(content, dict) else None
    if source is None and isinstance(name, str) and name:
        source = ModelSource(name)
    if source is None:
        raise InputError("The plan doesn't say which model it is for; give it with --model.")
    info = OpenModel(source, store).config_info
    if fingerprint and info.fingerprint and info.fingerprint != fingerprint:
        planned_for = stored.source if stored else name or "another model"
        raise InputError(f"The plan is for {planned_for}, not for {info.source}.")
    return info
