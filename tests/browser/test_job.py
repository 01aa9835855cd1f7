"""The whole job as a person does it on the demo model, in a real browser."""

from __future__ import annotations

import re

import pytest

from lsq_core.store.store import Store

pytestmark = pytest.mark.browser


def test_from_the_model_to_the_comparison(person):
    """Takes about a minute: a real profile and a real run of the demo model, in the background."""
    pick_the_demo(person)
    profile_it(person)
    plan_by_budget(person)
    shown = run_it(person)
    stored = Store(person.server.database).query(
        "SELECT e.perplexity, e.tokens FROM evaluations e JOIN runs r ON e.run = r.id"
    )
    assert len(stored) == 1
    assert shown == f"{stored['perplexity'][0]:.4f}"
    assert stored["tokens"][0] <= 4000
    compare_it(person, stored["perplexity"][0])


def pick_the_demo(person) -> None:
    person.open()
    assert "at 4.25 bits 3.6 MiB" in person.reads("5.6 M parameters", 90)
    person.click("Demo model")


#: Keeps the first line and the kurtosis of q_proj of the moment when a first chart is there.
_WATCH = """
new MutationObserver(() => {
  const plot = document.querySelector('.js-plotly-plot');
  const line = document.querySelector('[data-testid=stMain] h1');
  if (window.early || !line || !plot || !plot._fullData || !plot._fullData.length) return;
  const q = plot._fullData.find((trace) => trace.name === 'q_proj');
  window.early = [line.innerText, [...q.y]];
}).observe(document, { subtree: true, childList: true });
"""


def profile_it(person) -> None:
    person.go("Explore")
    person.reads("has not been profiled")
    person.click("More")
    person.type("Calibration texts", "8")
    person.driver.execute_script(_WATCH)
    person.click("Profile")
    person.wait(lambda: person.all("[data-testid=stSidebar] [data-testid=stProgress]"))
    line = person.reads("Layer", 170)  # shown when it is there, without a reload
    assert "hard one" in line or "No layer" in line
    early, kurtosis = person.driver.execute_script("return window.early")
    assert early.startswith("Activation sensitivity is being measured"), "nobody had to wait"
    stored = Store(person.server.database).query(
        "SELECT value FROM scores WHERE metric = 'kurtosis' AND type LIKE '%q_proj' ORDER BY layer"
    )
    assert kurtosis == pytest.approx(stored["value"].tolist())
    drawn = {line["name"] for line in person.charts()[0]}
    assert {"q_proj", "q_proj, k_proj, v_proj"} <= drawn


#: The live planner lives in a shadow root, which no selector of the page reaches into.
_PLANNER = """
for (const element of document.querySelectorAll('*')) {
  const root = element.shadowRoot && element.shadowRoot.querySelector('.lsq');
  if (root && root.dataset.bits) return root;
}
return null;
"""


def plan_by_budget(person) -> None:
    from selenium.webdriver.common.keys import Keys

    person.go("Plan")
    before = person.reads("bits:")
    if "budget" not in person.all("[data-testid=stSelectbox]")[1].text:
        person.choose("Ask by", "budget")
    planner = person.wait(lambda: person.driver.execute_script(_PLANNER), why="no live planner")
    slider = planner.find_element("css selector", "input.slider")
    start = float(planner.get_attribute("data-bits"))
    slider.send_keys(Keys.ARROW_RIGHT * 20)
    budget = float(planner.get_attribute("data-bits"))
    assert budget > start
    person.wait(
        lambda: person.first_line != before and person.settled(),
        why="the plan did not follow the budget",
    )
    bits = float(re.match(r"[\d.]+", person.reads("bits:"))[0])
    assert start - 0.2 < bits <= round(budget, 2) + 0.005
    person.click("Quantize and evaluate")


def run_it(person) -> str:
    person.reads("Nothing has run yet")
    person.type("Max tokens", "4000")
    person.click("Quantize and evaluate")
    person.wait(lambda: person.all("[data-testid=stSidebar] [data-testid=stProgress]"))
    line = person.reads("Perplexity", 120)
    shown = person.metric("Perplexity")
    assert f"{float(shown):.2f}" in line
    return shown


def compare_it(person, perplexity: float) -> None:
    person.go("Compare")
    assert f"{perplexity:.2f}" in person.reads("Best within")
    person.driver.refresh()
    assert f"{perplexity:.2f}" in person.reads("Best within")
    person.open("/Run")  # found again although this browser's session is new
    assert f"{perplexity:.2f}" in person.reads("Perplexity")


def test_a_wrong_model_in_the_address_is_told_in_a_sentence(person):
    person.open("/?model=/nowhere/at/all")
    (told,) = person.wait(lambda: person.all("[data-testid=stAlertContentError]"))
    assert "/nowhere/at/all" in told.text
    assert not person.all("[data-testid=stException]")
