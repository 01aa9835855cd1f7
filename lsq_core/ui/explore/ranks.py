"""Where metrics disagree: the matrices ranked by any two of them."""

from __future__ import annotations

import numpy as np
import pandas as pd
from streamlit.delta_generator import DeltaGenerator

from lsq_core import charts, disk, jobs
from lsq_core.bits import DETECTION_CONFIG, LADDER
from lsq_core.profiling.agreement import proxy_agreement, rank_correlation, ranks
from lsq_core.profiling.metrics import PROXIES, TITLES
from lsq_core.ui import jobs_panel, words
from lsq_core.ui.explore.layers import at_stops, has, keep_to
from lsq_core.ui.explore.profile import NAMES, Seen, job_words
from lsq_core.ui.safe import st

#: Metrics of a configuration; the others have one figure a matrix.
_AT_STOPS = ("sensitivity", "sensitivity_module", "weight_error", *PROXIES)
_MOST = 8


def show(seen: Seen) -> None:
    """Two metrics, the scatter of their ranks, and one module's figures."""
    stops = at_stops(seen.found)
    with seen.row:
        stop = _stop(stops)
    table = metric_table(seen, stop)
    offered = [metric for metric in TITLES if metric in table]
    if len(offered) < 2:
        seen.say(
            "There is one metric here, and nothing to compare it with.",
            f"Of {seen.here.source.name} there is {words.listed([NAMES[m] for m in offered])}.",
        )
        return
    left, right = st.columns([3, 2], gap="medium")
    with right:
        across, up = st.columns(2)
        x = _pick(across, "ranks_x", offered, "sensitivity", "Across")
        y = _pick(up, "ranks_y", [m for m in offered if m != x], "kurtosis", "Up")
    frame = table.assign(x=table[x], y=table[y]).dropna(subset=["x", "y"])
    frame = frame.assign(x_rank=ranks(frame["x"].to_numpy()), y_rank=ranks(frame["y"].to_numpy()))
    _say(seen, frame, x, y)
    with right:
        module = _module(frame)
        _figures(table, module, offered)
        _furthest(frame)
    with left:
        _scatter(frame, x, y, module)
        _proxies(seen, stop)


def _stop(stops: list[str]) -> str:
    keep_to("shown", stops or [""], DETECTION_CONFIG.name)
    return st.selectbox(
        "Configuration",
        stops or [""],
        format_func=lambda name: f"at {name}",
        key="shown",
        label_visibility="collapsed",
        persist_state="session",
        width=130,
    )


def _pick(place: DeltaGenerator, key: str, offered: list[str], usual: str, label: str) -> str:
    keep_to(key, offered, usual)
    return place.selectbox(label, offered, format_func=NAMES.get, key=key, persist_state="session")


def metric_table(seen: Seen, stop: str) -> pd.DataFrame:
    """A row a matrix: ``module, type, layer`` and each metric that there is, by its name."""
    found = seen.found
    table = pd.DataFrame(
        [(m.name, m.type, m.layer) for m in found.matrices], columns=["module", "type", "layer"]
    )
    config = next((c for c in LADDER if c.name == stop), None)
    for metric in found.metrics:
        at = config if metric in _AT_STOPS else None
        if metric in TITLES and has(found, metric, at):
            table[metric] = found.scores(metric, at)
    return table


def _say(seen: Seen, frame: pd.DataFrame, x: str, y: str) -> None:
    rho = rank_correlation(frame["x"].to_numpy(), frame["y"].to_numpy())
    name = NAMES[x]
    value = f"{rho:.2f}".replace("-", "−")
    seen.say(
        f"{name[0].upper()}{name[1:]} and {NAMES[y]} {_verdict(rho)}: rank correlation {value}.",
        f"Spearman's ρ over {len(frame):,} weight matrices. "
        "Rank 1 is the largest, and so the hardest by that metric. Click a point to see its "
        "figures.",
    )


def _verdict(rho: float) -> str:
    """What a rank correlation means, in words."""
    if np.isnan(rho):
        return "can't be compared"
    if rho >= 0.8:
        return "rank the modules alike"
    if rho >= 0.4:
        return "agree in part"
    return "hardly agree" if rho > -0.4 else "rank the modules the other way round"


def _module(frame: pd.DataFrame) -> str:
    """The picked module: by a click on its point, or by name."""
    modules = frame["module"].tolist()
    furthest = frame.loc[(frame["x_rank"] - frame["y_rank"]).abs().idxmax(), "module"]
    keep_to("ranked", modules, furthest)
    return st.selectbox("Module", modules, key="ranked", persist_state="session")


def _keep_click() -> None:
    """Make the clicked point's module the picked one; the chart forgets it when redrawn."""
    points = st.session_state["rank_scatter"]["selection"]["points"]
    picked = [point["customdata"] for point in points if point.get("customdata")]
    if picked:
        st.session_state["ranked"] = next(iter(_first(picked[-1])))


def _first(customdata: object) -> list:
    """The custom data as a list; the browser gives a list or an object by position."""
    return list(customdata.values()) if isinstance(customdata, dict) else list(customdata)


def _scatter(frame: pd.DataFrame, x: str, y: str, module: str) -> None:
    st.plotly_chart(
        charts.rank_scatter(frame, NAMES[x], NAMES[y], module),
        config=charts.CONFIG,
        key="rank_scatter",
        on_select=_keep_click,
        selection_mode="points",
        alt=f"Ranks of {len(frame)} modules by {NAMES[x]} and by {NAMES[y]}; {module} is ringed.",
    )


def _proxies(seen: Seen, stop: str) -> None:
    """How well the fast proxies rank the modules, or a way to measure them."""
    table = proxy_agreement(seen.found)
    table = table[table["config"] == stop]
    for exact, rows in table.groupby("exact", sort=False):
        each = [
            f"{NAMES[row.proxy]} {row.rank_correlation:.3f}".replace("-", "−")
            for row in rows.itertuples()
        ]
        st.caption(
            f"Fast proxies of {NAMES[exact]} at {stop}, by rank correlation with it: "
            f"{words.listed(each)}."
        )
    if table.empty and not seen.published and not seen.lacking:
        _offer_proxies(seen)


def _offer_proxies(seen: Seen) -> None:
    folder, words_of = disk.jobs_folder(seen.here.store), job_words(seen, list(PROXIES))
    job = jobs_panel.find(folder, words_of)
    if job is not None and job.active:
        jobs_panel.follow(job)
        return
    if st.button(
        "Measure the fast proxies",
        key="proxies",
        help=f"{words.listed([NAMES[proxy] for proxy in PROXIES])}, to see how well they rank the "
        "modules. Needs all weights in memory, and gradients.",
    ):
        jobs.start(folder, words_of)
        st.rerun()
    if job is not None and job.state != "done":
        jobs_panel.follow(job)


def _figures(table: pd.DataFrame, module: str, offered: list[str]) -> None:
    """What every metric says of one module, and which place it takes."""
    row = table[table["module"] == module].iloc[0]
    places = {metric: ranks(table[metric].to_numpy()) for metric in offered}
    index = table.index[table["module"] == module][0]
    st.dataframe(
        {
            "metric": [NAMES[metric] for metric in offered],
            "value": [row[metric] for metric in offered],
            "rank": [places[metric][index] for metric in offered],
        },
        hide_index=True,
        column_config={
            "value": st.column_config.NumberColumn(format="%.4g"),
            "rank": st.column_config.NumberColumn(format="%.0f", help=f"of {len(table)}"),
        },
    )


def _furthest(frame: pd.DataFrame) -> None:
    """The modules on whose place the two metrics differ most."""
    frame = frame.assign(apart=(frame["x_rank"] - frame["y_rank"]).abs())
    most = frame.sort_values("apart", ascending=False, kind="stable").head(_MOST)
    st.caption("Where the two differ most")
    st.dataframe(
        {
            "layer": most["layer"].tolist(),
            "module": [charts.short_type(kind) for kind in most["type"]],
            "rank across": most["x_rank"].tolist(),
            "rank up": most["y_rank"].tolist(),
        },
        hide_index=True,
    )
