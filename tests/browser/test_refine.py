"""Refine a plan in a real browser."""

from __future__ import annotations

import pytest

from lsq_core.model.source import ModelSource
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.session import Session
from lsq_core.store.store import Store
from tests.browser.conftest import serve

pytestmark = pytest.mark.browser


@pytest.fixture
def server(tmp_path):
    """The app on a database with a profile of the demo model."""
    store = Store(tmp_path / "lsq.duckdb")
    Session(ModelSource("demo"), store, "cpu").profile(ProfileSettings("rtn", samples=4))
    with serve("app.py", tmp_path) as running:
        yield running


def test_popover_makes_room_for_the_progress_of_the_search(user):
    user.open("/Plan?model=demo&method=mxq&budget=3.25")
    user.wait_for_headline("bits:", 60)
    user.click("Refine")
    user.click("Refine by measuring")
    user.wait(lambda: user.all(".st-key-plan-refine"), 60)
    user.wait(lambda: not user.all("[data-testid=stPopoverBody]"))
    user.click("Refine")  # it can be opened again
    assert user.attribute("[aria-label^='Start no new round']", "value")
