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
"""Tasks outside a suite that ship with the package, by name."""

SUITES = {"vtab": vtab, "fgvc": fgvc, "gic": folders, "folder": folders, "datasets": folders}
"""Modules with `load(task, data)`, by the part of the task name before the slash."""


def load_task(name: str, data: Path | None = None) -> VisionTask:
    """Loads a task by its name.

    Args:
        name: A name in `TASKS`; a task of `mini-vision/`, `vtab/`, `fgvc/` or `gic/`; or `folder` or `datasets` for any
            image folder or any dataset of the `datasets` library.
        data: Data folder; not needed for tasks in `TASKS` and `mini-vision/`.

    Raises:
        SanError: If the task is unknown, or its data is missing or invalid.
    """
    suite, _, task = name.partition("/")
    if name in TASKS:
        return TASKS[name]()
    if suite == "mini-vision":
        return mini.load(name)
    if suite not in SUITES:
        raise SanError(f"There is no task {name!r}.{suggest(name, [*TASKS, 'mini-vision/count', *SUITES])}")
    if data is None:
        raise SanError(f"The task {name!r} needs a data folder: set `data`, or pass --data.")
    return SUITES[suite].load(task or suite, Path(data))
