"""Codes of a tensor's entries, which say whose channel each one is, and how operations move them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils._pytree import tree_map_only

from san_peft.propagation import rules

STRIDE = 1 << 32
"""Codes of one writer: code = writer * STRIDE + channel; -1 is no writer."""

ZERO = -2
"""Code of an entry that is zero, as padding is: no writer either, and no scale changes it."""


@dataclass
class State:
    """Where a tensor's entries come from.

    Attributes:
        codes: For every entry the code of its writer's channel, of the tensor's shape.
        via: For every writer in `codes` the operations passed since.
        statistic: Whether it was reduced from channels, as the denominator of a norm or attention scores.
    """

    codes: Int64[Tensor, "*shape"]
    via: dict[int, tuple[str, ...]] = field(default_factory=dict)
    statistic: bool = False

    def passed(self, *names: str) -> dict[int, tuple[str, ...]]:
        """Returns the paths with further operations at their end."""
        return {writer: rules.join(path, *names) for writer, path in self.via.items()}


class Lost(Exception):
    """The channel axis ends in an operation; the message says why."""


def move(name: str, func: Any, args: Any, kwargs: Any, states: Any) -> list[State]:
    """Runs an operation that moves channels on the codes themselves."""
    via: dict[int, tuple[str, ...]] = {}
    statistic = False

    def codes(tensor: Tensor) -> Tensor:
        nonlocal statistic
        if tensor in states:
            state = states[tensor]
            for writer, path in state.via.items():
                via[writer] = rules.join(via.get(writer, ()), *path)
            statistic = statistic or state.statistic
            return state.codes
        if tensor.dtype in (torch.int64, torch.int32, torch.bool, torch.uint8):
            if tensor.is_meta:
                raise Lost(f"{name} has an index on the meta device")
            return tensor.cpu()
        return torch.full((), -1).expand(tensor.shape)

    args, kwargs = tree_map_only(Tensor, codes, (args, kwargs))
    for key in ("dtype", "layout", "device", "memory_format", "pin_memory"):
        kwargs.pop(key, None)
    if name == "constant_pad_nd":
        args = (args[0], args[1], ZERO if (*args[2:], *kwargs.values(), 0)[0] == 0 else -1)
    if name in ("view", "_unsafe_view"):
        moved = args[0].reshape(args[1])
    else:
        moved = func(*args, **kwargs)
    moved = moved if isinstance(moved, list | tuple) else [moved]
    return [State(m, via, statistic) for m in moved]


def carries(tensor: Tensor) -> bool:
    """Whether a tensor can hold features; indices and masks cannot."""
    return tensor.is_floating_point() or tensor.is_complex()


def thin(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Keeps one entry of every axis along which all tensors of one shape repeat themselves."""
    for dim in range(tensors[0].dim()):
        if all(t.stride(dim) == 0 for t in tensors):
            tensors = tuple(t.narrow(dim, 0, min(1, t.shape[dim])) for t in tensors)
    return tensors
