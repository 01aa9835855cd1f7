"""Hostile names in a real browser: pages show them, and ask no other host for anything."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Iterator
from urllib.parse import quote

import pytest

from tests.browser.conftest import Server, User, serve
from tests.test_app import _populate
from tests.test_names import insert_hostile_names

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
    received: list = []

    class Recorder(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            received.append(self.request.recv(200))

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Recorder) as listener:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        yield listener.server_address[1], received
        listener.shutdown()


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
    _populate(folder)
    with serve("app.py", folder) as running:
        insert_hostile_names(running.store, folder, hostile)
        yield running


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("model", ["known", "hostile"])
def test_hostile_names_cause_no_links_or_requests(user: User, page, model, canary, hostile):
    folder = user.server.database.parent
    name = str(folder / "model") if model == "known" else hostile
    user.open(f"{page}?model={quote(name)}")
    user.wait(lambda: user.first_line and user.is_idle(), 90)
    body = user.driver.find_element("tag name", "body").text
    if model == "hostile" and page not in ("/Run", "/SQL", "/Compare"):
        assert "![x](" in body, "the name is there, as it is written"
    addresses = user.driver.execute_script(_ADDRESSES)
    assert len(addresses) > 3
    assert [a for a in addresses if not a.startswith((user.server.url, "data:", "blob:"))] == []
    assert canary[1] == []
