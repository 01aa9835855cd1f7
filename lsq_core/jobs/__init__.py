"""Background jobs: started by the app or the command line, each in a process of its own."""

from lsq_core.jobs.control import cancel, delete, follow, resume, start
from lsq_core.jobs.folder import find, list_jobs, read, read_state
from lsq_core.jobs.job import ACTIVE, CANCEL, GRACE, PROGRESS_EVERY, STATES, WORKING, Job

__all__ = [
    "ACTIVE",
    "CANCEL",
    "GRACE",
    "PROGRESS_EVERY",
    "STATES",
    "WORKING",
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
