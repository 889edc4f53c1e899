"""Validates data against its manifest."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from san_bench.config.strict import suggest
from san_bench.datacheck.found import CheckOptions, Found
from san_bench.kinds import KINDS, check_of
from san_peft.errors import SanError


def examine(suite: str, folder: Path, images: bool = True, workers: int | None = None, **options: Any) -> list[Found]:
    """Validates data and collects all problems.

    Args:
        suite: `vtab`, `fgvc`, `gic` or `commonsense`; one of their datasets, such as `vtab/cifar`; `folder` or
            `datasets` for your own images; `llava` or one of its benchmarks, such as `llava/gqa`; or `conversations`.
        folder: Data folder.
        images: Also decodes every image and finds duplicates.
        workers: Threads that read images; by default one per CPU core, up to eight.
        **options: The others of `CheckOptions`.

    Returns:
        Report for each dataset, in the order of the tasks.

    Raises:
        SanError: If the suite or folder does not exist, or checksums are requested for text data.
    """
    check = check_of(suite)
    if check is None:
        known = [name for kind in reversed(KINDS.values()) for name in kind.checks]
        raise SanError(f"Unknown data {suite!r}.{suggest(suite.partition('/')[0], known)}")
    return check(suite, folder, CheckOptions(images, workers, **options))


def check_command(
    suite: str,
    folder: Path,
    images: bool = True,
    workers: int | None = None,
    write_checksums: Path | None = None,
    checksums: Path | None = None,
) -> None:
    """Validates data, prints the report, and exits with code 1 if there are errors."""
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
        if one.splits or one.layout:
            print(one.summary())
    problems = [problem for one in found for problem in one.problems]
    for problem in problems:
        print(f"{problem.level}: {problem}")
    errors = sum(problem.level == "error" for problem in problems)
    print(f"{errors} errors, {len(problems) - errors} warnings" if problems else "No problems.")
    if errors:
        sys.exit(1)
