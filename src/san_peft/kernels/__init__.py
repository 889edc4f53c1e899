"""Launches Triton kernels that scale channels, alone or fused into a norm, in one pass over memory.

These operations are memory-bound on a GPU, so each kernel reads its inputs once and writes its result once.
`scale_forward` matches its reference `rounding.multiply` bit for bit. The functions do not record gradients: call them
from a `torch.autograd.Function`. Sums over rows are deterministic: fixed order, no atomics.

Triton is imported at the first launch. `available` returns whether the kernels support a tensor.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from san_peft.kernels import programs

MAX_HIDDEN = 16384
"""Longest row that the norm kernels can hold at once."""

_DROPPED = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}
"""Number of low bits of a float32 mantissa that each dtype drops."""
_TILE = 4096
"""Entries that a program of a scale kernel processes at once."""
_PROCESSORS = 132
"""Multiprocessors of an H100 or H200. A constant, so that sums have the same order on every device."""


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return find_spec("triton") is not None


@lru_cache(maxsize=64)
def _capable(index: int | None) -> bool:
    return torch.cuda.get_device_capability(index) >= (8, 0)


def available(x: Tensor) -> bool:
    """Returns whether the kernels support a tensor.

    Args:
        x: A tensor. Only its device, type and dtype are checked; the launch checks that it is contiguous.

    Returns:
        `True` for a plain tensor in half or single precision on a CUDA device of compute capability 8.0 or above, if
        Triton is installed. Also on the CPU if `TRITON_INTERPRET=1` was set before Triton was imported. Always `False`
        while `torch.compile` or `torch.export` traces.

    Example:
        >>> available(torch.ones(2, dtype=torch.float64))
        False
    """
    if torch.compiler.is_compiling() or x.dtype not in _DROPPED or type(x) not in (Tensor, torch.nn.Parameter):
        return False
    if os.environ.get("TRITON_INTERPRET") == "1":
        return x.device.type in ("cpu", "cuda") and _has_triton()
    return x.is_cuda and _has_triton() and _capable(x.device.index)


def _launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **options: Any) -> None:
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        programs.compiled(kernel)[grid](*args, **{"enable_fp_fusion": True} | options)


def _power(n: int) -> int:
    """Returns the smallest power of two that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()


def _ceil(n: int, by: int) -> int:
    return -(-n // by)


def _check(like: Tensor, shape: tuple[int, ...], *types: torch.dtype, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device != like.device or tensor.dtype not in (types or _DROPPED):
            wanted = " or ".join(str(t) for t in types or _DROPPED)
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}; expected {wanted} on {like.device}.")
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(shape)}.")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}: call .contiguous() on it first.")


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _layout(x: Tensor, dim: int) -> tuple[int, int, int]:
    """Returns the shape of a contiguous tensor viewed as (outer, channels, inner)."""
    dim %= x.dim()
    channels = x.shape[dim]
    inner = x.shape[dim + 1 :].numel()
    return x.numel() // max(channels * inner, 1), channels, inner


def scale_forward(
    x: Float[Tensor, "*shape"],
    factor: Float[Tensor, " channels"],
    shift: Float[Tensor, " channels"] | None = None,
    dim: int = -1,
    salt: int = 0,
) -> Float[Tensor, "*shape"]:
    r"""Multiplies with one factor per channel and adds a shift before rounding, like `rounding.multiply`.

    Args:
        x: Features, contiguous, in half or single precision.
        factor: Factor $f$ of each channel, in float32.
        shift: Shift $t$ of each channel, in float32.
        dim: Channel axis.
        salt: Salt of the dithering hash.

    Returns:
        $f \odot x + t$ in the dtype of `x`, computed in float32; half precision is rounded by dithering.
    """
    outer, channels, inner = _layout(x, dim)
    out = _empty(x)
    _check(x, x.shape, x=x)
    _check(x, (channels,), torch.float32, factor=factor, shift=shift)
    if x.numel():
        last = inner == 1
        rows, size = (outer, channels) if last else (outer * channels, inner)
        columns = min(_power(size), 256)
        tile = _TILE // columns
        grid = (_ceil(rows, tile) * _ceil(size, columns),)
        shapes = {"LAST": last, "DROPPED": _DROPPED[x.dtype], "ROWS": tile, "COLUMNS": columns}
        # an FMA would round product and shift once, where the reference rounds twice
        options = {"num_warps": 4, "enable_fp_fusion": False}
        _launch(programs.scale, grid, x.device, x, factor, shift, out, rows, channels, size, salt, **shapes, **options)
    return out


def scale_backward(
    grad: Float[Tensor, "*shape"],
    saved: Float[Tensor, "*shape"],
    factor: Float[Tensor, " channels"],
    dim: int = -1,
    need_x: bool = True,
    need_shift: bool = False,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    r"""Computes the gradients of $f \odot x + t$.

    Args:
        grad: Gradient of the result, contiguous.
        saved: Tensor to multiply and sum with, contiguous: $x$ for the gradient of the factor. Its dtype may differ.
        factor: Factor $f$ of each channel, in float32.
        dim: Channel axis.
        need_x: Whether to compute the gradient of $x$.
        need_shift: Whether to compute the gradient of the shift.

    Returns:
        $f \odot \mathrm{grad}$ rounded to nearest in the dtype of `grad`, or `None`; the per-channel sum of
        $\mathrm{grad} \odot \mathrm{saved}$ in float32; and the per-channel sum of `grad`, or `None`.
    """
    outer, channels, inner = _layout(grad, dim)
    _check(grad, grad.shape, grad=grad, saved=saved)
    _check(grad, (channels,), torch.float32, factor=factor)
    grad_x = _empty(grad) if need_x else None
    last = inner == 1
    columns = min(_power(channels if last else inner), 256)
    rows = _TILE // columns if last else min(_TILE // columns, _power(channels))
    tiles = _ceil(channels, columns if last else rows)
    steps = _ceil(outer, rows) if last else outer * _ceil(inner, columns)
    per = max(_ceil(steps * tiles, 8 * _PROCESSORS), 1)
    blocks = _ceil(steps, per)
    sums = torch.empty((1 + need_shift, blocks, channels), dtype=torch.float32, device=grad.device)
    if grad.numel():
        shapes = {"LAST": last, "SHIFT": need_shift, "ROWS": rows, "COLUMNS": columns}
        sizes = (outer, channels, inner, per)
        tensors = (grad, saved, factor, grad_x, sums)
        _launch(programs.scale_backward, (tiles, blocks), grad.device, *tensors, *sizes, **shapes, num_warps=4)
    summed = sums[:, 0] if blocks == 1 else sums.sum(1)
    return grad_x, summed[0], summed[1] if need_shift else None


def _norm_tiles(size: int, rows: int) -> tuple[dict[str, int], int]:
    """Returns the launch options of a tile of whole rows, and the number of tiles."""
    if not 0 < size <= MAX_HIDDEN:
        raise ValueError(f"A row has {size} entries: the norm kernels support 1 to {MAX_HIDDEN}.")
    columns = _power(size)
    tile = max(1024 // columns, 1)
    warps = min(max(columns // 512, 4), 16)
    return {"ROWS": tile, "COLUMNS": columns, "num_warps": warps}, _ceil(rows, tile)


def _norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    eps: float,
    *,
    center: bool = False,
    offset: float = 0.0,
    cast: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    size = x.shape[-1]
    _check(x, x.shape, x=x)
    _check(x, (size,), weight=weight, bias=bias)
    _check(x, (size,), torch.float32, scale=scale)
    rows = x.numel() // max(size, 1)
    shapes, tiles = _norm_tiles(size, rows)
    y = _empty(x)
    rstd = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    mean = torch.empty_like(rstd) if center else None
    if rows:
        tensors = (x, weight, bias, scale, y, mean, rstd)
        _launch(programs.norm, (tiles,), x.device, *tensors, rows, size, float(eps), float(offset), CAST=cast, **shapes)
    return y, mean, rstd


def _norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    offset: float,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    size, rows = x.shape[-1], rstd.numel()
    _check(x, x.shape, x=x, grad=grad)
    _check(x, (size,), weight=weight, bias=bias)
    _check(x, (size,), torch.float32, scale=scale)
    _check(x, (*x.shape[:-1], 1), torch.float32, mean=mean, rstd=rstd)
    shapes, tiles = _norm_tiles(size, rows)
    per = max(_ceil(tiles, _PROCESSORS * (2 if shapes["num_warps"] > 4 else 4)), 1)
    blocks = _ceil(tiles, per)
    wanted = [scale is not None, need_weight and weight is not None, need_bias and bias is not None]
    sums = torch.empty((sum(wanted), blocks, size), dtype=torch.float32, device=x.device)
    buffers = iter(sums)
    parts = [next(buffers) if want else None for want in wanted]
    grad_x = _empty(x)
    if rows:
        tensors = (grad, x, weight, bias, scale, mean, rstd, grad_x, *parts)
        _launch(programs.norm_backward, (blocks,), x.device, *tensors, rows, size, float(offset), per, **shapes)
    summed = iter(sums[:, 0] if blocks == 1 or not any(wanted) else sums.sum(1))
    grad_scale, grad_weight, grad_bias = (next(summed) if want else None for want in wanted)
    return grad_x, grad_scale, grad_weight, grad_bias


def rms_forward(
    x: Float[Tensor, "*batch size"],
    weight: Float[Tensor, " size"] | None,
    scale: Float[Tensor, " size"] | None,
    eps: float,
    weight_after_cast: bool = False,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    r"""Applies an RMS norm and a scale with a single rounding, like a norm without a scale.

    Args:
        x: Features, contiguous, of at most `MAX_HIDDEN` channels in the last axis.
        weight: Weight $w$ of the norm; `None` is one.
        scale: Scale $s$ of each channel, in float32; `None` is one.
        eps: Added to the mean square.
        weight_after_cast: Whether to multiply by the weight after the cast to the dtype of `x` (LLaMA, T5, Qwen) or
            before it (Gemma, `nn.RMSNorm`).
        offset: Added to the weight; one for Gemma. Ignored with `weight_after_cast`.

    Returns:
        $w \odot \operatorname{cast}(s \odot h)$ or $\operatorname{cast}(s \odot (o + w) \odot h)$ in the dtype of `x`,
        with $h = x / \sqrt{\operatorname{mean}(x^2) + \epsilon}$ in float32; and $1 / \sqrt{\cdot}$ of each row.
    """
    y, _, rstd = _norm(x, weight, None, scale, eps, offset=offset, cast=weight_after_cast)
    return y, rstd


def rms_backward(
    grad: Float[Tensor, "*batch size"],
    x: Float[Tensor, "*batch size"],
    weight: Float[Tensor, " size"] | None,
    scale: Float[Tensor, " size"] | None,
    rstd: Float[Tensor, "*batch 1"],
    weight_after_cast: bool = False,
    offset: float = 0.0,
    need_weight: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Computes the gradients of `rms_forward` from its arguments and the `rstd` that it returned.

    Returns:
        Gradients of `x` in its dtype, and of the scale and the weight in float32; `None` for those that are absent or
        not requested.
    """
    offset = 0.0 if weight_after_cast else offset
    grads = _norm_backward(grad, x, weight, None, scale, None, rstd, offset, need_weight, False)
    return grads[:3]


def layer_forward(
    x: Float[Tensor, "*batch size"],
    weight: Float[Tensor, " size"] | None,
    bias: Float[Tensor, " size"] | None,
    scale: Float[Tensor, " size"] | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Applies a layer norm and a scale with a single rounding.

    Args:
        x: Features, contiguous, of at most `MAX_HIDDEN` channels in the last axis.
        weight: Weight $w$ of the norm; `None` is one.
        bias: Bias $b$ of the norm; `None` is zero.
        scale: Scale $s$ of each channel, in float32; `None` is one.
        eps: Added to the variance.

    Returns:
        $s \odot (w \odot h + b)$ in the dtype of `x`, with $h$ the normalised row in float32; and the mean and the
        inverse standard deviation of each row.
    """
    y, mean, rstd = _norm(x, weight, bias, scale, eps, center=True)
    assert mean is not None
    return y, mean, rstd


def layer_backward(
    grad: Float[Tensor, "*batch size"],
    x: Float[Tensor, "*batch size"],
    weight: Float[Tensor, " size"] | None,
    bias: Float[Tensor, " size"] | None,
    scale: Float[Tensor, " size"] | None,
    mean: Float[Tensor, "*batch 1"],
    rstd: Float[Tensor, "*batch 1"],
    need_weight: bool = False,
    need_bias: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Computes the gradients of `layer_forward` from its arguments and the statistics that it returned.

    Returns:
        Gradients of `x` in its dtype, and of the scale, the weight and the bias in float32; `None` for those that are
        absent or not requested.
    """
    return _norm_backward(grad, x, weight, bias, scale, mean, rstd, 0.0, need_weight, need_bias)
