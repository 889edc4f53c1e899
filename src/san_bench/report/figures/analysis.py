"""Analyse a finished suite: compute the numbers, and draw figures from them.

Each analysis needs its data in the suite folder: rows for accuracy, logs for training curves, adapters for everything
about scales.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from san_bench.report.figures.similarity import PERMUTATIONS, compare, correlations, cosines, embed
from san_bench.report.groups import Group, layer_kinds, pairs, read_groups
from san_bench.report.tables.estimate import wilson
from san_bench.run.provenance import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ORDER = ("san", "san-reversed", "san-skip-one", "san-permuted", "san-shuffled", "san-none")
"""Methods of the propagation order ablation, in the order of the bars."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Picture:
    """A figure of a report with its caption.

    Attributes:
        name: File name without suffix.
        caption: Content, and number of runs.
        figure: The matplotlib figure.
    """

    name: str
    caption: str
    figure: Figure


# ---------------------------------------------------------------------------------------------- numbers


def analyse(folder: Path) -> dict[str, Any]:
    """Computes the numbers behind the figures of a suite, serialisable as JSON.

    Args:
        folder: Folder of the suite, or of a single run.

    Returns:
        Lists of records by analysis: `accuracy`, `curves`, `variance`, `similarity` and `engrams`; empty without data.

    Raises:
        SanError: If rows or scales cannot be read.
    """
    return numbers(read_groups(folder))


def numbers(groups: Sequence[Group]) -> dict[str, list[Record]]:
    """Computes the numbers of `analyse` from groups."""
    return {
        "accuracy": _accuracy(groups),
        "curves": [record for group in groups for record in _curves(group)],
        "variance": [record for group in groups for record in _variance(group)],
        "similarity": [record for group in groups for record in _similarity(group)],
        "engrams": [record for group in groups for record in _engrams(group)],
    }


def _accuracy(groups: Sequence[Group]) -> list[Record]:
    """Computes mean accuracy over the tasks that all methods of a backbone share, with the spread over seeds."""
    records = []
    for backbone in dict.fromkeys(group.backbone for group in groups):
        here = [group for group in groups if group.backbone == backbone]
        tasks = set.intersection(*({row["task"] for run in group.runs for row in run.rows} for group in here))
        for group in here if tasks else ():
            by_seed: dict[int, dict[str, float]] = {}
            for row in (row for run in group.runs for row in run.rows):
                if row["task"] in tasks:
                    by_seed.setdefault(row["seed"], {})[row["task"]] = row["accuracy"]
            of_task = [[values[task] for values in by_seed.values() if task in values] for task in tasks]
            complete = [statistics.fmean(values.values()) for values in by_seed.values() if len(values) == len(tasks)]
            mean = statistics.fmean(statistics.fmean(values) for values in of_task)
            sd = statistics.stdev(complete) if len(complete) > 1 else None
            below, above = _sampling(group, tasks) if sd is None else (sd, sd)
            records.append(
                {
                    "backbone": backbone,
                    "method": group.method,
                    "mean": mean,
                    "sd": sd,
                    "low": mean - below,
                    "high": mean + above,
                    "seeds": complete,
                    "n_tasks": len(tasks),
                    "n_runs": sum(map(len, of_task)),
                }
            )
    return records


def _sampling(group: Group, tasks: set[str]) -> tuple[float, float]:
    """Returns how far the 95% interval of the mean accuracy over tasks reaches down and up.

    It covers the sampling of the test data, not seeds. The Wilson intervals of the tasks are combined by the method of
    variance estimates recovery (Zou and Donner, 2008).
    """
    first = {row["task"]: row for run in reversed(group.runs) for row in run.rows if row["task"] in tasks}
    means = [row["accuracy"] for row in first.values()]
    ends = zip(*(wilson(round(row["accuracy"] * row["n_test"]), row["n_test"]) for row in first.values()), strict=True)
    below, above = (math.dist(means, end) / len(means) for end in ends)
    return below, above


def _curves(group: Group) -> list[Record]:
    """Computes the loss, averaged over equal blocks of steps, with mean, minimum and maximum over the seeds of a task.

    The first steps are left out if they do not fill a block.
    """
    by_task: dict[str, list[tuple[float, ...]]] = {}
    for run in group.runs:
        if run.losses:
            by_task.setdefault(run.task, []).append(run.losses)
    records = []
    for task, losses in by_task.items():
        steps = min(map(len, losses))
        width = max(1, steps // max(20, min(100, steps // 10)))
        start = steps % width
        means = np.array([np.reshape(one[start:steps], (-1, width)).mean(axis=1) for one in losses])
        records.append(
            {
                "backbone": group.backbone,
                "method": group.method,
                "task": task,
                "block": width,
                "steps": [float(first + (width + 1) / 2) for first in range(start, steps, width)],
                "mean": means.mean(axis=0).tolist(),
                "low": means.min(axis=0).tolist(),
                "high": means.max(axis=0).tolist(),
                "n_runs": len(losses),
            }
        )
    return records


def _variance(group: Group) -> list[Record]:
    """Computes the variance over channels of each layer's scale and of its effective scale, averaged over runs."""
    records = []
    for layer, (kind, depth) in layer_kinds(group.layers).items():
        scales = [run.scales for run in group.scaled if run.scales is not None]
        records.append(
            {
                "backbone": group.backbone,
                "method": group.method,
                "layer": layer,
                "kind": kind,
                "depth": depth,
                "channels": len(scales[0].vectors[layer]),
                "propagated": any(layer in one.propagated for one in scales),
                "exponents": sorted({one.exponent if one.propagates else 0.0 for one in scales}),
                "variance": statistics.fmean(float(one.vectors[layer].astype(float).var()) for one in scales),
                "acting": statistics.fmean(float(one.acting(layer).var()) for one in scales),
                "n_runs": len(scales),
            }
        )
    return records


def _similarity(group: Group) -> list[Record]:
    """Computes similarity within and between tasks, for all layers together (with a test) and for each layer."""
    tasks, seeds = [run.task for run in group.scaled], [run.row["seed"] for run in group.scaled]
    if len(set(seeds)) < 2:
        return []
    records = []
    for measure, of in (("cosine", cosines), ("correlation", correlations)):
        layers = [
            {"layer": layer, **_without_p(compare(of(group.matrix([layer])), tasks, seeds))} for layer in group.layers
        ]
        overall = asdict(compare(of(group.matrix(group.layers)), tasks, seeds, test=measure == "cosine"))
        records.append(
            {
                "backbone": group.backbone,
                "method": group.method,
                "measure": measure,
                "n_runs": len(seeds),
                "n_tasks": len(set(tasks)),
                **overall,
                "layers": layers,
            }
        )
    return records


def _without_p(comparison: Any) -> Record:
    return {key: value for key, value in asdict(comparison).items() if key != "p"}


def _engrams(group: Group) -> list[Record]:
    """Computes the PCA map of runs, for at least three runs of at least two tasks."""
    runs = group.scaled
    if len(runs) < 3 or len({run.task for run in runs}) < 2:
        return []
    places, shares = embed(group.matrix(group.layers))
    points = [
        {"task": run.task, "seed": run.row["seed"], "x": float(x), "y": float(y)}
        for run, (x, y) in zip(runs, places, strict=True)
    ]
    return [{"backbone": group.backbone, "method": group.method, "shares": list(shares), "points": points}]


# ---------------------------------------------------------------------------------------------- figures


def figures(folder: Path) -> list[Picture]:
    """Draws every figure that a suite has data for.

    Args:
        folder: Folder of the suite, or of a single run.

    Raises:
        SanError: If rows or scales cannot be read, or rows cannot be compared.
    """
    return draw(read_groups(folder))


def write_pictures(folder: Path, out: Path, form: str) -> list[Path]:
    """Saves the figures of a suite, with captions and numbers in `analysis.json`.

    Args:
        folder: Folder of the suite, or of a single run.
        out: Folder to write to.
        form: `png`, `svg` or `pdf`.

    Returns:
        The files.

    Raises:
        SanError: If rows or scales cannot be read, or rows cannot be compared.
    """
    from san_bench.report.figures.plots import write_figure

    groups = read_groups(folder)
    found = numbers(groups)
    pictures = draw(groups, found)
    for picture in pictures:
        write_figure(picture.figure, out / f"{picture.name}.{form}")
    captions = {picture.name: picture.caption for picture in pictures}
    write_atomically(out / "analysis.json", json.dumps({"captions": captions, **found}, indent=1) + "\n")
    return [*(out / f"{picture.name}.{form}" for picture in pictures), out / "analysis.json"]


def draw(groups: Sequence[Group], found: dict[str, list[Record]] | None = None) -> list[Picture]:
    """Draws every figure that groups have data for.

    Args:
        groups: Groups, such as those of `read_groups`.
        found: Their numbers, if they are computed already.
    """
    found = found or numbers(groups)
    methods = list(dict.fromkeys(group.method for group in groups))
    pictures = _accuracy_pictures(found["accuracy"], methods)
    for backbone in dict.fromkeys(group.backbone for group in groups):
        here = {name: [one for one in records if one["backbone"] == backbone] for name, records in found.items()}
        end = re.sub(r"[^\w.-]+", "-", backbone)
        for host, chosen in pairs([group for group in groups if group.backbone == backbone]):
            pictures += _pair_pictures(f"{host}-{end}", backbone, chosen, methods)
        pictures += _scale_pictures(end, backbone, here, methods)
        if curves := here["curves"]:
            from san_bench.report.figures.plots import learning_curves

            several = max(record["n_runs"] for record in curves) > 1
            caption = (
                f"Training loss on {backbone}, averaged over blocks of {_many_of(curves, 'block', 'step')}. "
                f"{'Lines: mean over seeds; bands: minimum to maximum over seeds. ' if several else ''}"
                f"n = {_span(curves, 'n_runs')} per method and task."
            )
            pictures.append(Picture(f"curves-{end}", caption, learning_curves(curves, methods)))
    return pictures


def _accuracy_pictures(records: list[Record], methods: list[str]) -> list[Picture]:
    """Draws accuracy by backbone, and the propagation order ablation if there is one."""
    from san_bench.report.figures.plots import accuracy_points

    counts = "; ".join(
        f"{backbone}: n = {_span(mine, 'n_runs')} over {_many(mine[0]['n_tasks'], 'task')}"
        for backbone, mine in _by(records, "backbone").items()
    )
    ordered = [record for record in records if record["method"] in ORDER]
    ablated = bool({record["method"] for record in ordered} & set(ORDER[1:5]))
    pictures = []
    if len(ordered) < len(records) or (ordered and not ablated):
        caption = f"Accuracy by backbone: {_how(records)} Runs per method, {counts}."
        pictures.append(Picture("accuracy", caption, accuracy_points(records, methods)))
    if ablated:
        caption = (
            f"Accuracy with ablated propagation order: {_how(ordered)} Runs per method, {counts}. Dotted line: without "
            "propagation."
        )
        pictures.append(Picture("order", caption, accuracy_points(ordered, ORDER, ORDER[-1])))
    return pictures


def _how(records: list[Record]) -> str:
    """Describes the points and intervals of accuracy that are drawn."""
    parts = ["mean over the tasks that all methods share"] if max(one["n_tasks"] for one in records) > 1 else []
    spread = {record["sd"] is None for record in records}
    if False in spread:
        parts.append("intervals: one standard deviation of this mean over seeds to each side; small circles: seeds")
    if True in spread:
        of = " of methods with one seed" if False in spread else ""
        parts.append(f"intervals{of}: 95% for the sampling of the test data, which does not cover seeds")
    return f"{'; '.join(parts)}. The axes do not start at zero."


def _pair_pictures(end: str, backbone: str, chosen: list[Group], methods: list[str]) -> list[Picture]:
    """Draws histograms and variance of every layer, with and without propagation."""
    from san_bench.report.figures.scale_plots import layer_histograms, variance_by_depth

    scales: dict[str, dict[str, list[Any]]] = {}
    for group in chosen:
        for layer, (kind, _) in layer_kinds(group.layers).items():
            scales.setdefault(kind, {}).setdefault(group.method, []).append(group.matrix([layer]).ravel())
    who = " and ".join(f"{group.method}, {'with' if group.propagates else 'without'} propagation" for group in chosen)
    n, tasks = len(chosen[0].runs), len({run.task for run in chosen[0].runs})
    runs = f"n = {_many(n, 'run')} of {_many(tasks, 'task')} each"
    caption = (
        f"Distribution of trained scales γ of {who}, on {backbone}, by layer from the input (depth 0); {runs}, pooled. "
        "Dotted line: initial value 1."
    )
    pictures = [Picture(f"histograms-{end}", caption, layer_histograms(scales, methods))]
    dashed = (
        " Dashed: effective scale γ to the power 1 + k of a propagated scale, so part of the lower variance of γ is "
        "mechanical."
    )
    dashed = dashed if any(group.propagates for group in chosen) else ""
    caption = (
        f"Variance over the channels of a layer, of {who}, on {backbone}, averaged over runs; {runs}. Solid: scale "
        f"γ.{dashed}"
    )
    records = [record for group in chosen for record in _variance(group)]
    return [*pictures, Picture(f"variance-{end}", caption, variance_by_depth(records, methods))]


def _scale_pictures(end: str, backbone: str, here: dict[str, list[Record]], methods: list[str]) -> list[Picture]:
    """Draws variance, similarity and the PCA map of all methods with scales."""
    from san_bench.report.figures.scale_plots import engram_map, similarity_by_layer, variance_summary

    pictures = []
    if variance := here["variance"]:
        caption = (
            f"Variance of trained scales on {backbone}. Dots: layers, averaged over n runs; large markers and "
            "numbers: geometric mean over layers. Left: scale γ. Right: effective scale γ to the power 1 + k of a "
            "propagated scale."
        )
        pictures.append(Picture(f"variance-{end}", caption, variance_summary(variance, methods)))
    if cosine := [record for record in here["similarity"] if record["measure"] == "cosine"]:
        parts = []
        for record in cosine:
            match = next(one for one in here["similarity"] if _same(one, record) and one["measure"] == "correlation")
            parts.append(
                f"{record['method']} {_number(record['intra'])} within (n = {_many(record['n_intra'], 'pair')}) and "
                f"{_number(record['inter'])} between tasks (n = {_many(record['n_inter'], 'pair')}), correlation "
                f"{_number(match['intra'])} and {_number(match['inter'])}"
            )
        caption = (
            f"Similarity of scale vectors on {backbone}: cosine of γ - 1 between runs with different seeds, within and "
            f"between tasks. Thin lines, all layers together: {'; '.join(parts)}. p: permutation test with "
            f"{PERMUTATIONS:,} permutations of tasks within seeds."
        )
        pictures.append(Picture(f"similarity-{end}", caption, similarity_by_layer(cosine)))
    if engrams := here["engrams"]:
        counts = "; ".join(f"{record['method']}: n = {_many(len(record['points']), 'run')}" for record in engrams)
        caption = (
            f"First two principal components of the scale vectors of all layers on {backbone}. Points: runs; colour "
            f"and marker: task; in parentheses: explained variance. {counts}."
        )
        pictures.append(Picture(f"engrams-{end}", caption, engram_map(engrams)))
    return pictures


def _same(one: Record, other: Record) -> bool:
    return (one["backbone"], one["method"]) == (other["backbone"], other["method"])


def _by(records: list[Record], key: str) -> dict[str, list[Record]]:
    return {value: [r for r in records if r[key] == value] for value in dict.fromkeys(r[key] for r in records)}


def _span(records: list[Record], key: str) -> str:
    low, high = min(record[key] for record in records), max(record[key] for record in records)
    return f"{low}" if low == high else f"{low} to {high}"


def _many(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def _many_of(records: list[Record], key: str, word: str) -> str:
    span = _span(records, key)
    return f"{span} {word}{'' if span == '1' else 's'}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
