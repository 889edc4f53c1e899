"""Inspects frozen layers: where they store their weight, and whether scales can be merged into it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from transformers.pytorch_utils import Conv1D

from san_peft.errors import MergeError
from san_peft.functional import channels_of, fold
from san_peft.tuner.quantized import is_quantized

TRANSPOSED = (_ConvTransposeNd, Conv1D, nn.Embedding)
"""Layers whose weight has the input axis first."""

_KEPT = ("weight", "in_proj_weight", "q_proj_weight", "weight_v", "weight_orig")
"""Names under which torch's layers store a weight, including the legacy `weight_norm` and `spectral_norm`."""

_PLAIN = {
    kind.forward
    for kind in (
        nn.Linear,
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.ConvTranspose3d,
        nn.Embedding,
        nn.MultiheadAttention,
        Conv1D,
    )
}
"""Forward passes that use the weight without transforming it."""


def stored_weight(base: Any) -> Tensor:
    """Returns the tensor in which a layer stores its weight, for its dtype and device.

    For a layer that computes its weight in every forward pass (`weight_norm`, `spectral_norm`, parametrizations), this
    is the tensor from which the weight is computed.
    """
    own = vars(base)["_parameters"]
    for name in _KEPT:
        if own.get(name) is not None:
            return own[name]
    parametrized = vars(base)["_modules"].get("parametrizations")
    if parametrized is not None and "weight" in parametrized:
        return next(parametrized["weight"].parameters(recurse=False))
    return base.weight


def stored_bias(base: Any) -> Tensor | None:
    """Returns a layer's bias, or `None` if it has none."""
    own = vars(base)["_parameters"]
    return own.get("bias" if "bias" in own else "in_proj_bias")


def has_plain_forward(base: Any) -> bool:
    """Returns whether a layer's forward pass is that of torch, or of transformers' `Conv1D`."""
    return type(base).forward in _PLAIN


@torch.no_grad()
def follows_weight(base: Any) -> bool:
    r"""Returns whether $f(\operatorname{diag}(g) W \operatorname{diag}(s); x) = g \odot f(W; s \odot x)$ on a probe.

    This is false for a layer that normalises its weight in the forward pass, which would undo merged scales.
    """
    if isinstance(base, nn.MultiheadAttention):
        return False
    weight, groups, transposed = base.weight, getattr(base, "groups", 1), isinstance(base, TRANSPOSED)
    generator = torch.Generator().manual_seed(0)
    out, size = channels_of(weight, groups, transposed)
    scale, input_scale = (0.5 + torch.rand(n, generator=generator).to(weight.device) for n in (out, size))
    is_table = isinstance(base, nn.Embedding)
    x = _probe(base, generator)
    dim = 1 if isinstance(base, _ConvNd) else -1
    shape = [-1 if d == dim % x.dim() else 1 for d in range(x.dim())]
    input_scale = None if is_table else input_scale
    training, own, forward = base.training, weight.data, type(base).forward
    base.training = False
    try:
        with _without_bias(base):
            expected = forward(base, x if input_scale is None else x * input_scale.view(shape).to(x.dtype))
            expected = expected * (scale if is_table else scale.view(shape)).to(expected.dtype)
            base.weight.data = fold(own, None, scale, input_scale, groups=groups, transposed=transposed)[0]
            found = forward(base, x)
    except Exception:  # other inputs or outputs than one tensor; `merge_and_verify` reports the layer as unchecked
        return True
    finally:
        base.weight.data, base.training = own, training
    tolerance = 1e-3 if weight.dtype.itemsize > 2 else 5e-2
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().amax()))


@contextmanager
def _without_bias(base: Any) -> Iterator[None]:
    """Sets a layer's bias to zero temporarily."""
    bias: Any = vars(base)["_parameters"].get("bias")
    kept: Any = None if bias is None else bias.data
    try:
        if bias is not None:
            bias.data = torch.zeros_like(kept)
        yield
    finally:
        if bias is not None:
            bias.data = kept


def _probe(base: Any, generator: torch.Generator) -> Tensor:
    """Returns a random input that uses every entry of the weight."""
    weight = base.weight
    if isinstance(base, nn.Embedding):
        return torch.arange(min(8, base.num_embeddings), device=weight.device)
    if isinstance(base, _ConvNd):
        extent = [(k - 1) * d + 2 for k, d in zip(base.kernel_size, base.dilation, strict=True)]
        shape = [2, base.in_channels, *extent]
    else:
        shape = [2, weight.shape[0 if isinstance(base, Conv1D) else 1]]
    return torch.randn(shape, generator=generator).to(weight.device, weight.dtype)


def check_mergeable(base: Any) -> None:
    """Raises `MergeError` if scales merged into a layer's weight would be lost.

    This is the case if the weight is quantised, or is computed or normalised in every forward pass.
    """
    own = vars(base)["_parameters"]
    for name in ("weight", "bias"):
        if name not in own and getattr(base, name, None) is not None:
            raise MergeError(
                f"A {type(base).__name__} computes its {name} in every forward pass (weight_norm, spectral_norm or "
                "another parametrization), so nothing can be merged into it. Remove the parametrization first with "
                "torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm or remove_spectral_norm."
            )
    kind = type(base).__name__
    if is_quantized(base):
        raise MergeError(
            f"A {kind} has a quantised weight, which would round small scales away. Call "
            "san_peft.dequantize(model) first, which replaces quantised layers by dense ones."
        )
    if getattr(base, "max_norm", None) is not None:
        raise MergeError(
            f"An {kind} with max_norm={base.max_norm} renormalises its rows in the forward pass, which would undo "
            "merged scales. Set max_norm to None, or serve the adapter unmerged."
        )
    if not (has_plain_forward(base) or stored_weight(base).is_meta or follows_weight(base)):
        raise MergeError(
            f"The forward pass of a {kind} transforms its weight, such as by standardisation, which would undo merged "
            "scales. Serve the adapter unmerged, or leave such layers out of target_modules."
        )
