"""What this project keeps on disk, and how to let go of it.

A database may be anybody's, and the folders that it names are only names: what is deleted lies in
the data folder, where the database is, and is nothing but a saved model.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from lsq_core import jobs
from lsq_core.errors import InputError
from lsq_core.files import cannot_write, in_use
from lsq_core.model.source import MANIFEST, folder_bytes
from lsq_core.quantized.manifest import foreign_files, unfinished_folders
from lsq_core.store.store import Store


@dataclass(frozen=True)
class Kept:
    """Something on disk: what it is, where, how large, and whether it can be pruned from here.

    ``reason`` says why it can't be.
    """

    name: str
    kind: str
    path: Path
    bytes: int
    prunable: bool
    reason: str = ""


def models_folder(store: Store) -> Path:
    """Where the app saves quantized models."""
    return store.path.parent / "models"


def jobs_folder(store: Store) -> Path:
    """Where jobs have their folders."""
    return store.path.parent / "jobs"


def kept_on_disk(store: Store) -> list[Kept]:
    """The database, saved models, ended jobs, and models fetched from Hugging Face.

    Of saved models also those that were not finished.
    """
    size = store.path.stat().st_size
    found = [Kept("database", "database", store.path, size, False, "it is the database")]
    named = [path for path in map(Path, store.saved_folders()) if _is_there(path / MANIFEST)]
    saved = {p.parent for p in models_folder(store).glob(f"*/{MANIFEST}")} | set(named)
    parents = {models_folder(store), store.path.parent, *(path.parent for path in saved)}
    unfinished = {path for parent in parents for path in unfinished_folders(parent)}
    # Earlier versions wrote into folders of the system's temporary names.
    unfinished |= {p for p in models_folder(store).glob(".*-????????") if p.is_dir()}
    found += [_saved(store, path, "saved model") for path in sorted(saved)]
    found += [_saved(store, path, "unfinished model") for path in sorted(unfinished)]
    found += [
        _kept(job.id, "job", job.folder, "it is a job still running" if job.active else "")
        for job in jobs.list_jobs(jobs_folder(store))
    ]
    return found + _fetched_models()


def _is_there(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False  # a name that no file can have


def _kept(name: str, kind: str, path: Path, reason: str) -> Kept:
    return Kept(name, kind, path, folder_bytes(path), not reason, reason)


def _saved(store: Store, path: Path, kind: str) -> Kept:
    """A saved model; one in another place, or among other files, is listed and no more."""
    home, reason = store.path.parent.resolve(), ""
    if path.is_symlink() or not path.resolve().is_relative_to(home) or path.resolve() == home:
        reason = f"it is outside {home}, so it is yours to delete"
    elif beside := foreign_files(path):
        reason = f"it holds other files too ({beside[0][:80]}), so it is yours to delete"
    elif in_use(path):
        reason = "it is being written"
    bytes = sum(p.lstat().st_size for p in path.iterdir() if p.is_file())
    return Kept(str(path), kind, path, bytes, not reason, reason)


def _fetched_models() -> list[Kept]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        cache = scan_cache_dir()
    except CacheNotFound:
        return []
    return [
        Kept(f"hf:{repo.repo_id}", "fetched model", Path(repo.repo_path), repo.size_on_disk, True)
        for repo in sorted(cache.repos, key=lambda repo: repo.repo_id)
        if repo.repo_type == "model"
    ]


def prune(store: Store, name: str) -> Kept:
    """Delete one of :func:`kept_on_disk` by name; results in the database stay.

    Raises
    ------
    InputError
        When there is no such thing, it is in use, or it is not this project's to delete.
    """
    known = {item.name: item for item in kept_on_disk(store)}
    item = known.get(name)
    if item is None:
        raise InputError(f"Nothing named '{name}' is kept; 'disk' lists what is.")
    if not item.prunable:
        raise InputError(f"'{name}' is not pruned: {item.reason}.")
    try:
        shutil.rmtree(item.path)
    except OSError as error:
        raise cannot_write(item.path, error) from error
    return item
