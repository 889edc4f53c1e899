"""What reading a data set came to: its splits, and everything about them that is not as it must be.

A loader and a check read data in the same way, by a function that returns `Found`. The loader stops at any error, with
all of them in its message; the check goes on to the images.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from san_bench.datacheck.manifest import Facts
from san_peft.errors import SanError


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it must be.

    Attributes:
        task: The data set, as `load_task` knows it.
        text: What is wrong, with the numbers.
        items: All files or rows that it concerns.
        level: An `error` makes the data unusable; a `warning` may be so in a genuine copy.

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
        return f"{self.task}: {self.text}" + (f": {', '.join(self.items[:5])}{more}" if self.items else "")


@dataclass
class Found:
    """A data set as it was found.

    Attributes:
        name: What `load_task` knows it by.
        folder: Where it lies, if it lies in a folder.
        layout: The way in which it lies there, in words.
        classes: Number of classes.
        splits: The splits by name.
        files: Lists, tables and archives that the splits were read from.
        problems: What is not as it must be.
    """

    name: str
    folder: Path | None = None
    layout: str = ""
    classes: int = 0
    splits: dict[str, Any] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def add(self, text: str, items: Iterable[str] = (), level: Literal["error", "warning"] = "error") -> None:
        """Notes a problem."""
        self.problems.append(Problem(self.name, text, tuple(items), level))

    def expect(self, facts: Facts, cut: Sequence[str] = ()) -> None:
        """Compares the splits with what they must be, and notes each difference.

        Args:
            facts: What they must be.
            cut: Splits that another cut of the same images may make larger or smaller: a warning, no error.
        """
        self.classes = facts.classes
        for name, count in facts.splits.items():
            if name not in self.splits:
                self.add(f"there is no split {name}")
            elif len(self.splits[name]) != count:
                self.add(
                    f"{name} has {len(self.splits[name]):,} images, not {count:,}",
                    level="warning" if name in cut else "error",
                )
        self.expect_labels()

    def expect_labels(self) -> None:
        """Notes labels that are no class, and classes that never occur."""
        occurring: set[int] = set()
        for name, split in self.splits.items():
            wrong = np.flatnonzero((split.labels < 0) | (split.labels >= self.classes)).tolist()
            if len(wrong) and name != "trainval" and not split.joined:
                what = [f"{split.labels[i]} of {split.item_name(i)}" for i in wrong]
                self.add(f"{name}: {len(wrong):,} labels are no class of 0 to {self.classes - 1}", what)
            occurring |= set(np.unique(split.labels).tolist())
        absent = set(range(self.classes)) - occurring
        if absent and self.splits:
            seen = self.classes - len(absent)
            self.add(f"only {seen} of {self.classes} classes occur, without", (str(c) for c in sorted(absent)))

    def check(self) -> None:
        """Raises `SanError` if there are errors; the message holds them all."""
        errors = [str(problem) for problem in self.problems if problem.level == "error"]
        if errors:
            where = f" in {self.folder}" if self.folder else ""
            raise SanError(
                f"The data of {self.name}{where} is not as it must be:\n  " + "\n  ".join(errors) + "\n"
                "`san data check` looks at the images too."
            )
