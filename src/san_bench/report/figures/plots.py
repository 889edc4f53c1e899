"""Draw figures from computed numbers, in a colour-blind-safe palette.

Every plot is a matplotlib figure without a window. Methods also differ by marker or line style, so that figures work
in greyscale.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from san_bench.run.provenance import write_atomically

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette (https://jfly.uni-koeln.de/color/), without its yellow, which is faint on white."""
MARKERS = "os^DvPX*<>h"
DASHES = ("-", "--", ":", "-.")

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

Record = Mapping[str, Any]


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
    """Adds a legend below all panels, if there are any handles, with as many columns as fit the figure."""
    if handles:
        longest = max(len(handle.get_label()) for handle in handles)
        fitting = max(1, int(figure.get_figwidth() / (0.6 + 0.075 * longest)))
        across = min(across, fitting, len(handles))
        figure.legend(handles=handles, loc="outside lower center", ncols=across, handlelength=2.8)


def method_lines(records: Sequence[Record], methods: Sequence[str], marker: bool = True) -> list[Line2D]:
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
def accuracy_points(records: Sequence[Record], methods: Sequence[str], reference: str | None = None) -> Figure:
    """Draws accuracy as points with intervals: a panel for each backbone, a row for each method.

    The axis of a panel covers the intervals of its methods, not zero, so that differences show; its label says so.

    Args:
        records: With `backbone`, `method`, `mean`, `low` and `high`, the ends of its interval, and `seeds`, the
            accuracy of each seed.
        methods: All methods; the index of a method determines its style.
        reference: Method at whose accuracy each panel has a dotted line.
    """
    backbones = list(dict.fromkeys(record["backbone"] for record in records))
    here = [method for method in methods if any(record["method"] == method for record in records)]
    figure, panels = grid(len(backbones), 3.6, 0.8 + 0.24 * len(here), across=3, share=True)
    for axes, backbone in zip(panels, backbones, strict=True):
        for record in (record for record in records if record["backbone"] == backbone):
            row, mean = here.index(record["method"]), record["mean"]
            look = {**look_of(methods.index(record["method"])), "linestyle": ""}
            away = [[mean - record["low"]], [record["high"] - mean]]
            axes.errorbar(mean, row, xerr=away, capsize=2.5, elinewidth=1.2, **look)
            seeds = record["seeds"] if len(record["seeds"]) > 1 else []
            axes.plot(seeds, [row + 0.27] * len(seeds), "o", color="white", markeredgecolor="black", markersize=2.5)
            mark_row(axes, row, f"{100 * mean:.1f}")
            if record["method"] == reference:
                axes.axvline(mean, color="black", linewidth=0.8, linestyle=":")
        axes.set(title=backbone, xlim=_zoomed([record for record in records if record["backbone"] == backbone]))
        axes.set_xlabel(f"accuracy{' (axis does not start at 0)' if axes.get_xlim()[0] > 0 else ''}")
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}%"))
    panels[0].set_yticks(range(len(here)), here)
    panels[0].set_ylim(len(here) - 0.4, -0.6)
    return figure


def _zoomed(records: Sequence[Record]) -> tuple[float, float]:
    """Returns the ends of an axis around intervals and seeds; it covers at least two percentage points."""
    values = [value for record in records for value in (record["low"], record["high"], *record["seeds"])]
    middle, half = (min(values) + max(values)) / 2, max(0.01, 0.55 * (max(values) - min(values)))
    return middle - half, middle + half


def mark_row(axes: Axes, row: float, text: str) -> None:
    """Writes a number to the right of a panel, where it covers no point."""
    place = axes.get_yaxis_transform()
    axes.annotate(text, (1.02, row), xycoords=place, va="center", fontsize=7, annotation_clip=False)


def plain_numbers(axis: Axis) -> None:
    """Writes the ticks of a logarithmic axis, whose data is drawn, as plain numbers: 0.5 and 2, not powers of ten."""
    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5) if decades < 1.2 else (1, 2, 5) if decades < 3.5 else (1,)))
    if sum(low <= tick <= high for tick in axis.get_majorticklocs()) < 3 and decades < 1:
        axis.set_major_locator(MaxNLocator(5))
    axis.set_major_formatter(FuncFormatter(lambda value, _: np.format_float_positional(value, 6, False, False, "-")))
    axis.set_minor_formatter(NullFormatter())


@rc_context(STYLE)
def learning_curves(records: Sequence[Record], methods: Sequence[str]) -> Figure:
    """Draws the training loss over steps: a panel for each task, a line for each method, a band over its seeds.

    Args:
        records: With `task`, `method`, and the lists `steps`, `mean`, `low` and `high`.
        methods: All methods; the index of a method determines its style.
    """
    tasks = short_names(record["task"] for record in records)
    figure, panels = grid(len(tasks), *((2.7, 2.2) if len(tasks) > 1 else (6.0, 3.4)))
    for axes, task in zip(panels, tasks, strict=True):
        for record in (record for record in records if record["task"] == task):
            look = look_of(methods.index(record["method"]), marker=False)
            axes.plot(record["steps"], record["mean"], **look)
            axes.fill_between(
                record["steps"], record["low"], record["high"], color=look["color"], alpha=0.18, linewidth=0
            )
        axes.set(xlabel="step", ylabel="training loss", title=tasks[task], yscale="log")
        plain_numbers(axes.yaxis)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    legend(figure, method_lines(records, methods, marker=False))
    return figure
