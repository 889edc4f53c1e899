"""Checks the data of language tasks."""

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
    """Checks the tasks of commonsense reasoning.

    Args:
        suite: `commonsense`, or one of its tasks such as `commonsense/boolq`.
        folder: Folder that holds the folders of the tasks.
        images: There are none.
        workers: Not used.
        manifest: What the data must be; the suite's own by default.
        write_checksums: Refused.
        checksums: Refused.
        progress: Not used.

    Raises:
        SanError: If there is no such folder or task, or checksums are asked for.
    """
    if write_checksums or checksums:
        raise SanError(f"Checksums are of images, and {suite} has texts. sha256sum does the same for its files.")
    return commonsense.examine(folder, suite.partition("/")[2], manifest)
