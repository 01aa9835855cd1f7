"""How campaigns classify the endings of commands, and a short run of the fuzzed commands."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from lsq_core.cli import program as cli
from tests.campaigns.harness import Tally, failed, outcome
from tests.conftest import ROOT


def _raise(error: BaseException):
    def main(arguments: list[str]) -> int:
        raise error

    return main


def _print(text: str, status: int):
    def main(arguments: list[str]) -> int:
        print(text, file=sys.stderr, end="")
        return status

    return main


@pytest.mark.parametrize(
    ("main", "expected"),
    [
        (_print("", 0), "exit 0"),
        (_print("load\nlsq: There is no model 'x'.\n", 2), "exit 2"),
        (_print("", 1), "exit 1 with 0 sentences"),
        (_print("lsq: One.\nlsq: Two.\n", 1), "exit 1 with 2 sentences"),
        (_print("lsq: There is no\nmodel.\n", 2), "exit 2 with a sentence of several lines"),
        (_print("Traceback\nlsq: It failed.\n", 1), "exit 1 with 1 sentences"),
        (_print("lsq: No \x1b[2J.\n", 2), "exit 2 with control characters"),
        (_raise(ValueError("x")), "traceback ValueError: x"),
        (_raise(KeyboardInterrupt()), "traceback KeyboardInterrupt"),
        (lambda arguments: time.sleep(30), "hang"),
    ],
)
def test_outcome_reports_every_bad_ending(monkeypatch, main, expected):
    monkeypatch.setattr(cli, "main", main)
    kind = outcome([], limit=0.1)
    assert kind.startswith(expected)
    assert failed(kind) == (expected not in ("exit 0", "exit 2"))


def test_outcome_of_bad_options_is_that_of_the_parser():
    assert outcome(["no-such-verb"]) == "usage 2"
    assert outcome(["--help"]) == "usage 0"


def test_tally_counts_each_kind_of_fault():
    tally = Tally("x", 4)
    assert not tally.has_faults
    for ending in ("traceback A", "hang", "fetch: b", "lost: rows of runs"):
        tally.add(ending, "case")
    assert str(tally) == "| x | 4 | 1 | 1 | 1 | 1 |"
    assert tally.has_faults


def test_fuzzed_commands_end_in_a_sentence():
    """Runs part of the campaign in a subprocess, which it can cut off from network and home."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.campaigns.fuzzed_commands", "60", "1"],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "| fuzzed commands | 60 | 0 | 0 | 0 | 0 |" in done.stdout
