"""A result card: a shareable picture of one run, as PNG and as a self-contained page.

Both are drawn from the same shapes, so they look alike. Needs no torch.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lsq_core.charts import method_style
from lsq_core.charts.style import style_key
from lsq_core.errors import InputError
from lsq_core.evaluation.noise import format_figure, format_noise
from lsq_core.evaluation.result import UNUSABLE_RATIO
from lsq_core.jobs.arguments import reproduce_command
from lsq_core.model.gguf import SMOLLM2
from lsq_core.planning.frame import plan_to_frame
from lsq_core.results.card_drawing import draw_png, draw_svg, font_css
from lsq_core.results.card_layout import Card, Figure, lay_out
from lsq_core.results.compare import same_measurement
from lsq_core.results.difference import run_difference
from lsq_core.results.gains import Gain, describe_gain, gain_of_run
from lsq_core.store.models import PUBLISHED
from lsq_core.units import format_bytes

if TYPE_CHECKING:
    from lsq_core.store.store import Store

Record = Mapping[str, Mapping[str, Any]]

#: Names of the built-in models for readers who do not know their short names.
_MODEL_TITLES = {SMOLLM2: "SmolLM2-135M-Instruct", "demo": "LSQ Explorer's demo model"}
#: Separates a number from its unit, so that no line breaks there.
_NBSP = "\u00a0"
#: Digits of a fingerprint shown on a card.
_FINGERPRINT_DIGITS = 12


def run_card(store: Store, evaluation: str) -> Card:
    """Return the content of an evaluated run's card.

    The gain is over the uniform run of nearest size from the same measurement, where the size is
    measured bytes, or nominal bits if bytes were not published.

    Raises
    ------
    InputError
        If there is no such evaluation.
    """
    record = store.record(evaluation)
    run, own, plan = record["run"], record["evaluation"], record["plan"]
    runs = same_measurement(store.results(run["fingerprint"], origin=None), evaluation)
    measured = run["measured_bytes"] is not None
    gain = gain_of_run(runs, evaluation, "measured_bytes" if measured else "bits_per_param")
    base = None
    if gain is not None:
        base = float(runs.set_index("evaluation").loc[gain.uniform, "bits_per_param"])
    key = style_key(run["method"], run["quantizer"])
    bits = plan.get("bits_per_param")
    setup = [method_style(key).title, f"{bits:.2f} bits per linear weight" if bits else ""]
    setup.append("" if key == run["quantizer"] else f"quantized by {run['quantizer'].upper()}")
    tokens = f"{own['tokens']:,} tokens" if own["tokens"] else ""
    foot = [own["corpus"], own["protocol"], tokens, _noise(record), _origin(record)]
    figures = [_perplexity(record), *_sizes(record), *_gain_figure(store, gain, base)]
    return Card(
        model=model_title(record["model"].get("source") or run["fingerprint"]),
        setup=" · ".join(filter(None, setup)),
        headline=_headline(record, gain, base, measured),
        figures=tuple(figures),
        plan=plan_to_frame(plan.get("content") or {}),
        foot=" · ".join(filter(None, foot)),
        mark=f"model {_short_fingerprint(run['fingerprint'])} · run {run['id']}",
    )


def model_title(source: str) -> str:
    """Return a model's name without its parent folders or owner."""
    name = source.removeprefix(PUBLISHED).rstrip("/")
    return _MODEL_TITLES.get(name) or name.rpartition("/")[2]


def _short_fingerprint(fingerprint: str) -> str:
    if fingerprint.startswith(PUBLISHED):
        return fingerprint
    return fingerprint[:_FINGERPRINT_DIGITS]


def _origin(record: Record) -> str:
    if record["run"]["origin"] == "published":
        return "published by the methods’ authors"
    return record["run"]["machine"] or ""


def _noise(record: Record) -> str:
    """Describe how much the perplexity changes with the arithmetic alone."""
    if record["noise"]:
        share = format_noise(record["noise"]["perplexity"])
        return f"arithmetic {share}".replace(" %", _NBSP + "%")
    return "" if record["run"]["origin"] == "published" else "numerical noise not measured"


def _increase(record: Record) -> float | None:
    """Return the increase of perplexity over full precision, as a share."""
    full = record["full"].get("perplexity")
    return record["evaluation"]["perplexity"] / full - 1 if full else None


def _headline(record: Record, gain: Gain | None, base: float | None, measured: bool) -> str:
    if gain is not None:
        sentence = describe_gain(gain, base, "memory" if measured else "bits")
        return sentence.replace(" %", _NBSP + "%")
    increase, bits = _increase(record), record["plan"].get("bits_per_param")
    at = f" at {bits:.2f} bits" if bits else ""
    if increase is None:
        return f"Perplexity {record['evaluation']['perplexity']:.2f}{at}"
    if increase > UNUSABLE_RATIO - 1:
        return f"{_ratio(increase)} full precision’s perplexity{at}: unusable"
    return f"Perplexity {_change(increase)} over full precision{at}"


def _change(increase: float) -> str:
    """Format 0.385 as ``+38.5 %``, but 18.2 as ``19.2 ×``, clearer than a huge percentage."""
    return _ratio(increase) if increase > UNUSABLE_RATIO - 1 else _signed(increase)


def _ratio(increase: float) -> str:
    ratio = 1 + increase
    return f"{ratio:,.0f}{_NBSP}×" if ratio >= 100 else f"{ratio:.3g}{_NBSP}×"


def _perplexity(record: Record) -> Figure:
    full, increase = record["full"].get("perplexity"), _increase(record)
    about = "" if full is None else f"full precision {full:.2f} ({_change(increase)})"
    noise = record["noise"].get("perplexity")
    return Figure("Perplexity", format_figure(record["evaluation"]["perplexity"], noise, 2), about)


def _sizes(record: Record) -> list[Figure]:
    run, bits = record["run"], record["plan"].get("bits_per_param")
    figures = []
    if run["measured_bytes"] is not None:
        size = format_bytes(run["measured_bytes"])
        figures.append(Figure("Linear weights", size, "measured bytes"))
    elif bits:
        figures.append(Figure("Linear weights", f"{bits:.2f} bits", "nominal, metadata included"))
    if run["model_bytes"] is not None:
        size = format_bytes(run["model_bytes"])
        figures.append(Figure("Whole model", size, "with embeddings, norms and head"))
    return figures


def _gain_figure(store: Store, gain: Gain | None, base: float | None) -> list[Figure]:
    """Return the change of perplexity from the uniform run, with its interval if known."""
    if gain is None:
        return []
    about = "perplexity"
    try:
        found = run_difference(store, gain.evaluation, gain.uniform)
        low, high = found.difference.low, found.difference.high
        if low == low:  # NaN if there are too few windows
            about = f"95 % interval {_signed(low)} to {_signed(high)}"
    except InputError:  # published without windows
        about = "no interval: published without windows"
    return [Figure(f"Perplexity against uniform {base:.2f}", _signed(-gain.drop), about)]


def _signed(share: float) -> str:
    """Format -0.532 as ``−53.2 %`` with a non-breaking space."""
    percent = round(100 * share, 1)
    return f"{percent:+.1f}{_NBSP}%".replace("-", "−") if percent else f"0.0{_NBSP}%"


# --- files ----------------------------------------------------------------------------------


def card_png(store: Store, evaluation: str) -> bytes:
    """Return a run's card as PNG: 1200 × 630 units, two pixels per unit."""
    return draw_png(lay_out(run_card(store, evaluation)))


def card_html(store: Store, evaluation: str) -> str:
    """Return a run's card as a self-contained HTML page, with its command line."""
    card, record = run_card(store, evaluation), store.record(evaluation)
    title = f"{card.model}: {card.headline}"
    figures = ", ".join(f"{f.label} {f.value}" for f in card.figures)
    svg = draw_svg(lay_out(card), f"{title}. {card.setup}. {figures}.")
    run = record["run"]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_CONTENT_SECURITY_POLICY}">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{font_css()}{_STYLE}</style></head>"
        f"<body><main>{svg}<p>Model fingerprint <code>{html.escape(run['fingerprint'])}</code>. "
        f"To reproduce:</p><pre>{html.escape(reproduce_command(record))}</pre></main></body>"
        "</html>\n"
    )


_CONTENT_SECURITY_POLICY = "default-src 'none'; style-src 'unsafe-inline'; font-src data:"
_STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #eef1f4; color: #1c2530; font: 15px/1.5 "Card", sans-serif; }
main { max-width: 1200px; margin: 2rem auto; padding: 0 1rem; }
svg { display: block; width: 100%; font-family: "Card", sans-serif; border-radius: 6px;
      box-shadow: 0 1px 3px #1c253033; }
p { margin: 1.2rem 0 .3rem; } code, pre { overflow-wrap: anywhere; white-space: pre-wrap; }
pre { background: #fff; padding: .8rem 1rem; border-radius: 6px; margin: 0; }
"""
