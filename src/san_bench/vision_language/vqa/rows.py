"""Readers for rows of benchmark files, with errors that name the file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from san_bench.config.strict import san_error

LONGEST_CELL = 2**31 - 1
"""Maximum number of characters in a table cell, since cells contain images."""


def read_table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Reads a TSV table; returns column names and rows.

    Raises:
        SanError: If the file does not exist or has no rows.
    """
    csv.field_size_limit(LONGEST_CELL)
    with io.StringIO(read_text(path), newline="") as file:
        reader = csv.DictReader(file, delimiter="\t")
        rows = list(reader)
    if not rows:
        raise san_error(f"{path} contains no rows.")
    return list(reader.fieldnames or ()), rows


def require_keys(path: str | Path, rows: Sequence[Any], names: Sequence[str]) -> None:
    """Raises if there are no rows, or rows without required keys.

    Raises:
        SanError: If so; the message counts the rows without a key.
    """
    if not rows:
        raise san_error(f"{path} is empty.")
    for name in names:
        lacking = [n for n, row in enumerate(rows) if not isinstance(row, dict) or name not in row]
        if lacking:
            raise san_error(
                f"{path}: {len(lacking):,} of {len(rows):,} rows have no {name}, the first is row {lacking[0]}."
            )


def read_text(path: Path) -> str:
    """Reads a text file without newline conversion.

    Raises:
        SanError: If the file does not exist.
    """
    if not path.is_file():
        raise san_error(f"There is no file {path}.")
    with path.open(encoding="utf-8", newline="") as file:
        return file.read()


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        SanError: If the file does not exist or is not JSON.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise san_error(f"{path} is not JSON: {error}.") from error


def read_json_list(path: Path) -> list[Any]:
    """Reads a JSON list.

    Raises:
        SanError: If the file does not exist or is not a JSON list.
    """
    content = read_json(path)
    if not isinstance(content, list):
        raise san_error(f"{path} contains a {type(content).__name__}, not a list.")
    return content


def read_part(path: Path, name: str) -> list[Any]:
    """Reads a list under a key of a JSON file.

    Raises:
        SanError: If the file does not exist or has no such list.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get(name), list):
        raise san_error(f"{path} has no list {name!r}.")
    return content[name]


def read_lines(path: Path) -> list[Any]:
    """Reads JSON lines.

    Raises:
        SanError: If the file does not exist, or a line is not JSON.
    """
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise san_error(f"{path}, line {number}: not JSON: {error}.") from error
    return rows
