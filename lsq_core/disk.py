"""What this project keeps on disk, and how to let go of it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from lsq_core import jobs
from lsq_core.errors import InputError
from lsq_core.model import MANIFEST, folder_bytes
from lsq_core.store import Store


@dataclass(frozen=True)
class Kept:
    """Something on disk: what it is, where, how large, and whether it can be pruned from here."""

    name: str
    kind: str
    path: Path
    bytes: int
    prunable: bool


def models_folder(store: Store) -> Path:
    """Where the app saves quantized models."""
    return store.path.parent / "models"


def jobs_folder(store: Store) -> Path:
    """Where jobs have their folders."""
    return store.path.parent / "jobs"


def kept_on_disk(store: Store) -> list[Kept]:
    """The database, saved models, ended jobs, and models fetched from Hugging Face."""
    found = [Kept("database", "database", store.path, store.path.stat().st_size, False)]
    saved = {p.parent for p in models_folder(store).glob(f"*/{MANIFEST}")}
    saved |= {Path(p) for p in store.saved_folders() if (Path(p) / MANIFEST).is_file()}
    found += [Kept(str(p), "saved model", p, folder_bytes(p), True) for p in sorted(saved)]
    found += [
        Kept(job.id, "job", job.folder, folder_bytes(job.folder), not job.active)
        for job in jobs.list_jobs(jobs_folder(store))
    ]
    return found + _fetched_models()


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
        When there is no such thing, or it is in use.
    """
    known = {item.name: item for item in kept_on_disk(store)}
    item = known.get(name)
    if item is None:
        raise InputError(f"Nothing named '{name}' is kept; 'disk' lists what is.")
    if not item.prunable:
        raise InputError(f"'{name}' cannot be pruned: it is the database or a job still running.")
    shutil.rmtree(item.path)
    return item
