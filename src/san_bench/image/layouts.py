"""Readers for image datasets on disk (list files, class folders, tables), and stratified splitting."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int64

from san_bench.datacheck.found import Found
from san_bench.datacheck.names import NAMES, by_split
from san_bench.image.splits import ArraySplit, FileSplit, JoinedSplit, Split, TableSplit, stratified
from san_peft.errors import SanError

if TYPE_CHECKING:
    import datasets

CUT_SEED = 2024
"""Seed for splits that a dataset lacks. Another seed gives another task."""

LABELS = ("label", "labels", "fine_label", "class", "cls", "target")
"""Names of label columns, in order of precedence."""


def read_list(found: Found, split: str, path: Path) -> None:
    """Reads the list file of a split: on each line an image path relative to the list, a space, and the label.

    Invalid lines and a missing list are added as problems.
    """
    if not path.is_file():
        found.add(f"the list {path.name} is missing")
        return
    found.files.append(path)
    files, labels, wrong = [], [], []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        name, _, label = line.strip().rpartition(" ")
        if name and re.fullmatch(r"-?\d+", label):
            files.append(name)
            labels.append(int(label))
        elif line.strip():
            wrong.append(f"line {number}, {line.strip()[:60]!r}")
    if wrong:
        found.add(f"{path.name}: {len(wrong):,} lines are not a path, a space and a number", wrong)
    found.splits[split] = FileSplit(path.parent, files, np.asarray(labels, np.int64))


def read_folders(found: Found, folder: Path) -> bool:
    """Reads split folders with one folder of images per class, or class folders without splits.

    Classes are the sorted folder names, in numerical order if all are numbers.

    Args:
        found: Report that receives the splits, named as in `NAMES` or `all`, and the number of classes.
        folder: Dataset folder.

    Returns:
        Whether there was anything of the kind.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    parts = {NAMES[path.name.lower()]: path for path in _folders(folder) if path.name.lower() in NAMES}
    parts = parts or {"all": folder}
    inside = {name: [p.name for p in _folders(path)] for name, path in parts.items()}
    if not any(inside.values()):
        return False
    classes = sorted(set().union(*inside.values()))
    if all(name.isdecimal() for name in classes):
        classes.sort(key=int)
    index = {name: i for i, name in enumerate(classes)}
    for name, path in parts.items():
        if not inside[name]:
            found.add(f"{path.name} has no class folders")
            continue
        samples = make_dataset(str(path), {c: index[c] for c in inside[name]}, IMG_EXTENSIONS, allow_empty=True)
        files = [Path(file).relative_to(folder).as_posix() for file, _ in samples]
        found.splits[name] = FileSplit(folder, files, np.asarray([label for _, label in samples], np.int64))
        new = set(inside[name]) - set(inside.get("train", inside.get("trainval", classes)))
        if new and name in ("val", "test"):
            found.add(f"{path.name} has classes that are not in the training split", sorted(new))
    if not any(len(split) for split in found.splits.values()):
        found.splits.clear()
        return False
    found.layout, found.classes = "class folders", len(classes)
    return True


def read_tables(found: Found, folder: Path) -> bool:
    """Reads a dataset saved by `datasets` (`save_to_disk`), or parquet or Arrow files named after their splits.

    Args:
        found: Report that receives the splits, named as in `NAMES`, the number of classes and the files.
        folder: Dataset folder.

    Returns:
        Whether there was anything of the kind.

    Raises:
        SanError: If a table cannot be read, or has no image or label column.
    """
    saved = [path.parent for path in sorted([*folder.glob("state.json"), *folder.glob("*/state.json")])]
    files = [path for s in ("parquet", "arrow") for path in sorted(folder.rglob(f"*.{s}")) if not _hidden(path, folder)]
    if not saved and not files:
        return False
    import datasets
    from datasets.exceptions import DatasetsError

    kind = "" if saved else files[0].suffix[1:]
    parts = {} if saved else by_split([path for path in files if path.suffix[1:] == kind])
    try:
        if saved:
            tables: dict[str, Any] = {
                "all" if path == folder else NAMES.get(path.name.lower(), path.name): datasets.load_from_disk(str(path))
                for path in saved
            }
        else:
            tables = {
                split: datasets.load_dataset(kind, data_files=[str(path) for path in paths], split="train")
                for split, paths in parts.items()
            }
    except (DatasetsError, OSError, ValueError) as error:
        raise SanError(f"The tables in {folder} cannot be read: {error.__cause__ or error}") from error
    found.files += files
    found.layout = "tables"
    found.splits, found.classes = table_splits(tables)
    return True


def table_splits(tables: dict[str, datasets.Dataset]) -> tuple[dict[str, Split], int]:
    """Converts tables to splits, after finding the image and label columns.

    The image column is the only one of type `Image`, or of bytes. The label column is the only `ClassLabel`, or the
    first existing one in `LABELS`. Labels without class names are numbered in sorted order. Unlabelled splits, in which
    all labels are -1, are skipped.

    Args:
        tables: Tables by name, with the same columns.

    Returns:
        The splits and the number of classes.

    Raises:
        SanError: If the columns are missing or ambiguous.
    """
    import datasets

    features = next(iter(tables.values())).features
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    raw = [name for name, kind in features.items() if _holds_bytes(kind)]
    if len(images or raw) != 1:
        raise SanError(
            f"Expected one image column, but found {len(images or raw)} among {', '.join(features)}. "
            "Keep one with `select_columns` and save the dataset again."
        )
    image = (images or raw)[0]
    named = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    label = named[0] if len(named) == 1 else next((name for name in LABELS if name in features), None)
    if label is None:
        raise SanError(f"Found no unique label column among {', '.join(features)}. Rename it to 'label'.")
    values = {name: list(table.select_columns([label])[:][label]) for name, table in tables.items()}
    values = {name: column for name, column in values.items() if any(value != -1 for value in column)}
    empty = sum(value is None for column in values.values() for value in column)
    if empty:
        raise SanError(f"The column {label!r} has {empty:,} rows without a label. Remove them from the dataset.")
    kind = features[label]
    if isinstance(kind, datasets.ClassLabel):
        classes = len(kind.names)
        numbers = {name: np.asarray(column, np.int64) for name, column in values.items()}
    else:
        order = sorted(set().union(*values.values()))
        classes, index = len(order), {value: i for i, value in enumerate(order)}
        numbers = {name: np.asarray([index[v] for v in column], np.int64) for name, column in values.items()}
    ready = {n: tables[n] if images else tables[n].cast_column(image, datasets.Image()) for n in numbers}
    return {name: TableSplit(ready[name], image, numbers[name]) for name in numbers}, classes


def standard(found: Found, val: int | None = None) -> None:
    """Completes the splits to `train`, `val`, `trainval` and `test`.

    With training and validation but no test split, as in ImageNet, the validation split becomes `test`, since papers
    report it. With neither, a fifth of the images becomes `test`. A missing `val` is split from training. Both splits
    are stratified and deterministic.

    Args:
        found: Report with splits named as in `NAMES`, or `all`.
        val: Size of `val` if it is split from training; a tenth by default.
    """
    have = found.splits
    full = have.get("trainval") or have.get("all")
    train, kept, test = have.get("train"), have.get("val"), have.get("test")
    if test is None and train is not None and kept is not None:
        test, kept = kept, None
    if full is None:
        if train is None:
            found.add(f"there is no training split, only {', '.join(have) or 'nothing'}")
            return
        full = train if kept is None else JoinedSplit(train, kept)
    if test is None:
        test, full = cut(full, max(1, len(full) // 5))
        train = kept = None
        found.layout += ", test cut from all"
    if train is None or kept is None:
        kept, train = cut(full, min(val or max(1, len(full) // 10), len(full) - 1))
        found.layout += ", val cut from training"
    found.splits = {"train": train, "val": kept, "trainval": full, "test": test}


def cut(split: Split, count: int) -> tuple[Split, Split]:
    """Draws a stratified sample of `count` images; returns sample and rest, both in the original order."""
    chosen, rest = stratified(np.arange(len(split)), split.labels, count, CUT_SEED)
    return take(split, chosen), take(split, rest)


def take(split: Split, indices: Int64[np.ndarray, " k"]) -> Split:
    """Returns the subset of a split at `indices`."""
    labels = split.labels[indices]
    if isinstance(split, FileSplit):
        return FileSplit(split.root, [split.files[i] for i in indices], labels)
    if isinstance(split, ArraySplit):
        return ArraySplit(split.images[indices], labels)
    if isinstance(split, TableSplit):
        return TableSplit(split.table.select(indices), split.column, labels)
    raise TypeError(f"Cannot take a subset of a {type(split).__name__}.")


def first_folder(candidates: Sequence[Path], file: str) -> Path:
    """Returns the first folder that contains a file, or else the first folder."""
    return next((folder for folder in candidates if (folder / file).is_file()), candidates[0])


def _holds_bytes(kind: Any) -> bool:
    import datasets

    return kind == datasets.Value("binary") or (isinstance(kind, dict) and set(kind) == {"bytes", "path"})


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _folders(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
