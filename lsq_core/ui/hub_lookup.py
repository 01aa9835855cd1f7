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
AT_ONCE = 2.0
#: Seconds that an answer holds: what was found, and that nothing was.
_HOLDS = {True: 3600.0, False: 60.0}


class Looking(LsqError):
    """The model is being looked up; the page is drawn anew when that has ended."""


@dataclass(frozen=True, eq=False)
class _Lookup:
    answer: Future
    ended: list[float] = field(default_factory=list)

    def holds(self) -> bool:
        """Whether the answer is still good, or still to come."""
        if not self.ended:
            return True
        found = self.answer.exception() is None
        return time.monotonic() - self.ended[0] < _HOLDS[found]


@st.cache_resource(show_spinner=False)
def _lookups() -> dict[ModelSource, _Lookup]:
    return {}


@st.cache_resource(show_spinner=False)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(4, thread_name_prefix="hub-lookup")


def look_up(source: ModelSource) -> ModelInfo:
    """What a model's config on Hugging Face says, as :func:`lsq_core.model.loading.inspect_model`.

    Raises
    ------
    Looking
        When that takes longer than a page should wait.
    LsqError
        When there is no such model, or no way to it.
    """
    lookups = _lookups()
    lookup = lookups.get(source)
    if lookup is None or not lookup.holds():
        lookup = lookups[source] = _begin(source)
    try:
        return lookup.answer.result(AT_ONCE)
    except StillRunning:
        if lookup.answer.done():
            raise
        raise Looking(f"{source.name} is being looked up on Hugging Face.") from None


def _begin(source: ModelSource) -> _Lookup:
    lookup = _Lookup(_pool().submit(_inspect, source))
    lookup.answer.add_done_callback(lambda answer: lookup.ended.append(time.monotonic()))
    return lookup


def _inspect(source: ModelSource) -> ModelInfo:
    find_config(source)  # where nothing answers, this says so before torch is imported
    from lsq_core.model.loading import inspect_model

    return inspect_model(source)


def is_looking(source: ModelSource) -> bool:
    """Whether a model is being looked up."""
    lookup = _lookups().get(source)
    return lookup is not None and not lookup.answer.done()


def forget(source: ModelSource) -> None:
    """Look a model up again the next time."""
    _lookups().pop(source, None)
