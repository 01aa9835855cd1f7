"""Who does what: the rows that a sweep on Ray keeps of its actors for those who watch it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lsq_core.files import DamagedFileError, read_json
from lsq_core.jsontext import write_json

#: The file, in the folder of a job.
ACTORS_FILE = "actors.json"
#: What an actor can be doing.
STATES = ("starting", "idle", "working", "lost")


@dataclass(frozen=True)
class ActorRow:
    """An actor as a person sees it.

    ``task`` is in words, ``fraction`` how much of it is done (0 to 1), ``measured`` how many runs
    it has measured.
    """

    number: int
    host: str
    device: str
    state: str
    task: str = ""
    stage: str = ""
    fraction: float = 0.0
    measured: int = 0


def write_actors(folder: Path, rows: Sequence[ActorRow]) -> None:
    """Write the rows to a job's folder, replacing the previous ones."""
    write_json(folder / ACTORS_FILE, {"actors": [asdict(row) for row in rows]})


def read_actors(folder: Path) -> list[ActorRow]:
    """The rows that a job keeps; none where it has no actors.

    Raises
    ------
    DamagedFileError
        When they cannot be read.
    """
    path = folder / ACTORS_FILE
    found = (read_json(path) or {"actors": []}).get("actors")
    try:
        rows = [ActorRow(**_checked(row)) for row in found]
    except (LookupError, TypeError, ValueError) as error:
        raise DamagedFileError(f"{path} is damaged: it has no rows of actors.") from error
    return rows


def _checked(row: Mapping[str, object]) -> dict:
    row = dict(row)
    if row["state"] not in STATES or not 0 <= float(row["fraction"]) <= 1:
        raise ValueError(row)
    return row
