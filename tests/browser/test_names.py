"""Hostile names in a real browser: pages show them and make no requests to other hosts."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import quote

import pytest

from tests.browser.conftest import Server, User, serve
from tests.campaigns.hostile_pages import PAGES, canary, insert_names, names, page_faults
from tests.test_app import _populate

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[tuple[str, list]]:
    """An address that nothing may connect to, and the connections made to it."""
    with canary() as watched:
        yield watched


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, elsewhere) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("hostile")
    _populate(folder)
    with serve("app.py", folder) as running:
        insert_names(running.store, folder, names(elsewhere[0]))
        yield running


@pytest.mark.parametrize("page", PAGES)
def test_listed_hostile_names_cause_no_links_or_requests(user: User, page, elsewhere):
    model = str(user.server.database.parent / "model")
    user.open(f"{page}?model={quote(model)}")
    assert list(page_faults(user, elsewhere[1])) == []


def test_hostile_model_names_cause_no_links_or_requests(user: User, elsewhere):
    address, requests = elsewhere
    for name in names(address):
        user.open(f"/?model={quote(name)}")
        assert list(page_faults(user, requests)) == [], name
        if name.startswith("![x]"):
            assert "![x](" in user.body, "the name is there, as it is written"
