"""Agreement of metrics: matrices ranked by any two of them."""

from __future__ import annotations

import numpy as np
import pandas as pd
from streamlit.delta_generator import DeltaGenerator

from lsq_core import charts, disk, jobs
from lsq_core.bits import DETECTION_CONFIG, EXTENDED_LADDER
from lsq_core.profiling.agreement import proxy_agreement, rank_correlation, ranks
from lsq_core.profiling.metrics import METRICS, proxies
from lsq_core.ui import jobs_panel, words
from lsq_core.ui.explore.layers import has_scores, measured_configs
from lsq_core.ui.explore.profile import ExploreView, profile_argv
from lsq_core.ui.safe import st
from lsq_core.ui.state import ensure_valid_choice

_TABLE_ROWS = 8


def show(view: ExploreView) -> None:
    """Show the ranks by two metrics as a scatter plot, and one module's figures."""
    configs = measured_configs(view.profile)
    with view.row:
        config_name = _select_config(configs)
    table = metric_table(view, config_name)
    available = [metric for metric in METRICS if metric in table]
    if len(available) < 2:
        view.render_headline(
            "Only one metric is available, so there is nothing to compare.",
            f"{view.ctx.source.name} has {words.metric_labels(available)}.",
        )
        return
    left, right = st.columns([3, 2], gap="medium")
    with right:
        across, up = st.columns(2)
        x = _select_metric(across, "ranks_x", available, "sensitivity", "x axis")
        y = _select_metric(up, "ranks_y", [m for m in available if m != x], "kurtosis", "y axis")
    frame = table.assign(x=table[x], y=table[y]).dropna(subset=["x", "y"])
    if frame.empty:
        both = words.metric_labels([x, y])
        view.render_headline("There is nothing to compare.", f"No matrix has both {both}.")
        return
    frame = frame.assign(x_rank=ranks(frame["x"].to_numpy()), y_rank=ranks(frame["y"].to_numpy()))
    _render_headline(view, frame, x, y)
    with right:
        module = _select_module(frame)
        _show_figures(table, module, available)
        _show_furthest(frame)
    with left:
        _show_scatter(frame, x, y, module)
        _show_proxies(view, config_name)


def _select_config(configs: list[str]) -> str:
    ensure_valid_choice("shown", configs or [""], DETECTION_CONFIG.name)
    return st.selectbox(
        "Configuration",
        configs or [""],
        format_func=lambda name: f"at {name}",
        key="shown",
        label_visibility="collapsed",
        persist_state="session",
        width=130,
    )


def _select_metric(
    container: DeltaGenerator, key: str, available: list[str], default: str, label: str
) -> str:
    ensure_valid_choice(key, available, default)
    return container.selectbox(
        label,
        available,
        format_func=lambda name: METRICS[name].label,
        help="\n".join(f"- **{METRICS[m].title}**: {METRICS[m].meaning}" for m in available),
        key=key,
        persist_state="session",
    )


def metric_table(view: ExploreView, config_name: str) -> pd.DataFrame:
    """Return a row per matrix: ``module, type, layer`` and a column per available metric."""
    profile = view.profile
    table = pd.DataFrame(
        [(m.name, m.type, m.layer) for m in profile.matrices], columns=["module", "type", "layer"]
    )
    config = next((c for c in EXTENDED_LADDER if c.name == config_name), None)
    for metric in profile.metrics:
        if metric not in METRICS:
            continue
        at = config if METRICS[metric].by_config else None
        if has_scores(profile, metric, at):
            table[metric] = profile.scores(metric, at)
    return table


def _render_headline(view: ExploreView, frame: pd.DataFrame, x: str, y: str) -> None:
    rho = rank_correlation(frame["x"].to_numpy(), frame["y"].to_numpy())
    name = words.metric_label(x)
    value = f"{rho:.2f}".replace("-", "−")
    view.render_headline(
        f"{name} and {METRICS[y].label} {_verdict(rho)}: rank correlation {value}.",
        f"Spearman's ρ over {len(frame):,} weight matrices. "
        "Rank 1 is the largest value, the hardest by that metric. Click a point to see its "
        "figures.",
    )


def _verdict(rho: float) -> str:
    """Describe a rank correlation in words."""
    if np.isnan(rho):
        return "can't be compared"
    if rho >= 0.8:
        return "rank the modules alike"
    if rho >= 0.4:
        return "agree partly"
    return "hardly agree" if rho > -0.4 else "rank the modules in opposite order"


def _select_module(frame: pd.DataFrame) -> str:
    """Select a module by name; clicking its point also selects it."""
    modules = frame["module"].tolist()
    furthest = frame.loc[(frame["x_rank"] - frame["y_rank"]).abs().idxmax(), "module"]
    ensure_valid_choice("ranked", modules, furthest)
    return st.selectbox("Module", modules, key="ranked", persist_state="session")


def _select_clicked() -> None:
    """Select the clicked point's module; the chart itself loses the selection when redrawn."""
    points = st.session_state["rank_scatter"]["selection"]["points"]
    picked = [point["customdata"] for point in points if point.get("customdata")]
    if picked:
        st.session_state["ranked"] = next(iter(_as_list(picked[-1])))


def _as_list(customdata: object) -> list:
    """Return custom data as a list; the browser sends a list, or an object keyed by position."""
    return list(customdata.values()) if isinstance(customdata, dict) else list(customdata)


def _show_scatter(frame: pd.DataFrame, x: str, y: str, module: str) -> None:
    st.plotly_chart(
        charts.rank_scatter(frame, METRICS[x].label, METRICS[y].label, module),
        config=charts.CONFIG,
        key="rank_scatter",
        on_select=_select_clicked,
        selection_mode="points",
        alt=f"Ranks of {len(frame)} modules by {METRICS[x].label} and by {METRICS[y].label}; "
        f"{module} is ringed.",
    )


def _show_proxies(view: ExploreView, config_name: str) -> None:
    """Show how well the fast proxies rank the modules, or a button that measures them."""
    table = proxy_agreement(view.profile)
    table = table[table["config"] == config_name]
    for exact, rows in table.groupby("exact", sort=False):
        correlations = [
            f"{METRICS[row.proxy].label} {row.rank_correlation:.3f}".replace("-", "−")
            for row in rows.itertuples()
        ]
        st.caption(
            f"Fast proxies of {METRICS[exact].label} at {config_name}, by rank correlation with "
            f"it: {words.listed(correlations)}."
        )
    if table.empty and not view.published and not view.lacking:
        _show_proxy_button(view)


def _show_proxy_button(view: ExploreView) -> None:
    folder, argv = disk.jobs_folder(view.ctx.store), profile_argv(view, list(proxies()))
    job = jobs_panel.find(folder, argv)
    if job is not None and job.active:
        jobs_panel.follow(job)
        return
    if st.button(
        "Measure the fast proxies",
        key="proxies",
        help=f"{words.metric_labels(proxies())}, to see how well they rank the "
        "modules. Needs all weights in memory, and gradients.",
    ):
        jobs.start(folder, argv)
        st.rerun()
    if job is not None and job.state != "done":
        jobs_panel.follow(job)


def _show_figures(table: pd.DataFrame, module: str, available: list[str]) -> None:
    """Show one module's value and rank by every metric."""
    row = table[table["module"] == module].iloc[0]
    all_ranks = {metric: ranks(table[metric].to_numpy()) for metric in available}
    index = table.index[table["module"] == module][0]
    st.dataframe(
        {
            "metric": [METRICS[metric].label for metric in available],
            "value": [row[metric] for metric in available],
            "rank": [all_ranks[metric][index] for metric in available],
        },
        hide_index=True,
        column_config={
            "value": st.column_config.NumberColumn(format="%.4g"),
            "rank": st.column_config.NumberColumn(format="%.0f", help=f"of {len(table)}"),
        },
    )


def _show_furthest(frame: pd.DataFrame) -> None:
    """Show the modules whose ranks by the two metrics differ most."""
    frame = frame.assign(apart=(frame["x_rank"] - frame["y_rank"]).abs())
    widest = frame.sort_values("apart", ascending=False, kind="stable").head(_TABLE_ROWS)
    st.caption("Largest rank differences")
    st.dataframe(
        {
            "layer": widest["layer"].tolist(),
            "module": [charts.short_type(kind) for kind in widest["type"]],
            "x rank": widest["x_rank"].tolist(),
            "y rank": widest["y_rank"].tolist(),
        },
        hide_index=True,
    )
