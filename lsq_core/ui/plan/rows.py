"""The Plan page's panels for high-impact rows: ratios, interactions, loss as predicted."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd

from lsq_core import charts
from lsq_core.bits import RATIOS
from lsq_core.planning.plan import Plan
from lsq_core.planning.problem import Impact, Interactions, Problem
from lsq_core.planning.request import PlanRequest
from lsq_core.ui import cached, words
from lsq_core.ui.page import Here
from lsq_core.ui.safe import st

#: What of a request decides which interactions a plan was made from.
_KIND = ("loss", "low_bits", "high_bits", "group_size", "clip")


def show_rows(here: Here, problem: Problem, plan: Plan, rows: Impact) -> None:
    """Where the rows at more bits are, and what says so."""
    ratios, interactions, predicted = st.tabs(
        ["Ratios by layer", "Interactions in a block", "Predicted and measured"], key="rows_tab"
    )
    with ratios:
        show_ratios(plan)
    with interactions:
        show_interactions(problem, rows)
    with predicted:
        show_predicted(here, plan.request)


def show_ratios(plan: Plan) -> None:
    """The ratio of each layer and module type."""
    frame = pd.DataFrame(
        [(m.type, m.layer, c.ratio) for m, c in plan.choice.items()],
        columns=["type", "layer", "ratio"],
    )
    st.plotly_chart(charts.ratio_lines(frame), config=charts.CONFIG, key="ratio_lines")


def show_interactions(problem: Problem, rows: Impact) -> None:
    """M of one block."""
    measured = {block.layer: block for block in rows.blocks if block.matrix is not None}
    if not measured:
        st.info("Uniform ratios need no interactions; choose ratios together to measure them.")
        return
    layer = st.select_slider("Layer", list(measured), key="rows_layer", persist_state="session")
    block = measured[layer]
    st.caption(interactions_in_words(block, problem))
    units = [problem.matrices[members[0]].type for members in block.units]
    figure = charts.interaction_heatmap(block.matrix, units, RATIOS)
    st.plotly_chart(figure, config=charts.CONFIG, key="interactions")


def interactions_in_words(block: Interactions, problem: Problem) -> str:
    """Which two act most on one another, against what they do alone."""
    tiles = block.matrix.reshape(len(block.units), len(RATIOS), len(block.units), len(RATIOS))
    names = [charts.short_type(problem.matrices[members[0]].type) for members in block.units]
    pairs = {
        (a, b): tiles[a, 0, b, 0] / ((tiles[a, 0, a, 0] * tiles[b, 0, b, 0]) ** 0.5 or 1.0)
        for a in range(len(names))
        for b in range(a)
        if tiles[a, 0, a, 0] > 0 and tiles[b, 0, b, 0] > 0
    }
    if not pairs:
        return "No two matrices of this block act on one another."
    (a, b), most = max(pairs.items(), key=lambda pair: abs(pair[1]))
    kind = "add to" if most > 0 else "make up for"
    return (
        f"At {100 * RATIOS[0]:.0f} % each, {names[b]} and {names[a]} {kind} each other's error "
        f"most: {words.signed_percent(most)} of the geometric mean of what they do alone."
    )


def show_predicted(here: Here, request: PlanRequest) -> None:
    """Runs of plans by these interactions: the loss that was predicted, and what was measured."""
    runs = cached.objectives(here.store, here.info, request.method)
    asked = [PlanRequest.from_json(json.loads(text)) for text in runs["request"]]
    same = [all(getattr(a, k) == getattr(request, k) for k in _KIND) for a in asked]
    runs = runs.assign(ratios=[a.ratios for a in asked])[np.array(same, dtype=bool)]
    runs = runs.dropna(subset=["kl"])
    runs = runs[runs["ratios"] != "diagonal"] if request.ratios == "uniform" else runs
    if runs.empty:
        st.info("There is no run of such a plan yet; runs show here what the prediction is worth.")
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
        "The prediction is the loss that ratios were measured by, of rounding to nearest, summed "
        "over the blocks (diagonal ratios: without what matrices do to one another). What was "
        "measured is the divergence of the model's predictions from full precision."
    )
    figure = charts.loss_as_predicted(frame, "KL to full precision (nats a token)")
    st.plotly_chart(figure, config=charts.CONFIG, key="rows_predicted")
