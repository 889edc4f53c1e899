"""Detects and dequantises quantised frozen weights."""

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
"""Parameter classes of bitsandbytes, by name, since it may not be installed."""
SUBCLASSES = ("torchao.", "optimum.quanto.")
"""Packages whose weights are tensor subclasses with a `dequantize` method."""

PACKED = ("qweight", "W_q", "weight_packed", "codebooks")
"""Attributes that replace the weight in layers of GPTQ, AWQ, HQQ, compressed-tensors and AQLM."""


def is_quantized(base: Any) -> bool:
    """Returns whether a frozen layer's weight is quantised."""
    own = {**vars(base)["_buffers"], **vars(base)["_parameters"]}
    weight = own.get("weight")
    if weight is None:  # computed in the forward pass, or stored under another name
        return False
    kind = type(weight)
    packed = kind.__name__ in BITSANDBYTES or kind.__module__.startswith(SUBCLASSES)
    return packed or not weight.dtype.is_floating_point or weight.dtype.itemsize < 2


def is_packed(module: nn.Module) -> bool:
    """Returns whether a module is a quantised layer that SAN cannot adapt, since it has no weight."""
    return any(hasattr(module, name) for name in PACKED) or "quant" in type(module).__name__.lower()


def dense_weight(base: Any) -> Tensor:
    """Returns a frozen layer's weight, dequantised into a new tensor if needed.

    Raises:
        MergeError: If the weight cannot be dequantised.
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
        f"The weight of a {type(base).__name__} ({weight.dtype}) cannot be dequantised. Load the model without "
        "quantisation, and apply the adapter to it."
    )


def keep_exact(model: nn.Module) -> None:
    """Keeps bitsandbytes layers in a state that can be dequantised and trained.

    On some CPUs bitsandbytes repacks 4-bit weights when they run in eval mode, which rounds block scales to bfloat16
    and disables gradients; this turns repacking off. An 8-bit layer that has run stores its statistics outside of its
    weight, where PEFT does not find them; this moves them back.

    Raises:
        AdapterError: If 4-bit weights have already been repacked.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    repacked = [name for name, module in modules.items() if _is_repacked(module)]
    if repacked:
        raise AdapterError(
            f"{len(repacked)} 4-bit layers, such as {repacked[0]}, have run on this CPU before the adapter was added, "
            "so bitsandbytes has repacked them into an inexact format without gradients. Load the model again, and add "
            "the adapter before it runs."
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
    """Returns a frozen layer's dequantised weight with one row per output channel, as a view if possible."""
    weight = dense_weight(base)
    return weight.t() if isinstance(base, Conv1D) else weight.flatten(1)


def unpacked_product(base: Any, rows: Tensor) -> Tensor:
    """Computes `weight_product` of a quantised weight, without saving the dequantised weight for backward."""
    if torch.compiler.is_compiling():
        return weight_product(row_matrix(base), rows)
    return _UnpackedProduct.apply(base, rows)


class _UnpackedProduct(torch.autograd.Function):
    """Multiplies by a quantised weight, which the backward pass dequantises again."""

    @staticmethod
    def forward(ctx: Any, base: Any, rows: Tensor) -> Tensor:
        ctx.base, ctx.dtype = base, rows.dtype
        return weight_product(row_matrix(base), rows)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        return None, torch.mm(grad.t(), row_matrix(ctx.base).to(grad.dtype)).to(ctx.dtype)


def make_dense_layer(base: Any, dtype: torch.dtype | None = None) -> nn.Linear:
    """Converts a quantised layer to a dense layer, in `dtype` or the dtype of the dequantised weight."""
    weight = dense_weight(base)
    with torch.device("meta"):
        dense = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None)
    dense.weight = nn.Parameter(weight.to(dtype or weight.dtype), requires_grad=False)
    if base.bias is not None:
        dense.bias = nn.Parameter(base.bias.detach().to(dense.weight.dtype), requires_grad=False)
    return dense.train(base.training)


def forget_quantization(model: nn.Module) -> nn.Module:
    """Removes the quantisation config and flags of transformers from a model, if all its weights are dense.

    This includes models loaded from a GGUF file, which are dense but have a quantisation config.

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
