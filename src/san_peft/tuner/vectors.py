"""The vectors of a layer: trained ones, and those that its anteriors hand on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from san_peft.functional import propagate, strengthen
from san_peft.tuner.config import SanConfig
from san_peft.tuner.sharded import whole


class ScaleVector(nn.Module):
    """A trainable vector kept as its offset from a constant: one for a scale and a gate, zero for a shift.

    Weight decay then pulls toward the identity, and half precision keeps small scales. Calling it gives a new tensor,
    never the parameter, so sharded and offloaded parameters work in a posterior layer as well. Of a vector in shards it
    is the whole one, so that a posterior in another unit of FSDP2 needs no unit for every vector.
    """

    def __init__(self, size: int, constant: float = 1.0, **factory: Any) -> None:
        super().__init__()
        self.constant, self.strength = constant, 1.0
        self.weight = nn.Parameter(torch.zeros(size, **factory))

    def forward(self) -> Tensor:
        """Returns constant plus offset, at the strength that is set, in float32 at least."""
        weight = whole(self.weight)
        vector = weight.to(torch.promote_types(weight.dtype, torch.float32)) + self.constant
        if self.strength == 1:
            return vector
        return strengthen(vector, self.strength) if self.constant else vector * self.strength

    def extra_repr(self) -> str:
        """Returns size and constant for `print`."""
        return f"{self.weight.numel()}, constant={self.constant}"


class Incoming:
    """One edge as its posterior layer sees it: the anterior's scales, by adapter, and the channel map.

    It holds the anterior's containers, not a parameter: casting, assigning and moving replace parameters.
    """

    def __init__(
        self,
        anterior: str,
        banks: tuple[nn.ModuleDict, ...],
        index: Tensor | None,
        config: SanConfig,
    ) -> None:
        self.anterior, self.banks, self.index = anterior, banks, index
        self.exponent, self.detach, self.bound = config.exponent_of(anterior), config.detach, config.bound

    def factor(self, adapter_name: str) -> Tensor:
        """Returns what this edge multiplies onto the input scale."""
        scale: Any = total_scale(self.banks, adapter_name)
        if self.index is not None and self.index.device != scale.device:
            self.index = self.index.to(scale.device)
        return propagate(scale.detach() if self.detach else scale, self.index, self.exponent, self.bound)


def total_scale(banks: tuple[nn.ModuleDict, ...], adapter_name: str) -> Tensor | None:
    """Returns the product of a layer's own scale and its host's, of those it has."""
    total = None
    for bank in banks:
        if adapter_name in bank:
            scale = bank[adapter_name]()
            total = scale if total is None else total * scale
    return total
