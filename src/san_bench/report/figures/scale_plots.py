"""Plot trained scales: distribution, variance, similarity and PCA map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from san_bench.report.figures.plots import (
    COLOURS,
    MARKERS,
    STYLE,
    Record,
    grid,
    legend,
    look_of,
    mark_row,
    method_lines,
    plain_numbers,
    short_names,
)


@rc_context(STYLE)
def layer_histograms(
    scales: Mapping[str, Mapping[str, Sequence[Float[np.ndarray, " n"]]]], methods: Sequence[str]
) -> Figure:
    """Draws histograms of the scales of every layer: a panel for each kind of layer, a row for each layer.

    All histograms of a panel share their bins and height unit. Entries outside the 0.1% and 99.9% quantiles are counted
    in the outermost bins.

    Args:
        scales: Entries by kind of layer and method, one array per layer, from the input to the output.
        methods: All methods; the index of a method determines its style.
    """
    deepest = max(len(layers) for by_method in scales.values() for layers in by_method.values())
    figure, panels = grid(len(scales), 2.4, 1.2 + 0.22 * deepest)
    for axes, (kind, by_method) in zip(panels, scales.items(), strict=True):
        every = np.concatenate([entries for layers in by_method.values() for entries in layers])
        low, high = np.quantile(every, [0.001, 0.999])
        edges = np.linspace(low, high if high > low else low + 1e-6, 41)
        heights = {
            method: [np.histogram(entries.clip(edges[0], edges[-1]), edges, density=True)[0] for entries in layers]
            for method, layers in by_method.items()
        }
        unit = max(float(row.max()) for rows in heights.values() for row in rows)
        for method, rows in heights.items():
            look = look_of(methods.index(method), marker=False)
            for depth, row in enumerate(rows):
                top = depth + 0.95 * row / unit
                order = -depth - methods.index(method) / 10
                axes.stairs(top, edges, baseline=depth, fill=True, color=look["color"], alpha=0.3, zorder=order)
                axes.stairs(top, edges, baseline=None, color=look["color"], linestyle=look["linestyle"], linewidth=0.9)
        axes.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
        layers = max(map(len, by_method.values()))
        axes.set(title=kind, xlabel="scale γ", ylabel="depth", ylim=(0, layers + 0.1))
        axes.set_yticks(range(0, layers, 1 + layers // 8))
        axes.xaxis.set_major_locator(MaxNLocator(4))
    here = [{"method": method} for by_method in scales.values() for method in by_method]
    legend(figure, method_lines(here, methods, marker=False))
    return figure


@rc_context(STYLE)
def variance_summary(records: Sequence[Record], methods: Sequence[str]) -> Figure:
    """Draws the variance of every layer, of scales and of effective scales side by side.

    Args:
        records: With `method`, `layer`, `variance`, `acting` and `n_runs`.
        methods: All methods; the index of a method determines its style.
    """
    runs = {record["method"]: record["n_runs"] for record in records}
    figure = Figure(figsize=(7.2, 1.3 + 0.32 * len(runs)), layout="constrained")
    titles = {"variance": "var γ", "acting": "var γ$^{1+k}$"}
    for axes, (key, title) in zip(figure.subplots(1, 2, sharex=True, sharey=True), titles.items(), strict=True):
        for place, method in enumerate(runs):
            values = np.array([record[key] for record in records if record["method"] == method])
            values = values[values > 0]
            look = look_of(methods.index(method))
            jitter = np.linspace(-0.18, 0.18, len(values))
            axes.plot(values, place + jitter, ".", color=look["color"], alpha=0.45, markersize=4)
            if len(values):
                middle = float(np.exp(np.log(values).mean()))
                axes.plot(middle, place, look["marker"], color=look["color"], markeredgecolor="black", markersize=7)
                mark_row(axes, place, f"{middle:.2g}")
        axes.set(xscale="log", title=title, xlabel="variance of a layer's entries")
        axes.margins(x=0.12)
    plain_numbers(figure.axes[0].xaxis)  # of both: the axis is shared
    axes = figure.axes[0]
    axes.set_yticks(range(len(runs)), [f"{method} (n = {n})" for method, n in runs.items()])
    axes.set_ylim(len(runs) - 0.4, -0.6)
    return figure


@rc_context(STYLE)
def variance_by_depth(records: Sequence[Record], methods: Sequence[str]) -> Figure:
    """Draws the variance over depth: a panel for each kind of layer, lines for scales and effective scales.

    Args:
        records: With `method`, `kind`, `depth`, `variance` and `acting`.
        methods: All methods; the index of a method determines its style.
    """
    kinds = list(dict.fromkeys(record["kind"] for record in records))
    looks = []
    for method in dict.fromkeys(record["method"] for record in records):
        look = {**look_of(methods.index(method)), "markersize": 3.5, "linestyle": "-"}
        looks.append((method, "variance", "var γ", look))
        if any(record["acting"] != record["variance"] for record in records if record["method"] == method):
            twice = {**look, "linestyle": "--", "markerfacecolor": "white"}
            looks.append((method, "acting", "var γ$^{1+k}$", twice))
    figure, panels = grid(len(kinds), 2.4, 2.0, share=True)
    for axes, kind in zip(panels, kinds, strict=True):
        for method, key, _, look in looks:
            mine = [record for record in records if (record["kind"], record["method"]) == (kind, method)]
            axes.plot([record["depth"] for record in mine], [record[key] for record in mine], **look)
        axes.set(yscale="log", title=kind, xlabel="depth", ylabel="variance")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    plain_numbers(panels[0].yaxis)  # of all: the axis is shared
    legend(figure, [Line2D([], [], label=f"{method}: {text}", **look) for method, _, text, look in looks])
    return figure


@rc_context(STYLE)
def similarity_by_layer(records: Sequence[Record]) -> Figure:
    """Draws similarity by layer: a panel for each method, a line within tasks and one between them.

    Args:
        records: With `method`, `intra`, `inter` and `p`, which may be `None`, and `layers` with `intra` and `inter`.
    """
    figure, panels = grid(len(records), 2.7, 2.3, share=True)
    shown = {"intra": "within a task", "inter": "between tasks"}
    for axes, record in zip(panels, records, strict=True):
        for place, key in enumerate(shown):
            values = [np.nan if layer[key] is None else layer[key] for layer in record["layers"]]
            look = {**look_of(place), "markersize": 3, "markevery": 1 + len(values) // 20}
            axes.plot(range(len(values)), values, **look)
            if record[key] is not None:
                axes.axhline(record[key], color=look["color"], linewidth=0.8, linestyle=look["linestyle"], alpha=0.6)
        p = "" if record["p"] is None else f", p = {record['p']:.2g}"
        axes.set(title=f"{record['method']}{p}", xlabel="layer, from the input on", ylabel="cosine")
        axes.axhline(0, color="black", linewidth=0.6)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    panels[0].set_ylim(max(-1.05, panels[0].get_ylim()[0]), 1.05)
    legend(figure, [Line2D([], [], label=text, **look_of(place)) for place, text in enumerate(shown.values())])
    return figure


@rc_context(STYLE)
def engram_map(records: Sequence[Record]) -> Figure:
    """Draws the PCA map of runs: a panel for each method, a colour and marker for each task.

    Args:
        records: With `method`, `shares` of the two axes, and `points` with `task`, `x` and `y`.
    """
    tasks = short_names(sorted(point["task"] for record in records for point in record["points"]))
    figure, panels = grid(len(records), 2.7, 2.7)
    for axes, record in zip(panels, records, strict=True):
        for place, task in enumerate(tasks):
            mine = [(point["x"], point["y"]) for point in record["points"] if point["task"] == task]
            axes.plot(*np.array(mine).reshape(-1, 2).T, **_point(place))
        first, second = (f"component {n} ({100 * share:.0f}%)" for n, share in enumerate(record["shares"], 1))
        axes.set(title=record["method"], xlabel=first, ylabel=second)
        axes.set_aspect("equal", adjustable="datalim")
        axes.locator_params(nbins=5)
    legend(figure, [Line2D([], [], label=name, **_point(place)) for place, name in enumerate(tasks.values())], across=5)
    return figure


def _point(place: int) -> dict[str, Any]:
    look = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)], "linestyle": ""}
    return {**look, "markersize": 5, "markeredgecolor": "white", "markeredgewidth": 0.4}
