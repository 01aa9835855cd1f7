"""Result cards show the stored figures, as an image and as a page that fetches nothing."""

from __future__ import annotations

import re
from io import BytesIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageColor

from lsq_core.bits import parse_config
from lsq_core.charts import config_color
from lsq_core.cli.program import main
from lsq_core.errors import InputError
from lsq_core.planning.frame import plan_to_frame
from lsq_core.results import card, card_drawing, card_layout
from lsq_core.store.store import Store
from tests.browser.conftest import open_browser
from tests.test_compare import insert_synthetic_runs

#: An evaluation of MXQ at 2.25 bits and one of uniform at 2.13.
PLANNED, UNIFORM = "000000000001", "000000000000"


@pytest.fixture
def store() -> Store:
    store = Store()
    insert_synthetic_runs(store, 24)
    return store


def figures(shown: card_layout.Card) -> dict[str, str]:
    return {figure.label: figure.value for figure in shown.figures}


def test_card_has_the_figures_of_the_store(store):
    runs = store.results().set_index("evaluation")
    own = runs.loc[PLANNED]
    uniform = runs[runs["method"] == "uniform"]
    distance = (uniform["measured_bytes"] / own["measured_bytes"]).map(lambda r: max(r, 1 / r))
    nearest = uniform.loc[distance.idxmin()]
    shown = card.run_card(store, PLANNED)
    values = figures(shown)
    assert values["Perplexity"] == f"{own['perplexity']:.2f}"
    assert values["Linear weights"] == f"{own['measured_bytes'] / 2**20:.2f} MiB"
    change = 100 * (own["perplexity"] / nearest["perplexity"] - 1)
    label = f"Perplexity against uniform {nearest['bits_per_param']:.2f}"
    assert values[label].replace("−", "-") == f"{change:+.1f}\u00a0%"
    assert f"{abs(change):.1f}\u00a0%" in shown.headline
    assert own["fingerprint"][:12] in shown.mark
    assert own["run"] in shown.mark
    assert len(shown.plan) == len(store.model(own["fingerprint"]).matrices)


def test_uniform_run_has_no_gain(store):
    shown = card.run_card(store, UNIFORM)
    assert not [label for label in figures(shown) if "uniform" in label]
    assert f"{store.results().set_index('evaluation').loc[UNIFORM, 'perplexity']:.2f}" in (
        shown.headline
    )


def test_broken_model_is_called_unusable(store):
    with store.transaction() as connection:
        connection.execute(
            "INSERT INTO evaluations BY NAME SELECT * REPLACE ('full' AS id, NULL AS run, "
            "10.0 AS perplexity) FROM evaluations WHERE id = ?",
            [PLANNED],
        )
        connection.execute(
            "UPDATE evaluations SET perplexity = 45.0, full_precision = 'full' WHERE id = ?",
            [PLANNED],
        )
    shown = card.run_card(store, PLANNED)
    assert "unusable" in shown.headline
    assert "4.5" in shown.headline
    assert not [label for label in figures(shown) if "uniform" in label]


def test_plan_that_was_not_published_is_no_error(store):
    with store.transaction() as connection:
        connection.execute("UPDATE plans SET content = '{}' WHERE id = ?", [PLANNED])
    assert Image.open(BytesIO(card.card_png(store, PLANNED))).format == "PNG"


def test_unknown_evaluation(store):
    with pytest.raises(InputError):
        card.run_card(store, "none")


def test_png_shows_the_plan(store):
    image = Image.open(BytesIO(card.card_png(store, PLANNED))).convert("RGB")
    assert image.size == (2 * card_drawing.WIDTH, 2 * card_drawing.HEIGHT)
    plan = plan_to_frame(store.record(PLANNED)["plan"]["content"])
    boxes = [
        shape
        for shape in card_layout.lay_out(card.run_card(store, PLANNED))
        if isinstance(shape, card_drawing.Box) and shape.about.startswith("layer")
    ]
    assert len(boxes) == len(plan)
    for box in boxes:
        color = config_color(parse_config(box.about.rpartition(": ")[2]))
        centre = 2 * (box.x + box.width / 2), 2 * (box.y + box.height / 2)
        assert image.getpixel(tuple(map(round, centre))) == ImageColor.getrgb(color)


def test_every_shape_lies_within_the_card(store):
    for shape in card_layout.lay_out(card.run_card(store, PLANNED)):
        if isinstance(shape, card_drawing.Box):
            right, bottom = shape.x + shape.width, shape.y + shape.height
        else:
            right, bottom = shape.x, shape.y
            if shape.anchor == "start":
                right += card_drawing.text_width(shape.text, shape.size, shape.weight)
        assert shape.x >= 0
        assert right <= card_drawing.WIDTH, shape
        assert bottom <= card_drawing.HEIGHT, shape


def test_page_escapes_names_and_fetches_nothing(store):
    with store.transaction() as connection:
        connection.execute("UPDATE evaluations SET corpus = '<img src=x>'")
    text = card.card_html(store, PLANNED)
    assert "<img" not in text
    assert "default-src 'none'" in text
    assert re.findall(r'(?:src|href)="?(?!data:)\w+:', text) == []
    assert text.count("<title>layer") == len(
        plan_to_frame(store.record(PLANNED)["plan"]["content"])
    )
    assert store.record(PLANNED)["run"]["fingerprint"] in text


@pytest.mark.browser
def test_page_is_drawn_offline(store, tmp_path):
    path = tmp_path / "card.html"
    path.write_text(card.card_html(store, PLANNED), "utf8")
    with open_browser(tmp_path / "chromium") as driver:
        driver.get(path.as_uri())
        wide = driver.execute_script("return document.querySelector('svg').clientWidth")
        faces = driver.execute_script("return document.fonts.check('16px Card')")
        errors = [e for e in driver.get_log("browser") if e["level"] == "SEVERE"]
    assert wide > 600
    assert faces
    assert errors == []


@given(
    text=st.text(st.characters(codec="ascii", exclude_categories=["C"]), max_size=80),
    width=st.floats(40, 400),
)
def test_text_is_fitted_and_wrapped(text, width):
    assert card_drawing.text_width(card_layout.fit(text, 15, width), 15) <= width
    lines = card_layout.balance(text, 15, width)
    assert " ".join(lines).split() == text.split(" ") or " ".join(lines).split() == text.split()
    assert len(lines) <= len(card_layout.wrap(text, 15, width))


def test_cli_writes_cards(store, tmp_path, capsys):
    for kind in ("png", "html"):
        path = tmp_path / f"card.{kind}"
        assert main(["card", PLANNED, "--out", str(path)]) == 0
    assert (tmp_path / "card.png").read_bytes() == card.card_png(store, PLANNED)
    assert (tmp_path / "card.html").read_text("utf8") == card.card_html(store, PLANNED)
    capsys.readouterr()
    for wrong in (["none", "x.png"], [PLANNED, "x.svg"], [PLANNED, "card.png"]):
        assert main(["card", wrong[0], "--out", str(tmp_path / wrong[1])]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "x.png").exists()
