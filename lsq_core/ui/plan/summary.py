"""A plan in figures: headline, its size by each measure, and the matrices it promotes."""

from __future__ import annotations

import numpy as np
import pandas as pd

from lsq_core.bits import get_ladder
from lsq_core.errors import LsqError
from lsq_core.evaluation.prediction import (
    Predictor,
    features,
    is_comparable,
)
from lsq_core.planning.methods import reads_field
from lsq_core.planning.methods.uniform import uniform_within
from lsq_core.planning.plan import Plan
from lsq_core.planning.problem import Problem
from lsq_core.ui import cached_plans, words
from lsq_core.ui.page import headline
from lsq_core.ui.plan.prediction import (
    describe_gap,
    describe_prediction_basis,
    format_band,
)
from lsq_core.ui.plan.query import PlanQuery
from lsq_core.ui.safe import st
from lsq_core.units import format_bytes

#: Above this many nats, the sum of expected KL divergences underestimates the true divergence.
MAX_EXPECTED_KL = 1.0


def render_summary(query: PlanQuery, plan: Plan) -> None:
    """Show the headline: bits and prediction, against the largest uniform plan within them."""
    caption = [
        "Bits per parameter of the linear layers, metadata included.",
        *plan.notes,
        describe_gap(plan),
    ]
    if plan.rows:
        headline(f"{plan.bits_per_param:.2f} bits: {describe_rows(plan)}.", " ".join(caption))
        return
    reference = uniform_within(plan.bits_per_param, get_ladder(plan.request.ladder))
    extra = plan.bits_per_param / reference.nominal_bits - 1
    size, against = format_bytes(plan.planned_bytes), f"uniform {reference.stop_name}"
    alike, predictor = len(set(plan.configs)) == 1, query.predictor
    if isinstance(predictor, str):
        text = f"{size} planned, " + (
            "the same configuration everywhere"
            if alike
            else f"{_more_or_less(extra, 'more', 'less')} memory than {against}"
        )
        caption.insert(1, describe_expected_kl(query.problem, plan))
    else:
        stops = np.array([[query.problem.options.index(c) for c in plan.configs]])
        uniform = np.full_like(stops, query.problem.options.index(reference))
        predicted = predictor.predict(features(query.problem, np.concatenate([stops, uniform])))
        text = f"perplexity {format_band(predicted)} predicted, {size}"
        if not alike and not is_comparable(predicted.band(0), predicted.band(1)):
            text += f", {_more_or_less(extra, 'more', 'less')} memory than {against}"
        elif not alike:
            change = predicted.perplexity[0] / predicted.perplexity[1] - 1
            text = (
                f"perplexity {format_band(predicted)} predicted, "
                f"{_more_or_less(change, 'higher', 'lower')} for "
                f"{_more_or_less(extra, 'more', 'less')} memory than {against}"
            )
        basis = describe_prediction_basis(predictor, bool(predicted.extrapolated[0]))
        caption.insert(1, words.escape(basis))
        caption.append(describe_free_plan(query, predictor))
    caption += map(words.escape, query.info.notes)
    headline(f"{plan.bits_per_param:.2f} bits: {text}.", " ".join(filter(None, caption)))


def describe_expected_kl(problem: Problem, plan: Plan) -> str:
    """Describe the KL divergence expected from the profile before any run; '' if it has none.

    Also '' for a refined plan, whose notes report the measured divergence.
    """
    if "expected_kl" not in problem.by_config or problem.refinement is not None:
        return ""
    stops = np.array([[problem.options.index(c) for c in plan.configs]])
    divergence = float(np.exp(features(problem, stops)[0, 0]))
    if divergence > MAX_EXPECTED_KL:
        return f"A KL divergence of more than {MAX_EXPECTED_KL:.0f} nat a token is expected."
    return (
        f"A KL divergence of about {divergence:.2g} nats a token is expected, which is a "
        f"perplexity about {100 * np.expm1(divergence):.2g} % above full precision's."
    )


def describe_free_plan(query: PlanQuery, predictor: Predictor) -> str:
    """Describe the prediction for the plan without ties and server; '' if there are none."""
    if not query.request.has_ties:
        return ""
    free = query.without_ties()
    try:
        plan = cached_plans.plan(free.info, free.profile, free.request, free.settings)
    except LsqError as error:
        return words.escape(f"Without {query.request.ties_name}: {error}")
    stops = np.array([[query.problem.options.index(c) for c in plan.configs]])
    predicted = predictor.predict(features(query.problem, stops))
    return (
        f"Without {query.request.ties_name}, {format_band(predicted)} is predicted at "
        f"{plan.bits_per_param:.2f} bits."
    )


def _more_or_less(change: float, more: str, less: str) -> str:
    """Format ``0.018`` as ``1.8 % more``."""
    return f"{100 * abs(change):.1f} % {less if change < 0 else more}"


def describe_rows(plan: Plan) -> str:
    """Describe the share of high-impact rows and the size: ``9 % of the rows at 3 bits, 9 MiB``."""
    high = sum(len(rows) for rows in plan.rows.values())
    share = high / sum(m.out_features for m in plan.matrices)
    width = plan.request.high_bits
    base = plan.configs[0].low
    extra = plan.bits_per_param / base.nominal_bits - 1
    return (
        f"{100 * share:.0f} % of the rows at {width} bits, {format_bytes(plan.planned_bytes)} "
        f"planned, {_more_or_less(extra, 'more', 'less')} memory than uniform {base.stop_name}"
    )


# --- its sizes ------------------------------------------------------------------------------


def show_sizes(plan: Plan) -> None:
    """Show the plan's size by each measure."""
    accounts = [
        ("Nominal", format_bytes(plan.nominal_bytes), f"{plan.bits_per_param:.4f} bits",
         "The papers' formula, which budgets in bits per parameter refer to."),
        ("Planned", format_bytes(plan.planned_bytes), f"{plan.metadata} metadata",
         "Exact size of the linear weights as packed by this project."),
        ("Whole model", format_bytes(plan.model_bytes) if plan.other_bytes else "unknown",
         "everything included" if plan.other_bytes else "the rest was not published",
         "Planned bytes plus embeddings, norms and LM head in the checkpoint's precision."),
        ("Weight-only", f"{plan.weight_only_bits:.4f} bits", "codes only",
         "Bits per parameter without any metadata."),
        ("fp16 metadata", f"{plan.bits_with_fp16_metadata:.4f} bits", "as in hqq",
         "Bits per parameter with scale and zero point in fp16."),
    ]  # fmt: skip
    for column, (label, value, caption, summary) in zip(
        st.columns(len(accounts)), accounts, strict=True
    ):
        column.metric(label, value, caption, delta_color="off", delta_arrow="off", help=summary)


def show_flagged(plan: Plan) -> None:
    """Show the matrices promoted above the base, strongest first."""
    if not plan.ranking_scores:
        return
    configs = {m.name: c for m, c in plan.choice.items()}
    rank_column = "draw" if reads_field(plan.method, "seed") else "z"
    with st.expander(f"{len(plan.ranking_scores)} matrices promoted above the base"):
        st.dataframe(
            pd.DataFrame(
                {
                    "module": list(plan.ranking_scores),
                    rank_column: list(plan.ranking_scores.values()),
                    "configuration": [configs[name].name for name in plan.ranking_scores],
                    "bits": [configs[name].nominal_bits for name in plan.ranking_scores],
                }
            ),
            column_config={
                rank_column: st.column_config.NumberColumn(format="%.2f"),
                "bits": st.column_config.NumberColumn(format="%.2f"),
            },
            hide_index=True,
        )
