"""One table of several results, for the terminal and as Markdown, each number with what it is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.table import Table

Row = dict[str, Any]

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

LABELS = {
    "san": "SAN",
    "linear": "linear probe",
    "ssf": "SSF",
    "lora-equal": "LoRA, rank 1 (as many parameters as SAN)",
    "lora-r8": "LoRA, rank 8",
    "full": "full fine-tuning",
}
"""What the recipes of the demo are called in tables and plots."""


def label(run: str) -> str:
    """Returns what a run is called in tables and plots."""
    return LABELS.get(run, run)


def wilson(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    r"""Returns the Wilson interval of a share, 95% for the default `z`.

    $$ \frac{\hat p + z^2/2n \pm z \sqrt{\hat p (1 - \hat p) / n + z^2 / 4n^2}}{1 + z^2/n} $$

    Args:
        correct: How many were right.
        n: Of how many.
        z: Quantile of the normal distribution.

    Example:
        >>> low, high = wilson(90, 100)
        >>> f"{low:.3f} {high:.3f}"
        '0.826 0.945'
    """
    share = correct / n
    middle, width = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = ((middle + sign * width) / (1 + z * z / n) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


def cells(row: Row) -> tuple[str, ...]:
    """Returns a result as the texts of `COLUMNS`."""
    low, high = wilson(row["correct"], row["n_test"])
    return (
        label(row["run"]),
        f"{row['accuracy']:.1%}",
        f"{100 * low:.1f}–{100 * high:.1f}%",
        f"{row['correct']} / {row['n_test']}",
        f"{row['trainable_parameters'] - row['trainable_head']:,}",
        f"{row['trainable_parameters']:,}",
        f"{row['train_seconds']:.1f}",
        f"{row['saved_activation_mib']:.1f}",
        f"{row['peak_rss_growth_mib']:.0f}",
    )


def to_rich(rows: Sequence[Row]) -> Table:
    """Returns the table for the terminal."""
    table = Table(*COLUMNS)
    for position, column in enumerate(table.columns):
        column.justify = "right" if position else "left"
    for row in rows:
        table.add_row(*cells(row))
    return table


def to_markdown(rows: Sequence[Row], command: str) -> str:
    """Returns the table in Markdown, followed by how to read it and by where its numbers come from."""
    lines = [COLUMNS, (":--", *("--:",) * (len(COLUMNS) - 1)), *map(cells, rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\n{notes(rows)}\n\n{origin(rows, command)}\n"


def notes(rows: Sequence[Row]) -> str:
    """Returns how the numbers are to be read: from how many seeds and images, and what was measured."""
    n, seeds = _listed(row["n_test"] for row in rows), _listed(row["seed"] for row in rows)
    return (
        f"One run per method, with seed {seeds}, scored once on n = {n} test images. The interval is Wilson's and "
        "covers the draw of the images alone; another seed moves every accuracy too, so methods whose intervals "
        "overlap are not ranked by this table. Learning rates were chosen on validation images, from the same grid for "
        "all methods. Saved activations are what one forward pass of one batch keeps for the backward pass. Peak "
        "memory growth is the largest resident memory in training minus that before it, with what the allocator keeps; "
        "every method had its own process."
    )


def origin(rows: Sequence[Row], command: str) -> str:
    """Returns the command, dates, versions, commit and machine; one line for each where rows differ in them."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        text = (
            f"commit {row['commit'] or 'unknown'}; {versions}, Python {row['python']}; {row['cpu']}, "
            f"{row['threads']} threads, device {row['device']}"
        )
        groups.setdefault(text, []).append(row)
    lines = []
    for text, group in groups.items():
        dates = sorted({row["finished"][:10] for row in group})
        date = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
        who = "" if len(groups) == 1 else f"{', '.join(label(row['run']) for row in group)}: "
        lines.append(f"{who}measured {date} by `{command}`; {text}.")
    lines += [
        f"{label(row['run'])} was interrupted and resumed at step {row['resumed_from_step']}."
        for row in rows
        if row["resumed_from_step"]
    ]
    return "\n\n".join(line[0].upper() + line[1:] for line in lines)


def _listed(values: Any) -> str:
    return ", ".join(f"{value:,}" for value in dict.fromkeys(values))
