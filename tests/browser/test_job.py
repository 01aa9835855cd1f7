"""The complete workflow on the demo model in a real browser."""

from __future__ import annotations

import re

import pytest

from lsq_core.store.store import Store

pytestmark = pytest.mark.browser


def test_full_workflow_on_demo_model(user):
    """Takes about a minute: a real profile and a real run of the demo model, in the background."""
    choose_demo_model(user)
    profile_model(user)
    plan_for_budget(user)
    shown = run_plan(user)
    stored = Store(user.server.database).query(
        "SELECT e.perplexity, e.tokens FROM evaluations e JOIN runs r ON e.run = r.id"
    )
    assert len(stored) == 1
    assert shown == f"{stored['perplexity'][0]:.4f}"
    assert stored["tokens"][0] <= 4000
    compare_run(user, stored["perplexity"][0])


def choose_demo_model(user) -> None:
    user.open()
    user.wait_for_headline("Where should the bits go?", 90)
    assert "3.6 MiB at 4.25 bits" in user.text("h3")
    user.click("Open my model")
    user.click("Demo model")


#: Records the headline and the kurtosis of q_proj when the first chart appears.
_WATCH = """
new MutationObserver(() => {
  const plots = [...document.querySelectorAll('.js-plotly-plot')];
  const line = document.querySelector('[data-testid=stMain] h1');
  const q = plots.flatMap(plot => plot._fullData || []).find(trace => trace.name === 'q_proj');
  if (window.early || !line || !q) return;
  window.early = [line.innerText, [...q.y]];
}).observe(document, { subtree: true, childList: true });
"""


def profile_model(user) -> None:
    user.navigate_to("Explore")
    user.wait_for_headline("has not been profiled")
    user.click("More")
    user.type("Calibration samples", "8")
    user.driver.execute_script(_WATCH)
    user.click("Profile")
    user.wait(lambda: user.all("[data-testid=stSidebar] [data-testid=stProgress]"))
    line = user.wait_for_headline("Most sensitive", 170)  # without a reload
    assert "Algorithm 1 flags" in line
    first_chart, kurtosis = user.driver.execute_script("return window.early")
    assert first_chart.startswith("Measuring activation sensitivity"), "nobody had to wait"
    stored = Store(user.server.database).query(
        "SELECT value FROM scores WHERE metric = 'kurtosis' AND type LIKE '%q_proj' ORDER BY layer"
    )
    assert kurtosis == pytest.approx(stored["value"].tolist())
    drawn = {line["name"] for line in user.charts(2)[1]}
    assert {"q_proj", "q_proj, k_proj, v_proj"} <= drawn


#: Finds the live planner in its shadow root, which page selectors cannot reach.
_PLANNER = """
for (const element of document.querySelectorAll('*')) {
  const root = element.shadowRoot && element.shadowRoot.querySelector('.lsq');
  if (root && root.dataset.bits) return root;
}
return null;
"""


def plan_for_budget(user) -> None:
    from selenium.webdriver.common.keys import Keys

    user.navigate_to("Plan")
    before = user.wait_for_headline("bits:")
    if "budget" not in user.texts("[data-testid=stSelectbox]")[1]:
        user.choose("Size by", "budget")
    planner = user.wait(lambda: user.driver.execute_script(_PLANNER), why="no live planner")
    slider = planner.find_element("css selector", "input.slider")
    start = float(planner.get_attribute("data-bits"))
    slider.send_keys(Keys.ARROW_RIGHT * 60)  # to the next base
    budget = float(planner.get_attribute("data-bits"))
    assert budget > start
    user.wait(
        lambda: user.first_line != before and user.is_idle(),
        why="the plan did not follow the budget",
    )
    bits = float(re.match(r"[\d.]+", user.wait_for_headline("bits:"))[0])
    assert start - 0.2 < bits <= round(budget, 2) + 0.005


def run_plan(user) -> str:
    """Start a run on the Plan page, wait for its result, and return the Run page's perplexity."""
    from selenium.webdriver.common.keys import Keys

    user.click("Evaluation")
    user.type("Max tokens", "4000")
    user.press(Keys.ESCAPE)
    user.click("Quantize and evaluate")
    user.wait(lambda: user.all("[data-testid=stSidebar] [data-testid=stProgress]"))
    panel = ".st-key-plan-run"
    user.wait(lambda: user.all(f"{panel} [data-testid=stProgress]"), why="no progress in place")
    user.wait(
        lambda: any("Perplexity" in text for text in user.texts(panel)),
        120,
        why="no result in place",
    )
    user.navigate_to("Run")
    line = user.wait_for_headline("Perplexity", 120)
    shown = user.metric("Perplexity")
    assert f"{float(shown):.2f}" in line
    return shown


def compare_run(user, perplexity: float) -> None:
    user.navigate_to("Compare")
    assert f"{perplexity:.2f}" in user.wait_for_headline("Best within")
    user.driver.refresh()
    assert f"{perplexity:.2f}" in user.wait_for_headline("Best within")
    user.open("/Run")  # the run is found in a new Streamlit session
    assert f"{perplexity:.2f}" in user.wait_for_headline("Perplexity")


def test_url_with_unknown_model_shows_error(user):
    user.open("/?model=/nowhere/at/all")
    (error,) = user.wait(lambda: user.texts("[data-testid=stAlertContentError]"))
    assert "/nowhere/at/all" in error
    assert not user.all("[data-testid=stException]")
