"""The driver's side of a sweep on Ray: assign plans, store results, replace dead actors."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from lsq_core.distributed.messages import EvaluationTask, Failure, Measured, PlannedRun
from lsq_core.distributed.pool import MAX_MOVES, TURN_S, ActorPool, Answer, RemoteActor
from lsq_core.distributed.start_watch import StartWatch, death_reason
from lsq_core.distributed.status import ActorRow, write_actors
from lsq_core.evaluation.protocol import EvaluationRequest
from lsq_core.jsontext import json_text
from lsq_core.progress import PROGRESS_STEPS, ProgressCallback, ignore_progress
from lsq_core.stages.measure import MeasuredRun, save_measured
from lsq_core.stages.run import check_plan, make_run_id
from lsq_core.sweep_batches import MAX_CONCURRENT_PLANS, MAX_STREAMED_PLANS, identity, next_batch
from lsq_core.sweep_state import Sweep

#: Minimum seconds between two writes of the actors' status.
_STATUS_EVERY_S = 0.5
#: The remaining work is divided by this many times the number of actors, so that they finish at
#: about the same time (guided self-scheduling, Polychronopoulos and Kuck 1987).
_SHARES = 2


@dataclass(eq=False)
class Dispatcher:
    """Distributes a sweep's pending items to the actors of a pool.

    Only the driver chooses run ids and writes to the database. Items are assigned in order. An item
    whose plan is being measured on the same text for another item waits and reuses that result.
    """

    sweep: Sweep
    pool: ActorPool
    #: By item: how often its actor died (``moves``) and the maximum group size (``limits``).
    moves: Counter[int] = field(default_factory=Counter)
    limits: dict[int, int] = field(default_factory=dict)
    _runs: dict[str, str] = field(default_factory=dict)
    _streams: dict[EvaluationRequest, object] = field(default_factory=dict)
    #: Results not stored yet, with the actor and the items.
    _measured: list[tuple[RemoteActor, Sequence[int], Measured]] = field(default_factory=list)
    #: Plan keys of each actor's last task.
    _last: dict[RemoteActor, set] = field(default_factory=dict)
    _watch: StartWatch = field(init=False)
    _status: tuple[float, list[ActorRow]] = (0.0, [])

    def __post_init__(self) -> None:
        self._watch = StartWatch(self.sweep.session, self.pool)

    def run(self) -> None:
        """Run until no item is pending.

        Raises
        ------
        InputError
            If a node's package versions or model differ from the driver's.
        LsqError
            If no actor can be started.
        """
        session = self.sweep.session
        report, session.report = session.report, ignore_progress  # hide the stages of single items
        try:
            while self.sweep.pending():
                self._assign()
                self._store()  # while the actors are busy
                for answer in self.pool.wait(TURN_S):
                    self._take(answer)
                self._watch.check()
                self._tell(report)
        finally:
            self._store()  # keep all results, however the sweep ended
            session.report = report

    # --- assigning --------------------------------------------------------------------------

    def _assign(self) -> None:
        for actor in [actor for actor in self.pool.actors if actor.is_idle]:
            while items := self._next_items(actor):
                with self.sweep.session.store.held():
                    for number in items:
                        self.sweep.attempt(number, self.sweep.find_existing_run)
                waiting = [n for n in items if self.sweep.rows[n]["state"] == "waiting"]
                if waiting == items:
                    self._submit(actor, items)
                    break

    def _next_items(self, actor: RemoteActor) -> list[int]:
        """Return the items to measure next on an actor: different plans on the same text."""
        active = {number for other in self.pool.actors for number in other.items}
        active.update(*(items for _, items, _ in self._measured))
        pending = [number for number in self.sweep.pending() if number not in active]
        last = self._last.get(actor, set())
        # An actor first continues with the plans it has just quantized, on other texts.
        known = [number for number in pending if self.sweep.plan_key(number) in last]
        for candidates in filter(None, (known, pending)):
            for text in dict.fromkeys(self._text(number) for number in candidates):
                on_text = [number for number in candidates if self._text(number) == text]
                busy = [identity(self.sweep, n) for n in active if self._text(n) == text]
                streamed = not actor.description.fits
                most = self._group_size(pending, text, streamed)
                batch = next_batch(self.sweep, on_text, most, streamed, busy)
                if batch:
                    return self._limited([number for (number,) in batch])
        return []

    def _text(self, number: int) -> EvaluationRequest:
        return self.sweep.requested[number].evaluation

    def _tokens(self, text: EvaluationRequest) -> int:
        return len(self.sweep.session.stream(text).ids)

    def _group_size(self, pending: Sequence[int], text: EvaluationRequest, streamed: bool) -> int:
        """Return how many plans to evaluate together on a text, from the tokens left to read."""
        left = sum(self._tokens(self._text(number)) for number in pending)
        share = left / (_SHARES * len(self.pool.actors)) // max(self._tokens(text), 1)
        return max(1, min(int(share), MAX_STREAMED_PLANS if streamed else MAX_CONCURRENT_PLANS))

    def _limited(self, items: list[int]) -> list[int]:
        """Return as many of the first items as their group size limits allow."""
        chosen: list[int] = []
        for number in items:
            limit = min(self.limits.get(n, len(items)) for n in (*chosen, number))
            if chosen and len(chosen) >= limit:
                break
            chosen.append(number)
        return chosen

    def _submit(self, actor: RemoteActor, items: list[int]) -> None:
        import ray

        text = self._text(items[0])
        if text not in self._streams:
            self._streams[text] = ray.put(self.sweep.session.stream(text))
        runs = tuple(self._planned_run(number) for number in items)
        self._last[actor] = {self.sweep.plan_key(number) for number in items}
        task = EvaluationTask(runs, text)
        self.pool.submit(actor, "evaluate", task, tuple(items), self._streams[text])

    def _planned_run(self, number: int) -> PlannedRun:
        """Return the run for an item; items with the same quantized model share a run."""
        session, (request, quantizer) = self.sweep.session, self.sweep.plan_key(number)
        plan = check_plan(session, self.sweep.plans[request], quantizer, self.sweep.settings)
        key = json_text(identity(self.sweep, number))
        if key not in self._runs:
            existing = self.sweep.existing_run(number)
            self._runs[key] = existing or make_run_id(session, plan, quantizer)
        return PlannedRun(self._runs[key], plan, quantizer)

    # --- results ----------------------------------------------------------------------------

    def _take(self, answer: Answer) -> None:
        actor, value = answer.actor, answer.value
        if isinstance(value, Exception):
            self._replace(actor, value)
        elif actor.description is None:
            self._watch.admit(actor, value)
        else:
            items, actor.task, actor.items = actor.items, None, ()
            if isinstance(value, Failure):
                self._failed(items, value)
            else:
                self._measured.append((actor, items, value))

    def _store(self) -> None:
        """Store the results; an item is pending until then."""
        while self._measured:
            actor, items, measured = self._measured.pop(0)
            for number, one in zip(items, measured, strict=True):
                self.sweep.attempt(number, lambda number, one=one: self._record(number, one))
            actor.measured += len(items)
            self.sweep.write_items()

    def _record(self, number: int, measured: MeasuredRun) -> None:
        self.sweep.record(number, save_measured(self.sweep.session, measured))

    def _failed(self, items: Sequence[int], failure: Failure) -> None:
        """Retry plans that failed together in smaller groups; give up a plan that failed alone.

        Groups are halved after running out of memory, and otherwise split into single plans.
        """
        if failure.trace:
            print(failure.trace, file=sys.stderr)
        if len(items) > 1:
            limit = len(items) // 2 if failure.kind == "memory" else 1
            self.limits |= dict.fromkeys(items, limit)
            return
        self._give_up(items[0], failure.reason, failure.kind == "input")

    def _give_up(self, number: int, reason: str, is_input: bool = False) -> None:
        if is_input:
            self.sweep.bad_input.add(number)
        self.sweep.fail(number, reason)
        self.sweep.write_items()

    def _replace(self, actor: RemoteActor, error: Exception) -> None:
        """Replace an actor that died, and retry its items in smaller groups.

        It may have run out of memory or been crashed by one of the plans.
        """
        reason = death_reason(error)
        items, actor.items, actor.task = actor.items, (), None
        self._last.pop(actor, None)
        for number in items:
            self.moves[number] += 1
            self.limits[number] = max(1, len(items) // 2)
            if self.moves[number] > MAX_MOVES:
                self._give_up(
                    number,
                    f"The actors measuring it died {self.moves[number]} times, most recently on "
                    f"{actor.description.host} because {reason}.",
                )
        self._watch.replace(actor, reason)

    # --- reporting --------------------------------------------------------------------------

    def _tell(self, report: ProgressCallback) -> None:
        """Report the progress of the sweep, and write the status of each actor."""
        sweep, rows = self.sweep, self._rows()
        working = [actor for actor in self.pool.actors if actor.task]
        partly = sum(actor.progress.fraction * len(actor.items) for actor in working)
        ready = sum(actor.description is not None for actor in self.pool.actors)
        message = f"{sweep.done} of {sweep.total} done; {len(working)} of {ready} actors working"
        tasks = [f"{row.number}: {row.task}" for row in rows if row.task]
        message = " · ".join([message, *tasks[:4], *(["…"] if tasks[4:] else [])])
        report(
            "sweep",
            int(PROGRESS_STEPS * (sweep.done + partly)),
            PROGRESS_STEPS * sweep.total,
            message,
        )
        folder, (written, before) = sweep.session.checkpoint_folder, self._status
        ended = not sweep.pending()
        if folder and rows != before and (ended or time.monotonic() - written > _STATUS_EVERY_S):
            write_actors(folder, rows)
            self._status = time.monotonic(), rows

    def _rows(self) -> list[ActorRow]:
        return [self._row(actor) for actor in (*self.pool.lost, *self.pool.actors)]

    def _row(self, actor: RemoteActor) -> ActorRow:
        described, task = actor.description, ""
        lost = actor in self.pool.lost
        state = "starting" if described is None else "working" if actor.task else "idle"
        if actor.items:
            task = self.sweep.requested[actor.items[0]].title
            task += f" and {len(actor.items) - 1} more" if len(actor.items) > 1 else ""
        return ActorRow(
            actor.number,
            described.host if described else "",
            described.device_name if described else "",
            "lost" if lost else state,
            task,
            actor.progress.stage,
            round(min(actor.progress.fraction, 1.0), 3),
            actor.measured,
        )
