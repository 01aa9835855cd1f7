"""Hostile names in a real browser: pages show them, and ask no other host for anything."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Iterator
from urllib.parse import quote

import pytest

from tests.browser.conftest import Person, Server, serve
from tests.test_app import _fill
from tests.test_names import make_hostile

pytestmark = pytest.mark.browser

PAGES = ["/", "/Explore", "/Plan", "/Run", "/Compare", "/SQL"]
#: Addresses that the page has as a link, an image or the like, or has asked for.
_ADDRESSES = """
const own = [...document.querySelectorAll('[src], [href]')].map(e => e.src || e.href);
const drawn = [...document.querySelectorAll('svg a')].map(e => e.getAttribute('xlink:href') || '');
return [...own, ...drawn, ...performance.getEntriesByType('resource').map(e => e.name)]
    .filter(address => typeof address === 'string' && address.includes('//'));
"""


@pytest.fixture(scope="module")
def canary() -> Iterator[tuple[int, list]]:
    """A port on this machine, and each connection that was made to it."""
    seen: list = []

    class Seen(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            seen.append(self.request.recv(200))

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Seen) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield listening.server_address[1], seen
        listening.shutdown()


@pytest.fixture(scope="module")
def hostile(canary) -> str:
    at = f"http://127.0.0.1:{canary[0]}"
    return (
        f"![x]({at}/x.png) [y]({at}/y) <img src='{at}/z'> <a href='{at}/w'>w</a> "
        f"<span style='cursor:url({at}/c)'>s</span> {at}/bare"
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, hostile: str) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("hostile")
    _fill(folder)
    with serve("app.py", folder) as started:
        make_hostile(started.store, folder, hostile)
        yield started


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("model", ["known", "hostile"])
def test_hostile_names_fetch_and_link_nothing(person: Person, page, model, canary, hostile):
    folder = person.server.database.parent
    name = str(folder / "model") if model == "known" else hostile
    person.open(f"{page}?model={quote(name)}")
    person.wait(lambda: person.first_line and person.settled(), 90)
    body = person.driver.find_element("tag name", "body").text
    if model == "hostile" and page not in ("/Run", "/SQL", "/Compare"):
        assert "![x](" in body, "the name is there, as it is written"
    addresses = person.driver.execute_script(_ADDRESSES)
    assert len(addresses) > 3
    assert [a for a in addresses if not a.startswith((person.server.url, "data:", "blob:"))] == []
    assert canary[1] == []
