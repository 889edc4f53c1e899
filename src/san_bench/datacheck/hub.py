"""Load data sets of the Hugging Face hub, or of any folder that the `datasets` library reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from san_peft.errors import SanError


def hub_tables(name: str, config: str | None = None, streaming: bool = False) -> dict[str, Any]:
    """Loads all splits of a data set, by their own names.

    Args:
        name: Name on the hub, or a folder.
        config: Configuration of the data set.
        streaming: Does not download it as a whole.

    Raises:
        SanError: If there is no such data set, or it is not readable.
    """
    import datasets
    import httpx
    from datasets.exceptions import DatasetsError

    options = {**({} if config is None else {"name": config}), **({"streaming": True} if streaming else {})}
    try:
        tables = datasets.load_dataset(name, **options)
    except (DatasetsError, OSError, ValueError, httpx.HTTPError) as error:
        said = str(error).rstrip(".")
        if Path(name).exists():
            raise SanError(f"{name} contains no readable dataset: {said}.") from error
        raise SanError(
            f"{name} is neither a local file or folder nor available on the Hugging Face hub: {said}. With a network, "
            f"`hf download {name} --repo-type dataset --local-dir DIR` downloads it; then use that folder."
        ) from error
    return {str(part): table for part, table in tables.items()}
