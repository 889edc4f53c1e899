"""Computes and caches constants of frozen layers: row norms, and the second moments of the columns."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from san_peft.tuner.quantized import dense_weight, is_quantized
from san_peft.tuner.sharded import is_sharded, whole


class RowNorms:
    """Computes and caches the row norms of a frozen weight; recomputes them if the weight changes.

    Args:
        host: The layer that hosts SAN.
        like_dora: Whether to round as PEFT's DoRA does, so that magnitude over norm starts at exactly one.
    """

    def __init__(self, host: BaseTunerLayer, like_dora: bool = False) -> None:
        self.host, self.like_dora = host, like_dora
        self.moments: Callable[[], Tensor | None] = _none
        # keyed by whether the weight is sharded, since FSDP2 alternates between both
        self._made: dict[bool, tuple[Any, Tensor]] = {}

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Returns the norms in at least float32, as the same tensor until the weight changes."""
        base: Any = self.host.get_base_layer()
        if torch.compiler.is_compiling():  # compiled code could not detect a stale cache
            return row_norms(base, self.like_dora, self.moments())
        weight, sharded = base.weight, is_sharded(base.weight)
        address = 0 if sharded or is_quantized(base) else weight.data_ptr()
        moments = self.moments()
        now = (*state_of(weight), address, id(moments))
        made = self._made.get(sharded)
        if made is None or made[0] != now:
            made = self._made[sharded] = (now, row_norms(base, self.like_dora, moments))
        return made[1]


def state_of(tensor: Tensor) -> tuple[Any, ...]:
    """Returns what changes when a tensor is replaced, moved, cast or written to."""
    return id(tensor), -1 if tensor.is_inference() else tensor._version, tensor.device, tensor.dtype


@torch.no_grad()
def row_norms(base: Any, like_dora: bool = False, moments: Tensor | None = None) -> Tensor:
    """Computes the row norms of a frozen layer's weight in at least float32, with columns weighted by moments."""
    weight = dense_weight(base)
    wide = torch.promote_types(weight.dtype, torch.float32)
    rows = weight.t() if isinstance(base, Conv1D) else weight.flatten(1)
    if moments is not None:
        rows = whole(rows).to(wide)
        return (rows.square() @ moments.to(rows)).sqrt()
    if not like_dora:
        return whole(torch.linalg.vector_norm(rows, dim=1, dtype=wide))
    if weight.dim() == 2:
        return whole(torch.linalg.norm(rows, dim=1)).to(wide)
    return whole(weight.norm(p=2, dim=tuple(range(1, weight.dim())))).to(wide)


def reference_norms(layers: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Computes the row norms before an initialisation moves part of the weight into the adapter."""
    found = {}
    for name, layer in layers.items():
        base: Any = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
        if not base.weight.is_meta:
            found[name] = row_norms(base)
    return found


def input_channels(base: Any) -> int:
    """Returns the number of input channels of a frozen layer."""
    if isinstance(base, Conv1D):
        return base.weight.shape[0]
    return base.in_features if isinstance(base, nn.Linear) else base.in_channels


def per_column(base: Any, moments: Tensor) -> Tensor:
    """Repeats one value per input channel to one per column of the weight as a matrix.

    For grouped convolutions, in which columns stand for other channels in each group, values are averaged over groups.
    """
    groups, positions = getattr(base, "groups", 1), math.prod(getattr(base, "kernel_size", (1,)))
    return moments.view(groups, -1).mean(0).repeat_interleave(positions)


def _none() -> None:
    return None
