"""Command-line output on ASCII terminals and closed pipes, and the exit status of bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from lsq_core.cli.program import main
from lsq_core.store.store import Store
from tests.conftest import ROOT


def run_lsq(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "lsq_core", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
    )


ASCII = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize(
    "arguments",
    [["plan", "--model", "demo", "--method", "uniform", "--base", "3.13"], ["run", "--help"], []],
)
def test_cli_ascii_terminal_output(tmp_path, arguments):
    completed = run_lsq(*arguments, **ASCII, LSQ_DB=str(tmp_path / "x.duckdb"))
    assert completed.returncode == (0 if arguments else 2)
    assert b"Traceback" not in completed.stderr
    assert (completed.stdout + completed.stderr).isascii()


def test_cli_json_ascii_terminal_same_document(tmp_path):
    arguments = ["export", "--out", str(tmp_path / "läufe.csv"), "--json"]
    completed = run_lsq(*arguments, PYTHONIOENCODING="ascii", LSQ_DB=str(tmp_path / "x.duckdb"))
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.isascii()
    assert json.loads(completed.stdout)["out"] == str(tmp_path / "läufe.csv")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("json_output", [[], ["--json"]])
def test_output_to_a_full_disk_is_one_sentence(tmp_path, json_output):
    command = [sys.executable, "-m", "lsq_core", "results", *json_output]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*command, "--db", str(tmp_path / "x.duckdb")],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.count("lsq: ") == 1
    assert "Traceback" not in done.stderr


def test_cli_undecodable_file_name_in_output(tmp_path):
    out = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.csv")
    for more in ([], ["--json"]):
        Path(out).unlink(missing_ok=True)
        completed = run_lsq("export", "--out", out, *more, LSQ_DB=str(tmp_path / "x.duckdb"))
        assert completed.returncode == 0, completed.stderr
    assert json.loads(completed.stdout)["out"] == out


def test_no_name_acts_on_the_terminal(tmp_path, capsys, random_model):
    """Names may come from other people's files and databases."""
    name, shown = "\x1b]0;title\x07\x9b2J\u202e", r"\x1b]0;title\x07\x9b2J\u202e"
    for arguments in (["audit", name], ["inspect", "--model", f"{name}/x"], ["jobs", "x", name]):
        with suppress(SystemExit):
            main([*arguments, "--db", str(tmp_path / "x.duckdb")])
        printed = capsys.readouterr()
        assert shown in printed.err, arguments
        assert "\x1b" not in printed.err
    model = tmp_path / name
    shutil.copytree(random_model("llama-gqa"), model)
    assert main(["inspect", "--model", str(model)]) == 0
    printed = capsys.readouterr().out
    assert shown in printed
    assert not set(printed) & {"\x1b", "\x07", "\x9b", "\u202e"}
    assert printed.endswith("\n")


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_cli_closed_stdout_exit_0(tmp_path, more):
    """As with ``head -1``; the command still completes."""
    arguments = [sys.executable, "-m", "lsq_core", "disk", *more]
    arguments += ["--db", str(tmp_path / "x.duckdb")]
    reading, writing = os.pipe()
    os.close(reading)  # there is no reader from the start
    with os.fdopen(writing, "wb") as closed_pipe:
        completed = subprocess.run(arguments, cwd=ROOT, stdout=closed_pipe, stderr=subprocess.PIPE)
    assert completed.returncode == 0
    assert completed.stderr == b""


def test_cli_closed_stderr_continues(tmp_path):
    """Progress goes to a closed pipe; the result is still written."""
    reading, writing = os.pipe()
    os.close(reading)
    out = tmp_path / "plan.json"
    plan = ["plan", "--model", "demo", "--method", "uniform", "--base", "3.13", "--out", str(out)]
    with os.fdopen(writing, "wb") as closed_pipe:
        completed = subprocess.run(
            [sys.executable, "-m", "lsq_core", *plan, "--db", str(tmp_path / "x.duckdb")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=closed_pipe,
        )
    assert completed.returncode == 0
    assert b"bits per parameter" in completed.stdout
    assert json.loads(out.read_text())["method"] == "uniform"


BAD_COMMANDS = [
    "results --db /proc/x",
    "results --db /proc/x/y.duckdb",
    "plan --model demo --method uniform --base 3.13 --out /proc/x",
    "plan --model demo --method uniform --base 3.13 --out ",
    "export --out /proc/x.csv",
    "export --out /no/such/folder/x.parquet",
    "export --out ",
    "inspect --model DEMO",
    "inspect --model /proc/x",
    "inspect --model /proc/self/mem",
    "run --model demo --plan /proc/x",
    "run --model demo --plan /proc/self/mem",
    "run --model demo --method uniform --base 3.13 --corpus /proc/x",
    "import-reference /proc/x",
    "audit /proc/x",
    "generate --prompt a --saved /proc/x",
    "sweep --model demo --method uniform --base 9.99 --max-tokens 64",
    "sweep --model demo --method uniform --base 3.13 --corpus /no/such --max-tokens 64",
    "sweep --model demo --method uniform --budget 0.5bpp --quantizer nf4 --max-tokens 64",
]


@pytest.mark.parametrize("line", BAD_COMMANDS)
def test_cli_bad_input_exit_2_one_line(line, capsys):
    assert main(line.split(" ")) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1].startswith("lsq: ")
    assert not any("Traceback" in line for line in errors)


def test_cli_export_is_atomic(tmp_path, capsys):
    database = ["--db", str(tmp_path / "x.duckdb")]
    Store(tmp_path / "x.duckdb")
    out = tmp_path / "runs.csv"
    assert main(["export", "--out", str(out), *database]) == 0
    content = out.read_bytes()
    assert main(["export", "--out", str(out), *database]) == 2
    assert "already exists" in capsys.readouterr().err
    assert out.read_bytes() == content
    script = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from pathlib import Path
from lsq_core.errors import LsqError
from lsq_core.files import write_bytes
try:
    write_bytes(Path({str(tmp_path / "cut.csv")!r}), b"x" * 100, new=True)
except LsqError as error:
    sys.exit(error.exit_code)
"""
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 1
    assert not (tmp_path / "cut.csv").exists()
