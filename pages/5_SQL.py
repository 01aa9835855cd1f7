"""Questions in SQL to everything that was measured; they read and change nothing."""

from __future__ import annotations

import time

from lsq_core.errors import LsqError
from lsq_core.store import sql
from lsq_core.ui import cached, words
from lsq_core.ui.compare.export import offer_table
from lsq_core.ui.page import Here, headline, page
from lsq_core.ui.safe import st


def query(here: Here) -> None:
    """Examples, a field for the query, and its answer."""
    first = st.container()
    st.session_state.setdefault("sql", sql.EXAMPLES[0].sql)
    with st.container(horizontal=True):
        for example in sql.EXAMPLES:
            st.button(example.title, key=f"example-{example.title}", on_click=_take, args=[example])
    text = st.text_area(
        "SQL",
        key="sql",
        height=170,
        persist_state="session",
        help="One SELECT. The view results has a row for each evaluation of a run; the tables are "
        "models, matrices, profiles, scores, plans, runs and evaluations. Ctrl+Enter runs it.",
    )
    st.button("Run", type="primary", key="ask", icon=":material/play_arrow:", on_click=_run_again)
    if st.session_state.get(_CANCELLED) == text:
        with first:
            headline("The query was cancelled.", _RULES)
        return
    copy = cached.snapshot(here.store)
    try:
        answer = _ask(copy, text)
    except LsqError as error:
        with first:
            headline("There is no answer to this query.", _RULES)
        st.error(words.literal(str(error)))
        return
    with first:
        headline(_found(answer), _RULES)
    st.dataframe(
        answer.rows,
        hide_index=True,
        key="answer",
        height=420 if len(answer.rows) > 11 else "content",
    )
    if len(answer.rows):
        with st.container(horizontal=True):
            offer_table(answer.rows, "query")


#: Under which the query that was cancelled is kept: it is not asked again by itself.
_CANCELLED = "sql-cancelled"


def _ask(copy: cached.Snapshot, text: str) -> sql.Answer:
    """The answer; meanwhile there is a button that stops the query."""
    place, began = st.empty(), time.monotonic()
    with place.container(horizontal=True):
        st.button("Cancel", key="cancel", on_click=_cancel, args=[text])
        elapsed = st.empty()

    def show_time() -> None:
        # To write to the page is where Streamlit ends a run whose person asked for another.
        elapsed.caption(f"Asking… {time.monotonic() - began:.1f} s")

    try:
        return sql.ask(copy.path, text, waiting=show_time)
    finally:
        place.empty()


def _cancel(text: str) -> None:
    st.session_state[_CANCELLED] = text


def _run_again() -> None:
    st.session_state.pop(_CANCELLED, None)


_RULES = (
    f"One SELECT on a copy of the database: it changes nothing and reaches no file. At most "
    f"{sql.TIME_LIMIT:.0f} s, {sql.ROW_LIMIT:,} rows and {sql.BYTE_LIMIT >> 20} MiB. "
    "Deleted runs are in runs, not in results."
)


def _found(answer: sql.Answer) -> str:
    number = words.plural(len(answer.rows), "row")
    if answer.cut:
        return f"The first {number}; there are more."
    return f"{number} found." if len(answer.rows) else "No row answers this query."


def _take(example: sql.Example) -> None:
    st.session_state["sql"] = example.sql


page("Query", query)
