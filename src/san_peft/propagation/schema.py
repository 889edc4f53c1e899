"""Reads the schema of an ATen operation: its name, its arguments by name, and those it writes into."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Schema:
    """Describes an operation.

    Attributes:
        name: Name as used in rules: without the ATen namespace and without the underscore of in-place operations.
        inplace: Whether the name ends in an underscore.
        places: Position of each argument.
        writes: Names of the arguments that it writes into.
    """

    name: str
    inplace: bool
    places: dict[str, int]
    writes: tuple[str, ...]


@cache
def schema_of(func: Any) -> Schema:
    """Returns the schema of an operation; a higher-order operation has only a name."""
    schema = getattr(func, "_schema", None)
    if schema is None:
        return Schema(func.name(), False, {}, ())
    space, _, name = schema.name.rpartition("::")
    inplace = name.endswith("_")
    plain = name.rstrip("_") if inplace else name
    writes = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write] if schema.is_mutable else []
    places = {a.name: place for place, a in enumerate(schema.arguments)}
    return Schema(plain if space == "aten" else f"{space}::{plain}", inplace, places, tuple(writes))


def argument(func: Any, args: Any, kwargs: dict[str, Any], name: str, default: Any) -> Any:
    """Returns an argument by its name, or the default if it was not passed."""
    place = schema_of(func).places.get(name)
    if place is not None and place < len(args):
        return args[place]
    return kwargs.get(name, default)


def overwritten(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """Returns the tensors that an operation writes into."""
    return tensors([argument(func, args, kwargs, name, None) for name in schema_of(func).writes])


def tensors(value: Any) -> list[Tensor]:
    """Returns the tensors in the arguments or results of an operation, including those in lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return []
    return [tensor for item in value for tensor in tensors(item)]
