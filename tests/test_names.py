"""External names are shown literally, never as links, images, HTML or formulas."""

from __future__ import annotations

import ast
import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from google.protobuf.message import Message
from streamlit.testing.v1 import AppTest

from lsq_core.charts.style import sanitize_figure
from lsq_core.jsontext import write_json
from lsq_core.results.export import csv_bytes, figure_block
from lsq_core.store.store import Store
from lsq_core.ui import words
from tests.conftest import ROOT
from tests.test_app import filled, filled_once  # noqa: F401

#: Text that a browser would fetch, link or run if it were treated as Markdown or HTML.
HOSTILE = (
    "![x](http://127.0.0.1:9/x.png) [y](http://127.0.0.1:9/y) <img src='http://127.0.0.1:9/z'> "
    "<a href='http://127.0.0.1:9/w'>w</a> www.evil.example"
)
PAGES = ["app.py", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "pages").glob("*.py"))]
#: Fields that are shown literally, or not at all.
_NOT_MARKDOWN = {
    *(
        "id",
        "form_id",
        "options",
        "default",
        "selection_default",
        "raw_value",
        "set_value",
        "url",
        "page",
        "page_script_hash",
    ),
    *("spec", "config", "columns", "placeholder", "query_string", "element_id", "key", "icon"),
}
_NO_MARKDOWN_IN = {"arrow_data_frame", "code", "html", "bidi_component", "plotly_chart"}
_ADDRESS = re.compile(r"://|www\.")


def find_active_markdown(markdown: str) -> list[str]:
    """Return the parts of a text that would be active as Markdown: brackets, tags and URLs."""
    bare = re.sub(r"\\.", "", markdown)
    return [*re.findall(r"[\[<]", bare), *_ADDRESS.findall(markdown)]


# --- escaping ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", [HOSTILE, r"\[a](b)", r"\\[a](b)", "`\\`[a](http://b)", "<http:b>"]
)
def test_inert_and_literal_escape_hostile_text(text):
    for markdown in (words.sanitize(text), words.escape(text)):
        assert find_active_markdown(markdown) == []
        assert words.sanitize(markdown) == markdown, "twice is as good as once"
    assert words.sanitize("**bold** and 3 %, `x`") == "**bold** and 3 %, `x`"


def test_escape_preserves_visible_text():
    """A pin in an error message must be readable as it was typed."""
    assert words.escape("*.layers_0.*") == r"\*.layers\_0.\*"
    assert words.escape("plain words, 3") == "plain words, 3"
    escaped = words.escape("# my_*_model\n> **x** ~~y~~")
    assert not re.search(r"(?m)^[#>]|(?<!\\)[*_~]", escaped)
    assert re.sub(r"\\(.)", r"\1", escaped) == "# my_*_model\n> **x** ~~y~~"


def test_only_safe_module_imports_streamlit():
    """A page that uses Streamlit directly would show names as Markdown."""
    importing_modules = []
    for path in [*map(ROOT.joinpath, PAGES), *(ROOT / "lsq_core" / "ui").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module != "streamlit.delta_generator":
                names = [node.module or ""]
            if any(name.split(".")[0] == "streamlit" for name in names):
                importing_modules.append(path.name)
    assert importing_modules == ["safe.py"]


# --- figures and files ------------------------------------------------------------------------


def test_inert_figure_escapes_html_tags():
    figure = go.Figure(
        go.Scatter(
            x=[HOSTILE, "b"],
            y=np.array([1.0, 2.0]),
            customdata=np.array([[HOSTILE, 1], ["b", 2]], dtype=object),
            text=[HOSTILE, "b"],
            name=HOSTILE,
            hovertemplate=f"{HOSTILE}<br>%{{y}}<extra></extra>",
        ),
        {"title": {"text": f"<b>{HOSTILE}</b>"}, "annotations": [{"text": HOSTILE}]},
    )
    spec = sanitize_figure(figure).to_json().replace("\\u003c", "<").replace("\\u002f", "/")
    assert set(re.findall(r"</?\w+", spec)) == {"<b", "</b", "<br", "<extra", "</extra"}
    page = figure_block(figure, HOSTILE).replace("\\u003c", "<").replace("\\u002f", "/")
    assert "<a href='http" not in page
    assert "<img src='http" not in page
    plain = go.Figure(go.Scatter(x=["a"], y=[1]))
    assert sanitize_figure(plain) is plain


def test_csv_bytes_escapes_formulas():
    frame = pd.DataFrame(
        {
            "=cmd": ["=1+1", "@x", "+x", "-x", "\t=1", "\r=1", "-1.5", None, "a=b"],
            "n": [-1.5, 2, 3, 4, 5, 6, 7, np.nan, 8],
            "kind": pd.Categorical(["=k"] * 9),
        }
    )
    rows = list(csv.reader(io.StringIO(csv_bytes(frame).decode("utf8"), newline="")))
    assert rows[0] == ["'=cmd", "n", "kind"]
    assert [row[0] for row in rows[1:7]] == ["'=1+1", "'@x", "'+x", "'-x", "'\t=1", "'\n=1"]
    assert [row[0] for row in rows[7:]] == ["-1.5", "", "a=b"]
    assert rows[1][1:] == ["-1.5", "'=k"]
    assert csv_bytes(frame.iloc[:0]).decode("utf8").strip() == "'=cmd,n,kind"


# --- the pages --------------------------------------------------------------------------------


def insert_hostile_names(store: Store, folder: Path, text: str) -> None:
    """Insert hostile names everywhere: notes, corpora, models, plans, methods, jobs."""
    with store.transaction() as connection:
        connection.execute("UPDATE runs SET note = $1", [text])
        connection.execute("UPDATE evaluations SET corpus = $1", [text])
        connection.execute(
            "INSERT INTO models BY NAME SELECT * REPLACE ($1 AS source, 'f' AS fingerprint) "
            "FROM models LIMIT 1",
            [text],
        )
        connection.execute(
            "INSERT INTO plans BY NAME SELECT * REPLACE ('p' AS id, $1 AS name) FROM plans LIMIT 1",
            [text],
        )
        connection.execute(
            "UPDATE runs SET method = $1 WHERE id = (SELECT min(id) FROM runs)", [text]
        )
    for number, state in enumerate(("failed", "cancelled", "interrupted")):
        job_folder = folder / "jobs" / f"2026010{number}-000000-0000"
        job_folder.mkdir(parents=True)
        arguments = ["run", "--model", text, "--method", text, "--corpus", text]
        write_json(
            job_folder / "job.json",
            {"id": job_folder.name, "arguments": arguments, "created": 1.7e9},
        )
        progress = {"state": state, "message": text, "stage": "store", "done": 1, "total": 2}
        write_json(
            job_folder / "progress.json", progress | {"seconds": 2.0, "memory": 1, "eta": None}
        )
        (job_folder / "log.txt").write_text(text)
    (folder / "jobs" / "20260107-000000-0000").mkdir()
    (folder / "jobs" / "20260107-000000-0000" / "job.json").write_text("")


def _message_texts(message: Message) -> Iterator[tuple[str, str]]:
    """Yield the field name and text of everything in an element that is shown as Markdown."""
    for field, value in message.ListFields():
        if field.name in _NOT_MARKDOWN or field.name in _NO_MARKDOWN_IN:
            continue
        parts = value if field.is_repeated else [value]
        for part in parts:
            if isinstance(part, Message):
                yield from _message_texts(part)
            elif isinstance(part, str):
                yield field.name, part


def _markdown_texts(app: AppTest) -> Iterator[tuple[str, str]]:
    for node in app:
        proto = getattr(node, "proto", None)
        if isinstance(proto, Message) and getattr(node, "type", "") not in _NO_MARKDOWN_IN:
            yield from ((f"{node.type}.{field}", text) for field, text in _message_texts(proto))


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("model", ["known", "hostile"])
def test_pages_show_no_active_markdown(page, model, filled):  # noqa: F811
    insert_hostile_names(Store(filled.path), filled.path.parent, HOSTILE)
    app = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60)
    app.query_params["model"] = filled.model if model == "known" else HOSTILE
    app.run()
    if page != "app.py":
        app.switch_page(page).run()
    assert not app.exception
    texts = list(_markdown_texts(app))
    assert len(texts) > 5
    assert [(field_path, text) for field_path, text in texts if find_active_markdown(text)] == []
    if model == "hostile" and page in ("app.py", "pages/2_Plan.py"):
        assert any("127.0.0.1" in text for _, text in texts), "nothing hostile was shown"
