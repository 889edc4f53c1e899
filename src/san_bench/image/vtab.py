"""VTAB-1k: 19 tasks of 1,000 training images, in the layouts in circulation.

Supports three layouts, each with one folder per task under either set of names in use (`cifar` or `cifar_100`):

- the community's: `images/` and the lists `train800.txt`, `val200.txt`, `train800val200.txt`, `test.txt`;
- tables of the `datasets` library, or parquet or Arrow files, named after the splits;
- folders `train800/`, `val200/` and `test/` with one folder of images per class.

The last two need no `train800val200`. All sizes must match exactly, so that the first 800 images of another copy of
CIFAR-100 are never mistaken for VTAB-1k.
"""

from __future__ import annotations

from pathlib import Path

from san_bench.datacheck.found import Found
from san_bench.datacheck.manifest import Manifest, find_folder, load_manifest
from san_bench.image.layouts import read_folders, read_list
from san_bench.image.splits import JoinedSplit, VisionTask, task_of
from san_bench.image.tables import read_tables
from san_peft.errors import SanError

SPLITS = ("train800", "val200", "train800val200", "test")
"""The splits, in the order of their list files."""


def load(task: str, data: Path, manifest: Manifest | None = None) -> VisionTask:
    """Loads a task of VTAB-1k.

    Args:
        task: Name of the task in the manifest, such as `cifar`.
        data: Folder with one folder per task.
        manifest: Expected data; by default that of VTAB-1k.

    Returns:
        The task `vtab/<task>`.

    Raises:
        SanError: If the task or folder does not exist, or the data is invalid.
    """
    return task_of(read(task, data, manifest))


def read(task: str, data: Path, manifest: Manifest | None = None) -> Found:
    """Reads a task as `load` does, and collects validation problems.

    Raises:
        SanError: If the task or folder does not exist, or the folder has no readable data.
    """
    facts = (manifest or load_manifest("vtab"))[task]
    folder = find_folder(data, facts)
    found = Found(f"vtab/{task}", folder)
    if (folder / "images").is_dir() or any((folder / f"{split}.txt").is_file() for split in SPLITS):
        found.layout = "list files"
        for split in SPLITS:
            read_list(found, split, folder / f"{split}.txt")
        found.expect(facts)
        return found
    if not (read_folders(found, folder) or read_tables(found, folder)):
        raise SanError(
            f"{folder} has no readable data. Expected the lists {', '.join(f'{s}.txt' for s in SPLITS)} "
            "next to images/, or tables or class folders named after these splits."
        )
    splits = found.splits
    parts = {"train800": splits.get("train800", splits.get("train")), "val200": splits.get("val200", splits.get("val"))}
    known = {name: split for name, split in {**parts, **splits}.items() if name in SPLITS and split is not None}
    if "train800val200" not in known and {"train800", "val200"} <= set(known):
        known["train800val200"] = JoinedSplit(known["train800"], known["val200"])
    found.splits = {name: known[name] for name in SPLITS if name in known}
    found.expect(facts)
    if any(problem.level == "error" for problem in found.problems):
        found.add(
            f"the splits are {', '.join(f'{n} of {len(s):,}' for n, s in splits.items())}; the images of VTAB-1k "
            "cannot be selected from a copy in another order. Use the task `datasets` or `folder` instead"
        )
    return found
