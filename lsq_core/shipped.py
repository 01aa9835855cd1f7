"""Measure and export the measurements that ship with the project.

They are stored as Parquet files in ``data/measured``: so far SmolLM2's profile by HQQ and the runs
of all methods listed here. The app imports them on its first start, marked as shipped. To rebuild
all of them, run ``make measured``, which skips measurements already in its database:

    python -m lsq_core.shipped --calibration wikitext2-valid.txt --corpus wikitext2-test.txt
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lsq_core import paths
from lsq_core.evaluation.protocol import EvaluationRequest
from lsq_core.files import cached_sha256
from lsq_core.model.gguf import SMOLLM2
from lsq_core.model.source import ModelSource
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.progress import ProgressCallback, ignore_progress
from lsq_core.store.store import Store

#: The folder of the shipped measurements, in a checkout or installed.
FOLDER = paths.RESOURCES / "data" / "measured"
MODELS = (SMOLLM2, "demo")
#: Quantizers profiled in addition to HQQ, which also quantizes the runs.
OTHER_QUANTIZERS = ("rtn", "nf4")
BUDGETS = ("2.5bpp", "2.8bpp", "3.2bpp", "3.6bpp", "4.2bpp", "5bpp", "6bpp")
BASES = ("2.25", "2.51", "3.13", "3.25", "3.51", "4.13", "4.25", "4.51", "8.13")
#: Methods that raise layers above a base are run at the bases in between, as in their paper.
BOOSTS = ("sensiboost", "kurtboost", "sensiboost-ablation", "kurtboost-ablation")
BOOST_BASES = BASES[1:-1]
KNAPSACKS = ("mxq", "sensi-knapsack", "kl-aware", "loss-aware")
#: Methods that differ little from others are run at only some of the budgets.
VARIANTS = ("kurt-scaled", "sensi-milp", "kurt-milp")
VARIANT_BUDGETS = ("3.2bpp", "4.2bpp")
MAX_TOKENS = 4096


def import_measurements(store: Store, folder: Path = FOLDER) -> bool:
    """Import the shipped measurements unless already imported; return whether this was done.

    Raises
    ------
    LsqError
        If the database cannot be written.
    """
    files = sorted(folder.glob("*.parquet"))
    digest = hashlib.sha256("".join(map(cached_sha256, files)).encode()).hexdigest()
    if not files or store.is_shipped_imported(digest):
        return False
    store.import_shipped(folder, digest)
    return True


def measure(
    store: Store,
    calibration: str,
    corpus: str,
    models: Sequence[str] = MODELS,
    report: ProgressCallback = ignore_progress,
) -> None:
    """Measure everything that is shipped and not in the store yet.

    ``calibration`` and ``corpus`` are text files in the current folder, given by bare file names,
    since figures are shown under these names.
    """
    from lsq_core.session import Session
    from lsq_core.sweep import items, sweep

    for name in models:
        session = Session(ModelSource(name), store, report=report)
        settings = ProfileSettings(calibration=calibration)
        session.profile(settings, ["loss_impact", "expected_kl"])
        evaluation = EvaluationRequest(corpus, "strided", MAX_TOKENS)
        sweep(session, items(_plans(), ["hqq"], [evaluation]), settings)
        if not store.has_noise_floor(session.info.fingerprint):
            session.measure_noise(evaluation)
        for quantizer in OTHER_QUANTIZERS:
            session.profile(replace(settings, quantizer=quantizer))


def _plans() -> list[PlanRequest]:
    """Return the requests of all methods' plans."""
    from lsq_core.sweep import requests

    template = PlanRequest("uniform")
    plans = requests(template, ["uniform"], BASES, [])
    plans += requests(template, BOOSTS, BOOST_BASES, [])
    plans += requests(template, KNAPSACKS, [], BUDGETS)
    return plans + requests(template, VARIANTS, [], VARIANT_BUDGETS)


def export(store: Store, folder: Path = FOLDER) -> dict[str, int]:
    """Write a store's measurements as the files to ship; return the number of rows by table."""
    models = store.models()
    chosen = models[models["source"].isin(MODELS)]["fingerprint"].tolist()
    return store.export_measurements(chosen, folder)


def main() -> None:
    """Measure and export, as described in the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m lsq_core.shipped", description=__doc__)
    parser.add_argument("--calibration", required=True, help="text file to calibrate on")
    parser.add_argument("--corpus", required=True, help="text file to evaluate on")
    parser.add_argument("--db", default="measured.duckdb", help="database to measure into")
    parser.add_argument(
        "--model", action="append", choices=MODELS, help="measure only this model (repeatable)"
    )
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the Parquet files")
    options = parser.parse_args()
    store = Store(options.db)

    def report(stage: str, done: int, total: int, message: str) -> None:
        print(f"{stage:>9} {100 * done / max(total, 1):3.0f} %  {message}", flush=True)

    measure(store, options.calibration, options.corpus, options.model or MODELS, report)
    for table, count in export(store, options.out).items():
        print(f"{table}: {count} rows")


if __name__ == "__main__":
    main()
