"""The profile shown on the Explore page: selection, measurement and progress."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from streamlit.delta_generator import DeltaGenerator

from lsq_core import disk, jobs
from lsq_core.bits import LADDERS, METADATA_FORMATS
from lsq_core.corpus.registry import BUILT_IN_CORPORA
from lsq_core.jobs import Job, arguments
from lsq_core.model.info import ModelInfo
from lsq_core.planning.problem import Problem
from lsq_core.profiling.metrics import weight_metrics
from lsq_core.profiling.profile import Profile, missing_metrics
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.quantization.registry import MATRIX_QUANTIZERS, incompatibility_reason
from lsq_core.store.store import Store
from lsq_core.ui import cached, cached_plans, jobs_panel, state, words
from lsq_core.ui.page import PageContext, headline
from lsq_core.ui.safe import st


@dataclass(frozen=True, eq=False)
class ExploreView:
    """The context of a view: the model, its profile, and where to draw.

    ``header`` holds the headline, ``row`` the view's own controls. While the profile is incomplete,
    the headline is about measuring it and the view's own text comes below.
    """

    ctx: PageContext
    info: ModelInfo
    settings: ProfileSettings
    profile: Profile | None
    header: DeltaGenerator
    row: DeltaGenerator

    @property
    def problem(self) -> Problem:
        """The planning problem."""
        return cached_plans.problem(self.info, self.profile)

    @property
    def published(self) -> bool:
        """Whether the model has only published measurements, without weights."""
        return cached.is_published(self.info)

    @property
    def lacking(self) -> list[str]:
        """The default metrics that a measured profile still lacks."""
        return [] if self.published else missing_metrics(self.profile)

    def render_headline(self, text: str, caption: str = "") -> None:
        """Render the view's main statement, and the reason as a caption."""
        with self.header:
            if self.profile is not None and self.lacking:
                st.markdown(f"**{words.escape(text)}**")
                st.caption(caption)
            else:
                headline(text, caption)


# --- selection ------------------------------------------------------------------------------


def profile_bar(store: Store, info: ModelInfo) -> ProfileSettings:
    """Render the controls of the profile's settings and return the settings."""
    return published_bar(store, info) if cached.is_published(info) else settings_bar()


_HELP = {
    "ladder": "The configurations that are measured: the papers' 2, 3, 4 and 8 bits, or also 1, 5 "
    "and 6 bits."
}


def settings_bar() -> ProfileSettings:
    """Render the settings of a profile in a row and return them."""
    columns = st.columns([2, 1.1, 1.1, 1.1, 1.1, 0.8], vertical_alignment="bottom")
    with columns[0]:
        text = st.session_state["calibration"]
        st.selectbox(
            "Calibration corpus",
            list(dict.fromkeys([*BUILT_IN_CORPORA, text])),
            key="calibration",
            accept_new_options=True,
            persist_state="session",
            help="\n".join(
                f"- **{name}**: {description}" for name, description in BUILT_IN_CORPORA.items()
            )
            + "\n- **hf:org/name**, or the path of a text file",
        )
    chosen = [
        ("Quantizer", "profile_quantizer", list(MATRIX_QUANTIZERS)),
        ("Grouping axis", "axis", [1, 0]),
        ("Metadata", "metadata", list(METADATA_FORMATS)),
        ("Ladder", "ladder", list(LADDERS)),
    ]
    for column, (label, key, options) in zip(columns[1:], chosen, strict=False):
        column.selectbox(label, options, key=key, persist_state="session", help=_HELP.get(key))
    with columns[5], st.popover("More", width="stretch"):
        st.number_input("Calibration samples", 1, 4096, key="samples", persist_state="session")
        st.number_input(
            "Tokens per sample block", 16, 8192, key="block_tokens", persist_state="session"
        )
    return state.settings()


def published_bar(store: Store, info: ModelInfo) -> ProfileSettings:
    """Render a choice among a published model's profiles and return the chosen settings."""
    choices = list(cached.published_settings(store, info))
    texts = list(dict.fromkeys(settings.calibration for settings in choices))
    if state.settings() not in choices:
        state.set_settings(choices[0])
    columns = st.columns([2, 1.2, 3.2], vertical_alignment="bottom")
    with columns[0]:
        text = st.selectbox(
            "Calibration corpus",
            texts,
            key="calibration",
            format_func=_published_text,
            on_change=_choose_first_quantizer,
            args=(choices,),
            persist_state="session",
        )
    with columns[1]:
        st.selectbox(
            "Quantizer",
            [settings.quantizer for settings in choices if settings.calibration == text],
            key="profile_quantizer",
            persist_state="session",
        )
    columns[2].caption(
        f"{words.plural(len(choices), 'published profile')}; grouped along axis {choices[0].axis}, "
        f"{choices[0].metadata.replace('bit', '-bit')} metadata."
    )
    return state.settings()


def _published_text(name: str) -> str:
    """Name a published corpus; after ``@`` is the file that disagrees with the reference."""
    text, _, file = name.partition("@")
    return f"{text}, by {file}.csv" if file else text


def _choose_first_quantizer(choices: list[ProfileSettings]) -> None:
    """If the chosen corpus has no profile with the chosen quantizer, choose one that it has."""
    if state.settings() not in choices:
        text = st.session_state["calibration"]
        state.set_settings(next(s for s in choices if s.calibration == text))


# --- measurement ----------------------------------------------------------------------------


def follow(view: ExploreView) -> None:
    """Show the progress of measuring an incomplete profile, or a button that starts it."""
    argv = profile_argv(view)
    job = jobs_panel.find(disk.jobs_folder(view.ctx.store), argv)
    if job is not None and job.active:
        with view.header:
            jobs_panel.follow(job, partial(_render_progress_headline, view))
        return
    with view.header:
        label = _render_missing(view)
        reason = incompatibility_reason(view.settings.quantizer, {}, view.settings.axis)
        if reason:
            st.caption(words.escape(reason))
        if st.button(
            label,
            type="primary",
            icon=":material/play_arrow:",
            key="profile",
            disabled=bool(reason),
        ):
            jobs.start(disk.jobs_folder(view.ctx.store), argv)
            st.rerun()
        if job is not None and job.state != "done":
            jobs_panel.follow(job)


def profile_argv(view: ExploreView, metrics: Sequence[str] = ()) -> list[str]:
    """Return the command that measures the profile, with ``metrics`` besides the default ones."""
    argv = ["profile", *arguments.model_arguments(view.ctx.source, view.ctx.device)]
    argv += [*arguments.profile_arguments(view.settings), "--db", str(view.ctx.store.path)]
    return argv + [word for metric in metrics for word in ("--metric", metric)]


def _render_progress_headline(view: ExploreView, job: Job) -> None:
    """Render the headline while a job measures; redraw the page when a metric is finished."""
    current = cached.profile(view.ctx.store, view.info, view.settings, view.ctx.device)
    if missing_metrics(current) != view.lacking:
        st.rerun(scope="app")
    share = f", {100 * job.fraction:.0f} %" if job.total > 1 else ""
    left = f"; about {words.seconds(job.eta)} left" if job.eta else ""
    if view.profile is None and job.stage == "weights":
        headline(
            f"Measuring {words.metric_labels(weight_metrics())}{share}{left}.",
            "They are shown as soon as they are available; activation sensitivity follows.",
        )
        return
    if view.profile is None:
        jobs_panel.render_headline(job)
        return
    names = words.metric_labels(view.profile.metrics)
    headline(
        f"Measuring activation sensitivity{share}{left}.",
        f"{names[0].upper()}{names[1:]} are available already.",
    )


def _render_missing(view: ExploreView) -> str:
    """Render the headline of an incomplete profile; return the label of the button to measure."""
    name = view.ctx.source.name
    if view.profile is None:
        headline(
            f"{name} has not been profiled with these settings.",
            f"One pass over {view.info.layers} layers measures kurtosis, weight error and "
            f"activation sensitivity of {len(view.info.matrices)} weight matrices at "
            f"{words.plural(len(view.settings.configs), 'configuration')}.",
        )
        return "Profile"
    headline(
        f"The profile of {name} is incomplete.",
        f"It lacks {words.metric_labels(view.lacking)}: measuring was interrupted. "
        "Existing scores are kept; only the rest will be measured.",
    )
    return "Measure the rest"
