"""What can be done with a plan: save it, copy its command, run it."""

from __future__ import annotations

import shlex
from dataclasses import replace

from lsq_core.jobs import arguments
from lsq_core.jsontext import json_text
from lsq_core.model.info import ModelInfo
from lsq_core.planning.plan import Plan
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.profile import Profile
from lsq_core.ui import cached, state
from lsq_core.ui.page import Here
from lsq_core.ui.plan.prediction import ask_by_loss
from lsq_core.ui.plan.query import Asked
from lsq_core.ui.safe import st

# --- where it can go ------------------------------------------------------------------------


def actions(asked: Asked, plan: Plan) -> None:
    """Run it, take it along, keep it, ask the other way round, or do the same in a terminal."""
    here, info, found = asked.here, asked.info, asked.found
    with st.container(horizontal=True):
        if not cached.is_published(info) and st.button(
            "Quantize and evaluate", type="primary", icon=":material/arrow_forward:"
        ):
            st.switch_page("pages/3_Run.py")
        with st.popover("By predicted loss"):
            ask_by_loss(asked)
        st.download_button(
            "Download plan",
            lambda: plan_text(asked, plan),
            f"plan-{plan.method}-{plan.bits_per_param:.2f}.json",
            "application/json",
            on_click="ignore",
        )
        with st.popover("Save or open"):
            save(here, info, plan, found)
        with st.popover("Command line"):
            words_of = ["plan", *arguments.model_arguments(here.source, here.device)]
            words_of += [
                *arguments.plan_arguments(asked.request, asked.settings),
                "--out",
                "plan.json",
            ]
            st.code(f"lsq {shlex.join(words_of)}", language="bash", wrap_lines=True)


def plan_text(asked: Asked, plan: Plan) -> str:
    """The plan as a file."""
    content = plan.to_json() | {
        "model": asked.here.source.name,
        "fingerprint": asked.info.fingerprint,
        "profile": asked.found.id if asked.found else None,
        "covered": asked.info.covered,
    }
    return json_text(content, indent=1)


def save(here: Here, info: ModelInfo, plan: Plan, found: Profile | None) -> None:
    """Keep the plan under a name, or set the controls to one that was kept."""
    if not info.fingerprint:
        st.write("A plan can be kept once the model has been fetched; profiling or a run does.")
        return
    name = st.text_input("Name", key="plan_name").strip()
    if st.button("Save the plan", disabled=not name):
        here.store.save_plan(plan, info.fingerprint, found.id if found else None, name)
        st.success(f"Kept as '{name}'.")
    kept = cached.named_plans(here.store, info.fingerprint)
    if len(kept):
        titles = dict(zip(kept["id"], kept["name"], strict=True))
        id = st.selectbox("Kept plans", list(titles), format_func=titles.get)
        st.button("Open", on_click=open_plan, args=(here, info, id))


def open_plan(here: Here, info: ModelInfo, id: str) -> None:
    """Set the controls to what a kept plan was asked for."""
    content = here.store.plan_content(id)
    state.set_plan(PlanRequest.from_json(content["request"]), info.linear_parameters)
    grid = {"metadata": content["metadata"], "axis": content["axis"]}
    state.set_settings(replace(state.settings(), **grid))
