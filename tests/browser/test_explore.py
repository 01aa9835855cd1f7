"""The Explore page's views in a real browser: what each shows is what SQL or the file says."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from safetensors import safe_open

from lsq_core.model.source import DEMO_FOLDER
from tests.browser.conftest import Person, Server

pytestmark = pytest.mark.browser

#: The point of the rank scatter that lies furthest from all others: where, and what it is.
_POINT = """
const plot = document.querySelector('.js-plotly-plot');
const box = plot.getBoundingClientRect(), size = plot._fullLayout, points = [];
for (const line of plot._fullData.filter(line => line.customdata))
    line.customdata.forEach((known, i) => points.push([
        box.left + size.xaxis._offset + size.xaxis.c2p(line.x[i]),
        box.top + size.yaxis._offset + size.yaxis.c2p(line.y[i]), known, line.x[i], line.y[i]]));
const seen = points.filter(point => point[1] < window.innerHeight - 20);
const alone = point => Math.min(...points.filter(other => other !== point).map(
    other => Math.hypot(point[0] - other[0], point[1] - other[1])));
return seen.reduce((best, point) => alone(point) > alone(best) ? point : best);
"""


@pytest.fixture(scope="module")
def server(stocked: Server) -> Server:
    return stocked


def look(person: Person, see: str, says: str) -> None:
    person.open(f"/Explore?model=demo&see={see}")
    person.reads(says, 60)


def scores(person: Person, metric: str, config: str = "") -> pd.DataFrame:
    """The demo model's scores of a metric by type (columns) and layer (rows), by SQL."""
    rows = person.server.store.query(
        "SELECT s.type, s.layer, s.value FROM scores s JOIN profiles p ON s.profile = p.id "
        "JOIN models m ON p.fingerprint = m.fingerprint "
        "WHERE m.source = 'demo' AND s.metric = ? AND s.config = ?",
        [metric, config],
    )
    return rows.pivot(index="layer", columns="type", values="value")


def lines(figure: list[dict]) -> dict[str, list]:
    """The lines of a chart by name; of several of a name the last."""
    return {line["name"]: line["y"] for line in figure if "lines" in (line["mode"] or "")}


def test_every_metric_over_the_layers(person):
    look(person, "layers", "ayer")
    (figure,) = person.charts()
    panels = {
        "kurtosis": scores(person, "kurtosis"),
        "weight_error": scores(person, "weight_error", "b4g64"),
    }
    for metric, frame in panels.items():
        for kind in frame:
            drawn = [line["y"] for line in figure if line["name"] == kind.split(".")[-1]]
            assert any(frame[kind].tolist() == pytest.approx(y) for y in drawn), (metric, kind)
    parts = scores(person, "sensitivity", "b4g64")
    shown = lines(figure)
    for name in ("q_proj, k_proj, v_proj", "gate_proj, up_proj"):
        kind = next(kind for kind in parts if kind.endswith(name.split(",")[0]))
        assert shown[name] == pytest.approx(parts[kind].tolist())
    axis = "return document.querySelector('.js-plotly-plot')._fullLayout.yaxis.type"
    assert person.driver.execute_script(axis) == "log"
    flagged = [int(n) for n in re.findall(r"\d+", person.first_line)]
    ringed = {x for line in figure if line["name"] == "flagged" for x in line["x"]}
    assert set(flagged) <= ringed


def test_the_threshold_moves_what_is_flagged(person):
    from selenium.webdriver.common.keys import Keys

    look(person, "algorithm", "at a threshold of 3.")
    before = person.first_line
    (name,) = re.findall(r"for ([\w, ]+) at a threshold", before)
    parts = scores(person, "sensitivity", "b4g64")
    kind = next(kind for kind in parts if kind.endswith(name.split(",")[0]))
    (figure,) = person.charts()
    (bars,) = [line for line in figure if line["type"] == "bar"]
    ratios = (parts[kind] / parts[kind].shift()).dropna()
    steps = {
        x: y
        for line in figure
        if line["name"].startswith(("within", "trimmed:"))
        for x, y in zip(line["x"], line["y"], strict=True)
    }
    assert steps == pytest.approx(ratios.to_dict())
    kept = ratios.sort_values().iloc[1:-1]  # 5 % of 23 at either end
    z = ((ratios - kept.mean()).abs() / bars_deviation(kept)).tolist()
    assert bars["y"] == pytest.approx(z)
    thumb = person.driver.find_element("css selector", "[data-testid=stSlider] input")
    thumb.send_keys(Keys.HOME)
    after = person.reads("at a threshold of 0.5.")
    said, _, _ = after.partition(" flagged")
    assert {int(n) for n in re.findall(r"\d+", said)} <= set(np.flatnonzero(np.array(z) > 0.5) + 1)
    assert len(re.findall(r"\d+", after)) > len(re.findall(r"\d+", before))


def bars_deviation(kept: pd.Series) -> float:
    """SciPy's trimmed deviation: about the mean of what is kept, one degree of freedom less."""
    return float(kept.std(ddof=1))


def test_patterns_overlaid_and_how_alike_they_are(person):
    look(person, "overlay", "The patterns")
    person.click("Bits")
    person.wait(lambda: person.settled() and len(lines(person.figures[0])) > 3)
    patterns, heat = person.charts(2)
    configs = list(dict.fromkeys(line["name"] for line in patterns))
    by_config = {config: scores(person, "sensitivity", config) for config in configs}
    for config, frame in by_config.items():
        drawn = [line["y"] for line in patterns if line["name"] == config]
        for kind in ("self_attn.o_proj", "mlp.down_proj"):
            assert any(frame[kind].tolist() == pytest.approx(y) for y in drawn), (config, kind)
    parts = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
    for a, row in zip(configs, heat[0]["z"], strict=True):
        for b, value in zip(configs, row, strict=True):
            rho = [by_config[a][p].corr(by_config[b][p], method="spearman") for p in parts]
            assert value == pytest.approx(np.mean(rho)), (a, b)
    assert f"{min(map(min, heat[0]['z'])):.2f}" in person.first_line


def test_a_click_on_a_point_shows_its_module(person):
    from selenium.webdriver.common.action_chains import ActionChains

    look(person, "ranks", "rank correlation")
    (figure,) = person.charts()
    for metric, config, way in (("sensitivity", "b4g64", "x"), ("kurtosis", "", "y")):
        rank = scores(person, metric, config).stack().rank(ascending=False)
        for line in (line for line in figure if line["customdata"]):
            for (module, layer, *_), place in zip(line["customdata"], line[way], strict=True):
                (kind,) = [k for k in rank.index.get_level_values("type") if k in module][:1]
                assert rank[int(layer), kind] == pytest.approx(place)
    x, y, (module, layer, *_), *ranks = person.wait(stays(person))
    actions = ActionChains(person.driver)
    actions.w3c_actions.pointer_action.move_to_location(int(x), int(y))
    actions.w3c_actions.pointer_action.click()
    actions.perform()
    person.wait(
        lambda: module in (person.all("input[aria-label=Module]")[0].get_attribute("value")),
        why=f"{module} was clicked and is not shown",
    )
    assert f".layers.{layer}." in module
    ring = [[rank] for rank in ranks]
    person.wait(
        lambda: [[r["x"], r["y"]] for r in person.figures[0] if r["name"] == "picked"] == [ring],
        why="the clicked point was not ringed",
    )


def stays(person: Person) -> Callable[[], list | None]:
    """Where the point is, once it stays there."""
    seen: list[list] = []

    def place() -> list | None:
        seen.append(person.driver.execute_script(_POINT))
        return seen[-1] if len(seen) > 3 and seen[-1] == seen[-4] else None

    return place


def weight(name: str) -> np.ndarray:
    with safe_open(DEMO_FOLDER / "model.safetensors", "pt") as file:
        return file.get_tensor(f"{name}.weight").float().numpy()


def test_the_weights_of_a_matrix(person):
    """Histogram, percentiles and surface are of the weights in the file."""
    look(person, "weights", "deviations out")
    q = weight("model.layers.0.self_attn.q_proj")
    (figure,) = person.charts()
    (bars,) = [line for line in figure if line["type"] == "bar"]
    assert sum(bars["y"]) == q.size
    assert f"{np.abs(q - q.mean()).max() / q.std():.1f} deviations" in person.first_line
    names = [line["name"] for line in figure]
    assert any("normal" in name for name in names)
    assert any("grid" in name for name in names)
    person.click("Percentiles over layers")
    person.reads("spread widest")
    (figure,) = person.charts()
    medians = [np.median(weight(f"model.layers.{i}.self_attn.q_proj")) for i in range(24)]
    assert lines(figure)["median"] == pytest.approx(medians, abs=1e-6)
    person.click("3-D surface")
    person.reads("at row")
    (figure,) = person.charts()
    assert figure[0]["type"] == "surface"
    assert max(map(max, figure[0]["z"])) == pytest.approx(np.abs(q).max())
