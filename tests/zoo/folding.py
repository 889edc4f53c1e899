"""Folding vectors into frozen weights by hand, in a way of its own, for the laws to compare with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def fold_layer(module: Any, scale: Tensor | None, shift: Tensor | None, input_scale: Tensor | None) -> None:
    """Writes vectors into a layer's weight, brought into the shape (groups, rows, columns, kernel)."""
    groups = getattr(module, "groups", 1)
    across = type(module).__name__ == "Conv1D" or getattr(module, "transposed", False)  # inputs come first
    kept = module.weight
    weight = kept.view(groups, -1, *kept.shape[1:])
    weight = weight.transpose(1, 2) if across else weight
    axes = (1,) * (weight.dim() - 3)
    if input_scale is not None:
        weight = weight * input_scale.view(groups, 1, -1, *axes)
    if scale is not None:
        weight = weight * scale.view(groups, -1, 1, *axes)
    weight = weight.transpose(1, 2) if across else weight
    module.weight = nn.Parameter(weight.reshape(kept.shape).to(kept.dtype).clone())
    module.bias = _folded_bias(module.bias, scale, shift)


def _folded_bias(bias: Tensor | None, scale: Tensor | None, shift: Tensor | None) -> nn.Parameter | None:
    found = bias if bias is None or scale is None else bias * scale
    found = found if shift is None else shift if found is None else found + shift
    return None if found is None else nn.Parameter(found.clone())


def fold_attention(module: Any, scale: Tensor, shift: Tensor | None, input_scale: Tensor | None) -> None:
    """Writes vectors into the four projections of an attention that packs three of them."""
    width = module.embed_dim
    assert module.in_proj_weight is not None, "no attention of the zoo has keys of another size"
    columns = torch.ones_like(scale) if input_scale is None else input_scale
    ends = columns.view(4, width)
    packed = module.in_proj_weight.view(3, width, width) * ends[:3, None]
    module.in_proj_weight = nn.Parameter(packed.reshape(3 * width, width) * scale[: 3 * width, None])
    module.out_proj.weight = nn.Parameter(module.out_proj.weight * ends[3] * scale[3 * width :, None])
    shifts = (None, None) if shift is None else (shift[: 3 * width], shift[3 * width :])
    module.in_proj_bias = _folded_bias(module.in_proj_bias, scale[: 3 * width], shifts[0])
    module.out_proj.bias = _folded_bias(module.out_proj.bias, scale[3 * width :], shifts[1])
