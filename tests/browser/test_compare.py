"""The Compare page in a real browser: views and exports match the database, queried by SQL."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

import duckdb
import pandas as pd
import pytest

from lsq_core.bits import LADDER
from lsq_core.charts import add_run_labels
from lsq_core.exports.registry import export_plan
from lsq_core.planning.methods import PLANNERS
from lsq_core.results.export import bibtex
from lsq_core.stages.exports import find_plan
from lsq_core.store.store import Store
from tests.browser.conftest import Server, User
from tests.test_plan import needs_reference

pytestmark = pytest.mark.browser

PLOT = ".js-plotly-plot"
PUBLISHED = "published:Llama-2-7b-hf"
#: All measured runs, by the test's own SQL.
RUNS = """
SELECT e.id AS evaluation, r.id AS run, r.method, p.bits_per_param AS bits, r.measured_bytes,
       p.content ->> '$.base' AS base, e.perplexity, e.kl, e.created
FROM evaluations e JOIN runs r ON e.run = r.id JOIN plans p ON r.plan = p.id
WHERE r.origin = 'measured' AND r.deleted IS NULL
"""


@pytest.fixture(scope="module")
def server(populated_server: Server) -> Server:
    return populated_server


@pytest.fixture(autouse=True)
def restore_runs(server: Server) -> Iterator[None]:
    """Undo deletions, stars and notes after each test."""
    yield
    with server.store.transaction() as connection:
        connection.execute("UPDATE runs SET deleted = NULL, starred = false, note = ''")


def stored_runs(user: User) -> pd.DataFrame:
    return user.server.store.query(RUNS).set_index("evaluation")


def open_view(user: User, view: str, model: str = "demo") -> None:
    user.open(f"/Compare?model={model}&view={view}")
    user.wait_for_headline("perplexity", 60)


def points(figure: list[dict]) -> dict[str, tuple[float, float]]:
    """Return the marker's position by evaluation."""
    return {
        point_data[1]: (x, y)
        for line in figure
        if line["mode"] == "markers" and line["customdata"]
        for point_data, x, y in zip(line["customdata"], line["x"], line["y"], strict=True)
    }


def assert_points_match(
    shown: dict[str, tuple], frame: pd.DataFrame, x: pd.Series, y: pd.Series
) -> None:
    """Assert that exactly the evaluations of ``frame`` are drawn, at ``x`` and ``y``."""
    assert set(shown) == set(frame.index)
    for evaluation, place in zip(frame.index, zip(x, y, strict=True), strict=True):
        assert shown[evaluation] == pytest.approx(place), evaluation


def opened_run(user: User) -> str:
    """Return the evaluation whose card is shown."""
    return run_by_time(user, "Open run")


def run_by_time(user: User, label: str) -> str:
    """Return the evaluation selected in a box, by the time in its label."""

    def shown_in_box() -> str | None:
        for box in user.all("[data-testid=stSelectbox]"):
            if box.text.split("\n")[0] == label:
                return box.find_element("css selector", "input").get_attribute("value") or box.text
        return None

    shown = user.wait(shown_in_box, why=f"no box '{label}'")
    minutes, seconds = shown.strip().split(":")[-2:]
    return f"{60 * int(minutes) + int(seconds):012x}"


def page_text(user: User) -> str:
    return user.text("[data-testid=stMain]")


# --- views ----------------------------------------------------------------------------------


def test_size_view_points_match_store(user):
    open_view(user, "size")
    rows = stored_runs(user)
    (figure,) = user.charts()
    assert_points_match(points(figure), rows, rows["measured_bytes"] / 2**20, rows["perplexity"])
    (front,) = [line for line in figure if line["name"] == "Pareto front"]
    best = user.server.store.query(
        f"SELECT measured_bytes / 1048576 AS x, perplexity FROM ({RUNS}) QUALIFY perplexity < "
        "coalesce(min(perplexity) OVER (ORDER BY measured_bytes, perplexity "
        "ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 1e9) ORDER BY x"
    )
    assert front["x"] == pytest.approx(best["x"].tolist())
    assert front["y"] == pytest.approx(best["perplexity"].tolist())
    assert f"perplexity {rows['perplexity'].min():.2f}" in page_text(user)
    low, high = x_axis_range(user)
    in_range = rows.loc[rows["bits"].between(3, 4.55), "measured_bytes"] / 2**20
    assert low < in_range.min() < in_range.max() < high
    assert high - low < 1.2 * (in_range.max() - in_range.min())
    user.click("KL")
    user.wait(
        lambda: (
            points(user.figures[0]).get(rows.index[0], (0, 0))[1]
            == pytest.approx(rows["kl"].iloc[0])
        ),
        why="KL was not drawn",
    )
    assert_points_match(points(user.charts()[0]), rows, rows["measured_bytes"] / 2**20, rows["kl"])


def test_bits_view_gain_matches_sql(user):
    open_view(user, "bits")
    user.charts()
    user.choose("Uniform base", "3.13")
    expected = user.server.store.query(
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
    user.wait(
        lambda: set(points(user.figures[0])) == set(expected.index), why="the base was not drawn"
    )
    assert_points_match(points(user.charts()[0]), expected, expected["extra"], expected["dropped"])


def test_wins_view_counts_match_sql(user):
    open_view(user, "wins")
    label, _ = user.charts(2)
    (row,) = user.server.store.query(
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


def test_two_runs_view_shows_both_plans(user):
    open_view(user, "two")
    store = user.server.store
    rows = stored_runs(user)
    pair = rows.loc[[run_by_time(user, "Run"), run_by_time(user, "against")]]
    assert pair["method"].iloc[1] == "uniform" != pair["method"].iloc[0]
    uniform = rows.loc[rows["method"] == "uniform", "measured_bytes"]
    own = pair["measured_bytes"].iloc[0]
    assert abs(pair["measured_bytes"].iloc[1] - own) == abs(uniform - own).min()
    names = [config.name for config in LADDER]
    other = rows["created"].idxmax()  # only the first options of a long list are rendered
    assert rows.loc[other, "base"] != pair["base"].iloc[0]
    labels = add_run_labels(store.results()).set_index("evaluation")["label"]
    user.choose("against", f"{labels[other]} · {rows.loc[other, 'created']:%H:%M:%S}")
    user.wait(lambda: "168 modules differ of 168" in page_text(user), why="the same plans")
    pair = rows.loc[[pair.index[0], other]]
    shown = user.charts(4)
    for place, run in enumerate(pair["run"]):
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
    assert len(modules) == 168


def published_full_precision(store: Store) -> float:
    """Return the published model's full-precision perplexity."""
    return store.query(
        "SELECT perplexity FROM evaluations WHERE run IS NULL AND corpus = 'wikitext2' "
        "AND fingerprint = (SELECT fingerprint FROM models WHERE source = ?)",
        [PUBLISHED],
    )["perplexity"][0]


@needs_reference
def test_predicted_view_published_runs_match_store(user):
    store = user.server.store
    runs = store.query(
        "SELECT e.id, e.perplexity FROM evaluations e JOIN runs r ON e.run = r.id "
        "WHERE r.fingerprint LIKE 'published:%' AND e.corpus = 'wikitext2'"
    ).set_index("id")["perplexity"]
    open_view(user, "predicted", PUBLISHED)
    (figure,) = user.charts()
    shown = points(figure)
    assert f"Each of {len(shown)} runs predicted" in page_text(user)
    assert len(shown) > 100
    full = published_full_precision(store)
    perplexity = {e: full * (1 + x) for e, (x, _) in shown.items()}
    assert perplexity == pytest.approx(runs[list(shown)].to_dict())
    errors = [abs((1 + predicted) / (1 + measured) - 1) for measured, predicted in shown.values()]
    assert f"half of them within {100 * median(errors):.2f} %" in page_text(user)
    user.click("Perplexity by size")
    user.wait(lambda: "Click a point" in page_text(user) and user.is_idle())
    user.charts()
    levels = user.driver.execute_script(
        "return document.querySelector('.js-plotly-plot').layout.shapes.map(line => line.y0)"
    )
    assert levels == [pytest.approx(full)]


# --- single run -----------------------------------------------------------------------------


def x_axis_range(user: User) -> list[float]:
    script = "return document.querySelector('.js-plotly-plot')._fullLayout.xaxis.range"
    return user.driver.execute_script(script)


def test_point_click_opens_run_and_keeps_zoom(user):
    from selenium.webdriver.common.action_chains import ActionChains

    open_view(user, "size")
    user.charts()
    before = opened_run(user)
    assert is_in_headline(user, before)
    opened_on = x_axis_range(user)
    user.click_on(f"{PLOT} [data-title='Zoom out']")
    user.wait(lambda: x_axis_range(user)[0] < opened_on[0], why="the chart did not zoom")
    range_before = x_axis_range(user)
    ActionChains(user.driver).move_to_element(central_marker(user)).pause(0.3).click().perform()
    user.wait(lambda: user.is_idle() and opened_run(user) != before, 15, "nothing was opened")
    row = stored_runs(user).loc[opened_run(user)]
    expected_text = f"perplexity {row['perplexity']:.4f}, "
    user.wait(lambda: expected_text in user.driver.page_source, why="the card is another run's")
    assert x_axis_range(user) == pytest.approx(range_before), "a pick redraws nothing"


def central_marker(user: User) -> object:
    """Return the marker closest to the centre of the chart."""
    frame = user.read(lambda: user.first(".js-plotly-plot .nsewdrag").rect)

    def distance_to_center(point: object) -> float:
        x, y = (point.rect[a] + point.rect[s] / 2 for a, s in (("x", "width"), ("y", "height")))
        return abs(x - frame["x"] - frame["width"] / 2) + abs(y - frame["y"] - frame["height"] / 2)

    markers = ".js-plotly-plot .scatterlayer .point"
    return user.read(lambda: min(user.all(markers), key=distance_to_center))


def test_star_and_note_persist_after_reload(user):
    open_view(user, "size")
    run = stored_runs(user).loc[opened_run(user), "run"]
    user.click("☆")
    user.wait(lambda: "★" in user.texts("button"), why="no star")
    user.type("Note", "worth a second look")
    kept = "SELECT starred, note FROM runs WHERE id = ?"
    user.wait(
        lambda: (
            user.server.store.query(kept, [run]).iloc[0].tolist() == [True, "worth a second look"]
        ),
        why="star or note was not kept",
    )
    user.driver.refresh()
    user.wait_for_headline("perplexity", 60)
    assert user.attribute("input[aria-label=Note]", "value") == "worth a second look"
    user.wait(lambda: "★" in user.texts("button"), why="no star")


def is_in_headline(user: User, evaluation: str) -> bool:
    """Return whether the headline names the method of an evaluation's run."""
    method = stored_runs(user).loc[evaluation, "method"]
    return PLANNERS[method].title in user.text("h1")


def test_delete_run_and_undo(user):
    open_view(user, "size")
    best = opened_run(user)
    assert is_in_headline(user, best)
    user.click("Delete")
    user.wait(lambda: "1 run of demo deleted" in page_text(user) and user.is_idle())
    assert best not in stored_runs(user).index
    user.wait(lambda: opened_run(user) in stored_runs(user).index, why="no other run is open")
    user.wait(lambda: is_in_headline(user, opened_run(user)), why="the headline's is not open")
    user.driver.refresh()
    user.wait_for_headline("perplexity", 60)
    user.click("Undo")
    user.wait(lambda: "deleted" not in page_text(user) and user.is_idle())
    assert best in stored_runs(user).index


# --- exports --------------------------------------------------------------------------------


def test_table_download_matches_filter(user, tmp_path):
    user.set_download_folder(tmp_path / "downloads")
    open_view(user, "size")
    kept = stored_runs(user).set_index("run")
    cells = "table [id^=glide-cell-]"
    user.wait(
        lambda: user.driver.find_element("css selector", cells),
        why="no table that can be read by its rows",
    )
    for kind in ("csv", "parquet"):
        user.click("CSV" if kind == "csv" else "Parquet")
        rows = duckdb.sql(f"SELECT * FROM '{user.saved(f'*.{kind}')}'").df().set_index("run id")
        assert set(rows.index) == set(kept.index)
        assert rows["perplexity"].to_dict() == pytest.approx(kept["perplexity"].to_dict())
        assert rows["perplexity"].is_monotonic_increasing, "numbers are sorted as numbers"
    user.saved("*.csv").unlink()
    user.type("Search", "sensiboost 3.")
    user.wait(user.is_idle)
    user.click("CSV")
    rows = duckdb.sql(f"SELECT \"run id\", method FROM '{user.saved('*.csv')}'").df()
    expected_rows = kept[(kept["method"] == "sensiboost") & kept["bits"].between(2.995, 3.995)]
    assert set(rows["run id"]) == set(expected_rows.index) != set()


def test_chart_download_as_html_png_svg(user, tmp_path):
    from selenium.webdriver.common.keys import Keys

    user.set_download_folder(tmp_path / "downloads")
    open_view(user, "size")
    (figure,) = user.charts()
    format_of = f"return document.querySelector('{PLOT}')._context.toImageButtonOptions.format"
    user.click("Save")
    user.click("Chart (HTML)")
    written = user.saved("*.html")
    camera = f"{PLOT} .modebar-btn[data-title*='Download']"
    for kind, begins in (("png", b"\x89PNG"), ("svg", b"<svg")):
        if kind == "svg":
            user.click("Save")
            user.click("SVG")
            user.wait(
                lambda: user.driver.execute_script(format_of) == "svg" and user.is_idle(),
                why="the camera did not follow",
            )
        user.press(Keys.ESCAPE)
        user.wait(lambda: not user.all("[data-testid=stPopoverBody]"))
        user.click_on(camera)
        assert user.saved(f"*.{kind}").read_bytes().startswith(begins)
    user.driver.get(written.as_uri())
    assert points(user.figures[0]) == points(figure)


def test_run_export_report_and_bibtex(user, tmp_path):
    """The report works from disk without a network; BibTeX matches the library's."""
    user.set_download_folder(tmp_path / "downloads")
    open_view(user, "size")
    evaluation = opened_run(user)
    row = stored_runs(user).loc[evaluation]
    record = user.server.store.record(evaluation)
    user.click("Export")
    command = user.text("[data-testid=stPopoverBody] code")
    assert command.startswith("lsq run --model demo")
    user.click("BibTeX")
    assert user.saved("*.bib").read_text("utf8") == bibtex(record)
    user.click("Report (HTML)")
    written = user.saved("*.html")
    user.driver.execute_cdp_cmd(
        "Network.emulateNetworkConditions",
        {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0},
    )
    user.driver.get(written.as_uri())
    text = user.body
    assert f"{row['perplexity']:.4f}" in text
    assert " ".join(command.split()) in " ".join(text.split())
    shown = points(user.figures[0])
    assert shown[evaluation] == pytest.approx((row["measured_bytes"] / 2**20, row["perplexity"]))
    assert len(user.figures) == 3
    requested_script = "return performance.getEntriesByType('resource').map(e => e.name)"
    assert not [
        name
        for name in user.driver.execute_script(requested_script)
        if not name.startswith(("data:", "blob:"))
    ]


def test_run_export_plan_for_another_tool(user, tmp_path):
    """Files match the library's; an approximate export must be accepted first."""
    user.set_download_folder(tmp_path / "downloads")
    open_view(user, "size")
    run = user.server.store.record(opened_run(user))["run"]["id"]
    plan, info = find_plan(run, user.server.store)
    user.click("Export")
    user.choose("Tool", "MLX")
    user.click("mlx.json")
    assert user.saved("mlx.json").read_text("utf8") == export_plan(plan, info, "mlx").text
    user.choose("Tool", "exllamav3")
    accept = "[data-testid=stPopoverBody] [data-testid=stCheckbox] label"
    user.wait(lambda: user.all(accept), why="nothing is said of what would be taken")
    assert not [text for text in user.texts("button") if text.endswith("recipe.yaml")]
    user.click_on(accept)
    user.click("recipe.yaml")
    expected = export_plan(plan, info, "exllamav3", nearest=True).text
    assert user.saved("recipe.yaml").read_text("utf8") == expected


# --- SQL ------------------------------------------------------------------------------------


def test_sql_page_select_works_and_copy_is_refused(user, tmp_path):
    user.set_download_folder(tmp_path / "downloads")
    user.open("/SQL?model=demo")
    user.wait_for_headline("row", 60)
    user.click("What there is")
    store = user.server.store
    tables = store.query("SELECT count(*) AS n FROM duckdb_columns() WHERE NOT internal")["n"][0]
    user.wait_for_headline(f"{tables + len(store.results().columns)} rows.")
    run_sql(user, "SELECT run, perplexity FROM results WHERE origin = 'measured' ORDER BY run")
    kept = stored_runs(user).sort_values("run")
    user.wait_for_headline(f"{len(kept)} rows.")
    user.click("CSV")
    rows = duckdb.sql(f"SELECT * FROM '{user.saved('*.csv')}'").df()
    assert rows["run"].tolist() == kept["run"].tolist()
    assert rows["perplexity"].tolist() == pytest.approx(kept["perplexity"].tolist())
    out = tmp_path / "out.csv"
    run_sql(user, f"COPY runs TO '{out}'")
    (error,) = user.wait(lambda: user.texts("[data-testid=stAlertContentError]"))
    assert "single SELECT" in error
    assert not out.exists()


def run_sql(user: User, sql: str) -> None:
    from selenium.webdriver.common.keys import Keys

    keys = (Keys.CONTROL, "a", Keys.NULL, sql, Keys.CONTROL, Keys.ENTER)
    user.read(lambda: user.first("textarea[aria-label=SQL]").send_keys(*keys))
    user.wait(user.is_idle)
