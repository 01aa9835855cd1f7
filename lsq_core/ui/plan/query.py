"""What is planned for on this page, and whether its profile has what that needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lsq_core import disk, jobs
from lsq_core.errors import InputError
from lsq_core.evaluation.prediction import (
    Predictor,
)
from lsq_core.jobs import arguments
from lsq_core.model.info import ModelInfo
from lsq_core.planning.methods import PLANNERS, get_planner
from lsq_core.planning.problem import Impact, Problem
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.metrics import TITLES
from lsq_core.profiling.profile import Profile
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.ui import cached, jobs_panel, state, words
from lsq_core.ui.page import Here, headline, next_step
from lsq_core.ui.plan.controls import feasible
from lsq_core.ui.safe import st


@dataclass(frozen=True, eq=False)
class Asked:
    """What the page was asked: the model, its profile, and the request with its settings."""

    here: Here
    info: ModelInfo
    found: Profile | None
    settings: ProfileSettings
    request: PlanRequest

    @property
    def problem(self) -> Problem:
        """What planners see, without pins."""
        return cached.problem_of_rows(self.info, self.found, self.request, self.rows)

    @property
    def rows(self) -> Impact | None:
        """What is known of the model's rows, where the method reads that."""
        here = self.here
        return cached.impact(here.store, self.info, self.settings, self.request, here.device)

    @property
    def predictor(self) -> Predictor | str:
        """What the runs so far tell, or why they don't."""
        here = self.here.store, self.info, self.found, self.settings
        return cached.predictor(*here, st.session_state["predict_on"])

    @property
    def along(self) -> cached.Along | None:
        """What is predicted at every budget; nothing of mixed rows."""
        if state.reads_rows(self.request.method):
            return None
        here = self.here.store, self.info, self.found, self.request, self.settings
        return cached.along(*here, st.session_state["predict_on"])

    def by(self, method: str) -> Asked:
        """The same base and budget by another method; one without bases is given the budget."""
        request, base = state.request_of(method), self.request.base
        base = base if get_planner(method).has_base else None
        return replace(self, request=replace(request, base=base, budget=self.request.budget))


# --- the first line -------------------------------------------------------------------------


def offered(info: ModelInfo, found: Profile | None) -> list[str]:
    """The methods to choose from: of a published model those that its measurements allow."""
    if not cached.is_published(info):
        return list(PLANNERS)
    lacking = cached.cannot_plan(info, cached.problem(info, found))
    return [name for name in PLANNERS if name not in lacking]


def missing_metrics(asked: Asked) -> list[str]:
    """What the method reads and the profile doesn't hold."""
    if state.reads_rows(asked.request.method):
        return missing_rows(asked)
    held = asked.found.metrics if asked.found else ()
    return [name for name in get_planner(asked.request.method).metrics if name not in held]


def missing_rows(asked: Asked) -> list[str]:
    """What a plan of mixed rows needs and the store doesn't have."""
    if asked.rows is None:
        return ["row scores"]
    measured = [block for block in asked.rows.blocks if block.matrix is not None]
    whole = asked.request.ratios == "uniform" or len(measured) == len(asked.rows.blocks)
    return [] if whole else ["interactions"]


def say_what_is_missing(asked: Asked, missing: Sequence[str]) -> None:
    """A method whose metrics haven't been measured, and the way to measure them."""
    if state.reads_rows(asked.request.method):
        say_what_rows_need(asked)
        return
    planner, settings = get_planner(asked.request.method), asked.settings
    titles = words.listed([TITLES[name].title.lower() for name in missing])
    headline(
        f"{planner.title} needs the {titles} of {asked.here.source.name}.",
        f"With {settings.calibration}, {settings.quantizer}, axis {settings.axis} and "
        f"{settings.metadata} metadata it hasn't been measured yet. Uniform needs none; a run, on "
        "the Run page, measures what is missing first.",
    )
    if asked.found is None:
        next_step("pages/1_Explore.py", "Profile it on the Explore page")
        return
    folder = disk.jobs_folder(asked.here.store)
    order = ["profile", *arguments.model_arguments(asked.here.source, asked.here.device)]
    order += arguments.profile_arguments(settings)
    order += [word for name in missing for word in ("--metric", name)]
    order += ["--db", str(asked.here.store.path)]
    measure_by_a_job(folder, order, f"Measure the {titles}")


def measure_by_a_job(folder: Path, order: list[str], label: str) -> None:
    """A button that starts a job, and the job where there is one."""
    job = jobs_panel.find(folder, order)
    if job is not None and job.active:
        jobs_panel.follow(job)
    elif st.button(label, type="primary", icon=":material/play_arrow:"):
        jobs.start(folder, order)
        st.rerun()
    if job is not None and not job.active and job.state != "done":
        jobs_panel.follow(job)


def say_what_rows_need(asked: Asked) -> None:
    """What mixed rows are planned from, how dear it is, and a button to measure it."""
    request, blocks = asked.request, asked.rows.blocks if asked.rows else ()
    try:
        low, _ = feasible(asked.problem, request.method, None)
    except InputError as error:  # groups of this size fill no row of some matrix
        headline("There is no such plan.")
        st.error(words.literal(str(error)))
        return
    done = sum(block.matrix is not None for block in blocks)
    what = "row scores" if request.ratios == "uniform" else "row scores and interactions"
    so_far = f" {done} of {len(blocks)} blocks are measured so far." if done else ""
    headline(
        f"High-impact rows need the {what} of {asked.here.source.name}.",
        f"Gradients of the loss on {asked.settings.calibration} rank the rows; each two matrices "
        "of a block are then rounded at each two ratios, 560 times for a block of seven, by the "
        f"{request.loss} loss. It is kept block by block and goes on where it was cut off.{so_far}",
    )
    order = ["plan", *arguments.model_arguments(asked.here.source, asked.here.device)]
    smallest = replace(request, budget=state.budget_text(low), pins=())  # any that is in reach
    order += arguments.plan_arguments(smallest, asked.settings)
    order += ["--db", str(asked.here.store.path)]
    measure_by_a_job(disk.jobs_folder(asked.here.store), order, f"Measure the {what}")
