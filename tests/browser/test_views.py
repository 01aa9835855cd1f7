"""Every page in light and dark, 1440 and 1024 pixels wide: contrast and accessibility."""

from __future__ import annotations

import pytest

from tests.browser.conftest import Server, User
from tests.test_plan import needs_reference

pytestmark = pytest.mark.browser

DEMO, PUBLISHED = "model=demo", "model=published:Llama-2-7b-hf"
#: Address and minimum number of charts by view.
VIEWS = {
    "model": (f"/?{DEMO}", 1),
    "layers": (f"/Explore?{DEMO}", 2),
    "algorithm": (f"/Explore?{DEMO}&see=algorithm", 1),
    "overlay": (f"/Explore?{DEMO}&see=overlay", 2),
    "ranks": (f"/Explore?{DEMO}&see=ranks", 1),
    "weights": (f"/Explore?{DEMO}&see=weights", 1),
    "plan": (f"/Plan?{DEMO}&method=mxq", 1),
    "run": (f"/Run?{DEMO}", 0),
    "size": (f"/Compare?{DEMO}", 1),
    "bits": (f"/Compare?{DEMO}&view=bits", 1),
    "wins": (f"/Compare?{DEMO}&view=wins", 2),
    "two": (f"/Compare?{DEMO}&view=two", 4),
    "query": (f"/SQL?{DEMO}", 0),
    "published-layers": (f"/Explore?{PUBLISHED}", 2),
    "published-size": (f"/Compare?{PUBLISHED}", 1),
    "published-wins": (f"/Compare?{PUBLISHED}&view=wins", 2),
    "published-predicted": (f"/Compare?{PUBLISHED}&view=predicted", 1),
}
#: Reports on the page's appearance; ``faint`` lists text with a contrast below 3 : 1 and
#: ``unreachable`` controls that the keyboard can't reach. Text in cells, bars and slices, which
#: have their own text colours, is skipped.
_LOOK = """
const rgba = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
const light = (c) => { const l = c.slice(0, 3).map(v => v / 255).map(
    v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * l[0] + 0.7152 * l[1] + 0.0722 * l[2]; };
const over = (a, b) => a.slice(0, 3).map((v, i) => v * (a[3] ?? 1) + b[i] * (1 - (a[3] ?? 1)));
const ground = (e) => { const layers = [];
    for (; e; e = e.parentElement) { const c = rgba(getComputedStyle(e).backgroundColor);
        if ((c[3] ?? 1) > 0) layers.push(c); if ((c[3] ?? 1) === 1) break; }
    return layers.reverse().reduce((below, c) => over(c, below), [255, 255, 255]); };
const faint = [];
for (const e of document.querySelectorAll('[data-testid=stApp] *')) {
    const text = [...e.childNodes].filter(n => n.nodeType === 3).map(n => n.data.trim()).join('');
    const box = e.getBoundingClientRect();
    if (!text || !box.width || !box.height || !e.checkVisibility({checkOpacity: true})) continue;
    if (e.closest(':disabled, [aria-disabled=true], .hm, .heatmaplayer, .slice, canvas, ' +
        'style, script, .bartext-inside, [data-testid=stSliderThumbValue], ' +
        '[data-testid=stSelectbox]:has(:disabled)')) continue;
    const style = getComputedStyle(e), svg = e instanceof SVGElement;
    const color = rgba(svg ? style.fill : style.color);
    if (svg) color[3] = (color[3] ?? 1) * Number(style.fillOpacity);
    const behind = ground(svg ? e.closest('div') : e);
    const [a, b] = [light(over(color, behind)), light(behind)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 3) faint.push(`${text.slice(0, 30)} ${ratio.toFixed(2)}`);
}
const main = document.querySelector('[data-testid=stMain]');
const charts = [...document.querySelectorAll('[data-testid=stPlotlyChart]')];
return { faint,
    ground: ground(main),
    beyond: main.scrollWidth - main.clientWidth,
    silent: charts.filter(c => !(c.getAttribute('aria-label') || '').trim()).length,
    bottom: charts.length ? charts[0].getBoundingClientRect().bottom : 0,
    unreachable: [...main.querySelectorAll('button, a[href], input, textarea, [role=slider]')]
        .filter(e => e.tabIndex < 0 && e.checkVisibility() && !e.disabled
            && !(e.dataset.testid || '').startsWith('stNumberInputStep')  // arrow keys do it
            && !e.closest('[role=radiogroup], [role=group], [role=tablist], [role=grid]'))
        .map(e => e.outerHTML.slice(0, 90)) };
"""


@pytest.fixture(scope="module")
def server(populated_server: Server) -> Server:
    return populated_server


@pytest.mark.parametrize(
    "view",
    [pytest.param(v, marks=needs_reference) if v.startswith("published") else v for v in VIEWS],
)
def test_view_contrast_keyboard_and_width(user, view):
    """One visit: light, then dark, then narrow."""
    address, number = VIEWS[view]
    emulate_display(user, "light", 1440)
    user.open(address)
    user.wait(lambda: user.first_line and user.is_idle(), 60, "no first line")
    user.wait(lambda: len(user.figures) >= number and all(user.figures), why="no chart")
    user.wait(user.is_idle)
    report = accessibility_report(user)
    assert sum(report["ground"]) > 700, "it is light"
    assert report["bottom"] <= 900 or view == "plan", "the first chart is below the first view"
    assert not report["silent"], "charts without an alternative text"
    assert not report["unreachable"], "out of a keyboard's reach"
    assert not user.all("[data-testid=stException], [data-testid=stAlertContentError]")
    emulate_display(user, "dark", 1440)
    user.wait(lambda: sum(accessibility_report(user)["ground"]) < 100, why="it never got dark")
    emulate_display(user, "dark", 1024)
    user.wait(lambda: accessibility_report(user)["beyond"] <= 0, 10, "wider than 1024 pixels")


def emulate_display(user: User, scheme: str, width: int) -> None:
    user.driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
    )
    user.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    )


def accessibility_report(user: User) -> dict:
    """Return the page's report once no text is too faint."""
    return user.wait(
        lambda: (report := user.driver.execute_script(_LOOK)) and not report["faint"] and report,
        10,
        f"too faint: {user.driver.execute_script(_LOOK)['faint']}",
    )
