"""The kinds of data that runs train on: one table of where each has its recipe, its domain and its data check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any


@dataclass(frozen=True)
class Kind:
    """A kind of data. What it names is imported when it is asked for, since most of it imports torch.

    Attributes:
        key: A key that recipes of this kind have, and no others.
        recipe: The class of its recipes, as `module:class`.
        domain: The class that loads, trains and scores its data.
        check: The function that checks its data; takes the arguments of `san_bench.datacheck.check.examine`.
        checks: Names of the suites that this function knows, the part before a slash.
    """

    key: str
    recipe: str
    domain: str
    check: str
    checks: tuple[str, ...]


KINDS = {
    "vision_language": Kind(
        key="conversation",
        recipe="san_bench.vision_language.recipe:ConversationRecipe",
        domain="san_bench.vision_language.domain:Conversations",
        check="san_bench.vision_language.check:examine",
        checks=("llava", "conversations"),
    ),
    "language": Kind(
        key="text",
        recipe="san_bench.language.recipe:TextRecipe",
        domain="san_bench.language.domain:Texts",
        check="san_bench.language.check:examine",
        checks=("commonsense",),
    ),
    "image": Kind(
        key="input",
        recipe="san_bench.image.recipe:ImageRecipe",
        domain="san_bench.image.domain:Images",
        check="san_bench.image.check:examine",
        checks=("vtab", "fgvc", "gic", "folder", "datasets"),
    ),
}
"""All kinds by the name of their package; a recipe without any of the keys is one of images."""


def recipe_class(data: Mapping[str, Any]) -> Any:
    """Returns the class that a recipe's keys belong to."""
    kind = next((kind for kind in KINDS.values() if kind.key in data), KINDS["image"])
    return resolve_name(kind.recipe)


def domain_class(recipe: Any) -> Any:
    """Returns the class that loads, trains and scores what a recipe names."""
    return resolve_name(next(kind.domain for kind in KINDS.values() if hasattr(recipe, kind.key)))


def check_of(suite: str) -> Any:
    """Returns the function that checks the data of a suite such as `vtab` or `llava/gqa`, or `None`."""
    name = suite.partition("/")[0]
    return next((resolve_name(kind.check) for kind in KINDS.values() if name in kind.checks), None)
