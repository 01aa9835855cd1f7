"""Verbs that list stored results and write them to files."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lsq_core.errors import InputError
from lsq_core.files import write_bytes
from lsq_core.model.source import ModelSource
from lsq_core.progress import ProgressCallback
from lsq_core.store.models import PUBLISHED
from lsq_core.store.store import Store
from lsq_core.targets import check_file_target

if TYPE_CHECKING:
    import pandas as pd


def results(options: argparse.Namespace, report: ProgressCallback) -> dict:
    """List all runs, measured or published ones, newest first."""
    frame = _results(options)
    frame = frame.assign(created=frame["created"].astype(str))
    return {"results": frame.astype(object).where(frame.notna(), None).to_dict("records")}


def _results(options: argparse.Namespace) -> pd.DataFrame:
    frame = Store(options.db).results(origin="published" if options.published else "measured")
    if options.model:
        names = options.model, ModelSource(options.model).name, PUBLISHED + options.model
        frame = frame[frame["model"].isin(names)]
    return frame


def export(options: argparse.Namespace, report: ProgressCallback) -> dict:
    """Export all runs as a table, or one run as a report or BibTeX, by the file's extension."""
    from lsq_core.results import export as exports

    tables = {".csv": exports.csv_bytes, ".parquet": exports.parquet_bytes}
    pages = {".html": _render_report, ".bib": lambda store, record: exports.bibtex(record)}
    kind = options.out.suffix.lower()
    if kind not in tables | pages:
        raise InputError(f"{options.out} must end in one of {', '.join(tables | pages)}.")
    if (kind in pages) != bool(options.run):
        needs = "a run with --run" if kind in pages else "no --run, because it contains all runs"
        raise InputError(f"A {kind} file needs {needs}.")
    check_file_target(options.out)
    if kind in tables:
        frame = _results(options)
        content, count = tables[kind](frame), len(frame)
    else:
        store = Store(options.db)
        record = store.record(_latest_evaluation(store, options.run))
        content, count = pages[kind](store, record).encode("utf8"), 1
    write_bytes(options.out, content, new=True)
    return {"out": str(options.out), "runs": count, "bytes": len(content)}


def card(options: argparse.Namespace, report: ProgressCallback) -> dict:
    """Draw one run as a shareable picture, PNG or HTML by the file's extension."""
    from lsq_core.results import card as cards

    kinds = {
        ".png": cards.card_png,
        ".html": lambda store, evaluation: cards.card_html(store, evaluation).encode("utf8"),
    }
    kind = options.out.suffix.lower()
    if kind not in kinds:
        raise InputError(f"{options.out} must end in one of {', '.join(kinds)}.")
    check_file_target(options.out)
    store = Store(options.db)
    content = kinds[kind](store, _latest_evaluation(store, options.run))
    write_bytes(options.out, content, new=True)
    return {"out": str(options.out), "runs": 1, "bytes": len(content)}


def _latest_evaluation(store: Store, run: str) -> str:
    """Return the newest evaluation of a run that is not deleted."""
    frame = store.results(origin=None)
    result = frame.loc[frame["run"] == run, "evaluation"]
    if result.empty:
        raise InputError(f"There is no run '{run}'; results --json lists them.")
    return result.iloc[0]


def _render_report(store: Store, record: dict) -> str:
    from lsq_core import charts
    from lsq_core.jobs.arguments import reproduce_command
    from lsq_core.results.compare import same_measurement
    from lsq_core.results.report import run_report

    own, run = record["evaluation"], record["run"]
    runs = store.results(run["fingerprint"], origin=None)
    beside = charts.add_run_labels(same_measurement(runs, own["id"]))
    figure = charts.perplexity_by_size(beside, [own["id"]], charts.BITS)
    matrices = store.model(run["fingerprint"]).matrices
    return run_report(record, matrices, reproduce_command(record), figure)
