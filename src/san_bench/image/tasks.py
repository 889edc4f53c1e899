"""Image classification tasks by name.

Example:
    >>> task = load_task("digits")
    >>> {name: len(split) for name, split in task.splits.items()}
    {'train800': 800, 'val200': 200, 'train800val200': 1000, 'test': 797}
    >>> task["val200"].image(0).size, int(task["val200"].labels[0])
    ((32, 32), 5)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from san_bench.config.strict import suggest
from san_bench.image import fgvc, folders, vtab
from san_bench.image.digits import load_digits_task
from san_bench.image.layouts import HOLDOUT
from san_bench.image.mini import tasks as mini
from san_bench.image.recipe import OWN, Holdout
from san_bench.image.splits import VisionTask, task_of
from san_peft.errors import SanError

TASKS: dict[str, Callable[[], VisionTask]] = {"digits": load_digits_task}
"""Tasks outside a suite that ship with the package, by name."""

SUITES = {"vtab": vtab, "fgvc": fgvc, "gic": folders}
"""Modules with `load(task, data)`, by the part of the task name before the slash."""


def load_task(name: str, data: Path | None = None, holdout: Holdout = HOLDOUT) -> VisionTask:
    """Loads a task by its name.

    Args:
        name: A name in `TASKS`; a task of `mini-vision/`, `vtab/`, `fgvc/` or `gic/`; `folder` for your own images in
            any layout, `folder/NAME` for those in the folder NAME inside `data`; or `datasets` for tables only.
        data: Data folder; not needed for tasks in `TASKS` and `mini-vision/`. For your own images also a list of paths
            and labels, or a dataset on the Hugging Face hub.
        holdout: Splits to hold out from your own images.

    Raises:
        SanError: If the task is unknown, or its data is missing or invalid.
    """
    suite, _, task = name.partition("/")
    if name in TASKS:
        return TASKS[name]()
    if suite == "mini-vision":
        return mini.load(name)
    if suite not in SUITES and suite not in OWN:
        raise SanError(f"There is no task {name!r}.{suggest(name, [*TASKS, 'mini-vision/count', *SUITES, *OWN])}")
    if data is None:
        raise SanError(f"The task {name!r} needs data: set `data` to a folder, or pass --data to a suite.")
    if suite in OWN:
        return task_of(folders.read_own(name, Path(data), holdout))
    return SUITES[suite].load(task or suite, Path(data))
