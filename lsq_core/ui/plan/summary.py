"""A plan in figures: its size by each account of bytes, and the layers it flags."""

from __future__ import annotations

import numpy as np
import pandas as pd

from lsq_core.bits import LADDER
from lsq_core.evaluation.prediction import (
    features,
)
from lsq_core.planning.plan import Plan
from lsq_core.ui import state, words
from lsq_core.ui.page import headline
from lsq_core.ui.plan.prediction import band, gap, how_predicted
from lsq_core.ui.plan.query import Asked
from lsq_core.ui.safe import st
from lsq_core.units import format_bytes


def say_what_it_takes(asked: Asked, plan: Plan) -> None:
    """The first line: bits, what is predicted, and against its base or the nearest uniform plan."""
    under = ["Bits per planned parameter, metadata included.", *plan.notes, gap(plan)]
    if plan.rows:
        headline(f"{plan.bits_per_param:.2f} bits: {rows_in_words(plan)}.", " ".join(under))
        return
    named = [c for c in LADDER if c.stop_name == plan.base]
    nearest = min(LADDER, key=lambda c: abs(plan.bits_per_param - c.nominal_bits))
    reference = named[0] if named else nearest
    more = words.signed_percent(plan.bits_per_param / reference.nominal_bits - 1)
    size, against = format_bytes(plan.planned_bytes), f"uniform {reference.stop_name}"
    alike, predictor = len(set(plan.configs)) == 1, asked.predictor
    if isinstance(predictor, str):
        text = f"{size} planned, " + ("every matrix the same" if alike else f"{more} vs {against}")
    else:
        stops = np.array([[LADDER.index(c) for c in plan.configs]])
        uniform = np.full_like(stops, LADDER.index(reference))
        said = predictor.predict(features(asked.problem, np.concatenate([stops, uniform])))
        text = f"perplexity {band(said)} predicted, {size}"
        if not alike:
            less = words.signed_percent(said.perplexity[0] / said.perplexity[1] - 1)
            text = f"perplexity {band(said)} predicted, {less} vs {against} for {more}"
        under.insert(1, how_predicted(predictor, bool(said.extrapolated[0])))
    headline(f"{plan.bits_per_param:.2f} bits: {text}.", " ".join(filter(None, under)))


def rows_in_words(plan: Plan) -> str:
    """How many rows have more bits, and what that takes: ``9 % of the rows at 3 bits, 9 MiB``."""
    high = sum(len(rows) for rows in plan.rows.values())
    share = high / sum(m.out_features for m in plan.matrices)
    width = plan.request.high_bits
    base = plan.configs[0].low
    more = words.signed_percent(plan.bits_per_param / base.nominal_bits - 1)
    return (
        f"{100 * share:.0f} % of the rows at {width} bits, {format_bytes(plan.planned_bytes)} "
        f"planned, {more} vs uniform {base.stop_name}"
    )


# --- its sizes ------------------------------------------------------------------------------


def show_accounts(plan: Plan) -> None:
    """Every account of its size, each by its own name."""
    accounts = [
        ("Nominal", format_bytes(plan.nominal_bytes), f"{plan.bits_per_param:.4f} bits",
         "The papers' formula; budgets in bits per parameter mean this."),
        ("Planned", format_bytes(plan.planned_bytes), f"{plan.metadata} metadata",
         "What this project's packing of the linear weights occupies, exactly."),
        ("Whole model", format_bytes(plan.model_bytes) if plan.other_bytes else "unknown",
         "with the rest" if plan.other_bytes else "the rest isn't told",
         "Planned bytes, and embeddings, norms and head in the checkpoint's own precision."),
        ("Weight-only", f"{plan.weight_only_bits:.4f} bits", "codes alone",
         "Bits per planned parameter without any metadata."),
        ("fp16 metadata", f"{plan.bits_with_fp16_metadata:.4f} bits", "as hqq keeps them",
         "Bits per planned parameter if scale and zero stayed fp16."),
    ]  # fmt: skip
    for column, (label, value, under, about) in zip(
        st.columns(len(accounts)), accounts, strict=True
    ):
        column.metric(label, value, under, delta_color="off", delta_arrow="off", help=about)


def show_flagged(plan: Plan) -> None:
    """The matrices that were moved from the base, strongest first."""
    if not plan.reasons:
        return
    configs = {m.name: c for m, c in plan.choice.items()}
    ranked = "draw" if state.is_ablation(plan.method) else "z"
    with st.expander(f"{len(plan.reasons)} matrices moved from the base"):
        st.dataframe(
            pd.DataFrame(
                {
                    "module": list(plan.reasons),
                    ranked: list(plan.reasons.values()),
                    "configuration": [configs[name].name for name in plan.reasons],
                    "bits": [configs[name].nominal_bits for name in plan.reasons],
                }
            ),
            column_config={
                ranked: st.column_config.NumberColumn(format="%.2f"),
                "bits": st.column_config.NumberColumn(format="%.2f"),
            },
            hide_index=True,
        )
