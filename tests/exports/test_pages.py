"""Menus that export a plan in another tool's format, on the Plan page and for a run."""

from __future__ import annotations

import pytest
from streamlit.testing.v1 import AppTest

from lsq_core.exports.registry import export_plan
from lsq_core.planning.request import PlanRequest
from lsq_core.session import Session
from lsq_core.store.store import Store
from tests.test_app import Filled, filled, filled_once, open_page  # noqa: F401 - fixtures

PLAN_TARGET = "export-plan-target"


def opened_target(app: AppTest):
    """Return the export menu of the run that is open on the Compare page."""
    return next(
        box
        for box in app.selectbox
        if (box.key or "").startswith("export-run-") and box.key.endswith("-target")
    )


def usage(app: AppTest) -> str:
    """Return the usage lines: the last code block that is not the ``lsq tasks`` command."""
    return [c.value for c in app.code if not c.value.startswith("lsq tasks")][-1]


def test_plan_page_gives_the_file(filled: Filled):  # noqa: F811
    app = open_page("Plan", model=filled.model, method="uniform", ask="base", base="4.25")
    assert not [b for b in app.get("download_button") if "export" in (b.proto.id or "")]
    app.selectbox(key=PLAN_TARGET).set_value("mlx").run()
    assert not app.exception
    assert not app.checkbox or not any("export-" in (c.key or "") for c in app.checkbox)
    session = Session(filled.model, Store(filled.path))
    plan = session.plan(PlanRequest("uniform", base="4.25"))
    shown = {c.value for c in app.code}
    assert export_plan(plan, session.info, "mlx").usage() in shown


@pytest.mark.parametrize("target", ["llama.cpp", "exllamav3"])
def test_plan_page_asks_before_taking_the_nearest(filled: Filled, target: str):  # noqa: F811
    app = open_page("Plan", model=filled.model, method="uniform", ask="base", base="4.25")
    app.selectbox(key=PLAN_TARGET).set_value(target).run()
    session = Session(filled.model, Store(filled.path))
    plan = session.plan(PlanRequest("uniform", base="4.25"))
    translation = export_plan(plan, session.info, target, nearest=True)
    assert translation.usage() not in {c.value for c in app.code}, "nothing is given unasked"
    (table,) = [d for d in app.dataframe if "reason" in d.value]
    assert table.value["modules"].tolist() == [len(c.modules) for c in translation.changes]
    app.checkbox(key=f"export-plan-nearest-{target}").check().run()
    assert translation.usage() in {c.value for c in app.code}


def test_run_gives_its_plan(filled: Filled):  # noqa: F811
    app = open_page("Compare", model=filled.model)
    menu = opened_target(app)
    run = menu.key.removeprefix("export-run-").removesuffix("-target")
    menu.set_value("gptqmodel").run()
    assert not app.exception
    store = Store(filled.path)
    content, fingerprint = store.run_plan(run)
    assert content["modules"]
    assert fingerprint == Session(filled.model, store).info.fingerprint
    assert "QuantizeConfig" in usage(app)
