"""The Plan page's panels for high-impact rows: ratios, interactions and predicted loss."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd

from lsq_core import charts
from lsq_core.bits import RATIOS
from lsq_core.planning.plan import Plan
from lsq_core.planning.problem import Impact, Interactions, Problem
from lsq_core.planning.request import PlanRequest
from lsq_core.ui import cached_results, words
from lsq_core.ui.page import PageContext
from lsq_core.ui.safe import st

#: Request fields that determine which interactions a plan was made from.
_INTERACTION_FIELDS = ("loss", "low_bits", "high_bits", "group_size", "clip")


def show_rows(ctx: PageContext, problem: Problem, plan: Plan, rows: Impact) -> None:
    """Show the plan's ratios, the interactions behind them, and predicted against measured loss."""
    ratios, interactions, predicted = st.tabs(
        ["Ratios by layer", "Interactions within a block", "Predicted vs. measured"], key="rows_tab"
    )
    with ratios:
        show_ratios(plan)
    with interactions:
        show_interactions(problem, rows)
    with predicted:
        show_predicted(ctx, plan.request)


def show_ratios(plan: Plan) -> None:
    """Show the ratio of each layer and module type."""
    frame = pd.DataFrame(
        [(m.type, m.layer, c.ratio) for m, c in plan.choice.items()],
        columns=["type", "layer", "ratio"],
    )
    st.plotly_chart(charts.ratio_lines(frame), config=charts.CONFIG, key="ratio_lines")


def show_interactions(problem: Problem, rows: Impact) -> None:
    """Show the interaction matrix M of a chosen block."""
    measured = {block.layer: block for block in rows.blocks if block.matrix is not None}
    if not measured:
        st.info("Uniform ratios need no interactions; choose joint ratios to measure them.")
        return
    layer = st.select_slider("Layer", list(measured), key="rows_layer", persist_state="session")
    block = measured[layer]
    st.caption(describe_interactions(block, problem))
    units = [problem.matrices[members[0]].type for members in block.units]
    figure = charts.interaction_heatmap(block.matrix, units, RATIOS)
    st.plotly_chart(figure, config=charts.CONFIG, key="interactions")


def describe_interactions(block: Interactions, problem: Problem) -> str:
    """Describe the strongest interaction of two units, relative to their own effects."""
    tiles = block.matrix.reshape(len(block.units), len(RATIOS), len(block.units), len(RATIOS))
    names = [charts.short_type(problem.matrices[members[0]].type) for members in block.units]
    pairs = {
        (a, b): tiles[a, 0, b, 0] / ((tiles[a, 0, a, 0] * tiles[b, 0, b, 0]) ** 0.5 or 1.0)
        for a in range(len(names))
        for b in range(a)
        if tiles[a, 0, a, 0] > 0 and tiles[b, 0, b, 0] > 0
    }
    if not pairs:
        return "The matrices of this block do not interact."
    (a, b), effect = max(pairs.items(), key=lambda pair: abs(pair[1]))
    verb = "amplify" if effect > 0 else "compensate"
    return (
        f"At {100 * RATIOS[0]:.0f} % each, {names[b]} and {names[a]} {verb} each other's error "
        f"most: {words.signed_percent(effect)} of the geometric mean of their own effects."
    )


def show_predicted(ctx: PageContext, request: PlanRequest) -> None:
    """Show predicted loss and measured KL divergence of runs planned from these interactions."""
    runs = cached_results.objectives(ctx.store, ctx.info, request.method)
    requests = [PlanRequest.from_json(json.loads(text)) for text in runs["request"]]
    matching = [
        all(getattr(a, k) == getattr(request, k) for k in _INTERACTION_FIELDS) for a in requests
    ]
    runs = runs.assign(ratios=[a.ratios for a in requests])[np.array(matching, dtype=bool)]
    runs = runs.dropna(subset=["kl"])
    runs = runs[runs["ratios"] != "diagonal"] if request.ratios == "uniform" else runs
    if runs.empty:
        st.info(
            "There are no runs of such plans yet. Once there are, this chart shows how accurate "
            "the prediction is."
        )
        return
    frame = pd.DataFrame(
        {
            "predicted": runs["objective"],
            "measured": runs["kl"],
            "ratios": runs["ratios"],
            "quantizer": runs["quantizer"],
            "label": [
                f"run {row.run}, {row.bits_per_param:.3f} bits on {row.corpus}"
                for row in runs.itertuples()
            ],
        }
    )
    st.caption(
        "Predicted: the loss by which ratios were chosen, under round-to-nearest, summed "
        "over the blocks (diagonal ratios: without interactions). "
        "Measured: KL divergence of the model's predictions from full precision."
    )
    figure = charts.predicted_loss_scatter(frame, "KL to full precision (nats per token)")
    st.plotly_chart(figure, config=charts.CONFIG, key="rows_predicted")
