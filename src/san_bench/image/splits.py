"""Splits of labelled images, and image classification tasks made of them.

A split returns images and labels as stored. Resizing, normalization and augmentation are settings of the recipe and the
checkpoint; see `san_bench.image.preprocess`.

Tasks with 1,000 training images use the split names of VTAB: `train800` and `val200` for hyperparameter search,
`train800val200` for training, `test` for the final evaluation. Others use `train`, `val`, `trainval` and `test`.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image

from san_bench.config.strict import suggest
from san_bench.datacheck.found import Found
from san_bench.image.decode import UNREADABLE, read_rgb, to_rgb, why
from san_peft.errors import SanError

if TYPE_CHECKING:
    import datasets


def stored_bytes(path: Path) -> int:
    """Returns the size of a file in bytes, or -1 if it is missing; used by fingerprints."""
    return path.stat().st_size if path.is_file() else -1


class Split(ABC):
    """Labelled images, decoded on access.

    Attributes:
        labels: Class index of each image, from 0.
        joined: Whether its images belong to other splits.
    """

    labels: Int64[np.ndarray, " n"]
    joined = False

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """Returns an RGB image in its original size.

        Raises:
            SanError: If it is missing or cannot be decoded; the message names it.
        """

    def item_name(self, index: int) -> str:
        """Returns the name of an image for messages: its file or row."""
        return f"row {index}"

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """The sha256 of the content; see each kind of split."""


class ArraySplit(Split):
    """In-memory images of one size; the fingerprint covers every byte.

    Args:
        images: RGB images.
        labels: Class index of each image.
    """

    def __init__(self, images: UInt8[np.ndarray, "n height width 3"], labels: Int64[np.ndarray, " n"]) -> None:
        _one_label_each(len(images), labels)
        self.images, self.labels = images, labels

    def image(self, index: int) -> Image.Image:
        """Returns an RGB image."""
        return Image.fromarray(self.images[index])

    @property
    def fingerprint(self) -> str:
        """The sha256 over the shape, the bytes of the images, and the labels."""
        digest = hashlib.sha256(repr(self.images.shape).encode())
        digest.update(np.ascontiguousarray(self.images).tobytes())
        digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()


class FileSplit(Split):
    """Image files; the fingerprint covers names, sizes in bytes and labels.

    Args:
        root: Root folder.
        files: Path of each image relative to `root`, with forward slashes.
        labels: Class index of each image.
    """

    def __init__(self, root: Path, files: Sequence[str], labels: Int64[np.ndarray, " n"]) -> None:
        _one_label_each(len(files), labels)
        self.root, self.files, self.labels = Path(root), tuple(files), labels

    def item_name(self, index: int) -> str:
        """Returns the path of an image relative to the root."""
        return self.files[index]

    def image(self, index: int) -> Image.Image:
        """Reads and decodes a file."""
        path = self.root / self.files[index]
        try:
            return read_rgb(path)
        except UNREADABLE as error:
            raise SanError(
                f"The image {path} cannot be read: {why(error)}. `san data check` lists all unreadable files."
            ) from error

    @property
    def fingerprint(self) -> str:
        """The sha256 over one line per file: name, bytes, label. A missing file has -1 bytes."""
        digest = hashlib.sha256()
        for name, label in zip(self.files, self.labels, strict=True):
            line = f"{name}\t{stored_bytes(self.root / name)}\t{label}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))  # names of files need not be UTF-8
        return digest.hexdigest()


class TableSplit(Split):
    """Rows of a table of the `datasets` library, from Arrow or parquet files.

    Args:
        table: The rows.
        image: Name of the image column.
        labels: Class index of each row.
    """

    def __init__(self, table: datasets.Dataset, image: str, labels: Int64[np.ndarray, " n"]) -> None:
        _one_label_each(len(table), labels)
        self.table, self.column, self.labels = table, image, labels

    def image(self, index: int) -> Image.Image:
        """Decodes the image of a row."""
        try:
            return to_rgb(self.table[int(index)][self.column])
        except UNREADABLE as error:
            raise SanError(f"Row {index} of the column {self.column!r} has no readable image: {why(error)}.") from error

    @property
    def fingerprint(self) -> str:
        """The sha256 over one line per row: stored bytes of the image, label; independent of the location."""
        import datasets
        import pyarrow.compute as pc

        stored = self.table.select_columns([self.column]).cast_column(self.column, datasets.Image(decode=False))
        sizes: list[int] = []
        batch: Any  # a pyarrow.Table
        for batch in stored.with_format("arrow").iter(batch_size=1000):
            images = batch.column(0).combine_chunks()
            lengths = pc.call_function("binary_length", [images.field("bytes")]).to_pylist()
            for size, file in zip(lengths, images.field("path").to_pylist(), strict=True):
                sizes.append(stored_bytes(Path(file)) if size is None else size)
        lines = (f"{size}\t{label}\n" for size, label in zip(sizes, self.labels, strict=True))
        return hashlib.sha256("".join(lines).encode()).hexdigest()


class JoinedSplit(Split):
    """Concatenation of several splits.

    Args:
        splits: The splits, in order.
    """

    joined = True

    def __init__(self, *splits: Split) -> None:
        self.splits = splits
        self.labels = np.concatenate([split.labels for split in splits])
        self._ends = np.cumsum([len(split) for split in splits])

    def image(self, index: int) -> Image.Image:
        """Returns an image of the split that contains the index."""
        which = int(np.searchsorted(self._ends, index, side="right"))
        return self.splits[which].image(int(index - (self._ends[which] - len(self.splits[which]))))

    @property
    def fingerprint(self) -> str:
        """The sha256 over the fingerprints of the parts."""
        return hashlib.sha256("".join(split.fingerprint for split in self.splits).encode()).hexdigest()


@dataclass(frozen=True)
class VisionTask:
    """A dataset with its splits; the metric is accuracy.

    Attributes:
        name: Task name.
        num_classes: Number of classes; labels start at 0.
        splits: The splits by name.
        names: Names of the classes, if they are known.
        remarks: What a user should know about the data: its layout and sizes, and warnings.
    """

    name: str
    num_classes: int
    splits: dict[str, Split]
    names: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Validates the labels.

        Raises:
            SanError: If a label is below 0, or `num_classes` or more.
        """
        for name, split in self.splits.items():
            wrong = np.flatnonzero((split.labels < 0) | (split.labels >= self.num_classes))
            if len(wrong):
                raise SanError(
                    f"Task {self.name!r}, split {name}: {len(wrong)} of {len(split)} labels are invalid, such as "
                    f"{split.labels[wrong[0]]} at index {wrong[0]}. It has {self.num_classes} classes, from 0."
                )

    def __getitem__(self, split: str) -> Split:
        if split not in self.splits:
            raise SanError(f"Task {self.name!r} has no split {split!r}.{suggest(split, self.splits)}")
        return self.splits[split]

    @property
    def fingerprint(self) -> str:
        """The sha256 over the names and fingerprints of all splits."""
        return hashlib.sha256(json.dumps({n: s.fingerprint for n, s in self.splits.items()}).encode()).hexdigest()


def task_of(found: Found) -> VisionTask:
    """Returns the task of a report.

    Raises:
        SanError: If its data has errors; the message lists them all.
    """
    found.check()
    remarks = (found.summary(), *(f"{problem.level}: {problem}" for problem in found.problems))
    names = found.names if len(found.names) == found.classes else ()
    return VisionTask(found.name, found.classes, found.splits, names, remarks)


def stratified(
    members: Int64[np.ndarray, " n"], labels: Int64[np.ndarray, " all"], count: int, seed: int
) -> tuple[Int64[np.ndarray, " count"], Int64[np.ndarray, " rest"]]:
    """Draws a stratified sample of `count` members (largest remainder); returns sample and rest, both sorted.

    The draw is ordered by a hash of (seed, member), so the split does not depend on library versions.
    """
    key = [hashlib.sha256(f"{seed}:{member}".encode()).digest() for member in members]
    shuffled = members[sorted(range(len(members)), key=key.__getitem__)]
    classes, sizes = np.unique(labels[members], return_counts=True)
    share = sizes * count
    take = share // len(members)
    take[np.argsort(-(share % len(members)), kind="stable")[: count - take.sum()]] += 1
    taken = np.concatenate([shuffled[labels[shuffled] == c][:n] for c, n in zip(classes, take, strict=True)])
    return np.sort(taken), np.setdiff1d(members, taken)


def _one_label_each(images: int, labels: Int64[np.ndarray, " n"]) -> None:
    if images != len(labels):
        raise SanError(f"A split needs one label per image, but has {images} images and {len(labels)} labels.")
