"""Damage a database in many ways and count the outcomes.

``python -m tests.campaigns.damage_database [COUNT] [SEED]`` damages COUNT (default 120) copies of a
filled database, opens each and reads all of it. Each must either be read or be refused with one
known message; anything else, such as a traceback, is a fault.
"""

from __future__ import annotations

import random
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from lsq_core.errors import LsqError
from lsq_core.store.database import wal_path
from lsq_core.store.store import Store
from tests.campaigns.harness import Tally, run_campaign


def flip_bit(content: bytearray, rng: random.Random) -> bytearray:
    """Flip one bit anywhere."""
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return content


def flip_header(content: bytearray, rng: random.Random) -> bytearray:
    """Flip one bit in the three headers of 4 KiB."""
    content[rng.randrange(min(len(content), 12288))] ^= 1 << rng.randrange(8)
    return content


def truncate(content: bytearray, rng: random.Random) -> bytearray:
    """Truncate at a random position."""
    return content[: rng.randrange(len(content))]


def zero_page(content: bytearray, rng: random.Random) -> bytearray:
    """Overwrite up to 4 KiB with zeros."""
    at = rng.randrange(len(content))
    size = min(4096, len(content) - at)
    content[at : at + size] = bytes(size)
    return content


def overwrite_with_noise(content: bytearray, rng: random.Random) -> bytearray:
    """Overwrite up to 64 bytes with random ones."""
    at = rng.randrange(len(content))
    size = min(64, len(content) - at)
    content[at : at + size] = rng.randbytes(size)
    return content


DAMAGES: tuple[Callable[[bytearray, random.Random], bytearray], ...] = (
    flip_bit,
    flip_header,
    truncate,
    zero_page,
    overwrite_with_noise,
)


def read_all(store: Store) -> None:
    """Read everything that the pages and the command line read."""
    store.results(origin=None)
    store.models()
    store.deleted_runs()
    store.saved_folders()
    for name in ("matrices", "scores", "profiles", "plans", "evaluations", "row_scores"):
        store.query(f"SELECT * FROM {name}")


def outcome(path: Path) -> str:
    """Return how opening and reading a database ends: ``read``, a kind of message, or a fault."""
    try:
        read_all(Store(path))
    except LsqError as error:
        message = str(error)
        if "\n" in message or "in use" in message:
            return f"wrong sentence: {message}"
        kinds = {
            "log": "The log ",
            "damaged": "is damaged",
            "header": "cannot be opened as a DuckDB",
            "empty": "is empty",
            "newer": "newer DuckDB",
            "foreign": "another program",
        }
        return next(
            (kind for kind, marker in kinds.items() if marker in message), f"other: {message}"
        )
    except Exception:
        return f"traceback: {traceback.format_exc().strip().splitlines()[-1][:200]}"
    return "read"


def campaign(source_database: Path, folder: Path, count: int, seed: int = 0) -> Counter[str]:
    """Count the outcomes of ``count`` damaged copies of a database, with its log if it has one."""
    rng, counts = random.Random(seed), Counter()
    for number in range(count):
        path = folder / "damaged.duckdb"
        shutil.copy(source_database, path)
        wal_path(path).unlink(missing_ok=True)
        target = path
        if wal_path(source_database).exists():
            shutil.copy(wal_path(source_database), wal_path(path))
            target = wal_path(path) if number % 2 else path
        damage = DAMAGES[number % len(DAMAGES)]
        target.write_bytes(damage(bytearray(target.read_bytes()), rng))
        counts[outcome(path)] += 1
    return counts


def run(count: int, folder: Path, seed: int, log: Callable[[str], None]) -> Tally:
    """Run the campaign on a database of synthetic runs and return its row."""
    from tests.test_compare import insert_synthetic_runs

    store = Store(folder / "whole.duckdb")
    insert_synthetic_runs(store, 72)
    counts = campaign(store.path, folder, count, seed)
    for kind, number in counts.most_common():
        log(f"{number:5} {kind}")
    faults = {k: n for k, n in counts.items() if k.startswith(("traceback", "wrong", "other"))}
    return Tally.of("damaged databases", count, Counter(faults))


if __name__ == "__main__":
    sys.exit(run_campaign(run, 120))
