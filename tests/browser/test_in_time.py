"""How soon pages are there: the first one of a fresh server, and any among many runs."""

from __future__ import annotations

import time

import pytest

from lsq_core.store.store import Store
from tests.browser.conftest import Person, new_tab, serve
from tests.test_compare import fill

pytestmark = [pytest.mark.browser, pytest.mark.bench]

#: Pages by their link, and what their first line has in it when there are runs of the demo model.
PAGES = {
    "Model": "5.6 M parameters",
    "Explore": "has not been profiled",
    "Plan": "bits:",
    "Run": "Nothing is running.",
    "Compare": "Best within",
    "Query": "found",
}
FRESH = {
    "/": "5.6 M parameters, 10.8 MiB; at 4.25 bits 3.6 MiB.",
    "/Explore": "demo has not been profiled",
    "/Plan": "3.25 bits: 1.99 MiB planned",
    "/Run": "Nothing has run yet.",
    "/Compare": "There is nothing to compare yet.",
    "/SQL": "row",
}
#: Beside other tests, on few cores, everything may take so many times as long as for a person.
_BESIDE_TESTS = 3
METHODS = ("uniform", "sensiboost", "kurtboost", "mxq")


@pytest.mark.parametrize("address", FRESH)
def test_a_first_deep_link(server, chromium, address):
    """First paint within 3 s, and the first line is the page's own; the server is fresh for the
    first address, and every page has its first visit."""
    with new_tab(chromium):
        person = Person(chromium, server)
        begin = time.monotonic()
        person.open(address)
        painted = person.wait(
            lambda: (
                person.driver.execute_script(
                    "return performance.getEntriesByName('first-contentful-paint').length"
                )
                and time.monotonic() - begin
            ),
            60,
        )
        assert FRESH[address] in person.reads(FRESH[address], 60)
        whole = time.monotonic() - begin
        print(f"{address}: first paint {painted:.2f} s, first line {whole:.2f} s")
        assert painted < 3 * _BESIDE_TESTS
        assert whole < 6 * _BESIDE_TESTS


@pytest.mark.slow
def test_pages_among_many_runs(chromium, tmp_path):
    """Fills a store twice: a switch takes at most 1 s with 500 runs, Compare 2 s with 5,000."""
    store = Store(tmp_path / "lsq.duckdb")
    fill(store, 500, METHODS)
    with serve("app.py", tmp_path) as server, new_tab(chromium):
        person = Person(chromium, server)
        person.open("/?model=demo")
        person.reads(PAGES["Model"], 90)
        for _ in range(2):  # a process imports what a page needs at its first visit
            times = {name: switch(person, name) for name in reversed(PAGES)}
            print(", ".join(f"{name} {took:.2f} s" for name, took in times.items()))
        assert max(times.values()) < 1 * _BESIDE_TESTS
        fill(store, 5000, METHODS, first=500)
        many = [switch(person, name) for name in ("Compare", "Model", "Compare")]
        print(f"Compare with 5,000 runs: {many[0]:.2f} s at first, {many[2]:.2f} s again")
        drawn = sum(len(line["customdata"] or []) for line in person.charts()[0])
        assert drawn == len(store.results()) == 5000
        assert max(many) < 2 * _BESIDE_TESTS, "at first and again"


def switch(person: Person, page: str) -> float:
    """Seconds from the click on a page's link to its first line and, on Compare, its chart."""
    begin = time.monotonic()
    person.go(page)
    person.reads(PAGES[page], 60)
    if page == "Compare":
        drawn = "return document.querySelector('.js-plotly-plot .scatterlayer .point') !== null"
        person.wait(lambda: person.driver.execute_script(drawn))
    return time.monotonic() - begin
