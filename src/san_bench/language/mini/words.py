"""Random choices for texts, the little grammar that sentences of the small world need, and what a relation is.

`RandomChoices` are whole numbers that depend on (seed, index) alone: a splitmix64 sequence in Python's integers, so
neither numpy nor Python's own `random` decides what a text says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

_WORD = 2**64
_GOLDEN = 0x9E3779B97F4A7C15

MASS = frozenset(
    "milk butter honey salt pepper ham coffee bread mustard seaweed wood iron glass clay paper wool wax stone rubber "
    "leather chalk".split()
)
"""Nouns that take no article and have no plural."""

_PLURALS = {
    "mouse": "mice", "knife": "knives", "sheep": "sheep", "wolf": "wolves", "trout": "trout", "fish": "fish",
    "carp": "carp", "pike": "pike", "fly": "flies", "cherry": "cherries",
    "cranberry": "cranberries", "postman": "postmen",
}  # fmt: skip


def _mix(z: int) -> int:
    """The finaliser of splitmix64."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % _WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % _WORD
    return z ^ (z >> 31)


class RandomChoices:
    """A sequence of random choices that depends on (seed, index) alone.

    Args:
        seed: Names the sequence of texts, 0 or more.
        index: Which text of the sequence.
    """

    def __init__(self, seed: int, index: int) -> None:
        self.state = _mix((_mix((seed * _GOLDEN + 1) % _WORD) + index * _GOLDEN) % _WORD)

    def below(self, number: int) -> int:
        """Returns a whole number from 0 to `number` - 1."""
        self.state = (self.state + _GOLDEN) % _WORD
        return (_mix(self.state) >> 32) * number >> 32

    def pick(self, items: Sequence[T]) -> T:
        """Returns one of the items."""
        return items[self.below(len(items))]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """Returns `count` different items in random order."""
        rest = list(items)
        for place in range(count):
            other = place + self.below(len(rest) - place)
            rest[place], rest[other] = rest[other], rest[place]
        return rest[:count]

    def chance(self, percent: int) -> bool:
        """Says yes in `percent` of 100 cases."""
        return self.below(100) < percent


def an(noun: str) -> str:
    """Returns a noun with its article, or as it is where it takes none or has it."""
    if noun in MASS or noun.startswith(("a ", "an ", "the ")):
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    """Returns the plural of a noun; a noun that has none stays as it is."""
    if noun in MASS:
        return noun
    return _PLURALS.get(noun) or noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def third(phrase: str) -> str:
    """Returns a phrase that begins with a verb as it follows `it`: `catch fish` gives `catches fish`."""
    verb, space, rest = phrase.partition(" ")
    if verb.endswith(("s", "x", "ch", "sh", "o")):
        verb += "es"
    elif verb.endswith("y") and verb[-2] not in "aeiou":
        verb = verb[:-1] + "ies"
    else:
        verb += "s"
    return verb + space + rest


def sentence(text: str) -> str:
    """Returns a text with a capital at its beginning."""
    return text[0].upper() + text[1:]


def listed(items: Sequence[str], last: str = "and") -> str:
    """Returns items as one enumeration: `a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {last} {items[-1]}"


@dataclass(frozen=True)
class Relation:
    """One property of some subjects, and its wordings.

    In a wording, `{x}` is the subject, `{ax}` it with its article, `{xs}` its plural; `{y}`, `{ay}`, `{ys}` are the
    value alike, and `{y3}` is it as a verb that follows `it`.

    Attributes:
        table: The value of each subject.
        say: Statements, for texts.
        ask: Questions for the value, for texts.
        seek: Questions for the subject, for texts.
        claim: Questions to answer with yes or no, for tasks.
        quiz: Questions for the value, for tasks.
        which: Questions for the subject, for tasks.
        known: Names the subject by its value, for tasks; `None` where that names no one subject.
        value: How the value stands as an answer.
        subject: How the subject does.
    """

    table: Mapping[str, str]
    say: tuple[str, ...]
    ask: tuple[str, ...]
    seek: tuple[str, ...]
    claim: tuple[str, ...]
    quiz: tuple[str, ...]
    which: tuple[str, ...]
    known: str | None = None
    value: str = "{y}"
    subject: str = "{ax}"

    def word(self, wording: str, subject: str, value: str) -> str:
        """Returns a wording with a subject and a value in it."""
        return wording.format(
            x=subject, ax=an(subject), xs=plural(subject), y=value, ay=an(value), ys=plural(value), y3=third(value)
        )

    def fill(self, wording: str, subject: str) -> str:
        """Returns a wording with a subject and its value in it."""
        return self.word(wording, subject, self.table[subject])


def distinct(dice: RandomChoices, relation: Relation, count: int) -> list[str]:
    """Draws subjects with different values; any of them may then be the one asked for, and the others beside it.

    Whichever is asked for, each subject and each value of the draw is as likely to be right as the others, so neither
    a word nor a length tells which is.
    """
    chosen: list[str] = []
    for subject in dice.sample(list(relation.table), len(relation.table)):
        if relation.table[subject] not in [relation.table[other] for other in chosen]:
            chosen.append(subject)
        if len(chosen) == count:
            break
    return chosen


def of_many(count: int, names: dict[str, Relation]) -> list[Relation]:
    """Returns the relations that have at least `count` different values."""
    return [relation for relation in names.values() if len(set(relation.table.values())) >= count]
