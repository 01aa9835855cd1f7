"""Which plan a person means for another tool: a file's, or a run's, and the model it is for."""

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
    """The plan in a file or of a run, and its model, for which no weights are needed.

    ``source`` is the model where the plan doesn't lead to it.

    Raises
    ------
    InputError
        When there is no such file or run, it holds no plan, or the model is unknown or another.
    """
    content, fingerprint = _read(reference, store)
    info = _find_model(content, fingerprint, store, source)
    return Plan.from_json(content, info.matrices, info.other_bytes), info


def _read(reference: str | Path, store: Store) -> tuple[object, str | None]:
    """A plan's JSON, and the fingerprint of its model where that is known."""
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
