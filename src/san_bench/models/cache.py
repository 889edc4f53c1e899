"""Assemble model folders once, in the assets cache of huggingface_hub (`HF_ASSETS_CACHE`)."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from san_peft.errors import SanError

_LOADING = threading.Lock()
"""Loading models with transformers is not thread-safe: concurrent threads may get each other's weights."""


def assembled(family: str, name: str, key: str, assemble: Callable[[Path], None]) -> Path:
    """Returns a model folder in the cache, after assembling it atomically on the first call.

    Args:
        family: `embedded` or `real`.
        name: Name of the model.
        key: Hash of the sources and versions that the model is assembled from; each key has its own folder.
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
                f"The cache for {family}/{name} is not writable ({error}). Set HF_ASSETS_CACHE to a writable folder."
            ) from error
        try:
            assemble(part)
            part.rename(place)
        except OSError as error:
            if not place.is_dir():  # else another process has assembled it meanwhile
                raise SanError(f"{family}/{name} cannot be assembled in {folder}: {error}.") from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return place
