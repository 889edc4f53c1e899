"""Datasets without list files: CIFAR-100, ImageNet-1k, any image folder, any dataset of the `datasets` library.

All have the splits `train`, `val`, `trainval` and `test`; `san_bench.image.layouts.standard` creates missing ones.
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
"""Tasks for your own data."""


def load(task: str, data: Path, manifest: Manifest | None = None) -> VisionTask:
    """Loads `cifar100`, `imagenet-1k`, an image folder, or a dataset of the `datasets` library.

    Args:
        task: `cifar100` or `imagenet-1k`, or `folder` or `datasets` for your own data.
        data: Parent of the dataset folder; for `folder` and `datasets` the dataset folder itself, for `datasets` also
            a name on the Hugging Face hub.
        manifest: Expected data of the first two; by default their own manifest.

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
                f"{folder} has no readable copy of {facts.title}. Expected class folders in train/ and test/ "
                "(ImageNet: val/), or parquet or Arrow tables"
                + (", or torchvision's cifar-100-python/." if task == "cifar100" else ".")
            )
    standard(found, facts.splits["val"])
    found.expect(facts)
    return found


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


def _read_folder(found: Found, folder: Path) -> None:
    if not folder.is_dir():
        raise SanError(f"There is no folder {folder}.")
    if not read_folders(found, folder):
        raise SanError(
            f"{folder} is not an image folder. Expected one folder per split, such as train/ and test/, each with one "
            "folder of images per class; or the class folders alone. For tables, use the task `datasets`."
        )


def _read_datasets(found: Found, data: Path) -> None:
    if data.is_dir() and read_tables(found, data):
        return
    name = data.as_posix()
    if not data.is_dir() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise SanError(f"There is no folder {data}, and it is not a valid dataset name on the Hugging Face hub.")
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        tables = datasets.load_dataset(name)
    except (DatasetsError, OSError, ValueError) as error:
        where = (
            "contains no readable dataset"
            if data.is_dir()
            else "is neither a local folder nor available on the Hugging Face hub"
        )
        raise SanError(f"{name} {where}: {error}") from error
    found.folder = data if data.is_dir() else None
    found.layout = "tables"
    found.splits, found.classes = table_splits(
        {NAMES.get(str(name).lower(), str(name)): t for name, t in tables.items()}
    )
