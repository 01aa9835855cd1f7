"""Damage a database in many ways and count what is said of it.

``python -m tests.campaigns.damage_database [COUNT] [SEED]`` damages COUNT (120) copies of a filled
database, opens each and reads all of it. An outcome is what it read, or one sentence; anything
else is a traceback, and there should be none.
"""

from __future__ import annotations

import random
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from lsq_core.database import log_of
from lsq_core.errors import LsqError
from lsq_core.store import Store
from tests.campaigns.harness import Tally, run_campaign


def flip(content: bytearray, source: random.Random) -> bytearray:
    """One bit turned over, anywhere."""
    content[source.randrange(len(content))] ^= 1 << source.randrange(8)
    return content


def flip_header(content: bytearray, source: random.Random) -> bytearray:
    """One bit turned over in the three headers of 4 KiB."""
    content[source.randrange(min(len(content), 12288))] ^= 1 << source.randrange(8)
    return content


def cut(content: bytearray, source: random.Random) -> bytearray:
    """Only the beginning."""
    return content[: source.randrange(len(content))]


def zero(content: bytearray, source: random.Random) -> bytearray:
    """A page of zeros."""
    at = source.randrange(len(content))
    size = min(4096, len(content) - at)
    content[at : at + size] = bytes(size)
    return content


def noise(content: bytearray, source: random.Random) -> bytearray:
    """64 random bytes."""
    at = source.randrange(len(content))
    size = min(64, len(content) - at)
    content[at : at + size] = source.randbytes(size)
    return content


DAMAGES: tuple[Callable[[bytearray, random.Random], bytearray], ...] = (
    flip,
    flip_header,
    cut,
    zero,
    noise,
)


def read_all(store: Store) -> None:
    """What the pages and the command line read."""
    store.results(origin=None)
    store.models()
    store.deleted_runs()
    store.saved_folders()
    for name in ("matrices", "scores", "profiles", "plans", "evaluations", "row_scores"):
        store.query(f"SELECT * FROM {name}")


def outcome(path: Path) -> str:
    """How opening and reading a database ends: ``read``, a kind of sentence, or a traceback."""
    try:
        read_all(Store(path))
    except LsqError as error:
        said = str(error)
        if "\n" in said or "in use" in said:
            return f"wrong sentence: {said}"
        kinds = {
            "log": "The log ",
            "damaged": "is damaged",
            "header": "cannot be opened as a DuckDB",
            "empty": "is empty",
            "newer": "newer DuckDB",
            "foreign": "another program",
        }
        return next((kind for kind, sign in kinds.items() if sign in said), f"other: {said}")
    except Exception:
        return f"traceback: {traceback.format_exc().strip().splitlines()[-1][:200]}"
    return "read"


def campaign(whole: Path, folder: Path, count: int, seed: int = 0) -> Counter[str]:
    """Outcomes of ``count`` damaged copies of a database, with its log where it has one."""
    source, found = random.Random(seed), Counter()
    for number in range(count):
        path = folder / "damaged.duckdb"
        shutil.copy(whole, path)
        log_of(path).unlink(missing_ok=True)
        target = path
        if log_of(whole).exists():
            shutil.copy(log_of(whole), log_of(path))
            target = log_of(path) if number % 2 else path
        damage = DAMAGES[number % len(DAMAGES)]
        target.write_bytes(damage(bytearray(target.read_bytes()), source))
        found[outcome(path)] += 1
    return found


def tallied(count: int, folder: Path, seed: int, tell: Callable[[str], None]) -> Tally:
    """The campaign's row, on a database of the test suite's making."""
    from tests.test_compare import fill

    store = Store(folder / "whole.duckdb")
    fill(store, 72)
    found = campaign(store.path, folder, count, seed)
    for kind, number in found.most_common():
        tell(f"{number:5} {kind}")
    wrong = {k: n for k, n in found.items() if k.startswith(("traceback", "wrong", "other"))}
    return Tally.of("damaged databases", count, Counter(wrong))


if __name__ == "__main__":
    sys.exit(run_campaign(tallied, 120))
