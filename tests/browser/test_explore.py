"""The Explore page's views in a real browser, on the demo model."""

from __future__ import annotations

import json
import re

import pytest

from lsq_core.model import ModelSource
from lsq_core.pipeline import Workbench
from lsq_core.profile import ProfileSettings
from lsq_core.store import Store

pytestmark = pytest.mark.browser

#: The figure of a chart as the page holds it: its lines by name.
_LINES = """
const figures = [...document.querySelectorAll('.js-plotly-plot')].map(plot =>
    plot._fullData.map(line =>
        [line.name, line.type, line.x && [...line.x], line.y && [...line.y]]));
return JSON.stringify(figures);
"""
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
def profiled(server) -> Store:
    """The server's database with a short profile of the demo model."""
    store = Store(server.database)
    Workbench(ModelSource("demo"), store, "cpu").profile(ProfileSettings("rtn", samples=4))
    return store


def figures(person) -> list:
    return json.loads(person.driver.execute_script(_LINES))


def test_every_view_is_linked_to_and_draws(person, profiled):
    """A deep link to each view on its own: the first line speaks of it, and a chart is there."""
    for see, says in (
        ("layers", "Layer|No layer"),
        ("algorithm", "flagged for"),
        ("overlay", "The patterns|One pattern"),
        ("ranks", "rank correlation"),
        ("weights", "deviations out"),
    ):
        person.open(f"/Explore?model=demo&see={see}")
        person.wait(
            lambda says=says: re.search(says, person.first_line) and person.settled(),
            60,
            f"the view {see} never spoke",
        )
        person.wait(lambda: person.all(".js-plotly-plot"), why=f"no chart in {see}")
        assert not person.all("[data-testid=stException], [data-testid=stAlertContentError]")
        wide = person.driver.execute_script(
            "return document.documentElement.scrollWidth <= window.innerWidth"
        )
        assert wide, f"{see} is wider than the window"


def test_a_click_on_a_point_shows_its_module(person, profiled):
    from selenium.webdriver.common.action_chains import ActionChains

    person.open("/Explore?model=demo&see=ranks")
    person.reads("rank correlation", 60)
    person.wait(lambda: person.all(".js-plotly-plot .points"))
    seen: list[list] = []

    def place() -> list | None:
        """Where the point is, once it stays there."""
        seen.append(person.driver.execute_script(_POINT))
        return seen[-1] if len(seen) > 3 and seen[-1] == seen[-4] else None

    x, y, (module, layer, *_), *ranks = person.wait(place)
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
        lambda: [line[2:] for line in figures(person)[0] if line[0] == "picked"] == [ring],
        why="the clicked point was not ringed",
    )


def test_the_threshold_moves_what_is_flagged(person, profiled):
    from selenium.webdriver.common.keys import Keys

    person.open("/Explore?model=demo&see=algorithm")
    before = person.reads("at a threshold of 3.", 60)
    slider = "[data-testid=stSlider] input"
    thumb = person.wait(lambda: person.driver.find_element("css selector", slider))
    thumb.send_keys(Keys.HOME)
    after = person.reads("at a threshold of 0.5.")
    assert len(re.findall(r"\d+", after)) > len(re.findall(r"\d+", before))
    (z,) = [line for line in figures(person)[0] if line[1] == "bar"]
    assert len(z[3]) == 23


def test_the_surface_is_drawn(person, profiled):
    person.open("/Explore?model=demo&see=weights")
    person.reads("deviations out", 60)
    person.click("3-D surface")
    person.reads("at row")
    kinds = {line[1] for figure in figures(person) for line in figure}
    assert "surface" in kinds
