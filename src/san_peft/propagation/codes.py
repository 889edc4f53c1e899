"""Codes of a tensor's entries, which say whose channel each one is, and how operations move them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils._pytree import tree_map_only

from san_peft.propagation import rules
from san_peft.propagation.schema import schema_of

STRIDE = 1 << 32
"""Codes of one writer: code = writer * STRIDE + channel."""

NONE = -1
"""Code of an entry that no layer wrote: a constant."""

ZERO = -2
"""Code of an entry that is zero, as padding is: no writer either, and no scale changes it."""


@dataclass
class State:
    """Where a tensor's entries come from.

    Attributes:
        codes: For every entry the code of its writer's channel, of the tensor's shape.
        via: For every writer in `codes` the operations passed since.
        statistic: Whether it was contracted over channels, as the denominator of a norm or attention scores are.
    """

    codes: Int64[Tensor, "*shape"]
    via: dict[int, tuple[str, ...]] = field(default_factory=dict)
    statistic: bool = False

    @property
    def tracked(self) -> bool:
        """Whether it holds channels that a layer wrote, or lost ones."""
        return not self.statistic and bool((self.codes >= 0).any())

    def passed(self, *names: str) -> dict[int, tuple[str, ...]]:
        """Returns the paths with further operations at their end."""
        return {writer: rules.join(path, *names) for writer, path in self.via.items()}

    def present(self) -> set[int]:
        """Returns the writers in `codes`."""
        return set((self.codes[self.codes >= 0] >> 32).unique().tolist())


class Lost(Exception):
    """The channel axis ends in an operation; the message says why."""


def constant(value: Any) -> State:
    """Returns the state of a number, or of a tensor that no layer wrote."""
    number = value.item() if isinstance(value, Tensor) and value.dim() == 0 and not value.is_meta else value
    code = ZERO if not isinstance(number, Tensor) and number == 0 else NONE
    return State(torch.full((), code).expand(value.shape if isinstance(value, Tensor) else ()))


_AS_FLOATS = ("im2col", "reflection_pad", "replication_pad")  # they take floating point alone
_WITH_ZEROS = ("im2col", "tril", "triu")  # they fill with zeros of their own


def move(name: str, func: Any, args: Any, kwargs: Any, find: Callable[[Tensor], State | None]) -> list[State]:
    """Runs an operation that moves channels on the codes themselves.

    Args:
        name: The operation's name.
        func: The operation.
        args: Its arguments.
        kwargs: Its keyword arguments.
        find: Gives the state of a tensor, `None` where there is none.

    Raises:
        Lost: If it needs an index whose numbers are not there, or does not take codes.
    """
    via: dict[int, tuple[str, ...]] = {}
    statistics: list[bool] = []
    shift = ZERO if name in _WITH_ZEROS else 0

    def codes(tensor: Tensor) -> Tensor:
        state = find(tensor)
        if state is None and not carries(tensor):
            if tensor.is_meta:
                raise Lost(f"{name} has an index on the meta device")
            return tensor.cpu()
        if state is None:
            state = constant(tensor)
        else:
            for writer, path in state.via.items():
                via[writer] = rules.join(via.get(writer, ()), *path)
            statistics.extend([state.statistic] if state.via else [])
        moved = state.codes - shift if shift else state.codes
        return moved.double() if name.startswith(_AS_FLOATS) else moved  # exact up to 2^53: two million writers

    args, kwargs = tree_map_only(Tensor, codes, (args, kwargs))
    for key in ("dtype", "layout", "device", "memory_format", "pin_memory"):
        kwargs.pop(key, None)
    if name == "constant_pad_nd":
        args = (args[0], args[1], ZERO if (*args[2:], *kwargs.values(), 0)[0] == 0 else NONE)
    if name == "scatter" and len(args) > 3 and not isinstance(args[3], Tensor):
        args = (*args[:3], ZERO if args[3] == 0 else NONE, *args[4:])
    try:
        if schema_of(func).writes:  # into codes of its own, every one with a place
            args = (args[0].clone(memory_format=torch.contiguous_format), *args[1:])
        moved = args[0].reshape(args[1]) if name in ("view", "_unsafe_view") else func(*args, **kwargs)
    except (RuntimeError, IndexError, TypeError) as error:
        raise Lost(f"{name} cannot be run on the numbers of channels ({type(error).__name__})") from error
    moved = moved if isinstance(moved, list | tuple) else [moved]
    statistic = bool(statistics) and all(statistics)
    return [State(m.long() + shift if m.is_floating_point() or shift else m, via, statistic) for m in moved]


def carries(tensor: Tensor) -> bool:
    """Whether a tensor can hold features; indices and masks cannot."""
    return tensor.is_floating_point() or tensor.is_complex()


def thin(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Keeps one entry of every axis along which all tensors of one shape repeat themselves."""
    for dim in range(tensors[0].dim()):
        if all(t.stride(dim) == 0 for t in tensors):
            tensors = tuple(t.narrow(dim, 0, min(1, t.shape[dim])) for t in tensors)
    return tensors


def highest(codes: Tensor, dims: Iterable[int]) -> tuple[Tensor, bool]:
    """Returns the most recent code along some axes, which stay with size one, and whether it is the only one there.

    Constants and zeros do not count.

    Raises:
        Lost: If there are no entries.
    """
    if not codes.numel():
        raise Lost("the tensor is empty")
    small = thin(codes)[0]
    high = small.amax(list(dims), keepdim=True)
    only = bool(((small == high) | (small < 0)).all())
    shape = list(codes.shape)
    for dim in dims:
        shape[dim] = 1
    return high.expand(shape), only


def varies(codes: Tensor, dim: int) -> bool:
    """Whether codes differ along an axis."""
    small = thin(codes)[0]
    return small.shape[dim] > 1 and bool((small.narrow(dim, 0, 1) != small).any())


def pile(codes: Tensor, place: Tensor, size: int) -> tuple[Tensor, bool]:
    """Adds entries up where they fall on the same place.

    Args:
        codes: One code for each entry, flat.
        place: Where each entry goes, flat.
        size: How many places there are.

    Returns:
        The most recent code of every place, zero where nothing falls, and whether streams of several writers met.

    Raises:
        Lost: If different channels of one layer meet.
    """
    high = torch.full((size,), ZERO).scatter_reduce(0, place, codes, "amax")
    there = high[place]
    differ = (codes >= 0) & (codes != there)
    if bool((differ & ((codes ^ there) < STRIDE)).any()):
        raise Lost("it adds different channels of one layer")
    return high, bool(differ.any())
