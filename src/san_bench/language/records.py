r"""Reader for record files: JSON list, JSON lines, parquet, or CSV.

Example:
    >>> from pathlib import Path
    >>> _ = Path("rows.jsonl").write_text('{"a": 1}\n{"a": 2}\n', encoding="utf-8")
    >>> list(file_rows("rows.jsonl"))
    [('line 1', {'a': 1}), ('line 2', {'a': 2})]
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from san_peft.errors import SanError

NESTED = (".json", ".jsonl", ".parquet")
"""Suffixes of files whose records can contain lists."""

SUFFIXES = (*NESTED, ".csv")
"""Supported suffixes, in order of precedence."""

Row = tuple[str, Any]
"""Location and content of a record; the content is an `Exception` if it cannot be parsed."""


def file_rows(path: str | Path, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """Reads the records of a file without validating them. All but JSON lists are read in parts, not as a whole.

    Args:
        path: JSON list or JSON lines, told apart by the first character; a `.parquet` file; or a `.csv` file with a
            header, whose cells are all strings.
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
    if path.suffix == ".csv":
        return _csv_rows(path)
    try:
        with path.open(encoding="utf-8-sig") as file:
            first = next((line.strip()[0] for line in file if line.strip()), "")
        text = path.read_text(encoding="utf-8-sig") if first == "[" or path.suffix == ".json" else ""
    except (OSError, UnicodeDecodeError) as error:
        raise SanError(f"{path} cannot be read: {error}.") from error
    if first == "[":
        return _list_rows(path, text)
    if path.suffix == ".json" and (kind := _kind_of_one(text)):
        raise SanError(f"{path} contains a {kind}, not a list of records. Rename JSON lines to .jsonl.")
    return _line_rows(path)


def _kind_of_one(text: str) -> str | None:
    """Returns the type of a text that is a single JSON value, or `None`."""
    try:
        return type(json.loads(text)).__name__
    except (ValueError, RecursionError):
        return None


def _list_rows(path: Path, text: str) -> Iterator[Row]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SanError(f"{path} starts like a JSON list but is not valid JSON: {error}.") from error
    return ((f"index {i}", row) for i, row in enumerate(rows))


def _line_rows(path: Path) -> Iterator[Row]:
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        row = json.loads(line)
                    except (ValueError, RecursionError) as error:
                        row = error
                    yield f"line {number}", row
    except (OSError, UnicodeDecodeError) as error:
        raise SanError(f"{path} cannot be read: {error}.") from error


def _csv_rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # the default of 128 KiB is less than a long text
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.DictReader(file, restkey="", strict=True), 1):
                if "" in row:
                    yield f"row {number}", ValueError(f"{len(row[''])} cells more than columns")
                else:
                    yield f"row {number}", row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SanError(f"{path} cannot be read after row {number}: {error}.") from error


def _parquet_rows(path: Path, columns: Sequence[str] | None) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise SanError(f"{path} is a parquet file, which needs pyarrow: `pip install datasets`.") from error
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = names if columns is None else [name for name in columns if name in names]
            number = 0
            for batch in file.iter_batches(columns=wanted):
                for row in batch.to_pylist():
                    yield f"index {number}", row
                    number += 1
    except (OSError, pyarrow.ArrowException) as error:
        raise SanError(f"{path} is not a readable parquet file: {error}.") from error
