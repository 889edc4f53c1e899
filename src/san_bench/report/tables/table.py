"""Build and print the result tables of suites and of the demo."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from san_bench.config.strict import did_you_mean, san_error
from san_bench.report.origin import origin, verified
from san_bench.report.tables import render
from san_bench.report.tables.compare import cost_table, difference_table, means_table, modes_table, task_tables
from san_bench.report.tables.estimate import wilson
from san_bench.report.tables.published import backbone_of
from san_bench.report.tables.published import published as published_rows
from san_bench.report.tables.sections import sections
from san_bench.run.provenance import write_atomically
from san_bench.run.results import Cell, ResultTable, Row, read_rows

WIDTH = 200
"""Width of the output without a terminal."""

COLUMNS = (
    "Method",
    "Accuracy",
    "95% interval",
    "Right / n",
    "Trained without head",
    "with head",
    "Training, s",
    "Saved activations, MiB",
    "Peak memory growth, MiB",
)
"""Columns of the demo's table."""

LABELS = {
    "san": "SAN",
    "linear": "linear probe",
    "ssf": "SSF",
    "lora-equal": "LoRA, rank 1 (as many parameters as SAN)",
    "lora-r8": "LoRA, rank 8",
    "full": "full fine-tuning",
}
"""Names of the demo's methods in its table."""


def tables(rows: Sequence[Row], published: bool = True, reference: str | None = None) -> list[ResultTable]:
    """Builds the tables of suites for each backbone: means, accuracy by task, paired differences and cost.

    Args:
        rows: Result rows, such as those of `read_rows`.
        published: Whether to add published numbers for the same suite and backbone.
        reference: Baseline of the paired differences; by default `san`, else the first method of kind san, else the
            first method.

    Raises:
        SanError: If rows are not comparable, or no row has the reference.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    if reference is not None and reference not in methods:
        hint = did_you_mean(reference, methods)
        raise san_error(f"No result has the method {reference!r}.{hint} Methods: {', '.join(sorted(methods))}.")
    made: list[ResultTable] = []
    for section in sections(rows):
        fits = published and section.split == "test" and section.way in ("", "generation")
        papers = published_rows(section.family, backbone_of(section.model)) if fits else []
        made += [means_table(section, papers)] if section.groups and len(section.tasks) > 1 else []
        made += task_tables(section, papers)
        differences = difference_table(section, reference)
        modes = modes_table(section)
        made += [*(table for table in (differences, modes) if table), cost_table(section)]
    return made


def table_command(
    folders: Sequence[Path],
    form: Literal["rich", "markdown", "latex", "csv"] = "rich",
    published: bool = True,
    reference: str | None = None,
    only: Sequence[str] = (),
    out: Path | None = None,
) -> None:
    """Prints or writes the tables of suites and runs.

    Args:
        folders: Folders or files for `read_rows`.
        form: Output format.
        published: Whether to add published numbers.
        reference: Baseline of the paired differences.
        only: Prefixes of the table names to keep, such as `means` and `difference`; all tables by default.
        out: File to write; standard output by default.

    Raises:
        SanError: If there are no results, or they are invalid or not comparable.
    """
    made = tables(read_rows(folders), published, reference)
    kinds = [table.title.rpartition(": ")[2] for table in made]
    unknown = [word for word in only if not any(kind.startswith(word) for kind in kinds)]
    if unknown:
        known = list(dict.fromkeys(kinds))
        raise san_error(f"There is no table {', '.join(unknown)}. Tables: {', '.join(known)}.")
    if only:
        made = [table for table, kind in zip(made, kinds, strict=True) if kind.startswith(tuple(only))]
    if form == "rich":
        shown = io.StringIO()
        console = Console() if out is None else Console(file=shown, width=WIDTH)
        if out is None and not console.is_terminal:
            console = Console(width=WIDTH)
        render.show(made, console)
        text = shown.getvalue()
    else:
        parts = {"markdown": render.to_markdown, "latex": render.to_latex}
        text = render.to_csv(made) if form == "csv" else "\n".join(map(parts[form], made))
        if out is None:
            print(text, end="")
    if out is not None:
        write_atomically(out, text)
        print(f"{len(made)} tables written to {out}")


def demo_cells(row: Row) -> tuple[Cell, ...]:
    """Formats a result of the demo as the cells of `COLUMNS`."""
    low, high = wilson(row["correct"], row["n_test"])
    name, trained, head = str(row["method"]), row["trainable_parameters"], row["trainable_head"]
    return (
        Cell(LABELS.get(name, name)),
        Cell(f"{row['accuracy']:.1%}", row["accuracy"]),
        Cell(f"{100 * low:.1f}–{100 * high:.1f}%", low),
        Cell(f"{row['correct']} / {row['n_test']}", row["correct"]),
        Cell(f"{trained - head:,}", trained - head),
        Cell(f"{trained:,}", trained),
        Cell(f"{row['train_seconds']:.1f}", row["train_seconds"]),
        Cell(f"{row['saved_activation_mib']:.1f}", row["saved_activation_mib"]),
        Cell(f"{row['peak_rss_growth_mib']:.0f}", row["peak_rss_growth_mib"]),
    )


def demo_table(rows: Sequence[Row], command: str) -> ResultTable:
    """Builds the demo's table, with notes and provenance."""
    said = [notes(rows), *verified(rows), *origin(rows, command).split("\n\n")]
    return ResultTable("", COLUMNS, tuple(map(demo_cells, rows)), tuple(said))


def notes(rows: Sequence[Row]) -> str:
    """Returns the notes of the demo's table: seeds, images, intervals and what was measured."""
    n, seeds = _listed(row["n_test"] for row in rows), _listed(row["seed"] for row in rows)
    return (
        f"One run per method with seed {seeds}, evaluated once on n = {n} test images. The Wilson interval covers only "
        "the sampling of the test images; accuracy also varies with the seed, so this table does not rank methods with "
        "overlapping intervals. Learning rates were chosen on the validation split, from the same grid for all "
        "methods. Saved activations: memory that the forward pass of one batch keeps for the backward pass. Peak "
        "memory growth: peak resident memory in training minus that before it, including memory cached by the "
        "allocator; every method ran in its own process."
    )


def _listed(values: Any) -> str:
    return ", ".join(f"{value:,}" for value in dict.fromkeys(values))
