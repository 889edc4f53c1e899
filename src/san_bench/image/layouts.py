"""Readers for list files and class folders, and stratified splitting."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from san_bench.datacheck.found import Found, counted
from san_bench.datacheck.names import NAMES
from san_bench.image.listing import Tree
from san_bench.image.recipe import Holdout
from san_bench.image.splits import ArraySplit, FileSplit, JoinedSplit, Split, TableSplit, stratified

HOLDOUT = Holdout()
"""Splits of data that lacks them, by default. Another seed gives another task."""


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

    Classes are the sorted names of the folders with images, in numerical order if all are numbers.

    Args:
        found: Report that receives the splits, named as in `NAMES` or `all`, the classes, and what was left out.
        folder: Dataset folder.

    Returns:
        Whether there was anything of the kind.
    """
    tree = Tree(folder)
    parts: dict[str, Path] = {}
    for path in tree.folders(folder):
        split = NAMES.get(path.name.lower())
        if split in parts:
            found.add(f"{parts[split].name} and {path.name} are both a {split} split. Keep one of them there")
        elif split:
            parts[split] = path
    if parts:
        beside = [path.name for path in tree.folders(folder) if path.name.lower() not in NAMES]
        if beside:
            splits = ", ".join(path.name for path in parts.values())
            found.add(f"{counted(len(beside), 'folder')} left out beside {splits}", beside, "warning")
    parts = parts or {"all": folder}
    inside = {name: {p.name: tree.images(p) for p in tree.folders(path)} for name, path in parts.items()}
    classes = sorted({name for part in inside.values() for name, files in part.items() if files})
    if not classes:
        return False
    empty = sorted({name for part in inside.values() for name in part} - set(classes))
    if empty:
        found.add(f"{counted(len(empty), 'folder')} without images left out of the classes", empty, "warning")
    if all(name.isdecimal() for name in classes):
        classes.sort(key=int)
    index = {name: i for i, name in enumerate(classes)}
    training = inside.get("train", inside.get("trainval"))
    for name, path in parts.items():
        if not inside[name]:
            found.add(f"{path.name} has no class folders")
            continue
        if alone := tree.beside(path):
            found.add(f"{counted(len(alone), 'image')} left out beside the class folders", alone, "warning")
        samples = [(file, index[c]) for c in sorted(inside[name]) for file in inside[name][c]]
        files, labels = [file for file, _ in samples], np.asarray([label for _, label in samples], np.int64)
        found.splits[name] = FileSplit(folder, files, labels)
        new = [c for c, images in inside[name].items() if images and training is not None and not training.get(c)]
        if new and name in ("val", "test"):
            found.add(f"{path.name} has classes that are not in the training split", sorted(new))
    found.layout, found.classes = "class folders", len(classes)
    found.names = tuple(name.encode("utf-8", "replace").decode() for name in classes)
    tree.report(found)
    return True


def standard(found: Found, val: int | None = None, holdout: Holdout = HOLDOUT) -> None:
    """Completes the splits to `train`, `val`, `trainval` and `test`.

    With training and validation but no test split, as in ImageNet, the validation split becomes `test`, since papers
    report it. With neither, a part of the images becomes `test`. A missing `val` is split from training. Both splits
    are stratified and deterministic.

    Args:
        found: Report with splits named as in `NAMES`, or `all`.
        val: Size of `val` if it is split from training; by default that of `holdout`.
        holdout: Fractions of `val` and `test`, and the seed of both.
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
        test, full = cut(full, max(1, int(len(full) * holdout.test)), holdout.seed)
        train = kept = None
        found.layout += ", test cut from all"
    if train is None or kept is None:
        count = val or max(1, int(len(full) * holdout.val))
        kept, train = cut(full, min(count, len(full) - 1), holdout.seed)
        found.layout += ", val cut from training"
    found.splits = {"train": train, "val": kept, "trainval": full, "test": test}


def cut(split: Split, count: int, seed: int) -> tuple[Split, Split]:
    """Draws a stratified sample of `count` images; returns sample and rest, both in the original order."""
    chosen, rest = stratified(np.arange(len(split)), split.labels, count, seed)
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
