"""The library, an audit and every page work without importing torch, which takes seconds.

A subprocess runs these steps in turn and reports after each one which heavy packages it has loaded;
the test process has loaded them already.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from tests.conftest import REFERENCE, ROOT
from tests.test_app import PAGES, filled_once  # noqa: F401 - a fixture
from tests.test_audit import make_run
from tests.test_published_pages import SEVEN

_SCRIPT = """
import json, os, sys

def pages(database, model):
    from streamlit.testing.v1 import AppTest
    os.environ["LSQ_DB"] = database
    app = AppTest.from_file("app.py", default_timeout=60)
    app.query_params["model"] = model
    for page in PAGES:
        if page: app.switch_page(page)
        app.run()
        assert not app.exception and app.title, page

PAGES, steps = json.load(sys.stdin)
heavy = {"torch", "transformers", "datasets", "streamlit"}
for name, code in steps:
    before = heavy & set(sys.modules)
    exec(code, {"pages": pages})
    print("loaded", name, *sorted((heavy & set(sys.modules)) - before), flush=True)
"""
_LIBRARY = (
    "session",
    "planning.make",
    "store.store",
    "jobs",
    "cli",
    "profiling.profile",
    "disk",
    "corpus.registry",
    "bench",
)
#: Heavy packages that each step may load; pages need Streamlit.
ALLOWED_PACKAGES = {
    "library": set(),
    "audit": set(),
    "fresh": {"streamlit"},
    "known": {"streamlit"},
    "published": {"streamlit"},
}


@pytest.fixture(scope="module")
def loaded_packages(filled_once, random_model, request, tmp_path_factory) -> dict[str, set[str]]:  # noqa: F811
    """Heavy packages loaded by each step."""
    folder = tmp_path_factory.mktemp("without-torch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LSQ_DB", str(folder / "audited.duckdb"))
        text = folder / "text.txt"
        text.write_text("\n".join(f"Return the {i}-th item." for i in range(200)), "utf8")
        make_run(random_model("llama-gqa"), text, folder / "saved")
    audit = (
        "from pathlib import Path; from lsq_core.store.store import Store\n"
        "from lsq_core.results.audit import audit_folder\n"
        f"found = audit_folder(Path({str(folder / 'saved')!r}), "
        f"Store(Path({str(folder / 'audited.duckdb')!r})))\n"
        "assert not found.mismatches and len(found.lines) == 14, found.verdict\n"
    )
    steps = {
        "library": f"import lsq_core.{', lsq_core.'.join(_LIBRARY)}",
        "audit": audit,
        "fresh": f"pages({str(folder / 'fresh.duckdb')!r}, 'demo')",
        "known": f"pages({shutil.copy(filled_once.path, folder)!r}, {filled_once.model!r})",
    }
    if REFERENCE.is_dir():
        steps["published"] = f"pages({str(request.getfixturevalue('published'))!r}, {SEVEN!r})"
    completed = subprocess.run(
        [sys.executable, "-c", _SCRIPT],
        input=json.dumps([list(PAGES.values()), list(steps.items())]),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    lines = (line.split() for line in completed.stdout.splitlines() if line.startswith("loaded "))
    return {name: set(packages) for _, name, *packages in lines}


@pytest.mark.parametrize("step", ALLOWED_PACKAGES)
def test_step_loads_no_heavy_packages(loaded_packages, step):
    if step == "published" and not REFERENCE.is_dir():
        pytest.skip(f"the published measurements are not at {REFERENCE}")
    assert loaded_packages[step] <= ALLOWED_PACKAGES[step]
