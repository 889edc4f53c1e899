"""Data sets with no list files of their own: CIFAR-100, ImageNet-1k, any image folder, any data set of `datasets`.

All of them have the splits `train`, `val`, `trainval` and `test`; `san_bench.image.layouts.standard` says where they
come from when the data brings fewer.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from san_bench.config.strict import suggest
from san_bench.datacheck.found import Found
from san_bench.datacheck.manifest import Manifest, find_folder, load_manifest
from san_bench.datacheck.names import NAMES
from san_bench.image.layouts import read_folders, read_tables, standard, table_splits
from san_bench.image.splits import ArraySplit, VisionTask, task_of
from san_peft.errors import SanError

OWN = ("folder", "datasets")
"""Tasks for data of one's own."""


def load(task: str, data: Path, manifest: Manifest | None = None) -> VisionTask:
    """Loads `cifar100`, `imagenet-1k`, an image folder, or a data set of the `datasets` library.

    Args:
        task: `cifar100` or `imagenet-1k`, or `folder` or `datasets` for data of one's own.
        data: Folder that holds the data set's folder; for `folder` and `datasets` the data set itself, for the latter
            also the name of one on the Hugging Face hub.
        manifest: What the first two must be; their own by default.

    Returns:
        The task.

    Raises:
        SanError: If there is no such task or data, or the data is not as it must be.
    """
    return task_of(read(task, data, manifest))


def read(task: str, data: Path, manifest: Manifest | None = None) -> Found:
    """Reads what there is of a task, as `load` does, and notes what is not as it must be.

    Raises:
        SanError: If there is no such task or data, or nothing in it can be read.
    """
    if task in OWN:
        found = Found(task, data)
        (_read_folder if task == "folder" else _read_datasets)(found, data)
        standard(found)
        found.expect_labels()
        return found
    facts = (manifest or load_manifest("gic")).tasks.get(task)
    if facts is None:
        raise SanError(f"There is no task {task!r}.{suggest(task, ['cifar100', 'imagenet-1k', *OWN])}")
    folder = find_folder(data, facts)
    found = Found(f"gic/{task}", folder)
    if not ((task == "cifar100" and _read_batches(found, folder)) or read_folders(found, folder)):
        if not read_tables(found, folder):
            raise SanError(
                f"{folder} holds no {facts.title} that can be read. Expected are folders train/ and test/ (ImageNet: "
                "val/) of classes, or parquet or Arrow tables"
                + (", or torchvision's cifar-100-python/." if task == "cifar100" else ".")
            )
    standard(found, facts.splits["val"])
    found.expect(facts)
    return found


def _read_batches(found: Found, folder: Path) -> bool:
    """Reads CIFAR-100 as torchvision stores it. They are pickles: torchvision compares checksums first."""
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
                f"{batches} is incomplete, or its checksums are not CIFAR-100's. Unpack cifar-100-python.tar.gz there "
                "again, or use the parquet copy: `san data fetch gic/cifar100 DIR`."
            ) from error
        found.splits[split] = ArraySplit(stored.data, np.asarray(stored.targets, np.int64))
    found.layout = "torchvision's batches"
    found.files += sorted(path for path in batches.iterdir() if path.is_file())
    return True


def _read_folder(found: Found, folder: Path) -> None:
    if not folder.is_dir():
        raise SanError(f"There is no folder {folder}.")
    if not read_folders(found, folder):
        raise SanError(
            f"{folder} is no image folder. It needs folders of splits, train/ and test/ say, with a folder of images "
            "for each class in each; or the folders of classes alone. Tables are read as the task `datasets`."
        )


def _read_datasets(found: Found, data: Path) -> None:
    if data.is_dir() and read_tables(found, data):
        return
    name = data.as_posix()
    if not data.is_dir() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise SanError(f"There is no folder {data}, and it is no name of a data set on the Hugging Face hub.")
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        tables = datasets.load_dataset(name)
    except (DatasetsError, OSError, ValueError) as error:
        where = (
            "holds no data set that can be read"
            if data.is_dir()
            else "is no folder here, and not to be had from the hub"
        )
        raise SanError(f"{name} {where}: {error}") from error
    found.folder = data if data.is_dir() else None
    found.layout = "tables"
    found.splits, found.classes = table_splits(
        {NAMES.get(str(name).lower(), str(name)): t for name, t in tables.items()}
    )
