"""List the runs under a folder with their states and scores; imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from san_bench.run.folder import COMPLETE, RECIPE, RESULT, step_of

SKIPPED = {"adapter", "checkpoints", "plots"}
"""Subfolders of a run, which contain no runs."""


@dataclass(frozen=True)
class ListedRun:
    """A run in a folder.

    Attributes:
        folder: Its folder.
        state: `finished`, `interrupted at step N`, `failed`, or `no checkpoint`.
        task: Task of the recipe.
        method: Kind of the method.
        score: Accuracy and number of test samples, or the first line of the error of a failed run.
    """

    folder: Path
    state: str
    task: str
    method: str
    score: str


def list_runs(folder: Path) -> list[ListedRun]:
    """Returns all runs under a folder, sorted by path.

    Raises:
        SanError: If the folder does not exist.
    """
    if not folder.is_dir():
        from san_bench.config.strict import san_error

        raise san_error(f"{folder} is not a folder. `san train RECIPE` writes runs to the recipe's output.")
    failed = {run: error for path in folder.rglob("failures.jsonl") for run, error in _failures(path)}
    return [_listed(run, failed.get(run.resolve())) for run in sorted(_run_folders(folder))]


def _run_folders(folder: Path) -> Iterator[Path]:
    if (folder / RECIPE).is_file():
        yield folder
    for inside in folder.iterdir():
        if inside.is_dir() and not inside.is_symlink() and inside.name not in SKIPPED and inside.name[:1] != ".":
            yield from _run_folders(inside)


def _listed(folder: Path, error: str | None) -> ListedRun:
    task, method = _identity(folder / RECIPE)
    if (folder / RESULT).exists():
        try:
            result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
            score = f"{result['accuracy']:.2%} of {result['n_test']:,} on {result['split']}"
            return ListedRun(folder, "finished", task, method, score)
        except (OSError, ValueError, KeyError, TypeError) as problem:
            error = f"{RESULT} cannot be read: {problem}"
    if error is not None:
        return ListedRun(folder, "failed", task, method, error)
    steps = [step_of(mark.parent) for mark in folder.glob(f"checkpoints/checkpoint-*/{COMPLETE}")]
    state = f"interrupted at step {max(steps)}" if steps else "no checkpoint"
    return ListedRun(folder, state, task, method, "")


def _identity(path: Path) -> tuple[str, str]:
    try:
        data: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        return str(data["task"]), str(data["method"]["kind"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return "?", "?"


def _failures(path: Path) -> Iterator[tuple[Path, str]]:
    """Yields the folder and the error of each failed run of a suite."""
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield (path.parent / row["run"]).resolve(), row["error"].splitlines()[0]
