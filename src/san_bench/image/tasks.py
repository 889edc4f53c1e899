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
from san_bench.image.mini import tasks as mini
from san_bench.image.splits import VisionTask
from san_peft.errors import SanError

TASKS: dict[str, Callable[[], VisionTask]] = {"digits": load_digits_task}
"""The tasks outside any suite that need nothing but this package, by name."""

SUITES = {"vtab": vtab, "fgvc": fgvc, "gic": folders, "folder": folders, "datasets": folders}
"""Modules that load a task, by the part of its name before the slash; each has `load(task, data)`."""


def load_task(name: str, data: Path | None = None) -> VisionTask:
    """Loads a task by its name.

    Args:
        name: A name in `TASKS`, or one below `mini-vision/`, `vtab/`, `fgvc/` or `gic/`; or `folder` or `datasets`, for
            any image folder and any data set of the `datasets` library.
        data: Folder of the data. The first two kinds have theirs inside the package.

    Raises:
        SanError: If there is no such task, or its data is missing or not as it must be.
    """
    suite, _, task = name.partition("/")
    if name in TASKS:
        return TASKS[name]()
    if suite == "mini-vision":
        return mini.load(name)
    if suite not in SUITES:
        raise SanError(f"There is no task {name!r}.{suggest(name, [*TASKS, 'mini-vision/count', *SUITES])}")
    if data is None:
        raise SanError(f"The task {name!r} needs its data: name the folder as `data`, or with --data.")
    return SUITES[suite].load(task or suite, Path(data))
