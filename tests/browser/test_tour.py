"""The guided tour from the first page, in a real browser."""

from __future__ import annotations

from pathlib import Path

import pytest

from lsq_core.shipped import import_measurements
from lsq_core.store.store import Store
from tests.browser.conftest import User, serve
from tests.test_shipped import measured  # noqa: F401

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def shipped_server(measured, tmp_path_factory):  # noqa: F811
    """The app on a database with only shipped measurements of the demo model."""
    folder = tmp_path_factory.mktemp("tour")
    import_measurements(Store(Path(folder / "lsq.duckdb")), measured / "files")
    with serve("app.py", folder) as running:
        yield running


def test_tour_through_all_steps(shipped_server, chromium):
    user = User(chromium, shipped_server)
    user.open("/")
    user.wait_for_headline("Where should the bits go?", 60)
    buttons = "[class*='st-key-tour-'] button"
    user.first(buttons)
    steps = len(user.all(buttons))
    assert steps >= 2
    for number in range(1, steps + 1):
        user.open("/")
        user.wait_for_headline("Where should the bits go?", 60)
        user.click_on(f".st-key-tour-{number} button")
        user.wait(lambda: "Where should" not in (user.first_line or "Where should"))
        assert not user.all("[data-testid=stException]")
        assert not user.all("[data-testid=stAlertContentError]")
