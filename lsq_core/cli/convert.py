"""The verb ``convert``, and the options of ``run`` for other tools' formats."""

from __future__ import annotations

import argparse
from pathlib import Path

from lsq_core.errors import InputError
from lsq_core.evaluation.protocol import EvaluationRequest
from lsq_core.exports.weights.manifest import is_exported_folder
from lsq_core.exports.weights.registry import (
    CROSSING,
    FORMATS,
    LSQ,
    ExportTarget,
    check_crossing,
    weight_format,
)
from lsq_core.files import resolve_path
from lsq_core.model.source import ModelSource
from lsq_core.progress import ProgressCallback
from lsq_core.quantized.manifest import is_quantized_folder
from lsq_core.stages.export import evaluate_exported, export_saved
from lsq_core.store.store import Store


def add_target_options(sub: argparse.ArgumentParser, formats: list[str], default: str) -> None:
    """Add the options for the format in which a model is written."""
    known = "; ".join(f"{name} for {FORMATS[name].programs}" for name in formats)
    default_note = f" ({default})" if default else ""
    sub.add_argument(
        "--format", default=default, required=not default, help=f"{known}{default_note}"
    )
    ways = "; ".join(f"{name}: {text}" for name, text in CROSSING.items())
    sub.add_argument(
        "--crossing",
        default="refuse",
        help="for formats that keep groups within a row, what to do with a matrix whose rows its "
        f"groups do not fill. {ways} (refuse)",
    )


def parse_target(options: argparse.Namespace, save: Path | None) -> ExportTarget | None:
    """Return the format to export to, None for this project's own.

    Raises
    ------
    InputError
        If there is no such format, or no folder for the export is given.
    """
    weight_format(options.format)
    check_crossing(options.crossing)
    if options.format == LSQ:
        return None
    if save is None:
        raise InputError(f"Give the folder for the {options.format} files with --save.")
    return ExportTarget(options.format, options.crossing)


def is_saved_folder(folder: Path) -> bool:
    """Return whether a folder contains a saved model, in any format."""
    return is_quantized_folder(folder) or is_exported_folder(folder)


def convert(options: argparse.Namespace, report: ProgressCallback) -> dict:
    """Write a saved model in another format, and evaluate the model decoded from it."""
    out, folder, store = resolve_path(options.out), resolve_path(options.folder), Store(options.db)
    target = parse_target(options, out)
    if target is None:
        raise InputError(f"{folder} is in the format {LSQ} already; choose another --format.")
    request = EvaluationRequest(options.corpus, options.protocol, options.max_tokens)
    source = options.model and ModelSource(
        options.model, options.revision, options.trust_remote_code, options.allow_pickle
    )
    device_and_dtype = options.device, options.dtype
    trusted = options.trust_remote_code
    exported = export_saved(
        folder, out, target, store, source or None, *device_and_dtype, report, trusted
    )
    if not options.evaluate:
        return exported
    return evaluate_exported(out, request, store, *device_and_dtype, report)
