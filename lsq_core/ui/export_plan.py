"""The menu that exports a plan in another tool's format, on the Plan page and for a run."""

from __future__ import annotations

import pandas as pd

from lsq_core.errors import InputError
from lsq_core.exports.base import Translation
from lsq_core.exports.registry import PLAN_TARGETS, translate
from lsq_core.model.info import ModelInfo
from lsq_core.planning.plan import Plan
from lsq_core.ui import words
from lsq_core.ui.safe import st


def render_plan_export(plan: Plan, info: ModelInfo, key: str) -> None:
    """Offer the tools, confirm substitutions, then show the file and how to use it."""
    name = st.selectbox(
        "Tool",
        list(PLAN_TARGETS),
        index=None,
        format_func=lambda name: PLAN_TARGETS[name].title,
        key=f"export-{key}-target",
        placeholder="Write the plan for…",
        label_visibility="collapsed",
    )
    if name is None:
        st.caption("Bits and groups of every module, in the format that the tool reads.")
        return
    try:
        translation = translate(plan, info, PLAN_TARGETS[name])
    except InputError as error:
        st.error(words.escape(str(error)))
        return
    if not translation.substitutions or _accept_changes(translation, key):
        _render_file(translation, key)


def render_run_plan_export(record: dict, info: ModelInfo | None) -> None:
    """Render the export menu for a run's plan, if the plan and the model are known."""
    content = record["plan"].get("content")
    if not content or info is None:
        return
    st.caption("Export the plan for another tool")
    try:
        plan = Plan.from_json(content, info.matrices, info.other_bytes)
    except InputError as error:
        st.caption(words.escape(str(error)))
        return
    render_plan_export(plan, info, f"run-{record['run']['id']}")


def _accept_changes(translation: Translation, key: str) -> bool:
    """Show what the tool cannot express and the substitutes; return whether they were accepted."""
    title, modules = translation.target.title, words.plural(len(translation.assignments), "module")
    stored, nominal = words.size(translation.stored_bytes), words.size(translation.nominal_bytes)
    st.warning(
        f"{title} cannot express {len(translation.substitutions)} of {modules}. With the nearest "
        f"supported ones, the linear weights take {stored} instead of a nominal {nominal}."
    )
    rows = [
        {
            "modules": len(change.modules),
            "planned": change.planned,
            "exported as": change.taken,
            "reason": change.reason,
            "first module": change.modules[0],
        }
        for change in translation.changes
    ]
    st.dataframe(
        pd.DataFrame(rows),
        hide_index=True,
        height="content" if len(rows) <= 6 else 250,
        key=f"export-{key}-changes",
        alt="; ".join(f"{r['modules']} × {r['planned']} to {r['exported as']}" for r in rows),
    )
    return st.checkbox(
        "Use the nearest supported configurations",
        key=f"export-{key}-nearest-{translation.target.name}",
    )


def _render_file(translation: Translation, key: str) -> None:
    """Render the file to download, how to use it, and its size."""
    target = translation.target
    st.download_button(
        target.file_name,
        lambda: translation.text,
        target.file_name,
        "text/plain",
        key=f"export-{key}-file-{target.name}",
        on_click="ignore",
        icon=":material/download:",
    )
    st.code(translation.usage(), language=target.usage_language, wrap_lines=True)
    sizes = (
        f"Linear weights: {words.size(translation.stored_bytes)} in {target.title}, "
        f"{words.size(translation.nominal_bytes)} nominal here."
    )
    st.caption(words.escape(" ".join([sizes, *translation.notes])))
