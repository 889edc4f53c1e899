"""Trainable vectors of a layer, and the scales that it receives from its anterior layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from san_peft.functional import propagate, strengthen
from san_peft.tuner.config import SanConfig
from san_peft.tuner.sharded import whole


class ScaleVector(nn.Module):
    """Stores a trainable vector as the offset from a constant: one for scales and gates, zero for shifts.

    Weight decay then pulls towards the identity, and half precision does not round small offsets away. The forward pass
    returns a new tensor and gathers a sharded parameter, so that posterior layers in another FSDP2 unit can use it.
    """

    def __init__(self, size: int, constant: float = 1.0, **factory: Any) -> None:
        super().__init__()
        self.constant, self.strength = constant, 1.0
        self.weight = nn.Parameter(torch.zeros(size, **factory))

    def forward(self) -> Tensor:
        """Returns the vector at the current strength, in at least float32."""
        weight = whole(self.weight)
        vector = weight.to(torch.promote_types(weight.dtype, torch.float32)) + self.constant
        if self.strength == 1:
            return vector
        return strengthen(vector, self.strength) if self.constant else vector * self.strength

    def extra_repr(self) -> str:
        """Returns the size and the constant for `print`."""
        return f"{self.weight.numel()}, constant={self.constant}"


class Incoming:
    """Represents an edge in its posterior layer: the anterior layer's scales and the channel map.

    It refers to the anterior layer's containers rather than to parameters, since casting and moving replace parameters.
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
        """Returns the factor of this edge in the input scale."""
        scale: Any = total_scale(self.banks, adapter_name)
        if self.index is not None and self.index.device != scale.device:
            self.index = self.index.to(scale.device)
        return propagate(scale.detach() if self.detach else scale, self.index, self.exponent, self.bound)


def total_scale(banks: tuple[nn.ModuleDict, ...], adapter_name: str) -> Tensor | None:
    """Returns the product of a layer's trainable scale and its host's scale, or `None` if it has neither."""
    total = None
    for bank in banks:
        if adapter_name in bank:
            scale = bank[adapter_name]()
            total = scale if total is None else total * scale
    return total
