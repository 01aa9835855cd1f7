"""Many runs at one go: methods × bases and budgets × quantizers × evaluation texts.

Other quantizers can be baselines: the uniform plan by them, at every size.
One load of the model, one profile, one quantization for all texts of a plan, of those matrices
that no plan before it had the same. A few plans at a time read the texts together, so that full
precision reads them once for all of these. Each run is kept as it finishes and found when the
sweep is begun again.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from lsq_core.errors import InputError, LsqError, exception_reason
from lsq_core.evaluation.protocol import EvaluationRequest, Protocol
from lsq_core.files import DamagedFileError, read_json
from lsq_core.jsontext import write_json
from lsq_core.planning.methods import PLANNERS
from lsq_core.planning.plan import Plan
from lsq_core.planning.problem import Problem
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.provenance import (
    device_kind,
    evaluation_dependencies,
    run_dependencies,
    versions,
)
from lsq_core.quantization.registry import (
    BASELINES,
    arithmetic_packages,
    check_choice,
    quantizer_spec,
)
from lsq_core.session import Session
from lsq_core.stages.evaluate import evaluation_provenance
from lsq_core.stages.measure import PreparedRun
from lsq_core.stages.plan import (
    content_identity,
    plan_identity,
    request_incompatibility,
    with_quantizer,
)
from lsq_core.store.shipped import SHIPPED
from lsq_core.sweep_progress import BatchProgress

#: The file, in the folder a job keeps things in, that tells what came of each item so far.
ITEMS_FILE = "items.json"
#: States of an item that has its figures, and of one that will never have any.
FINISHED, FAILED = ("done", "found"), "failed"
#: Plans that read the texts together: five times the work of one evaluation and a sixth for full
#: precision, where they read alone ten. More would save little and make the first figures late.
MAX_CONCURRENT_PLANS = 5
#: The same where the model doesn't fit memory: all its weights are read for these once, and the
#: memory for hidden states is divided among them.
MAX_STREAMED_PLANS = 16
#: In the place of methods or quantizers: all of them.
ALL = "all"
#: What "everything" is: about the sizes at which papers compare, and one quantizer for methods.
EVERYTHING_BUDGETS, EVERYTHING_QUANTIZER = ("2.2bpp", "3.2bpp", "4.2bpp"), "hqq"


@dataclass(frozen=True)
class SweepItem:
    """One run of a sweep: what to plan for, how to quantize, what to evaluate on."""

    request: PlanRequest
    quantizer: str
    evaluation: EvaluationRequest

    @property
    def title(self) -> str:
        """``mxq 2.25bpp, hqq, on stdlib``."""
        requested = " ".join(filter(None, (self.request.base, self.request.budget)))
        return f"{self.request.method} {requested}, {self.quantizer}, on {self.evaluation.corpus}"

    @property
    def requested(self) -> dict:
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
) -> list[SweepItem]:
    """Their product; the texts of one plan and quantizer come together."""
    return [SweepItem(*parts) for parts in itertools.product(requests, quantizers, evaluations)]


def requests(
    template: PlanRequest, methods: Sequence[str], bases: Sequence[str], budgets: Sequence[str]
) -> list[PlanRequest]:
    """Each method at each base and at each budget, all else as in ``template``.

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
    return [replace(template, method=m, **(nothing | size)) for m in methods for size in sizes]


def expand_methods(names: Sequence[str]) -> list[str]:
    """Method names, with ``all`` as every one of them."""
    return list(PLANNERS) if ALL in names else list(names)


def expand_baselines(names: Sequence[str], quantizers: Sequence[str]) -> list[str]:
    """Quantizers whose uniform plans are baselines; ``all`` are the usual ones not yet in a sweep.

    Raises
    ------
    InputError
        When there is no quantizer of a name.
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
    """The uniform plan at each base and budget, by each of these quantizers."""
    if not quantizers:
        return []
    return items(requests(template, ["uniform"], bases, budgets), quantizers, evaluations)


def parse_budgets(text: str) -> tuple[str, ...]:
    """``2.25, 2.51bpp 9MiB`` as budgets; a number alone means bits per parameter.

    >>> parse_budgets("2.25, 9MiB")
    ('2.25bpp', '9MiB')
    """
    found = [word for word in re.split(r"[,;\s]+", text) if word]
    return tuple(dict.fromkeys(f"{w}bpp" if re.fullmatch(r"[\d.]+", w) else w for w in found))


def sweep(
    session: Session, requested: Sequence[SweepItem], settings: ProfileSettings
) -> list[dict]:
    """Make the runs that are not there yet; gives a row an item, in their order.

    A row has what was asked, its ``state`` (done, found, failed), of one that was found whether it
    came with the project (``shipped``), and the figures of its run or
    the ``reason`` for none. An item that fails stops no other.

    Raises
    ------
    InputError, LsqError
        When every one of them failed; the former when what was asked for was wrong in each.
    """
    sweeping = _Sweep(session, requested, settings)
    sweeping.run()
    if all(row["state"] == FAILED for row in sweeping.rows):
        reason = sweeping.rows[0]["reason"]
        kind = InputError if len(sweeping.bad_input) == len(requested) else LsqError
        raise kind(f"None of the {len(requested)} runs succeeded; the first failed: {reason}")
    return sweeping.rows


def read_sweep_rows(folder: Path) -> list[dict]:
    """What came so far of each item of the sweep that keeps in a folder; none where nothing did.

    Raises
    ------
    DamagedFileError
        When that cannot be read.
    """
    path = folder / ITEMS_FILE
    rows = (read_json(path) or {"items": []}).get("items")
    requested = {"method", "base", "budget", "quantizer", "corpus", "state"}
    if isinstance(rows, list) and all(
        isinstance(row, dict) and requested <= set(row) for row in rows
    ):
        return rows
    raise DamagedFileError(f"{path} is damaged: it has no rows of a sweep.")


class _Sweep:
    """The rows of a sweep, as they fill."""

    def __init__(
        self, session: Session, requested: Sequence[SweepItem], settings: ProfileSettings
    ) -> None:
        self.session, self.requested, self.settings = session, requested, settings
        self.rows = [item.requested | {"state": "waiting"} for item in requested]
        self.plans: dict[PlanRequest, Plan] = {}
        #: Why a request has no plan; trying again could measure a whole profile again.
        self.plan_errors: dict[PlanRequest, LsqError] = {}
        #: Items that failed because of what was asked for.
        self.bad_input: set[int] = set()
        self.total = 0

    def run(self) -> None:
        """Plan everything, look up what is there, make the rest."""
        self._write_items()
        for number in range(len(self.requested)):
            self._attempt(number, self._plan)
            self._attempt(number, self._find_existing_run)
        self.total = len(self._pending())
        self._write_items()
        while self._pending():
            self._run_batch(self._next_batch())

    @property
    def done(self) -> int:
        """Items made, found or failed of those that had to be made."""
        return self.total - len(self._pending())

    def _pending(self) -> list[int]:
        return [n for n, row in enumerate(self.rows) if row["state"] == "waiting"]

    def _plan_key(self, number: int) -> tuple[PlanRequest, str]:
        return self.requested[number].request, self.requested[number].quantizer

    def _attempt(self, number: int, step: Callable[[int], None]) -> None:
        """Take a step for an item that has not failed; what goes wrong is its reason."""
        if self.rows[number]["state"] != "waiting":
            return
        try:
            step(number)
        except LsqError as error:
            if isinstance(error, InputError):
                self.bad_input.add(number)
            self._fail(number, str(error))
        except Exception as error:  # a defect in one must not cost the others
            traceback.print_exc()
            self._fail(number, f"{type(error).__name__}: {exception_reason(error)} (see the log)")

    def _fail(self, number: int, reason: str) -> None:
        self.rows[number] |= {"state": FAILED, "reason": reason}

    def _plan(self, number: int) -> None:
        request, quantizer = self.requested[number].request, self.requested[number].quantizer
        problem = Problem(self.session.config_info.matrices)
        reason = request_incompatibility(problem, request, quantizer, self.settings.axis)
        if reason:  # before a profile is measured for a plan that is of no use
            raise InputError(reason)
        if request in self.plan_errors:  # what it was for another item, it is for this one
            raise self.plan_errors[request]
        if request not in self.plans:
            try:
                self.plans[request] = self.session.plan(request, self.settings)
            except LsqError as error:
                self.plan_errors[request] = error
                raise
        plan = self.plans[request]
        check_choice(quantizer, plan.choice, plan.axis)
        plan = with_quantizer(plan, quantizer, self.settings)
        self.rows[number] |= {
            "bits_per_param": plan.bits_per_param,
            "planned_bytes": plan.planned_bytes,
            "steps": quantizer_spec(quantizer).steps,
        }

    # --- what is there already --------------------------------------------------------------

    def _find_existing_run(self, number: int) -> None:
        """Fill the row from a run that was kept, if it is the same."""
        item, session = self.requested[number], self.session
        stream = session.stream(item.evaluation)  # raises if the corpus is missing
        existing = self._same_plan(item)
        if existing.empty:
            return
        protocol = Protocol.named(item.evaluation.protocol, session.info.context).name
        made_with = evaluation_dependencies(
            evaluation_provenance(session.device_and_dtype, item.evaluation, session.tokenizer)
        )
        same = existing[
            (existing["corpus_sha256"] == stream.sha256)
            & (existing["protocol"] == protocol)
            & existing["kl"].notna()
        ]
        same = _filter_rows(
            same, [evaluation_dependencies(json.loads(t)) == made_with for t in same["provenance"]]
        )
        if not same.empty:
            found = same.iloc[0]
            shipped = bool(found["origin"] == SHIPPED)
            self.rows[number] |= {"state": "found", "shipped": shipped}
            self.rows[number] |= self._figures(found["evaluation"])

    def _same_plan(self, item: SweepItem) -> pd.DataFrame:
        """The evaluations of runs with the same plan, made the same way."""
        plan = with_quantizer(self.plans[item.request], item.quantizer, self.settings)
        rows = self.session.store.find_evaluations(
            self.session.info.fingerprint, plan.method, item.quantizer
        )
        device_and_dtype = self.session.device_and_dtype
        rows = rows[
            (rows["device"].map(device_kind) == device_kind(device_and_dtype["device"]))
            & (rows["dtype"] == device_and_dtype["dtype"])
        ]
        made_by = arithmetic_packages(item.quantizer)
        own = run_dependencies(versions(*made_by), made_by)
        rows = _filter_rows(
            rows, [run_dependencies(json.loads(text), made_by) == own for text in rows["versions"]]
        )
        same = plan_identity(plan)
        alike = [content_identity(json.loads(content)) == same for content in rows["content"]]
        return _filter_rows(rows, alike)

    def _figures(self, evaluation: str) -> dict:
        rows = self.session.store.results(self.session.info.fingerprint)
        row = rows[rows["evaluation"] == evaluation].iloc[0]
        return {name: _plain(row[name]) for name in _OUTCOME_COLUMNS}

    # --- what has to be made ----------------------------------------------------------------

    def _next_batch(self) -> list[list[int]]:
        """The items to make together next: those of some plans, a list a plan, on the same texts.

        There are as many plans as may be at once and as there is room for in memory. No two store
        the same: the second is found once the first is kept. A model larger than memory is read
        once for more of them, whose matrices take no room; a quantizer that needs all of it is
        apart from these.
        """
        chosen: list[list[int]] = []
        identities, texts, whole = [], [], False
        streamed = not self.session.fits_in_memory()
        most = MAX_STREAMED_PLANS if streamed else MAX_CONCURRENT_PLANS
        room = math.inf if streamed else self.session.cache_bytes
        for _, alike in itertools.groupby(self._pending(), self._plan_key):
            items = {}
            for number in alike:
                items.setdefault(self.requested[number].evaluation, number)
            request, quantizer = self._plan_key(next(iter(items.values())))
            plan = self.plans[request]
            identity = [*plan_identity(plan), quantizer]
            if identity in identities:
                continue
            room -= plan.planned_bytes
            own = list(items), streamed and quantizer_spec(quantizer).calibrated
            if chosen and (room < 0 or own != (texts, whole)):
                break
            chosen.append(list(items.values()))
            identities.append(identity)
            texts, whole = own
            if len(chosen) == most:
                break
        return chosen

    def _run_batch(self, batch: list[list[int]]) -> None:
        """Make some plans' items; where that fails for all at once, each is tried alone."""
        items = list(itertools.chain(*batch))
        with self.session.store.held():
            for number in items:
                self._attempt(
                    number, self._find_existing_run
                )  # an item before may have had the same plan
        self._write_items()
        if any(self.rows[number]["state"] != "waiting" for number in items):
            return  # what is left of them comes next
        if len(items) > 1:
            try:
                self._measure(batch)
            except Exception as error:
                if not isinstance(error, LsqError):
                    traceback.print_exc()  # alone each may go well, and the defect stay unseen
                reason = exception_reason(error)
                self.session.report("sweep", self.done, self.total, f"one by one, since {reason}")
        for number in items:
            self._attempt(number, lambda alone: self._measure([[alone]]))
            self._write_items()

    def _measure(self, batch: list[list[int]]) -> None:
        """Quantize each plan and evaluate them on their texts, full precision beside them all."""
        order = [number for text in zip(*batch, strict=True) for number in text]
        outer = self.session.report
        progress = BatchProgress(outer, self.done, len(order), len(batch), self.total)
        progress.title = self.requested[order[0]].title
        self.session.report = progress.report
        try:
            made = []
            streamed = self._is_streamed(batch)
            for numbers in batch:
                made.append(self._prepare(self.requested[numbers[0]], streamed))
                progress.quantized += 1
            outcomes = self.session.measure(made, [self.requested[n].evaluation for n in batch[0]])
            for number in order:
                progress.number, progress.title = self.done + 1, self.requested[number].title
                outcome = next(outcomes)
                outcome["increase"] = outcome["increase"]["relative"]
                self.rows[number] |= {"state": "done"} | {n: outcome[n] for n in _OUTCOME_COLUMNS}
                self._write_items()
        finally:
            self.session.report = outer

    def _is_streamed(self, batch: list[list[int]]) -> bool:
        """Whether the model and a batch's plans don't fit memory, so it is read by blocks."""
        plans = [self.plans[self.requested[numbers[0]].request] for numbers in batch]
        return not self.session.fits_in_memory(sum(plan.planned_bytes for plan in plans))

    def _prepare(self, item: SweepItem, streamed: bool) -> PreparedRun:
        """The item's run, quantized unless streamed; the one of the same plan where it was kept."""
        plan = self.plans[item.request]
        existing_runs = self._same_plan(item)["run"].tolist()
        run = existing_runs[0] if existing_runs else None
        prepare = self.session.quantize_streamed if streamed else self.session.quantize
        return prepare(plan, item.quantizer, run=run, settings=self.settings)

    def _write_items(self) -> None:
        """Tell those who watch the job what came of each item so far."""
        if self.session.checkpoint_folder is not None:
            write_json(self.session.checkpoint_folder / ITEMS_FILE, {"items": self.rows})


#: What a row tells of its run, by the names of a run's outcome and of the store's results.
_OUTCOME_COLUMNS = (
    "run",
    "perplexity",
    "perplexity_full",
    "increase",
    "kl",
    "top1",
    "measured_bytes",
    "quantize_seconds",
    "tokens",
    "protocol",
)


def _filter_rows(rows: pd.DataFrame, wanted: Sequence[bool]) -> pd.DataFrame:
    """The rows that are wanted, none of none."""
    return rows[np.array(wanted, dtype=bool)]


def _plain(value: object) -> object:
    """A data frame's value as JSON has it."""
    value = value.item() if hasattr(value, "item") else value
    return None if pd.isna(value) else value


def estimate_seconds(runs: pd.DataFrame, requested: Sequence[SweepItem]) -> float | None:
    """Seconds that items will take by a model's runs so far; None where those don't tell.

    ``runs`` are of :meth:`Store.results`. A few plans share what full precision
    reads.
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
