"""Pretrained models by name: those that ship with the package, and those that other packages hold."""

from __future__ import annotations

from pathlib import Path

FAMILIES = ("embedded", "real")
"""What stands before the slash in the names of models that are found on this machine."""


def local_model(name: str) -> Path | None:
    """Returns the folder of a model that needs no hub, for any `from_pretrained` of transformers.

    Args:
        name: `embedded`, `embedded/NAME` or `real/NAME`; see `san_bench.models.embedded` and `san_bench.models.real`.

    Returns:
        The folder, or `None` where the name is of no such family.

    Raises:
        SanError: If there is no such model, or the package that holds it is not installed.

    Example:
        >>> local_model("embedded").name, local_model("org/model")
        ('vit-tiny-procedural', None)
    """
    family, _, which = name.partition("/")
    if family == "embedded":
        from san_bench.models.embedded import embedded_path

        return embedded_path(which or "vit")
    if family == "real" and not Path(name).is_dir():  # a folder of that name goes first
        from san_bench.models.real import real_path

        return real_path(which)
    return None
