"""Encodes the origin of each entry of a tensor, and moves the codes like the operations move the entries."""

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
"""Number of codes per writer: code = writer * STRIDE + channel."""

NONE = -1
"""Code of a constant, which no layer wrote."""

ZERO = -2
"""Code of a zero, such as padding: a constant that no scale changes."""


@dataclass
class State:
    """Origin of the entries of a tensor.

    Attributes:
        codes: Code of each entry, in the shape of the tensor.
        via: Path of operations since each writer in `codes`.
        statistic: Whether the channels were contracted, as in the denominator of a norm or in attention scores.
    """

    codes: Int64[Tensor, "*shape"]
    via: dict[int, tuple[str, ...]] = field(default_factory=dict)
    statistic: bool = False

    @property
    def tracked(self) -> bool:
        """Whether it holds channels of a layer, or lost ones."""
        return not self.statistic and bool((self.codes >= 0).any())

    def passed(self, *names: str) -> dict[int, tuple[str, ...]]:
        """Returns the paths with operations appended."""
        return {writer: rules.join(path, *names) for writer, path in self.via.items()}

    def present(self) -> set[int]:
        """Returns the writers in `codes`."""
        return set((self.codes[self.codes >= 0] >> 32).unique().tolist())


class Lost(Exception):
    """Raised if channels cannot be followed through an operation; the message is the reason of the barrier."""


def constant(value: Any) -> State:
    """Returns the state of a number or a constant tensor."""
    number = value.item() if isinstance(value, Tensor) and value.dim() == 0 and not value.is_meta else value
    code = ZERO if not isinstance(number, Tensor) and number == 0 else NONE
    return State(torch.full((), code).expand(value.shape if isinstance(value, Tensor) else ()))


_AS_FLOATS = ("im2col", "reflection_pad", "replication_pad")  # support floating point only
_WITH_ZEROS = ("im2col", "tril", "triu")  # fill with zeros


def move(name: str, func: Any, args: Any, kwargs: Any, find: Callable[[Tensor], State | None]) -> list[State]:
    """Runs an operation that moves entries on the codes instead.

    Args:
        name: Name of the operation.
        func: The operation.
        args: Its arguments.
        kwargs: Its keyword arguments.
        find: Returns the state of a tensor, or `None` for a constant.

    Raises:
        Lost: If it needs the values of an index on the meta device, or does not run on codes.
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
        return moved.double() if name.startswith(_AS_FLOATS) else moved  # exact below 2^53: two million writers

    args, kwargs = tree_map_only(Tensor, codes, (args, kwargs))
    for key in ("dtype", "layout", "device", "memory_format", "pin_memory"):
        kwargs.pop(key, None)
    if name == "constant_pad_nd":
        args = (args[0], args[1], ZERO if (*args[2:], *kwargs.values(), 0)[0] == 0 else NONE)
    if name == "scatter" and len(args) > 3 and not isinstance(args[3], Tensor):
        args = (*args[:3], ZERO if args[3] == 0 else NONE, *args[4:])
    try:
        if schema_of(func).writes:  # write into a copy, without expanded axes
            args = (args[0].clone(memory_format=torch.contiguous_format), *args[1:])
        moved = args[0].reshape(args[1]) if name in ("view", "_unsafe_view") else func(*args, **kwargs)
    except (RuntimeError, IndexError, TypeError) as error:
        raise Lost(f"{name} cannot run on channel codes ({type(error).__name__})") from error
    moved = moved if isinstance(moved, list | tuple) else [moved]
    statistic = bool(statistics) and all(statistics)
    return [State(m.long() + shift if m.is_floating_point() or shift else m, via, statistic) for m in moved]


def carries(tensor: Tensor) -> bool:
    """Returns whether a tensor can hold features, unlike indices and masks."""
    return tensor.is_floating_point() or tensor.is_complex()


def thin(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Keeps one entry of each axis along which all tensors, of equal shapes, are expanded."""
    for dim in range(tensors[0].dim()):
        if all(t.stride(dim) == 0 for t in tensors):
            tensors = tuple(t.narrow(dim, 0, min(1, t.shape[dim])) for t in tensors)
    return tensors


def highest(codes: Tensor, dims: Iterable[int]) -> tuple[Tensor, bool]:
    """Returns the highest code along some axes, kept with size one, and whether it is the only one there.

    The highest code belongs to the most recent writer. Constants and zeros are ignored.

    Raises:
        Lost: If the tensor is empty.
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
    """Returns whether codes differ along an axis."""
    small = thin(codes)[0]
    return small.shape[dim] > 1 and bool((small.narrow(dim, 0, 1) != small).any())


def pile(codes: Tensor, place: Tensor, size: int) -> tuple[Tensor, bool]:
    """Combines the codes of entries that are summed at the same position.

    Args:
        codes: Code of each entry, flat.
        place: Target position of each entry, flat.
        size: Number of positions.

    Returns:
        The highest code of each position, `ZERO` for empty ones, and whether entries of several writers met.

    Raises:
        Lost: If different channels of one writer meet.
    """
    high = torch.full((size,), ZERO).scatter_reduce(0, place, codes, "amax")
    there = high[place]
    differ = (codes >= 0) & (codes != there)
    if bool((differ & ((codes ^ there) < STRIDE)).any()):
        raise Lost("it adds different channels of one layer")
    return high, bool(differ.any())
