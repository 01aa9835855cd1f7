"""The status of a sweep's actors on Ray, written to a file for those who watch the job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lsq_core.files import DamagedFileError, read_json
from lsq_core.jsontext import write_json

#: Name of the file in a job's folder.
ACTORS_FILE = "actors.json"
#: Possible states of an actor.
STATES = ("starting", "idle", "working", "lost")


@dataclass(frozen=True)
class ActorRow:
    """The status of an actor as shown to users.

    ``task`` is a description in words, ``fraction`` its progress (0 to 1), ``measured`` the number
    of runs the actor has measured.
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
    """Return the rows in a job's folder; an empty list if there are none.

    Raises
    ------
    DamagedFileError
        If they cannot be read.
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
