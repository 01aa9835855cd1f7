"""The Plan page in a real browser, on a published model of 80 layers by 7 matrices."""

from __future__ import annotations

import re
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest

from lsq_core.model.source import ModelSource
from lsq_core.planning.request import PlanRequest
from lsq_core.session import Session
from lsq_core.store.store import Store
from tests.browser.conftest import serve
from tests.browser.test_live_planner import PlannerPage
from tests.test_plan import needs_reference

pytestmark = [pytest.mark.browser, needs_reference]

LARGE = "published:Llama-2-70b-hf"
SMALL = "published:Llama-2-7b-hf"


@pytest.fixture(scope="module")
def server(published):
    """The app on a database with the published measurements."""
    with serve("app.py", published.parent) as started:
        yield started


class PlanPage(PlannerPage):
    """The planner on the Plan page."""

    def __init__(self, user, address: str):
        self.user, self.driver = user, user.driver
        user.open(f"/Plan?{address}")
        user.wait_for_headline("bits:", 60)
        self.root = user.wait(self.find_planner, 60, "no planner")

    def find_planner(self):
        from tests.browser.test_live_planner import _FIND_PLANNER

        return self.driver.execute_script(_FIND_PLANNER)

    @property
    def address(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.driver.current_url).query)


def plan(user, request: PlanRequest, model: str) -> np.ndarray:
    """Return the library's plan as indices into the ladder."""
    from lsq_core.bits import LADDER

    bench = Session(ModelSource(model), Store(user.server.database))
    computed_plan = bench.plan(request, bench.default_settings)
    return np.array([LADDER.index(config) for config in computed_plan.configs])


def test_slider_release_commits_budget_to_page_and_url(user):
    """The plan is drawn during the drag; release updates the headline and the URL."""
    page = PlanPage(user, f"model={LARGE}&method=mxq&budget=3.25")
    choice_before, line = page.choice(), user.first_line
    page.hold_thumb().move_by_offset(160, 0).perform()
    user.wait(lambda: page.bits > 3.5)
    assert (page.choice() != choice_before).any()
    assert user.first_line == line, "the page waits for the release"
    page.actions().release().perform()
    bits = page.bits
    user.wait(lambda: user.first_line.startswith(f"{bits:.2f} bits") and user.is_idle())
    user.wait(lambda: page.address["budget"] == [f"{bits:.4f}".rstrip("0").rstrip(".")])
    wanted = plan(user, PlanRequest("mxq", budget=f"{bits:.4f}bpp"), LARGE)
    assert page.choice().tolist() == wanted.tolist()
    user.driver.refresh()  # the URL restores the same plan
    user.wait_for_headline(f"{bits:.2f} bits", 60)
    page.root = user.wait(page.find_planner)
    assert page.choice().tolist() == wanted.tolist()


_TIMING_OBSERVER = """
const slider = arguments[0].querySelector('.slider');
window.releases = [];
let released = 0, line = '';
const said = () => document.querySelector('[data-testid=stMain] h1')?.innerText ?? '';
slider.addEventListener('change', () => { released = performance.now(); line = said(); },
                        { capture: true });
new MutationObserver(() => {
  const app = document.querySelector('[data-testid=stApp]');
  if (!released || said() === line || !said()) return;
  if (app.getAttribute('data-test-script-state') === 'running') return;
  const began = released;
  released = 0;
  requestAnimationFrame(() => requestAnimationFrame(() => {
    window.releases.push(performance.now() - began);
  }));
}).observe(document, { subtree: true, childList: true, characterData: true, attributes: true });
"""


@pytest.mark.bench
def test_slider_release_to_page_latency_within_limit(user, slowness):
    """80 layers by 7 types: the page shows the new budget within 400 ms at p95.

    The limit is scaled up on a slower machine.
    """
    page = PlanPage(user, f"model={LARGE}&method=mxq&budget=3.25")
    page.driver.execute_script(_TIMING_OBSERVER, page.root)
    for turn in range(20):
        moves = page.hold_thumb()
        moves.move_by_offset(25 if turn % 4 < 2 else -25, 0).release().perform()
        user.wait(
            lambda turn=turn: page.driver.execute_script("return releases.length") > turn,
            why="a release was not committed",
        )
    times = page.driver.execute_script("return releases")
    print(f"release to page: {np.median(times):.0f} ms median, "
          f"{np.percentile(times, 95):.0f} p95 of {len(times)}")  # fmt: skip
    assert np.percentile(times, 95) <= 400 * slowness


def test_second_method_and_prediction_match_library(user):
    """SensiBoost against MXQ: differences are marked; the prediction is the library's."""
    page = PlanPage(user, f"model={SMALL}&method=sensiboost&budget=3.25&against=mxq")
    ours = plan(user, PlanRequest("sensiboost", budget="3.25bpp"), SMALL)
    theirs = plan(user, PlanRequest("mxq", budget="3.25bpp"), SMALL)
    assert page.choice(0).tolist() == ours.tolist()
    assert page.choice(1).tolist() == theirs.tolist()
    assert int(page.data("different")) == (ours != theirs).sum()
    bench = Session(ModelSource(SMALL), Store(user.server.database))
    computed_plan = bench.plan(PlanRequest("sensiboost", budget="3.25bpp"), bench.default_settings)
    prediction = bench.predicted(computed_plan, bench.default_settings, corpus="wikitext2")
    assert f"perplexity {prediction['perplexity']:.2f} ±" in user.first_line
    runs = Store(user.server.database).results(SMALL, origin="published")
    runs = runs[(runs["corpus"] == "wikitext2") & runs["bits_per_param"].notna()]
    point_count = page.driver.execute_script(
        "return document.querySelectorAll('.js-plotly-plot .scatterlayer .points path').length"
    )
    assert point_count == len(runs)


def test_readout_prediction_matches_headline(user):
    """Predicted for the plan shown, since pins make the curve bend between its points."""
    address = f"model={SMALL}&method=mxq&budget=3.25&pins=*.layers.0.*%3Db8g64"
    page = PlanPage(user, address)
    prediction = re.match(r"3\.25 bits: perplexity ([\d.]+) ±", user.first_line)[1]
    assert page.text(".readout td.perplexity span") == prediction
    assert page.text(".pins li").startswith("*.layers.0.* = b8g64")


def test_unknown_model_size_shown_as_unknown(user):
    """The size of the rest of Llama-2-70b was not published."""
    page = PlanPage(user, f"model={LARGE}&method=mxq&budget=3.25")
    assert page.text(".readout td.whole span") == "unknown"
    assert not page.find_part("input[value=whole]").is_enabled()
    assert "are extra" in page.attribute(".presets button", "title")


def test_budget_by_predicted_loss_matches_library(user):
    page = PlanPage(user, f"model={SMALL}&method=mxq&budget=3.25")
    user.click("Search by loss")
    user.type("Loss", "2%")
    user.click("Find")
    bench = Session(ModelSource(SMALL), Store(user.server.database))
    request = bench.request_for_max_loss(
        PlanRequest("mxq"), bench.default_settings, 0.02, corpus="wikitext2"
    )
    wanted = float(request.budget.removesuffix("bpp"))
    user.wait(lambda: abs(float(page.data("committed")) - wanted) < 2e-4)
    user.wait_for_headline(f"{wanted:.2f} bits")
    assert float(page.data("committed")) == pytest.approx(wanted, abs=2e-4)
    assert user.first_line.startswith(f"{wanted:.2f} bits")
