"""Drawings: what stands on the axes, how far the data reach, and that methods stay apart."""

from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from PIL import Image

from san_bench.report.figures import plots
from san_bench.report.figures.plots import (
    COLOURS,
    accuracy_bars,
    learning_curves,
    look_of,
    loss_curves,
    order_bars,
    scale_histograms,
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


def bar(backbone, method, mean, sd=None, seeds=()):
    return {"backbone": backbone, "method": method, "mean": mean, "sd": sd, "seeds": list(seeds)}


def test_bars_start_at_zero_and_say_their_number():
    records = [
        bar("vit", "ssf", 0.4, 0.1, [0.3, 0.5]),
        bar("vit", "san", 0.8, 0.05, [0.75, 0.85]),
        bar("swin", "san", 0.6),
    ]
    figure = accuracy_bars(records, METHODS)
    (axes,) = figure.axes
    bars = [(round(patch.get_x() + patch.get_width() / 2), patch.get_height(), patch.get_y()) for patch in axes.patches]
    assert bars == [(0, 0.4, 0), (0, 0.8, 0), (1, 0.6, 0)]
    assert axes.get_ylim()[0] == 0
    assert axes.get_ylim()[1] > 0.85
    assert [label.get_text() for label in axes.get_xticklabels()] == ["vit", "swin"]
    assert [text.get_text() for text in axes.texts] == ["40.0", "80.0", "60.0"]
    assert texts(figure) == {"ssf", "san"}
    seeds = sorted(float(y) for line in axes.lines if line.get_marker() == "o" for y in line.get_ydata())
    assert seeds == [0.3, 0.5, 0.75, 0.85]
    spans = sorted(tuple(path[:, 1]) for c in axes.collections for path in c.get_segments())
    np.testing.assert_allclose(spans, [(0.3, 0.5), (0.75, 0.85)])
    lefts = [patch.get_x() for patch in axes.patches[:2]]
    assert lefts[1] >= lefts[0] + axes.patches[0].get_width()  # bars do not overlap


def test_many_bars_turn_their_numbers():
    records = [bar(backbone, f"m{i}", 0.5) for backbone in ("vit", "swin", "convnext") for i in range(9)]
    (axes,) = accuracy_bars(records, [f"m{i}" for i in range(9)]).axes
    assert {text.get_rotation() for text in axes.texts} == {90}


def test_order_has_a_panel_for_each_backbone_and_a_line_at_the_last():
    names = ("san", "san-reversed", "san-none")
    records = [bar("vit", "san-none", 0.5), bar("vit", "san", 0.7), bar("swin", "san", 0.6)]
    vit, swin = order_bars(records, names).axes
    assert [label.get_text() for label in vit.get_xticklabels()] == ["san", "san-none"]
    assert [patch.get_height() for patch in vit.patches] == [0.7, 0.5]
    dotted = [line for line in vit.lines if line.get_linestyle() == ":"]
    assert [line.get_ydata()[0] for line in dotted] == [0.5]
    assert not [line for line in swin.lines if line.get_linestyle() == ":"]


def test_a_method_looks_the_same_in_every_picture():
    curve = {"task": "f/a", "steps": [1, 2], "mean": [2.0, 1.0], "low": [1.5, 0.5], "high": [2.5, 1.5]}
    curves = learning_curves([{**curve, "method": "san"}], METHODS)
    variance = variance_by_depth(
        [{"method": "san", "kind": "fc1", "depth": 0, "variance": 1.0, "acting": 4.0}], METHODS
    )
    bars = accuracy_bars([bar("vit", "san", 0.5)], METHODS)
    colours = {
        curves.axes[0].lines[0].get_color(),
        variance.axes[0].lines[0].get_color(),
        to_hex(bars.axes[0].patches[0].get_facecolor()).upper(),
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
    figure = accuracy_bars([bar("vit", "san", 0.5, 0.1, [0.4, 0.6])], METHODS)
    write_figure(figure, tmp_path / "bars.png")
    image = np.asarray(Image.open(tmp_path / "bars.png").convert("RGB"))
    assert image.shape[:2] == (3.6 * 150, 3.6 * 150)
    for edge in (image[0], image[-1], image[:, 0], image[:, -1]):
        assert (edge == 255).all()
    (axes,) = figure.axes
    sizes = [t.get_fontsize() for t in (*axes.texts, *axes.get_xticklabels(), axes.yaxis.label, axes.title)]
    assert min(sizes) >= 6


def test_a_figure_that_cannot_be_drawn_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        write_figure(Figure(), tmp_path / "bars.png")
    assert list(tmp_path.iterdir()) == []


def test_the_demo_has_its_two(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(plots, "write_figure", lambda figure, path: kept.append(figure))
    loss_curves({"san": [2.0] * 20, "full": [1.0] * 20}, tmp_path / "curves.png")
    scale_histograms({"san": {"fc1": [1.0, 1.1, 0.9]}}, tmp_path / "scales.png")
    (curves,), (histogram,) = (figure.axes for figure in kept)
    bold = [line for line in curves.lines if line.get_alpha() is None]
    assert [line.get_label() for line in bold] == ["SAN", "full fine-tuning"]
    np.testing.assert_allclose([line.get_xydata()[0] for line in bold], [[10, 2], [10, 1]])
    assert histogram.get_title() == "fc1 (n = 3)"
    picture = io.BytesIO()
    kept[1].savefig(picture)
    assert picture.getvalue().startswith(b"\x89PNG")
