"""Make a sweep's items in this process: a few plans at a time read the texts together."""

from __future__ import annotations

import itertools
import math
import traceback
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from lsq_core.errors import LsqError, exception_reason
from lsq_core.quantization.registry import quantizer_spec
from lsq_core.session import Session
from lsq_core.stages.measure import PreparedRun
from lsq_core.stages.plan import plan_identity
from lsq_core.sweep_progress import BatchProgress
from lsq_core.sweep_state import Sweep

#: Plans that read the texts together: five times the work of one evaluation and a sixth for full
#: precision, where they read alone ten. More would save little and make the first figures late.
MAX_CONCURRENT_PLANS = 5
#: The same where the model doesn't fit memory: all its weights are read for these once, and the
#: memory for hidden states is divided among them.
MAX_STREAMED_PLANS = 16


class Executor(Protocol):
    """What makes the items of a sweep that are not there yet."""

    def places(self, session: Session) -> Sequence[Mapping[str, str]]:
        """Where it measures (:attr:`Sweep.places`); none where that is where the session is."""

    def run(self, sweep: Sweep) -> None:
        """Make every pending item, or say in its row why it can't be."""

    def close(self) -> None:
        """Let go of what it holds; called however the sweep ends."""


def identity(sweep: Sweep, number: int) -> list[object]:
    """What two items share whose quantized models are the same."""
    request, quantizer = sweep.plan_key(number)
    return [*plan_identity(sweep.plans[request]), quantizer]


def next_batch(
    sweep: Sweep,
    pending: Sequence[int],
    most: int,
    streamed: bool,
    busy: Collection[list[object]] = (),
) -> list[list[int]]:
    """The items to make together next: those of some plans, a list a plan, on the same texts.

    There are as many plans as may be at once and as there is room for in memory. No two store
    the same, nor what is ``busy`` (:func:`identity`): the second is found once the first is kept.
    A model larger than memory is read once for more of them, whose matrices take no room; a
    quantizer that needs all of it is apart from these.
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
    """Makes a sweep's items here, on the session's device."""

    def places(self, session: Session) -> Sequence[Mapping[str, str]]:
        """None but where the session computes."""
        return ()

    def close(self) -> None:
        """Nothing is held."""

    def run(self, sweep: Sweep) -> None:
        """Make every pending item, some plans at a time."""
        while pending := sweep.pending():
            streamed = not sweep.session.fits_in_memory()
            most = MAX_STREAMED_PLANS if streamed else MAX_CONCURRENT_PLANS
            _run_batch(sweep, next_batch(sweep, pending, most, streamed))


def _run_batch(sweep: Sweep, batch: list[list[int]]) -> None:
    """Make some plans' items; where that fails for all at once, each is tried alone."""
    items = list(itertools.chain(*batch))
    with sweep.session.store.held():
        for number in items:
            sweep.attempt(number, sweep.find_existing_run)  # one before may have had the same plan
    sweep.write_items()
    if any(sweep.rows[number]["state"] != "waiting" for number in items):
        return  # what is left of them comes next
    if len(items) > 1:
        try:
            _measure(sweep, batch)
        except Exception as error:
            if not isinstance(error, LsqError):
                traceback.print_exc()  # alone each may go well, and the defect stay unseen
            reason = exception_reason(error)
            sweep.session.report("sweep", sweep.done, sweep.total, f"one by one, since {reason}")
    for number in items:
        sweep.attempt(number, lambda alone: _measure(sweep, [[alone]]))
        sweep.write_items()


def _measure(sweep: Sweep, batch: list[list[int]]) -> None:
    """Quantize each plan and evaluate them on their texts, full precision beside them all."""
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
    """Whether the model and a batch's plans don't fit memory, so it is read by blocks."""
    plans = [sweep.plans[sweep.requested[numbers[0]].request] for numbers in batch]
    return not sweep.session.fits_in_memory(sum(plan.planned_bytes for plan in plans))


def _prepare(sweep: Sweep, number: int, streamed: bool) -> PreparedRun:
    """An item's run, quantized unless streamed; the one of the same plan where it was kept."""
    request, quantizer = sweep.plan_key(number)
    prepare = sweep.session.quantize_streamed if streamed else sweep.session.quantize
    run = sweep.existing_run(number)
    return prepare(sweep.plans[request], quantizer, run=run, settings=sweep.settings)
