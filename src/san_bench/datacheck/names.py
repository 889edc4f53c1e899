"""Names of splits in files and folders."""

from __future__ import annotations

import re
from pathlib import Path

from san_peft.errors import SanError

NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    **{name: name for name in ("trainval", "train800", "val200", "train800val200")},
}
"""Maps common names of splits to ours."""


def by_split(files: list[Path]) -> dict[str, list[Path]]:
    """Groups files by split, from their own names, such as train-00000-of-00002.parquet, or their folders.

    Raises:
        SanError: If the files of a split are in several folders.
    """
    parts: dict[str, list[Path]] = {}
    for path in files:
        name = re.sub(r"-\d+-of-\d+.*$", "", path.stem)
        if name.lower() not in NAMES and (path.parent.name.lower() in NAMES or path.stem.replace("-", "").isdecimal()):
            name = path.parent.name
        parts.setdefault(NAMES.get(name.lower(), name), []).append(path)
    for split, paths in parts.items():
        folders = sorted({path.parent for path in paths})
        if len(folders) > 1:
            names = ", ".join(map(str, folders))
            raise SanError(f"There are several configurations of {split}: {names}. Choose the folder of one.")
    return parts
