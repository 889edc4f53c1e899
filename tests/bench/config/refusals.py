"""What is said about recipes that are refused."""

from __future__ import annotations

import pytest

from san_bench.config.recipe import load_recipe
from san_peft.errors import SanError


def message(path, overrides=()):
    """The message of the error that loading a recipe raises."""
    with pytest.raises(SanError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)
