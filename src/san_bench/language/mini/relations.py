"""The facts of the small world, and what follows from two of them.

Example:
    >>> len(FACTS), FACTS[0]
    (413, Fact(relation='material', subject='spoon', value='wood'))
    >>> DERIVED["water by material"].table["a spoon"]
    'float'
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

from san_bench.language.mini.wordings import RELATIONS
from san_bench.language.mini.words import Relation, an


class Fact(NamedTuple):
    """What is so: a subject has this value in this relation."""

    relation: str
    subject: str
    value: str


def _follows(first: str, second: str) -> Relation:
    """What two relations say together; the subjects of materials' relations come with their article."""
    ways, middle = RELATIONS[second], RELATIONS[first].table
    table = {an(x) if first == "material" else x: ways.table[value] for x, value in middle.items()}
    return replace(ways, table=MappingProxyType(table), known=None)


DERIVED: dict[str, Relation] = {
    f"{second} by {first}": _follows(first, second)
    for first, seconds in (("material", ("water", "heat", "fall")), ("kind", ("cover", "legs", "moves", "young")))
    for second in seconds
}
"""What follows from two facts: a thing does what its material does, an animal has what its kind has."""

FACTS: tuple[Fact, ...] = tuple(
    Fact(name, subject, value) for name, relation in RELATIONS.items() for subject, value in relation.table.items()
)
"""Every fact that stands by itself."""
