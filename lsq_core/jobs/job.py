"""A background job as it stands."""

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

#: Seconds a process has to end by itself before it is killed.
GRACE_S = 1.0
#: Seconds between two writes of the progress file.
PROGRESS_EVERY = 0.2
ACTIVE_STATES = ("queued", "running")
STATES = (*ACTIVE_STATES, "done", "failed", "cancelled", "interrupted", "damaged")
#: More methods than these are counted in a title.
_FEW_METHODS = 3
#: The file that says that a person asked for the end; a process that is ended otherwise, by a
#: shutdown say, was interrupted.
CANCEL_FILE = "cancel"
#: The file that a job's process keeps locked while it works, and which holds its number.
WORKING_LOCK = "working.lock"
#: Bytes at the end of a log that are read.
_LOG_BYTES = 65536
#: A budget in bits as it is typed.
_BITS = re.compile(r"[0-9]*\.?[0-9]+")


def _sizes(options: dict[str, str]) -> list[str]:
    """The size that a command line asks for: ``3.13 bits``, ``base 3.13, 9MiB``."""
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
    """A job as its folder says it is now.

    ``state`` is queued, running, done, failed, cancelled, interrupted or damaged; interrupted
    means that its process ended without a result, and that nobody asked for that; damaged that
    what it was or its result cannot be read. ``result_bytes`` and ``result_sha256`` are of the
    file with its result.
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
        """Whether it is still going to do something."""
        return self.state in ACTIVE_STATES

    @property
    def can_resume(self) -> bool:
        """Whether it ended without a result, so that it can go on from what it kept."""
        return bool(self.arguments) and not self.active and self.state != "done"

    @property
    def fraction(self) -> float:
        """How much of the present stage is done, 0 to 1."""
        return min(self.done / self.total, 1.0) if self.total else 0.0

    @property
    def verb(self) -> str:
        """The command's first word, '' where that can't be read any more."""
        return self.arguments[0] if self.arguments else ""

    @property
    def command(self) -> str:
        """The command line that does the same in a terminal."""
        return "lsq " + shlex.join(self.arguments) if self.arguments else ""

    @property
    def title(self) -> str:
        """What it does, to which size, and the model: ``MXQ 2.70 bits · demo``."""
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
            model = Path(model).name  # the folders before it say nothing here
        return " · ".join(filter(None, [what, model]))

    def option_values(self, option: str) -> list[str]:
        """Every value that an option was given in its command line."""
        return [value for name, value in itertools.pairwise(self.arguments) if name == option]

    def log_tail(self, lines: int = 12) -> str:
        """The last lines that the process wrote."""
        try:
            with (self.folder / "log.txt").open("rb") as file:
                file.seek(max(os.fstat(file.fileno()).st_size - _LOG_BYTES, 0))
                text = file.read().decode("utf8", "replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def result(self) -> dict | None:
        """What the command printed as JSON, once it is done; None where there is none.

        Raises
        ------
        DamagedFileError
            When there is one and it isn't what was written.
        """
        path = self.folder / "result.json"
        found = read_json(path)
        if found is not None and self.result_sha256:
            with path.open("rb") as file:
                same = sha256(file.read()).hexdigest() == self.result_sha256
            if not same:
                raise DamagedFileError(f"{path} is damaged: it is not what was written.")
        return found
