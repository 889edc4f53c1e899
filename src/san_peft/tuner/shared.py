"""One scaled input for several layers that read the same activation, such as queries, keys and values."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_hooks = getattr(getattr(torch._C, "_autograd", None), "_top_saved_tensors_default_hooks", None)


class SharedInput:
    """Makes a scaled input for its first reader and hands the same tensor to the others.

    The readers have the same incoming edges. Nothing outlives the pass that made it: the tensor is let go when every
    reader has had it, no reader gets it twice, and it is made anew for another activation, another state of the
    adapter, with and without gradients, and in another region of activation checkpointing.

    Args:
        readers: How many layers read it.
    """

    def __init__(self, readers: int) -> None:
        self.readers = readers
        self._held: tuple[Any, Any, set[int], Tensor] | None = None

    def fetch(self, reader: int, x: Tensor, state: Any, make: Callable[[], Tensor]) -> Tensor:
        """Returns the scaled input for a reader, from another reader's or by `make`.

        Args:
            reader: Number of the reader.
            x: The activation before scaling.
            state: What else the result depends on, beside the parameters.
            make: Scales the activation.
        """
        if _hooks is None or torch.compiler.is_compiling() or x.is_inference():
            return make()
        state = (state, x._version, torch.is_grad_enabled(), _region())
        held = self._held
        if held is not None and held[0]() is x and held[1] == state and reader not in held[2]:
            held[2].add(reader)
            if len(held[2]) == self.readers:
                self._held = None
            return held[3]
        value = make()
        self._held = (weakref.ref(x), state, {reader}, value)
        return value

    def __getstate__(self) -> dict[str, Any]:
        return {"readers": self.readers, "_held": None}


def _region() -> Any:
    """What identifies the region of activation checkpointing that is running, or `None` outside of all."""
    top = _hooks(False)  # type: ignore[misc]
    return None if top is None else tuple(id(hook) for hook in top[:2])
