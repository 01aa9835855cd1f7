"""State of a sweep's items: their plans, runs that exist already, and items still to be made."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from lsq_core.errors import InputError, LsqError, exception_reason
from lsq_core.evaluation.protocol import EvaluationRequest, Protocol
from lsq_core.jsontext import write_json
from lsq_core.planning.plan import Plan
from lsq_core.planning.problem import Problem
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.provenance import (
    device_kind,
    evaluation_dependencies,
    machine,
    run_dependencies,
    versions,
)
from lsq_core.quantization.registry import (
    arithmetic_packages,
    check_choice,
    quantizer_spec,
)
from lsq_core.session import Session
from lsq_core.stages.evaluate import evaluation_provenance
from lsq_core.stages.plan import (
    content_identity,
    plan_identity,
    plan_model,
    request_incompatibility,
    with_quantizer,
)
from lsq_core.stages.profile import Measurer, measure_here
from lsq_core.store.shipped import SHIPPED

#: The file in a job's folder with the state of each item so far.
ITEMS_FILE = "items.json"
#: States of an item that has figures, and of one that failed.
FINISHED, FAILED = ("done", "found"), "failed"


@dataclass(frozen=True)
class SweepItem:
    """One run of a sweep: the plan request, the quantizer, and the evaluation."""

    request: PlanRequest
    quantizer: str
    evaluation: EvaluationRequest

    @property
    def title(self) -> str:
        """A title such as ``mxq 2.25bpp, hqq, on stdlib``."""
        requested = " ".join(filter(None, (self.request.base, self.request.budget)))
        return f"{self.request.method} {requested}, {self.quantizer}, on {self.evaluation.corpus}"

    @property
    def requested(self) -> dict:
        """The fields that distinguish its row from others."""
        return {
            "method": self.request.method,
            "base": self.request.base,
            "budget": self.request.budget,
            "quantizer": self.quantizer,
            "corpus": self.evaluation.corpus,
        }


class Sweep:
    """The items of a sweep with their plans, and a row for each, filled as it proceeds."""

    def __init__(
        self,
        session: Session,
        requested: Sequence[SweepItem],
        settings: ProfileSettings,
        places: Sequence[Mapping[str, str]] = (),
        measure: Measurer = measure_here,
    ) -> None:
        """``measure`` measures the profile metrics that plans need and that are not stored."""
        self.session, self.requested, self.settings = session, requested, settings
        self._places, self._measure = places, measure
        self.rows = [item.requested | {"state": "waiting"} for item in requested]
        self.plans: dict[PlanRequest, Plan] = {}
        #: Why a request has no plan; trying again could measure an entire profile again.
        self.plan_errors: dict[PlanRequest, LsqError] = {}
        #: Items that failed because of invalid input.
        self.bad_input: set[int] = set()
        self.total = 0

    @cached_property
    def places(self) -> Sequence[Mapping[str, str]]:
        """Where items are measured, each with ``device``, ``dtype`` and ``machine`` (in words).

        There are several if different kinds of GPU are used. The default is where the session
        computes.
        """
        if self._places:
            return self._places
        where = self.session.device_and_dtype
        return [where | {"machine": machine(where["device"])}]

    def prepare(self) -> None:
        """Plan all items and look up runs that exist already."""
        self.write_items()
        for number in range(len(self.requested)):
            self.attempt(number, self._plan)
            self.attempt(number, self.find_existing_run)
        self.total = len(self.pending())
        self.write_items()

    @property
    def done(self) -> int:
        """Number of items made, found or failed, of those that were pending at first."""
        return self.total - len(self.pending())

    def pending(self) -> list[int]:
        """Return the numbers of the items still to be made, in order."""
        return [n for n, row in enumerate(self.rows) if row["state"] == "waiting"]

    def plan_key(self, number: int) -> tuple[PlanRequest, str]:
        """Return the request and quantizer, which items of the same plan share."""
        return self.requested[number].request, self.requested[number].quantizer

    def attempt(self, number: int, step: Callable[[int], None]) -> None:
        """Apply a step to an item if it is waiting; an error becomes the reason of its failure."""
        if self.rows[number]["state"] != "waiting":
            return
        try:
            step(number)
        except LsqError as error:
            if isinstance(error, InputError):
                self.bad_input.add(number)
            self.fail(number, str(error))
        except Exception as error:  # a defect in one item must not stop the others
            traceback.print_exc()
            self.fail(number, f"{type(error).__name__}: {exception_reason(error)} (see the log)")

    def fail(self, number: int, reason: str) -> None:
        """Mark an item as failed."""
        self.rows[number] |= {"state": FAILED, "reason": reason}

    def _plan(self, number: int) -> None:
        request, quantizer = self.requested[number].request, self.requested[number].quantizer
        problem = Problem(self.session.config_info.matrices)
        reason = request_incompatibility(problem, request, quantizer, self.settings.axis)
        if reason:  # before a profile is measured for a useless plan
            raise InputError(reason)
        if request in self.plan_errors:  # it failed for another item, so for this one too
            raise self.plan_errors[request]
        if request not in self.plans:
            try:
                self.plans[request] = plan_model(
                    self.session, request, self.settings, measure=self._measure
                )
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

    # --- runs that exist already ------------------------------------------------------------

    def find_existing_run(self, number: int) -> None:
        """Fill an item's row from a stored run with the same plan and evaluation, if any."""
        item, session = self.requested[number], self.session
        stream = session.stream(item.evaluation)  # raises if the corpus is missing
        existing = self.same_plan(item)
        if existing.empty:
            return
        protocol = Protocol.named(item.evaluation.protocol, session.info.context).name
        evaluated = (item.evaluation, session.tokenizer)
        made_with = [
            evaluation_dependencies(evaluation_provenance(place, *evaluated))
            for place in self.places
        ]
        same = existing[
            (existing["corpus_sha256"] == stream.sha256)
            & (existing["protocol"] == protocol)
            & existing["kl"].notna()
        ]
        same = _filter_rows(
            same, [evaluation_dependencies(json.loads(t)) in made_with for t in same["provenance"]]
        )
        if not same.empty:
            found = same.iloc[0]
            shipped = bool(found["origin"] == SHIPPED)
            self.rows[number] |= {"state": "found", "shipped": shipped}
            self.rows[number] |= self._figures(found["evaluation"])

    def same_plan(self, item: SweepItem) -> pd.DataFrame:
        """Return the stored evaluations of runs with an item's plan, made the same way."""
        plan = with_quantizer(self.plans[item.request], item.quantizer, self.settings)
        rows = self.session.store.find_evaluations(
            self.session.info.fingerprint, plan.method, item.quantizer
        )
        place = self.places[0]  # all have the same kind of device and dtype
        rows = rows[
            (rows["device"].map(device_kind) == device_kind(place["device"]))
            & (rows["dtype"] == place["dtype"])
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

    # --- new runs ---------------------------------------------------------------------------

    def existing_run(self, number: int) -> str | None:
        """Return the stored run of an item's plan on any text, or None."""
        existing = self.same_plan(self.requested[number])["run"].tolist()
        return existing[0] if existing else None

    def record(self, number: int, outcome: Mapping[str, object]) -> None:
        """Fill an item's row from its outcome, as yielded by :meth:`Session.measure`."""
        outcome = {**outcome, "increase": outcome["increase"]["relative"]}
        self.rows[number] |= {"state": "done"} | {name: outcome[name] for name in _OUTCOME_COLUMNS}
        self.write_items()

    def write_items(self) -> None:
        """Write the rows to the job's folder, if there is one, for those who watch the job."""
        if self.session.checkpoint_folder is not None:
            write_json(self.session.checkpoint_folder / ITEMS_FILE, {"items": self.rows})


#: Columns of a row with figures, named as in a run's outcome and the store's results.
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
    """Return the rows marked in ``wanted``, which may be empty."""
    return rows[np.array(wanted, dtype=bool)]


def _plain(value: object) -> object:
    """Convert a data frame's value to one that JSON can express."""
    value = value.item() if hasattr(value, "item") else value
    return None if pd.isna(value) else value
