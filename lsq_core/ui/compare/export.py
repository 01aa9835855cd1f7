"""Charts and tables of the Compare page with their downloads."""

from __future__ import annotations

import re
from collections.abc import Callable

import pandas as pd
import plotly.graph_objects as go

from lsq_core import charts
from lsq_core.results import export
from lsq_core.ui.safe import st

#: Image formats of a chart's camera button.
_FORMATS = ("png", "svg")


def file_stem(name: str) -> str:
    """Convert a name for a file: ``published:Llama-2-7b c4`` to ``published-Llama-2-7b-c4``."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-")


def render_chart(
    figure: go.Figure,
    key: str,
    name: str,
    alt: str,
    on_select: Callable | str = "ignore",
) -> None:
    """Render a chart with alternative text; its camera button saves it as ``name``."""
    camera = {
        "format": st.session_state.get(f"camera-{key}", "png"),
        "filename": file_stem(name),
        "scale": 2,
    }
    st.plotly_chart(
        figure,
        config=charts.CONFIG | {"toImageButtonOptions": camera},
        key=key,
        on_select=on_select,
        selection_mode="points",
        alt=alt,
    )


def render_save_menu(
    figure: go.Figure, key: str, name: str, report: Callable[[], str] | None = None
) -> None:
    """Render the download menu of a chart: HTML, image format and, if given, a report."""
    with st.popover("Save", icon=":material/download:"):
        _download_button(
            "Chart (HTML)", lambda: export.figure_html(figure, name), f"{file_stem(name)}.html"
        )
        st.segmented_control(
            "Format of the chart's camera button",
            _FORMATS,
            default="png",
            format_func=str.upper,
            key=f"camera-{key}",
            required=True,
            persist_state="session",
            help="Your browser renders the image at the size of the chart on the page.",
        )
        if report is not None:
            _download_button(
                "Report of this comparison (HTML)", report, f"{file_stem(name)}-report.html"
            )


def table_downloads(frame: pd.DataFrame, name: str) -> None:
    """Render buttons that download a table as CSV and Parquet."""
    _download_button("CSV", lambda: export.csv_bytes(frame), f"{file_stem(name)}.csv")
    _download_button("Parquet", lambda: export.parquet_bytes(frame), f"{file_stem(name)}.parquet")


def _download_button(label: str, data: Callable[[], str | bytes], file_name: str) -> None:
    """Render a download button that creates its file only when clicked."""
    st.download_button(
        label,
        data,
        file_name,
        key=f"save-{label}-{file_name}",
        on_click="ignore",
        icon=":material/download:",
    )
