"""Image classification tasks as splits that transformers' Trainer takes as they are.

Splits are named as in VTAB: `train800` and `val200` to choose settings, `train800val200` to train with them, `test` to
report once.

Example:
    >>> task = load_task("digits")
    >>> {name: len(split) for name, split in task.splits.items()}
    {'train800': 800, 'val200': 200, 'train800val200': 1000, 'test': 797}
    >>> item = task["val200"][0]
    >>> tuple(item["pixel_values"].shape), item["labels"].dtype
    ((3, 32, 32), torch.int64)
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from san_bench.data.procedural import enlarge
from san_peft.errors import SanError

DIGITS_SEED = 2024
"""Seed of the stratified split of the digits. Another seed is another task."""


class ImageSplit(Dataset):
    """Images in memory with their labels, normalised once.

    Args:
        images: RGB images as bytes.
        labels: Class of each image.
        mean: Mean that normalisation subtracts from each channel, on the scale 0 to 1.
        std: What it then divides by.
    """

    def __init__(
        self,
        images: UInt8[np.ndarray, "n height width 3"],
        labels: Int64[np.ndarray, " n"],
        mean: Iterable[float] = (0.5, 0.5, 0.5),
        std: Iterable[float] = (0.5, 0.5, 0.5),
    ) -> None:
        if len(images) != len(labels):
            raise SanError(f"A split needs one label per image, but has {len(images)} images and {len(labels)} labels.")
        self.images, self.labels = images, labels
        shift, scale = (torch.tensor(list(v), dtype=torch.float32)[:, None, None] for v in (mean, std))
        self.pixel_values: Float32[Tensor, "n 3 height width"] = (
            (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - shift) / scale
        ).contiguous()
        self._targets = torch.from_numpy(np.ascontiguousarray(labels))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Returns `pixel_values` of shape (3, height, width) in float32, and `labels`, a scalar."""
        return {"pixel_values": self.pixel_values[index], "labels": self._targets[index]}

    @property
    def fingerprint(self) -> str:
        """The sha256 over the shape, the bytes of the images, and the labels, before normalisation."""
        digest = hashlib.sha256(repr(self.images.shape).encode())
        digest.update(np.ascontiguousarray(self.images).tobytes())
        digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class VisionTask:
    """One data set with its splits and its metric, which is accuracy.

    Attributes:
        name: What `load_task` knows it by.
        num_classes: Number of classes; labels count from 0.
        splits: `train800`, `val200`, `train800val200` and `test`.
    """

    name: str
    num_classes: int
    splits: dict[str, ImageSplit]

    def __getitem__(self, split: str) -> ImageSplit:
        if split not in self.splits:
            raise SanError(f"Task {self.name!r} has no split {split!r}.{_suggest(split, self.splits)}")
        return self.splits[split]

    @property
    def fingerprint(self) -> str:
        """The sha256 over the names and fingerprints of all splits."""
        return hashlib.sha256(json.dumps({n: s.fingerprint for n, s in self.splits.items()}).encode()).hexdigest()


def embedded_vit_path() -> Path:
    """Returns the folder of the small ViT that ships with the package, for any `from_pretrained` of transformers."""
    return Path(str(resources.files("san_bench.data") / "assets" / "vit-tiny-procedural"))


def load_digits_task() -> VisionTask:
    """Loads scikit-learn's handwritten digits as 32x32 RGB images, normalised as the embedded ViT expects.

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
    train, test = _stratified(np.arange(len(labels)), labels, 1000, DIGITS_SEED)
    val, fit = _stratified(train, labels, 200, DIGITS_SEED + 1)
    members = {"train800": fit, "val200": val, "train800val200": train, "test": test}
    settings = json.loads((embedded_vit_path() / "preprocessor_config.json").read_text(encoding="utf-8"))
    mean, std = settings["image_mean"], settings["image_std"]
    return VisionTask("digits", 10, {n: ImageSplit(images[who], labels[who], mean, std) for n, who in members.items()})


TASKS: dict[str, Callable[[], VisionTask]] = {"digits": load_digits_task}
"""The tasks that need nothing but this package, by name."""


def load_task(name: str) -> VisionTask:
    """Loads a task by its name in `TASKS`.

    Raises:
        SanError: If there is no such task; the message lists those that exist.
    """
    if name not in TASKS:
        raise SanError(f"There is no task {name!r}.{_suggest(name, TASKS)}")
    return TASKS[name]()


def _stratified(
    members: Int64[np.ndarray, " n"], labels: Int64[np.ndarray, " all"], count: int, seed: int
) -> tuple[Int64[np.ndarray, " count"], Int64[np.ndarray, " rest"]]:
    """Takes `count` members with the classes in proportion (largest remainder); returns them and the rest, sorted.

    The order in which a class is drawn comes from a hash of (seed, member), so no library version changes the split.
    """
    key = [hashlib.sha256(f"{seed}:{member}".encode()).digest() for member in members]
    shuffled = members[sorted(range(len(members)), key=key.__getitem__)]
    classes, sizes = np.unique(labels[members], return_counts=True)
    share = sizes * count
    take = share // len(members)
    take[np.argsort(-(share % len(members)), kind="stable")[: count - take.sum()]] += 1
    taken = np.concatenate([shuffled[labels[shuffled] == c][:n] for c, n in zip(classes, take, strict=True)])
    return np.sort(taken), np.setdiff1d(members, taken)


def _suggest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return (f" Did you mean {close[0]!r}?" if close else "") + f" Choose from {', '.join(known)}."
