"""The Explore page in a real browser: each view matches the database or the checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from safetensors import safe_open

from lsq_core.model.source import DEMO_FOLDER
from tests.browser.conftest import Server, User

pytestmark = pytest.mark.browser

#: Returns the position and data of the rank scatter's point furthest from all others.
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
def server(populated_server: Server) -> Server:
    return populated_server


def open_view(user: User, see: str, headline: str) -> None:
    user.open(f"/Explore?model=demo&see={see}")
    user.wait_for_headline(headline, 60)


def scores(user: User, metric: str, config: str = "") -> pd.DataFrame:
    """Return the demo model's scores of a metric by layer (rows) and type (columns), by SQL."""
    rows = user.server.store.query(
        "SELECT s.type, s.layer, s.value FROM scores s JOIN profiles p ON s.profile = p.id "
        "JOIN models m ON p.fingerprint = m.fingerprint "
        "WHERE m.source = 'demo' AND s.metric = ? AND s.config = ?",
        [metric, config],
    )
    return rows.pivot(index="layer", columns="type", values="value")


def lines(figure: list[dict]) -> dict[str, list]:
    """Return a chart's lines by name; of several with the same name, the last."""
    return {line["name"]: line["y"] for line in figure if "lines" in (line["mode"] or "")}


def test_layers_view_matches_stored_scores(user):
    open_view(user, "layers", "Most sensitive")
    heat, figure = user.charts(2)
    panels = {
        "kurtosis": scores(user, "kurtosis"),
        "weight_error": scores(user, "weight_error", "b4g64"),
    }
    for metric, frame in panels.items():
        for kind in frame:
            drawn = [line["y"] for line in figure if line["name"] == kind.split(".")[-1]]
            assert any(frame[kind].tolist() == pytest.approx(y) for y in drawn), (metric, kind)
    parts = scores(user, "sensitivity", "b4g64")
    shown = lines(figure)
    for name in ("q_proj, k_proj, v_proj", "gate_proj, up_proj"):
        kind = next(kind for kind in parts if kind.endswith(name.split(",")[0]))
        assert shown[name] == pytest.approx(parts[kind].tolist())
    axis = "return document.querySelectorAll('.js-plotly-plot')[1]._fullLayout.yaxis.type"
    assert user.driver.execute_script(axis) == "log"
    top, _, jumps = user.first_line.partition(". Algorithm 1 flags")
    largest = parts.max(axis=1).sort_values(ascending=False)
    assert [int(n) for n in re.findall(r"\d+", top)] == largest.index[:3].tolist()
    marked = {x for marks in heat if marks["name"] == "jump" for x in marks["x"]}
    ringed = {x for line in figure if line["name"] == "flagged" for x in line["x"]}
    assert {int(n) for n in re.findall(r"\d+", jumps)} == marked <= ringed
    assert heat[0]["y"] == ["q, k, v", "o", "gate, up", "down"]
    kinds = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
    for kind, row in zip(kinds, heat[0]["z"], strict=True):
        assert row == pytest.approx(np.log10(parts[kind]).tolist()), kind


def test_threshold_slider_updates_flagged_layers(user):
    from selenium.webdriver.common.keys import Keys

    open_view(user, "algorithm", "at a threshold of 3.")
    before = user.first_line
    (name,) = re.findall(r"for ([\w, ]+) at a threshold", before)
    parts = scores(user, "sensitivity", "b4g64")
    kind = next(kind for kind in parts if kind.endswith(name.split(",")[0]))
    (figure,) = user.charts()
    (bars,) = [line for line in figure if line["type"] == "bar"]
    ratios = (parts[kind] / parts[kind].shift()).dropna()
    steps = {
        x: y
        for line in figure
        if line["name"].startswith(("kept", "trimmed ("))
        for x, y in zip(line["x"], line["y"], strict=True)
    }
    assert steps == pytest.approx(ratios.to_dict())
    kept = ratios.sort_values().iloc[1:-1]  # 5 % of 23 at either end
    z = ((ratios - kept.mean()).abs() / trimmed_deviation(kept)).tolist()
    assert bars["y"] == pytest.approx(z)
    thumb = "[data-testid=stSlider] input"
    user.read(lambda: user.driver.find_element("css selector", thumb).send_keys(Keys.HOME))
    after = user.wait_for_headline("at a threshold of 0.5.")
    headline_start, _, _ = after.partition(" flagged")
    assert {int(n) for n in re.findall(r"\d+", headline_start)} <= set(
        np.flatnonzero(np.array(z) > 0.5) + 1
    )
    assert len(re.findall(r"\d+", after)) > len(re.findall(r"\d+", before))


def trimmed_deviation(kept: pd.Series) -> float:
    """Return SciPy's trimmed standard deviation: about the trimmed mean, with ``ddof=1``."""
    return float(kept.std(ddof=1))


def test_overlay_view_patterns_and_rank_correlation(user):
    open_view(user, "overlay", "The patterns")
    user.click("Bits")
    user.wait(lambda: user.is_idle() and len(lines(user.figures[0])) > 3)
    patterns, heat = user.charts(2)
    configs = list(dict.fromkeys(line["name"] for line in patterns))
    by_config = {config: scores(user, "sensitivity", config) for config in configs}
    for config, frame in by_config.items():
        drawn = [line["y"] for line in patterns if line["name"] == config]
        for kind in ("self_attn.o_proj", "mlp.down_proj"):
            assert any(frame[kind].tolist() == pytest.approx(y) for y in drawn), (config, kind)
    parts = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
    for a, row in zip(configs, heat[0]["z"], strict=True):
        for b, value in zip(configs, row, strict=True):
            rho = [by_config[a][p].corr(by_config[b][p], method="spearman") for p in parts]
            assert value == pytest.approx(np.mean(rho)), (a, b)
    assert f"{min(map(min, heat[0]['z'])):.2f}" in user.first_line


def test_rank_scatter_click_selects_module(user):
    from selenium.webdriver.common.action_chains import ActionChains

    open_view(user, "ranks", "rank correlation")
    (figure,) = user.charts()
    for metric, config, axis_key in (("sensitivity", "b4g64", "x"), ("kurtosis", "", "y")):
        rank = scores(user, metric, config).stack().rank(ascending=False)
        for line in (line for line in figure if line["customdata"]):
            for (module, layer, *_), place in zip(line["customdata"], line[axis_key], strict=True):
                (kind,) = [k for k in rank.index.get_level_values("type") if k in module][:1]
                assert rank[int(layer), kind] == pytest.approx(place)
    x, y, (module, layer, *_), *ranks = user.wait(stable_point(user))
    actions = ActionChains(user.driver)
    actions.w3c_actions.pointer_action.move_to_location(int(x), int(y))
    actions.w3c_actions.pointer_action.click()
    actions.perform()
    user.wait(
        lambda: module in user.attribute("input[aria-label=Module]", "value"),
        why=f"{module} was clicked and is not shown",
    )
    assert f".layers.{layer}." in module
    ring = [[rank] for rank in ranks]
    user.wait(
        lambda: [[r["x"], r["y"]] for r in user.figures[0] if r["name"] == "selected"] == [ring],
        why="the clicked point was not ringed",
    )


def stable_point(user: User) -> Callable[[], list | None]:
    """Return a condition that gives the point's position once it has stopped moving."""
    positions: list[list] = []

    def place() -> list | None:
        positions.append(user.driver.execute_script(_POINT))
        return positions[-1] if len(positions) > 3 and positions[-1] == positions[-4] else None

    return place


def weight(name: str) -> np.ndarray:
    with safe_open(DEMO_FOLDER / "model.safetensors", "pt") as file:
        return file.get_tensor(f"{name}.weight").float().numpy()


def test_weights_view_matches_checkpoint(user):
    """Histogram, percentiles and surface match the weights in the file."""
    open_view(user, "weights", "standard deviations from the mean")
    q = weight("model.layers.0.self_attn.q_proj")
    (figure,) = user.charts()
    (bars,) = [line for line in figure if line["type"] == "bar"]
    assert sum(bars["y"]) == q.size
    assert f"{np.abs(q - q.mean()).max() / q.std():.1f} standard deviations" in user.first_line
    names = [line["name"] for line in figure]
    assert any("normal" in name for name in names)
    assert any("grid" in name for name in names)
    user.click("Percentiles over layers")
    user.wait_for_headline("range widest")
    (figure,) = user.charts()
    medians = [np.median(weight(f"model.layers.{i}.self_attn.q_proj")) for i in range(24)]
    assert lines(figure)["median"] == pytest.approx(medians, abs=1e-6)
    user.click("3-D surface")
    user.wait_for_headline("at row")
    (figure,) = user.charts()
    assert figure[0]["type"] == "surface"
    assert max(map(max, figure[0]["z"])) == pytest.approx(np.abs(q).max())
