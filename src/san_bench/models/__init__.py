"""Find local pretrained models by name: shipped with this package, or inside other pip packages."""

from __future__ import annotations

from pathlib import Path

FAMILIES = ("embedded", "real")
"""Prefixes of the names of local models."""


def local_model(name: str) -> Path | None:
    """Returns the folder of a local model, for any `from_pretrained` of transformers.

    Args:
        name: `embedded`, `embedded/NAME` or `real/NAME`; see `san_bench.models.embedded` and `san_bench.models.real`.

    Returns:
        The folder, or `None` if the name has another prefix.

    Raises:
        SanError: If the model does not exist, or the package that contains it is not installed.

    Example:
        >>> local_model("embedded").name, local_model("org/model")
        ('vit-tiny-procedural', None)
    """
    family, _, which = name.partition("/")
    if family == "embedded":
        from san_bench.models.embedded import embedded_path

        return embedded_path(which or "vit")
    if family == "real" and not Path(name).is_dir():  # a folder of that name takes precedence
        from san_bench.models.real import real_path

        return real_path(which)
    return None
