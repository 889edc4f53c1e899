"""VTAB-1k: 19 tasks of 1,000 training images, from the copies that people have.

Three layouts are read, each with one folder per task under either set of names in use (`cifar` or `cifar_100`):

- the community's: `images/` and the lists `train800.txt`, `val200.txt`, `train800val200.txt`, `test.txt`;
- tables of the `datasets` library, or parquet or Arrow files, named after the splits;
- folders `train800/`, `val200/` and `test/` with a folder of images for each class.

The last two need no `train800val200`. All sizes must be exact, so the first 800 images of some other copy of CIFAR-100,
say, are never taken for VTAB-1k's.
"""

from __future__ import annotations

from pathlib import Path

from san_bench.datacheck.found import Found
from san_bench.datacheck.manifest import Manifest, find_folder, load_manifest
from san_bench.image.layouts import read_folders, read_list, read_tables
from san_bench.image.splits import JoinedSplit, VisionTask, task_of
from san_peft.errors import SanError

SPLITS = ("train800", "val200", "train800val200", "test")
"""The splits, in the order of their list files."""


def load(task: str, data: Path, manifest: Manifest | None = None) -> VisionTask:
    """Loads a task of VTAB-1k.

    Args:
        task: Name of the task, such as `cifar`; the manifest has them all.
        data: Folder that holds a folder for each task.
        manifest: What the data must be; VTAB-1k's own by default.

    Returns:
        The task `vtab/<task>`.

    Raises:
        SanError: If there is no such task or folder, or the data is not as it must be.
    """
    return task_of(read(task, data, manifest))


def read(task: str, data: Path, manifest: Manifest | None = None) -> Found:
    """Reads what there is of a task, as `load` does, and notes what is not as it must be.

    Raises:
        SanError: If there is no such task or folder, or nothing in it can be read.
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
            f"{folder} holds no data that can be read. Expected are the lists {', '.join(f'{s}.txt' for s in SPLITS)} "
            "beside images/, or tables or folders of classes named after these splits."
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
            f"it has the splits {', '.join(f'{n} of {len(s):,}' for n, s in splits.items())}; VTAB-1k's own images "
            "cannot be picked out of a copy in another order. It can be run as the task `datasets` or `folder`"
        )
    return found
