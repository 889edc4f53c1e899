"""Validates the data of language tasks."""

from __future__ import annotations

from pathlib import Path

from san_bench.datacheck.found import Found
from san_bench.datacheck.manifest import Manifest
from san_bench.language import commonsense
from san_peft.errors import SanError


def examine(
    suite: str,
    folder: Path,
    images: bool = True,
    workers: int | None = None,
    manifest: Manifest | None = None,
    write_checksums: Path | None = None,
    checksums: Path | None = None,
    progress: bool = False,
) -> list[Found]:
    """Validates the commonsense reasoning tasks.

    Args:
        suite: `commonsense`, or one of its tasks, such as `commonsense/boolq`.
        folder: Folder with one folder per task.
        images: Ignored.
        workers: Ignored.
        manifest: Expected data; by default the manifest of the suite.
        write_checksums: Not supported.
        checksums: Not supported.
        progress: Ignored.

    Raises:
        SanError: If the folder or task does not exist, or checksums are requested.
    """
    if write_checksums or checksums:
        raise SanError(f"Checksums are for images, and {suite} has text files. Use sha256sum.")
    return commonsense.examine(folder, suite.partition("/")[2], manifest)
