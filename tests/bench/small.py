"""The digits cut down to what trains in a second, and the demo's recipes cut down with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from san_bench.config.recipe import load_recipe
from san_bench.image import tasks as vision
from san_bench.image.digits import load_digits_task
from san_bench.image.domain import Images
from san_bench.image.recipe import ImageRecipe
from san_bench.image.splits import ArraySplit, VisionTask
from san_bench.models.adapt import with_method

SIZES = {"train800": 48, "val200": 16, "train800val200": 64, "test": 40}

SHORT = {"optimizer.epochs": 2, "optimizer.batch_size": 16}
"""Eight steps on the small task."""


def small_task() -> VisionTask:
    splits = load_digits_task().splits
    return VisionTask(
        "digits", 10, {n: ArraySplit(splits[n].images[:k], splits[n].labels[:k]) for n, k in SIZES.items()}
    )


@contextmanager
def small_scale() -> Iterator[pytest.MonkeyPatch]:
    """The small task under the name of the digits, and one thread, which at this size is faster on busy machines."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vision.TASKS, "digits", small_task)
        torch.set_num_threads(1)
        try:
            yield patch
        finally:
            torch.set_num_threads(threads)


def short_recipe(name: str, output: Path, **overrides: object) -> ImageRecipe:
    changes = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_recipe(name if "/" in name else f"demo/{name}", {**SHORT, "output": str(output), **changes})


def built(recipe: ImageRecipe, task: VisionTask | None = None) -> Any:
    """The model of a recipe, ready to be trained."""
    return with_method(Images(recipe, task or small_task()).base_model(), recipe)
