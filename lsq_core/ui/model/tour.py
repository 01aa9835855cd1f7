"""A tour in five steps, each with a question, its answer for the model, and a link to a page."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pandas as pd

from lsq_core import charts
from lsq_core.bits import DETECTION_CONFIG
from lsq_core.errors import InputError
from lsq_core.model.info import ModelInfo
from lsq_core.planning.methods.boost import detect_by_type
from lsq_core.planning.problem import Problem
from lsq_core.planning.ranking import TOP_LAYERS, flagged_by_direction, rank_layers
from lsq_core.profiling.profile import Profile
from lsq_core.results.story import BoostGain, boost_gain
from lsq_core.ui import cached, cached_plans, cached_results, state, words
from lsq_core.ui.page import PageContext
from lsq_core.ui.safe import st

#: Columns that must agree for runs to belong to one measurement.
_MEASUREMENT = ["corpus_sha256", "protocol", "tokens"]


@dataclass(frozen=True)
class Step:
    """One step, with the page it leads to and the session state to set for it."""

    question: str
    answer: str
    page: str
    state: dict[str, object] = field(default_factory=dict)


def make_tour(ctx: PageContext, info: ModelInfo) -> list[Step]:
    """Return the steps for a model: none without a profile, fewer without runs."""
    profile = shown_profile(ctx, info)
    if profile is None:
        return []
    problem = cached_plans.problem(info, profile)
    steps = _sensitivity_steps(problem)
    runs = main_measurement(ctx, info)
    gain = boost_gain(runs) if runs is not None else None
    return steps + (_gain_steps(gain) if gain is not None else [])


def shown_profile(ctx: PageContext, info: ModelInfo) -> Profile | None:
    """Return the profile that Explore shows first; None if missing or its corpus is unavailable."""
    settings = cached.newest_settings(ctx.store, info)
    if settings is None:
        return None
    try:
        return cached.profile(ctx.store, info, settings, ctx.device)
    except InputError:
        return None


def main_measurement(ctx: PageContext, info: ModelInfo) -> pd.DataFrame | None:
    """Return the runs of the model's measurement with the most runs, or None."""
    origin = "published" if cached.is_published(info) else "measured"
    runs = cached_results.results(ctx.store, origin)
    runs = runs[runs["fingerprint"] == info.fingerprint]
    groups = [group for _, group in runs.groupby(_MEASUREMENT, dropna=False)]
    return max(groups, key=len) if groups else None


def _sensitivity_steps(problem: Problem) -> list[Step]:
    metric = next((name for name in ("sensitivity", "kurtosis") if name in problem.scores), None)
    if metric is None:
        return []
    label = words.metric_labels([metric])
    scores = pd.DataFrame(
        {
            "layer": [matrix.layer for matrix in problem.matrices],
            "type": [matrix.type for matrix in problem.matrices],
            "value": problem.scores[metric],
        }
    )
    top = rank_layers(scores)["layer"].tolist()[:TOP_LAYERS]
    flagged = flagged_by_direction(detect_by_type(problem, metric, 0))
    jumps = (
        f"It finds jumps at {words.name_layers(flagged.jumps).lower()}."
        if flagged.jumps
        else "It finds no jump in this model."
    )
    return [
        Step(
            "Which layers are sensitive?",
            f"{words.name_layers(top)}, by {label} at {DETECTION_CONFIG.name}.",
            "pages/1_Explore.py",
            {"see": "layers", "layers_view": metric},
        ),
        Step(
            "What does Algorithm 1 flag?",
            f"Layers whose score differs unusually from the layer before (z > 3). {jumps}",
            "pages/1_Explore.py",
            {"see": "algorithm"},
        ),
    ]


def _gain_steps(gain: BoostGain) -> list[Step]:
    boosted, base = gain.boosted, gain.uniform["base"]
    title = charts.method_style(boosted["method"]).title
    budget = math.ceil(1e4 * boosted["bits_per_param"]) / 1e4
    chosen = {"method": boosted["method"], "ask": "budget", "budget": budget}
    compared = {"view": "bits", f"base-{boosted['fingerprint']}": base}
    steps = [
        Step(
            "What does a budget buy?",
            f"{title} gives flagged layers more bits than uniform {base}: "
            f"{boosted['bits_per_param']:.2f} bits on average. Drag the budget and watch.",
            "pages/2_Plan.py",
            chosen,
        ),
        Step(
            "What did it buy?",
            f"{100 * gain.drop:.1f} % lower perplexity for {100 * gain.extra:.1f} % more bits than "
            f"uniform {base}: {boosted['perplexity']:.2f} instead of "
            f"{gain.uniform['perplexity']:.2f}.",
            "pages/4_Compare.py",
            compared,
        ),
    ]
    if gain.ablation is None:
        return steps
    return [
        *steps,
        Step(
            "Was it luck?",
            "The ablation gives the same bits to layers drawn at random: "
            f"{gain.ablation['perplexity']:.2f}, {words.signed_percent(-gain.ablation_drop)} "
            f"against uniform {base}.",
            "pages/4_Compare.py",
            compared,
        ),
    ]


def render_tour(steps: list[Step]) -> None:
    """Render the steps as links, each with its answer below."""
    st.subheader("In five steps" if len(steps) == 5 else "First steps", anchor=False)
    for number, step in enumerate(steps, start=1):
        with st.container(gap=None):
            if st.button(
                f"{number}. {step.question}",
                key=f"tour-{number}",
                type="tertiary",
                icon=":material/arrow_forward:",
                icon_position="right",
                on_click=state.set_values,
                args=(step.state,),
            ):
                st.switch_page(step.page)
            st.caption(step.answer)
