"""A background job and its current state."""

from __future__ import annotations

import itertools
import os
import re
import shlex
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from lsq_core.files import DamagedFileError, read_json
from lsq_core.planning.methods import PLANNERS

#: Seconds that a process is given to end by itself before it is killed.
GRACE_S = 1.0
#: Minimum seconds between two writes of the progress file.
PROGRESS_EVERY = 0.2
ACTIVE_STATES = ("queued", "running")
STATES = (*ACTIVE_STATES, "done", "failed", "cancelled", "interrupted", "damaged")
#: A title lists up to this number of methods, and otherwise only counts them.
_FEW_METHODS = 3
#: The file that marks a job as cancelled by the user; a process terminated without it, for example
#: by a shutdown, was interrupted.
CANCEL_FILE = "cancel"
#: The file that a job's process keeps locked while it runs; it contains the process's id.
WORKING_LOCK = "working.lock"
#: Bytes read from the end of a log.
_LOG_BYTES = 65536
#: A budget in bits, as typed.
_BITS = re.compile(r"[0-9]*\.?[0-9]+")


def _sizes(options: dict[str, str]) -> list[str]:
    """Return the size requested by a command line: ``3.13 bits``, ``base 3.13, 9MiB``."""
    base, budget = options.get("--base", ""), options.get("--budget", "")
    number = budget.removesuffix("bpp")
    if number != budget and _BITS.fullmatch(number):
        budget = f"{float(number):.2f} bits"
    loss = options.get("--max-loss", "")
    if base and not budget:
        return [f"{base} bits"]
    sizes = [f"base {base}" if base else "", budget, f"within {loss} loss" if loss else ""]
    text = ", ".join(filter(None, sizes))
    return [text] if text else []


@dataclass(frozen=True)
class Job:
    """The current state of a job, as read from its folder.

    ``state`` is queued, running, done, failed, cancelled, interrupted or damaged. Interrupted means
    that its process ended without a result although the user did not cancel it; damaged means that
    its command or its result cannot be read. ``result_bytes`` and ``result_sha256`` are those of
    the result file.
    """

    id: str
    folder: Path
    arguments: tuple[str, ...]
    created: float
    state: str
    stage: str = ""
    done: int = 0
    total: int = 0
    message: str = ""
    eta: float | None = None
    memory: int | None = None
    seconds: float = 0.0
    result_bytes: int | None = None
    result_sha256: str = ""

    @property
    def active(self) -> bool:
        """Whether it is queued or running."""
        return self.state in ACTIVE_STATES

    @property
    def can_resume(self) -> bool:
        """Whether it ended without a result, so that it can continue from its saved progress."""
        return bool(self.arguments) and not self.active and self.state != "done"

    @property
    def fraction(self) -> float:
        """The completed fraction of the current stage, from 0 to 1."""
        return min(self.done / self.total, 1.0) if self.total else 0.0

    @property
    def verb(self) -> str:
        """The first word of the command, '' if it can no longer be read."""
        return self.arguments[0] if self.arguments else ""

    @property
    def command(self) -> str:
        """The equivalent command line for a terminal."""
        return "lsq " + shlex.join(self.arguments) if self.arguments else ""

    @property
    def title(self) -> str:
        """A title with the method, the size and the model: ``MXQ 2.70 bits · demo``."""
        words = dict(itertools.pairwise(self.arguments))
        methods = [
            PLANNERS[name].title if name in PLANNERS else name
            for name in self.option_values("--method")
        ]
        if self.verb == "run":
            what = " ".join([*methods, *_sizes(words)]) or "Run of a saved plan"
        elif self.verb == "refine":
            what = " ".join(["Refinement", *_sizes(words)])
        elif self.verb == "sweep" and len(methods) <= _FEW_METHODS:
            what = f"Sweep of {', '.join(methods)}" if methods else "Sweep"
        elif self.verb == "sweep":
            what = f"Sweep of {len(methods)} methods"
        else:
            verb = self.verb.capitalize() or self.id
            what = " ".join([verb, *methods, words.get("--run", "")]).strip()
        model = words.get("--model", "")
        if model.startswith(("/", ".", "~")):
            model = Path(model).name  # the parent folders add nothing to a title
        return " · ".join(filter(None, [what, model]))

    def option_values(self, option: str) -> list[str]:
        """Return all values of an option in the command line."""
        return [value for name, value in itertools.pairwise(self.arguments) if name == option]

    def log_tail(self, lines: int = 12) -> str:
        """Return the last lines of the log."""
        try:
            with (self.folder / "log.txt").open("rb") as file:
                file.seek(max(os.fstat(file.fileno()).st_size - _LOG_BYTES, 0))
                text = file.read().decode("utf8", "replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def result(self) -> dict | None:
        """Return the JSON result of the command, or None if there is none.

        Raises
        ------
        DamagedFileError
            If the result file is not what was written.
        """
        path = self.folder / "result.json"
        found = read_json(path)
        if found is not None and self.result_sha256:
            with path.open("rb") as file:
                same = sha256(file.read()).hexdigest() == self.result_sha256
            if not same:
                raise DamagedFileError(f"{path} is damaged: it is not what was written.")
        return found
