"""Output paths: invalid ones are rejected before any work, and checks leave nothing behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lsq_core.cli import program
from lsq_core.errors import InputError
from lsq_core.session import Session
from lsq_core.targets import check_file_target, check_folder_target

NOBODY = 65534


@contextmanager
def as_unprivileged_user() -> Iterator[None]:
    """Run the block with the rights of a user who owns none of the files."""
    if os.geteuid() != 0:
        pytest.skip("becoming another user needs root")
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder(tmp_path) -> Path:
    """Return a sticky folder that other users can access, like ``/tmp``."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    return shared


def test_check_target_valid_paths(tmp_path):
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    check_folder_target(tmp_path / "new")
    check_folder_target(tmp_path / "a" / "b" / "new")
    check_folder_target(tmp_path / "empty")
    check_file_target(tmp_path / "plan.json")
    assert sorted(tmp_path.rglob("*")) == before, "nothing stays behind"


def test_check_target_other_users_folder_raises(open_folder):
    (open_folder / "theirs").mkdir(mode=0o755)
    with as_unprivileged_user():
        check_folder_target(open_folder / "mine")
        with pytest.raises(InputError, match="belongs to another user"):
            check_folder_target(open_folder / "theirs")
        with pytest.raises(InputError, match="cannot be written"):
            check_folder_target(open_folder / "theirs" / "new")
        with pytest.raises(InputError, match="cannot be written"):
            check_file_target(open_folder / "theirs" / "plan.json")
    (open_folder / "theirs").chmod(0o777)
    with as_unprivileged_user(), pytest.raises(InputError, match="belongs to another user"):
        check_folder_target(open_folder / "theirs")  # the parent is sticky: it can't be replaced


@pytest.fixture
def started_work(monkeypatch) -> list:
    """Replace ``profile``, ``run`` and ``plan`` of Session; return a list of those called."""
    calls = []
    monkeypatch.setattr(Session, "profile", lambda *a, **k: calls.append("profile"))
    monkeypatch.setattr(Session, "run", lambda *a, **k: calls.append("run"))
    monkeypatch.setattr(Session, "plan", lambda *a, **k: calls.append("plan"))
    return calls


@pytest.mark.parametrize("kind", ["file", "full", "in a file", "proc", "long", "empty name"])
def test_cli_run_invalid_save_target_fails_early(tmp_path, capsys, started_work, kind):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    target = {
        "file": tmp_path / "file",
        "full": tmp_path / "full",
        "in a file": tmp_path / "file" / "new",
        "proc": "/proc/x",
        "long": tmp_path / ("x" * 300),
        "empty name": "",
    }[kind]
    command = ["run", "--model", "demo", "--method", "mxq", "--budget", "3.2bpp"]
    assert program.main([*command, "--save", str(target)]) == 2
    assert started_work == []
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


LONG = "x" * 300


@pytest.mark.parametrize("out", ["", "/proc/x.json", "{tmp}", "{tmp}/no/x.json", f"{{tmp}}/{LONG}"])
def test_cli_plan_invalid_out_file_fails_early(tmp_path, capsys, started_work, out):
    command = ["plan", "--model", "demo", "--method", "mxq", "--budget", "3.2bpp"]
    assert program.main([*command, "--out", out.format(tmp=tmp_path)]) == 2
    assert started_work == []
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("out", ["", "/proc/x.csv", "{tmp}/no/x.csv", f"{{tmp}}/{LONG}.csv"])
def test_cli_export_invalid_out_file_exit_2(tmp_path, capsys, out):
    assert program.main(["export", "--out", out.format(tmp=tmp_path)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
