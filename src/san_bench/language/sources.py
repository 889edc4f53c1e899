"""Sources of records: a file, a folder of files, a dataset saved by `datasets`, or a dataset on the hub.

Rows are read one after the other and not validated; see `san_bench.language.records.Row`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from san_bench.datacheck.hub import hub_tables
from san_bench.datacheck.names import NAMES, by_split
from san_bench.language.records import SUFFIXES, Row, file_rows
from san_peft.errors import SanError


def source_rows(
    source: str | Path,
    split: str | None = None,
    columns: Sequence[str] | None = None,
    config: str | None = None,
    streaming: bool = False,
) -> Iterator[Row]:
    """Reads the rows of a source, with their locations in it.

    Args:
        source: A file (JSON list, JSON lines, parquet or CSV); a folder of such files named after their splits, or
            saved by `datasets` with `save_to_disk`; or the name of a dataset on the Hugging Face hub.
        split: `train`, `val` or `test`, under any common name; `None` if there is only one. Ignored for a file.
        columns: Columns to read, where they exist; all by default.
        config: Configuration of a dataset on the hub.
        streaming: Does not download a dataset of the hub as a whole.

    Raises:
        SanError: If the source or split does not exist.
    """
    path, kind = Path(source), _kind(source)
    if kind == "file":
        return file_rows(path, columns)
    if kind == "folder":
        return _folder_rows(path, split, columns)
    if path.suffix in SUFFIXES or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)):
        raise SanError(
            f"There is no file or folder {source}, and it is not a valid dataset name on the Hugging Face hub."
        )
    return _named(
        _table_rows(choose_split(hub_tables(str(source), config, streaming), split, str(source)), columns), split
    )


def splits_of(source: str | Path, config: str | None = None) -> tuple[str, ...]:
    """Returns the standard names of the splits of a source, see `source_rows`; a file has none.

    Raises:
        SanError: If the source does not exist.
    """
    path, kind = Path(source), _kind(source)
    if kind == "folder" and (path / "dataset_dict.json").is_file():
        try:
            names = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SanError(f"{path / 'dataset_dict.json'} does not list splits: {error!r}.") from error
    elif kind == "file" or (path / "state.json").is_file():
        names = []
    elif kind == "folder":
        names = by_split(_files(path))
    else:
        names = hub_tables(str(source), config)
    return tuple(NAMES.get(str(name).lower(), str(name)) for name in names)


def choose_split(parts: dict[str, Any], split: str | None, source: str) -> Any:
    """Returns a split by any common name, or the only one.

    Raises:
        SanError: If there is no such split, or no name was given and there are several.
    """
    named = {NAMES.get(name.lower(), name): part for name, part in parts.items()}
    if split is None and len(named) == 1:
        return next(iter(named.values()))
    wanted = None if split is None else NAMES.get(split.lower(), split)
    if wanted not in named:
        what = "several splits; choose one of them" if split is None else f"no split {split!r}; it has"
        raise SanError(f"{source} has {what}: {', '.join(named)}.")
    return named[wanted]


def _kind(source: str | Path) -> str | None:
    """Returns whether a source is a `file` or a `folder`; `None` if it does not exist."""
    try:
        return "file" if Path(source).is_file() else "folder" if Path(source).is_dir() else None
    except OSError as error:  # such as a name that is too long
        raise SanError(f"{source} cannot be read: {error.strerror}.") from error


def _folder_rows(folder: Path, split: str | None, columns: Sequence[str] | None) -> Iterator[Row]:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _saved_rows(folder, split, columns)
    chosen = choose_split(by_split(_files(folder)), split, str(folder))
    return (row for path in chosen for row in _named(file_rows(path, columns), str(path.relative_to(folder))))


def _files(folder: Path) -> list[Path]:
    """Returns the record files with the first suffix that occurs."""
    for suffix in SUFFIXES:
        files = sorted(path for path in folder.rglob(f"*{suffix}") if not path.name.startswith("."))
        if files:
            return files
    raise SanError(
        f"{folder} contains no records: no {', '.join(SUFFIXES)} file, and no dataset saved with save_to_disk."
    )


def _named(rows: Iterable[Row], part: str | None) -> Iterator[Row]:
    """Prefixes the locations of rows with the name of a file or split, if there is one."""
    return ((f"{part}, {place}" if part else place, row) for place, row in rows)


def _saved_rows(folder: Path, split: str | None, columns: Sequence[str] | None) -> Iterator[Row]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SanError(f"{folder} contains no readable dataset: {error!r}.") from error
    if not isinstance(saved, datasets.DatasetDict):
        return _table_rows(saved, columns)
    parts = {str(name): table for name, table in saved.items()}
    return _named(_table_rows(choose_split(parts, split, str(folder)), columns), split)


def _table_rows(table: Any, columns: Sequence[str] | None) -> Iterator[Row]:
    """Returns the rows of a table of the `datasets` library."""
    if columns is not None:
        table = table.select_columns([name for name in columns if name in table.column_names])
    return ((f"index {i}", row) for i, row in enumerate(table))
