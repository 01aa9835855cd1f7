"""Hostile names in a real browser: pages show them, and ask no other host for anything."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import quote

import pytest

from tests.browser.conftest import Person, Server, serve
from tests.campaigns.hostile_pages import PAGES, canary, faults_of_page, give_names, names
from tests.test_app import _fill

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[tuple[str, list]]:
    """An address that nothing may ask, and each connection that was made to it."""
    with canary() as watched:
        yield watched


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, elsewhere) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("hostile")
    _fill(folder)
    with serve("app.py", folder) as started:
        give_names(started.store, folder, names(elsewhere[0]))
        yield started


@pytest.mark.parametrize("page", PAGES)
def test_a_page_that_lists_hostile_names_fetches_and_links_nothing(person: Person, page, elsewhere):
    model = str(person.server.database.parent / "model")
    person.open(f"{page}?model={quote(model)}")
    assert list(faults_of_page(person, elsewhere[1])) == []


def test_a_model_of_a_hostile_name_fetches_and_links_nothing(person: Person, elsewhere):
    at, seen = elsewhere
    for name in names(at):
        person.open(f"/?model={quote(name)}")
        assert list(faults_of_page(person, seen)) == [], name
        if name.startswith("![x]"):
            body = person.driver.find_element("tag name", "body").text
            assert "![x](" in body, "the name is there, as it is written"
