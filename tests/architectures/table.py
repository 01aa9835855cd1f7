"""Every class, each in its turn and within a time limit, as a table: ``make architectures``.

The README holds the table between two marks; ``--write`` puts it there. Without it, a class that
fails or others that work than the README says end with status 1.
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
BEGIN, END = "<!-- architectures: made by `make architectures` -->", "<!-- /architectures -->"
#: Seconds for one class; one takes about two.
LIMIT = 120


def main() -> int:
    """Print the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="put the table into the README")
    options = parser.parse_args()
    outcomes = list(_run_all(options.workers))
    failed = [o for o in outcomes if o.state == "fails"]
    table = markdown(outcomes)
    print(table)
    if options.write:
        README.write_text(_replace_table(table), "utf8")
    elif _supported_row(outcomes) not in README.read_text("utf8"):
        print("The README names others that work; `make architectures-table` writes this table.")
        failed = failed or outcomes[:1]
    for outcome in failed:
        print(f"{outcome.model_type}: {outcome.state}: {outcome.reason}", file=sys.stderr)
    print(f"architectures: {len(outcomes) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


def markdown(outcomes: list[Outcome]) -> str:
    """The table: what works in one row, then each reason with the model types that it holds for."""
    rows = [_supported_row(outcomes)]
    for state, title in (
        ("refused", "refused"),
        ("not built", "not built small by rule, so not tried"),
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
    return f"| the whole way ({len(works)}) | {_types(works)} |"


def _types(types: list[str]) -> str:
    return ", ".join(f"`{t}`" for t in sorted(types))


def _generic_reason(outcome: Outcome) -> str:
    """The reason without what only holds for one run of one class."""
    reason = outcome.reason.replace(f"'{outcome.folder}'", "it").replace(outcome.folder, "it")
    return reason.replace(outcome.name, "the class").replace("|", "/").rstrip(".")


def _replace_table(table: str) -> str:
    previous_handler, _, rest = README.read_text("utf8").partition(BEGIN)
    return previous_handler + table + rest.partition(END)[2]


def _run_all(workers: int) -> Iterator[Outcome]:
    """Every class in turn, ``workers`` at a time, each process with one thread."""
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
            outcome = Outcome(model_type, name, "fails", f"more than {LIMIT} s")
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
