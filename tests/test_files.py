"""Atomic writes and validated reads of files, also on disks that are really full or read-only."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import sys

import numpy as np
import pytest

from lsq_core.errors import InputError, exception_reason
from lsq_core.files import (
    DamagedFileError,
    atomic_writer,
    read_arrays,
    read_json,
    write_arrays,
    write_bytes,
)
from lsq_core.jsontext import write_json
from tests.conftest import ROOT


def run_on_small_disk(script: str, tmp_path) -> str:
    """Run a Python script whose folder is a 1 MiB disk, and return its output."""
    mount = f'mount -t tmpfs -o size=1m none {tmp_path} && exec {sys.executable} -c "$0"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"]).returncode:
        pytest.skip("no disk of its own can be mounted here")
    done = subprocess.run(
        [*command, mount, script],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "FOLDER": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_write_bytes_disk_full_keeps_old_file(tmp_path):
    message = run_on_small_disk(
        """
import os
from pathlib import Path
from lsq_core.errors import LsqError
from lsq_core.files import write_bytes
folder = Path(os.environ["FOLDER"])
write_bytes(folder / "a", b"old")
for name in ("a", "b"):
    try:
        write_bytes(folder / name, b"x" * 2**21, new=name == "b")
    except LsqError as error:
        print(error.exit_code, "disk is full" in str(error))
print(sorted(p.name for p in folder.iterdir()), (folder / "a").read_bytes())
""",
        tmp_path,
    )
    assert message.splitlines() == ["1 True", "1 True", "['a'] b'old'"]


def test_job_disk_full_reports_failure(tmp_path):
    """The final state overwrites the progress file in place, which needs no more space."""
    message = run_on_small_disk(
        """
import json, os, subprocess, sys
from pathlib import Path
from lsq_core import jobs
from lsq_core.jobs import worker
from lsq_core.jsontext import write_json
home = Path(os.environ["FOLDER"]) / "one"
home.mkdir()
write_json(home / "job.json", {"id": "one", "arguments": ["results"], "created": 0.0})
def execute(arguments, report, folder):
    with (folder / "filler").open("wb") as file:
        try:
            while True:
                file.write(b"x" * 4096)
                file.flush()
        except OSError:
            pass
    report("evaluate", 1, 2, "with nothing left")
    write_json(folder / "more.json", {"of": "it" * 4096})
print("status", worker.run_job(home, execute))
job = jobs.read(home)
print(job.state, "disk is full" in job.message)
""",
        tmp_path,
    )
    assert message.splitlines()[-2:] == ["status 1", "failed True"]


def test_write_bytes_new_existing_file_raises(tmp_path):
    write_bytes(tmp_path / "a", b"first", new=True)
    with pytest.raises(InputError, match="already exists"):
        write_bytes(tmp_path / "a", b"second", new=True)
    assert (tmp_path / "a").read_bytes() == b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_writing_exception_leaves_no_file(tmp_path):
    def write_half() -> None:
        with atomic_writer(tmp_path / "a") as file:
            file.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert not list(tmp_path.iterdir())


def test_write_bytes_respects_umask_links_and_devices(tmp_path):
    before = os.umask(0o027)
    try:
        write_bytes(tmp_path / "a", b"1")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
    (tmp_path / "link").symlink_to(tmp_path / "a")
    write_bytes(tmp_path / "link", b"2")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "a").read_bytes() == b"2"
    write_bytes(type(tmp_path)("/dev/null"), b"3")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize("path", ["", "/proc/x", "/no/such/folder/x", "a\0b", "n" * 300])
def test_write_json_invalid_path_raises(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError):
        write_json(type(tmp_path)(path), {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 300, b'{"a": 1', b"[1]", b"null", b'{"a": NaN}', b"\xff\xfe{}", b"[" * 100_000],
)
def test_read_json_damaged_file_raises(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"a\.json is damaged"):
        read_json(tmp_path / "a.json")
    assert read_json(tmp_path / "none.json") is None


def test_json_round_trip_undecodable_name(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    write_json(tmp_path / "a.json", {"name": name})
    assert read_json(tmp_path / "a.json") == {"name": name}


def test_arrays_round_trip_or_damaged(tmp_path):
    path, arrays = tmp_path / "a.npz", {"x": np.arange(5.0), "n": np.array(3)}
    assert read_arrays(path, arrays) is None
    write_arrays(path, arrays)
    found = read_arrays(path, arrays)
    assert all((found[name] == own).all() for name, own in arrays.items())
    original_bytes = path.read_bytes()
    flipped = bytearray(original_bytes)
    flipped[original_bytes.index(arrays["x"].tobytes()) + 3] ^= 4
    for content in (
        b"",
        original_bytes[:-30],
        original_bytes[:40],
        bytes(len(original_bytes)),
        bytes(flipped),
    ):
        path.write_bytes(content)
        with pytest.raises(DamagedFileError, match=r"a\.npz is damaged"):
            read_arrays(path, arrays)
    write_arrays(path, arrays)
    for like in ({"y": np.zeros(5)}, {"x": np.zeros(4)}, {"x": np.zeros(5, np.int64)}):
        with pytest.raises(DamagedFileError):
            read_arrays(path, like)
    write_arrays(path, {"x": np.full(5, np.nan)})
    with pytest.raises(DamagedFileError, match="its x"):
        read_arrays(path, {"x": np.zeros(5)})


# --- error messages of libraries --------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "expected", "excluded"),
    [
        ("Couldn't load it from one of: \n(1) a file,\n(2) a class.", "(2) a class", "\n"),
        ("Sizes differ. For details look at the above report!", "Sizes differ", "report"),
        ("word " * 1000, "word …", "\n"),
        ("", "ValueError", "\n"),
        ("  \n ", "ValueError", "\n"),
    ],
)
def test_reason_of_keeps_message(message, expected, excluded):
    reason = exception_reason(ValueError(message))
    assert expected in reason
    assert excluded not in reason
    assert 0 < len(reason) <= 402
    assert reason[-1] not in ".:!,"


def test_reason_of_empty_message_uses_cause():
    error = ValueError()
    error.__cause__ = OSError(errno.ENOENT, "No such file or directory")
    assert "No such file" in exception_reason(error)


@pytest.mark.parametrize("part", ["x", "x ", "see ", "/a.h:1 ", " /"])
def test_exception_reason_of_long_message_in_linear_time(part):
    """Takes a fraction of a second; quadratic time would mean hours."""
    assert len(exception_reason(ValueError(part * 10**6))) <= 402


def test_no_module_truncates_error_messages():
    patterns = ('.split("\\n")[0]', ".splitlines()[0]", "splitlines()), ")
    found = [
        path.name
        for path in (ROOT / "lsq_core").rglob("*.py")
        if any(sign in path.read_text("utf8") for sign in patterns)
    ]
    assert not found


def test_write_json_nan_becomes_null(tmp_path):
    write_json(tmp_path / "a.json", {"x": float("nan"), "y": [1, 2]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": None, "y": [1, 2]}
