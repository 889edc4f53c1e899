"""FGVC: CUB-200-2011, NABirds, Oxford Flowers102, Stanford Dogs and Stanford Cars, in the layouts in circulation.

Layouts, in order of precedence:

- the split files `train.json`, `val.json` and `test.json` of Visual Prompt Tuning, which map images to classes;
- the official lists: text files of CUB and NABirds, MATLAB files of the others;
- folders `train/` and `test/` with one folder of images per class;
- tables of the `datasets` library, or parquet or Arrow files, named after the splits.

Classes are renumbered from 0 in sorted order. Only the first layout has the validation images used in the literature
for datasets without a validation split; otherwise a stratified split of the same size is taken from training.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from san_bench.datacheck.found import Found
from san_bench.datacheck.manifest import Manifest, find_folder, load_manifest
from san_bench.image.layouts import first_folder, read_folders, standard
from san_bench.image.splits import FileSplit, JoinedSplit, VisionTask, task_of
from san_bench.image.tables import read_tables
from san_peft.errors import SanError

Rows = dict[str, list[tuple[str, Any]]]
"""Images with the original class ids, by split."""


def load(task: str, data: Path, manifest: Manifest | None = None) -> VisionTask:
    """Loads a dataset of FGVC.

    Args:
        task: `cub`, `nabirds`, `flowers`, `dogs` or `cars`.
        data: Folder with one folder per dataset.
        manifest: Expected data; by default that of FGVC.

    Returns:
        The task `fgvc/<task>`, with the splits `train`, `val`, `trainval` and `test`.

    Raises:
        SanError: If the task or folder does not exist, or the data is invalid.
    """
    return task_of(read(task, data, manifest))


def read(task: str, data: Path, manifest: Manifest | None = None) -> Found:
    """Reads a dataset as `load` does, and collects validation problems.

    Raises:
        SanError: If the task or folder does not exist, or the folder has no readable data.
    """
    facts = (manifest or load_manifest("fgvc"))[task]
    folder = find_folder(data, facts)
    found = Found(f"fgvc/{task}", folder)
    rows = _read_json(found) or OFFICIAL[task](found)
    if rows:
        _number(found, rows)
    elif found.problems:
        return found
    elif not (read_folders(found, folder) or read_tables(found, folder)):
        raise SanError(
            f"{folder} has no readable copy of {facts.title}. Expected train.json, val.json and test.json of Visual "
            "Prompt Tuning, the official lists, class folders in train/ and test/, or tables."
        )
    if not found.problems and set(found.splits) != {"train", "val", "trainval", "test"}:
        standard(found, facts.splits["val"])
    found.expect(facts, cut=("train", "val"))
    return found


def _read_json(found: Found) -> Rows | None:
    folder = _folder(found)
    paths = {split: folder / f"{split}.json" for split in ("train", "val", "test")}
    there = [path for path in paths.values() if path.is_file()]
    if not there:
        return None
    found.layout = "split files of Visual Prompt Tuning"
    rows: Rows = {}
    for split, path in paths.items():
        if path not in there:
            found.add(f"the split file {path.name} is missing next to {', '.join(p.name for p in there)}")
            continue
        found.files.append(path)
        try:
            names = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            found.add(f"{path.name} is not JSON: {error}")
            continue
        if not isinstance(names, dict) or not names:
            found.add(f"{path.name} does not map images to classes")
            continue
        rows[split] = list(names.items())
    if not rows:
        return None
    base = first_folder([folder / "images", folder / "Images", folder], next(iter(rows.values()))[0][0])
    below = "" if base == folder else f"{base.name}/"
    return {split: [(below + name, label) for name, label in part] for split, part in rows.items()}


def _read_birds(found: Found) -> Rows | None:
    folder = _folder(found)
    paths = [folder / name for name in ("images.txt", "image_class_labels.txt", "train_test_split.txt")]
    if not _all_there(found, paths):
        return None
    names, labels, training = (
        dict(line.split(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
        for path in paths
    )
    apart = set(names) ^ set(labels) | set(names) ^ set(training)
    if apart:
        found.add(
            f"{', '.join(p.name for p in paths)} do not list the same images; these are not in every list",
            sorted(apart),
        )
        return None
    rows: Rows = {"train": [], "test": []}
    for key, name in names.items():
        rows["train" if training[key].strip() == "1" else "test"].append((f"images/{name.strip()}", int(labels[key])))
    return rows


def _read_flowers(found: Found) -> Rows | None:
    folder = _folder(found)
    paths = [folder / "setid.mat", folder / "imagelabels.mat"]
    if not _all_there(found, paths):
        return None
    ids, labels = _mat(paths[0]), np.atleast_1d(_mat(paths[1])["labels"])
    keys = {"train": "trnid", "val": "valid", "test": "tstid"}
    return {
        split: [(f"jpg/image_{i:05d}.jpg", int(labels[i - 1])) for i in np.atleast_1d(ids[key]).tolist()]
        for split, key in keys.items()
    }


def _read_dogs(found: Found) -> Rows | None:
    folder = _folder(found)
    lists = first_folder([folder, folder / "lists"], "train_list.mat")
    paths = {split: lists / f"{split}_list.mat" for split in ("train", "test")}
    if not _all_there(found, list(paths.values())):
        return None
    rows: Rows = {}
    for split, path in paths.items():
        table = _mat(path)
        files, labels = np.atleast_1d(table["file_list"]), np.atleast_1d(table["labels"])
        rows[split] = [(f"Images/{file}", int(label)) for file, label in zip(files, labels, strict=True)]
    return rows


def _read_cars(found: Found) -> Rows | None:
    folder = _folder(found)
    every = first_folder([folder, folder / "devkit"], "cars_annos.mat") / "cars_annos.mat"
    if every.is_file():
        _all_there(found, [every])
        rows: Rows = {"train": [], "test": []}
        for row in np.atleast_1d(_mat(every)["annotations"]):
            rows["test" if int(row["test"]) else "train"].append((str(row["relative_im_path"]), int(row["class"])))
        return rows
    names = {"train": "cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}
    paths = {split: first_folder([folder, folder / "devkit"], name) / name for split, name in names.items()}
    if not _all_there(found, list(paths.values())):
        return None
    rows = {}
    for split, path in paths.items():
        table = np.atleast_1d(_mat(path)["annotations"])
        once, twice = f"cars_{split}", f"cars_{split}/cars_{split}"
        below = twice if len(table) and (folder / twice / str(table[0]["fname"])).is_file() else once
        rows[split] = [(f"{below}/{row['fname']}", int(row["class"])) for row in table]
    return rows


OFFICIAL: dict[str, Callable[[Found], Rows | None]] = {
    "cub": _read_birds,
    "nabirds": _read_birds,
    "flowers": _read_flowers,
    "dogs": _read_dogs,
    "cars": _read_cars,
}
"""Readers of the official lists; each returns `None` if there are none, and reports missing ones."""


def _number(found: Found, rows: Rows) -> None:
    """Builds splits from rows, with class ids renumbered from 0 in sorted order over all splits."""
    folder = _folder(found)
    ids = {label for part in rows.values() for _, label in part}
    order = sorted(ids, key=int) if all(str(label).isdecimal() for label in ids) else sorted(ids, key=str)
    index = {label: i for i, label in enumerate(order)}
    for split, part in rows.items():
        labels = np.asarray([index[label] for _, label in part], np.int64)
        found.splits[split] = FileSplit(folder, [name for name, _ in part], labels)
    found.layout = found.layout or "official lists"
    if {"train", "val"} <= set(found.splits):
        found.splits["trainval"] = JoinedSplit(found.splits["train"], found.splits["val"])


def _all_there(found: Found, paths: list[Path]) -> bool:
    """Returns whether all official lists exist; if only some do, reports the missing ones."""
    there = [path for path in paths if path.is_file()]
    found.files += there
    if there and len(there) < len(paths):
        missing = [path.name for path in paths if path not in there]
        found.add(f"the official list {', '.join(missing)} is missing next to {', '.join(p.name for p in there)}")
    return len(there) == len(paths)


def _mat(path: Path) -> dict[str, Any]:
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    damaged = (OSError, ValueError, TypeError, NotImplementedError, MatReadError, zlib.error)  # all that scipy raises
    try:
        return loadmat(str(path), squeeze_me=True)
    except damaged as error:
        raise SanError(f"{path} cannot be read as a MATLAB file: {error}. Download it again.") from error


def _folder(found: Found) -> Path:
    assert found.folder is not None
    return found.folder
