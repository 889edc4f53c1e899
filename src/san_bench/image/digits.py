"""The handwritten digits of scikit-learn as a task."""

from __future__ import annotations

from typing import Any

import numpy as np

from san_bench.image.mini.canvas import enlarge
from san_bench.image.splits import ArraySplit, VisionTask, stratified

DIGITS_SEED = 2024
"""Seed of the stratified split of the digits. Another seed gives another task."""


def load_digits_task() -> VisionTask:
    """Loads scikit-learn's handwritten digits as 32x32 RGB images.

    The 1,797 scans of 8x8 pixels and 17 grey levels are upsampled four times bilinearly and repeated in three channels.
    A stratified split with `DIGITS_SEED` takes 1,000 for training, 200 of them for validation; the other 797 are the
    test split.

    Returns:
        The task with four splits.
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
