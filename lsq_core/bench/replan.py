"""Ten or twelve plans of one model in a sweep, against the same plans in independent runs."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lsq_core.bench import DEFAULT_MODEL, Row, time_interleaved
from lsq_core.evaluation.protocol import EvaluationRequest
from lsq_core.model.source import ModelSource
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.provenance import device_kind
from lsq_core.session import Session
from lsq_core.store.store import Store
from lsq_core.sweep import SweepItem, items, sweep

#: Ten MXQ budgets a tenth of a bit apart, as when dragging the slider from 3.0 to 3.9 bits.
BUDGETS = tuple(f"{3 + tenths / 10:.1f}bpp" for tenths in range(10))
#: The same up to 4.1 bits.
TWELVE_BUDGETS = (*BUDGETS, "4.0bpp", "4.1bpp")
#: Tokens to evaluate each plan on: two windows of the demo model, enough to choose among plans.
TOKENS = 512
#: Settings of the profile that plans are made from; they don't matter here.
SETTINGS = ProfileSettings("rtn", samples=4, block_tokens=64)
#: Figures of a run that must be the same on both sides.
SAME = ("perplexity", "kl", "top1", "measured_bytes")


def replan10(repeats: int) -> Row:
    """Compare ten plans; each independent run loads, plans, quantizes and evaluates separately."""
    return _compare("replan10", "ten", BUDGETS, repeats, DEFAULT_MODEL, target=3.0)


def sweep12(repeats: int, model: str = DEFAULT_MODEL) -> Row:
    """Compare twelve plans of any model, on the GPU if there is one."""
    return _compare("sweep12", "twelve", TWELVE_BUDGETS, repeats, model, target=4.0)


def _compare(
    id: str, number: str, budgets: Sequence[str], repeats: int, model: str, target: float
) -> Row:
    """Compare a sweep over MXQ plans at these budgets with independent runs."""
    items_to_run = items(
        [PlanRequest("mxq", budget=budget) for budget in budgets],
        ["hqq"],
        [EvaluationRequest(max_tokens=TOKENS)],
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepared = Store(folder / "prepared.duckdb")
        bench = Session(ModelSource(model), prepared)
        bench.profile(SETTINGS)
        plans = [bench.plan(item.request, SETTINGS) for item in items_to_run]
        both = _Both(model, items_to_run, folder)
        pair = time_interleaved(
            both.sweep, both.runs, repeats, warm=0
        )  # planning has warmed up both
    stops = [(matrix.name, config) for plan in plans for matrix, config in plan.choice.items()]
    return Row(
        id=id,
        what=f"{number} plans of {_title(model)}, each on {TOKENS} tokens",
        ours="one sweep",
        theirs=f"{number} runs on their own",
        **pair.figures,
        error=both.difference,
        error_limit=1e-6,
        error_is=f"largest relative difference of {', '.join(SAME)}",
        target=target,
        device=device_kind(bench.device_and_dtype["device"]),
        details={
            "model": model,
            "matrices": len(stops),
            "different_matrices": len(set(stops)),
            "quantizing_share_of_theirs": both.quantizing / both.seconds,
        },
    )


def _title(model: str) -> str:
    return "the demo model" if model == DEFAULT_MODEL else model


class _Both:
    """Both sides, each call or independent run on its own copy of the prepared database.

    Each copy is in its own folder, so that none finds hidden states stored by another.
    """

    def __init__(self, model: str, items_to_run: Sequence[SweepItem], folder: Path) -> None:
        self.model, self.items_to_run, self.folder = model, items_to_run, folder
        self.number = 0
        self.swept: list[dict] = []
        self.run: list[dict] = []
        self.seconds = 0.0

    def _bench(self) -> Session:
        self.number += 1
        copy = self.folder / str(self.number) / "lsq.duckdb"
        copy.parent.mkdir()
        shutil.copy(self.folder / "prepared.duckdb", copy)
        return Session(ModelSource(self.model), Store(copy))

    def sweep(self) -> None:
        """Run ours."""
        self.swept = sweep(self._bench(), self.items_to_run, SETTINGS)

    def runs(self) -> None:
        """Run theirs."""
        self.run, start_time = [], time.perf_counter()
        for item in self.items_to_run:
            bench = self._bench()
            plan = bench.plan(item.request, SETTINGS)
            self.run.append(bench.run(plan, item.quantizer, item.evaluation))
        self.seconds = time.perf_counter() - start_time

    @property
    def quantizing(self) -> float:
        """Total seconds that the independent runs spent quantizing."""
        return sum(outcome["quantize_seconds"] for outcome in self.run)

    @property
    def difference(self) -> float:
        """The largest relative difference between the two sides."""
        pairs = [(a[n], b[n]) for a, b in zip(self.swept, self.run, strict=True) for n in SAME]
        ours, theirs = np.array(pairs).T
        return float(np.max(np.abs(ours - theirs) / np.abs(theirs)))
