"""Make a sweep's items in this process, evaluating a few plans at a time together."""

from __future__ import annotations

import itertools
import math
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Protocol

from lsq_core.errors import LsqError, exception_reason
from lsq_core.profiling.profile import Profile
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.quantization.registry import quantizer_spec
from lsq_core.session import Session
from lsq_core.stages.measure import PreparedRun
from lsq_core.stages.plan import plan_identity
from lsq_core.stages.profile import measure_here
from lsq_core.sweep_progress import BatchProgress
from lsq_core.sweep_state import Sweep

#: Plans that are evaluated together: six evaluations including full precision, instead of ten if
#: evaluated separately. More would save little and delay the first figures.
MAX_CONCURRENT_PLANS = 5
#: The same if the model doesn't fit in memory: all its weights are read once for these plans, and
#: the memory for hidden states is divided among them.
MAX_STREAMED_PLANS = 16


class Executor(Protocol):
    """Makes the items of a sweep that don't exist yet."""

    def places(self, session: Session) -> Sequence[Mapping[str, str]]:
        """Return where it measures (:attr:`Sweep.places`); empty for the session's own device."""

    def measure_profile(
        self, session: Session, settings: ProfileSettings, metrics: Sequence[str]
    ) -> Iterator[Profile]:
        """Measure profile metrics (a :data:`lsq_core.stages.profile.Measurer`)."""

    def run(self, sweep: Sweep) -> None:
        """Make every pending item, or record in its row why it failed."""

    def close(self) -> None:
        """Release its resources; called however the sweep ends."""


def identity(sweep: Sweep, number: int) -> list[object]:
    """Return a key that is equal for items with the same quantized model."""
    request, quantizer = sweep.plan_key(number)
    return [*plan_identity(sweep.plans[request]), quantizer]


def next_batch(
    sweep: Sweep,
    pending: Sequence[int],
    most: int,
    streamed: bool,
    busy: Collection[list[object]] = (),
) -> list[list[int]]:
    """Return the items to make together next: a list per plan, all on the same texts.

    There are at most ``most`` plans, limited by the room for them in memory. No two have the same
    identity (:func:`identity`), nor one of those in ``busy``: the second is found in the store once
    the first is saved. With ``streamed``, matrices take no memory, but plans with a calibrated
    quantizer, which needs the full model, are batched separately.
    """
    chosen: list[list[int]] = []
    identities, texts, whole = list(busy), [], False
    room = math.inf if streamed else sweep.session.cache_bytes
    for _, alike in itertools.groupby(pending, sweep.plan_key):
        items = {}
        for number in alike:
            items.setdefault(sweep.requested[number].evaluation, number)
        first = next(iter(items.values()))
        own_identity = identity(sweep, first)
        if own_identity in identities:
            continue
        request, quantizer = sweep.plan_key(first)
        room -= sweep.plans[request].planned_bytes
        own = list(items), streamed and quantizer_spec(quantizer).calibrated
        if chosen and (room < 0 or own != (texts, whole)):
            break
        chosen.append(list(items.values()))
        identities.append(own_identity)
        texts, whole = own
        if len(chosen) == most:
            break
    return chosen


class InProcess:
    """Makes a sweep's items in this process, on the session's device."""

    def places(self, session: Session) -> Sequence[Mapping[str, str]]:
        """Return no places: items are measured where the session computes."""
        return ()

    def measure_profile(
        self, session: Session, settings: ProfileSettings, metrics: Sequence[str]
    ) -> Iterator[Profile]:
        """Measure profile metrics on the session's device."""
        return measure_here(session, settings, metrics)

    def close(self) -> None:
        """Do nothing: there is nothing to release."""

    def run(self, sweep: Sweep) -> None:
        """Make every pending item, a few plans at a time."""
        while pending := sweep.pending():
            streamed = not sweep.session.fits_in_memory()
            most = MAX_STREAMED_PLANS if streamed else MAX_CONCURRENT_PLANS
            _run_batch(sweep, next_batch(sweep, pending, most, streamed))


def _run_batch(sweep: Sweep, batch: list[list[int]]) -> None:
    """Make the items of some plans together; if that fails, try each item alone."""
    items = list(itertools.chain(*batch))
    with sweep.session.store.held():
        for number in items:
            sweep.attempt(number, sweep.find_existing_run)  # an earlier one may have the same plan
    sweep.write_items()
    if any(sweep.rows[number]["state"] != "waiting" for number in items):
        return  # the remaining ones come next
    if len(items) > 1:
        try:
            _measure(sweep, batch)
        except Exception as error:
            if not isinstance(error, LsqError):
                traceback.print_exc()  # tried alone, each may succeed and hide the defect
            reason = exception_reason(error)
            sweep.session.report(
                "sweep", sweep.done, sweep.total, f"one at a time, because {reason}"
            )
    for number in items:
        sweep.attempt(number, lambda alone: _measure(sweep, [[alone]]))
        sweep.write_items()


def _measure(sweep: Sweep, batch: list[list[int]]) -> None:
    """Quantize each plan and evaluate all of them with full precision on their texts."""
    session, requested = sweep.session, sweep.requested
    order = [number for text in zip(*batch, strict=True) for number in text]
    outer = session.report
    progress = BatchProgress(outer, sweep.done, len(order), len(batch), sweep.total)
    progress.title = requested[order[0]].title
    session.report = progress.report
    try:
        made = []
        streamed = _is_streamed(sweep, batch)
        for numbers in batch:
            made.append(_prepare(sweep, numbers[0], streamed))
            progress.quantized += 1
        outcomes = session.measure(made, [requested[n].evaluation for n in batch[0]])
        for number in order:
            progress.number, progress.title = sweep.done + 1, requested[number].title
            sweep.record(number, next(outcomes))
    finally:
        session.report = outer


def _is_streamed(sweep: Sweep, batch: list[list[int]]) -> bool:
    """Return whether the model must be streamed by block to fit in memory with these plans."""
    plans = [sweep.plans[sweep.requested[numbers[0]].request] for numbers in batch]
    return not sweep.session.fits_in_memory(sum(plan.planned_bytes for plan in plans))


def _prepare(sweep: Sweep, number: int, streamed: bool) -> PreparedRun:
    """Prepare an item's run, quantized unless streamed; a stored run of the plan is reused."""
    request, quantizer = sweep.plan_key(number)
    prepare = sweep.session.quantize_streamed if streamed else sweep.session.quantize
    run = sweep.existing_run(number)
    return prepare(sweep.plans[request], quantizer, run=run, settings=sweep.settings)
