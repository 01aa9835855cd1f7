"""Comparing in a real browser: a click opens a run, tables are taken along, many runs are fast."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pandas as pd
import pytest

from lsq_core.reference import import_reference
from lsq_core.store import Store
from tests.browser.conftest import Person, Server, open_browser, serve
from tests.conftest import REFERENCE
from tests.test_compare import fill
from tests.test_plan import needs_reference

pytestmark = pytest.mark.browser

PLOT = ".js-plotly-plot"


@pytest.fixture
def someone(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Person]:
    """A person before a fresh server with as many runs as the test asks for."""
    count = getattr(request, "param", 24)
    methods = ("uniform", "sensiboost", "kurtboost", "mxq") if count > 100 else ("uniform", "mxq")
    fill(Store(tmp_path / "lsq.duckdb"), count, methods)
    with serve("app.py", tmp_path) as server, open_browser(tmp_path / "chromium") as driver:
        yield Person(driver, server)


def stored(person: Person) -> pd.DataFrame:
    return Store(person.server.database).results().set_index("run")


def opened(person: Person) -> str:
    """Which run's card is shown, by the second it was kept in."""
    boxes = person.all("[data-testid=stSelectbox]")
    (box,) = [b for b in boxes if b.text.startswith("Open run")]
    shown = box.find_element("css selector", "input").get_attribute("value") or box.text
    seconds = shown.strip().split(":")[-1]
    return f"{int(seconds):012x}"


def zoomed(person: Person) -> list[float]:
    script = "return document.querySelector('.js-plotly-plot')._fullLayout.xaxis.range"
    return person.driver.execute_script(script)


def test_a_click_opens_a_run_and_the_zoom_stays(someone):
    from selenium.webdriver.common.action_chains import ActionChains

    someone.open("/Compare?model=demo")
    someone.reads("Best within", 60)
    someone.wait(lambda: someone.all(".js-plotly-plot .scatterlayer .point"))
    before = opened(someone)
    assert before == stored(someone)["perplexity"].idxmin()
    someone.driver.find_element("css selector", f"{PLOT} [data-title='Zoom out']").click()
    someone.wait(lambda: zoomed(someone)[0] < 0, why="the chart did not zoom")
    range_before = zoomed(someone)
    ActionChains(someone.driver).move_to_element(in_view(someone)).pause(0.3).click().perform()
    someone.wait(lambda: someone.settled() and opened(someone) != before, 15, "nothing was opened")
    row = stored(someone).loc[opened(someone)]
    assert f"perplexity {row['perplexity']:.4f}, KL" in someone.driver.page_source
    assert zoomed(someone) == pytest.approx(range_before), "a pick redraws nothing"


def in_view(person: Person) -> object:
    """A marker in the middle of what the zoomed chart shows."""
    frame = person.driver.find_element("css selector", ".js-plotly-plot .nsewdrag").rect

    def off(point: object) -> float:
        x, y = (point.rect[a] + point.rect[s] / 2 for a, s in (("x", "width"), ("y", "height")))
        return abs(x - frame["x"] - frame["width"] / 2) + abs(y - frame["y"] - frame["height"] / 2)

    return min(person.all(".js-plotly-plot .scatterlayer .point"), key=off)


def test_the_table_is_downloaded_as_it_is(someone, tmp_path):
    folder = tmp_path / "downloads"
    folder.mkdir()
    someone.driver.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)}
    )
    someone.open("/Compare?model=demo")
    someone.reads("Best within", 60)
    for kind in ("CSV", "Parquet"):
        someone.click(kind)
        pattern = f"*.{kind.lower()}"
        path = someone.wait(lambda pattern=pattern: next(folder.glob(pattern), None))
        rows = duckdb.sql(f"SELECT * FROM '{path}'").df().set_index("run id")
        kept = stored(someone)
        assert set(rows.index) == set(kept.index)
        assert rows["perplexity"].to_dict() == pytest.approx(kept["perplexity"].to_dict())


def test_deleting_and_undoing(someone):
    someone.open("/Compare?model=demo")
    someone.reads("Best within", 60)
    best = stored(someone)["perplexity"].idxmin()
    someone.click("Delete")
    someone.wait(lambda: "1 run of demo deleted" in page(someone) and someone.settled())
    assert best not in stored(someone).index
    assert opened(someone) == stored(someone)["perplexity"].idxmin()
    someone.driver.refresh()
    someone.reads("Best within", 60)
    someone.click("Undo")
    someone.wait(lambda: "deleted" not in page(someone) and someone.settled())
    assert best in stored(someone).index


def page(person: Person) -> str:
    return person.driver.find_element("css selector", "[data-testid=stMain]").text


@pytest.mark.parametrize("view", ["size", "bits", "two"])
@pytest.mark.parametrize("width", [1440, 1024])
def test_every_view_fits_its_window(someone, view, width):
    fits(someone, "demo", view, width)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on the published runs, which win, lose and can be predicted."""
    folder = tmp_path_factory.mktemp("published")
    import_reference(REFERENCE, Store(folder / "lsq.duckdb"))
    with serve("app.py", folder) as server:
        yield server


@needs_reference
@pytest.mark.parametrize("view", ["wins", "predicted"])
@pytest.mark.parametrize("width", [1440, 1024])
def test_views_of_many_methods_fit_their_window(published, tmp_path, view, width):
    with open_browser(tmp_path / "chromium") as driver:
        fits(Person(driver, published), "published:Llama-2-7b-hf", view, width)


def fits(person: Person, model: str, view: str, width: int) -> None:
    """The view draws something, and nothing of it lies beyond the window."""
    person.driver.set_window_size(width, 900)
    person.open(f"/Compare?model={model}&view={view}")
    person.reads("Best within", 60)
    person.wait(lambda: person.all(PLOT), why="the view draws nothing")
    person.wait(person.settled)
    ask = person.driver.execute_script
    wide = "return document.querySelector('[data-testid=stMain]').scrollWidth"
    seen = "return document.querySelector('[data-testid=stMain]').clientWidth"
    person.wait(lambda: ask(wide) <= ask(seen), 10, "wider than its window")
    assert ask("return document.querySelector('.js-plotly-plot').data.length") > 0


def test_a_question_is_answered(someone):
    someone.open("/SQL?model=demo")
    someone.reads("1 row found", 60)
    someone.click("What there is")
    store = Store(someone.server.database)
    tables = store.query("SELECT count(*) AS n FROM duckdb_columns() WHERE NOT internal")["n"][0]
    view = len(store.results().columns)
    assert someone.reads("rows found") == f"{tables + view} rows found."


@pytest.mark.slow
@pytest.mark.parametrize("someone", [5000], indirect=True)
def test_5000_runs_are_there_in_time(someone):
    """Fills a store with 5,000 runs first. A page may take 2 s; beside other tests 3 times that."""
    someone.open("/?model=demo")
    someone.reads("parameters", 90)
    begin = time.monotonic()
    someone.go("Compare")
    someone.reads("Best within", 60)
    someone.wait(lambda: someone.all(".js-plotly-plot"))
    first = time.monotonic() - begin
    someone.go("Model")
    someone.reads("parameters", 30)
    begin = time.monotonic()
    someone.go("Compare")
    someone.reads("Best within", 60)
    someone.wait(lambda: someone.all(".js-plotly-plot"))
    again = time.monotonic() - begin
    print(f"Compare with 5,000 runs: {first:.2f} s at first, {again:.2f} s again")
    assert first < 6
    assert again < 6
