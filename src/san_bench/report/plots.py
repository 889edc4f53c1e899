"""Plots as PNG: curves of the loss, and histograms of trained scales."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from san_bench.report.table import label
from san_bench.run.provenance import write_atomically

WINDOW = 10
"""Steps over which a curve of the loss is averaged."""


def loss_curves(losses: Mapping[str, Sequence[float]], path: Path) -> None:
    """Draws the training loss of several runs over the steps.

    Args:
        losses: Loss of every step, by run.
        path: PNG to write, atomically.
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
    _save(figure, path)


def scale_histograms(scales: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """Draws the distribution of trained scales, one panel for each kind of layer.

    Where a scale acts twice, as SAN's does on the way from an anterior to a posterior layer, a channel is scaled by its
    square; so the legend has the variance of both.

    Args:
        scales: Entries of all scale vectors, by run and by kind of layer such as `fc1`.
        path: PNG to write, atomically.
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
    _save(figure, path)


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
    """Steps and the mean over the last `WINDOW` values, or over all values where there are fewer."""
    width = min(WINDOW, len(values))
    return np.arange(width, len(values) + 1), np.convolve(values, np.ones(width) / width, mode="valid")


def _save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(path, buffer.getvalue())
