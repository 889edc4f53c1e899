"""Tasks of mini-vision: 1,000 training images each, in the three groups of VTAB, without downloads.

All images are synthetic, except for the handwritten digits. Image `i` of a task depends only on the task's seed and
`i`, with the same bytes on every platform. Splits are disjoint ranges of `i`. Classes alternate, so they are balanced.

Example:
    >>> task = load("mini-vision/count")
    >>> {name: len(split) for name, split in task.splits.items()}, task.num_classes
    ({'train800': 800, 'val200': 200, 'train800val200': 1000, 'test': 1000}, 6)
    >>> sorted({task.group for task in TASKS.values()})
    ['natural', 'specialised', 'structured']
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int64
from numpy.typing import NDArray

from san_bench.config.strict import task_of_suite
from san_bench.image.digits import load_digits_task
from san_bench.image.mini import natural as mini_natural
from san_bench.image.mini import specialised as mini_specialised
from san_bench.image.mini import structured as mini_structured
from san_bench.image.mini.canvas import Dice, Drawing
from san_bench.image.splits import ArraySplit, Split, VisionTask

IMAGES = 2000
"""Number of images of a synthetic task; there are 1,797 digits."""

SPLITS = {"train800": slice(800), "val200": slice(800, 1000), "train800val200": slice(1000), "test": slice(1000, None)}
"""Index range of each split."""

EIGHTHS = ("right", "down right", "down", "down left", "left", "up left", "up", "up right")


@dataclass(frozen=True)
class MiniTask:
    """One task of mini-vision.

    Attributes:
        group: Group in VTAB.
        classes: Class names.
        seed: Seed of the images.
        draw: Draws a batch from random numbers and labels; for the digits, from random numbers and scans.
    """

    group: Literal["natural", "specialised", "structured"]
    classes: tuple[str, ...]
    seed: int
    draw: Callable[[Dice, NDArray[Any]], Drawing]


TASKS: dict[str, MiniTask] = {
    "digits": MiniTask("natural", tuple("0123456789"), 101, mini_natural.digits),
    "textures": MiniTask("natural", mini_natural.TEXTURES, 102, mini_natural.textures),
    "flowers": MiniTask("natural", tuple(mini_natural.FLOWERS), 103, mini_natural.flowers),
    "cells": MiniTask("specialised", mini_specialised.FINDINGS, 104, mini_specialised.cells),
    "land": MiniTask("specialised", mini_specialised.LAND, 105, mini_specialised.land),
    "calls": MiniTask("specialised", mini_specialised.CALLS, 106, mini_specialised.calls),
    "count": MiniTask("structured", tuple("234567"), 107, mini_structured.count),
    "distance": MiniTask(
        "structured", tuple(f"up to {depth:g}" for depth in mini_structured.NEAR[1:]), 108, mini_structured.distance
    ),
    "location": MiniTask(
        "structured", tuple(f"row {n // 3}, column {n % 3}" for n in range(9)), 109, mini_structured.location
    ),
    "orientation": MiniTask("structured", EIGHTHS, 110, mini_structured.orientation),
    "azimuth": MiniTask("structured", EIGHTHS, 111, mini_structured.azimuth),
}
"""Tasks by name, without the prefix `mini-vision/`."""


def load(name: str) -> VisionTask:
    """Loads a task with four splits; images are drawn once per process.

    Args:
        name: A name in `TASKS`, with or without the prefix `mini-vision/`.

    Raises:
        SanError: If the task is unknown.
    """
    return _load(task_of_suite("mini-vision", name, TASKS))


def draw_images(name: str, index: Int64[np.ndarray, " n"]) -> tuple[Drawing, Int64[np.ndarray, " n"]]:
    """Draws images of a task.

    Args:
        name: A name in `TASKS`.
        index: Indices of the images; below 1,797 for the digits, unlimited otherwise.

    Returns:
        The drawing, with its ground truth, and the labels.
    """
    task = TASKS[name]
    labels = _digits()[1][index] if name == "digits" else index % len(task.classes)
    sources = _digits()[0][index] if name == "digits" else labels
    parts = [  # small chunks fit into the CPU cache
        task.draw(Dice(task.seed, index[i : i + 128].astype(np.uint64)), sources[i : i + 128])
        for i in range(0, len(index), 128)
    ]
    facts = {key: np.concatenate([part.facts[key] for part in parts]) for key in parts[0].facts}
    return Drawing(np.concatenate([part.images for part in parts]), facts), labels


@cache
def _load(name: str) -> VisionTask:
    index = np.arange(len(_digits()[1]) if name == "digits" else IMAGES)
    drawing, labels = draw_images(name, index)
    splits: dict[str, Split] = {split: ArraySplit(drawing.images[part], labels[part]) for split, part in SPLITS.items()}
    return VisionTask(f"mini-vision/{name}", len(TASKS[name].classes), splits)


@cache
def _digits() -> tuple[Float[np.ndarray, "1797 32 32"], Int64[np.ndarray, " 1797"]]:
    """Returns the scans, from 0 to 1, and their labels, in the order of the splits of `digits`."""
    task = load_digits_task()
    plain: Any = [task[split] for split in ("train800", "val200", "test")]
    scans = np.concatenate([split.images[..., 0] for split in plain]).astype(np.float32) / np.float32(255)
    return scans, np.concatenate([split.labels for split in plain])
