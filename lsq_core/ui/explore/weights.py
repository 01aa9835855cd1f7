"""The weights of one matrix: their histogram and grid, a region as a surface; bands over layers."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lsq_core import charts
from lsq_core.bits import DETECTION_CONFIG, LADDER, QuantConfig, divides
from lsq_core.model.info import Matrix, ModelInfo
from lsq_core.profiling import weights
from lsq_core.profiling.weights import Weights
from lsq_core.quantization.registry import MATRIX_WISE, about, unavailable
from lsq_core.ui import cached
from lsq_core.ui.explore.layers import keep_to
from lsq_core.ui.explore.profile import Seen
from lsq_core.ui.page import next_step
from lsq_core.ui.safe import st

_SHOWS = {"histogram": "Histogram", "bands": "Percentiles over layers", "surface": "3-D surface"}
_GROUPS = {"typical": "a typical group", "widest": "the widest group", "all": "all groups"}
#: Seconds that the page reads weights before it shows how far it is.
_AT_ONCE = 0.6


def show(seen: Seen) -> None:
    """A matrix, and how to look at it."""
    folder = None if seen.published else weights.weights_folder(seen.here.source)
    if folder is None:
        _say_none(seen)
        return
    opened = open_weights(folder, seen.info)
    if not opened.matrices:
        seen.say(
            "The weights of this model can't be shown.",
            "Its files keep the matrices under other names than its modules have.",
        )
        return
    with seen.row:
        how = st.segmented_control(
            "Show",
            list(_SHOWS),
            format_func=_SHOWS.get,
            required=True,
            default=None if "weights_show" in st.session_state else "histogram",
            key="weights_show",
            label_visibility="collapsed",
            persist_state="session",
        )
    draw = {"histogram": _histogram, "bands": _bands, "surface": _surface}[how]
    draw(seen, opened)


def _say_none(seen: Seen) -> None:
    name = seen.here.source.name
    if seen.published:
        seen.say(
            f"The weights of {name} are not here.",
            "Its measurements were published, and the imported ones hold no percentiles of the "
            "weights.",
        )
        next_step("app.py", "Choose a model with weights")
    else:
        seen.say(
            f"The weights of {name} are not on this machine yet.",
            "Profile it, which fetches them; weights are shown from safetensors files only.",
        )


def open_weights(folder: Path, info: ModelInfo) -> Weights:
    """A model's weight files, opened once for each model and folder."""
    return _open_weights(folder, info, f"{cached.identity(info)} in {folder}")


@st.cache_resource(max_entries=4, show_spinner=False)
def _open_weights(_folder: Path, _info: ModelInfo, mark: str) -> Weights:
    return Weights(_folder, _info.matrices)


# --- choosing -------------------------------------------------------------------------------


def _kinds(opened: Weights) -> list[str]:
    return list(dict.fromkeys(m.type for m in opened.matrices))


def _kind(opened: Weights) -> str:
    keep_to("weights_type", _kinds(opened))
    return st.selectbox(
        "Module type",
        _kinds(opened),
        format_func=charts.short_type,
        key="weights_type",
        persist_state="session",
    )


def _matrix(opened: Weights) -> Matrix:
    """The matrix of the chosen type and layer, and expert where there are several."""
    kind = _kind(opened)
    of_kind = [m for m in opened.matrices if m.type == kind]
    layers = list(dict.fromkeys(m.layer for m in of_kind))
    keep_to("weights_layer", layers)
    layer = st.selectbox("Layer", layers, key="weights_layer", persist_state="session")
    here = [m for m in of_kind if m.layer == layer]
    if len(here) == 1:
        return here[0]
    experts = [m.expert for m in here]
    keep_to("weights_expert", experts)
    chosen = st.selectbox("Expert", experts, key="weights_expert", persist_state="session")
    return here[experts.index(chosen)]


# --- the histogram --------------------------------------------------------------------------


@dataclass(frozen=True)
class _GridChoice:
    """Which quantization grid is drawn: a configuration, a quantizer, and of which groups."""

    config: QuantConfig | None
    quantizer: str
    of: str


def _histogram(seen: Seen, opened: Weights) -> None:
    left, right = st.columns([1, 3.4], gap="medium")
    with left:
        matrix = _matrix(opened)
        grid = _grid_choice(matrix)
        log = st.toggle("Logarithmic counts", value=True, key="weights_log")
    weight = opened.region(matrix)
    drawn = _drawn(seen, opened, matrix)
    _say_tails(seen, matrix, weight, drawn)
    with right:
        st.plotly_chart(
            charts.weight_histogram(
                drawn.edges,
                drawn.counts,
                drawn.expected,
                charts.module_color(matrix.type),
                _grid_lines(seen, weight, grid),
                log,
                520,
            ),
            config=charts.CONFIG,
            key="histogram",
            alt=f"Histogram of the {matrix.numel:,} weights of {matrix.name} with the normal "
            "distribution of the same mean and deviation.",
        )
    if grid.config is not None:
        st.caption(_about_grid(seen, matrix, grid))


def _grid_choice(matrix: Matrix) -> _GridChoice:
    options = [c.name for c in LADDER if divides(matrix.numel, c.group_size)]
    keep_to("weights_grid", ["none", *options], DETECTION_CONFIG.name)
    name = st.selectbox(
        "Quantization grid", ["none", *options], key="weights_grid", persist_state="session"
    )
    if name == "none":
        return _GridChoice(None, "rtn", "typical")
    keep_to("weights_group", list(_GROUPS), "typical")
    of = st.selectbox(
        "Grid of",
        list(_GROUPS),
        format_func=_GROUPS.get,
        key="weights_group",
        persist_state="session",
    )
    config = QuantConfig.parse(name)
    able = [q for q in MATRIX_WISE if config in about(q).configs and not unavailable(q)]
    keep_to("weights_quantizer", able, "rtn")
    quantizer = st.selectbox(
        "Quantizer of the grid",
        able,
        key="weights_quantizer",
        persist_state="session",
        help="rtn runs evenly from the least to the greatest weight of a group; hqq then moves "
        "it. nf4, at 4 bits, lies densest about zero.",
    )
    return _GridChoice(config, quantizer, of)


def _drawn(seen: Seen, opened: Weights, matrix: Matrix) -> weights.Histogram:
    return _drawn_once(opened, matrix, cached.identity(seen.info), matrix.name)


@st.cache_resource(max_entries=32, show_spinner=False)
def _drawn_once(_opened: Weights, _matrix: Matrix, mark: str, name: str) -> weights.Histogram:
    return weights.histogram(_opened.region(_matrix))


def _say_tails(seen: Seen, matrix: Matrix, weight: np.ndarray, drawn: weights.Histogram) -> None:
    """The first line: how far out the largest weight lies."""
    from scipy.stats import norm

    furthest = float(np.abs(weight - drawn.mean).max())
    out = furthest / drawn.deviation if drawn.deviation else 0.0
    expected = norm.isf(0.5 / weight.size)
    seen.say(
        f"The largest weight of {charts.short_type(matrix.type)} in layer {matrix.layer} lies "
        f"{out:.1f} deviations out.",
        f"{matrix.out_features:,} × {matrix.in_features:,} weights, mean {_signed(drawn.mean)}, "
        f"deviation {drawn.deviation:.4g}; of as many draws from a normal distribution the "
        f"largest would be about {expected:.1f} deviations out.",
    )


def _grid_lines(seen: Seen, weight: np.ndarray, grid: _GridChoice) -> charts.GridLines | None:
    if grid.config is None:
        return None
    groups = weights.groups_of(weight, grid.config, seen.settings.axis)
    if grid.of == "all":
        levels = weights.grid_values(weights.some_groups(groups), grid.config, grid.quantizer)
        values = np.percentile(levels, (5, 95), axis=0).T
    else:
        find = weights.typical_group if grid.of == "typical" else weights.widest_group
        at = find(groups)
        values = weights.grid_values(groups[at : at + 1], grid.config, grid.quantizer)[0]
    color = charts.config_color(grid.config)
    return charts.GridLines(
        values, color, f"{grid.quantizer} grid of {_GROUPS[grid.of]}, {grid.config.name}"
    )


def _about_grid(seen: Seen, matrix: Matrix, grid: _GridChoice) -> str:
    size, axis = grid.config.group_size, seen.settings.axis
    count = matrix.numel // size
    told = (
        f"Each line is what one of the {2**grid.config.bits} codes stands for, in the group of "
        f"{size} weights whose range is "
        + ("the median of all groups'." if grid.of == "typical" else "the widest of all.")
    )
    if grid.of == "all":
        some = len(range(0, count, -(-count // weights.MOST_GROUPS)))
        told = (
            f"Each band spans what one of the {2**grid.config.bits} codes stands for in the "
            f"middle 90 % of {some:,} of the {count:,} groups of {size} weights."
        )
    return f"{told} Grouped along axis {axis}; scale and zero before they are stored."


# --- over the layers ------------------------------------------------------------------------


@dataclass(eq=False)
class _Progress:
    """Percentiles of the matrices of a type, read one after another."""

    rows: dict[str, np.ndarray] = field(default_factory=dict)

    def read(self, opened: Weights, matrices: list[Matrix]) -> bool:
        """Read for a moment what hasn't been read; whether nothing is left."""
        began = time.monotonic()
        for matrix in matrices:
            if matrix.name not in self.rows:
                if time.monotonic() - began > _AT_ONCE:
                    return False
                self.rows[matrix.name] = weights.percentiles(opened.region(matrix))
        return True


@st.cache_resource(max_entries=64, show_spinner=False)
def _progress(mark: str, kind: str) -> _Progress:
    return _Progress()


def _bands(seen: Seen, opened: Weights) -> None:
    left, right = st.columns([1, 3.4], gap="medium")
    with left:
        kind = _kind(opened)
    matrices = [m for m in opened.matrices if m.type == kind]
    progress = _progress(cached.identity(seen.info), kind)
    if not progress.read(opened, matrices):
        seen.say(f"Reading the weights of {charts.short_type(kind)}.")
        with right:
            st.fragment(_read_on, run_every=_AT_ONCE / 2)(opened, matrices, progress)
        return
    layers = sorted({m.layer for m in matrices})
    values = np.stack(
        [np.mean([progress.rows[m.name] for m in matrices if m.layer == i], axis=0) for i in layers]
    )
    widest = int(np.argmax(values[:, -1] - values[:, 0]))
    experts = " Experts of a layer are averaged." if matrices[0].expert is not None else ""
    seen.say(
        f"The weights of {charts.short_type(kind)} spread widest in layer {layers[widest]}: "
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


def _read_on(opened: Weights, matrices: list[Matrix], progress: _Progress) -> None:
    """Read some more and say how far it is; the page is drawn anew when all is read."""
    if progress.read(opened, matrices):
        st.rerun(scope="app")
    done = len(progress.rows)
    st.progress(done / len(matrices), text=f"Read {done} of {len(matrices)} matrices")


# --- the surface ----------------------------------------------------------------------------


def _surface(seen: Seen, opened: Weights) -> None:
    left, right = st.columns([1, 3.4], gap="medium")
    with left:
        matrix = _matrix(opened)
        rows = _window("row", matrix.out_features)
        columns = _window("column", matrix.in_features)
        flat = st.toggle("Flat", key="weights_flat", help="As a map, seen from above.")
    part = opened.region(matrix, rows, columns)
    cells, down, across = weights.coarse(part)
    region = charts.Region(cells, rows.start, columns.start, down, across)
    _say_largest(seen, matrix, part, region)
    draw = charts.weight_map if flat else charts.weight_surface
    with right:
        st.plotly_chart(
            draw(region, 540),
            config=charts.CONFIG,
            key=f"surface-{flat}",
            alt=f"Absolute weights of {matrix.name}, rows {rows.start} to {rows.stop - 1} and "
            f"columns {columns.start} to {columns.stop - 1}.",
        )


def _window(way: str, length: int) -> slice:
    """Which rows or columns are shown; all of them at first."""
    start_key, count_key = f"weights_{way}", f"weights_{way}s"
    st.session_state[start_key] = min(st.session_state.get(start_key, 0), length - 1)
    start = st.number_input(
        f"From {way}", 0, length - 1, key=start_key, persist_state="session", step=1
    )
    most = length - start
    st.session_state[count_key] = min(st.session_state.get(count_key, length), most)
    count = st.number_input(
        f"{way.capitalize()}s", 1, most, key=count_key, persist_state="session", step=1
    )
    return slice(start, start + count)


def _say_largest(seen: Seen, matrix: Matrix, part: np.ndarray, region: charts.Region) -> None:
    row, column = np.unravel_index(np.argmax(np.abs(part)), part.shape)
    each = region.down * region.across
    cell = (
        "A cell is one weight."
        if each == 1
        else f"A cell is the largest of {region.down} × {region.across} weights."
    )
    seen.say(
        f"The largest of {charts.short_type(matrix.type)} in layer {matrix.layer}: "
        f"{_signed(part[row, column])} at row {region.row + row}, column {region.column + column}.",
        f"Rows {region.row} to {region.row + part.shape[0] - 1} and columns {region.column} to "
        f"{region.column + part.shape[1] - 1} of {matrix.out_features:,} × "
        f"{matrix.in_features:,}. {cell}",
    )


def _signed(value: float) -> str:
    """Three digits, with a true minus sign."""
    return f"{value:.3g}".replace("-", "−")
