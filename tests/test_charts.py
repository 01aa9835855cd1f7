"""Charts show the data they are given, in colours whose meaning is the same everywhere."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lsq_core import charts
from lsq_core.bits import LADDER, QuantConfig
from lsq_core.planning.methods import PLANNERS
from lsq_core.quantization.registry import QUANTIZERS
from lsq_core.units import MIB


def make_series(type_name: str, values: list[float], flagged: dict[int, float]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "type": type_name,
            "label": charts.short_type(type_name),
            "layer": range(len(values)),
            "value": values,
            "z": [flagged.get(i, np.nan) for i in range(len(values))],
        }
    )


@pytest.fixture
def panels() -> list[charts.Panel]:
    q = make_series("self_attn.q_proj", [1e-6, 1e-4, 1e-3], {1: 4.5})
    down = make_series("mlp.down_proj", [3.0, 3.5, 9.0], {})
    both = pd.concat([q, down])
    return [
        charts.Panel(q, "Sensitivity", "mse", log=True),
        charts.Panel(both, "Kurtosis", "kurtosis"),
    ]


def lines(figure, panel: int) -> list:
    axis = f"y{panel if panel > 1 else ''}"
    return [t for t in figure.data if t.yaxis == axis and t.mode == "lines+markers"]


def test_over_layers_lines_match_frame(panels):
    figure = charts.over_layers(panels)
    (q,) = lines(figure, 1)
    assert list(q.x) == [0, 1, 2]
    assert list(q.y) == [1e-6, 1e-4, 1e-3]
    assert [list(t.y) for t in lines(figure, 2)] == [[1e-6, 1e-4, 1e-3], [3.0, 3.5, 9.0]]


def test_over_layers_log_axis_only_for_log_panel(panels):
    figure = charts.over_layers(panels)
    assert figure.layout.yaxis.type == "log"
    assert figure.layout.yaxis2.type is None
    assert figure.layout.yaxis.title.text == "mse"


def test_over_layers_rings_at_flagged_points(panels):
    rings = [t for t in charts.over_layers(panels).data if t.name == "flagged"]
    assert [(list(t.x), list(t.y)) for t in rings] == [([1], [1e-4]), ([1], [1e-4])]
    assert rings[0].customdata.tolist() == [["q_proj", 4.5]]


def test_over_layers_same_module_color_in_panels(panels):
    figure = charts.over_layers(panels)
    assert lines(figure, 1)[0].line.color == lines(figure, 2)[0].line.color


def test_over_layers_legends_stand_above_and_below(panels):
    layout = charts.over_layers(panels).layout
    assert layout.legend.y > 1
    assert layout.legend2.y < 0
    assert layout.xaxis.range == layout.xaxis2.range == (-0.5, 2.5)


def heat_panel(values: list[float], flagged: dict[int, bool], log: bool = True) -> charts.Panel:
    frame = make_series("self_attn.q_proj", values, dict.fromkeys(flagged, 4.5))
    frame["rises"] = [flagged.get(i, False) for i in range(len(values))]
    return charts.Panel(frame, "Sensitivity", "mean squared output change", log)


def test_layer_heatmap_log_colors_and_labels_of_scores():
    figure = charts.layer_heatmap(heat_panel([1e-6, 1e-4, 1e-3], {}))
    (heat,) = figure.data
    assert heat.z.tolist() == [pytest.approx([-6, -4, -3])]
    assert heat.customdata.tolist() == [[1e-6, 1e-4, 1e-3]]
    assert list(heat.colorbar.tickvals) == [-6, -5, -4, -3]
    assert list(heat.colorbar.ticktext) == [f"10<sup>−{n}</sup>" for n in (6, 5, 4, 3)]
    assert heat.colorbar.title.text == "mean squared output change"
    assert (list(heat.x), list(heat.y)) == ([0, 1, 2], ["q"])


def test_layer_heatmap_narrow_range_is_linear():
    (heat,) = charts.layer_heatmap(heat_panel([3.0, 4.0, 9.0], {})).data
    assert heat.z.tolist() == [[3.0, 4.0, 9.0]]
    assert heat.colorbar.tickvals is None
    (heat,) = charts.layer_heatmap(heat_panel([3.0, 4.0, 70.0], {})).data
    assert list(heat.colorbar.ticktext) == ["5", "10", "20", "50"]


def test_layer_heatmap_missing_and_zero_scores_have_no_color():
    (heat,) = charts.layer_heatmap(heat_panel([0.0, np.nan, 1e-3, 1e-6], {})).data
    assert np.isnan(heat.z[0]).tolist() == [True, True, False, False]


def test_layer_heatmap_marks_direction_of_flags():
    figure = charts.layer_heatmap(heat_panel([1e-6, 1e-3, 1e-6], {1: True, 2: False}))
    marks = {t.name: (t.marker.symbol, list(t.x)) for t in figure.data[1:]}
    assert marks == {"jump": ("triangle-up", [1]), "fall": ("triangle-down", [2])}


@pytest.mark.parametrize("layers", [4, 32, 80])
def test_layer_heatmap_axis_shows_whole_layers(layers):
    axis = charts.layer_heatmap(heat_panel([1.0] * layers, {})).layout.xaxis
    assert axis.range == (-0.5, layers - 0.5)
    assert axis.dtick == (1 if layers == 4 else None)


def test_module_colors_are_distinct():
    assert len(set(charts.MODULE_COLORS.values())) == len(charts.MODULE_COLORS)


def test_module_color_unknown_type_is_stable():
    assert charts.module_color("block.c_fc") == charts.module_color("other.c_fc")


@pytest.fixture
def plan() -> pd.DataFrame:
    rows = [
        (kind, layer, "b3g128", np.nan)
        for kind in ("self_attn.q_proj", "mlp.up_proj")
        for layer in range(4)
    ]
    frame = pd.DataFrame(rows, columns=["type", "layer", "config", "z"])
    frame.loc[5, ["config", "z"]] = ["b8g32", 4.25]
    return frame


def test_plan_heatmap_cells_match_configs(plan):
    heatmap = charts.plan_heatmap(plan).data[0]
    names = [c.name for c in LADDER]
    shown = [[names[int(code)] for code in row] for row in heatmap.z]
    assert shown == [["b3g128"] * 4, ["b3g128", "b8g32", "b3g128", "b3g128"]]
    assert list(heatmap.y) == ["q_proj", "up_proj"], "in the order of the computation"
    assert list(heatmap.x) == [0, 1, 2, 3]
    assert "4.25" in heatmap.customdata[1][1]


def test_plan_heatmap_cell_colors_match_configs(plan):
    heatmap = charts.plan_heatmap(plan).data[0]
    scale = [color for _, color in heatmap.colorscale]
    low, high = heatmap.zmin, heatmap.zmax
    for index, config in enumerate(LADDER):
        share = (index - low) / (high - low)
        assert scale[2 * int(share * len(LADDER))] == charts.config_color(config)


def test_plan_heatmap_legend_counts_configs(plan):
    names = [t.name for t in charts.plan_heatmap(plan).data[1:]]
    assert names == ["b3g128 (3.13) × 7", "b8g32 (8.51) × 1"]
    narrow = charts.plan_heatmap(plan, narrow=True)
    assert [t.name for t in narrow.data[1:]] == ["3.13 × 7", "8.51 × 1"]


def test_plan_heatmap_cell_text_depends_on_layer_count(plan):
    def cell_text(layers: int) -> str:
        frame = pd.DataFrame(
            {"type": "q_proj", "layer": range(layers), "config": "b4g64", "z": np.nan}
        )
        return charts.plan_heatmap(frame).data[0].text[0][0]

    assert [cell_text(n) for n in (8, 24, 80)] == ["b4g64", "4.25", ""]


def test_plan_heatmap_experts_share_cell():
    frame = pd.DataFrame(
        {
            "type": "mlp.experts.gate_proj",
            "layer": 0,
            "config": ["b3g64", "b4g64", "b3g64"],
            "z": np.nan,
        }
    )
    heatmap = charts.plan_heatmap(frame).data[0]
    assert LADDER[int(heatmap.z[0][0])].name == "b3g64"
    assert heatmap.customdata[0][0] == "3 experts: 2 × b3g64, 1 × b4g64"


def test_plan_heatmap_missing_module_is_nan(plan):
    heatmap = charts.plan_heatmap(plan.drop(index=0)).data[0]
    kinds = list(heatmap.y)
    assert np.isnan(heatmap.z[kinds.index("q_proj")][0])


def test_config_color_lighter_for_larger_groups():
    def brightness(config: QuantConfig) -> int:
        color = charts.config_color(config)
        return sum(int(color[i : i + 2], 16) for i in (1, 3, 5))

    for bits in (2, 3, 4, 8):
        shades = [brightness(QuantConfig(bits, group)) for group in (128, 64, 32)]
        assert shades == sorted(shades, reverse=True)
        assert charts.config_color(QuantConfig(bits, 32)) == charts.BIT_COLORS[bits].lower()


@pytest.fixture
def runs() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "evaluation": ["a", "b", "c", "d"],
            "method": ["uniform", "sensiboost", "uniform", "uniform"],
            "label": ["U 4.25", "S 3.15", "U 3.13", "U rtn"],
            "bits_per_param": [4.25, 3.15, 3.13, 3.4],
            "measured_bytes": [3 * MIB, 2.1 * MIB, 2 * MIB, 2.5 * MIB],
            "perplexity": [60.0, 61.8, 62.1, 63.0],
            "perplexity_full": 58.6,
            "quantizer": ["hqq", "hqq", "hqq", "rtn"],
        }
    )


def test_perplexity_by_size_points_and_lines(runs):
    figure = charts.perplexity_by_size(runs)
    points = {t.name: t for t in figure.data if t.mode == "markers"}
    assert list(points["SensiBoost"].x) == [2.1]
    assert list(points["SensiBoost"].y) == [61.8]
    assert list(points["Uniform"].y) == [60.0, 62.1]
    assert list(points["RTN"].y) == [63.0], "a baseline under its own name"
    lines = {t.name: t for t in figure.data if t.mode == "lines"}
    uniform, front = lines.pop("Uniform HQQ"), lines.pop("Pareto front")
    assert (list(uniform.x), list(uniform.y)) == ([2.0, 3.0], [62.1, 60.0])
    assert (list(front.x), list(front.y)) == ([2.0, 2.1, 3.0], [62.1, 61.8, 60.0])
    assert not lines
    labels = [note for note in figure.layout.annotations if note.name == "line"]
    assert {note.text: (note.x, note.y) for note in labels} == {
        "Uniform HQQ": (3.0, 60.0),
        "Pareto front": (3.0, 60.0),
    }
    assert len({note.ay for note in labels}) == 2, "labels of lines that end together are apart"
    assert not any(t.showlegend for t in (uniform, front)), "a line is named at its end"


def test_perplexity_by_size_full_precision_line(runs):
    (full_precision_line,) = charts.perplexity_by_size(runs).layout.shapes
    assert full_precision_line.y0 == full_precision_line.y1 == 58.6


def test_perplexity_by_size_rings_selected_runs(runs):
    ring = next(t for t in charts.perplexity_by_size(runs, ["b"]).data if t.name == "selected")
    assert list(ring.y) == [61.8]


def test_perplexity_axis_log_only_for_wide_range(runs):
    assert charts.perplexity_by_size(runs).layout.yaxis.type is None
    wide = runs.assign(perplexity=[60.0, 61.0, 900.0, 62.0])
    assert charts.perplexity_by_size(wide).layout.yaxis.type == "log"


def many_runs(bits: list[float], perplexity: list[float]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "evaluation": [str(i) for i in range(len(bits))],
            "method": "mxq",
            "quantizer": "hqq",
            "label": "x",
            "bits_per_param": bits,
            "nominal_bytes": [b * 2**30 for b in bits],
            "perplexity": perplexity,
            "perplexity_full": 5.0,
            "kl": [p / 100 for p in perplexity],
            "top1": [1 / p for p in perplexity],
        }
    )


def outside_notes(figure) -> list[str]:
    return [note.text for note in figure.layout.annotations if note.name == "outside"]


@pytest.mark.parametrize("size", [charts.BITS, charts.NOMINAL])
def test_perplexity_by_size_opens_on_3_to_4_5_bits(size):
    frame = many_runs([2.13, 3.13, 3.5, 4.51, 8.5], [60.0, 9.3, 7.0, 6.1, 5.8])
    figure = charts.perplexity_by_size(frame, size=size)
    low, high = figure.layout.xaxis.range
    assert 3.0 < low < 3.13
    assert 4.51 < high < 4.6
    low, high = figure.layout.yaxis.range
    assert 4.5 < low < 5.0, "full precision stays in view"
    assert 9.3 < high < 10
    assert outside_notes(figure) == ["2 of 5 runs outside this view:<br>perplexity 5.8 to 60"]
    shown = [x for t in figure.data if t.mode == "markers" for x in t.x]
    assert len(shown) == 5, "resetting the axes shows all"


def test_perplexity_by_size_shows_all_where_few_are_in_range():
    frame = many_runs([2.13, 2.25, 2.51, 3.13], [60.0, 40.0, 30.0, 20.0])
    figure = charts.perplexity_by_size(frame, size=charts.BITS)
    assert figure.layout.xaxis.range is None
    assert outside_notes(figure) == []


def test_perplexity_by_size_clips_outliers_in_range():
    bits = [3.1 + i / 10 for i in range(12)]
    frame = many_runs(bits, [9.0 - i / 4 for i in range(11)] + [97.0])
    figure = charts.perplexity_by_size(frame, size=charts.BITS)
    assert figure.layout.yaxis.type is None
    assert 9 < figure.layout.yaxis.range[1] < 10
    assert outside_notes(figure) == ["1 of 12 runs outside this view:<br>perplexity 97"]


def test_line_labels_stay_in_view():
    frame = many_runs([2.13, 3.13, 3.5, 4.5, 8.5], [60.0, 9.3, 7.0, 6.1, 5.8])
    frame = frame.assign(method="uniform")
    figure = charts.perplexity_by_size(frame, size=charts.BITS)
    labels = {n.text: (n.x, n.y) for n in figure.layout.annotations if n.name == "line"}
    assert labels == {"Uniform HQQ": (4.5, 6.1), "Pareto front": (4.5, 6.1)}


def test_top1_note_and_labels_below_the_runs():
    frame = many_runs([2.13, 3.13, 3.5, 4.5, 8.5], [60.0, 9.3, 7.0, 6.1, 5.8])
    figure = charts.perplexity_by_size(frame, size=charts.BITS, quality=charts.TOP1)
    (note,) = [n for n in figure.layout.annotations if n.name == "outside"]
    assert note.yanchor == "bottom"
    assert note.text.endswith("%")
    (label,) = [n for n in figure.layout.annotations if n.name == "line"]
    assert label.ay > 0


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ([5.0, 5.5, 6.0, 6.2, 6.3, 97.0], (5.0, 6.3)),
        ([5.0, 97.0], (5.0, 97.0)),
        ([5.0, 5.0, 5.0, 5.0, 9.0], (5.0, 9.0)),
        ([60.0, 62.0, 64.0, 70.0, 80.0], (60.0, 80.0)),
    ],
)
def test_inlier_range(values, kept):
    assert charts.inlier_range(pd.Series(values)) == kept
    low, high = charts.inlier_range(-pd.Series(values), higher_is_better=True)
    assert (-high, -low) == kept


def test_ablations_are_faded_and_below(runs):
    frame = runs.assign(method=["sensiboost", "sensiboost-ablation", "uniform", "uniform"])
    traces = [t for t in charts.perplexity_by_size(frame).data if t.mode == "markers"]
    assert [t.opacity < 0.5 for t in traces] == [True, False, False, False]
    assert traces[0].name == "SensiBoost ablation"


def gains(drops: list[float], **more) -> pd.DataFrame:
    count = len(drops)
    frame = {"evaluation": [str(i) for i in range(count)], "label": "x", "drop": drops}
    return pd.DataFrame(frame | {"method": "mxq", "extra": [i / 100 for i in range(count)]} | more)


def test_gain_chart_clips_broken_run():
    figure = charts.gain_for_bits(gains([0.0, 0.02, 0.03, 0.01, 0.04, -4.7]), "uniform 3.13")
    low, high = figure.layout.yaxis.range
    assert -2 < low < 0
    assert 4 < high < 5
    assert outside_notes(figure) == [
        "1 of 6 runs outside this view:<br>perplexity reduction −470 %"
    ]


def test_gain_chart_intervals_with_n():
    frame = gains([0.0, 0.02], low=[np.nan, 0.01], high=[np.nan, 0.04], windows=[17, 17])
    (trace,) = charts.gain_for_bits(frame, "uniform 3.13").data
    assert list(trace.error_y.array)[1] == pytest.approx(2)
    assert list(trace.error_y.arrayminus)[1] == pytest.approx(1)
    assert list(trace.text) == ["", "<br>95 % interval 1.00 % to 4.00 %, n = 17 windows"]
    (trace,) = charts.gain_for_bits(gains([0.0, 0.02]), "uniform 3.13").data
    assert trace.error_y.array is None


def test_predicted_chart_band_with_n():
    frame = gains([0.0] * 3, perplexity=[9.0, 8.0, 7.0], predicted=8.0, low=7.5, high=8.5)
    figure = charts.predicted_against_measured(frame, 5.0)
    trace = figure.data[1]
    assert all("7.5000 to 8.5000, n = 2 other runs" in text for text in trace.text)
    assert list(trace.x) == pytest.approx([0.8, 0.6, 0.4]), "the excess over full precision"
    assert list(trace.y) == pytest.approx([0.6] * 3)
    assert list(trace.error_y.array) == pytest.approx([0.1] * 3)
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == "log"


def test_predicted_chart_opens_on_usable_runs_and_keeps_those_at_full_precision():
    measured = [4.999, 5.2, 9.0, 5000.0]
    frame = gains([0.0] * 4, perplexity=measured, predicted=measured, low=5.0, high=6000.0)
    view = charts.predicted_view(frame, 5.0)
    assert (view.outside, view.low, view.high) == (1, 5000.0, 5000.0)
    low, high = 10 ** np.array(view.x)
    assert low < 0.001, "a run that is no worse than full precision stands at the lower end"
    assert 0.8 < high < 10
    everything_broken = frame[frame["perplexity"] > 100]
    assert charts.predicted_view(everything_broken, 5.0).outside == 0


def test_plan_ring_percent_with_space():
    (ring,) = charts.plan_ring(pd.Series({"b3g128": 0.783, "b4g64": 0.217}), "bytes").data
    assert list(ring.text) == ["78.3 %", "21.7 %"]


def test_method_styles_are_distinct():
    names = [*PLANNERS, *(name for name, spec in QUANTIZERS.items() if spec.color), "bnb"]
    styles = [charts.method_style(name) for name in names]
    assert len({(style.color, style.symbol) for style in styles}) == len(names)
    assert all(
        style.title and style.title != name for style, name in zip(styles, names, strict=True)
    )


def test_size_bars_stack_to_model_size():
    frame = pd.DataFrame(
        {
            "name": ["as it is", "4.25"],
            "config": ["", "b4g64"],
            "linear_bytes": [8 * MIB, 2 * MIB],
            "other_bytes": [1 * MIB, 1 * MIB],
        }
    )
    linear, other = charts.size_bars(frame).data
    assert list(linear.y) == [8, 2]
    assert list(other.text) == ["9.00", "3.00"]
    assert linear.marker.color[1] == charts.config_color(QuantConfig(4, 64))


def test_chart_config_disables_cloud_upload():
    assert charts.CONFIG["showSendToCloud"] is False


def frontier_lines():
    bits = np.linspace(2, 8, 40)
    value = 5 + 100 * np.exp(-4 * (bits - 2))
    return [charts.FrontierLine("mxq", bits, value, 0.9 * value, 1.1 * value)]


def test_frontiers_show_runs_and_limit_axis_range():
    runs = pd.DataFrame(
        {
            "method": ["mxq", "uniform", "mxq"],
            "label": ["a", "b", "c"],
            "bits_per_param": [3.0, 4.0, 2.1],
            "value": [6.8, 5.1, 90.0],
        }
    )
    figure = charts.frontiers(frontier_lines(), runs, "predicted perplexity (90 % band)")
    marker_traces = [t for t in figure.data if t.mode == "markers"]
    assert sorted(y for t in marker_traces for y in t.y) == [5.1, 6.8, 90.0]
    low, high = 10 ** np.array(figure.layout.yaxis.range)
    assert low < 5.0 < 6.8 < high < 90, "a broken run doesn't press the rest into a line"
    assert figure.layout.xaxis.range[0] > 2.1


def test_frontiers_without_prediction_use_log_axis():
    line = charts.FrontierLine("uniform", np.array([2.0, 4.0, 8.0]), np.array([1e5, 1e3, 1.0]))
    empty = pd.DataFrame(columns=["method", "label", "bits_per_param", "value"])
    figure = charts.frontiers([line], empty, "squared weight error")
    assert figure.layout.yaxis.type == "log"
    assert figure.layout.yaxis.range is None


def test_frontiers_without_finite_error():
    """A profile by a quantizer with a single configuration has no errors for the others."""
    runs = pd.DataFrame(columns=["method", "label", "bits_per_param", "value"])
    for values in (np.full(3, np.nan), np.array([np.nan, 2.0, 1.0])):
        line = charts.FrontierLine("uniform", np.array([2.0, 3.0, 4.0]), values)
        figure = charts.frontiers([line], runs, "squared weight error")
        assert len(figure.data[0].y) == 3
