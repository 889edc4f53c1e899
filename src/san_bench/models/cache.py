"""Folders of models that are put together once, in the cache of assets of huggingface_hub (`HF_ASSETS_CACHE`)."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from san_peft.errors import SanError

_LOADING = threading.Lock()
"""Two threads that load models with transformers at once can each get a wrong one."""


def assembled(family: str, name: str, key: str, assemble: Callable[[Path], None]) -> Path:
    """Returns a folder in the cache; who asks first has it written, at once or not at all.

    Args:
        family: `embedded` or `real`.
        name: Name of the model.
        key: What it is made of and with, as a hash: another key is another folder.
        assemble: Writes the model into an empty folder.

    Raises:
        SanError: If the cache cannot be written.
    """
    from huggingface_hub import cached_assets_path, constants

    with _LOADING:
        try:
            folder = cached_assets_path("san-peft", family, name, assets_dir=constants.HF_ASSETS_CACHE)
            place = folder / key[:16]
            if place.is_dir():
                return place
            part = Path(tempfile.mkdtemp(prefix=".part-", dir=folder))
        except (OSError, ValueError) as error:
            raise SanError(
                f"{family}/{name} is assembled in a cache that cannot be written ({error}). Set HF_ASSETS_CACHE to a "
                "folder that can."
            ) from error
        try:
            assemble(part)
            part.rename(place)
        except OSError as error:
            if not place.is_dir():  # else another process was faster
                raise SanError(f"{family}/{name} cannot be assembled in {folder}: {error}.") from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return place
