"""Draw figures from computed numbers, in a colour-blind-safe palette.

Every plot is a matplotlib figure without a window. Methods also differ by marker, line style or hatching, so that
figures work in greyscale.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from san_bench.report.origin import label
from san_bench.run.provenance import write_atomically

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette (https://jfly.uni-koeln.de/color/), without its yellow, which is faint on white."""
MARKERS = "os^DvPX*<>h"
DASHES = ("-", "--", ":", "-.")
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "---", "ooo", "+++")

STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelsize": 8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "font.size": 8,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.5,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
}
SAVING: dict[Any, Any] = {"pdf.fonttype": 42, "svg.hashsalt": "san"}
"""Settings for text in PDF files, and for reproducible SVG files."""

WINDOW = 10
"""Window of the moving average of the demo's loss, in steps."""

PlotRow = Mapping[str, Any]


def write_figure(figure: Figure, path: Path) -> None:
    """Saves a figure atomically, in the format of the file's suffix: png, svg or pdf."""
    form = path.suffix.removeprefix(".")
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(form)
    buffer = io.BytesIO()
    with rc_context(SAVING):
        figure.savefig(buffer, format=form, dpi=150, metadata=undated)
    write_atomically(path, buffer.getvalue())


def grid(count: int, width: float, height: float, across: int = 4, share: bool = False) -> tuple[Figure, list[Axes]]:
    """Creates a figure with a grid of panels.

    Args:
        count: Number of panels.
        width: Width of a panel, in inches.
        height: Height of a panel, in inches.
        across: Maximum number of panels in a row.
        share: Whether all panels share their vertical axis.
    """
    across = min(across, count)
    down = math.ceil(count / across)
    figure = Figure(figsize=(max(width * across, 3.6), height * down + 0.5), layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False, sharey=share).flat)
    for spare in axes[count:]:
        spare.set_axis_off()
    return figure, axes[:count]


def legend(figure: Figure, handles: Sequence[Any], across: int = 4) -> None:
    """Adds a legend below all panels, if there are any handles."""
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(across, len(handles)), handlelength=2.8)


def method_lines(records: Sequence[PlotRow], methods: Sequence[str], marker: bool = True) -> list[Line2D]:
    """Returns legend handles for the methods of some records."""
    here = {record["method"] for record in records}
    return [Line2D([], [], label=m, **look_of(i, marker)) for i, m in enumerate(methods) if m in here]


def short_names(tasks: Iterable[str]) -> dict[str, str]:
    """Returns unique tasks with their short names, without the prefix if all share it.

    Example:
        >>> short_names(["vtab/dtd", "vtab/svhn", "vtab/dtd"]), short_names(["vtab/dtd", "digits"])
        ({'vtab/dtd': 'dtd', 'vtab/svhn': 'svhn'}, {'vtab/dtd': 'vtab/dtd', 'digits': 'digits'})
    """
    names = list(dict.fromkeys(tasks))
    family = len({name.rpartition("/")[0] for name in names}) == 1
    return {name: name.rpartition("/")[2] if family else name for name in names}


def look_of(place: int, marker: bool = True) -> dict[str, Any]:
    """Returns colour, line style and marker of the method at an index."""
    look = {"color": COLOURS[place % len(COLOURS)], "linestyle": DASHES[place % len(DASHES)], "linewidth": 1.4}
    return {**look, "marker": MARKERS[place % len(MARKERS)], "markersize": 4} if marker else look


# ---------------------------------------------------------------------------------------------- accuracy and loss


@rc_context(STYLE)
def accuracy_bars(records: Sequence[PlotRow], methods: Sequence[str]) -> Figure:
    """Draws bars of accuracy by backbone, with spread, seeds and values.

    Args:
        records: With `backbone`, `method`, `mean`, `sd` or `None`, and `seeds`, the accuracy of each seed.
        methods: All methods; the index of a method determines its style.
    """
    backbones = list(dict.fromkeys(record["backbone"] for record in records))
    here = [method for method in methods if any(record["method"] == method for record in records)]
    width = 0.85 / len(here)
    figure = Figure(figsize=(min(max(3.6, 0.42 * len(here) * len(backbones) + 1.2), 11), 3.6), layout="constrained")
    axes = figure.subplots()
    for number, method in enumerate(here):
        place = methods.index(method)
        mine = [record for record in records if record["method"] == method]
        at = np.array([backbones.index(record["backbone"]) for record in mine])
        at = at + (number - (len(here) - 1) / 2) * width
        heights = [record["mean"] for record in mine]
        look: dict[str, Any] = {
            "color": COLOURS[place % len(COLOURS)],
            "hatch": HATCHES[place % len(HATCHES)],
            "edgecolor": "white",
        }
        axes.bar(at, heights, width * 0.92, label=method, **look)
        _spread(axes, at, mine, width, crowded=len(here) * len(backbones) > 24)
    axes.set_xticks(range(len(backbones)), backbones)
    _accuracy_axis(axes, records)
    handles, _ = axes.get_legend_handles_labels()
    legend(figure, handles)
    return figure


@rc_context(STYLE)
def order_bars(records: Sequence[PlotRow], names: Sequence[str]) -> Figure:
    """Draws the propagation order ablation: a panel for each backbone, a bar for each order.

    Args:
        records: As for `accuracy_bars`.
        names: All methods, in the order of the bars.
    """
    backbones = list(dict.fromkeys(record["backbone"] for record in records))
    figure, panels = grid(len(backbones), 3.4, 2.9, across=3)
    for axes, backbone in zip(panels, backbones, strict=True):
        here = {record["method"]: record for record in records if record["backbone"] == backbone}
        mine = [here[name] for name in names if name in here]
        at = np.arange(len(mine))
        for place, record in zip(at, mine, strict=True):
            look: dict[str, Any] = {
                "color": COLOURS[names.index(record["method"]) % len(COLOURS)],
                "edgecolor": "white",
            }
            axes.bar(place, record["mean"], 0.8, hatch=HATCHES[names.index(record["method"])], **look)
            if record["method"] == names[-1]:
                axes.axhline(record["mean"], color="black", linewidth=0.8, linestyle=":")
        _spread(axes, at, mine, 0.8)
        axes.set_xticks(at, [record["method"] for record in mine], rotation=30, ha="right")
        axes.set_title(backbone)
        _accuracy_axis(axes, mine)
    return figure


def _spread(axes: Axes, at: Any, records: Sequence[PlotRow], width: float, crowded: bool = False) -> None:
    """Adds spread, seeds and values to the bars at positions `at`."""
    for place, record in zip(at, records, strict=True):
        if record["sd"] is not None:
            axes.errorbar(place, record["mean"], record["sd"], color="black", capsize=2, linewidth=0.9)
        seeds = record["seeds"] if len(record["seeds"]) > 1 else []
        axes.plot(
            [place + width / 4] * len(seeds),
            seeds,
            "o",
            color="white",
            markeredgecolor="black",
            markersize=2.5,
            zorder=3,
        )
        axes.annotate(
            f"{100 * record['mean']:.1f}",
            (place, _top(record)),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            rotation=90 if crowded else 0,
            fontsize=6.5,
        )


def _top(record: PlotRow) -> float:
    return max([record["mean"] + (record["sd"] or 0.0), *record["seeds"]])


def _accuracy_axis(axes: Axes, records: Sequence[PlotRow]) -> None:
    axes.set(ylim=(0, 1.12 * max(map(_top, records)) or 1.0), ylabel="accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(visible=False, axis="x")


@rc_context(STYLE)
def learning_curves(records: Sequence[PlotRow], methods: Sequence[str]) -> Figure:
    """Draws the training loss over steps: a panel for each task, a line for each method, a band over its seeds.

    Args:
        records: With `task`, `method`, and the lists `steps`, `mean`, `low` and `high`.
        methods: All methods; the index of a method determines its style.
    """
    tasks = short_names(record["task"] for record in records)
    figure, panels = grid(len(tasks), 2.7, 2.2)
    for axes, task in zip(panels, tasks, strict=True):
        for record in (record for record in records if record["task"] == task):
            look = look_of(methods.index(record["method"]), marker=False)
            axes.plot(record["steps"], record["mean"], **look)
            axes.fill_between(
                record["steps"], record["low"], record["high"], color=look["color"], alpha=0.18, linewidth=0
            )
        axes.set(yscale="log", xlabel="step", ylabel="training loss", title=tasks[task])
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    legend(figure, method_lines(records, methods, marker=False))
    return figure


# ---------------------------------------------------------------------------------------------- the demo


def loss_curves(losses: Mapping[str, Sequence[float]], path: Path) -> None:
    """Draws the training loss of several runs.

    Args:
        losses: Loss of every step, by run.
        path: File to write, atomically.
    """
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    for run, values in losses.items():
        loss = np.asarray(values, dtype=float)
        (line,) = axes.plot(*_smooth(loss), label=label(run))
        axes.plot(np.arange(1, len(loss) + 1), loss, color=line.get_color(), alpha=0.15, linewidth=0.8)
    axes.set(xlabel="step", ylabel="training loss (cross-entropy)", yscale="log")
    axes.set_title(f"One run per method; bold: mean of {WINDOW} steps, faint: every step", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    write_figure(figure, path)


def scale_histograms(scales: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """Draws the distribution of trained scales, one panel for each kind of layer.

    A propagated scale multiplies a channel twice, in the anterior and in the posterior layer, so the legend has the
    variance of the scale and of its square.

    Args:
        scales: Entries of all scale vectors, by run and by kind of layer such as `fc1`.
        path: File to write, atomically.
    """
    kinds = list(dict.fromkeys(kind for by_kind in scales.values() for kind in by_kind))
    across = min(4, len(kinds))
    down = math.ceil(len(kinds) / across)
    figure = Figure(figsize=(3.1 * across, 2.7 * down), layout="constrained")
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for panel, kind in zip(panels, kinds, strict=False):
        _panel(panel, kind, {run: np.asarray(by_kind[kind]) for run, by_kind in scales.items() if kind in by_kind})
    for panel in panels[len(kinds) :]:
        panel.set_axis_off()
    figure.suptitle(
        "Trained scales γ by kind of layer, one at the start; var γ and var γ² over all entries", fontsize=10
    )
    write_figure(figure, path)


def _panel(axes: Axes, kind: str, values: Mapping[str, Float[np.ndarray, " n"]]) -> None:
    every = np.concatenate(list(values.values()))
    bins = np.histogram_bin_edges(every, bins=40)
    for run, scale in values.items():
        text = f"{label(run)}: var γ = {scale.var():.2g}, var γ² = {(scale**2).var():.2g}"
        axes.hist(scale, bins=bins.tolist(), density=True, alpha=0.55, label=text)
    axes.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
    axes.set_title(f"{kind} (n = {len(next(iter(values.values())))})", fontsize=9)
    axes.tick_params(labelsize=7)
    axes.legend(frameon=False, fontsize=6, loc="lower center", bbox_to_anchor=(0.5, -0.38))


def _smooth(values: Float[np.ndarray, " n"]) -> tuple[Any, Any]:
    """Computes the moving average over `WINDOW` steps, or over all if there are fewer."""
    width = min(WINDOW, len(values))
    return np.arange(width, len(values) + 1), np.convolve(values, np.ones(width) / width, mode="valid")
