"""Facts about the chosen model, without loading its weights."""

from __future__ import annotations

import pandas as pd

from lsq_core import charts
from lsq_core.bits import LADDER, QuantConfig, is_divisible
from lsq_core.model.info import ModelInfo
from lsq_core.model.source import ModelSource
from lsq_core.planning.detection import shallow_model_note
from lsq_core.quantization.registry import planned_bytes
from lsq_core.store.store import Store
from lsq_core.ui import cached, cached_results, state, words
from lsq_core.ui.safe import st
from lsq_core.units import format_bytes

#: The configuration quoted in the first line.
_TYPICAL = QuantConfig(4, 64)


def show_model(info: ModelInfo, with_sizes: bool = True) -> None:
    """Show the model's facts, its size at each configuration, and warnings."""
    sizes = size_frame(info)
    common = sizes[sizes["config"] == _TYPICAL.name]
    size = f", {words.size(info.file_bytes)}" if info.file_bytes else ""
    quantized_size = (
        words.size(float((common["linear_bytes"] + common["other_bytes"]).iloc[0]))
        if len(common)
        else ""
    )
    _facts_line(
        f"{words.count(info.parameters)} parameters{size}"
        + (f"; {quantized_size} at {_TYPICAL.stop_name} bits." if quantized_size else "."),
        f"{state.model_text(_source(info))} · {info.architecture} · read from its config and file "
        "headers; no weights loaded",
    )
    facts = st.columns(5)
    facts[0].metric("Layers", info.layers)
    facts[1].metric("Parameters", f"{info.parameters:,}")
    facts[2].metric("On disk", format_bytes(info.file_bytes) if info.file_bytes else "unknown")
    facts[3].metric(
        "Quantizable weights", f"{100 * info.coverage:.1f} %", help=_coverage_help(info)
    )
    facts[4].metric("Context", f"{info.context:,} tokens")
    if with_sizes:
        show_sizes(sizes)
    if shallow_model_note(info.layers):
        st.warning(shallow_model_note(info.layers), icon=":material/layers:")
    for note in info.notes:
        st.warning(words.escape(note), icon=":material/rule:")
    if info.left_out:
        with st.expander(f"{len(info.left_out)} matrices stay in full precision"):
            st.write("No supported group size divides these:")
            st.code("\n".join(info.left_out), language=None)


def _facts_line(text: str, caption: str) -> None:
    st.subheader(text, anchor=False)
    st.caption(caption)


def _coverage_help(info: ModelInfo) -> str:
    return (
        f"{info.linear_parameters:,} parameters in {len(info.matrices)} weight matrices of the "
        "decoder blocks; embeddings, norms and the LM head are not quantized."
    )


def show_published(store: Store, info: ModelInfo, with_sizes: bool = True) -> None:
    """Show the published facts about a model without weights."""
    whole = bool(info.file_bytes)  # else only the linear weights are known
    sizes = size_frame(info)
    common = sizes[sizes["config"] == _TYPICAL.name].iloc[0]
    _facts_line(
        f"{words.count(info.parameters)} {'' if whole else 'linear '}parameters; "
        f"at {_TYPICAL.stop_name} bits {words.size(common['linear_bytes'] + common['other_bytes'])}"
        + ("." if whole else " without embeddings and LM head."),
        f"{info.source} · published measurements, no local weights: explore, plan and compare",
    )
    profiles = len(cached.published_settings(store, info))
    runs = cached_results.results(store, "published")
    facts = st.columns(6)
    facts[0].metric("Layers", info.layers)
    facts[1].metric("Parameters", f"{info.parameters:,}" if whole else "not published")
    facts[2].metric("Linear parameters", f"{info.linear_parameters:,}", help=_coverage_help(info))
    facts[3].metric("Quantizable weights", f"{100 * info.coverage:.1f} %" if whole else "unknown")
    facts[4].metric("Published profiles", profiles)
    facts[5].metric("Published runs", runs.loc[runs["model"] == info.source, "run"].nunique())
    if with_sizes:
        show_sizes(sizes)
    if not whole:
        st.caption("The bars show linear weights only; the size of the rest was not published.")


def show_sizes(sizes: pd.DataFrame) -> None:
    """Show the size of the full model as bars."""
    whole = sizes["linear_bytes"] + sizes["other_bytes"]
    labels = [f"{name} {words.size(size)}" for name, size in zip(sizes["name"], whole, strict=True)]
    st.plotly_chart(
        charts.size_bars(sizes),
        config=charts.CONFIG,
        key="sizes",
        alt=f"Size of the model by bits per linear weight: {', '.join(labels)}.",
    )


def _source(info: ModelInfo) -> ModelSource:
    return ModelSource(info.source, info.revision)


def size_frame(info: ModelInfo) -> pd.DataFrame:
    """Return bytes of the full model as stored and at each stop that fits all its matrices."""
    gguf = info.config.get("gguf")
    other = info.file_bytes - gguf["block_bytes"] if gguf else info.other_bytes
    own_name = "16 bits" if cached.is_published(info) else "original"
    name = f"GGUF {gguf['type']}" if gguf else own_name
    rows = [(name, "", max(info.file_bytes - other, 0), other)] if info.file_bytes else []
    for config in LADDER:
        if all(is_divisible(m.numel, config.group_size) for m in info.matrices):
            linear = sum(planned_bytes("hqq", m.shape, config, "8bit") for m in info.matrices)
            rows.append((config.stop_name, config.name, linear, info.other_bytes))
    return pd.DataFrame(rows, columns=["name", "config", "linear_bytes", "other_bytes"])
