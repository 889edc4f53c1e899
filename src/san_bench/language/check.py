"""Validates the data of language tasks."""

from __future__ import annotations

from pathlib import Path

from san_bench.datacheck.found import CheckOptions, Found
from san_bench.language import commonsense
from san_peft.errors import SanError


def examine(suite: str, folder: Path, options: CheckOptions) -> list[Found]:
    """Validates the commonsense reasoning tasks.

    Args:
        suite: `commonsense`, or one of its tasks, such as `commonsense/boolq`.
        folder: Folder with one folder per task.
        options: Of these, `manifest`.

    Raises:
        SanError: If the folder or task does not exist, or checksums are requested.
    """
    if options.write_checksums or options.checksums:
        raise SanError(f"Checksums are for images, and {suite} has text files. Use sha256sum.")
    return commonsense.examine(folder, suite.partition("/")[2], options.manifest)
