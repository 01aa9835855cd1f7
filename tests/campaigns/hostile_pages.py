"""Show hostile names on every page in a real Chromium and count requests and scripts run.

``python -m tests.campaigns.hostile_pages`` gives 26 names to models, runs, plans, methods, corpora
and jobs, all at once, opens every page with a known model, and then opens pages for a model of each
name. Pages must not link to or request anything from other hosts, run a script from a name, open a
dialog or show a traceback.
"""

from __future__ import annotations

import socketserver
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from lsq_core.jsontext import write_json
from lsq_core.store.store import Store
from tests.campaigns.harness import Tally, print_table

PAGES = ("/", "/Explore", "/Plan", "/Run", "/Compare", "/SQL")
#: Pages that show the name of the model in their address.
OF_A_MODEL = ("/", "/Explore", "/Plan")
#: Script in the names; it leaves this mark if it is run.
_MARK = "window.hostile=1"
#: Returns all addresses that the page links to, embeds or has requested.
_ADDRESSES = """
const own = [...document.querySelectorAll('[src], [href]')].map(e => e.src || e.href);
const drawn = [...document.querySelectorAll('svg a')].map(e => e.getAttribute('xlink:href') || '');
return [...own, ...drawn, ...performance.getEntriesByType('resource').map(e => e.name)]
    .filter(address => typeof address === 'string' && /^\\w+:/.test(address));
"""


def names(at: str) -> list[str]:
    """Return 26 names that refer to the address ``at`` or contain a script."""
    run = _MARK
    return [
        f"![x]({at}/1.png)",
        f"[y]({at}/2)",
        f"<img src='{at}/3'>",
        f"<a href='{at}/4'>w</a>",
        f"<span style='cursor:url({at}/5)'>s</span>",
        f"{at}/6",
        f"<{at}/7>",
        f"[a]: {at}/8\n\n![b][a]",
        f"<script>{run}</script>",
        f"<img src=x onerror={run}>",
        f"<svg onload={run}><a xlink:href='{at}/9'>a</a></svg>",
        f"[z](javascript:{run})",
        f"<iframe src='{at}/10'></iframe>",
        f"<style>@import '{at}/11';</style>",
        f"<link rel=stylesheet href='{at}/12'>",
        f"<meta http-equiv=refresh content='0;url={at}/13'>",
        f"<form action='{at}/14'><button autofocus onfocus={run}>b</button></form>",
        f"`` ` ![x]({at}/15.png) ` ``",
        f"\\![x]({at}/16.png) \\\\[y]({at}/17)",
        f"$\\href{{{at}/18}}{{x}}$ $\\includegraphics{{{at}/19}}$",
        f":material/{at}: :red[![x]({at}/20)] :link:",
        f"|a|\n|-|\n|![x]({at}/21.png)|",
        f"&lt;img src=x onerror={run}&gt; &#60;img src='{at}/22'&#62;",
        f"\u202e![x]({at}/23)\u2066\x1b]8;;{at}/24\x07",
        f"'\"><video poster='{at}/25' src='{at}/26'>{{{{{run}}}}}",
        '=HYPERLINK("{}")  \n# h\n- [ ] {{x}} {}'.format(f"{at}/27", "*" * 200),
    ]


@contextmanager
def canary() -> Iterator[tuple[str, list]]:
    """Listen on a local address that isn't the app's; yield it and the connections made to it."""
    seen: list = []

    class Seen(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            seen.append(self.request.recv(200))

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Seen) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_address[1]}", seen
        listening.shutdown()


def insert_names(store: Store, folder: Path, texts: Sequence[str]) -> None:
    """Give everything in a store that has a name one of ``texts``, using each of them."""
    with store.transaction() as connection:
        runs = [id for (id,) in connection.execute("SELECT id FROM runs ORDER BY id").fetchall()]
        for number, id in enumerate(runs):
            text, method = texts[number % len(texts)], texts[-1 - number % len(texts)]
            connection.execute("UPDATE runs SET note = $1 WHERE id = $2", [text, id])
            connection.execute("UPDATE evaluations SET corpus = $1 WHERE run = $2", [text, id])
            if number:
                connection.execute("UPDATE runs SET method = $1 WHERE id = $2", [method, id])
        for number, text in enumerate(texts):
            connection.execute(
                "INSERT INTO models BY NAME SELECT * REPLACE ($1 AS source, $2 AS fingerprint) "
                "FROM models LIMIT 1",
                [text, f"f{number}"],
            )
            connection.execute(
                "INSERT INTO plans BY NAME SELECT * REPLACE ($2 AS id, $1 AS name) "
                "FROM plans LIMIT 1",
                [text, f"p{number}"],
            )
    for number, text in enumerate(texts):
        _give_job(folder / "jobs" / f"202601{number + 1:02}-000000-0000", text)


def _give_job(home: Path, text: str) -> None:
    state = ("failed", "cancelled", "interrupted")[len(text) % 3]
    home.mkdir(parents=True)
    arguments = ["run", "--model", text, "--method", text, "--corpus", text]
    write_json(home / "job.json", {"id": home.name, "arguments": arguments, "created": 1.7e9})
    progress = {"state": state, "message": text, "stage": "store", "done": 1, "total": 2}
    write_json(home / "progress.json", progress | {"seconds": 2.0, "memory": 1, "eta": None})
    (home / "log.txt").write_text(text, "utf8")


def page_faults(user: object, seen: list) -> Iterator[str]:
    """Yield the faults of the page that is open."""
    from selenium.common.exceptions import NoAlertPresentException

    with suppress(NoAlertPresentException):
        user.driver.switch_to.alert.dismiss()
        yield "fetch: a dialog was opened"
    user.wait(lambda: user.first_line and user.is_idle(), 120)
    own = (user.server.url, "data:", "blob:", "about:")
    addresses = user.driver.execute_script(_ADDRESSES)
    if not addresses:
        yield "the page is empty"
    yield from (f"fetch: {a[:80]}" for a in addresses if not a.startswith(own))
    if not user.driver.current_url.startswith(user.server.url):
        yield f"fetch: the page went to {user.driver.current_url[:80]}"
    if user.driver.execute_script("return window.hostile"):
        yield "fetch: a script of a name ran"
    while seen:
        yield f"fetch: {seen.pop()[:80]!r}"
    if user.all("[data-testid=stException]"):
        yield f"traceback {user.all('[data-testid=stException]')[0].text[:200]}"


def open_pages(
    user: object, seen: list, model: str, texts: Sequence[str], log: Callable[[str], None]
) -> Tally:
    """Open every page with a known model, and some with a model of each name; return the row."""
    tally = Tally("pages with hostile names")
    addresses = [f"{page}?model={quote(model)}" for page in PAGES]
    addresses += [f"{page}?model={quote(text)}" for text in texts for page in OF_A_MODEL]
    for address in addresses:
        user.open(address)
        wrong = list(page_faults(user, seen))
        log(f"{address[:120]}: {'; '.join(wrong) or 'nothing fetched or run'}")
        tally.n += 1
        for fault in wrong:
            tally.add(fault, address[:120])
    return tally


def main() -> int:
    """Run the campaign in a temporary folder with its own Chromium and server."""
    from tests.browser.conftest import User, open_browser, serve
    from tests.test_app import _populate

    with tempfile.TemporaryDirectory() as name, canary() as (at, seen):
        folder, texts = Path(name), names(at)
        _populate(folder)
        with serve("app.py", folder) as server, open_browser(folder / "chromium") as driver:
            insert_names(server.store, folder, texts)
            user = User(driver, server)
            model = str(folder / "model")
            tally = open_pages(user, seen, model, texts, lambda line: print(line, flush=True))
    return print_table(tally)


if __name__ == "__main__":
    sys.exit(main())
