"""Checks batches with `adapter_names`: every layer must have the samples along the first axis of its input."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from san_peft.errors import AdapterError

SHARE = 1e-3
"""Entries that change by less than this fraction of the largest change count as unchanged."""


@torch.no_grad()
def check_samples(model: nn.Module, layers: Mapping[str, Any], args: Any, kwargs: dict[str, Any], count: int) -> None:
    """Checks that every layer has the samples along the first axis of its input, by changing one sample.

    The base model runs twice, the second time with the last sample replaced by the first. Only the entries of the last
    sample may change at the input of a layer.

    Args:
        model: The model.
        layers: Its layers by name.
        args: The arguments of the model, with the samples along the first axis.
        kwargs: The keyword arguments of the model.
        count: The number of samples.

    Raises:
        AdapterError: If a layer has the samples along another axis, or mixes them, so that scales would be applied to
            the wrong samples.
    """
    if count < 2:
        return
    first, last = (args, kwargs), tree_map_only(Tensor, lambda t: _changed(t, count), (args, kwargs))
    before, after = (_inputs(model, layers, given) for given in (first, last))
    for fqn, one in before.items():
        other = after.get(fqn, one[:0])
        fits = len(one) == len(other) and len(one) % count == 0
        if fits:
            change = (one - other).abs()
            rows = len(one) // count
            fits = float(change[: len(one) - rows].max()) <= SHARE * float(change.max())
        if not fits:
            raise AdapterError(
                f"The input of {fqn} does not have the {count} samples of the batch along its first axis, so "
                "adapter_names would apply scales to the wrong samples. Run one batch per adapter."
            )


def _changed(tensor: Tensor, count: int) -> Tensor:
    """Replaces the last sample of a batch by the first, flipped if both are equal."""
    if not tensor.dim() or tensor.shape[0] % count:
        return tensor
    rows = tensor.shape[0] // count
    changed = tensor.clone()
    changed[-rows:] = tensor[:rows]
    if torch.equal(changed, tensor) and tensor.dim() > 1:
        changed[-rows:] = tensor[:rows].flip(-1)
    return changed


def _inputs(model: nn.Module, layers: Mapping[str, Any], given: Any) -> dict[str, Tensor]:
    """Returns a random projection of every layer's input, one number per entry of the first axis."""
    found: dict[str, Tensor] = {}
    args, kwargs = given
    kwargs = {name: _private(value) for name, value in kwargs.items()}
    with ExitStack() as stack:
        for fqn, layer in layers.items():

            def look(module: Any, args: Any, fqn: str = fqn) -> None:
                x = args[0] if args else None
                if isinstance(x, Tensor) and x.dim():
                    rows = x.reshape(x.shape[0], -1).to(torch.float32)
                    found[fqn] = (rows @ _weights(rows.shape[1]).to(rows.device)).cpu()

            stack.callback(layer.base_layer.register_forward_pre_hook(look).remove)
        with _Off(layers.values()):
            model.forward(*args, **kwargs)
    return found


@lru_cache(maxsize=16)
def _weights(size: int) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(0))


def _private(value: Any) -> Any:
    """Copies arguments that a model may modify, such as a KV cache."""
    plain = value is None or isinstance(value, Tensor | bool | int | float | str | list | tuple)
    return value if plain else copy.deepcopy(value)


class _Off:
    """Disables the adapters of layers temporarily."""

    def __init__(self, layers: Iterable[Any]) -> None:
        self.layers = list(layers)

    def __enter__(self) -> None:
        self.before = [layer._disable_adapters for layer in self.layers]
        for layer in self.layers:
            layer._disable_adapters = True

    def __exit__(self, *_: object) -> None:
        for layer, state in zip(self.layers, self.before, strict=True):
            layer._disable_adapters = state
