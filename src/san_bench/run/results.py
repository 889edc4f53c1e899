"""Read and validate result rows, and the table type that reports are built from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from san_bench.config.strict import san_error

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One field of a table.

    Attributes:
        text: Displayed text.
        value: Sort key; `None` for text and missing numbers.
        hint: Additional information, such as seeds or sources.
        published: Whether it was copied from a publication instead of measured here.
    """

    text: str
    value: float | None = None
    hint: str = ""
    published: bool = False


@dataclass(frozen=True)
class ResultTable:
    """A table, independent of the output format.

    Attributes:
        title: Title; may be empty.
        columns: Names of the columns.
        rows: Rows with a cell for each column.
        notes: Notes on how to read the table, and on the provenance of its numbers.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...]


MOST = 2**53
"""Largest whole number of a row, and of JSON that other programs read exactly."""


class _Result(BaseModel):
    """Schema of a result row; extra keys are allowed."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    task: str
    backbone: str
    method: str
    seed: int = Field(ge=-MOST, le=MOST)
    split: str
    accuracy: float = Field(ge=0, le=1)
    correct: int | None = Field(default=None, ge=0, le=MOST)
    n_test: int = Field(ge=1, le=MOST)
    trainable_parameters: int = Field(ge=0, le=MOST)
    trainable_head: int = Field(ge=0, le=MOST)
    recipe_fingerprint: str
    task_fingerprint: str
    finished: str
    python: str
    versions: dict[str, str | None]
    commit: str | None
    cpu: str
    threads: int
    device: str
    way: str | None = None
    suite: str | None = None
    group: str | None = None
    model: str | None = None
    kind: str | None = None
    protocol: str | None = None
    selection: str | None = None
    train_split: str | None = None
    checkpoint_sha256: str | None = None
    train_seconds: float | None = None
    saved_activation_mib: float | None = None
    peak_rss_mib: float | None = None
    energy_joules: float | None = None
    modes: dict[str, float] | None = None

    @model_validator(mode="after")
    def _counts_fit(self) -> _Result:
        if self.correct is not None and self.correct > self.n_test:
            raise ValueError(f"correct is {self.correct:,}, more than n_test, {self.n_test:,}")
        return self


def read_rows(folders: Sequence[Path]) -> list[Row]:
    """Reads the rows of suites and runs.

    Duplicates (the same fingerprints of recipe and data) are dropped; the row that finished last is kept.

    Args:
        folders: Folders of suites (with `rows.jsonl`), folders of runs (`result.json`), or `.jsonl` files.

    Returns:
        The rows, in the order of the folders and files.

    Raises:
        SanError: If a folder holds no results, or rows are invalid; all problems are listed.
    """
    problems = [] if folders else ["No folder was given; pass one such as runs/mini-vision."]
    found: dict[tuple[Any, ...], Row] = {}
    for folder in folders:
        for row in _read(folder, problems):
            key = tuple(row.get(name) for name in ("suite", "task", "backbone", "method", "split", "way"))
            key += (row["recipe_fingerprint"], row["task_fingerprint"])
            if key not in found or row["finished"] >= found[key]["finished"]:
                found[key] = row
    if problems:
        raise san_error("\n".join(["Invalid results; repair or remove them:", *problems]))
    return list(found.values())


def by_task(result: Row) -> list[Row]:
    """Splits a result into rows: one per task and scoring method, if it holds several.

    Example:
        >>> tasks = {"a": {"accuracy": 0.5}, "b": {"accuracy": 1.0}}
        >>> by_task({"task": "mix", "accuracy": 0.75, "seed": 0, "way": "generation", "tasks": tasks, "ways": {}})[1]
        {'task': 'b', 'accuracy': 1.0, 'seed': 0, 'way': 'generation'}
    """
    if not isinstance(result, dict) or "tasks" not in result:
        return [result]
    rest = {key: value for key, value in result.items() if key not in ("tasks", "ways")}
    found = {result["way"]: result["tasks"], **result["ways"]}
    return [
        {**rest, "task": task, **numbers, "way": way} for way, tasks in found.items() for task, numbers in tasks.items()
    ]


def trainings(rows: Sequence[Row]) -> list[Row]:
    """Returns the first row of each training run; a run has several rows if it was scored on several tasks."""
    keys = ("suite", "backbone", "method", "recipe_fingerprint")
    return list({tuple(row.get(key) for key in keys): row for row in reversed(rows)}.values())[::-1]


def _read(folder: Path, problems: list[str]) -> Iterator[Row]:
    """Yields the valid rows of one folder or file, and appends errors of the others to `problems`."""
    files = [folder] if folder.suffix == ".jsonl" else [folder / "rows.jsonl", folder / "result.json"]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        wanted = "does not exist" if folder.suffix == ".jsonl" else "has neither rows.jsonl nor result.json"
        problems.append(f"{folder}: {wanted}. `san bench SUITE --out FOLDER` writes results.")
        return
    text = file.read_text(encoding="utf-8", errors="replace")
    whole = file.suffix == ".json"
    lines = [text] if whole else text.splitlines()
    if not any(line.strip() for line in lines):
        problems.append(f"{file}: empty; no run has finished.")
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                for row in by_task(json.loads(line)):
                    _Result.model_validate(row)
                    yield row
            except (json.JSONDecodeError, RecursionError) as error:
                where = file if whole else f"{file}:{number}"
                problems.append(f"{where}: invalid JSON: {getattr(error, 'msg', error)} ({len(line)} characters).")
            except ValidationError as error:
                said = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'row'}: {e['msg']}" for e in error.errors())
                problems.append(f"{file}{'' if whole else f':{number}'}: {said}.")
