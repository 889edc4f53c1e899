"""Checks data against its manifest, by the check of its kind."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from san_bench.config.strict import suggest
from san_bench.datacheck.found import Found
from san_bench.kinds import KINDS, check_of
from san_peft.errors import SanError


def examine(suite: str, folder: Path, images: bool = True, workers: int | None = None, **options: Any) -> list[Found]:
    """Checks data, and notes every problem at once.

    Args:
        suite: `vtab`, `fgvc`, `gic` or `commonsense`; one data set of them, such as `vtab/cifar`; `folder` or
            `datasets` for images of one's own; or `llava`, one of its benchmarks such as `llava/gqa`, or
            `conversations`.
        folder: Its folder.
        images: Also read and decode every image, and look for duplicates.
        workers: Threads that read images; by default as many as there are processors, up to eight.
        **options: See `san_bench.image.check.examine`: `manifest`, `write_checksums`, `checksums`, `progress`.

    Returns:
        What was found of each data set, with its problems, in the order of the tasks.

    Raises:
        SanError: If there is no such suite or folder, or checksums are wanted of texts.
    """
    check = check_of(suite)
    if check is None:
        known = [name for kind in reversed(KINDS.values()) for name in kind.checks]
        raise SanError(f"There is no data called {suite!r} to check.{suggest(suite.partition('/')[0], known)}")
    return check(suite, folder, images, workers, **options)


def check_command(
    suite: str,
    folder: Path,
    images: bool = True,
    workers: int | None = None,
    write_checksums: Path | None = None,
    checksums: Path | None = None,
) -> None:
    """Checks, prints what was found and every problem, and exits with code 1 if there is an error."""
    found = examine(
        suite,
        folder,
        images,
        workers,
        write_checksums=write_checksums,
        checksums=checksums,
        progress=sys.stderr.isatty(),
    )
    for one in found:
        if one.splits:
            sizes = ", ".join(f"{name} {len(split):,}" for name, split in one.splits.items())
            print(f"{one.name}: {one.layout}; {sizes}; {one.classes} classes")
        elif one.layout:
            print(f"{one.name}: {one.layout}")
    problems = [problem for one in found for problem in one.problems]
    for problem in problems:
        print(f"{problem.level}: {problem}")
    errors = sum(problem.level == "error" for problem in problems)
    print(f"{errors} errors, {len(problems) - errors} warnings" if problems else "No problems.")
    if errors:
        sys.exit(1)
