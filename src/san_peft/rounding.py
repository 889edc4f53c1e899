r"""Rounding to half precision that keeps a small scale: dithering, without a random number.

A value in bfloat16 has eight significant bits, so $x \cdot 1.001$, rounded to the nearest, is $x$ again: a scale near
one would do nothing. Here a product is rounded up or down with the share that its remainder asks for, decided by a
hash of the value and its channel. The mean over many entries is the exact product, the result is the same at every
call, and a value that needs no rounding (a scale of one) comes back bit for bit.
"""

from __future__ import annotations

import sys
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
"""The types in which a factor near one would be rounded away."""

_DROPPED = {torch.bfloat16: 16, torch.float16: 13}
"""How many low bits of a float32 each type lacks."""
_GOLDEN = 0x9E3779B1
"""2^32 over the golden ratio, odd: its multiples spread evenly over 32 bits."""


def _hashed(size: int, device: torch.device, salt: int = 0) -> Tensor:
    """One odd 16-bit multiplier for each channel."""
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
    r"""Multiplies a tensor with one factor for each channel, rounding a half-precision result by dithering.

    Args:
        x: Features, of any floating type.
        factor: Factors in float32, of a shape that broadcasts to that of `x`, with all channels along `dim`.
        dim: Axis of the channels.
        shift: What is added to the product before it is rounded, of the shape of `factor`.
        salt: Chooses the hash. Factors that may multiply one value, one after the other, need different ones: a value
            that the first has left as it was would be left by the second as well.

    Returns:
        $x \cdot f + t$ in the type of `x`.

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
    if x.device.type != "cpu":  # a GPU's NaN has all bits set, and noise would make it a number
        noise = noise.masked_fill(wide.isnan(), -(1 << (dropped - 1)))
    # noise of a whole step of the type, then cut off: zeros, infinities and NaN stay what they are
    bits = wide.view(torch.int32).add_(noise).add_(1 << (dropped - 1))
    if dropped == 16 and wide.is_contiguous() and sys.byteorder == "little":
        return wide.view(torch.bfloat16).unflatten(-1, (-1, 2)).select(-1, 1).contiguous()
    bits.bitwise_and_(-(1 << dropped))
    return wide.to(x.dtype)


def round_to(value: Float[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """Rounds a tensor to a type, to half precision by dithering with a hash of every entry's position.

    For weights, which are rounded once: a merged weight keeps what a scale near one has changed, on average over its
    entries. What the type can represent stays as it is.

    Args:
        value: Values in float32 or float64.
        dtype: Type of the result.

    Returns:
        The rounded values, as a new tensor unless nothing is to be done.

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
    count = 1 << 22  # positions at a time, which are 64-bit numbers
    for start in range(0, flat.numel(), count):
        part = flat[start : start + count]
        place = torch.arange(start + 1, start + 1 + part.numel(), device=part.device, dtype=torch.int64)
        noise = place.mul_(_GOLDEN).bitwise_right_shift_(8).bitwise_and_((1 << dropped) - 1)
        noise = noise.to(torch.int32)
        if part.device.type != "cpu":  # a GPU's NaN has all bits set, and noise would make it a number
            noise = noise.masked_fill(part.view(torch.float32).isnan(), 0)
        part.add_(noise).bitwise_and_(-(1 << dropped))
    return bits.view(torch.float32).to(dtype)
