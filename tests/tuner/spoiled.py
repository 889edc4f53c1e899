"""Layers that are merged wrongly, to see whether it is noticed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from san_peft import SanLayer

NEUTRAL = {"scale": torch.ones_like, "input_scale": torch.ones_like, "shift": torch.zeros_like}


def parts_of(layer: SanLayer, adapter_name: str = "default") -> list[str]:
    """All that can be forgotten when a layer is merged: its factors and its host."""
    factors = layer.factors(adapter_name)
    found = [part for part in factors._fields if getattr(factors, part) is not None]
    return [*found, "host"] if layer.host is not None else found


@contextmanager
def forgetting(layer: SanLayer, part: str) -> Iterator[None]:
    """Lets a layer forget a part of the adapter when it is merged, for as long as the context lasts."""
    name = "_with_hosts" if part == "host" else "factors"
    right = getattr(layer, name)

    def without_host(before, parts):
        return tuple(None if tensor is None else tensor.float() for tensor in before)

    def without_factor(adapter_name):
        given = right(adapter_name)
        return given._replace(**{part: NEUTRAL[part](getattr(given, part))})

    setattr(layer, name, without_host if part == "host" else without_factor)
    try:
        yield
    finally:
        delattr(layer, name)


@contextmanager
def off_by(layer: SanLayer, place: str, channel: int, factor: float) -> Iterator[None]:
    """Lets a layer's merged row, column, or entry of the bias come out wrong, for as long as the context lasts."""
    right = layer._folded

    def wrong(before, parts):
        weight, bias = right(before, parts)
        if place == "bias":
            bias[channel] *= factor
        elif (place == "row") != layer.transposed:
            weight[channel] *= factor
        else:
            weight[:, channel] *= factor
        return weight, bias

    layer._folded = wrong
    try:
        yield
    finally:
        del layer._folded
