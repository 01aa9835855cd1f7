"""The Plan page's request, and the measurements that its method still lacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lsq_core import disk, jobs
from lsq_core.bits import EXTENDED, GROUP_SIZES
from lsq_core.errors import InputError
from lsq_core.evaluation.prediction import (
    Predictor,
)
from lsq_core.jobs import arguments
from lsq_core.model.info import ModelInfo
from lsq_core.planning.methods import PLANNERS, get_planner, ladder_of, mixes_rows
from lsq_core.planning.problem import Impact, Problem
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.metrics import METRICS
from lsq_core.profiling.profile import Profile
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.stages.plan import required_metrics
from lsq_core.ui import cached, cached_plans, cached_results, jobs_panel, state, words
from lsq_core.ui.page import PageContext, headline, next_step
from lsq_core.ui.plan.budget import feasible
from lsq_core.ui.safe import st


@dataclass(frozen=True, eq=False)
class PlanQuery:
    """The page's inputs: the model, its profile, and the request with its settings."""

    ctx: PageContext
    info: ModelInfo
    profile: Profile | None
    settings: ProfileSettings
    request: PlanRequest

    @property
    def problem(self) -> Problem:
        """The planning problem, not yet restricted by pins, ties or server."""
        return cached_plans.problem_with(
            self.info, self.profile, self.request, self.extra_measurements
        )

    @property
    def extra_measurements(self) -> cached_plans.ExtraMeasurements | None:
        """The method's measurements besides the profile; None if they are missing or not needed."""
        ctx = self.ctx
        return cached_plans.extra_measurements(
            ctx.store, self.info, self.settings, self.request, ctx.device
        )

    @property
    def rows(self) -> Impact | None:
        """The model's row measurements, if the method uses them and they exist."""
        return self.extra_measurements if isinstance(self.extra_measurements, Impact) else None

    @property
    def predictor(self) -> Predictor | str:
        """A predictor of perplexity fitted to the runs so far, or why there is none."""
        args = self.ctx.store, self.info, self.profile, self.settings
        return cached_results.predictor(*args, st.session_state["predict_on"])

    @property
    def prediction_curve(self) -> cached_results.PredictionCurve | None:
        """Predicted perplexity by budget; None for mixed rows or without a predictor."""
        if mixes_rows(self.request.method):
            return None
        args = self.ctx.store, self.info, self.profile, self.request, self.settings
        return cached_results.prediction_curve(*args, st.session_state["predict_on"])

    def with_method(self, method: str) -> PlanQuery:
        """Return the query for another method; a base is dropped if the method has none."""
        request, base = state.request_for_method(method), self.request.base
        base = base if get_planner(method).has_base else None
        ladder = ladder_of(method, self.request.ladder)
        size = {"base": base, "budget": self.request.budget}
        return replace(self, request=replace(request, ladder=ladder, **size))

    def without_ties(self) -> PlanQuery:
        """Return the query without ties and server."""
        return replace(self, request=self.request.without_ties())


# --- the first line -------------------------------------------------------------------------


def available_methods(info: ModelInfo, profile: Profile | None) -> list[str]:
    """Return the methods offered; for a published model, those that its measurements allow."""
    if not cached.is_published(info):
        return list(PLANNERS)
    lacking = cached_plans.unavailable_methods(info, cached_plans.problem(info, profile))
    return [name for name in PLANNERS if name not in lacking]


def missing_metrics(query: PlanQuery) -> list[str]:
    """Return the metrics or row measurements that the method needs and are missing."""
    if mixes_rows(query.request.method):
        return missing_rows(query)
    metrics = query.profile.metrics if query.profile else ()
    return [name for name in required_metrics(query.request) if name not in metrics]


def missing_rows(query: PlanQuery) -> list[str]:
    """Return the measurements that a mixed-row plan needs and the store doesn't have."""
    if query.rows is None:
        return ["row scores"]
    measured_runs = [block for block in query.rows.blocks if block.matrix is not None]
    whole = query.request.ratios == "uniform" or len(measured_runs) == len(query.rows.blocks)
    return [] if whole else ["interactions"]


def render_missing_metrics(query: PlanQuery, missing: Sequence[str]) -> None:
    """Explain which metrics the method lacks and offer to measure them."""
    if mixes_rows(query.request.method):
        render_missing_rows(query)
        return
    planner, settings = get_planner(query.request.method), query.settings
    titles = words.listed([METRICS[name].label for name in missing])
    notes = [METRICS[name].cost_note(query.info, settings.block_tokens) for name in missing]
    on_ladder = " on the extended ladder" if settings.ladder == EXTENDED else ""
    sentences = [
        f"With {settings.calibration}, {settings.quantizer}, axis {settings.axis} and "
        f"{settings.metadata} metadata{on_ladder} it has not been measured yet.",
        "Uniform needs none; a run, on the Run page, measures what is missing first.",
        *filter(None, notes),
    ]
    name = words.escape(query.ctx.source.name)
    headline(f"{planner.title} needs the {titles} of {name}.", words.escape(" ".join(sentences)))
    offer_profile_with(query, required_metrics(query.request))
    if query.profile is None:
        next_step("pages/1_Explore.py", "Profile it on the Explore page")
        return
    folder = disk.jobs_folder(query.ctx.store)
    argv = ["profile", *arguments.model_arguments(query.ctx.source, query.ctx.device)]
    argv += arguments.profile_arguments(settings)
    argv += [word for name in missing for word in ("--metric", name)]
    argv += ["--db", str(query.ctx.store.path)]
    measure_in_background(folder, argv, f"Measure the {titles}")


def offer_profile_with(query: PlanQuery, metrics: Sequence[str]) -> None:
    """Show a button to switch to another profile of the model that has all ``metrics``, if any."""
    other = cached.settings_with(query.ctx.store, query.info, metrics)
    if (
        other is None
        or cached.profile(query.ctx.store, query.info, other, query.ctx.device) is None
    ):
        return
    st.button(
        f"Use the profile on {other.calibration} with {words.plural(other.samples, 'sample')}",
        type="primary",
        icon=":material/swap_horiz:",
        key="other-profile",
        on_click=state.set_settings,
        args=(other,),
    )


def measure_in_background(folder: Path, argv: list[str], label: str) -> None:
    """Show a button that starts a job, and the job's progress if it is active or has failed."""
    job = jobs_panel.find(folder, argv)
    if job is not None and job.active:
        jobs_panel.follow(job)
    elif st.button(label, type="primary", icon=":material/play_arrow:"):
        jobs.start(folder, argv)
        st.rerun()
    if job is not None and not job.active and job.state != "done":
        jobs_panel.follow(job)


def _offer_group_size(query: PlanQuery) -> None:
    """Show a button for the largest group size that divides the rows of every matrix, if any."""
    sizes = (s for s in GROUP_SIZES if all(m.in_features % s == 0 for m in query.info.matrices))
    size = next(sizes, None)
    if size is not None:
        st.button(
            f"Use groups of {size}",
            type="primary",
            on_click=state.set_values,
            args=({"group_size": size},),
        )


def render_missing_rows(query: PlanQuery) -> None:
    """Explain which row measurements are missing and what they cost; offer to measure them."""
    request, blocks = query.request, query.rows.blocks if query.rows else ()
    try:
        low, _ = feasible(query.problem, request.method, None)
    except InputError as error:  # the group size divides no row of some matrix
        headline("No such plan.")
        st.error(words.escape(str(error)))
        _offer_group_size(query)
        return
    done = sum(block.matrix is not None for block in blocks)
    what = "row scores" if request.ratios == "uniform" else "row scores and interactions"
    so_far = f" {done} of {len(blocks)} blocks measured so far." if done else ""
    name, corpus = words.escape(query.ctx.source.name), words.escape(query.settings.calibration)
    headline(
        f"High-impact rows need the {what} of {name}.",
        f"Gradients of the loss on {corpus} rank rows. Each pair of matrices in a block is then "
        "quantized at every pair of ratios (560 measurements of the "
        f"{request.loss} loss for a block of seven). Results are stored after each block, so an "
        f"interrupted measurement resumes.{so_far}",
    )
    argv = ["plan", *arguments.model_arguments(query.ctx.source, query.ctx.device)]
    smallest = replace(request, budget=state.budget_text(low), pins=())  # any feasible budget
    argv += arguments.plan_arguments(smallest, query.settings)
    argv += ["--db", str(query.ctx.store.path)]
    measure_in_background(disk.jobs_folder(query.ctx.store), argv, f"Measure the {what}")
