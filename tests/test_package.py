"""The installed package: what a wheel contains, and that it runs from any folder."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from email.parser import Parser
from pathlib import Path

import pytest

import lsq_core
from lsq_core import paths
from lsq_core.errors import InputError
from lsq_core.store.connection import database_path
from tests.conftest import ROOT

#: All files used by a build, and the tests, which must not be included in it.
SOURCES = [
    *("pyproject.toml", "setup.py", "MANIFEST.in", "requirements.txt", "README.md", "LICENSE"),
    *("app.py", "pages", ".streamlit", "data/demo_model", "data/measured", "lsq_core", "tests"),
]
#: Environment variables that may be set on the machine that runs the tests.
OWN = ("LSQ_DB", "LSQ_HOME", "XDG_DATA_HOME", "PYTHONPATH")


def _build(command: str, source: Path, out: Path) -> None:
    """Build with the project's own backend and the installed setuptools."""
    code = f"import sys; from setuptools import build_meta; build_meta.{command}(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def checkout(shared_folder: Callable) -> Path:
    """A copy of the repository, with a file left by an earlier build."""

    def fill(folder: Path) -> None:
        skip = shutil.ignore_patterns("__pycache__", "training", "*.pyc")
        for name in SOURCES:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, target, ignore=skip)
            else:
                shutil.copy(ROOT / name, target)
        stale = folder / "build" / "lib" / "lsq_core" / "removed_since.py"
        stale.parent.mkdir(parents=True)
        stale.touch()

    return shared_folder("checkout", fill)


@pytest.fixture(scope="module")
def wheel(shared_folder: Callable, checkout: Path) -> Path:
    """The wheel that ``pip install .`` builds."""
    folder = shared_folder("wheel", lambda folder: _build("build_wheel", checkout, folder))
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(shared_folder: Callable, wheel: Path) -> Path:
    """A folder with the wheel's files, like site-packages."""
    return shared_folder("installed", lambda folder: zipfile.ZipFile(wheel).extractall(folder))


def _environment(package: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in OWN}
    return kept | {"PYTHONPATH": str(package)} | more


def lsq(package: Path, cwd: Path, *arguments: str, **more: str) -> dict:
    """Run a command of a package in a folder, and return the JSON it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "lsq_core", *arguments, "--json"],
        cwd=cwd,
        env=_environment(package, **more),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


# --- wheel contents -------------------------------------------------------------------------


def test_wheel_contains_every_file_needed_at_run_time(wheel):
    names = _names(wheel)
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "lsq_core").rglob("*.py")}
    assets = {
        str(p.relative_to(ROOT))
        for p in (ROOT / "lsq_core").rglob("*")
        if p.is_file() and p.suffix not in (".py", ".pyc")
    }
    beside = {"app.py", ".streamlit/config.toml"}
    beside |= {str(p.relative_to(ROOT)) for p in (ROOT / "pages").glob("*.py")}
    demo = ("config.json", "description.json", "model.safetensors", "tokenizer.json", "README.md")
    beside |= {f"data/demo_model/{name}" for name in demo}
    measured = {str(p.relative_to(ROOT)) for p in (ROOT / "data" / "measured").glob("*.parquet")}
    assert measured
    beside |= measured
    assert len(modules) > 50
    assert {Path(name).suffix for name in assets} >= {".js", ".css", ".html", ".json", ".txt"}
    assert modules | assets | {f"lsq_core/bundled/{name}" for name in beside} <= names


def test_wheel_contains_nothing_else(wheel):
    packages = {name.partition("/")[0] for name in _names(wheel)}
    assert packages == {"lsq_core", f"lsq_explorer-{lsq_core.__version__}.dist-info"}
    assert not [name for name in _names(wheel) if "test" in name or name.endswith("train.py")]
    assert "lsq_core/removed_since.py" not in _names(wheel), "left by an earlier build"


def test_wheel_metadata(wheel):
    info = f"lsq_explorer-{lsq_core.__version__}.dist-info"
    archive = zipfile.ZipFile(wheel)
    metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode("utf8"))
    assert metadata["Version"] == lsq_core.__version__
    lines = (ROOT / "requirements.txt").read_text("utf8").splitlines()
    pins = {line.partition("#")[0].strip() for line in lines} - {""}
    needed = {need for need in metadata.get_all("Requires-Dist") if "extra ==" not in need}
    assert needed == pins
    assert "lsq = lsq_core.__main__:run" in archive.read(f"{info}/entry_points.txt").decode("utf8")


def test_source_distribution_builds_the_same_wheel(checkout, wheel, tmp_path):
    _build("build_sdist", checkout, tmp_path)
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path, filter="data")
    _build("build_wheel", tmp_path / archive.name.removesuffix(".tar.gz"), tmp_path)
    (again,) = tmp_path.glob("*.whl")
    assert _names(again) == _names(wheel)


def test_build_without_demo_model_fails(checkout, tmp_path):
    source = shutil.copytree(checkout, tmp_path / "source")
    (source / "data" / "demo_model" / "model.safetensors").unlink()
    with pytest.raises(AssertionError, match=r"safetensors is missing, so no wheel can be built"):
        _build("build_wheel", source, tmp_path)


# --- running it -----------------------------------------------------------------------------


def test_installed_commands_run_away_from_the_repository(installed, tmp_path):
    work, data = tmp_path / "work", tmp_path / "data"
    work.mkdir()
    found = lsq(installed, work, "inspect", "--model", "demo", XDG_DATA_HOME=str(data))
    assert (found["model"], found["layers"]) == ("demo", 24)
    plan = ("plan", "--model", "demo", "--method", "uniform", "--base", "3.13")
    assert lsq(installed, work, *plan, XDG_DATA_HOME=str(data))["method"] == "uniform"
    (database,) = [
        item
        for item in lsq(installed, work, "disk", XDG_DATA_HOME=str(data))["kept"]
        if item["kind"] == "database"
    ]
    assert Path(database["path"]) == data / "lsq-explorer" / "lsq.duckdb"
    assert Path(database["path"]).is_file()
    assert not list(work.iterdir())
    assert not (installed / "data").exists()


def test_installed_job_and_query_processes(installed, tmp_path):
    code = """if True:
        import time
        from pathlib import Path
        from lsq_core import disk, jobs
        from lsq_core.store import sql
        from lsq_core.store.store import Store
        store = Store()
        job = jobs.start(disk.jobs_folder(store), ["inspect", "--model", "demo", "--json"])
        while jobs.read(job.folder).active:
            time.sleep(0.1)
        print(jobs.read(job.folder).state, job.command)
        copy = Path("copy.duckdb").resolve()
        store.snapshot(copy)
        print(sql.run_query(copy, "SELECT count(*) FROM results").rows.iloc[0, 0])
        print(store.path)
        """
    environment = _environment(installed, LSQ_HOME="mine")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    database = tmp_path / "mine" / "lsq.duckdb"
    expected = f"done lsq inspect --model demo --json\n0\n{database}\n"
    assert done.stdout == expected, done.stderr


def test_installed_app(installed, tmp_path):
    """Every page runs, with the repository's Streamlit settings, from any working directory."""
    code = """if True:
        import json
        from streamlit import config
        from streamlit.testing.v1 import AppTest
        from lsq_core import paths, serve
        serve._application("127.0.0.1", serve.Access(("localhost",), "", 8501))
        shown = config.get_option("client.showSidebarNavigation")
        app = AppTest.from_file(str(paths.RESOURCES / "app.py"), default_timeout=60).run()
        titles = [app.title[0].value]
        for page in sorted((paths.RESOURCES / "pages").glob("*.py")):
            app.switch_page(f"pages/{page.name}").run()
            titles.append(app.title[0].value)
            assert not app.exception, app.exception
        print(json.dumps([shown, titles]))
        """
    environment = _environment(installed, LSQ_HOME=str(tmp_path / "mine"))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    shown, titles = json.loads(done.stdout)
    assert shown is False
    assert titles[0] == "Where should the bits go?"
    assert len(set(titles)) == 1 + len(list((ROOT / "pages").glob("*.py")))


def test_installed_server(installed, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "lsq_core", "app", "--port", str(port)],
        cwd=tmp_path,
        env=_environment(installed, LSQ_HOME="mine"),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        lines = iter(process.stderr.readline, "")  # the first ones report imports
        assert any(f"http://127.0.0.1:{port}/" in line for line in lines)
        assert _get(f"http://127.0.0.1:{port}/_stcore/health") == b"ok"
        assert b"<html" in _get(f"http://127.0.0.1:{port}/")
    finally:
        process.kill()
        process.wait()


def _get(url: str) -> bytes:
    """Return the response of a server, retrying for up to 60 s while it starts."""
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(url, timeout=20) as answer:
                return answer.read()
        except urllib.error.URLError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def test_editable_install_uses_the_checkout(checkout, tmp_path):
    _build("build_editable", checkout, tmp_path)
    (built,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(built).extractall(tmp_path / "site")
    code = """if True:
        import site, sys
        site.addsitedir(sys.argv[1])
        from importlib.util import find_spec
        from lsq_core import paths
        from lsq_core.model import source as model
        print(paths.data_folder(), model.DEMO_FOLDER, find_spec("tests"), sep="\\n")
        """
    done = subprocess.run(
        [sys.executable, "-P", "-S", "-c", code, str(tmp_path / "site")],
        cwd=tmp_path,
        env=_environment(Path()),
        capture_output=True,
        text=True,
    )
    data = checkout / "data"
    assert done.stdout.splitlines() == [str(data), str(data / "demo_model"), "None"], done.stderr


# --- data folder ----------------------------------------------------------------------------


def test_data_folder_in_a_checkout(monkeypatch):
    monkeypatch.delenv("LSQ_DB")
    monkeypatch.delenv("LSQ_HOME", raising=False)
    assert paths.IN_CHECKOUT
    assert database_path() == ROOT / "data" / "lsq.duckdb"


def test_lsq_home_decides_and_lsq_db_overrides_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.setenv("LSQ_DB", str(tmp_path / "other.duckdb"))
    monkeypatch.setenv("LSQ_HOME", "here")
    assert database_path() == tmp_path / "other.duckdb"
    monkeypatch.delenv("LSQ_DB")
    assert database_path() == tmp_path / "here" / "lsq.duckdb"
    monkeypatch.setenv("LSQ_HOME", "~/there")
    assert database_path() == tmp_path / "me" / "there" / "lsq.duckdb"
    monkeypatch.setenv("LSQ_HOME", "~nobody-of-this-name/there")
    with pytest.raises(InputError, match="no home directory; set LSQ_HOME"):
        database_path()


@pytest.mark.parametrize(
    ("platform", "xdg", "folder"),
    [
        ("linux", "", ".local/share/lsq-explorer"),
        ("linux", "relative", ".local/share/lsq-explorer"),
        ("linux", "{home}/xdg", "xdg/lsq-explorer"),
        ("darwin", "{home}/xdg", "Library/Application Support/lsq-explorer"),
    ],
)
def test_data_folder_installed(monkeypatch, tmp_path, platform, xdg, folder):
    monkeypatch.setattr(paths, "IN_CHECKOUT", False)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", xdg.format(home=tmp_path))
    monkeypatch.delenv("LSQ_HOME", raising=False)
    assert paths.data_folder() == tmp_path / folder
