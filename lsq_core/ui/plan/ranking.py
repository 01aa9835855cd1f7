"""A table of all methods at the same budget, best first, with predictions and measurements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from lsq_core.bits import Budget, QuantConfig, get_ladder
from lsq_core.planning.methods import get_planner, mixes_rows
from lsq_core.planning.methods.uniform import uniform_within
from lsq_core.planning.plan import Plan
from lsq_core.planning.request import PlanRequest
from lsq_core.stages.rank import MethodRanking, RankedMethod
from lsq_core.ui import cached_results, state, words
from lsq_core.ui.plan.query import PlanQuery, available_methods
from lsq_core.ui.safe import st
from lsq_core.units import MIB, format_bytes


def show_ranking(query: PlanQuery, plan: Plan, lead: object) -> None:
    """Show the table of methods; in ``lead``, this plan's run and a clearly better method."""
    if query.profile is None or mixes_rows(query.request.method):
        return
    ranking = cached_results.ranking(
        query.ctx.store,
        query.info,
        query.profile,
        query.settings,
        _requests(query, plan),
        st.session_state["predict_on"],
    )
    if not ranking.methods:
        return
    by_method = {each.method: each for each in ranking.methods}
    own, better = by_method.get(query.request.method), ranking.leader_over(query.request.method)
    with lead:
        if own is not None and own.measured and own.measured.same_plan:
            ladder = get_ladder(plan.request.ladder)
            reference = uniform_within(plan.bits_per_param, ladder)
            _tell_measured(own, reference, by_method.get("uniform"))
        if better is not None:
            _lead_to(better, own)
    st.subheader(f"All methods within {_describe_budget(query.request, plan)}", anchor=False)
    _show_table(ranking, query.request.method)
    st.caption(words.escape(" ".join(filter(None, _notes(ranking)))))


def _tell_measured(own: RankedMethod, reference: QuantConfig, uniform: RankedMethod | None) -> None:
    """Show the perplexity measured for this plan, against the uniform plan's if measured."""
    perplexity = own.measured.perplexity
    text = f"**Measured: perplexity {perplexity:.2f}**"
    if uniform is not None and uniform is not own and uniform.measured is not None:
        against = uniform.measured
        if against.same_plan and math.isclose(against.bits_per_param, reference.nominal_bits):
            change = words.signed_percent(perplexity / against.perplexity - 1)
            text += f", {change} against uniform {reference.stop_name} ({against.perplexity:.2f})"
    st.markdown(f"{text}.", width="content")


def _requests(query: PlanQuery, plan: Plan) -> list[PlanRequest]:
    """Return requests for every method at the same budget; for a base alone, its plan's size."""
    own, requests = query.request, []
    if own.budget is None:
        own = replace(own, base=None, budget=f"{plan.bits_per_param!r}bpp")
    for name in available_methods(query.info, query.profile):
        if mixes_rows(name) or get_planner(name).reads_refinement:
            continue
        request = own if name == own.method else state.request_for_method(name)
        base = own.base if get_planner(name).has_base else None
        requests.append(replace(request, base=base, budget=own.budget, exact=False))
    return requests


def _describe_budget(request: PlanRequest, plan: Plan) -> str:
    if request.budget is None:
        return f"{plan.bits_per_param:.2f} bits"
    if request.budget.endswith("bpp"):
        return f"{float(request.budget.removesuffix('bpp')):.2f} bits"
    return f"{format_bytes(Budget.parse(request.budget, 1).planned_bytes)} planned"


def _lead_to(better: RankedMethod, own: RankedMethod) -> None:
    """Show a line that names the better method, with a button to choose it."""
    if better.predicted and own.predicted:
        what = f"perplexity {_band(better.predicted)} predicted, against {_band(own.predicted)}"
    else:
        what = (
            f"a KL divergence of {better.expected_kl:.2g} nats expected, against "
            f"{own.expected_kl:.2g}"
        )
    with st.container(horizontal=True, vertical_alignment="center", key="better-method"):
        st.markdown(
            f"**{words.escape(better.title)}** does better within this budget: {what}.",
            width="content",
        )
        st.button(
            f"Choose {better.title}",
            key="choose-better",
            icon=":material/arrow_forward:",
            on_click=choose,
            args=(better.method,),
        )


def choose(method: str) -> None:
    """Choose a method."""
    st.session_state["method"] = method


def choose_clicked(key: str, methods: Sequence[str]) -> None:
    """Choose the method whose row was clicked."""
    selection = st.session_state[key]["selection"]
    cells, rows = selection.get("cells") or [], selection.get("rows") or []
    row = cells[0][0] if cells else rows[0] if rows else None
    if row is not None:
        choose(methods[row])


def _band(predicted: Sequence[float]) -> str:
    middle, low, high = map(words.rounded, predicted)
    return f"{middle} ({low} to {high})"


def _show_table(ranking: MethodRanking, chosen: str) -> None:
    methods = [each.method for each in ranking.methods]
    key = f"ranking-{chosen}-{'-'.join(methods)}"
    row = methods.index(chosen) if chosen in methods else None
    number = st.column_config.NumberColumn
    st.dataframe(
        ranking_frame(ranking),
        hide_index=True,
        placeholder="",
        key=key,
        height="content",
        on_select=lambda: choose_clicked(key, methods),
        selection_mode=["single-row" if row is None else "single-row-required", "single-cell"],
        selection_default=None if row is None else {"selection": {"rows": [row]}},
        column_config={
            "predicted": number("predicted perplexity", format="%.2f"),
            "band": "90 % band",
            "kl": number("expected KL, nats", format="%.3f"),
            "measured": number("measured perplexity", format="%.2f"),
            "at": number("measured at, bits", format="%.2f"),
            "bits": number("nominal bits", format="%.2f"),
            "size": number("planned MiB", format="%.2f"),
        },
        alt="; ".join(
            f"{each.title}, {each.cost:.4g}" if math.isfinite(each.cost) else each.title
            for each in ranking.methods
        ),
    )


def ranking_frame(ranking: MethodRanking) -> pd.DataFrame:
    """Return the table, one row per method, best first, without columns that are empty."""
    rows = [
        {
            "method": each.title,
            "predicted": each.predicted[0] if each.predicted else None,
            "band": " to ".join(map(words.rounded, each.predicted[1:])) if each.predicted else None,
            "kl": each.expected_kl,
            "measured": each.measured.perplexity if each.measured else None,
            "at": each.measured.bits_per_param if each.measured else None,
            "bits": each.bits_per_param,
            "size": each.planned_bytes / MIB,
        }
        for each in ranking.methods
    ]
    return pd.DataFrame(rows).dropna(axis=1, how="all")


def _notes(ranking: MethodRanking) -> list[str]:
    """Return notes on the ranking, the measured column, and the methods left out."""
    ranked_by = {
        "perplexity": "Best first by predicted perplexity.",
        "expected_kl": "Best first by the KL divergence that the profile expects.",
        "": "There is no ranking yet.",
    }
    notes = [f"Click a row to plan by its method. {ranked_by[ranking.basis]}", ranking.reason]
    if any(each.measured for each in ranking.methods):
        notes.append("Measured: the run of this plan, or the method's nearest within 3 % in bits.")
    left_out = [f"{get_planner(name).title} ({why})" for name, why in ranking.left_out.items()]
    return [*notes, f"Left out: {'; '.join(left_out)}." if left_out else ""]
