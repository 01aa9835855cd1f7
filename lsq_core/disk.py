"""List what this project stores on disk, and delete parts of it.

A database may come from anyone, so the folders it names are not trusted: a model folder is deleted
only if it is inside the data folder, next to the database, and has only a model's files.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from lsq_core import jobs
from lsq_core.errors import InputError
from lsq_core.evaluation.reference_states import list_kept
from lsq_core.exports.weights.manifest import EXPORT_FILE, unrelated_export_files
from lsq_core.files import is_locked, write_error
from lsq_core.model import gguf
from lsq_core.model.source import MANIFEST_FILE, folder_bytes
from lsq_core.quantized.manifest import unfinished_folders, unrelated_files
from lsq_core.store.store import Store

#: The ``kind`` of a model in another tool's format.
_EXPORTED = "exported model"


@dataclass(frozen=True)
class DiskItem:
    """Something stored on disk: its kind, path and size, and whether it can be pruned.

    ``reason`` explains why it can't be.
    """

    name: str
    kind: str
    path: Path
    bytes: int
    prunable: bool
    reason: str = ""


def models_folder(store: Store) -> Path:
    """Return the folder in which the app saves quantized models."""
    return store.path.parent / "models"


def jobs_folder(store: Store) -> Path:
    """Return the folder that contains the jobs' folders."""
    return store.path.parent / "jobs"


def list_disk_items(store: Store) -> list[DiskItem]:
    """Return the database, models, jobs, stored hidden states, and cached models.

    Models are saved, exported or unfinished; cached models are dequantized GGUF files and models
    fetched from the Hugging Face Hub.
    """
    size = store.path.stat().st_size
    items = [DiskItem("database", "database", store.path, size, False, "it is the database")]
    saved, exported = (_model_folders(store, name) for name in (MANIFEST_FILE, EXPORT_FILE))
    parents = {models_folder(store), store.path.parent}
    parents |= {path.parent for path in saved | exported}
    unfinished = {path for parent in parents for path in unfinished_folders(parent)}
    # Earlier versions saved into folders named by ``tempfile``.
    unfinished |= {p for p in models_folder(store).glob(".*-????????") if p.is_dir()}
    items += [_saved_model_item(store, path, "saved model") for path in sorted(saved)]
    items += [_saved_model_item(store, path, _EXPORTED) for path in sorted(exported)]
    items += [_saved_model_item(store, path, "unfinished model") for path in sorted(unfinished)]
    items += [
        _disk_item(job.id, "job", job.folder, "its job is still running" if job.active else "")
        for job in jobs.list_jobs(jobs_folder(store))
    ]
    items += [
        _disk_item(f"hidden-states:{folder.name[:8]} {title}".strip(), "hidden states", folder, "")
        for folder, title in list_kept(store.path.parent)
    ]
    return items + _dequantized_items() + _hub_cache_items()


def _model_folders(store: Store, name: str) -> set[Path]:
    """Return folders with a file of this name, in the models' folder or named by a run."""
    named = {path for path in map(Path, store.saved_folders()) if _file_exists(path / name)}
    return named | {path.parent for path in models_folder(store).glob(f"*/{name}")}


def _file_exists(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False  # an invalid file name


def _disk_item(name: str, kind: str, path: Path, reason: str) -> DiskItem:
    return DiskItem(name, kind, path, folder_bytes(path), not reason, reason)


def _saved_model_item(store: Store, path: Path, kind: str) -> DiskItem:
    """Return a model's item; prunable only if in the data folder and without other files."""
    data_folder, reason = store.path.parent.resolve(), ""
    if (
        path.is_symlink()
        or not path.resolve().is_relative_to(data_folder)
        or path.resolve() == data_folder
    ):
        reason = f"it is outside {data_folder}; delete it yourself"
    elif unrelated := _unrelated_files(path, kind):
        reason = f"it also contains other files ({unrelated[0][:80]}); delete it yourself"
    elif is_locked(path):
        reason = "it is being written"
    bytes = sum(p.lstat().st_size for p in path.iterdir() if p.is_file())
    return DiskItem(str(path), kind, path, bytes, not reason, reason)


def _unrelated_files(path: Path, kind: str) -> list[str]:
    """Return the names of unrelated files in a model's folder."""
    if kind != _EXPORTED:
        return unrelated_files(path)
    try:
        return unrelated_export_files(path)
    except InputError:
        return [EXPORT_FILE]  # damaged, so the origin of the other files is unknown


def _dequantized_items() -> list[DiskItem]:
    """Return the folders of dequantized GGUF files, which are rebuilt when needed."""
    return [
        _disk_item(f"gguf:{origin.name}", "dequantized GGUF file", folder, "")
        for folder, origin in gguf.dequantized_folders()
    ]


def _hub_cache_items() -> list[DiskItem]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        cache = scan_cache_dir()
    except CacheNotFound:
        return []
    return [
        DiskItem(
            f"hf:{repo.repo_id}", "fetched model", Path(repo.repo_path), repo.size_on_disk, True
        )
        for repo in sorted(cache.repos, key=lambda repo: repo.repo_id)
        if repo.repo_type == "model"
    ]


def prune(store: Store, name: str) -> DiskItem:
    """Delete an item of :func:`list_disk_items` by name; results in the database are kept.

    Raises
    ------
    InputError
        If there is no such item, it is in use, or it does not belong to this project.
    """
    by_name = {item.name: item for item in list_disk_items(store)}
    item = by_name.get(name)
    if item is None:
        raise InputError(f"There is no stored item named '{name}'; 'disk' lists them.")
    if not item.prunable:
        raise InputError(f"'{name}' cannot be pruned: {item.reason}.")
    try:
        shutil.rmtree(item.path)
    except OSError as error:
        raise write_error(item.path, error) from error
    return item
