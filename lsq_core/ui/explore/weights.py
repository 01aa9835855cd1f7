"""Weights as a histogram with a quantization grid, percentiles over layers, or a 3-D surface."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lsq_core import charts
from lsq_core.bits import DETECTION_CONFIG, EXTENDED_LADDER, QuantConfig, is_divisible
from lsq_core.model.info import Matrix, ModelInfo
from lsq_core.profiling import weights
from lsq_core.profiling.weights import WeightReader
from lsq_core.quantization.registry import MATRIX_QUANTIZERS, quantizer_spec, unavailable_reason
from lsq_core.ui import cached
from lsq_core.ui.explore.profile import ExploreView
from lsq_core.ui.page import next_step
from lsq_core.ui.safe import st
from lsq_core.ui.state import ensure_valid_choice

_PLOTS = {"histogram": "Histogram", "bands": "Percentiles over layers", "surface": "3-D surface"}
_GROUPS = {"typical": "a typical group", "widest": "the widest group", "all": "all groups"}
#: Seconds that the page reads weights before it shows progress.
_READ_SECONDS = 0.6


def show(view: ExploreView) -> None:
    """Show the weights by the chosen plot."""
    folder = None if view.published else weights.weights_folder(view.ctx.source)
    if folder is None:
        _render_no_weights(view)
        return
    opened = open_weights(folder, view.info)
    if not opened.matrices:
        view.render_headline(
            "The weights of this model cannot be shown.",
            "Its files store the matrices under names that differ from its modules'.",
        )
        return
    with view.row:
        plot = st.segmented_control(
            "Show",
            list(_PLOTS),
            format_func=_PLOTS.get,
            required=True,
            default=None if "weights_show" in st.session_state else "histogram",
            key="weights_show",
            label_visibility="collapsed",
            persist_state="session",
        )
    draw = {"histogram": _show_histogram, "bands": _show_bands, "surface": _show_surface}[plot]
    draw(view, opened)


def _render_no_weights(view: ExploreView) -> None:
    name = view.ctx.source.name
    if view.published:
        view.render_headline(
            f"The weights of {name} are not available.",
            "Only its published measurements were imported, which have no percentiles of the "
            "weights.",
        )
        next_step("app.py", "Choose a model with weights")
    else:
        view.render_headline(
            f"The weights of {name} are not on this machine yet.",
            "Profile it to download them; weights are shown from safetensors files only.",
        )


def open_weights(folder: Path, info: ModelInfo) -> WeightReader:
    """Open a model's weight files, cached by model and folder."""
    return _open_weights(folder, info, f"{cached.model_key(info)} in {folder}")


@st.cache_resource(max_entries=4, show_spinner=False)
def _open_weights(_folder: Path, _info: ModelInfo, cache_key: str) -> WeightReader:
    return WeightReader(_folder, _info.matrices)


# --- choosing -------------------------------------------------------------------------------


def _module_types(opened: WeightReader) -> list[str]:
    return list(dict.fromkeys(m.type for m in opened.matrices))


def _select_module_type(opened: WeightReader) -> str:
    ensure_valid_choice("weights_type", _module_types(opened))
    return st.selectbox(
        "Module type",
        _module_types(opened),
        format_func=charts.short_type,
        key="weights_type",
        persist_state="session",
    )


def _select_matrix(opened: WeightReader) -> Matrix:
    """Select a matrix by type and layer, and by expert if there are several."""
    kind = _select_module_type(opened)
    of_kind = [m for m in opened.matrices if m.type == kind]
    layers = list(dict.fromkeys(m.layer for m in of_kind))
    ensure_valid_choice("weights_layer", layers)
    layer = st.selectbox("Layer", layers, key="weights_layer", persist_state="session")
    in_layer = [m for m in of_kind if m.layer == layer]
    if len(in_layer) == 1:
        return in_layer[0]
    experts = [m.expert for m in in_layer]
    ensure_valid_choice("weights_expert", experts)
    chosen = st.selectbox("Expert", experts, key="weights_expert", persist_state="session")
    return in_layer[experts.index(chosen)]


# --- the histogram --------------------------------------------------------------------------


@dataclass(frozen=True)
class _GridChoice:
    """The quantization grid to draw: configuration, quantizer, and which groups."""

    config: QuantConfig | None
    quantizer: str
    of: str


def _show_histogram(view: ExploreView, opened: WeightReader) -> None:
    left, right = st.columns([1, 3.4], gap="medium")
    with left:
        matrix = _select_matrix(opened)
        grid = _grid_choice(matrix)
        log = st.toggle("Logarithmic counts", value=True, key="weights_log")
    weight = opened.region(matrix)
    hist = _matrix_histogram(view, opened, matrix)
    _render_tail_headline(view, matrix, weight, hist)
    with right:
        st.plotly_chart(
            charts.weight_histogram(
                hist.edges,
                hist.counts,
                hist.expected,
                charts.module_color(matrix.type),
                _grid_lines(view, weight, grid),
                log,
                520,
            ),
            config=charts.CONFIG,
            key="histogram",
            alt=f"Histogram of the {matrix.numel:,} weights of {matrix.name} with the normal "
            "distribution of the same mean and deviation.",
        )
    if grid.config is not None:
        st.caption(_describe_grid(view, matrix, grid))


def _grid_choice(matrix: Matrix) -> _GridChoice:
    options = [c.name for c in EXTENDED_LADDER if is_divisible(matrix.numel, c.group_size)]
    ensure_valid_choice("weights_grid", ["none", *options], DETECTION_CONFIG.name)
    name = st.selectbox(
        "Quantization grid", ["none", *options], key="weights_grid", persist_state="session"
    )
    if name == "none":
        return _GridChoice(None, "rtn", "typical")
    ensure_valid_choice("weights_group", list(_GROUPS), "typical")
    of = st.selectbox(
        "Grid of",
        list(_GROUPS),
        format_func=_GROUPS.get,
        key="weights_group",
        persist_state="session",
    )
    config = QuantConfig.parse(name)
    usable = [
        q
        for q in MATRIX_QUANTIZERS
        if config in quantizer_spec(q).configs and not unavailable_reason(q)
    ]
    ensure_valid_choice("weights_quantizer", usable, "rtn")
    quantizer = st.selectbox(
        "Quantizer of the grid",
        usable,
        key="weights_quantizer",
        persist_state="session",
        help="rtn spaces its levels evenly over the range of a group; hqq then shifts "
        "it. nf4, at 4 bits, is densest around zero.",
    )
    return _GridChoice(config, quantizer, of)


def _matrix_histogram(view: ExploreView, opened: WeightReader, matrix: Matrix) -> weights.Histogram:
    return _cached_histogram(opened, matrix, cached.model_key(view.info), matrix.name)


@st.cache_resource(max_entries=32, show_spinner=False)
def _cached_histogram(
    _opened: WeightReader, _matrix: Matrix, cache_key: str, name: str
) -> weights.Histogram:
    return weights.histogram(_opened.region(_matrix))


def _render_tail_headline(
    view: ExploreView, matrix: Matrix, weight: np.ndarray, hist: weights.Histogram
) -> None:
    """Render the headline: how far from the mean the largest weight lies."""
    from scipy.stats import norm

    furthest = float(np.abs(weight - hist.mean).max())
    z = furthest / hist.deviation if hist.deviation else 0.0
    expected = norm.isf(0.5 / weight.size)
    view.render_headline(
        f"The largest weight of {charts.short_type(matrix.type)} in layer {matrix.layer} lies "
        f"{z:.1f} standard deviations from the mean.",
        f"{matrix.out_features:,} × {matrix.in_features:,} weights, mean {_signed(hist.mean)}, "
        f"deviation {hist.deviation:.4g}; of as many draws from a normal distribution the "
        f"largest would lie about {expected:.1f} standard deviations from the mean.",
    )


def _grid_lines(
    view: ExploreView, weight: np.ndarray, grid: _GridChoice
) -> charts.GridLines | None:
    if grid.config is None:
        return None
    groups = weights.split_into_groups(weight, grid.config, view.settings.axis)
    if grid.of == "all":
        levels = weights.grid_values(weights.sample_groups(groups), grid.config, grid.quantizer)
        values = np.percentile(levels, (5, 95), axis=0).T
    else:
        find = weights.typical_group if grid.of == "typical" else weights.widest_group
        at = find(groups)
        values = weights.grid_values(groups[at : at + 1], grid.config, grid.quantizer)[0]
    color = charts.config_color(grid.config)
    return charts.GridLines(
        values, color, f"{grid.quantizer} grid of {_GROUPS[grid.of]}, {grid.config.name}"
    )


def _describe_grid(view: ExploreView, matrix: Matrix, grid: _GridChoice) -> str:
    size, axis = grid.config.group_size, view.settings.axis
    count = matrix.numel // size
    description = (
        f"Each line is the value of one of the {2**grid.config.bits} codes in the group of "
        f"{size} weights whose range is "
        + ("the median of all groups'." if grid.of == "typical" else "the widest of all.")
    )
    if grid.of == "all":
        some = len(range(0, count, -(-count // weights.MAX_GROUPS)))
        description = (
            f"Each band spans what one of the {2**grid.config.bits} codes stands for in the "
            f"middle 90 % of {some:,} of the {count:,} groups of {size} weights."
        )
    return (
        f"{description} Grouped along axis {axis}; scale and zero point before they are quantized."
    )


# --- over the layers ------------------------------------------------------------------------


@dataclass(eq=False)
class _Progress:
    """Percentiles of the matrices of a type, computed one after another."""

    rows: dict[str, np.ndarray] = field(default_factory=dict)

    def read(self, opened: WeightReader, matrices: list[Matrix]) -> bool:
        """Read further matrices for a short time; return whether all have been read."""
        start_time = time.monotonic()
        for matrix in matrices:
            if matrix.name not in self.rows:
                if time.monotonic() - start_time > _READ_SECONDS:
                    return False
                self.rows[matrix.name] = weights.percentiles(opened.region(matrix))
        return True


@st.cache_resource(max_entries=64, show_spinner=False)
def _cached_progress(cache_key: str, kind: str) -> _Progress:
    return _Progress()


def _show_bands(view: ExploreView, opened: WeightReader) -> None:
    left, right = st.columns([1, 3.4], gap="medium")
    with left:
        kind = _select_module_type(opened)
    matrices = [m for m in opened.matrices if m.type == kind]
    progress = _cached_progress(cached.model_key(view.info), kind)
    if not progress.read(opened, matrices):
        view.render_headline(f"Reading the weights of {charts.short_type(kind)}.")
        with right:
            st.fragment(_continue_reading, run_every=_READ_SECONDS / 2)(opened, matrices, progress)
        return
    layers = sorted({m.layer for m in matrices})
    values = np.stack(
        [np.mean([progress.rows[m.name] for m in matrices if m.layer == i], axis=0) for i in layers]
    )
    widest = int(np.argmax(values[:, -1] - values[:, 0]))
    experts = " Experts of a layer are averaged." if matrices[0].expert is not None else ""
    view.render_headline(
        f"The weights of {charts.short_type(kind)} range widest in layer {layers[widest]}: "
        f"{_signed(values[widest, 0])} to {_signed(values[widest, -1])}.",
        "Each band holds the weights between two percentiles; beyond the outermost is one weight "
        f"in 1,000 on either side.{experts}",
    )
    with right:
        st.plotly_chart(
            charts.weight_bands(
                layers, weights.PERCENTILES, values, charts.module_color(kind), 520
            ),
            config=charts.CONFIG,
            key="bands",
            alt=f"Percentiles of the weights of {kind} over {len(layers)} layers.",
        )


def _continue_reading(opened: WeightReader, matrices: list[Matrix], progress: _Progress) -> None:
    """Read further and show progress; redraw the page when everything has been read."""
    if progress.read(opened, matrices):
        st.rerun(scope="app")
    done = len(progress.rows)
    st.progress(done / len(matrices), text=f"Read {done} of {len(matrices)} matrices")


# --- the surface ----------------------------------------------------------------------------


def _show_surface(view: ExploreView, opened: WeightReader) -> None:
    left, right = st.columns([1, 3.4], gap="medium")
    with left:
        matrix = _select_matrix(opened)
        rows = _select_range("row", matrix.out_features)
        columns = _select_range("column", matrix.in_features)
        flat = st.toggle("Flat", key="weights_flat", help="Show as a heatmap.")
    part = opened.region(matrix, rows, columns)
    cells, down, across = weights.downsample_max(part)
    region = charts.Region(cells, rows.start, columns.start, down, across)
    _render_largest_weight(view, matrix, part, region)
    draw = charts.weight_map if flat else charts.weight_surface
    with right:
        st.plotly_chart(
            draw(region, 540),
            config=charts.CONFIG,
            key=f"surface-{flat}",
            alt=f"Absolute weights of {matrix.name}, rows {rows.start} to {rows.stop - 1} and "
            f"columns {columns.start} to {columns.stop - 1}.",
        )


def _select_range(dimension: str, length: int) -> slice:
    """Select the rows or columns to show; all of them by default."""
    start_key, count_key = f"weights_{dimension}", f"weights_{dimension}s"
    st.session_state[start_key] = min(st.session_state.get(start_key, 0), length - 1)
    start = st.number_input(
        f"From {dimension}", 0, length - 1, key=start_key, persist_state="session", step=1
    )
    most = length - start
    st.session_state[count_key] = min(st.session_state.get(count_key, length), most)
    count = st.number_input(
        f"{dimension.capitalize()}s", 1, most, key=count_key, persist_state="session", step=1
    )
    return slice(start, start + count)


def _render_largest_weight(
    view: ExploreView, matrix: Matrix, part: np.ndarray, region: charts.Region
) -> None:
    row, column = np.unravel_index(np.argmax(np.abs(part)), part.shape)
    each = region.down * region.across
    cell = (
        "A cell is one weight."
        if each == 1
        else f"A cell is the largest of {region.down} × {region.across} weights."
    )
    view.render_headline(
        f"The largest of {charts.short_type(matrix.type)} in layer {matrix.layer}: "
        f"{_signed(part[row, column])} at row {region.row + row}, column {region.column + column}.",
        f"Rows {region.row} to {region.row + part.shape[0] - 1} and columns {region.column} to "
        f"{region.column + part.shape[1] - 1} of {matrix.out_features:,} × "
        f"{matrix.in_features:,}. {cell}",
    )


def _signed(value: float) -> str:
    """Format to three significant digits, with a true minus sign."""
    return f"{value:.3g}".replace("-", "−")
