"""Task scores of a run, with full precision for comparison."""

from __future__ import annotations

import pandas as pd

from lsq_core.store.store import Store
from lsq_core.ui.cached import FileVersion, file_version
from lsq_core.ui.safe import st


@st.cache_data(max_entries=8, show_spinner=False)
def _results(_store: Store, at: FileVersion, fingerprint: str) -> pd.DataFrame:
    return _store.task_results(fingerprint)


def show_tasks(store: Store, run: str, fingerprint: str) -> None:
    """Show a run's task results, or the command that measures them."""
    table = tasks_table(_results(store, file_version(store), fingerprint), run)
    with st.expander(f"Tasks ({len(table)})" if len(table) else "Tasks"):
        if table.empty:
            st.caption("No task results yet. After `make lm-eval`, run:")
            st.code(f"lsq tasks {run} --task arc_easy", language="shell", wrap_lines=True)
            return
        st.dataframe(
            table,
            hide_index=True,
            key="card-tasks",
            column_config={
                name: st.column_config.NumberColumn(format="%.4f")
                for name in ("value", "± stderr", "full precision", "difference")
            },
        )
        if table["full precision"].isna().any():
            st.caption(
                "Full precision is shown if it was measured on the same documents in the same way: "
                "`lsq tasks --model`."
            )


def tasks_table(results: pd.DataFrame, run: str) -> pd.DataFrame:
    """Return a run's rows of :meth:`Store.task_results` with column names for display."""
    own = results[results["run"] == run]
    counts = own["documents"].astype(str)
    return pd.DataFrame(
        {
            "task": own["task"],
            "metric": own["metric"],
            "value": own["value"],
            "± stderr": own["stderr"],
            "full precision": own["full"],
            "difference": own["value"] - own["full"],
            "examples": own["fewshot"],
            "documents": counts.where(own["max_documents"].isna(), counts + ", limited"),
            "version": own["version"],
        }
    )
