"""Resolve the model of a recipe to a checkpoint for `from_pretrained`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from san_bench.config.recipe import Recipe, split_revision
from san_bench.models import local_model


@dataclass(frozen=True)
class Checkpoint:
    """A pretrained checkpoint: a folder, or a model on the hub with an optional revision.

    Attributes:
        path: Folder, or name on the hub.
        revision: Commit, branch or tag on the hub.
    """

    path: str | Path
    revision: str | None = None

    @property
    def options(self) -> dict[str, str]:
        """Keyword arguments of `from_pretrained`: `revision`, if there is one."""
        return {} if self.revision is None else {"revision": self.revision}

    @property
    def commit(self) -> str | None:
        """Commit of a cached model of the hub; `None` for a folder."""
        if Path(self.path).is_dir():
            return None
        from huggingface_hub import try_to_load_from_cache

        file = try_to_load_from_cache(str(self.path), "config.json", **self.options)
        return Path(file).parent.name if isinstance(file, str) else None


def checkpoint_of(recipe: Recipe) -> Checkpoint:
    """Returns the checkpoint of a recipe's model.

    Raises:
        SanError: If a shipped or packaged model does not exist or is not installed.
    """
    folder = local_model(recipe.model)
    name, revision = split_revision(recipe.model)
    return Checkpoint(name if folder is None else folder, revision)
