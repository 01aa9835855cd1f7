"""Many runs at once: methods × bases and budgets × quantizers × evaluation texts.

Other quantizers can serve as baselines: their uniform plans at every size. The model is loaded
once and profiled once, and a plan is quantized once for all its texts, reusing matrices quantized
alike for earlier plans. A few plans at a time are evaluated together, so that full precision is
evaluated once for all of them. Each run is stored as soon as it finishes, and found if the sweep
is started again.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from lsq_core.bits import PAPER
from lsq_core.errors import InputError, LsqError
from lsq_core.evaluation.protocol import EvaluationRequest
from lsq_core.files import DamagedFileError, read_json
from lsq_core.planning.methods import PLANNERS, ladder_of
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.quantization.registry import BASELINES, quantizer_spec
from lsq_core.session import Session
from lsq_core.sweep_batches import MAX_CONCURRENT_PLANS, Executor, InProcess
from lsq_core.sweep_state import FAILED, FINISHED, ITEMS_FILE, Sweep, SweepItem

__all__ = [
    "ALL",
    "EVERYTHING_BUDGETS",
    "EVERYTHING_QUANTIZER",
    "FAILED",
    "FINISHED",
    "ITEMS_FILE",
    "SweepItem",
    "baselines",
    "estimate_seconds",
    "expand_baselines",
    "expand_methods",
    "items",
    "parse_budgets",
    "read_sweep_rows",
    "requests",
    "sweep",
]

#: Given instead of methods or quantizers, selects all of them.
ALL = "all"
#: The "everything" sweep: roughly the sizes compared in papers, and one quantizer for methods.
EVERYTHING_BUDGETS, EVERYTHING_QUANTIZER = ("2.2bpp", "3.2bpp", "4.2bpp"), "hqq"


def items(
    requests: Sequence[PlanRequest],
    quantizers: Sequence[str],
    evaluations: Sequence[EvaluationRequest],
) -> list[SweepItem]:
    """Return the product as items; those of the same plan and quantizer are adjacent."""
    return [SweepItem(*parts) for parts in itertools.product(requests, quantizers, evaluations)]


def requests(
    template: PlanRequest, methods: Sequence[str], bases: Sequence[str], budgets: Sequence[str]
) -> list[PlanRequest]:
    """Return each method's requests at each base and budget, otherwise as in ``template``.

    A method that doesn't plan on the template's ladder uses the paper's.

    Raises
    ------
    InputError
        If no method is given, or neither a base nor a budget.
    """
    if not methods:
        raise InputError("Give at least one method with --method.")
    if not bases and not budgets:
        raise InputError("Give at least one --budget (such as 3.25bpp) or --base (such as 3.13).")
    sizes = [{"base": b} for b in bases] + [{"budget": b} for b in budgets]
    nothing = {"base": None, "budget": None}
    return [
        replace(template, method=m, ladder=ladder_of(m, template.ladder), **(nothing | size))
        for m in methods
        for size in sizes
    ]


def expand_methods(names: Sequence[str]) -> list[str]:
    """Return the method names; ``all`` expands to every method that needs no prior search."""
    if ALL not in names:
        return list(names)
    return [name for name, planner in PLANNERS.items() if not planner.reads_refinement]


def expand_baselines(names: Sequence[str], quantizers: Sequence[str]) -> list[str]:
    """Return the quantizers whose uniform plans are baselines, without the sweep's ``quantizers``.

    ``all`` expands to the usual baselines.

    Raises
    ------
    InputError
        If a name is not that of a quantizer.
    """
    wanted = list(BASELINES) if ALL in names else list(names)
    for name in wanted:
        quantizer_spec(name)
    return [name for name in wanted if name not in quantizers]


def baselines(
    template: PlanRequest,
    bases: Sequence[str],
    budgets: Sequence[str],
    quantizers: Sequence[str],
    evaluations: Sequence[EvaluationRequest],
) -> list[SweepItem]:
    """Return items for the uniform plan at each base and budget with each of these quantizers.

    Quantizers with no configurations beyond the paper's ladder are planned on that ladder.
    """
    found = []
    for request in requests(template, ["uniform"], bases, budgets) if quantizers else []:
        for name in quantizers:
            spec = quantizer_spec(name)
            lacks = spec.configs_on(template.ladder) == spec.configs_on(PAPER)
            own = replace(request, ladder=PAPER) if lacks else request
            found += items([own], [name], evaluations)
    return found


def parse_budgets(text: str) -> tuple[str, ...]:
    """Parse a list of budgets (``2.25, 2.51bpp 9MiB``); a bare number is bits per parameter.

    >>> parse_budgets("2.25, 9MiB")
    ('2.25bpp', '9MiB')
    """
    found = [word for word in re.split(r"[,;\s]+", text) if word]
    return tuple(dict.fromkeys(f"{w}bpp" if re.fullmatch(r"[\d.]+", w) else w for w in found))


def sweep(
    session: Session,
    requested: Sequence[SweepItem],
    settings: ProfileSettings,
    executor: Executor | None = None,
) -> list[dict]:
    """Make the runs that don't exist yet; return one row per item, in the same order.

    They are made in this process, unless an executor makes them elsewhere.

    A row has the item's fields, its ``state`` (done, found or failed), and the figures of its run
    or the ``reason`` of the failure. ``shipped`` tells whether a found run shipped with the
    project. An item that fails does not stop the others.

    Raises
    ------
    InputError, LsqError
        If all items failed; InputError if every one of them failed because of its input.
    """
    with closing(executor or InProcess()) as executor:
        places = executor.places(session)
        sweeping = Sweep(session, requested, settings, places, executor.measure_profile)
        sweeping.prepare()
        executor.run(sweeping)
    if sweeping.rows and all(row["state"] == FAILED for row in sweeping.rows):
        reason = sweeping.rows[0]["reason"]
        kind = InputError if len(sweeping.bad_input) == len(requested) else LsqError
        raise kind(f"None of the {len(requested)} runs succeeded; the first failed: {reason}")
    return sweeping.rows


def read_sweep_rows(folder: Path) -> list[dict]:
    """Return the rows so far of the sweep with this folder; empty if it has none yet.

    Raises
    ------
    DamagedFileError
        If the rows cannot be read.
    """
    path = folder / ITEMS_FILE
    rows = (read_json(path) or {"items": []}).get("items")
    requested = {"method", "base", "budget", "quantizer", "corpus", "state"}
    if isinstance(rows, list) and all(
        isinstance(row, dict) and requested <= set(row) for row in rows
    ):
        return rows
    raise DamagedFileError(f"{path} is damaged: it has no rows of a sweep.")


def estimate_seconds(runs: pd.DataFrame, requested: Sequence[SweepItem]) -> float | None:
    """Estimate the seconds that items will take from a model's runs so far, or return None.

    ``runs`` are from :meth:`Store.results`. A few plans at a time share the evaluation of full
    precision.
    """
    runs = runs[runs["tokens_per_second"] > 0]
    if runs.empty or not requested:
        return None
    whole = runs[~runs["truncated"].astype(bool)].groupby("corpus")["tokens"].max()
    tokens = [
        min(item.evaluation.max_tokens or np.inf, whole.get(item.evaluation.corpus, np.inf))
        for item in requested
    ]
    quantized = len({(item.request, item.quantizer) for item in requested})
    seconds = quantized * runs["quantize_seconds"].median()
    full = 1 / min(MAX_CONCURRENT_PLANS, quantized)
    seconds += (1 + full) * sum(tokens) / runs["tokens_per_second"].median()
    return float(seconds) if np.isfinite(seconds) else None
