"""Methods that PEFT's conversion to LoRA calls on every layer."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

from san_peft.tuner.quantized import is_quantized


class ToolLayer:
    """Implements PEFT's interface for conversion to LoRA."""

    san_scale: Any
    san_incoming: Any
    san_name: str
    host: Any
    get_base_layer: Any
    get_delta: Any

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Returns the change of the weight if only this adapter is merged, in the shape of the weight.

        Raises:
            MergeError: If adapters are merged, or the weight is quantised.
        """
        return self.get_delta(adapter_name)[0]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Returns whether PEFT's `convert_to_lora` is exact for this layer at full rank.

        PEFT converts only the weights of linear target layers. If something would be lost, a warning says what;
        `san_peft.save_as_lora` converts such layers as well.
        """
        layer: Any = self
        base, reason = self.get_base_layer(), None
        if self.host is not None:
            reason = "has a host"
        elif isinstance(base, nn.Conv1d | nn.Conv2d):
            reason = "is a convolution"
        elif self.san_incoming.get(adapter_name) and adapter_name not in self.san_scale:
            reason = "is not a target, but has a propagated scale"
        elif is_quantized(base) or layer.merged:
            reason = "is quantised or merged"
        elif bool(self.get_delta(adapter_name)[1].any()):
            reason = "changes its bias"
        if reason is not None:
            warnings.warn(
                f"PEFT's conversion to LoRA supports only weights of linear targets, but {self.san_name} {reason}. "
                "Use san_peft.save_as_lora.",
                stacklevel=4,
            )
        return reason is None
