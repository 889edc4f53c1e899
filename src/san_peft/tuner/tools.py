"""What diffusers and PEFT's tools ask of every layer: its strength at run time, and what it would be as LoRA."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from san_peft.tuner.quantized import is_quantized


class ToolLayer:
    """The part of `SanLayer` that such tools call.

    With a strength $w$ a scale of the layer's own is $1 + w (g - 1)$, and its shift $w t$. A host has a strength of its
    own, which these methods leave alone: tools ask every layer, hosts as well. The strength is not saved.
    """

    san_scale: Any
    san_shift: Any
    san_scales: Any
    san_incoming: Any
    san_name: str
    host: Any
    get_base_layer: Any
    get_delta: Any

    def set_scale(self, adapter: str, scale: float) -> None:
        """Sets the strength of an adapter in this layer, zero for none and one for all of it."""
        self._set_strength([adapter], lambda strength: scale)

    def scale_layer(self, scale: float) -> None:
        """Multiplies the strength of the active adapters."""
        self._set_strength(None, lambda strength: strength * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the strength of the active adapters; `None` sets it to one again."""
        self._set_strength(None, lambda strength: 1.0 if scale is None else strength / scale)

    def _set_strength(self, adapter_names: Sequence[str] | None, change: Callable[[float], float]) -> None:
        layer: Any = self
        names = layer.active_adapters if adapter_names is None else adapter_names
        for bank in (self.san_scale, self.san_shift):
            for name in (name for name in names if name in bank):
                bank[name].strength = float(change(bank[name].strength))
        self.san_scales.changed()

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Returns what merging one adapter alone changes in the weight, of the weight's shape.

        Raises:
            MergeError: If adapters are merged, or the weight is quantised.
        """
        return self.get_delta(adapter_name)[0]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's `convert_to_lora` gives, at full rank, what an adapter does here.

        It converts the weights of linear layers that are targets, and nothing else. Where it would lose something a
        warning says what; `san_peft.save_as_lora` converts such layers as well.
        """
        layer: Any = self
        base, reason = self.get_base_layer(), None
        if self.host is not None:
            reason = "has a host"
        elif isinstance(base, nn.Conv1d | nn.Conv2d):
            reason = "is a convolution"
        elif self.san_incoming.get(adapter_name) and adapter_name not in self.san_scale:
            reason = "is no target, and reads propagated scales"
        elif is_quantized(base) or layer.merged:
            reason = "is quantised or merged"
        elif bool(self.get_delta(adapter_name)[1].any()):
            reason = "changes its bias"
        if reason is not None:
            warnings.warn(
                f"PEFT's conversion to LoRA takes the weights of linear targets alone, and {self.san_name} {reason}. "
                "Use san_peft.save_as_lora.",
                stacklevel=4,
            )
        return reason is None
