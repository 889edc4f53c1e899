"""Defines the Triton programs that `san_peft.kernels` launches."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import triton.language as tl

# Plain functions until the first launch, when `compiled` imports `tl` and passes them to `triton.jit`: importing this
# module does not import Triton. None pointers are compile-time constants. Row offsets are int64: tensors may have
# more than 2^31 entries.


def scale(
    x,
    factor,
    shift,
    out,
    rows,
    channels,
    size,
    salt,
    LAST: tl.constexpr,
    DROPPED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Scales a tile of a matrix whose columns (LAST) or rows (modulo the number of channels) are the channels."""
    across = tl.cdiv(size, COLUMNS)
    program = tl.program_id(0)
    row = ((program // across).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = ((program % across) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    mask = (row < rows) & (column < size)
    offsets = row * size + column
    if LAST:
        channel = column
    else:
        channel = row % channels
    inside = channel < channels
    value = tl.load(x + offsets, mask=mask, other=0)
    wide = value.to(tl.float32) * tl.load(factor + channel, mask=inside, other=0)
    if shift is not None:
        wide = wide + tl.load(shift + channel, mask=inside, other=0)
    if DROPPED > 0:
        # the 16-bit multiplier of `rounding` in the upper half of a word, and so its product with the bits of x;
        # flipping the sign bit makes the signed noise of `rounding`, plus half a step, unsigned
        hashed = ((((channel + 1 + salt).to(tl.uint32) * 0x9E3779B1) >> 13) | 1) << 16
        bits = value.to(tl.uint16, bitcast=True).to(tl.uint32)
        noise = (bits * hashed + 0x80000000) >> (32 - DROPPED)
        # a GPU's NaN has all bits set: adding noise would overflow to a number
        rounded = wide.to(tl.uint32, bitcast=True) + tl.where(wide == wide, noise, 0)
        wide = ((rounded >> DROPPED) << DROPPED).to(tl.float32, bitcast=True)
    tl.store(out + offsets, wide.to(out.dtype.element_ty), mask=mask)


def scale_backward(
    grad,
    saved,
    factor,
    grad_x,
    sums,
    outer,
    channels,
    inner,
    per,
    LAST: tl.constexpr,
    SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Processes `per` tiles of a block of channels in sequence and sums over them."""
    block = tl.program_id(1)
    if LAST:
        channel = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    else:
        channel = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    across = tl.cdiv(inner, COLUMNS)
    inside = channel < channels
    f = tl.load(factor + channel, mask=inside, other=0)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    shifted = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in range(per):
        step = tl.full([1, 1], block * per + i, tl.int64)
        if LAST:
            row = step * ROWS + tl.arange(0, ROWS)[:, None]
            offsets = row * channels + channel
            mask = inside & (row < outer)
        else:
            sample = step // across
            column = (step % across) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
            offsets = (sample * channels + channel) * inner + column
            mask = inside & (column < inner) & (sample < outer)
        g = tl.load(grad + offsets, mask=mask, other=0).to(tl.float32)
        total += g * tl.load(saved + offsets, mask=mask, other=0).to(tl.float32)
        if SHIFT:
            shifted += g
        if grad_x is not None:
            tl.store(grad_x + offsets, (g * f).to(grad_x.dtype.element_ty), mask=mask)
    place = sums + block * channels + channel
    tl.store(place, tl.sum(total, 0 if LAST else 1, keep_dims=True), mask=inside)
    if SHIFT:
        place += tl.num_programs(1) * channels
        tl.store(place, tl.sum(shifted, 0 if LAST else 1, keep_dims=True), mask=inside)


def norm(
    x,
    weight,
    bias,
    scale,
    out,
    means,
    rstds,
    rows,
    size,
    eps,
    offset,
    CAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Normalises whole rows: a layer norm if `means` is given, an RMS norm otherwise."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    valid = row < rows
    inside = column < size
    mask = valid & inside
    offsets = row * size + column
    value = tl.load(x + offsets, mask=mask, other=0).to(tl.float32)
    if means is not None:
        mean = tl.sum(value, 1, keep_dims=True) / size
        tl.store(means + row, mean, mask=valid)
        value = tl.where(inside, value - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(value * value, 1, keep_dims=True) / size + eps)
    tl.store(rstds + row, rstd, mask=valid)
    y = value * rstd
    if CAST:
        if scale is not None:
            y = y * tl.load(scale + column, mask=inside, other=0)
        y = y.to(x.dtype.element_ty).to(tl.float32)
        if weight is not None:
            y = y * tl.load(weight + column, mask=inside, other=0).to(tl.float32)
    else:
        if weight is not None:
            y = y * (tl.load(weight + column, mask=inside, other=0).to(tl.float32) + offset)
        if bias is not None:
            y = y + tl.load(bias + column, mask=inside, other=0).to(tl.float32)
        if scale is not None:
            y = y * tl.load(scale + column, mask=inside, other=0)
    tl.store(out + offsets, y.to(out.dtype.element_ty), mask=mask)


def norm_backward(
    grad,
    x,
    weight,
    bias,
    scale,
    means,
    rstds,
    grad_x,
    grad_scale,
    grad_weight,
    grad_bias,
    rows,
    size,
    offset,
    per,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Processes `per` tiles of whole rows in sequence and sums over them."""
    program = tl.program_id(0)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = column < size
    w = tl.full([1, COLUMNS], 1.0, tl.float32)
    s = tl.full([1, COLUMNS], 1.0, tl.float32)
    if weight is not None:
        w = tl.load(weight + column, mask=inside, other=0).to(tl.float32) + offset
    if scale is not None:
        s = tl.load(scale + column, mask=inside, other=0)
    factor = w * s
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    plain = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in range(per):
        row = ((program * per + i).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
        valid = row < rows
        mask = valid & inside
        offsets = row * size + column
        g = tl.load(grad + offsets, mask=mask, other=0).to(tl.float32)
        h = tl.load(x + offsets, mask=mask, other=0).to(tl.float32)
        rstd = tl.load(rstds + row, mask=valid, other=0)
        if means is not None:
            h = h - tl.load(means + row, mask=valid, other=0)
        h = h * rstd
        total += g * h
        if bias is not None:
            plain += g
        g = g * factor  # zero beyond the row, where h is undefined
        inner = g - h * (tl.sum(g * h, 1, keep_dims=True) / size)
        if means is not None:
            inner = inner - tl.sum(g, 1, keep_dims=True) / size
        tl.store(grad_x + offsets, (inner * rstd).to(grad_x.dtype.element_ty), mask=mask)
    summed = tl.sum(total, 0, keep_dims=True)
    place = program * size + column
    if grad_weight is not None:
        tl.store(grad_weight + place, summed * s, mask=inside)
    plain_summed = tl.sum(plain, 0, keep_dims=True)
    if grad_bias is not None:
        tl.store(grad_bias + place, plain_summed * s, mask=inside)
    if grad_scale is not None:
        summed = summed * w
        if bias is not None:
            summed += plain_summed * tl.load(bias + column, mask=inside, other=0).to(tl.float32)
        tl.store(grad_scale + place, summed, mask=inside)


@lru_cache(maxsize=8)
def compiled(kernel: Any) -> Any:
    """Returns the compiled kernel; imports Triton on the first call."""
    global tl
    import triton
    import triton.language as tl

    # do not recompile for another batch size
    return triton.jit(do_not_specialize=["rows", "outer", "per"])(kernel)
