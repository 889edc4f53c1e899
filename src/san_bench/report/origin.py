"""Sentences on the provenance of results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from san_bench.run.results import trainings


def origin(rows: Sequence[dict[str, Any]], command: str) -> str:
    """Describes command, dates, versions, commit and machine, in one paragraph per environment.

    Args:
        rows: Result rows.
        command: Command that produced them.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
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
        who = "" if len(groups) == 1 else f"{_who(group)}: "
        lines.append(f"{who}measured {date} by `{command}`; {text}.")
    lines += [
        f"{_name(row)} was interrupted and resumed at step {row['resumed_from_step']}."
        for row in trainings(rows)
        if row.get("resumed_from_step")
    ]
    return "\n\n".join(line[0].upper() + line[1:] for line in lines)


def verified(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Describes what the adapters of a suite with `verify: true` changed when they were loaded and merged.

    Args:
        rows: Result rows.

    Returns:
        One sentence, or none if no adapter was verified.
    """
    checked = [row for row in trainings(rows) if "merge_changed_predictions" in row]
    if not checked:
        return []
    loaded, merged, changed = (
        max(row[key] or 0 for row in checked)
        for key in ("reload_max_abs_difference", "merge_max_abs_difference", "merge_changed_predictions")
    )
    predictions = f"at most {changed:,} predictions of a run" if changed else "no prediction"
    return [
        f"Verified adapters: {', '.join(dict.fromkeys(row['method'] for row in checked))}. Loaded from disk, they give "
        f"the same predictions, and outputs that differ by at most {loaded:.2g}. Merged into the model, they change "
        f"{predictions}, and outputs by at most {merged:.2g}."
    ]


def _in_suite(row: dict[str, Any]) -> bool:
    return "/" in row.get("run", "/")


def _who(rows: Sequence[dict[str, Any]]) -> str:
    if not any(map(_in_suite, rows)):
        return ", ".join(row["run"] for row in rows)
    methods, count = ", ".join(dict.fromkeys(row["method"] for row in rows)), len(trainings(rows))
    return f"{count} {'run' if count == 1 else 'runs'} of {methods}"


def _name(row: dict[str, Any]) -> str:
    if _in_suite(row):
        return f"the run of {row['method']} on {row['task']}, seed {row['seed']},"
    return row["run"]
