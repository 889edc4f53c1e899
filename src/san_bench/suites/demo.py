"""Run the demo: train SAN and baselines on handwritten digits, reload and merge the adapters, compare all.

Every method is trained in its own process, so that its peak memory is its own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from san_bench.config.recipe import Recipe, load_recipe, shipped
from san_bench.config.strict import san_error, suggest
from san_bench.run.folder import check_free
from san_bench.run.provenance import write_atomically, write_rows
from san_bench.suites.engines import in_fresh_process

NEEDED = ("sklearn", "matplotlib")
"""Modules of the extra `demo`."""


def demo(out: Path, methods: Sequence[str]) -> list[dict[str, Any]]:
    """Trains methods on one task with one seed, verifies the saved adapters, and compares the methods.

    The folder gets one run per method, `results.jsonl` (a row per run with its provenance), `table.md`, `curves.png`
    and, if any method has scales, `scales.png`. Finished runs are not repeated; an interrupted one is.

    Args:
        out: Folder to write to.
        methods: Names of recipes under demo/, in the order of the table.

    Returns:
        The rows.

    Raises:
        SanError: If a method is unknown, the extra `demo` is not installed, the folder holds runs of other recipes, or
            an adapter predicts other classes after reloading or changes the outputs when merged.
    """
    recipes = chosen(out, methods)
    from san_bench.report.groups import losses_of

    console = Console()
    rows, losses, scales = [], {}, {}
    for place, (name, recipe) in enumerate(recipes.items(), 1):
        console.rule(f"{place} of {len(recipes)}: {name}")
        row = in_fresh_process(_train, recipe)
        losses[name] = losses_of(Path(recipe.output))
        if recipe.method.kind in {"san", "ssf"}:
            checks, scales[name] = in_fresh_process(_examine, recipe.output)
            row.update(checks)
            console.print(
                f"{name}, reloaded: all {row['n_test']} predicted classes are the same, logits differ by at most "
                f"{row['reload_max_abs_difference']:.2g}. Merged: {row['merge_changed_classes']} classes "
                f"change, logits differ by at most {row['merge_max_abs_difference']:.2g}."
            )
        rows.append(row)
    _report(out, rows, losses, scales)
    return rows


def chosen(out: Path, methods: Sequence[str]) -> dict[str, Recipe]:
    """Returns the recipes by name, with their output under `out`, after checking methods, packages and folders."""
    known = [name.removeprefix("demo/") for name in shipped() if name.startswith("demo/")]
    if not methods:
        raise san_error(f"Choose at least one method: {', '.join(known)}.")
    for name in methods:
        if name not in known:
            raise san_error(f"The demo has no method {name!r}.{suggest(name, known)}")
    missing = [module for module in NEEDED if importlib.util.find_spec(module) is None]
    if missing:
        raise san_error(f'The demo needs {" and ".join(missing)}: pip install "san-peft[demo]"')
    recipes = {name: load_recipe(f"demo/{name}", {"output": str(out / name)}) for name in dict.fromkeys(methods)}
    strange = []
    for name, recipe in recipes.items():
        try:
            check_free(out / name, recipe)
        except ValueError:
            strange.append(name)
    if strange:
        raise san_error(
            f"{out} holds runs of other versions of these recipes, which cannot be compared: {', '.join(strange)}. "
            f"Pass another folder, such as --out {out}-2, or remove {out}."
        )
    return recipes


def _train(recipe: Recipe) -> dict[str, Any]:
    from san_bench.run.train import train

    return train(recipe)


def _examine(run: str) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Reloads a run's adapter, compares its predictions with the run's, merges it, and returns checks and scales."""
    from san_bench.image.domain import load_predictions, predict
    from san_bench.run.evaluate import load_model
    from san_peft import SanLayer, merge_and_verify

    model, domain = load_model(run)
    recipe, expected = domain.recipe, load_predictions(Path(run))
    split = domain.task[recipe.eval_split]
    loaded = predict(model, split, recipe)
    wrong = int((loaded.argmax(-1) != expected.argmax(-1)).sum())
    if wrong:
        raise san_error(
            f"The reloaded adapter in {run} predicts another class for {wrong} of {len(split)} images than the run "
            "did. If it was changed since, remove the folder to train it again."
        )
    scales: dict[str, list[float]] = {}
    for fqn, layer in model.named_modules():
        if isinstance(layer, SanLayer) and (scale := layer.get_scale()) is not None:
            scales.setdefault(fqn.rpartition(".")[2], []).extend(scale.tolist())
    report = merge_and_verify(model, domain.probe(64))
    merged = predict(report.model, split, recipe)
    checks = {
        "reload_max_abs_difference": float((loaded - expected).abs().max()),
        "merge_max_abs_difference": max(report.max_abs_difference, float((merged - expected).abs().max())),
        "merge_changed_classes": int((merged.argmax(-1) != expected.argmax(-1)).sum()),
    }
    return checks, scales


def _report(
    out: Path, rows: list[dict[str, Any]], losses: dict[str, list[float]], scales: dict[str, dict[str, list[float]]]
) -> None:
    from san_bench.report.figures.plots import loss_curves, scale_histograms
    from san_bench.report.tables.table import demo_to_markdown, demo_to_rich, notes, origin

    complete = len(rows) == sum(name.startswith("demo/") for name in shipped())
    command = "san demo" if complete else f"san demo --methods {' '.join(row['run'] for row in rows)}"
    write_rows(out / "results.jsonl", rows)
    write_atomically(out / "table.md", demo_to_markdown(rows, command))
    loss_curves(losses, out / "curves.png")
    names = ["results.jsonl", "table.md", "curves.png"]
    if scales:
        scale_histograms(scales, out / "scales.png")
        names.append("scales.png")
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    console.print(demo_to_rich(rows))
    console.print(f"{notes(rows)}\n{origin(rows, command)}", markup=False, highlight=False)
    console.print(f"Written to {out}: {', '.join(names)}, and a folder per run.", markup=False, highlight=False)
