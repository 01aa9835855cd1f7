"""Export of results: tables as CSV and Parquet, figures as HTML, citations. Needs no torch."""

from __future__ import annotations

import html
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsq_core.charts.style import CONFIG, sanitize_figure
from lsq_core.store import database

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

#: Lets an exported page draw its own content and load nothing else, whatever its libraries try.
_CONTENT_SECURITY_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"
)
#: The colour of a figure's text on the white background of an exported page.
_TEXT_COLOUR = "#1c2530"


# --- tables ---------------------------------------------------------------------------------


def csv_bytes(frame: pd.DataFrame) -> bytes:
    """Return a table as CSV in UTF-8, with numbers in full precision and formulas escaped."""
    safe = frame.rename(columns=_escape_formula)
    for column_index, kind in enumerate(frame.dtypes):
        if kind.kind == "O":  # texts, including categories and pandas' own strings
            safe.isetitem(
                column_index, frame.iloc[:, column_index].astype(object).map(_escape_formula)
            )
    return safe.to_csv(index=False).encode("utf8")


def _escape_formula(value: object) -> object:
    """Prefix a text that a spreadsheet would read as a formula with an apostrophe.

    Carriage returns become line feeds, because pandas does not quote them and an unquoted one would
    end the row.
    """
    if isinstance(value, str):
        value = value.replace("\r\n", "\n").replace("\r", "\n")
    if not isinstance(value, str) or not value.startswith(("=", "+", "-", "@", "\t", "\n")):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def parquet_bytes(frame: pd.DataFrame) -> bytes:
    """Return a table as Parquet, written by DuckDB."""
    with (
        tempfile.TemporaryDirectory() as folder,
        database.connect_in_memory(files=Path(folder)) as connection,
    ):
        path = Path(folder) / "table.parquet"
        connection.register("frame", frame.reset_index(drop=True))
        connection.table("frame").write_parquet(str(path))
        return path.read_bytes()


# --- figures --------------------------------------------------------------------------------


def figure_html(figure: go.Figure, title: str) -> str:
    """Return a figure as a self-contained page with buttons that save it as PNG or SVG."""
    return html_document(title, figure_block(figure, title))


def figure_block(figure: go.Figure, name: str) -> str:
    """Return a figure for :func:`html_document`, with buttons to save it as PNG or SVG."""
    from plotly.io import to_html

    print_figure = type(figure)(sanitize_figure(figure)).update_layout(
        font_color=_TEXT_COLOUR, template="plotly_white"
    )
    plot_html = to_html(print_figure, config=CONFIG, include_plotlyjs=False, full_html=False)
    stem = html.escape(re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-").lower())
    save_buttons = "".join(
        f'<button data-format="{kind}" data-name="{stem}">{kind.upper()}</button>'
        for kind in ("png", "svg")
    )
    return (
        f'<figure>{plot_html}<figcaption class="saves">Save as {save_buttons}</figcaption></figure>'
    )


_SAVE = """
for (const button of document.querySelectorAll("[data-format]"))
  button.onclick = () => Plotly.downloadImage(
    button.closest("figure").querySelector(".js-plotly-plot"),
    {format: button.dataset.format, filename: button.dataset.name, scale: 2});
"""
_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2530; background: #fff;
       max-width: 1080px; margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.8rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
p.under, figcaption { color: #566270; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #d9dee4; }
td.number { text-align: right; }
figure { margin: 1rem 0; } .scroll { overflow: auto; max-height: 34rem; }
pre { background: #f3f5f7; padding: .8rem 1rem; overflow-x: auto; white-space: pre-wrap;
      overflow-wrap: anywhere; }
button { font: inherit; margin-left: .4rem; padding: .05rem .6rem; cursor: pointer; }
@media print { .saves { display: none; } .scroll { max-height: none; } }
"""


def html_document(title: str, body: str) -> str:
    """Return a self-contained HTML page that includes Plotly."""
    from plotly.offline import get_plotlyjs

    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_CONTENT_SECURITY_POLICY}">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>"
        f"<script>{get_plotlyjs()}</script></head><body>{body}<script>{_SAVE}</script>"
        "</body></html>\n"
    )


# --- citations ------------------------------------------------------------------------------

_PAPERS = {
    "A": """@misc{zhang2025layersensitive,
  title         = {Towards Superior Quantization Accuracy: A Layer-sensitive Approach},
  author        = {Feng Zhang and Yanbin Liu and Weihua Li and Jie Lv and Xiaodan Wang and Quan Bai},
  year          = {2025},
  eprint        = {2503.06518},
  archivePrefix = {arXiv}
}""",  # noqa: E501
    "B": """@inproceedings{zhang2025mxq,
  title     = {A Mixed Quantization Approach for Data-Free Quantization of {LLMs}},
  author    = {Feng Zhang and Yanbin Liu and Weihua Li and Xiaodan Wang and Quan Bai},
  booktitle = {Proceedings of the 17th International Conference on Agents and Artificial Intelligence
               (ICAART 2025), Volume 2},
  year      = {2025},
  pages     = {353--363},
  doi       = {10.5220/0013159100003890}
}""",  # noqa: E501
    "HQQ": """@misc{badri2023hqq,
  title  = {Half-Quadratic Quantization of Large Machine Learning Models},
  author = {Hicham Badri and Appu Shaji},
  year   = {2023},
  url    = {https://mobiusml.github.io/hqq_blog/}
}""",
}


def bibtex(record: Mapping[str, Mapping[str, Any]]) -> str:
    """Return BibTeX entries for the methods' papers and for the run, which it identifies.

    ``record`` is from :meth:`lsq_core.store.store.Store.record`.
    """
    run, own, plan = record["run"], record["evaluation"], record["plan"]
    versions = ", ".join(f"{name} {text}" for name, text in (run["versions"] or {}).items())
    details = {
        "model": record["model"].get("source"),
        "model fingerprint": run["fingerprint"],
        "plan": f"{run['method']}, {plan['bits_per_param']:.4f} bits per parameter",
        "perplexity": f"{own['perplexity']:.4f} on {own['corpus']} ({own['protocol']})",
        "corpus SHA-256": own["corpus_sha256"],
        "versions": versions,
    }
    note = "; ".join(f"{name}: {_escape_tex(str(text))}" for name, text in details.items() if text)
    fields = {
        "title": f"{_escape_tex(run['method'])} at {plan['bits_per_param']:.4f} bits per parameter",
        "year": run["created"].year,
        "howpublished": f"LSQ Explorer, run {run['id']}",
        "note": note,
    }
    lines = [f"  {name:<12} = {{{text}}}," for name, text in fields.items()]
    entry = "\n".join([f"@misc{{lsq-run-{run['id']},", *lines, "}"])
    return "\n\n".join([*_PAPERS.values(), entry]) + "\n"


def _escape_tex(text: str) -> str:
    r"""Escape TeX's special characters: ``my_model`` becomes ``my\_model``."""
    escaped = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return re.sub(r"[\\~^#$%&_{}]", lambda m: escaped.get(m[0], "\\" + m[0]), text)
