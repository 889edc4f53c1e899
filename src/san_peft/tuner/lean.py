"""Forward passes of LoRA and DoRA that give what PEFT's give, up to rounding, with fewer passes over the activations.

PEFT's LoRA makes three tensors of the size of the output (the update, its product with the scaling, the sum) and one
more in the backward pass; here the scaling meets the activation of rank r, and the update is added in place. PEFT's
DoRA forms the whole of $B A$, and a copy of the weight, to take row norms; here they come from `low_rank_norm`, and the
magnitude acts through `scale_output`, which keeps no activation of its own. Where nothing stands between the modules of
a dense layer and its adapter, `in_one_pass` takes both together.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Conv1d, Conv2d, Linear, LoraVariant
from peft.tuners.lora.variants import DoraConv1dVariant, DoraConv2dVariant, DoraLinearVariant
from torch import Tensor, nn

from san_peft.decomposition import adapted_linear, low_rank_norm
from san_peft.functional import NEAR_ZERO, scale_output
from san_peft.tuner.decompose import RowNorms
from san_peft.tuner.quantized import row_matrix
from san_peft.tuner.sharded import onloaded, whole, whole_product


def output_is_fresh(base: nn.Module) -> bool:
    """Whether nobody but the caller holds a frozen layer's output, so that it may be overwritten."""
    return type(base) in (nn.Linear, nn.Conv1d, nn.Conv2d) and not base._forward_hooks


def make_lean(host: Any, adapter_name: str, norms: RowNorms) -> None:
    """Gives one adapter of a LoRA layer its lean forward pass; other variants of LoRA keep their own."""
    present = getattr(host, "lora_variant", {}).get(adapter_name)
    if type(present) in DORA:
        host.lora_variant[adapter_name] = DORA[type(present)]()
        vars(host).setdefault("san_norms", {})[adapter_name] = norms
    elif present is None and type(host) in (Linear, Conv1d, Conv2d):
        host.lora_variant[adapter_name] = LeanLora()


def make_plain(host: Any, adapter_name: str) -> None:
    """Takes `make_lean` back."""
    present = getattr(host, "lora_variant", {}).get(adapter_name)
    if isinstance(present, LeanLora):
        del host.lora_variant[adapter_name]
    elif isinstance(present, _LeanDora):
        host.lora_variant[adapter_name] = next(plain for plain, lean in DORA.items() if type(present) is lean)()
        del host.san_norms[adapter_name]


def _comes_first(module: Any, adapter_name: str) -> bool:
    """Whether an adapter is the first of its layer to act: before it, the output is the frozen layer's own."""
    for name in module.active_adapters:
        if name in module.lora_A:
            return name == adapter_name
    return False


def _update(module: Any, adapter_name: str, x: Tensor) -> Tensor:
    """The low-rank update, the scaling included."""
    lora_B, scaling = module.lora_B[adapter_name], module.scaling[adapter_name]
    hidden = module.lora_A[adapter_name](x)
    return lora_B(hidden) * scaling if module.lora_bias[adapter_name] else lora_B(hidden * scaling)


def in_one_pass(host: Any, x: Tensor) -> Tensor | None:
    """Returns what a LoRA or DoRA layer gives by `adapted_linear`, or `None` where that does not do.

    It does for one active adapter on a plain dense layer, with nothing between their modules that would have to run:
    dropout, hooks, another type, shards, offloading, autocast.
    """
    if type(host) is not Linear or torch.compiler.is_compiling() or host.disable_adapters or host.merged:
        return None
    names = [name for name in host.active_adapters if name in host.lora_A]
    base = host.base_layer
    if len(names) != 1 or type(base) is not nn.Linear or torch.is_autocast_enabled(x.device.type):
        return None
    name = names[0]
    lora_A: Any = host.lora_A[name]
    lora_B: Any = host.lora_B[name]
    dropout = host.lora_dropout[name]
    if (host.training and not isinstance(dropout, nn.Identity)) or lora_B.bias is not None:
        return None
    if any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in (host, base, lora_A, lora_B)):
        return None
    tensors = base.weight, lora_A.weight, lora_B.weight, *(() if base.bias is None else (base.bias,))
    if any(type(t) is not nn.Parameter or t.is_meta or t.dtype != x.dtype for t in tensors):
        return None
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return None
    variant, magnitude = host.lora_variant.get(name), None
    if type(variant) is LeanDoraLinear:
        magnitude = _vectors(host, name)[0].to(x.dtype)
        if bool((magnitude.detach().abs() < NEAR_ZERO).any()):
            return None
    elif type(variant) is not LeanLora:
        return None
    return adapted_linear(x, base.weight, base.bias, lora_A.weight, lora_B.weight, host.scaling[name], magnitude)


class LeanLora(LoraVariant):
    """LoRA whose update is added to the frozen layer's output in place."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """Returns the layer's output with this adapter."""
        update = _update(module, active_adapter, module.lora_dropout[active_adapter](x))
        fresh = output_is_fresh(module.get_base_layer()) and _comes_first(module, active_adapter)
        return result.add_(update) if fresh else result + update

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Returns the weight with this adapter."""
        return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Adds this adapter to the weight."""
        orig_weight.data += module.get_delta_weight(active_adapter)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Returns the weight without this adapter."""
        return orig_weight.data - module.get_delta_weight(active_adapter).to(orig_weight.dtype)


class _LeanDora:
    """DoRA with factored row norms; mixed into PEFT's variant for the kind of layer."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """Returns the layer's output with this adapter."""
        base, dropout = module.get_base_layer(), module.lora_dropout[active_adapter]
        if base.weight.is_meta:
            with onloaded(module, base.weight):
                magnitude, bias = _vectors(module, active_adapter)
        else:
            magnitude, bias = _vectors(module, active_adapter)
        channel_dim = -1 if base.weight.dim() == 2 else 1 - base.weight.dim()
        if module.training and not isinstance(dropout, nn.Identity):
            x = dropout(x)
            frozen = _without_bias(module.base_layer(x), bias, channel_dim)
            return (
                result
                + scale_output(frozen + _update(module, active_adapter, x), magnitude, None, channel_dim)
                - frozen
            )
        update = _update(module, active_adapter, x)
        fresh = output_is_fresh(base) and _comes_first(module, active_adapter)
        total = result.add_(update) if fresh else (result + update).to(result.dtype)
        shift = None if bias is None else bias * (1 - magnitude)
        return scale_output(total, magnitude, shift, channel_dim, inplace=fresh)


def _vectors(module: Any, adapter_name: str) -> tuple[Tensor, Tensor | None]:
    """The magnitude over the norm of the adapted weight's rows, and the frozen bias."""
    magnitude = whole(module.lora_magnitude_vector[adapter_name].weight).flatten()
    return magnitude / _norm(module, adapter_name), module.get_base_layer().bias


@torch.no_grad()
def _norm(module: Any, adapter_name: str) -> Tensor:
    """Row norms of the adapted weight; DoRA takes no gradient through them."""
    down = whole(module.lora_A[adapter_name].weight).flatten(1)
    up = whole(module.lora_B[adapter_name].weight).flatten(1)
    product = whole_product(row_matrix(module.get_base_layer()), down)
    return low_rank_norm(product, down, up, module.san_norms[adapter_name](), module.scaling[adapter_name])


def _without_bias(output: Tensor, bias: Tensor | None, channel_dim: int) -> Tensor:
    return output if bias is None else output - bias.view(-1, *[1] * (-1 - channel_dim))


class LeanDoraLinear(_LeanDora, DoraLinearVariant):
    """Of a dense layer."""


class LeanDoraConv1d(_LeanDora, DoraConv1dVariant):
    """Of a one-dimensional convolution."""


class LeanDoraConv2d(_LeanDora, DoraConv2dVariant):
    """Of a two-dimensional convolution."""


DORA: dict[Any, Any] = {
    DoraLinearVariant: LeanDoraLinear,
    DoraConv1dVariant: LeanDoraConv1d,
    DoraConv2dVariant: LeanDoraConv2d,
}
"""The lean variant of each of PEFT's; that of a dense layer serves quantised ones too."""
