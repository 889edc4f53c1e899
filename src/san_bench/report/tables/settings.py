"""Compare settings side by side: of methods, or of the machines that ran them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST = 8
"""Maximum number of values of a setting that are listed."""


@dataclass(frozen=True)
class Setting:
    """One setting of several columns.

    Attributes:
        name: Dotted key.
        values: Values in each column, in the order of their first appearance; empty if it has no such setting.
        differs: Whether the columns have different values.
    """

    name: str
    values: tuple[str, ...]
    differs: bool


def side_by_side(columns: Sequence[Sequence[Mapping[str, Any]]]) -> list[Setting]:
    """Compares groups of nested mappings, such as the recipes of each method.

    Args:
        columns: Members of each column.

    Returns:
        A setting for each dotted key; a key keeps its position relative to the keys before it.

    Example:
        >>> san = [{"method": {"kind": "san"}, "seed": seed} for seed in (0, 1)]
        >>> ssf = [{"method": {"kind": "ssf"}, "seed": seed} for seed in (1, 0)]
        >>> for setting in side_by_side([san, ssf]):
        ...     print(setting)
        Setting(name='method.kind', values=('san', 'ssf'), differs=True)
        Setting(name='seed', values=('0, 1', '1, 0'), differs=False)
    """
    found: list[dict[str, dict[str, Any]]] = []
    for members in columns:
        values: dict[str, dict[str, Any]] = {}
        for member in members:
            for key, value in _leaves(member):
                values.setdefault(key, {}).setdefault(_word(value), value)
        found.append(values)
    settings = []
    for key in _keys(found):
        here = [values.get(key, {}) for values in found]
        differs = any(other.keys() != here[0].keys() for other in here)
        settings.append(Setting(key, tuple(map(_words, here)), differs))
    return settings


def _leaves(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _keys(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns all keys; a key that only later columns have follows the key before it there."""
    keys: list[str] = []
    for values in found:
        place = 0
        for key in values:
            if key not in keys:
                keys.insert(place, key)
            place = keys.index(key) + 1
    return keys


def _words(values: Mapping[str, Any]) -> str:
    """Lists values; of many numbers the range, of many words the first ones."""
    if len(values) <= MOST:
        return ", ".join(values)
    if all(isinstance(value, int | float) for value in values.values()):
        low, high = (pick(values, key=lambda word: values[word]) for pick in (min, max))
        return f"{low} to {high} ({len(values)} values)"
    return f"{', '.join([*values][:MOST])} and {len(values) - MOST} more"


def _word(value: Any) -> str:
    """Formats a value as YAML."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_word, value))}]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
