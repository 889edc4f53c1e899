"""Labels of runs in tables and plots, and sentences on the provenance of results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from san_bench.run.results import trainings

LABELS = {
    "san": "SAN",
    "linear": "linear probe",
    "ssf": "SSF",
    "lora-equal": "LoRA, rank 1 (as many parameters as SAN)",
    "lora-r8": "LoRA, rank 8",
    "full": "full fine-tuning",
}
"""Labels of the demo's recipes in tables and plots."""


def label(run: str) -> str:
    """Returns the label of a demo run in tables and plots."""
    return LABELS.get(run, run)


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


def _in_suite(row: dict[str, Any]) -> bool:
    return "/" in row.get("run", "/")


def _who(rows: Sequence[dict[str, Any]]) -> str:
    if not any(map(_in_suite, rows)):
        return ", ".join(label(row["run"]) for row in rows)
    methods, count = ", ".join(dict.fromkeys(row["method"] for row in rows)), len(trainings(rows))
    return f"{count} {'run' if count == 1 else 'runs'} of {methods}"


def _name(row: dict[str, Any]) -> str:
    if _in_suite(row):
        return f"the run of {row['method']} on {row['task']}, seed {row['seed']},"
    return label(row["run"])
