"""The verb ``export-plan``: its options, action and output."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lsq_core.errors import InputError
from lsq_core.exports.registry import PLAN_TARGETS, plan_target
from lsq_core.exports.registry import export_plan as translate_plan
from lsq_core.files import write_bytes
from lsq_core.model.source import ModelSource
from lsq_core.progress import ProgressCallback
from lsq_core.stages.exports import find_plan
from lsq_core.store.store import Store
from lsq_core.targets import check_file_target
from lsq_core.units import format_bytes


def add_options(sub: argparse.ArgumentParser) -> None:
    """Add the verb's options to its parser."""
    sub.add_argument(
        "plan", metavar="PLAN|RUN", help="a file written by plan --out, or the id of a run"
    )
    sub.add_argument("--to", required=True, help=f"one of {', '.join(PLAN_TARGETS)}")
    sub.add_argument("--out", type=Path, help="a new file (default: standard output)")
    sub.add_argument(
        "--nearest",
        action="store_true",
        help="where the tool lacks a configuration, take its nearest one: the same bits if it has "
        "them, else the closest in bits per weight",
    )
    sub.add_argument("--model", help="the plan's model, if the plan does not identify it")
    sub.add_argument("--revision", help="branch, tag or commit of a Hugging Face id")


def export_plan(options: argparse.Namespace, report: ProgressCallback) -> dict:
    """Write a plan in another tool's format, completely or not at all."""
    plan_target(options.to)
    if options.out:
        check_file_target(options.out)
        if options.out.exists():
            raise InputError(f"{options.out} already exists; give a new file.")
    source = ModelSource(options.model, options.revision) if options.model else None
    plan, info = find_plan(options.plan, Store(options.db), source)
    translation = translate_plan(plan, info, options.to, options.nearest)
    out = str(options.out) if options.out else None
    if out:
        write_bytes(options.out, translation.text.encode("utf8"), new=True)
    return {"out": out, "model": info.source} | translation.to_json(out)


def show(result: dict) -> None:
    """Print the plan, or the path of its file; without a file, the summary goes to stderr."""
    if result["out"] is None:
        print(result["text"], end="")
    aside = sys.stdout if result["out"] else sys.stderr
    if result["out"]:
        print(f"{result['out']}: {len(result['modules'])} modules for {result['target']}")
    for line in summary_lines(result):
        print(line, file=aside)


def summary_lines(result: dict) -> list[str]:
    """Return the sizes, replaced configurations, notes, and the code that uses the file."""
    lines = [
        f"linear weights: {format_bytes(result['stored_bytes'])} in {result['target']}, "
        f"{format_bytes(result['nominal_bytes'])} nominal here"
    ]
    lines += [
        f"  {c['modules']} × {c['planned']} became {c['taken']}: {c['reason']}"
        for c in result["changes"]
    ]
    return [*lines, *result["notes"], "", result["usage"]]
