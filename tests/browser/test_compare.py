"""Comparing in a real browser: what each view shows and each export holds is what SQL says."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

import duckdb
import pandas as pd
import pytest

from lsq_core.bits import LADDER
from lsq_core.results.export import bibtex
from tests.browser.conftest import Person, Server
from tests.test_plan import needs_reference

pytestmark = pytest.mark.browser

PLOT = ".js-plotly-plot"
PUBLISHED = "published:Llama-2-7b-hf"
#: All measured runs, by SQL of the test's own.
RUNS = """
SELECT e.id AS evaluation, r.id AS run, r.method, p.bits_per_param AS bits, r.measured_bytes,
       p.content ->> '$.base' AS base, e.perplexity, e.kl, e.created
FROM evaluations e JOIN runs r ON e.run = r.id JOIN plans p ON r.plan = p.id
WHERE r.origin = 'measured' AND r.deleted IS NULL
"""


@pytest.fixture(scope="module")
def server(stocked: Server) -> Server:
    return stocked


@pytest.fixture(autouse=True)
def tidy(server: Server) -> Iterator[None]:
    """What one test deletes or marks is as it was for the next."""
    yield
    with server.store.transaction() as connection:
        connection.execute("UPDATE runs SET deleted = NULL, starred = false, note = ''")


def stored(person: Person) -> pd.DataFrame:
    return person.server.store.query(RUNS).set_index("evaluation")


def look(person: Person, view: str, model: str = "demo") -> None:
    person.open(f"/Compare?model={model}&view={view}")
    person.reads("Best within", 60)


def points(figure: list[dict]) -> dict[str, tuple[float, float]]:
    """Where the marker of each evaluation is."""
    return {
        known[1]: (x, y)
        for line in figure
        if line["mode"] == "markers" and line["customdata"]
        for known, x, y in zip(line["customdata"], line["x"], line["y"], strict=True)
    }


def agree(shown: dict[str, tuple], frame: pd.DataFrame, x: pd.Series, y: pd.Series) -> None:
    """Every run is drawn, none twice, and where the store says."""
    assert set(shown) == set(frame.index)
    for evaluation, place in zip(frame.index, zip(x, y, strict=True), strict=True):
        assert shown[evaluation] == pytest.approx(place), evaluation


def opened(person: Person) -> str:
    """Which run's card is shown, by the second it was kept in."""
    boxes = person.all("[data-testid=stSelectbox]")
    (box,) = [b for b in boxes if b.text.startswith("Open run")]
    shown = box.find_element("css selector", "input").get_attribute("value") or box.text
    minutes, seconds = shown.strip().split(":")[-2:]
    return f"{60 * int(minutes) + int(seconds):012x}"


def page(person: Person) -> str:
    return person.driver.find_element("css selector", "[data-testid=stMain]").text


# --- views ----------------------------------------------------------------------------------


def test_runs_are_where_the_store_says_by_each_quality(person):
    look(person, "size")
    rows = stored(person)
    (figure,) = person.charts()
    agree(points(figure), rows, rows["measured_bytes"] / 2**20, rows["perplexity"])
    (front,) = [line for line in figure if line["name"] == "best for its size"]
    best = person.server.store.query(
        f"SELECT measured_bytes / 1048576 AS x, perplexity FROM ({RUNS}) QUALIFY perplexity < "
        "coalesce(min(perplexity) OVER (ORDER BY measured_bytes, perplexity "
        "ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 1e9) ORDER BY x"
    )
    assert front["x"] == pytest.approx(best["x"].tolist())
    assert front["y"] == pytest.approx(best["perplexity"].tolist())
    assert f"perplexity {rows['perplexity'].min():.2f}." in person.first_line
    person.click("KL")
    person.wait(
        lambda: (
            points(person.figures[0]).get(rows.index[0], (0, 0))[1]
            == pytest.approx(rows["kl"].iloc[0])
        ),
        why="KL was not drawn",
    )
    agree(points(person.charts()[0]), rows, rows["measured_bytes"] / 2**20, rows["kl"])


def test_gain_for_bits(person):
    look(person, "bits")
    (figure,) = person.charts()
    expected = person.server.store.query(
        f"""
        WITH runs AS ({RUNS}), base AS (
            SELECT * FROM runs WHERE method = 'uniform' AND base = '3.13'
            ORDER BY created DESC LIMIT 1)
        SELECT r.evaluation, 100 * (r.bits / base.bits - 1) AS extra,
               100 * (1 - r.perplexity / base.perplexity) AS dropped
        FROM runs r, base
        WHERE r.base = '3.13' AND (r.method <> 'uniform' OR r.evaluation = base.evaluation)
        """
    ).set_index("evaluation")
    assert len(expected) > 2
    agree(points(figure), expected, expected["extra"], expected["dropped"])


def test_wins_ties_and_losses(person):
    look(person, "wins")
    label, _ = person.charts(2)
    (row,) = person.server.store.query(
        f"""
        WITH runs AS (SELECT *, round(perplexity, 2) AS p FROM ({RUNS}))
        SELECT count(*) FILTER (a.p < b.p) AS wins, count(*) FILTER (a.p = b.p) AS ties,
               count(*) FILTER (a.p > b.p) AS losses, count(*) AS total
        FROM runs a JOIN runs b ON a.base = b.base
        WHERE a.method = 'sensiboost' AND b.method = 'uniform'
        """
    ).itertuples()
    assert row.total
    place = label[0]["y"].index(f"SensiBoost<br>against Uniform<br>n = {row.total}")
    for bars in label:
        assert bars["customdata"][place] == [getattr(row, bars["name"]), row.total]
        assert bars["x"][place] == pytest.approx(100 * getattr(row, bars["name"]) / row.total)


def test_two_plans_side_by_side(person):
    look(person, "two")
    store = person.server.store
    newest = store.query(f"{RUNS} ORDER BY e.created DESC LIMIT 2")
    shown = person.charts(4)
    names = [config.name for config in LADDER]
    for place, run in enumerate(newest["run"]):
        modules = store.query(
            """
            SELECT m.name, m.layer, m.type, m.out_features * m.in_features AS numel,
                   p.content ->> ('$.modules."' || m.name || '".config') AS config
            FROM runs r JOIN plans p ON r.plan = p.id
            JOIN matrices m ON m.fingerprint = r.fingerprint
            WHERE r.id = ? ORDER BY m.position
            """,
            [run],
        )
        heat, ring = shown[2 * place][0], shown[2 * place + 1][0]
        kinds = list(dict.fromkeys(modules["type"]))
        for row in modules.itertuples():
            assert heat["z"][kinds.index(row.type)][row.layer] == names.index(row.config)
        bits = modules["config"].map({c.name: c.nominal_bits for c in LADDER})
        sizes = (modules["numel"] * bits).groupby(modules["config"]).sum()
        shares = dict(zip(ring["labels"], ring["values"], strict=True))
        assert sorted(shares.values()) == pytest.approx(sorted(sizes / sizes.sum()))
    assert f"{len(modules)} modules differ of {len(modules)}" in page(person)


@needs_reference
def test_predictions_and_full_precision_of_published_runs(person):
    store = person.server.store
    runs = store.query(
        "SELECT e.id, e.perplexity FROM evaluations e JOIN runs r ON e.run = r.id "
        "WHERE r.fingerprint LIKE 'published:%' AND e.corpus = 'wikitext2'"
    ).set_index("id")["perplexity"]
    look(person, "predicted", PUBLISHED)
    (figure,) = person.charts()
    shown = points(figure)
    assert f"Each of {len(shown)} runs predicted" in page(person)
    assert len(shown) > 100
    assert {e: x for e, (x, _) in shown.items()} == pytest.approx(runs[list(shown)].to_dict())
    errors = [abs(predicted / measured - 1) for measured, predicted in shown.values()]
    assert f"half of them within {100 * median(errors):.2f} %" in page(person)
    person.click("By size")
    person.wait(lambda: "Click a point" in page(person) and person.settled())
    person.charts()
    full = store.query(
        "SELECT perplexity FROM evaluations WHERE run IS NULL AND corpus = 'wikitext2' "
        "AND fingerprint = (SELECT fingerprint FROM models WHERE source = ?)",
        [PUBLISHED],
    )["perplexity"][0]
    levels = person.driver.execute_script(
        "return document.querySelector('.js-plotly-plot').layout.shapes.map(line => line.y0)"
    )
    assert levels == [pytest.approx(full)]


# --- one run --------------------------------------------------------------------------------


def zoomed(person: Person) -> list[float]:
    script = "return document.querySelector('.js-plotly-plot')._fullLayout.xaxis.range"
    return person.driver.execute_script(script)


def test_a_click_opens_a_run_and_the_zoom_stays(person):
    from selenium.webdriver.common.action_chains import ActionChains

    look(person, "size")
    person.charts()
    before = opened(person)
    assert before == stored(person)["perplexity"].idxmin()
    person.driver.find_element("css selector", f"{PLOT} [data-title='Zoom out']").click()
    person.wait(lambda: zoomed(person)[0] < 0, why="the chart did not zoom")
    range_before = zoomed(person)
    ActionChains(person.driver).move_to_element(in_view(person)).pause(0.3).click().perform()
    person.wait(lambda: person.settled() and opened(person) != before, 15, "nothing was opened")
    row = stored(person).loc[opened(person)]
    told = f"perplexity {row['perplexity']:.4f}, KL"
    person.wait(lambda: told in person.driver.page_source, why="the card is another run's")
    assert zoomed(person) == pytest.approx(range_before), "a pick redraws nothing"


def in_view(person: Person) -> object:
    """A marker in the middle of what the zoomed chart shows."""
    frame = person.driver.find_element("css selector", ".js-plotly-plot .nsewdrag").rect

    def off(point: object) -> float:
        x, y = (point.rect[a] + point.rect[s] / 2 for a, s in (("x", "width"), ("y", "height")))
        return abs(x - frame["x"] - frame["width"] / 2) + abs(y - frame["y"] - frame["height"] / 2)

    return min(person.all(".js-plotly-plot .scatterlayer .point"), key=off)


def test_stars_and_notes_are_kept(person):
    look(person, "size")
    run = stored(person).loc[opened(person), "run"]
    person.click("☆")
    person.wait(lambda: [b for b in person.all("button") if b.text == "★"], why="no star")
    person.type("Note", "worth a second look")
    kept = "SELECT starred, note FROM runs WHERE id = ?"
    person.wait(
        lambda: (
            person.server.store.query(kept, [run]).iloc[0].tolist() == [True, "worth a second look"]
        ),
        why="star or note was not kept",
    )
    person.driver.refresh()
    person.reads("Best within", 60)
    (note,) = person.wait(lambda: person.all("input[aria-label=Note]"), why="no note")
    assert note.get_attribute("value") == "worth a second look"
    assert "★" in [b.text for b in person.all("button")]


def test_deleting_and_undoing(person):
    look(person, "size")
    best = stored(person)["perplexity"].idxmin()
    person.wait(lambda: opened(person) == best)
    person.click("Delete")
    person.wait(lambda: "1 run of demo deleted" in page(person) and person.settled())
    assert best not in stored(person).index
    next_best = stored(person)["perplexity"].idxmin()
    person.wait(lambda: opened(person) == next_best, why="the next best is not open")
    person.driver.refresh()
    person.reads("Best within", 60)
    person.click("Undo")
    person.wait(lambda: "deleted" not in page(person) and person.settled())
    assert best in stored(person).index


# --- exports --------------------------------------------------------------------------------


def test_the_table_is_downloaded_as_it_is_filtered(person, tmp_path):
    person.saves_to(tmp_path / "downloads")
    look(person, "size")
    kept = stored(person).set_index("run")
    first = person.wait(lambda: person.driver.find_element("css selector", "[id^=glide-cell-]"))
    assert first.find_element("xpath", "ancestor::table"), "the table can be read by its rows"
    for kind in ("csv", "parquet"):
        person.click("CSV" if kind == "csv" else "Parquet")
        rows = duckdb.sql(f"SELECT * FROM '{person.saved(f'*.{kind}')}'").df().set_index("run id")
        assert set(rows.index) == set(kept.index)
        assert rows["perplexity"].to_dict() == pytest.approx(kept["perplexity"].to_dict())
        assert rows["perplexity"].is_monotonic_increasing, "numbers are sorted as numbers"
    person.saved("*.csv").unlink()
    person.type("Search", "sensiboost 3.")
    person.wait(person.settled)
    person.click("CSV")
    rows = duckdb.sql(f"SELECT \"run id\", method FROM '{person.saved('*.csv')}'").df()
    wanted = kept[(kept["method"] == "sensiboost") & kept["bits"].between(2.995, 3.995)]
    assert set(rows["run id"]) == set(wanted.index) != set()


def test_charts_are_saved_as_page_and_images(person, tmp_path):
    from selenium.webdriver.common.keys import Keys

    person.saves_to(tmp_path / "downloads")
    look(person, "size")
    (figure,) = person.charts()
    format_of = f"return document.querySelector('{PLOT}')._context.toImageButtonOptions.format"
    person.click("Save")
    person.click("Chart (HTML)")
    written = person.saved("*.html")
    camera = f"{PLOT} .modebar-btn[data-title*='Download']"
    for kind, begins in (("png", b"\x89PNG"), ("svg", b"<svg")):
        if kind == "svg":
            person.click("Save")
            person.click("SVG")
            person.wait(
                lambda: person.driver.execute_script(format_of) == "svg" and person.settled(),
                why="the camera did not follow",
            )
        person.press(Keys.ESCAPE)
        person.wait(lambda: not person.all("[data-testid=stPopoverBody]"))
        person.driver.find_element("css selector", camera).click()
        assert person.saved(f"*.{kind}").read_bytes().startswith(begins)
    person.driver.get(written.as_uri())
    assert points(person.figures[0]) == points(figure)


def test_a_run_is_taken_along(person, tmp_path):
    """Its report is opened from disk, with nothing to reach beyond; and its BibTeX."""
    person.saves_to(tmp_path / "downloads")
    look(person, "size")
    evaluation = opened(person)
    row = stored(person).loc[evaluation]
    record = person.server.store.record(evaluation)
    person.click("Export")
    command = person.wait(lambda: person.all("[data-testid=stPopoverBody] code"))[0].text
    assert command.startswith("lsq run --model demo")
    person.click("BibTeX")
    assert person.saved("*.bib").read_text("utf8") == bibtex(record)
    person.click("Report (HTML)")
    written = person.saved("*.html")
    person.driver.execute_cdp_cmd(
        "Network.emulateNetworkConditions",
        {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0},
    )
    person.driver.get(written.as_uri())
    text = person.driver.find_element("tag name", "body").text
    assert f"{row['perplexity']:.4f}" in text
    assert " ".join(command.split()) in " ".join(text.split())
    shown = points(person.figures[0])
    assert shown[evaluation] == pytest.approx((row["measured_bytes"] / 2**20, row["perplexity"]))
    assert len(person.figures) == 3
    asked = "return performance.getEntriesByType('resource').map(e => e.name)"
    assert not [
        name
        for name in person.driver.execute_script(asked)
        if not name.startswith(("data:", "blob:"))
    ]


# --- SQL ------------------------------------------------------------------------------------


def test_a_question_is_answered_and_files_are_out_of_reach(person, tmp_path):
    person.saves_to(tmp_path / "downloads")
    person.open("/SQL?model=demo")
    person.reads("found", 60)
    person.click("What there is")
    store = person.server.store
    tables = store.query("SELECT count(*) AS n FROM duckdb_columns() WHERE NOT internal")["n"][0]
    person.reads(f"{tables + len(store.results().columns)} rows found.")
    ask(person, "SELECT run, perplexity FROM results WHERE origin = 'measured' ORDER BY run")
    kept = stored(person).sort_values("run")
    person.reads(f"{len(kept)} rows found.")
    person.click("CSV")
    rows = duckdb.sql(f"SELECT * FROM '{person.saved('*.csv')}'").df()
    assert rows["run"].tolist() == kept["run"].tolist()
    assert rows["perplexity"].tolist() == pytest.approx(kept["perplexity"].tolist())
    out = tmp_path / "out.csv"
    ask(person, f"COPY runs TO '{out}'")
    (told,) = person.wait(lambda: person.all("[data-testid=stAlertContentError]"))
    assert "single SELECT" in told.text
    assert not out.exists()


def ask(person: Person, sql: str) -> None:
    from selenium.webdriver.common.keys import Keys

    field = person.wait(lambda: person.all("textarea[aria-label=SQL]"))[0]
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(sql, Keys.CONTROL, Keys.ENTER)
    person.wait(person.settled)
