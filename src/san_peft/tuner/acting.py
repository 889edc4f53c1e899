"""Provides the adapted weight and bias to modules that read them without calling the layer.

`nn.MultiheadAttention` multiplies with `out_proj.weight`, `nn.TransformerEncoderLayer` passes all its weights to one
fused operation in eval mode, timm's BEiT calls `F.linear(x, self.qkv.weight)`. Each of them gets the weight as if the
adapter were merged, with gradients to the scales. Since most callers read only the dtype or the device, the values are
computed lazily, when an operation uses them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from san_peft.errors import SanError
from san_peft.scaling import spread
from san_peft.tuner._peft import TunerLayer
from san_peft.tuner.decompose import has_adapter, type_of
from san_peft.tuner.fill import Vectors
from san_peft.tuner.frozen import stored_weight
from san_peft.tuner.quantized import is_quantized
from san_peft.tuner.sharded import is_sharded

_SEEN = {
    *(
        getattr(Tensor, name).__get__  # type: ignore[attr-defined]
        for name in (
            "device dtype grad grad_fn is_cpu is_cuda is_leaf is_meta is_mps is_nested is_quantized is_sparse is_xpu "
            "itemsize layout nbytes ndim requires_grad shape _version"
        ).split()
    ),
    *(
        getattr(Tensor, name)
        for name in (
            "__len__ dim element_size get_device is_complex is_contiguous is_floating_point is_inference is_signed "
            "nelement numel size storage_offset stride"
        ).split()
    ),
}
"""Attributes and methods of a tensor that do not need its values."""


class ActingTensor(Tensor):
    """Represents the adapted weight or bias of a layer; computes its values when an operation uses them.

    It has the shape, dtype and device of the frozen tensor. It cannot be written, and its memory address cannot be
    read, since both would bypass the scales. If only scales are active, `mul_` and `div_` by a number are applied to
    the frozen tensor, since they commute with scales.
    """

    _make: Callable[[], Tensor | None]
    _name: str
    _trained: bool
    _frozen: Tensor | None

    @staticmethod
    def of(
        like: Tensor, name: str, trained: bool, make: Callable[[], Tensor | None], frozen: Tensor | None = None
    ) -> ActingTensor:
        """Creates a tensor whose values are computed by `make`.

        Args:
            like: The frozen tensor.
            name: The name of the tensor in error messages.
            trained: Whether gradients flow to the adapter.
            make: Computes the values.
            frozen: The frozen tensor, if it may be multiplied by numbers in place.
        """
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            ActingTensor, like.shape, like.stride(), dtype=like.dtype, layout=like.layout, device=like.device
        )
        made._make, made._name, made._trained, made._frozen = make, name, trained, frozen
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"ActingTensor({self._name}, shape={tuple(self.shape)}, dtype={self.dtype})"

    def _values(self) -> Tensor:
        if self._trained and not torch.is_grad_enabled():
            raise SanError(
                f"{self._name} is used inside an autograd function or a fused kernel, so no gradient would reach the "
                "scales. Leave the layer out of target_modules, or train with the plain PyTorch implementation of the "
                "module that uses it."
            )
        made: Any = self._make()
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _SEEN:
            return super().__torch_function__(func, types, args, kwargs)
        name = getattr(func, "__name__", "")
        first = args[0] if args else None
        if isinstance(first, ActingTensor):
            if func == Tensor.data.__get__:  # type: ignore[attr-defined]
                return ActingTensor.of(first, first._name, False, lambda: cast(Tensor, first._make()).detach())
            writes = (name.endswith("_") and not name.endswith("__")) or name in ("__set__", "__setitem__")
            if writes or (name.startswith("__i") and name not in ("__index__", "__int__", "__invert__")):
                if first._frozen is not None and name in ("mul_", "div_") and isinstance(args[1], int | float):
                    func(first._frozen, args[1])
                    return first
                raise SanError(
                    f"{first._name} is computed from the frozen layer and its adapter, so it cannot be written. "
                    "Modify the weight of the layer's get_base_layer()."
                )
            if name == "data_ptr":
                raise SanError(
                    f"{first._name} is read by its memory address, which would bypass its scales. Merge the adapter "
                    "first, or leave the layer out of target_modules."
                )
        args, kwargs = tree_map_only(ActingTensor, ActingTensor._values, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(ActingTensor, ActingTensor._values, (args, kwargs or {}))
        return func(*args, **kwargs)


class ActingLayer(TunerLayer):
    """Implements the attributes `weight` and `bias` of `SanLayer`."""

    host: Any
    fold_vectors: Any
    has_part: Any
    san_mode: str
    out_features: int
    parameters: Any
    san_incoming: Any
    san_name: str
    san_scales: Any
    san_shift: Any
    training: bool

    @property
    def weight(self) -> Any:
        """Returns the adapted weight, for modules that read it without calling the layer."""
        base: Any = self.get_base_layer()
        frozen = base.qweight if hasattr(base, "qweight") else base.weight
        return self._acting(base, frozen, "weight", 0)

    @property
    def bias(self) -> Any:
        """Returns the adapted bias, for modules that read it without calling the layer."""
        base: Any = self.get_base_layer()
        frozen = base.bias
        if frozen is None:
            if not self._acts(base) or not any(name in self.san_shift for name in self.active_adapters):
                return None
            weight = stored_weight(base)
            frozen = weight.new_empty(self.out_features)
        return self._acting(base, frozen, "bias", 1)

    def _acts(self, base: Any) -> bool:
        """Returns whether an adapter is active, so that weight and bias differ from the frozen ones."""
        if self.disable_adapters or self.merged or self.san_mode == "off" or not hasattr(self, "san_scales"):
            return False
        if not any(self.has_part(name) for name in self.active_adapters):
            return False
        weight = stored_weight(base)
        return not (weight.is_meta or hasattr(base, "qweight") or is_quantized(base) or is_sharded(weight))

    def _acting(self, base: Any, frozen: Tensor, name: str, number: int) -> Any:
        if not self._acts(base):
            return frozen
        if torch.compiler.is_compiling():
            return self.acting_tensors()[number]
        trained = torch.is_grad_enabled() and self._is_trained()
        scaled = self.host is None and not any(adapter in self.san_shift for adapter in self.active_adapters)
        return ActingTensor.of(
            frozen,
            f"The {name} of {self.san_name}",
            trained,
            lambda: self.acting_tensors()[number],
            frozen if scaled else None,
        )

    def _is_trained(self) -> bool:
        """Returns whether this layer or one of its anterior layers has trainable parameters."""
        layers = self.san_scales.layers
        names = {edge.anterior for edges in self.san_incoming.values() for edge in edges}
        return any(
            p.requires_grad for one in (self, *(layers[n] for n in names if n in layers)) for p in one.parameters()
        )

    def acting_tensors(self) -> tuple[Tensor, Tensor | None]:
        """Computes the adapted weight and bias, with gradients.

        Raises:
            SanError: If the batch has `adapter_names`, since one weight serves all samples, or the host is not LoRA.
        """
        weight, bias = self._hosted_tensors()
        return self.fold_vectors(weight, bias, *self._acting_vectors(), weight.dtype)

    def _acting_vectors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Returns scale, input scale and shift in the current mode, as differentiable tensors."""
        scales, weight = self.san_scales, stored_weight(self.get_base_layer())
        if scales.mixed:
            raise SanError(
                f"adapter_names cannot be used here: the weight of {self.san_name} is read without calling the layer, "
                "so it is the same for all samples. Run one batch per adapter."
            )
        vectors: Vectors = scales.of(self)
        rows, columns = self.san_mode in ("both", "neuron"), self.san_mode in ("both", "synapse")
        scale = spread(vectors.scale) if rows and vectors.scale is not None else None
        input_scale = spread(vectors.input_scale) if columns and vectors.input_scale is not None else None
        shift = vectors.shift if rows else None
        scale, input_scale, shift = (None if v is None else v.to(weight.device) for v in (scale, input_scale, shift))
        return scale, input_scale, shift

    def _hosted_tensors(self) -> tuple[Tensor, Tensor | None]:
        """Computes weight and bias of the frozen layer plus the host's update."""
        base: Any = self.get_base_layer()
        host = self.host
        weight, bias = base.weight, getattr(base, "bias", None)
        names = [name for name in self.active_adapters if has_adapter(host, name)] if self.san_mode != "synapse" else []
        if not names:
            return weight, bias
        plain = type_of(host) == "LORA" and not any(
            host.lora_variant.get(name) is not None or host.lora_bias.get(name) for name in names
        )
        if not plain:
            raise SanError(
                f"The weight of {self.san_name} is read without calling the layer, which is supported for LoRA hosts "
                f"without variants and biases, not for this {type_of(host)} host. Merge the adapter first, or leave "
                "the layer out of target_modules."
            )
        if self.training and any(not isinstance(host.lora_dropout[name], nn.Identity) for name in names):
            raise SanError(
                f"The weight of {self.san_name} is read without calling the layer, so LoRA's dropout cannot be applied "
                "to its input. Use lora_dropout=0, or leave the layer out of target_modules."
            )
        for name in names:
            weight = weight + host.get_delta_weight(name).to(weight.dtype)
        return weight, bias


FAST: dict[type[nn.Module], tuple[str, Any]] = {
    nn.TransformerEncoder: ("use_nested_tensor", False),
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
}
"""Attribute and value that disable the fast path of torch's modules, which bypasses layers and norms."""


def set_fast_paths(model: nn.Module, allowed: bool) -> None:
    """Disables or restores the fast path of torch's encoders, which bypasses the forward passes of their modules.

    An encoder with nested tensors checks only its first layer, and a compiled one does not notice that a weight is an
    `ActingTensor` or that a norm applies a scale.

    Args:
        model: The model.
        allowed: `False` disables the fast path of encoders with adapted layers; `True` restores the original setting.
    """
    for module in model.modules():
        name, value = next((v for kind, v in FAST.items() if isinstance(module, kind)), ("", None))
        own: Any = vars(module)
        if name not in own:
            continue
        if allowed and "san_fast" in own:
            own[name] = own.pop("san_fast")
        elif not allowed and "san_fast" not in own and any(isinstance(m, ActingLayer) for m in module.modules()):
            own["san_fast"], own[name] = own[name], value
