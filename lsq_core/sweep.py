"""Many runs at one go: methods × bases and budgets × quantizers × evaluation texts.

One load of the model, one profile, one quantization for all texts of a plan; each run is kept as
it finishes and found when the sweep is begun again.
"""

from __future__ import annotations

import itertools
import json
import re
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from lsq_core.errors import InputError, LsqError
from lsq_core.evaluate import Protocol
from lsq_core.jsontext import json_text, write_json
from lsq_core.pipeline import (
    EvaluationRequest,
    Report,
    Workbench,
    content_identity,
    plan_identity,
    provenance_of,
)
from lsq_core.plan import Plan, PlanRequest
from lsq_core.profile import Profile, ProfileSettings
from lsq_core.provenance import versions

#: The file, in the folder a job keeps things in, that tells what came of each item so far.
ITEMS = "items.json"
#: States of an item that has its figures, and of one that will never have any.
FINISHED, FAILED = ("done", "found"), "failed"
#: Parts that an item's progress is told in.
_PARTS = 1000


@dataclass(frozen=True)
class Item:
    """One run of a sweep: what to plan for, how to quantize, what to evaluate on."""

    request: PlanRequest
    quantizer: str
    evaluation: EvaluationRequest

    @property
    def title(self) -> str:
        """``mxq 2.25bpp, hqq, on stdlib``."""
        asked = " ".join(filter(None, (self.request.base, self.request.budget)))
        return f"{self.request.method} {asked}, {self.quantizer}, on {self.evaluation.corpus}"

    @property
    def asked(self) -> dict:
        """What tells its row from the others'."""
        return {
            "method": self.request.method,
            "base": self.request.base,
            "budget": self.request.budget,
            "quantizer": self.quantizer,
            "corpus": self.evaluation.corpus,
        }


def items(
    requests: Sequence[PlanRequest],
    quantizers: Sequence[str],
    evaluations: Sequence[EvaluationRequest],
) -> list[Item]:
    """Their product; the texts of one plan and quantizer come together."""
    return [Item(*parts) for parts in itertools.product(requests, quantizers, evaluations)]


def requests(
    like: PlanRequest, methods: Sequence[str], bases: Sequence[str], budgets: Sequence[str]
) -> list[PlanRequest]:
    """Each method at each base and at each budget, all else as in ``like``.

    Raises
    ------
    InputError
        When there is no method, or neither a base nor a budget.
    """
    if not methods:
        raise InputError("Give at least one method with --method.")
    if not bases and not budgets:
        raise InputError("Give at least one --budget (such as 3.25bpp) or --base (such as 3.13).")
    sizes = [{"base": b} for b in bases] + [{"budget": b} for b in budgets]
    nothing = {"base": None, "budget": None}
    return [replace(like, method=m, **(nothing | size)) for m in methods for size in sizes]


def parse_budgets(text: str) -> tuple[str, ...]:
    """``2.25, 2.51bpp 9MiB`` as budgets; a number alone means bits per parameter.

    >>> parse_budgets("2.25, 9MiB")
    ('2.25bpp', '9MiB')
    """
    found = [word for word in re.split(r"[,;\s]+", text) if word]
    return tuple(dict.fromkeys(f"{w}bpp" if re.fullmatch(r"[\d.]+", w) else w for w in found))


def sweep(bench: Workbench, asked: Sequence[Item], settings: ProfileSettings) -> list[dict]:
    """Make the runs that are not there yet; gives a row an item, in their order.

    A row has what was asked, its ``state`` (done, found, failed), and the figures of its run or
    the ``reason`` for none. An item that fails stops no other.

    Raises
    ------
    LsqError
        When every one of them failed.
    """
    sweeping = _Sweep(bench, asked, settings)
    sweeping.run()
    if all(row["state"] == FAILED for row in sweeping.rows):
        first = sweeping.rows[0]
        raise LsqError(f"None of the {len(asked)} runs could be made; the first: {first['reason']}")
    return sweeping.rows


class _Sweep:
    """The rows of a sweep, as they fill."""

    def __init__(self, bench: Workbench, asked: Sequence[Item], settings: ProfileSettings) -> None:
        self.bench, self.asked, self.settings = bench, asked, settings
        self.rows = [item.asked | {"state": "waiting"} for item in asked]
        self.plans: dict[PlanRequest, tuple[Plan, Profile | None]] = {}
        #: Why a request has no plan; trying again could measure a whole profile again.
        self.refused: dict[PlanRequest, str] = {}
        self.done = self.total = 0
        self.current = ""

    def run(self) -> None:
        """Plan everything, look up what is there, make the rest."""
        self._keep()
        for number in range(len(self.asked)):
            self._trying(number, self._plan)
            self._trying(number, self._look_up)
        self.total = len(self._waiting())
        self._keep()
        for _, numbers in itertools.groupby(self._waiting(), self._quantized_alike):
            self._make(list(numbers))

    def _waiting(self) -> list[int]:
        return [n for n, row in enumerate(self.rows) if row["state"] == "waiting"]

    def _quantized_alike(self, number: int) -> tuple[PlanRequest, str]:
        return self.asked[number].request, self.asked[number].quantizer

    def _trying(self, number: int, step: Callable[[int], None]) -> None:
        """Take a step for an item that has not failed; what goes wrong is its reason."""
        if self.rows[number]["state"] != "waiting":
            return
        try:
            step(number)
        except LsqError as error:
            self._fail(number, str(error))
        except Exception as error:  # a defect in one must not cost the others
            traceback.print_exc()
            self._fail(number, f"{type(error).__name__}: {error} (see the log)")

    def _fail(self, number: int, reason: str) -> None:
        self.rows[number] |= {"state": FAILED, "reason": reason}

    def _plan(self, number: int) -> None:
        request = self.asked[number].request
        if request in self.refused:  # what it was for another item, it is for this one
            raise LsqError(self.refused[request])
        if request not in self.plans:
            try:
                self.plans[request] = self.bench.plan(request, self.settings)
            except LsqError as error:
                self.refused[request] = str(error)
                raise
        plan = self.plans[request][0]
        self.rows[number] |= {
            "bits_per_param": plan.bits_per_param,
            "planned_bytes": plan.planned_bytes,
        }

    # --- what is there already --------------------------------------------------------------

    def _look_up(self, number: int) -> None:
        """Fill the row from a run that was kept, if it is the same."""
        item, bench = self.asked[number], self.bench
        stream = bench.stream(item.evaluation)  # a text that isn't there is told here
        there = self._same_plan(item)
        if there.empty:
            return
        protocol = Protocol.named(item.evaluation.protocol, bench.info.context).name
        made_with = provenance_of(bench.place, item.evaluation, bench.tokenizer)
        same = there[
            (there["corpus_sha256"] == stream.sha256)
            & (there["protocol"] == protocol)
            & (there["provenance"] == json_text(made_with))
            & there["kl"].notna()
        ]
        if not same.empty:
            self.rows[number] |= {"state": "found"} | self._figures(same["evaluation"].iloc[0])

    def _same_plan(self, item: Item) -> pd.DataFrame:
        """The evaluations of runs with the same plan, made the same way."""
        plan, _ = self.plans[item.request]
        rows = self.bench.store.evaluated(self.bench.info.fingerprint, plan.method, item.quantizer)
        place = self.bench.place
        rows = rows[
            (rows["device"] == place["device"])
            & (rows["dtype"] == place["dtype"])
            & (rows["versions"] == json_text(versions()))
        ]
        alike = [_same_content(json.loads(content), plan) for content in rows["content"]]
        return rows[np.array(alike, dtype=bool)]

    def _figures(self, evaluation: str) -> dict:
        rows = self.bench.store.results(self.bench.info.fingerprint)
        row = rows[rows["evaluation"] == evaluation].iloc[0]
        return {name: _plain(row[name]) for name in _FIGURES}

    # --- what has to be made ----------------------------------------------------------------

    def _make(self, numbers: list[int]) -> None:
        """Quantize once and evaluate on each text; all of them items of one plan."""
        self.bench.report, outer = self._reporting(self.bench.report), self.bench.report
        made = None

        def evaluate(number: int) -> None:
            nonlocal made
            item = self.asked[number]
            self._look_up(number)  # an item before it may have had the same plan
            if self.rows[number]["state"] != "waiting":
                return
            self.current = item.title
            if made is None:
                plan, profile = self.plans[item.request]
                kept = self._same_plan(item)["run"].tolist()
                run = kept[0] if kept else None
                made = self.bench.quantize(plan, profile, item.quantizer, run=run)
            outcome = self.bench.measure(made, item.evaluation)
            outcome["increase"] = outcome["increase"]["relative"]
            self.rows[number] |= {"state": "done"} | {n: outcome[n] for n in _FIGURES}

        try:
            for number in numbers:
                self._trying(number, evaluate)
                self.done += 1
                self._keep()
        finally:
            self.bench.report = outer

    def _reporting(self, outer: Report) -> Report:
        """Tells an item's progress as a part of the sweep's."""

        def report(stage: str, done: int, total: int, message: str) -> None:
            share = _share(stage, done / total if total else 0.0)
            at = int(_PARTS * (self.done + share))
            text = f"{self.done + 1} of {self.total}: {self.current} · {message}"
            outer("sweep", at, _PARTS * self.total, text)

        return report

    def _keep(self) -> None:
        """Tell those who watch the job what came of each item so far."""
        if self.bench.folder_to_keep is not None:
            write_json(self.bench.folder_to_keep / ITEMS, {"items": self.rows})


#: What a row tells of its run, by the names of a run's outcome and of the store's results.
_FIGURES = (
    "run",
    "perplexity",
    "perplexity_full",
    "increase",
    "kl",
    "top1",
    "measured_bytes",
    "tokens",
    "protocol",
)


def _plain(value: object) -> object:
    """A data frame's value as JSON has it."""
    value = value.item() if hasattr(value, "item") else value
    return None if pd.isna(value) else value


def _same_content(content: dict, plan: Plan) -> bool:
    """Whether a kept plan stores the same as this one."""
    return content_identity(content) == plan_identity(plan)


def _share(stage: str, done: float) -> float:
    """How much of an item is done, told by its stage; quantizing is short beside evaluating."""
    shares = {"quantize": 0.05 * done, "evaluate": 0.05 + 0.95 * done, "store": 1.0}
    return shares.get(stage, 0.0)


def estimate(runs: pd.DataFrame, asked: Sequence[Item]) -> float | None:
    """Seconds that items will take by a model's runs so far; None where those don't tell.

    ``runs`` are of :meth:`lsq_core.store.Store.results`. Each text is read by two models.
    """
    runs = runs[runs["tokens_per_second"] > 0]
    if runs.empty:
        return None
    whole = runs[~runs["truncated"].astype(bool)].groupby("corpus")["tokens"].max()
    tokens = [
        min(item.evaluation.max_tokens or np.inf, whole.get(item.evaluation.corpus, np.inf))
        for item in asked
    ]
    quantized = len({(item.request, item.quantizer) for item in asked})
    seconds = quantized * runs["quantize_seconds"].median()
    seconds += 2 * sum(tokens) / runs["tokens_per_second"].median()
    return float(seconds) if np.isfinite(seconds) else None
