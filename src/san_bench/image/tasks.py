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
from typing import Any

import numpy as np

from san_bench.config.strict import suggest
from san_bench.image import fgvc, folders, vtab
from san_bench.image.mini.canvas import enlarge
from san_bench.image.splits import ArraySplit, VisionTask, stratified
from san_peft.errors import SanError

DIGITS_SEED = 2024
"""Seed of the stratified split of the digits. Another seed is another task."""


def load_digits_task() -> VisionTask:
    """Loads scikit-learn's handwritten digits as 32x32 RGB images.

    The 1,797 scans of 8x8 pixels and 17 grey levels are enlarged four times, linearly between pixel centres, and the
    grey level is repeated in all three channels. A stratified draw with `DIGITS_SEED` takes 1,000 for training, of
    which a second one takes 200 for validation; the other 797 are the test split.

    Returns:
        The task with its four splits.
    """
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    grey = enlarge(digits.images.astype(np.float32)[..., None] * np.float32(255 / 16), 4)
    images = np.repeat(np.floor(grey + np.float32(0.5)).astype(np.uint8), 3, axis=-1)
    labels = digits.target.astype(np.int64)
    train, test = stratified(np.arange(len(labels)), labels, 1000, DIGITS_SEED)
    val, fit = stratified(train, labels, 200, DIGITS_SEED + 1)
    members = {"train800": fit, "val200": val, "train800val200": train, "test": test}
    return VisionTask("digits", 10, {name: ArraySplit(images[who], labels[who]) for name, who in members.items()})


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
