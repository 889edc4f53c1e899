"""Report of reading a dataset: its splits and all validation problems.

Loader and data check share one reader, which returns `Found`. The loader raises if there are errors; the check also
reads the images.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from san_bench.datacheck.manifest import Facts, Manifest
from san_peft.errors import SanError


def counted(number: int, noun: str, plural: str = "") -> str:
    """Returns a number with its noun.

    Example:
        >>> counted(1, "image"), counted(1200, "image"), counted(2, "class", "classes")
        ('1 image', '1,200 images', '2 classes')
    """
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


@dataclass(frozen=True)
class CheckOptions:
    """Options of a data check; a kind of data uses those that apply to it.

    Attributes:
        images: Also decodes every image and finds duplicates.
        workers: Threads that read images; by default one per CPU core, up to eight.
        manifest: Expected data; by default the manifest of the suite.
        write_checksums: File to write the checksums of all lists, tables and images to.
        checksums: File of checksums to compare with.
        progress: Shows a progress bar.
    """

    images: bool = True
    workers: int | None = None
    manifest: Manifest | None = None
    write_checksums: Path | None = None
    checksums: Path | None = None
    progress: bool = False


@dataclass(frozen=True)
class Problem:
    """One validation problem.

    Attributes:
        task: Task name of the dataset.
        text: Description, with numbers.
        items: All affected files or rows.
        level: An `error` makes the data unusable; a `warning` can occur in a genuine copy.

    Example:
        >>> print(Problem("vtab/cifar", "test: 2 images cannot be read", ("test/000007.jpg", "test/000009.jpg")))
        vtab/cifar: test: 2 images cannot be read: test/000007.jpg, test/000009.jpg
    """

    task: str
    text: str
    items: tuple[str, ...] = ()
    level: Literal["error", "warning"] = "error"

    def __str__(self) -> str:
        more = f" and {len(self.items) - 5:,} more" if len(self.items) > 5 else ""
        said = f"{self.task}: {self.text}" + (f": {', '.join(self.items[:5])}{more}" if self.items else "")
        return said.encode("utf-8", "replace").decode()  # names of files need not be UTF-8


@dataclass
class Found:
    """Report of a dataset on disk.

    Attributes:
        name: Task name.
        folder: Its folder, if any.
        layout: Description of its layout.
        classes: Number of classes.
        names: Names of the classes, if they are known.
        splits: The splits by name.
        files: Lists, tables and archives that the splits were read from.
        problems: Validation problems.
    """

    name: str
    folder: Path | None = None
    layout: str = ""
    classes: int = 0
    names: tuple[str, ...] = ()
    splits: dict[str, Any] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def add(self, text: str, items: Iterable[str] = (), level: Literal["error", "warning"] = "error") -> None:
        """Adds a problem."""
        self.problems.append(Problem(self.name, text, tuple(items), level))

    def expect(self, facts: Facts, cut: Sequence[str] = ()) -> None:
        """Compares the splits with their expected sizes and classes, and adds every difference.

        Args:
            facts: Expected dataset.
            cut: Splits whose size may differ in another split of the same images: a warning, not an error.
        """
        self.classes = facts.classes
        for name, count in facts.splits.items():
            if name not in self.splits:
                self.add(f"split {name} is missing")
            elif len(self.splits[name]) != count:
                self.add(
                    f"{name} has {len(self.splits[name]):,} images, not {count:,}",
                    level="warning" if name in cut else "error",
                )
        self.expect_labels()

    def expect_labels(self) -> None:
        """Adds labels outside the classes, and classes that never occur."""
        occurring: set[int] = set()
        for name, split in self.splits.items():
            wrong = np.flatnonzero((split.labels < 0) | (split.labels >= self.classes)).tolist()
            if len(wrong) and name != "trainval" and not split.joined:
                what = [f"{split.labels[i]} of {split.item_name(i)}" for i in wrong]
                self.add(f"{name}: {len(wrong):,} labels are outside 0 to {self.classes - 1}", what)
            occurring |= set(np.unique(split.labels).tolist())
        absent = set(range(self.classes)) - occurring
        if absent and self.splits:
            seen = self.classes - len(absent)
            known = self.names if len(self.names) == self.classes else tuple(map(str, range(self.classes)))
            self.add(f"only {seen} of {self.classes} classes occur, without", (known[c] for c in sorted(absent)))

    def summary(self) -> str:
        """Describes layout, splits and classes in one line."""
        sizes = ", ".join(f"{name} {len(split):,}" for name, split in self.splits.items())
        return (
            f"{self.name}: {self.layout}; {sizes}; {self.classes} classes" if sizes else f"{self.name}: {self.layout}"
        )

    def check(self) -> None:
        """Raises `SanError` with all errors, if there are any."""
        errors = [str(problem) for problem in self.problems if problem.level == "error"]
        if errors:
            where = f" in {self.folder}" if self.folder else ""
            raise SanError(
                f"The data of {self.name}{where} is invalid:\n  " + "\n  ".join(errors) + "\n"
                "`san data check` also checks the images."
            )
