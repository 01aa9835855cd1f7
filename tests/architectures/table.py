"""Run every class within a time limit and print a table: ``make architectures``.

The README holds the table between two markers; ``--write`` updates it. Without ``--write``, the
exit status is 1 if a class fails or the supported classes differ from those in the README.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.architectures.run_end_to_end import Outcome, run_end_to_end

README = Path(__file__).resolve().parents[2] / "README.md"
BEGIN, END = "<!-- architectures: made by `make architectures-table` -->", "<!-- /architectures -->"
#: Time limit for one class in seconds; a class usually takes about two.
LIMIT = 120


def main() -> int:
    """Print the table; return 1 if a class fails or the README lists other classes, else 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="write the table to the README")
    options = parser.parse_args()
    outcomes = list(_run_all(options.workers))
    failed = [o for o in outcomes if o.state == "fails"]
    table = markdown(outcomes)
    print(table)
    if options.write:
        README.write_text(_replace_table(table), "utf8")
    outdated = _supported_row(outcomes) not in README.read_text("utf8")
    if outdated:
        print("The README lists other model types; `make architectures-table` updates it.")
    for outcome in failed:
        print(f"{outcome.model_type}: {outcome.state}: {outcome.reason}", file=sys.stderr)
    print(f"architectures: {len(outcomes) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed or outdated else 0


def markdown(outcomes: list[Outcome]) -> str:
    """Return the table: supported model types in one row, then those with each other outcome."""
    rows = [_supported_row(outcomes)]
    for state, title in (
        ("refused", "refused"),
        ("not built", "no small model could be built, so not tested"),
        ("fails", "fails"),
    ):
        reasons: dict[str, list[str]] = {}
        for outcome in outcomes:
            if outcome.state == state:
                reasons.setdefault(_generic_reason(outcome), []).append(outcome.model_type)
        if state == "not built":
            reasons = {"": [t for types in reasons.values() for t in types]} if reasons else {}
        for reason, types in reasons.items():
            what = f"{title}: {reason}" if reason else title
            rows.append(f"| {what} ({len(types)}) | {_types(types)} |")
    return "\n".join([BEGIN, "", "| outcome | model types |", "|---|---|", *rows, "", END])


def _supported_row(outcomes: list[Outcome]) -> str:
    works = [o.model_type for o in outcomes if o.state == "works"]
    return f"| supported end to end ({len(works)}) | {_types(works)} |"


def _types(types: list[str]) -> str:
    return ", ".join(f"`{t}`" for t in sorted(types))


def _generic_reason(outcome: Outcome) -> str:
    """Return the reason without the name and folder of the class."""
    reason = outcome.reason.replace(f"'{outcome.folder}'", "it").replace(outcome.folder, "it")
    return reason.replace(outcome.name, "the class").replace("|", "/").rstrip(".")


def _replace_table(table: str) -> str:
    before, _, rest = README.read_text("utf8").partition(BEGIN)
    return before + table + rest.partition(END)[2]


def _run_all(workers: int) -> Iterator[Outcome]:
    """Yield the outcome of every class; run ``workers`` at a time, with one thread each."""
    from tests.architectures.small import architectures

    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, initializer=_silence_warnings) as pool:
        yield from pool.imap(_run_one, architectures().items())


def _silence_warnings() -> None:
    import warnings

    from transformers.utils import logging

    logging.set_verbosity(logging.CRITICAL)
    warnings.simplefilter("ignore")


def _run_one(item: tuple[str, str]) -> Outcome:
    model_type, name = item
    with tempfile.TemporaryDirectory() as folder:
        try:
            with _time_limit():
                outcome = run_end_to_end(model_type, name, Path(folder))
        except TimeoutError:
            outcome = Outcome(model_type, name, "fails", f"timed out after {LIMIT} s")
    print(f"{outcome.state:10}{outcome.seconds:6.1f} s  {model_type}", file=sys.stderr, flush=True)
    return outcome


@contextmanager
def _time_limit() -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise TimeoutError

    previous_handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous_handler)


if __name__ == "__main__":
    sys.exit(main())
