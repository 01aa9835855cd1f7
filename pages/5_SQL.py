"""Questions in SQL to everything that was measured; they read and change nothing."""

from __future__ import annotations

import streamlit as st

from lsq_core import sql
from lsq_core.errors import InputError
from lsq_core.ui import known, words
from lsq_core.ui.compare_export import offer_table
from lsq_core.ui.page import Here, headline, page


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
    st.button("Run", type="primary", key="ask", icon=":material/play_arrow:")
    copy = known.snapshot(here.store)
    try:
        with st.spinner("Asking…"):
            answer = sql.ask(copy.path, text)
    except InputError as error:
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


_RULES = (
    f"One SELECT on a copy of the database: it changes nothing and reaches no file. At most "
    f"{sql.TIME_LIMIT:.0f} s and {sql.ROW_LIMIT:,} rows. Deleted runs are in runs, not in results."
)


def _found(answer: sql.Answer) -> str:
    number = words.plural(len(answer.rows), "row")
    if answer.cut:
        return f"The first {number}; there are more."
    return f"{number} found." if len(answer.rows) else "No row answers this query."


def _take(example: sql.Example) -> None:
    st.session_state["sql"] = example.sql


page("Query", query)
