"""Whose run a folder holds; light, so that it can be asked before torch is imported."""

from __future__ import annotations

from pathlib import Path

from san_bench.recipe import Recipe, load_recipe
from san_bench.run.provenance import write_atomically


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
