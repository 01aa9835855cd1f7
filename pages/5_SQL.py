"""The SQL page: read-only queries of all measurements."""

from __future__ import annotations

import time

from lsq_core.errors import LsqError
from lsq_core.store import sql
from lsq_core.ui import cached_results, words
from lsq_core.ui.compare.export import table_downloads
from lsq_core.ui.page import PageContext, headline, page
from lsq_core.ui.safe import st


def query(ctx: PageContext) -> None:
    """Show examples, a field for the query, and its result."""
    header = st.container()
    st.session_state.setdefault("sql", sql.EXAMPLES[0].sql)
    with st.container(horizontal=True):
        for example in sql.EXAMPLES:
            st.button(
                example.title,
                key=f"example-{example.title}",
                on_click=_load_example,
                args=[example],
            )
    text = st.text_area(
        "SQL",
        key="sql",
        height=170,
        persist_state="session",
        help="One SELECT. The view results has one row per evaluation of a run; the tables are "
        "models, matrices, profiles, scores, plans, runs and evaluations. Ctrl+Enter runs it.",
    )
    st.button(
        "Run", type="primary", key="ask", icon=":material/play_arrow:", on_click=_clear_cancelled
    )
    if st.session_state.get(_CANCELLED) == text:
        with header:
            headline("The query was cancelled.", _LIMITS)
        return
    copy = cached_results.snapshot(ctx.store)
    try:
        answer = _run_query(copy, text)
    except LsqError as error:
        with header:
            headline("The query failed.", _LIMITS)
        st.error(words.escape(str(error)))
        return
    with header:
        headline(_describe_row_count(answer), _LIMITS)
    st.dataframe(
        answer.rows,
        hide_index=True,
        key="answer",
        height=420 if len(answer.rows) > 11 else "content",
    )
    if len(answer.rows):
        with st.container(horizontal=True):
            table_downloads(answer.rows, "query")


#: Session key of the cancelled query, which is not run again automatically.
_CANCELLED = "sql-cancelled"


def _run_query(copy: cached_results.Snapshot, text: str) -> sql.QueryResult:
    """Run a query and return its result, with a button to cancel it meanwhile."""
    placeholder, start_time = st.empty(), time.monotonic()
    with placeholder.container(horizontal=True):
        st.button("Cancel", key="cancel", on_click=_cancel, args=[text])
        elapsed = st.empty()

    def show_time() -> None:
        # Streamlit stops a superseded script run only when it writes to the page.
        elapsed.caption(f"Running… {time.monotonic() - start_time:.1f} s")

    try:
        return sql.run_query(copy.path, text, on_wait=show_time)
    finally:
        placeholder.empty()


def _cancel(text: str) -> None:
    st.session_state[_CANCELLED] = text


def _clear_cancelled() -> None:
    st.session_state.pop(_CANCELLED, None)


_LIMITS = (
    f"A single read-only SELECT on a copy of the database, with no file access. At most "
    f"{sql.TIME_LIMIT:.0f} s, {sql.ROW_LIMIT:,} rows and {sql.BYTE_LIMIT >> 20} MiB. "
    "Deleted runs are in the table runs but not in the view results."
)


def _describe_row_count(answer: sql.QueryResult) -> str:
    number = words.plural(len(answer.rows), "row")
    if answer.truncated:
        return f"First {number}; the result was truncated."
    return f"{number}." if len(answer.rows) else "No rows match this query."


def _load_example(example: sql.Example) -> None:
    st.session_state["sql"] = example.sql


page("SQL", query)
