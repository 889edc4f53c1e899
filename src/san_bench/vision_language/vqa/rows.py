"""Rows of the benchmarks' files, read with errors that name the file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from san_bench.config.strict import san_error

LONGEST_CELL = 2**31 - 1
"""Characters of a cell of a table; images are cells."""


def read_table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Reads a table of cells between tabs; returns the names of its columns and its rows.

    Raises:
        SanError: If there is no such file, or no row in it.
    """
    csv.field_size_limit(LONGEST_CELL)  # images are cells
    with io.StringIO(read_text(path), newline="") as file:
        reader = csv.DictReader(file, delimiter="\t")
        rows = list(reader)
    if not rows:
        raise san_error(f"{path} holds no row.")
    return list(reader.fieldnames or ()), rows


def require_keys(path: str | Path, rows: Sequence[Any], names: Sequence[str]) -> None:
    """Insists that there are rows, and that every one has certain keys.

    Raises:
        SanError: If not; the message counts the rows that lack one.
    """
    if not rows:
        raise san_error(f"{path} holds nothing.")
    for name in names:
        lacking = [n for n, row in enumerate(rows) if not isinstance(row, dict) or name not in row]
        if lacking:
            raise san_error(
                f"{path}: {len(lacking):,} of {len(rows):,} rows have no {name}, the first is row {lacking[0]}."
            )


def read_text(path: Path) -> str:
    """Reads a file as it is, with its ends of lines.

    Raises:
        SanError: If there is no such file.
    """
    if not path.is_file():
        raise san_error(f"There is no file {path}.")
    with path.open(encoding="utf-8", newline="") as file:
        return file.read()


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        SanError: If there is no such file, or it is not JSON.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise san_error(f"{path} is not JSON: {error}.") from error


def read_json_list(path: Path) -> list[Any]:
    """Reads a JSON file that holds a list.

    Raises:
        SanError: If there is no such file, or it holds no list.
    """
    content = read_json(path)
    if not isinstance(content, list):
        raise san_error(f"{path} holds a {type(content).__name__}, not a list.")
    return content


def read_part(path: Path, name: str) -> list[Any]:
    """Reads a list that a JSON file holds under a name.

    Raises:
        SanError: If there is no such file, or it holds no such list.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get(name), list):
        raise san_error(f"{path} has no list {name!r}.")
    return content[name]


def read_lines(path: Path) -> list[Any]:
    """Reads JSON lines.

    Raises:
        SanError: If there is no such file, or a line of it is not JSON.
    """
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise san_error(f"{path}, line {number}: not JSON: {error}.") from error
    return rows
