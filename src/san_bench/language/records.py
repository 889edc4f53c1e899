r"""Files of records: a JSON list, JSON lines, or parquet.

Example:
    >>> from pathlib import Path
    >>> _ = Path("rows.jsonl").write_text('{"a": 1}\n{"a": 2}\n', encoding="utf-8")
    >>> list(file_rows("rows.jsonl"))
    [('line 1', {'a': 1}), ('line 2', {'a': 2})]
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from san_peft.errors import SanError

SUFFIXES = (".json", ".jsonl", ".parquet")
"""Kinds of files, in the order in which they are looked for in a folder."""

Row = tuple[str, Any]
"""Where a record stands in its file, and what stands there; an `Exception` where it cannot be read."""


def file_rows(path: str | Path, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """Reads what a file holds, whatever its records are.

    Args:
        path: A JSON list or JSON lines, told apart by how they begin, or parquet by its name.
        columns: The columns of a parquet file that are wanted, where it has them; all by default.

    Returns:
        The records with their places. A line that is not JSON gives its error as the record, so that all bad ones can
        be told at once.

    Raises:
        SanError: If the file cannot be read, begins as a list and is none, or is a `.json` that holds one other value.
    """
    path = Path(path)
    if path.suffix == ".parquet":
        return _parquet_rows(path, columns)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SanError(f"{path} cannot be read: {error}.") from error
    if text.lstrip().startswith("["):
        return _list_rows(path, text)
    if path.suffix == ".json" and (kind := _kind_of_one(text)):
        raise SanError(f"{path} holds a {kind}, not a list of records. If it is a line of JSON lines, call it .jsonl.")
    return _line_rows(text)


def _kind_of_one(text: str) -> str | None:
    """What a text that is one JSON value holds; of JSON lines, none but the first is read."""
    try:
        return type(json.loads(text)).__name__
    except ValueError:
        return None


def _list_rows(path: Path, text: str) -> Iterator[Row]:
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise SanError(f"{path} begins as a JSON list, but is none: {error}.") from error
    return ((f"index {i}", row) for i, row in enumerate(rows))


def _line_rows(text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                row = error
            yield f"line {number}", row


def _parquet_rows(path: Path, columns: Sequence[str] | None) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise SanError(f"{path} is a parquet file, which needs pyarrow: `pip install datasets` brings it.") from error
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            table: Any = file.read(names if columns is None else [name for name in columns if name in names])
    except (OSError, pyarrow.ArrowException) as error:
        raise SanError(f"{path} is no parquet file that can be read: {error}.") from error
    return ((f"index {i}", row) for i, row in enumerate(table.to_pylist()))
