"""Import the measurements published by the authors of [A] and [B].

:func:`import_reference` reads a checkout of their toolkit (github.com/schnell18/lm-quant-toolkit)
into the store. Models have no weights and are named ``published:NAME``: they can be viewed, planned
for and compared, but not run. Every figure is stored with its source file; anything that a file
lacks is reported, not substituted.
"""

from __future__ import annotations

import shutil
import time
from datetime import timedelta
from pathlib import Path

import pandas as pd

from lsq_core.files import resolve_path
from lsq_core.jsontext import json_text
from lsq_core.profiling.profile import Profile
from lsq_core.profiling.settings import PUBLISHED_SETTINGS
from lsq_core.progress import ProgressCallback, ignore_progress
from lsq_core.provenance import now
from lsq_core.reference import download
from lsq_core.reference.checkout import Checkout
from lsq_core.reference.models import read_models, read_profiles
from lsq_core.reference.outcomes import outcomes, read_plans
from lsq_core.store.store import Store

__all__ = ["import_download", "import_reference"]


def import_reference(
    folder: str | Path, store: Store, report: ProgressCallback = ignore_progress
) -> dict:
    """Import a checkout of lm-quant-toolkit into the store, replacing any earlier import.

    Everything is checked before anything is stored, in one transaction.

    Returns
    -------
    dict
        ``source``; ``counts``, rows by table; ``models``, their names; ``missing``, sentences about
        what the files lack; ``flawed``, sentences about plans that aren't what they claim;
        ``files``, the SHA-256 of each; ``seconds``.

    Raises
    ------
    InputError
        If the folder is not a checkout or a file is damaged; the message names the remedy.
    LsqError
        If the database cannot be written.
    """
    start_time = time.perf_counter()
    checkout = Checkout(resolve_path(folder))
    report("import", 0, 3, "reading plans")
    plans, sizes = read_plans(checkout)
    report("import", 1, 3, "reading models and profiles")
    models = read_models(checkout, sizes)
    profiles = read_profiles(checkout, models)
    report("import", 2, 3, "reading runs")
    rows = _profile_frames(profiles) | outcomes(checkout, models, plans)
    infos = [model.info for model in models.values()]
    store.replace_published(infos, rows)
    counts = {"models": len(infos), "matrices": sum(len(info.matrices) for info in infos)}
    counts |= {table: len(frame) for table, frame in rows.items()}
    report("import", 3, 3, f"{counts['runs']} runs and {counts['profiles']} profiles")
    return {
        "source": str(checkout.root),
        "counts": counts,
        "models": [info.source for info in infos],
        "missing": checkout.missing,
        "flawed": checkout.flawed,
        "files": checkout.files,
        "seconds": time.perf_counter() - start_time,
    }


def import_download(
    store: Store,
    report: ProgressCallback = ignore_progress,
    url: str = download.URL,
    commit: str = download.COMMIT,
) -> dict:
    """Download the pinned revision of lm-quant-toolkit, import it, and delete the files.

    Returns the same as :func:`import_reference`, with the URL and the commit as ``source``.

    Raises
    ------
    InputError, LsqError
        See :func:`import_reference` and :func:`lsq_core.reference.download.download`.
    """
    folder = download.download(store.path.parent, report, url, commit)
    try:
        return import_reference(folder, store, report) | {"source": f"{url} at {commit[:12]}"}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _profile_frames(profiles: list[Profile]) -> dict[str, pd.DataFrame]:
    """Return rows of ``profiles`` and ``scores``; each model's main profile is made the newest."""
    created, main = now(), PUBLISHED_SETTINGS
    rows = [
        {
            "id": profile.id,
            "fingerprint": profile.fingerprint,
            "settings": json_text(profile.settings.to_json()),
            "provenance": json_text(profile.provenance),
            "created": created - timedelta(microseconds=i),
            "origin": "published",
        }
        for i, profile in enumerate(sorted(profiles, key=lambda p: p.settings != main))
    ]
    scores = [profile.values.assign(profile=profile.id) for profile in profiles]
    return {"profiles": pd.DataFrame(rows), "scores": pd.concat(scores, ignore_index=True)}
