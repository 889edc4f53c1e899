"""Registry of the kinds of data: recipe class, domain class and data check of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any


@dataclass(frozen=True)
class DataKind:
    """A kind of data. Entries are import paths, resolved on use, since most of them import torch.

    Attributes:
        key: A key that only recipes of this kind have.
        recipe: Recipe class, as `module:class`.
        domain: Class that loads, trains on and scores its data.
        check: Function that checks its data, which takes a suite, a folder and `CheckOptions`.
        checks: Suites that `check` handles: the part of the name before the slash.
    """

    key: str
    recipe: str
    domain: str
    check: str
    checks: tuple[str, ...]


KINDS = {
    "vision_language": DataKind(
        key="conversation",
        recipe="san_bench.vision_language.recipe:ConversationRecipe",
        domain="san_bench.vision_language.domain:Conversations",
        check="san_bench.vision_language.check:examine",
        checks=("llava", "conversations"),
    ),
    "language": DataKind(
        key="text",
        recipe="san_bench.language.recipe:TextRecipe",
        domain="san_bench.language.domain:Texts",
        check="san_bench.language.check:examine",
        checks=("commonsense", "instructions"),
    ),
    "image": DataKind(
        key="input",
        recipe="san_bench.image.recipe:ImageRecipe",
        domain="san_bench.image.domain:Images",
        check="san_bench.image.check:examine",
        checks=("vtab", "fgvc", "gic", "folder", "datasets"),
    ),
}
"""All kinds by package name; a recipe with none of the keys is an image recipe."""


def recipe_class(data: Mapping[str, Any]) -> Any:
    """Returns the recipe class for a mapping of recipe keys."""
    kind = next((kind for kind in KINDS.values() if kind.key in data), KINDS["image"])
    return resolve_name(kind.recipe)


def domain_class(recipe: Any) -> Any:
    """Returns the domain class for a recipe."""
    return resolve_name(next(kind.domain for kind in KINDS.values() if hasattr(recipe, kind.key)))


def check_of(suite: str) -> Any:
    """Returns the data check for a suite such as `vtab` or `llava/gqa`, or `None`."""
    name = suite.partition("/")[0]
    return next((resolve_name(kind.check) for kind in KINDS.values() if name in kind.checks), None)
