"""Frozen weights that are kept quantised: the one place that knows of them, and unpacks them."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from san_peft.errors import AdapterError, MergeError
from san_peft.products import weight_product
from san_peft.propagation.untouched import REPACKS

BITSANDBYTES = ("Params4bit", "Int8Params")
SUBCLASSES = ("torchao.", "optimum.quanto.")
"""Packages whose weights are tensors that unpack themselves."""

PACKED = ("qweight", "W_q", "weight_packed", "codebooks")
"""What layers of GPTQ, AWQ, HQQ, compressed-tensors and AQLM have in the place of a weight."""


def is_quantized(base: Any) -> bool:
    """Whether a frozen layer's weight is kept in a quantised form."""
    own = {**vars(base)["_buffers"], **vars(base)["_parameters"]}
    weight = own.get("weight")
    if weight is None:  # made in the forward pass, or under other names
        return False
    kind = type(weight)
    packed = kind.__name__ in BITSANDBYTES or kind.__module__.startswith(SUBCLASSES)
    return packed or not weight.dtype.is_floating_point or weight.dtype.itemsize < 2


def is_packed(module: nn.Module) -> bool:
    """Whether a module that SAN cannot adapt is a quantised layer without a weight."""
    return any(hasattr(module, name) for name in PACKED) or "quant" in type(module).__name__.lower()


def dense_weight(base: Any) -> Tensor:
    """Returns a frozen layer's weight, unpacked into a new tensor where it is quantised; the layer stays as it is.

    Raises:
        MergeError: If the weight is quantised in a way that cannot be unpacked.
    """
    weight = base.weight
    if not is_quantized(base):
        return weight.detach()
    with torch.no_grad():
        if type(weight).__name__ in BITSANDBYTES and not _is_repacked(base):
            return dequantize_bnb_weight(weight, state=getattr(base, "state", None))
        if type(weight).__module__.startswith(SUBCLASSES):
            return weight.dequantize()
    raise MergeError(
        f"The weight of a {type(base).__name__} ({weight.dtype}) cannot be unpacked here. Load the model anew, without "
        "quantisation, and put the adapter on that."
    )


def keep_exact(model: nn.Module) -> None:
    """Keeps bitsandbytes' layers in a state that can be unpacked and trained.

    On some CPUs it packs 4-bit weights anew when they run in eval mode, which rounds their blocks' scales to bfloat16
    and lets no gradient through from then on; that is switched off. An 8-bit layer that has run has its statistics
    elsewhere than on its weight, where PEFT looks for them; they are put back.

    Raises:
        AdapterError: If 4-bit weights have been packed anew already.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    repacked = [name for name, module in modules.items() if _is_repacked(module)]
    if repacked:
        raise AdapterError(
            f"{len(repacked)} 4-bit layers, such as {repacked[0]}, have run on this CPU before there was an adapter, "
            "for which bitsandbytes has packed them in a form that is inexact and lets no gradient through. Load the "
            "model again, and put the adapter on it before it runs."
        )
    for module in modules.values():
        if getattr(module, REPACKS, False):
            setattr(module, REPACKS, False)
        weight: Any = vars(module)["_parameters"].get("weight")
        if type(weight).__name__ == "Int8Params" and weight.SCB is None and hasattr(module, "state"):
            weight.SCB = module.state.SCB


def _is_repacked(module: Any) -> bool:
    state = getattr(vars(module)["_parameters"].get("weight"), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


def row_matrix(base: Any) -> Tensor:
    """Returns a frozen layer's weight with one row per output channel, dequantised; a view where it can be."""
    weight = dense_weight(base)
    return weight.t() if isinstance(base, Conv1D) else weight.flatten(1)


def unpacked_product(base: Any, rows: Tensor) -> Tensor:
    """Returns `weight_product` of a quantised weight; between the two passes nothing of it is kept unpacked."""
    if torch.compiler.is_compiling():
        return weight_product(row_matrix(base), rows)
    return _UnpackedProduct.apply(base, rows)


class _UnpackedProduct(torch.autograd.Function):
    """The product with a quantised weight, which the backward pass unpacks once more."""

    @staticmethod
    def forward(ctx: Any, base: Any, rows: Tensor) -> Tensor:
        ctx.base, ctx.dtype = base, rows.dtype
        return weight_product(row_matrix(base), rows)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        return None, torch.mm(grad.t(), row_matrix(ctx.base).to(grad.dtype)).to(ctx.dtype)


def make_dense_layer(base: Any, dtype: torch.dtype | None = None) -> nn.Linear:
    """Returns a dense layer that computes what a quantised one does, up to rounding, in `dtype` or as it unpacks."""
    weight = dense_weight(base)
    with torch.device("meta"):
        dense = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None)
    dense.weight = nn.Parameter(weight.to(dtype or weight.dtype), requires_grad=False)
    if base.bias is not None:
        dense.bias = nn.Parameter(base.bias.detach().to(dense.weight.dtype), requires_grad=False)
    return dense.train(base.training)


def forget_quantization(model: nn.Module) -> nn.Module:
    """Takes off what transformers notes on a quantised model, and would save and trust, once all its weights are dense.

    A model that was loaded from a GGUF file is dense from the start, and carries the note all the same.

    Returns:
        The same model.
    """
    if any(_has_packed_weight(module) for module in model.modules()):
        return model
    for module in model.modules():
        own: dict[str, Any] = vars(module)
        if own.get("hf_quantizer") is not None:
            own["hf_quantizer"].remove_quantization_config(module)
        for flag in ("is_loaded_in_8bit", "is_loaded_in_4bit"):
            if flag in own:
                setattr(module, flag, False)
        config: Any = own.get("config")
        if hasattr(config, "_is_quantized"):
            del config._is_quantized
    return model


def _has_packed_weight(module: Any) -> bool:
    own = vars(module)["_parameters"]
    quantized = own.get("weight") is not None and is_quantized(module)
    return quantized or any(name in own or name in vars(module)["_buffers"] for name in PACKED)
