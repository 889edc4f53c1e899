"""Datasets without list files: CIFAR-100, ImageNet-1k, and your own images in any layout.

All have the splits `train`, `val`, `trainval` and `test`; `san_bench.image.layouts.standard` creates missing ones.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from san_bench.config.strict import counted, suggest
from san_bench.datacheck.found import Found
from san_bench.datacheck.hub import hub_tables
from san_bench.datacheck.manifest import Manifest, find_folder, load_manifest
from san_bench.datacheck.names import NAMES
from san_bench.image.layouts import HOLDOUT, read_folders, standard
from san_bench.image.listing import Tree
from san_bench.image.recipe import Holdout
from san_bench.image.splits import ArraySplit, VisionTask, task_of
from san_bench.image.tables import LISTS, read_tables, table_splits
from san_peft.errors import SanError


def load(task: str, data: Path, manifest: Manifest | None = None) -> VisionTask:
    """Loads `cifar100` or `imagenet-1k`.

    Args:
        task: One of the two.
        data: Parent of the dataset folder.
        manifest: Expected data; by default their own manifest.

    Returns:
        The task.

    Raises:
        SanError: If the task or data does not exist, or the data is invalid.
    """
    return task_of(read(task, data, manifest))


def read(task: str, data: Path, manifest: Manifest | None = None) -> Found:
    """Reads a task as `load` does, and collects validation problems.

    Raises:
        SanError: If the task or data does not exist, or there is no readable data.
    """
    facts = (manifest or load_manifest("gic")).tasks.get(task)
    if facts is None:
        raise SanError(f"There is no task {task!r}.{suggest(task, ['cifar100', 'imagenet-1k'])}")
    folder = find_folder(data, facts)
    found = Found(f"gic/{task}", folder)
    if not ((task == "cifar100" and _read_batches(found, folder)) or read_folders(found, folder)):
        if not read_tables(found, folder):
            raise SanError(
                f"{folder} has no readable copy of {facts.title}. Expected class folders in train/ and test/ "
                "(ImageNet: val/), or parquet or Arrow tables"
                + (", or torchvision's cifar-100-python/." if task == "cifar100" else ".")
            )
    standard(found, facts.splits["val"])
    found.expect(facts)
    return found


def read_photos(name: str, data: Path, holdout: Holdout = HOLDOUT) -> Found:
    """Reads your own images and collects validation problems.

    Args:
        name: `folder` for images in any layout, `folder/NAME` for those in the folder NAME inside `data`, or
            `datasets` for tables only.
        data: A folder with one folder of images per class, with or without a folder per split; a CSV, TSV, JSON lines
            or Parquet list of paths and labels; a dataset of the `datasets` library, or its name on the Hugging Face
            hub.
        holdout: Splits to hold out if the data lacks them.

    Returns:
        The report, with the splits `train`, `val`, `trainval` and `test`.

    Raises:
        SanError: If there is no readable data.
    """
    kind, _, below = name.partition("/")
    data = data.expanduser()
    if below:
        data = data if data.name == below and not (data / below).exists() else data / below
    found = Found(name, data)
    try:
        _read_own(found, kind, data)
    except OSError as error:
        raise SanError(f"{data} cannot be read: {error}") from error
    given = set(found.splits)
    standard(found, holdout=holdout)
    found.expect_labels()
    if found.classes == 1:
        found.add(f"all images are of one class, {found.names[0]}. A classifier needs two or more{_deeper(found)}")
    _warn_of_classes(found, own_val={"val", "test"} <= given)
    return found


def _read_own(found: Found, kind: str, data: Path) -> None:
    if not data.exists():
        _read_hub(found, data, needs_owner=kind == "folder")
    elif kind == "folder":
        _read_any(found, data)
    elif not read_tables(found, data, LISTS):
        _load_dataset(found, data.as_posix())
        found.folder = data


def _read_any(found: Found, data: Path) -> None:
    """Reads class folders, or else tables and lists."""
    listed = Found(found.name, data)
    if data.is_dir() and read_folders(found, data):
        if found.classes > 1 or not read_tables(listed, data, LISTS):
            return
    elif not read_tables(listed, data, LISTS):
        raise SanError(
            f"{data} is not an image folder. Expected one folder per split, such as train/ and test/, each with one "
            "folder of images per class; or the class folders alone; or a table such as labels.csv, with the columns "
            "file_name and label."
        )
    vars(found).update(vars(listed))


def _read_hub(found: Found, data: Path, needs_owner: bool) -> None:
    name = data.as_posix()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+" if needs_owner else r"[\w.-]+(/[\w.-]+)?", name):
        raise SanError(f"There is no folder {data}, and it is not a valid dataset name on the Hugging Face hub.")
    _load_dataset(found, name)


def _load_dataset(found: Found, name: str) -> None:
    tables = {NAMES.get(part.lower(), part): table for part, table in hub_tables(name).items()}
    found.folder, found.layout = None, "tables"
    found.splits, found.names = table_splits(tables)
    found.classes = len(found.names)


def _deeper(found: Found) -> str:
    """Returns a hint if the class folders lie one folder deeper, as in an unpacked archive."""
    place = (found.folder or Path()) / found.names[0]
    inside = [path.name for path in Tree(place).folders(place)] if place.is_dir() else []
    return f". It has folders of its own ({', '.join(inside[:3])}): is the data in {place}?" if inside else ""


def _warn_of_classes(found: Found, own_val: bool) -> None:
    """Adds classes that have one image, or none in a split; a small `val` of ours need not have all classes."""
    if not {"trainval", "test"} <= set(found.splits):
        return
    counts = {n: np.bincount(found.splits[n].labels, minlength=found.classes) for n in ("train", "val", "test")}
    total = np.sum(list(counts.values()), axis=0)
    once = [name for name, count in zip(found.names, total, strict=True) if count == 1]
    if once:
        found.add(f"{counted(len(once), 'class', 'classes')} of one image only", once, "warning")
    for split in ("train", "val", "test") if own_val else ("train", "test"):
        absent = [name for name, n, of in zip(found.names, counts[split], total, strict=True) if not n and of > 1]
        if absent:
            found.add(f"{split} has no image of {counted(len(absent), 'class', 'classes')}", absent, "warning")


def _read_batches(found: Found, folder: Path) -> bool:
    """Reads CIFAR-100 in torchvision's format. The files are pickles; torchvision verifies checksums first."""
    root = folder.parent if folder.name == "cifar-100-python" else folder
    batches = root / "cifar-100-python"
    if not batches.is_dir():
        return False
    from torchvision.datasets import CIFAR100

    for split in ("train", "test"):
        try:
            stored = CIFAR100(str(root), train=split == "train", download=False)
        except RuntimeError as error:
            raise SanError(
                f"{batches} is incomplete or has wrong checksums. Unpack cifar-100-python.tar.gz there "
                "again, or use the parquet copy: `san data fetch gic/cifar100 DIR`."
            ) from error
        found.splits[split] = ArraySplit(stored.data, np.asarray(stored.targets, np.int64))
    found.layout = "torchvision's batches"
    found.files += sorted(path for path in batches.iterdir() if path.is_file())
    return True
