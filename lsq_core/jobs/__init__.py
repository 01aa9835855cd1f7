"""Background jobs, started by the app or the command line, each in its own process."""

from lsq_core.jobs.control import cancel, delete, follow, resume, start
from lsq_core.jobs.folder import find, list_jobs, read, read_state
from lsq_core.jobs.job import (
    ACTIVE_STATES,
    CANCEL_FILE,
    GRACE_S,
    PROGRESS_EVERY,
    STATES,
    WORKING_LOCK,
    Job,
)

__all__ = [
    "ACTIVE_STATES",
    "CANCEL_FILE",
    "GRACE_S",
    "PROGRESS_EVERY",
    "STATES",
    "WORKING_LOCK",
    "Job",
    "cancel",
    "delete",
    "find",
    "follow",
    "list_jobs",
    "read",
    "read_state",
    "resume",
    "start",
]
