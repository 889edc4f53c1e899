r"""Reader for record files: JSON list, JSON lines, or parquet.

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
"""Supported suffixes, in order of precedence."""

Row = tuple[str, Any]
"""Location and content of a record; the content is an `Exception` if it cannot be parsed."""


def file_rows(path: str | Path, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """Reads the records of a file without validating them.

    Args:
        path: JSON list or JSON lines, told apart by the first character, or a `.parquet` file.
        columns: Columns to read from a parquet file, if they exist; all by default.

    Returns:
        Records with their locations. For a line that is not JSON, the record is the exception, so that all invalid
        lines can be reported at once.

    Raises:
        SanError: If the file cannot be read, is not a valid list, or is a `.json` file with a single other value.
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
        raise SanError(f"{path} contains a {kind}, not a list of records. Rename JSON lines to .jsonl.")
    return _line_rows(text)


def _kind_of_one(text: str) -> str | None:
    """Returns the type of a text that is a single JSON value, or `None`."""
    try:
        return type(json.loads(text)).__name__
    except ValueError:
        return None


def _list_rows(path: Path, text: str) -> Iterator[Row]:
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise SanError(f"{path} starts like a JSON list but is not valid JSON: {error}.") from error
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
        raise SanError(f"{path} is a parquet file, which needs pyarrow: `pip install datasets`.") from error
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            table: Any = file.read(names if columns is None else [name for name in columns if name in names])
    except (OSError, pyarrow.ArrowException) as error:
        raise SanError(f"{path} is not a readable parquet file: {error}.") from error
    return ((f"index {i}", row) for i, row in enumerate(table.to_pylist()))
