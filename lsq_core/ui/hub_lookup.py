"""Models on Hugging Face are looked up beside the page, which can be used or left meanwhile."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillRunning
from dataclasses import dataclass, field

from lsq_core.errors import LsqError
from lsq_core.model.info import ModelInfo
from lsq_core.model.source import ModelSource, find_config
from lsq_core.ui.safe import st

#: Seconds that a page waits for a lookup before it shows that there is one.
WAIT_SECONDS = 2.0
#: Seconds that an answer holds: what was found, and that nothing was.
_TTL_SECONDS = {True: 3600.0, False: 60.0}


class LookupPending(LsqError):
    """The model is being looked up; the page is drawn anew when that has ended."""


@dataclass(frozen=True, eq=False)
class _Lookup:
    future: Future
    finished_at: list[float] = field(default_factory=list)

    def is_valid(self) -> bool:
        """Whether the answer is still good, or still to come."""
        if not self.finished_at:
            return True
        succeeded = self.future.exception() is None
        return time.monotonic() - self.finished_at[0] < _TTL_SECONDS[succeeded]


@st.cache_resource(show_spinner=False)
def _lookups() -> dict[ModelSource, _Lookup]:
    return {}


@st.cache_resource(show_spinner=False)
def _executor() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(4, thread_name_prefix="hub-lookup")


def look_up(source: ModelSource) -> ModelInfo:
    """What a model's config on Hugging Face says, as :func:`lsq_core.model.loading.inspect_model`.

    Raises
    ------
    LookupPending
        When that takes longer than a page should wait.
    LsqError
        When there is no such model, or no way to it.
    """
    lookups = _lookups()
    lookup = lookups.get(source)
    if lookup is None or not lookup.is_valid():
        lookup = lookups[source] = _submit(source)
    try:
        return lookup.future.result(WAIT_SECONDS)
    except StillRunning:
        if lookup.future.done():
            raise
        raise LookupPending(f"{source.name} is being looked up on the Hugging Face Hub.") from None


def _submit(source: ModelSource) -> _Lookup:
    lookup = _Lookup(_executor().submit(_inspect, source))
    lookup.future.add_done_callback(lambda future: lookup.finished_at.append(time.monotonic()))
    return lookup


def _inspect(source: ModelSource) -> ModelInfo:
    find_config(source)  # where nothing answers, this says so before torch is imported
    from lsq_core.model.loading import inspect_model

    return inspect_model(source)


def is_pending(source: ModelSource) -> bool:
    """Whether a model is being looked up."""
    lookup = _lookups().get(source)
    return lookup is not None and not lookup.future.done()


def invalidate(source: ModelSource) -> None:
    """Look a model up again the next time."""
    _lookups().pop(source, None)
