r"""Rounds to half precision by deterministic dithering, so that scales near one take effect.

bfloat16 has eight significant bits, so $x \cdot 1.001$ rounds to $x$: with round-to-nearest, a scale near one has no
effect. This module rounds up or down with a frequency proportional to the remainder, like stochastic rounding, but
decided by a hash of the value and its channel instead of a random number. The mean over many entries is the exact
product, results are reproducible, and values that need no rounding (a scale of one) are returned bit for bit.
"""

from __future__ import annotations

import sys
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
"""Dtypes that are rounded by dithering."""

_DROPPED = {torch.bfloat16: 16, torch.float16: 13}
"""Number of low bits of a float32 mantissa that each dtype drops."""
_GOLDEN = 0x9E3779B1
"""2^32 divided by the golden ratio, made odd: its multiples spread evenly over 32 bits (Fibonacci hashing)."""


def _hashed(size: int, device: torch.device, salt: int = 0) -> Tensor:
    """Returns an odd 16-bit multiplier per channel."""
    hashed = (torch.arange(salt + 1, salt + size + 1, dtype=torch.int64, device=device) * _GOLDEN >> 13) & 0xFFFF
    return (hashed | 1).to(torch.int32).to(torch.int16)


_multipliers = lru_cache(maxsize=256)(_hashed)


def multiply(
    x: Float[Tensor, "*shape"],
    factor: Float[Tensor, "*shape"],
    dim: int = -1,
    shift: Float[Tensor, "*shape"] | None = None,
    salt: int = 0,
) -> Float[Tensor, "*shape"]:
    r"""Multiplies a tensor with one factor per channel and rounds half precision by dithering.

    Args:
        x: Features, of any floating-point dtype.
        factor: Factors in float32 that broadcast to the shape of `x`, with all channels along `dim`.
        dim: Channel axis.
        shift: Added to the product before rounding, in the shape of `factor`.
        salt: Salt of the hash. Factors that are applied to the same value one after the other need different salts:
            with the same one, a value that the first leaves unchanged would also be left unchanged by the second.

    Returns:
        $x \cdot f + t$ in the dtype of `x`.

    Example:
        >>> x = torch.linspace(1, 2, 256).to(torch.bfloat16)
        >>> factor = torch.full((256,), 1.001)
        >>> (x * factor.bfloat16() - x).mean().item()
        0.0
        >>> 0.0005 < (multiply(x, factor).float() - x.float()).mean().item() < 0.0025
        True
        >>> torch.equal(multiply(x, torch.ones(256)), x)
        True
    """
    if x.dtype not in HALF:
        y = x * factor.to(x.dtype)
        return y if shift is None else y.add_(shift.to(x.dtype))
    size = x.shape[dim]
    shape = [size if d == dim % x.dim() else 1 for d in range(x.dim())]
    hashed = _hashed if torch.compiler.is_compiling() else _multipliers
    multipliers = hashed(size, x.device, salt)
    noise = x.view(torch.int16) * multipliers.view(shape)
    dropped = _DROPPED[x.dtype]
    if dropped < 16:
        noise = noise >> (16 - dropped)
    wide = x * factor.to(torch.float32)
    if shift is not None:
        wide += shift
    if x.device.type != "cpu":  # a GPU's NaN has all bits set; adding noise would overflow to a number
        noise = noise.masked_fill(wide.isnan(), -(1 << (dropped - 1)))
    # add noise of up to one ulp, then truncate: zeros, infinities and NaN are unchanged
    bits = wide.view(torch.int32).add_(noise).add_(1 << (dropped - 1))
    if dropped == 16 and wide.is_contiguous() and sys.byteorder == "little":
        return wide.view(torch.bfloat16).unflatten(-1, (-1, 2)).select(-1, 1).contiguous()
    bits.bitwise_and_(-(1 << dropped))
    return wide.to(x.dtype)


def round_to(value: Float[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """Rounds a tensor to a dtype; to half precision by dithering with a hash of the position of each entry.

    Used for weights, which are rounded once: on average over its entries, a merged weight keeps the effect of a scale
    near one. Values that the dtype represents exactly are unchanged.

    Args:
        value: Values in float32 or float64.
        dtype: Dtype of the result.

    Returns:
        The rounded values; `value` itself if it already has the dtype.

    Example:
        >>> value = torch.full((1000,), 1.001)
        >>> value.bfloat16().float().mean().item()
        1.0
        >>> round(round_to(value, torch.bfloat16).float().mean().item(), 3)
        1.001
    """
    if dtype not in HALF or value.dtype == dtype:
        return value.to(dtype)
    bits = value.to(torch.float32, copy=True, memory_format=torch.contiguous_format).view(torch.int32)
    dropped = _DROPPED[dtype]
    flat = bits.view(-1)
    count = 1 << 22  # chunked, because positions are int64
    for start in range(0, flat.numel(), count):
        part = flat[start : start + count]
        place = torch.arange(start + 1, start + 1 + part.numel(), device=part.device, dtype=torch.int64)
        noise = place.mul_(_GOLDEN).bitwise_right_shift_(8).bitwise_and_((1 << dropped) - 1)
        noise = noise.to(torch.int32)
        if part.device.type != "cpu":  # a GPU's NaN has all bits set; adding noise would overflow to a number
            noise = noise.masked_fill(part.view(torch.float32).isnan(), 0)
        part.add_(noise).bitwise_and_(-(1 << dropped))
    return bits.view(torch.float32).to(dtype)
