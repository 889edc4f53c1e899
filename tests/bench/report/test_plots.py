"""Drawings: what stands on the axes, how far the data reach, and that methods stay apart."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from san_bench.report.figures.plots import (
    COLOURS,
    accuracy_points,
    learning_curves,
    look_of,
    write_figure,
)
from san_bench.report.figures.scale_plots import (
    engram_map,
    layer_histograms,
    similarity_by_layer,
    variance_by_depth,
    variance_summary,
)

METHODS = ["linear", "ssf", "san"]


def texts(figure: Figure) -> set[str]:
    return {text.get_text() for legend in figure.legends for text in legend.get_texts()}


def point(backbone, method, mean, low, high, seeds=()):
    return {"backbone": backbone, "method": method, "mean": mean, "low": low, "high": high, "seeds": list(seeds)}


def intervals(axes):
    """Ends of the horizontal intervals of a panel."""
    return sorted(tuple(path[:, 0]) for c in axes.collections for path in c.get_segments())


def shown(axis):
    """Labels of the ticks inside the limits of an axis."""
    low, high = axis.get_view_interval()
    return [tick.label1.get_text() for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]


def test_accuracy_has_points_with_intervals_on_an_axis_that_shows_differences():
    records = [
        point("vit", "ssf", 0.80, 0.79, 0.81, [0.785, 0.815]),
        point("vit", "san", 0.82, 0.815, 0.825),
        point("swin", "san", 0.6, 0.5, 0.7),
    ]
    figure = accuracy_points(records, METHODS)
    vit, swin = figure.axes
    np.testing.assert_allclose(intervals(vit), [(0.79, 0.81), (0.815, 0.825)])
    np.testing.assert_allclose(intervals(swin), [(0.5, 0.7)])
    low, high = vit.get_xlim()
    assert 0.77 < low < 0.785
    assert 0.825 < high < 0.84
    assert vit.get_xlabel() == "accuracy (axis does not start at 0)"
    assert [label.get_text() for label in vit.get_yticklabels()] == ["ssf", "san"]
    assert (vit.get_title(), swin.get_title()) == ("vit", "swin")
    assert [(text.get_text(), text.xy) for text in vit.texts] == [("80.0", (1.02, 0)), ("82.0", (1.02, 1))]
    circles = [float(x) for line in vit.lines if line.get_markerfacecolor() == "white" for x in line.get_xdata()]
    assert circles == [0.785, 0.815]
    figure.draw_without_rendering()
    assert {"79%", "80%", "81%", "82%"} <= set(shown(vit.xaxis))


def test_equal_accuracies_are_not_blown_up():
    (axes,) = accuracy_points([point("vit", "san", 0.5, 0.5, 0.5)], METHODS).axes
    np.testing.assert_allclose(axes.get_xlim(), (0.49, 0.51))


def test_a_reference_has_a_dotted_line_in_the_panels_that_have_it():
    names = ("san", "san-reversed", "san-none")
    records = [
        point("vit", "san-none", 0.5, 0.4, 0.6),
        point("vit", "san", 0.7, 0.6, 0.8),
        point("swin", "san", 0.6, 0.5, 0.7),
    ]
    vit, swin = accuracy_points(records, names, "san-none").axes
    assert [label.get_text() for label in vit.get_yticklabels()] == ["san", "san-none"]
    dotted = [line for line in vit.lines if line.get_linestyle() == ":"]
    assert [line.get_xdata()[0] for line in dotted] == [0.5]
    assert not [line for line in swin.lines if line.get_linestyle() == ":"]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.88, 0.95, ["0.88", "0.89", "0.9", "0.91", "0.92", "0.93", "0.94", "0.95"]),
        (0.96, 1.04, ["0.96", "0.98", "1", "1.02", "1.04"]),
        (0.3, 2.0, ["0.3", "0.5", "1", "2"]),
        (0.02, 3.0, ["0.02", "0.05", "0.1", "0.2", "0.5", "1", "2"]),
        (1e-4, 5.0, ["0.0001", "0.001", "0.01", "0.1", "1"]),
    ],
)
def test_ticks_of_the_loss_are_plain_numbers(low, high, ticks):
    ends = [low, high]
    figure = learning_curves(
        [{"task": "a", "method": "san", "steps": [1, 2], "mean": ends, "low": ends, "high": ends}], METHODS
    )
    figure.draw_without_rendering()
    axis = figure.axes[0].yaxis
    assert shown(axis) == ticks
    assert {tick.label1.get_text() for tick in axis.get_minor_ticks()} <= {""}


def test_a_method_looks_the_same_in_every_picture():
    curve = {"task": "f/a", "steps": [1, 2], "mean": [2.0, 1.0], "low": [1.5, 0.5], "high": [2.5, 1.5]}
    curves = learning_curves([{**curve, "method": "san"}], METHODS)
    variance = variance_by_depth(
        [{"method": "san", "kind": "fc1", "depth": 0, "variance": 1.0, "acting": 4.0}], METHODS
    )
    points = accuracy_points([point("vit", "san", 0.5, 0.4, 0.6)], METHODS)
    colours = {
        curves.axes[0].lines[0].get_color(),
        variance.axes[0].lines[0].get_color(),
        points.axes[0].lines[0].get_color(),
    }
    assert colours == {look_of(2)["color"]}
    looks = [(look["color"], look["linestyle"], look["marker"]) for look in map(look_of, range(28))]
    assert len(set(looks)) == 28


def simulated(colour: str, matrix: list[list[float]]) -> np.ndarray:
    """A colour as it looks with a deficiency, by the matrices of Machado et al. (2009) at full severity."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = (np.array(matrix) @ linear).clip(0, 1)
    return np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize(
    "matrix",
    [
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    ],
    ids=["protanopia", "deuteranopia"],
)
def test_colours_stay_apart_for_the_colour_blind(matrix):
    seen = [simulated(colour, matrix) for colour in COLOURS]
    apart = [np.linalg.norm(a - b) for i, a in enumerate(seen) for b in seen[:i]]
    assert min(apart) > 0.1
    assert np.linalg.norm(simulated("#ff0000", matrix) - simulated("#6b5d00", matrix)) < 0.6  # the matrices do merge


def test_curves_have_a_band_from_lowest_to_highest():
    record = {
        "task": "f/a",
        "steps": [1, 2, 3],
        "mean": [3.0, 2.0, 1.0],
        "low": [2.0, 1.0, 0.5],
        "high": [4.0, 3.0, 2.0],
    }
    records = [{**record, "method": "san"}, {**record, "method": "ssf"}, {**record, "method": "san", "task": "f/b"}]
    figure = learning_curves(records, METHODS)
    first, second = figure.axes
    assert (first.get_title(), second.get_title()) == ("a", "b")
    assert (first.get_xlabel(), first.get_ylabel(), first.get_yscale()) == ("step", "training loss", "log")
    assert [line.get_ydata().tolist() for line in first.lines] == [[3.0, 2.0, 1.0]] * 2
    extents = first.collections[0].get_datalim(first.transData)
    assert (extents.y0, extents.y1, extents.x0, extents.x1) == (0.5, 4.0, 1, 3)
    assert len(second.lines) == 1
    assert texts(figure) == {"san", "ssf"}


@pytest.mark.parametrize("tasks", [1, 2])
def test_the_legend_fits_the_figure(tasks):
    names = [f"a-method-with-a-long-name-{place}" for place in range(9)]
    record = {"steps": [1, 2], "mean": [2.0, 1.0], "low": [2.0, 1.0], "high": [2.0, 1.0]}
    figure = learning_curves(
        [{**record, "method": name, "task": f"f/{task}"} for name in names for task in range(tasks)], names
    )
    figure.draw_without_rendering()
    box, whole = figure.legends[0].get_window_extent(), figure.bbox
    assert whole.x0 <= box.x0 < box.x1 <= whole.x1


def test_histograms_have_a_row_for_each_layer():
    draw = np.random.default_rng(0)
    scales = {
        "fc1": {
            "san": [draw.normal(1, 0.01, 500) for _ in range(3)],
            "ssf": [draw.normal(1, 0.1, 500) for _ in range(3)],
        },
        "patch": {"san": [draw.normal(1, 0.01, 50)]},
    }
    figure = layer_histograms(scales, METHODS)
    fc1, patch = figure.axes
    assert (fc1.get_title(), patch.get_title(), fc1.get_xlabel()) == ("fc1", "patch", "scale γ")
    assert (fc1.get_ylim(), patch.get_ylim()) == ((0, 3.1), (0, 1.1))
    assert fc1.get_yticks().tolist() == [0, 1, 2]
    filled = [stairs.get_data() for stairs in fc1.patches if stairs.get_fill()]
    assert sorted(data.baseline for data in filled) == [0, 0, 1, 1, 2, 2]
    for data in filled:
        inside = data.values - data.baseline
        assert inside.min() >= 0
        assert inside.max() <= 0.95 + 1e-9  # a row never reaches into the next
        assert 0.6 < data.edges[0] < 0.8
        assert 1.2 < data.edges[-1] < 1.4
    areas = [np.sum(np.diff(data.edges) * (data.values - data.baseline)) for data in filled]
    np.testing.assert_allclose(areas, areas[0])  # one unit of height in the panel
    assert texts(figure) == {"san", "ssf"}


def test_histograms_of_untrained_scales_are_drawn():
    (axes,) = layer_histograms({"fc1": {"san": [np.ones(5)]}}, METHODS).axes
    assert axes.get_title() == "fc1"


def test_variance_of_both_powers_stands_side_by_side():
    layers = [("san", 0.01, 0.04), ("san", 0.04, 0.16), ("ssf", 0.02, 0.02)]
    records = [
        {"method": m, "layer": str(i), "variance": v, "acting": a, "n_runs": 3} for i, (m, v, a) in enumerate(layers)
    ]
    left, right = variance_summary(records, METHODS).axes
    assert (left.get_title(), right.get_title(), left.get_xscale()) == ("var γ", "var γ$^{1+k}$", "log")
    assert [label.get_text() for label in left.get_yticklabels()] == ["san (n = 3)", "ssf (n = 3)"]
    assert [text.get_text() for text in left.texts] == ["0.02", "0.02"]  # geometric means
    assert [text.get_text() for text in right.texts] == ["0.08", "0.02"]
    assert [text.xy for text in left.texts] == [(1.02, 0), (1.02, 1)]  # right of the panel, where no dot is
    figure = left.figure
    figure.draw_without_rendering()
    assert not [text for text in shown(left.xaxis) if "10" in text]
    dots = sorted(float(x) for line in left.lines if line.get_marker() == "." for x in line.get_xdata())
    assert dots == [0.01, 0.02, 0.04]
    assert left.get_xlim() == right.get_xlim()


def test_variance_over_depth_is_dashed_where_scales_act_twice():
    records = [
        {"method": method, "kind": kind, "depth": depth, "variance": 0.01, "acting": 0.04 if method == "san" else 0.01}
        for method in ("san", "ssf")
        for kind in ("fc1", "fc2")
        for depth in range(4)
    ]
    figure = variance_by_depth(records, METHODS)
    first, second = figure.axes
    assert (first.get_title(), second.get_title()) == ("fc1", "fc2")
    assert (first.get_xlabel(), first.get_ylabel(), first.get_yscale()) == ("depth", "variance", "log")
    assert [(line.get_linestyle(), line.get_ydata()[0]) for line in first.lines] == [
        ("-", 0.01),
        ("--", 0.04),
        ("-", 0.01),
    ]
    assert list(first.lines[0].get_xdata()) == [0, 1, 2, 3]
    assert first.get_ylim() == second.get_ylim()
    assert texts(figure) == {"san: var γ", "san: var γ$^{1+k}$", "ssf: var γ"}


def test_similarity_has_layers_and_the_whole():
    layers = [{"intra": 0.9, "inter": 0.1}, {"intra": None, "inter": -0.4}]
    record = {"method": "san", "intra": 0.8, "inter": 0.2, "p": 0.00123, "layers": layers}
    figure = similarity_by_layer([record, {**record, "method": "ssf", "p": None, "intra": None}])
    first, second = figure.axes
    assert (first.get_title(), second.get_title()) == ("san, p = 0.0012", "ssf")
    lines = {line.get_label(): line for line in first.lines}
    data = [line.get_ydata() for line in lines.values() if len(line.get_xdata()) == 2 and line.get_marker() != "None"]
    np.testing.assert_allclose(data, [[0.9, np.nan], [0.1, -0.4]])
    levels = [line.get_ydata()[0] for line in first.lines if line.get_marker() == "None"]
    assert levels == [0.8, 0.2, 0]
    low, high = first.get_ylim()
    assert low < -0.4
    assert high == 1.05
    assert texts(figure) == {"within a task", "between tasks"}


def test_the_map_is_true_to_scale_and_names_its_tasks():
    points = [
        {"task": f"f/{task}", "seed": 0, "x": x, "y": y} for task, x, y in (("a", 0, 0), ("b", 2, 1), ("a", 1, 5))
    ]
    figure = engram_map([{"method": "san", "shares": [0.62, 0.2], "points": points}])
    (axes,) = figure.axes
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("san", "component 1 (62%)", "component 2 (20%)")
    assert axes.get_aspect() == 1.0
    drawn = {tuple(map(tuple, line.get_xydata())) for line in axes.lines}
    assert drawn == {((0.0, 0.0), (1.0, 5.0)), ((2.0, 1.0),)}
    assert texts(figure) == {"a", "b"}
    many = [{"task": f"f/{i}", "seed": 0, "x": i, "y": 0} for i in range(40)]
    (axes,) = engram_map([{"method": "san", "shares": [1.0, 0.0], "points": many}]).axes
    assert len({(line.get_color(), line.get_marker()) for line in axes.lines}) == 40


def test_a_picture_is_readable_in_print(tmp_path):
    """150 dots per inch, white behind, letters of six points at least, nothing cut off at the edges."""
    figure = accuracy_points([point("vit", "san", 0.5, 0.4, 0.6, [0.4, 0.6])], METHODS)
    write_figure(figure, tmp_path / "accuracy.png")
    image = np.asarray(Image.open(tmp_path / "accuracy.png").convert("RGB"))
    assert image.shape[1] == 3.6 * 150
    for edge in (image[0], image[-1], image[:, 0], image[:, -1]):
        assert (edge == 255).all()
    (axes,) = figure.axes
    sizes = [t.get_fontsize() for t in (*axes.texts, *axes.get_xticklabels(), axes.xaxis.label, axes.title)]
    assert min(sizes) >= 6


def test_a_figure_that_cannot_be_drawn_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        write_figure(Figure(), tmp_path / "accuracy.png")
    assert list(tmp_path.iterdir()) == []
