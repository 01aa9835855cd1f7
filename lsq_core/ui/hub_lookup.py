"""Background lookups of models on Hugging Face, which leave the page responsive."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillRunning
from dataclasses import dataclass, field

from lsq_core.errors import LsqError
from lsq_core.model.info import ModelInfo
from lsq_core.model.source import ModelSource, find_config
from lsq_core.ui.safe import st

#: Seconds that a page waits for a lookup before it shows that one is pending.
WAIT_SECONDS = 2.0
#: Seconds that a result stays valid, by whether the lookup succeeded.
_TTL_SECONDS = {True: 3600.0, False: 60.0}


class LookupPending(LsqError):
    """The model is being looked up; the page is redrawn when the lookup ends."""


@dataclass(frozen=True, eq=False)
class _Lookup:
    future: Future
    finished_at: list[float] = field(default_factory=list)

    def is_valid(self) -> bool:
        """Return whether the lookup is pending or its result has not expired."""
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
    """Return a model's description as :func:`lsq_core.model.loading.inspect_model` does.

    Raises
    ------
    LookupPending
        If that takes longer than a page should wait.
    LsqError
        If there is no such model, or it cannot be reached.
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
    find_config(source)  # fails before torch is imported if there is no config
    from lsq_core.model.loading import inspect_model

    return inspect_model(source)


def is_pending(source: ModelSource) -> bool:
    """Return whether a model is being looked up."""
    lookup = _lookups().get(source)
    return lookup is not None and not lookup.future.done()


def invalidate(source: ModelSource) -> None:
    """Forget a lookup, so that the next one starts over."""
    _lookups().pop(source, None)
