"""Readers for tables of images: datasets of the `datasets` library, Parquet and Arrow files, and lists of image paths.

A list is a CSV, TSV, JSON lines or Parquet file with a column of paths and a column of labels, and perhaps a column
that names the split of each row.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from san_bench.datacheck.found import Found
from san_bench.datacheck.names import NAMES, by_split
from san_bench.image.splits import FileSplit, Split, TableSplit
from san_peft.errors import SanError

if TYPE_CHECKING:
    import datasets

LABELS = ("label", "labels", "fine_label", "class", "cls", "target", "class_name", "category")
"""Names of label columns, in order of precedence."""

PATHS = ("file_name", "filename", "file", "path", "file_path", "filepath", "image_path", "image", "img")
"""Names of columns of image paths, in order of precedence."""

SPLITS = ("split", "set", "subset", "partition")
"""Names of columns that name the split of a row."""

TABLES = ("parquet", "arrow")
"""Extensions of files that hold images."""

LISTS = (*TABLES, "csv", "tsv", "jsonl")
"""Extensions of files that hold images, or their paths; the first kind that a folder has is read."""


def read_tables(found: Found, place: Path, kinds: tuple[str, ...] = TABLES) -> bool:
    """Reads a dataset saved by `datasets` (`save_to_disk`), or files named after their splits.

    Args:
        found: Report that receives the splits, named as in `NAMES` or `all`, the classes and the files.
        place: Dataset folder, or one file.
        kinds: Extensions of the files to look for.

    Returns:
        Whether there was anything of the kind.

    Raises:
        SanError: If a table cannot be read, or has no image or label column.
    """
    alone = place.is_file()
    saved = [] if alone else [p.parent for p in sorted([*place.glob("state.json"), *place.glob("*/state.json")])]
    files = [place] if alone else [p for s in kinds for p in sorted(place.rglob(f"*.{s}")) if not _hidden(p, place)]
    if not saved and not files:
        return False
    import datasets
    from datasets.exceptions import DatasetsError

    kind = "" if saved else files[0].suffix[1:].lower()
    if not saved and kind not in kinds:
        raise SanError(f"{place} is not a table of images. Expected one of {', '.join(f'.{k}' for k in kinds)}.")
    files = [path for path in files if path.suffix[1:].lower() == kind]
    parts = {} if saved else by_split(files)
    if len(parts) > 1 and kind not in TABLES:  # lists of other things may lie beside those of the splits
        parts = {split: paths for split, paths in parts.items() if split in NAMES.values()} or parts
    if len(parts) == 1 and not set(parts) & set(NAMES.values()):
        parts = {"all": files}
    try:
        if saved:
            tables: dict[str, Any] = {
                "all" if path == place else NAMES.get(path.name.lower(), path.name): datasets.load_from_disk(str(path))
                for path in saved
            }
        else:
            tables = {split: _load(kind, paths) for split, paths in parts.items()}
    except (DatasetsError, OSError, ValueError, TypeError, csv.Error) as error:
        raise SanError(f"The tables in {place} cannot be read: {error.__cause__ or error}") from error
    found.files += [path for paths in parts.values() for path in paths]
    found.layout = "tables" if saved or kind in TABLES else f"{kind.upper()} list"
    found.folder = place.parent if alone else place
    found.splits, found.names = table_splits(tables, found.folder, {split: p[0].parent for split, p in parts.items()})
    found.classes = len(found.names)
    return True


def table_splits(
    tables: Mapping[str, datasets.Dataset], root: Path | None = None, bases: Mapping[str, Path] | None = None
) -> tuple[dict[str, Split], tuple[str, ...]]:
    """Converts tables to splits, after finding the image and label columns.

    The image column is the only one of type `Image`, or of bytes; without one, the first existing one in `PATHS`. The
    label column is the only `ClassLabel`, or the first existing one in `LABELS`. Labels without class names are
    numbered in sorted order. Unlabelled splits, in which all labels are -1, are skipped. A single table is divided by
    its column of split names, if it has one.

    Args:
        tables: Tables by name, with the same columns.
        root: Folder that paths must not leave.
        bases: Folder that the paths of each table are relative to.

    Returns:
        The splits and the names of the classes.

    Raises:
        SanError: If the columns are missing or ambiguous, or paths leave the folder.
    """
    import datasets

    tables = _divided(tables)
    features = next(iter(tables.values())).features
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    raw = [name for name, kind in features.items() if _holds_bytes(kind)]
    paths = next((name for name in PATHS if _holds_text(features.get(name))), None)
    if len(images or raw) != 1 and (images or raw or paths is None or bases is None):
        raise SanError(
            f"Expected one image column, but found {len(images or raw)} among {', '.join(features)}. "
            "Keep one with `select_columns` and save the dataset again"
            + ("." if bases is None else f", or name a column of paths {PATHS[0]!r}.")
        )
    named = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    label = named[0] if len(named) == 1 else next((name for name in LABELS if name in features), None)
    if label is None:
        raise SanError(f"Found no unique label column among {', '.join(features)}. Rename it to 'label'.")
    values = {name: list(table.select_columns([label])[:][label]) for name, table in tables.items()}
    values = {name: column for name, column in values.items() if any(value != -1 for value in column)}
    empty = sum(value is None or value == "" for column in values.values() for value in column)
    if empty:
        raise SanError(f"The column {label!r} has {empty:,} rows without a label. Remove them from the dataset.")
    kind = features[label]
    if isinstance(kind, datasets.ClassLabel):
        names = tuple(kind.names)
        numbers = {name: np.asarray(column, np.int64) for name, column in values.items()}
    else:
        order = sorted(set().union(*values.values()))
        names, index = tuple(map(str, order)), {value: i for i, value in enumerate(order)}
        numbers = {name: np.asarray([index[v] for v in column], np.int64) for name, column in values.items()}
    if not (images or raw):
        root = root or Path()
        files = {name: _inside(root, (bases or {}).get(name, root), tables[name][:][paths]) for name in numbers}
        return {name: FileSplit(root, files[name], numbers[name]) for name in numbers}, names
    image = (images or raw)[0]
    ready = {n: tables[n] if images else tables[n].cast_column(image, datasets.Image()) for n in numbers}
    return {name: TableSplit(ready[name], image, numbers[name]) for name in numbers}, names


def _load(kind: str, paths: list[Path]) -> datasets.Dataset:
    import datasets

    if kind in TABLES:
        table: Any = datasets.load_dataset(kind, data_files=[str(path) for path in paths], split="train")
        return table
    return datasets.concatenate_datasets([_read_list(kind, path) for path in paths])


def _read_list(kind: str, path: Path) -> datasets.Dataset:
    """Reads a CSV, TSV or JSON lines file; all values of CSV and TSV are strings, so that labels keep their zeros."""
    import datasets

    with path.open(encoding="utf-8-sig", newline="") as file:
        if kind == "jsonl":
            return datasets.Dataset.from_list([json.loads(line) for line in file if line.strip()])
        header = file.readline()
        file.seek(0)
        delimiter = "\t" if kind == "tsv" else max(",;\t", key=header.count)
        rows = list(csv.DictReader(file, delimiter=delimiter))
    names = [name for name in rows[0] if name] if rows else []
    if not names:
        raise ValueError(f"{path.name} has no rows below its header")
    columns = {name: [None if row[name] is None else row[name].strip() for row in rows] for name in names}
    return datasets.Dataset.from_dict({name.strip(): column for name, column in columns.items()})


def _divided(tables: Mapping[str, datasets.Dataset]) -> Mapping[str, datasets.Dataset]:
    """Divides a single table by its column of split names."""
    table = next(iter(tables.values()))
    column = next((name for name in SPLITS if _holds_text(table.features.get(name))), None)
    if len(tables) > 1 or column is None:
        return tables
    rows: dict[str, list[int]] = {}
    for number, value in enumerate(table.select_columns([column])[:][column]):
        rows.setdefault(NAMES.get(str(value).lower(), str(value)), []).append(number)
    strange = sorted(set(rows) - set(NAMES.values()))
    if strange:
        raise SanError(f"The column {column!r} names the splits {', '.join(strange[:5])}. Expected train, val or test.")
    return {split: table.select(numbers) for split, numbers in rows.items()}


def _inside(root: Path, base: Path, names: list[str | None]) -> list[str]:
    """Returns paths relative to a folder.

    Raises:
        SanError: If some of them are missing or lead out of it.
    """
    files, outside, top = [], [], root.absolute()
    for name in names:
        path = os.path.normpath(base.absolute() / (name or "").replace("\\", "/"))
        if name and Path(path).is_relative_to(top):
            files.append(Path(path).relative_to(top).as_posix())
        else:
            outside.append(str(name))
    if outside:
        raise SanError(
            f"{len(outside):,} of {len(names):,} image paths are empty or lead out of {root}, such as "
            f"{outside[0]!r}. Put the list into a folder that contains the images."
        )
    return files


def _holds_bytes(kind: Any) -> bool:
    import datasets

    return kind == datasets.Value("binary") or (isinstance(kind, dict) and set(kind) == {"bytes", "path"})


def _holds_text(kind: Any) -> bool:
    return getattr(kind, "dtype", None) in ("string", "large_string") and not hasattr(kind, "names")


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)
