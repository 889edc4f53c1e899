"""Whose run, or export, a folder holds; light, so that it can be asked before torch is imported."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from san_bench.config.recipe import Recipe, load_recipe
from san_bench.run.provenance import write_atomically

EXPORT = "export.json"
"""File of a merged export: of which run it is, how much merging changed its outputs, and hashes of its weights."""


def export_facts(folder: Path) -> dict[str, Any]:
    """Returns what a merged export says of itself.

    Raises:
        SanError: If the folder is none that `san export` wrote after it had compared outputs, or has other weights now.
    """
    from san_peft.errors import SanError

    try:
        facts = json.loads((folder / EXPORT).read_text(encoding="utf-8"))
        float(facts["max_abs_difference"])
        exported = dict(facts["weights_sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SanError(
            f"{folder} is no merged export whose outputs were compared with its run's: {EXPORT} is missing or says "
            f"nothing of it. `san export RUN --merged --out FOLDER` writes one."
        ) from error
    found = weights_sha256(folder)
    if found != exported:
        other = ", ".join(sorted({name for name, _ in found.items() ^ exported.items()}))
        raise SanError(
            f"{folder} has other weights than `san export` compared and wrote there: {other} differ, or are missing or "
            "new. Export the run again, to another folder."
        )
    return facts


def weights_sha256(folder: Path) -> dict[str, str]:
    """Returns a sha256 of each file of weights in a folder, by its name."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def check_free(folder: Path, recipe: Recipe) -> None:
    """Raises `SanError` where a folder holds the run of another recipe than this."""
    file = folder / "recipe.yaml"
    if not file.exists():
        return
    try:
        other, reason = load_recipe(file).fingerprint, ""
    except ValueError as error:  # a recipe of an earlier version
        other, reason = "", f" Its recipe does not load: {str(error).splitlines()[0]}"
    if other != recipe.fingerprint:
        from san_peft.errors import SanError

        raise SanError(
            f"{folder} holds a run of another recipe ({other[:12] or 'unknown'}, this one is "
            f"{recipe.fingerprint[:12]}). Choose another output, or remove the folder.{reason}"
        )


def claim(folder: Path, recipe: Recipe) -> None:
    """Takes a folder for a recipe, or raises `SanError` where it holds the run of another."""
    check_free(folder, recipe)
    if not (folder / "recipe.yaml").exists():
        write_atomically(folder / "recipe.yaml", recipe.to_yaml())
