"""Self-contained HTML reports of a run or a comparison. Needs no torch."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lsq_core import charts
from lsq_core.evaluation.divergence import format_distribution
from lsq_core.evaluation.noise import describe_noise, describe_unknown, format_figure
from lsq_core.planning.frame import plan_to_frame
from lsq_core.results.compare import byte_shares, run_settings
from lsq_core.results.export import bibtex, figure_block, html_document
from lsq_core.units import format_bytes

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from lsq_core.model.info import Matrix


#: Who measured a run, by origin.
_ORIGINS = {
    "measured": "measured",
    "shipped": "shipped with LSQ Explorer",
    "published": "published by the methods' authors",
}


@dataclass
class HtmlReport:
    """A page that is written from top to bottom; all text is escaped."""

    title: str
    parts: list[str] = field(default_factory=list)

    def paragraph(self, text: str) -> None:
        """Add a paragraph in a muted colour."""
        self.parts.append(f'<p class="under">{html.escape(text)}</p>')

    def section(self, title: str) -> None:
        """Add a heading."""
        self.parts.append(f"<h2>{html.escape(title)}</h2>")

    def figure(self, figure: go.Figure, name: str) -> None:
        """Add a figure that can be saved from the page under a name."""
        self.parts.append(figure_block(figure, name))

    def code(self, text: str) -> None:
        """Add preformatted text to be copied."""
        self.parts.append(f"<pre>{html.escape(text)}</pre>")

    def table(self, frame: pd.DataFrame) -> None:
        """Add a table; numbers are right-aligned and missing values empty."""
        head = "".join(f"<th>{html.escape(str(name))}</th>" for name in frame.columns)
        rows = "".join(
            "<tr>" + "".join(map(_cell, row)) + "</tr>" for row in frame.itertuples(index=False)
        )
        self.parts.append(
            f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
            f"<tbody>{rows}</tbody></table></div>"
        )

    def definition_table(self, definition_table: Mapping[str, str]) -> None:
        """Add a table of names and texts."""
        rows = "".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(text))}</td></tr>"
            for name, text in definition_table.items()
        )
        self.parts.append(f"<table>{rows}</table>")

    def page(self) -> str:
        """Return the complete, self-contained page."""
        heading = f"<h1>{html.escape(self.title)}</h1>"
        return html_document(self.title, heading + "\n".join(self.parts))


def _cell(value: object) -> str:
    if value is None or value != value:
        return "<td></td>"
    if isinstance(value, float):
        return f'<td class="number">{value:.6g}</td>'
    number = ' class="number"' if isinstance(value, int) else ""
    return f"<td{number}>{html.escape(str(value))}</td>"


def format_run_figures(record: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return a run's formatted figures by name; ``record`` is from :meth:`Store.record`."""
    own, run, plan = record["evaluation"], record["run"], record["plan"]
    known = {
        "perplexity": _perplexity(own["perplexity"], record),
        "full precision": _full_precision(record),
        "numerical noise": _noise(record),
        "KL divergence, nats": _divergence(own),
        "KL divergence by token": _divergence_by_token(own),
        "top-1 agreement": _percent(own["top1"]),
        "bits per parameter": _number(plan.get("bits_per_param"), ".4f"),
        "linear weights, planned": _bytes(plan.get("planned_bytes")),
        "linear weights, measured": _bytes(run["measured_bytes"]),
        "whole model": _bytes(run["model_bytes"]),
        "quantization time": _number(run["quantize_seconds"] or None, ".1f", " s"),
        "time by stage": _seconds(own.get("seconds") or {}),
        "tokens per second": _number(own["tokens_per_second"], ".0f"),
        "working memory": _bytes(own["working_bytes"]),
    }
    return {name: text for name, text in known.items() if text}


def _perplexity(value: float | None, record: Mapping[str, Mapping[str, Any]]) -> str:
    """Format a perplexity without digits below the noise floor."""
    return "" if value is None else format_figure(value, record["noise"].get("perplexity"))


def _noise(record: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the noise floor, or how to measure it; '' for a published run."""
    if record["noise"]:
        return describe_noise(record["noise"])
    made_with = record["evaluation"].get("provenance") or {}
    model = record["model"].get("source")
    if record["run"]["origin"] == "published" or not model or not made_with.get("dtype"):
        return ""
    return describe_unknown(model, record["evaluation"]["protocol"], made_with["dtype"])


def _full_precision(record: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the paired full-precision perplexity, and the run's relative change from it."""
    full = record["full"].get("perplexity")
    if not full:
        return ""
    own = record["evaluation"]
    change = f"{100 * (own['perplexity'] / full - 1):+.2f} %"
    text = f"{_perplexity(full, record)} (this run {change})"
    inferred = "; paired by an older version, possibly across package versions"
    return text + (inferred if own["pairing"] == "inferred" else "")


def _seconds(times: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {taken:.1f} s" for name, taken in times.items())


def _divergence(own: Mapping[str, Any]) -> str:
    """Return the mean KL divergence, with its interval if it has one."""
    found = own.get("divergence") or {}
    if found.get("low") is None:
        return _number(own["kl"], ".4f")
    return f"{own['kl']:.4f} (95 % interval {found['low']:.4f} to {found['high']:.4f})"


def _divergence_by_token(own: Mapping[str, Any]) -> str:
    found = own.get("divergence")
    if not found:
        return ""
    return (
        f"{format_distribution(found)}; log-probability of the next token changed by "
        f"{found['rms_log_prob']:.3g} (RMS)"
    )


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None or value != value else f"{value:{form}}{unit}"


def _percent(share: float | None) -> str:
    return "" if share is None or share != share else f"{100 * share:.1f} %"


def _bytes(value: float | None) -> str:
    return "" if value is None or value != value else f"{format_bytes(value)} ({int(value):,} B)"


def run_report(
    record: Mapping[str, Mapping[str, Any]],
    matrices: Iterable[Matrix],
    command: str,
    beside: go.Figure | None = None,
) -> str:
    """Return an HTML report of a run.

    Parameters
    ----------
    record
        From :meth:`lsq_core.store.store.Store.record`.
    matrices
        The model's matrices, for their numbers of weights.
    command
        The command line that reproduces the run.
    beside
        A figure of the run among others of the same measurement.
    """
    run, own, plan = record["run"], record["evaluation"], record["plan"]
    method = charts.method_style(run["method"]).title
    bits = plan.get("bits_per_param")
    report = HtmlReport(
        f"{method}, {bits:.2f} bits: perplexity {own['perplexity']:.2f} on {own['corpus']}"
    )
    report.paragraph(
        f"{record['model'].get('source')}, run {run['id']} of {run['created']:%Y-%m-%d %H:%M} UTC, "
        + _ORIGINS[run["origin"]]
        + f", {own['protocol']}. Written by LSQ Explorer."
    )
    if run["note"]:
        report.paragraph(f"Note: {run['note']}")
    report.section("Figures")
    report.definition_table(format_run_figures(record))
    if beside is not None:
        report.figure(beside, f"run {run['id']} among others")
    _plan_section(report, record, matrices)
    report.section("Settings and provenance")
    report.definition_table(run_settings(record))
    report.section("Command line to reproduce this run")
    report.code(command)
    report.section("Citation")
    report.code(bibtex(record))
    return report.page()


def _plan_section(
    report: HtmlReport, record: Mapping[str, Mapping[str, Any]], matrices: Iterable[Matrix]
) -> None:
    modules = plan_to_frame(record["plan"].get("content") or {})
    report.section("Plan")
    if modules.empty:
        report.paragraph("The plan, module by module, was not published.")
        return
    name = f"plan of run {record['run']['id']}"
    report.figure(charts.plan_heatmap(modules), name)
    weights = {m.name: m.numel for m in matrices}
    report.figure(charts.plan_ring(byte_shares(modules, weights), "bytes"), f"{name} ring")
    report.table(modules.rename(columns={"z": "ranked by"}))


def comparison_report(
    title: str, under: str, figures: Mapping[str, go.Figure], runs: pd.DataFrame
) -> str:
    """Return an HTML report of several runs: figures by heading, and a table of all runs."""
    report = HtmlReport(title)
    report.paragraph(under)
    for heading, figure in figures.items():
        report.section(heading)
        report.figure(figure, heading)
    report.section("Runs")
    report.table(runs)
    return report.page()
