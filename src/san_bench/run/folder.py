"""Identify the run or export in a folder; imports no torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from san_bench.config.recipe import Recipe, load_recipe
from san_bench.run.provenance import write_atomically

EXPORT = "export.json"
"""File of a merged export: its run, the output difference after merging, and hashes of its weights."""


def export_facts(folder: Path) -> dict[str, Any]:
    """Reads the `export.json` of a merged export and verifies the hashes of its weights.

    Raises:
        SanError: If the folder is not a merged export that `san export` has verified, or its weights have changed.
    """
    from san_peft.errors import SanError

    try:
        facts = json.loads((folder / EXPORT).read_text(encoding="utf-8"))
        float(facts["max_abs_difference"])
        exported = dict(facts["weights_sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SanError(
            f"{folder} is not a verified merged export: {EXPORT} is missing or incomplete. "
            f"`san export RUN --merged --out FOLDER` writes one."
        ) from error
    found = weights_sha256(folder)
    if found != exported:
        other = ", ".join(sorted({name for name, _ in found.items() ^ exported.items()}))
        raise SanError(
            f"The weights in {folder} have changed since `san export` verified them: {other} differ, are missing or "
            "are new. Export the run again, to another folder."
        )
    return facts


def weights_sha256(folder: Path) -> dict[str, str]:
    """Returns the sha256 of each safetensors file in a folder, by file name."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def check_free(folder: Path, recipe: Recipe) -> None:
    """Raises `SanError` if a folder holds the run of another recipe."""
    file = folder / "recipe.yaml"
    if not file.exists():
        return
    try:
        other, reason = load_recipe(file).fingerprint, ""
    except ValueError as error:  # written by an earlier version
        other, reason = "", f" Its recipe does not load: {str(error).splitlines()[0]}"
    if other != recipe.fingerprint:
        from san_peft.errors import SanError

        raise SanError(
            f"{folder} holds a run of another recipe ({other[:12] or 'unknown'}, this one is "
            f"{recipe.fingerprint[:12]}). Choose another output, or remove the folder.{reason}"
        )


def claim(folder: Path, recipe: Recipe) -> None:
    """Claims a folder for a recipe, or raises `SanError` if it holds the run of another one."""
    check_free(folder, recipe)
    if not (folder / "recipe.yaml").exists():
        write_atomically(folder / "recipe.yaml", recipe.to_yaml())
