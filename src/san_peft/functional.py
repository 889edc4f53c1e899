r"""The equations of SAN, as functions of tensors: no modules, no configuration, no PEFT.

A layer with frozen weight $W$ and bias $b$, own scale $g$, shift $t$ and input scale $s$ computes

$$ y = g \odot \bigl( W (s \odot x) + b \bigr) + t, \qquad s = \prod_e P_e(g_e)^k, $$

where edge $e$ carries the scale $g_e$ of an anterior layer through its channel map $P_e$. `scale_input` and
`scale_output` are the two halves of that equation, `propagate` is one factor of $s$, and `fold` writes all of it into
the weight. Over another adapter, such as LoRA, $g$ is no parameter but comes out of that adapter: see `decomposition`.
Source: arXiv 2409.06706; the equations are this library's reading of it, see the guide to the method.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from san_peft import rounding
from san_peft.errors import SanError
from san_peft.rounding import HALF
from san_peft.scaling import SALT, Factor, along, near_zero, scale_channels

SMALLEST = 1e-4
"""Size of a scale below which a fractional or negative power of it is not its own, but goes to zero."""
AT_ONCE = {"cpu": (2**12, 2**20), "cuda": (2**22, 2**24)}
"""How many entries of a half-precision weight are folded at a time, in float32, at least and at most."""


def propagate(
    scale: Float[Tensor, " source"],
    index: Int[Tensor, " size"] | None = None,
    exponent: float = 1.0,
    bound: float | None = None,
) -> Float[Tensor, " size"]:
    r"""Carries a scale to the input channels of a posterior layer.

    $$ s_j = g_{P[j]}^{\,k}, \qquad s_j = 1 \text{ where } P[j] = -1 $$

    Args:
        scale: Scale $g$ of the anterior layer.
        index: Source channel $P[j]$ of every input channel, -1 where there is none; `None` is the identity.
        exponent: The exponent $k$. A fraction keeps the sign of a negative scale: $\operatorname{sign}(g)|g|^k$. With a
            fraction or a negative exponent, whose power or slope would be infinite at zero, the factor of a scale below
            `SMALLEST` goes to zero in a straight line, or as a square if the exponent is even.
        bound: Largest distance $b$ of the factor from one, reached smoothly: $1 + b \tanh((g^k - 1) / b)$. Near one it
            changes nothing. `None` is no bound.

    Returns:
        The factor that this edge multiplies onto the input scale.

    Example:
        >>> propagate(torch.tensor([2.0, 3.0]), torch.tensor([1, 1, -1, 0]), exponent=2.0).tolist()
        [9.0, 9.0, 1.0, 4.0]
        >>> round(propagate(torch.tensor([100.0]), bound=0.5).item(), 4)
        1.5
    """
    powered = scale if exponent == 1.0 else _power(scale, exponent)
    if bound is not None:
        powered = 1 + bound * torch.tanh((powered - 1) / bound)
    if index is None:
        return powered
    gathered = powered[index.clamp(min=0)]
    return torch.where(index < 0, torch.ones_like(gathered), gathered)


def strengthen(scale: Float[Tensor, " channels"], strength: float | Float[Tensor, " channels"]) -> Tensor:
    r"""Raises a scale to the power of a strength, with the sign it has: $\operatorname{sign}(g)|g|^s$.

    Args:
        scale: Scale $g$.
        strength: Strength $s$, not negative; one number, or one for each channel. Zero gives one.

    Returns:
        The scale at that strength. Strengths multiply: $(g^s)^r = g^{sr}$.

    Example:
        >>> strengthen(torch.tensor([4.0, -4.0, 0.0]), 0.5).tolist()
        [2.0, -2.0, 0.0]
        >>> strengthen(torch.tensor([4.0, -4.0, 0.0]), 0.0).tolist()
        [1.0, 1.0, 1.0]
    """
    powers = torch.as_tensor(strength, dtype=scale.dtype, device=scale.device)
    return torch.where(powers == 0, torch.ones_like(scale), scale.sign() * scale.abs().pow(powers))


def _power(scale: Tensor, exponent: float) -> Tensor:
    """Returns a scale to a power, finite and with a finite gradient also where the scale is zero."""
    whole = float(exponent).is_integer()
    if whole and exponent >= 0:
        return scale.pow(int(exponent))
    size = scale.abs().clamp(min=SMALLEST)
    if whole and exponent % 2 == 0:
        return scale.square() * size.pow(exponent - 2)
    return scale * size.pow(exponent - 1)


def scale_input(
    x: Float[Tensor, "*shape"],
    scale: Float[Tensor, " channels"],
    channel_dim: int = -1,
    *,
    keep: str = "input",
) -> Float[Tensor, "*shape"]:
    r"""Scales the input channels of a layer: $s \odot x$, which equals scaling the columns of its weight.

    Args:
        x: Input of the layer.
        scale: Input scale $s$.
        channel_dim: Axis of the channels in `x`.
        keep: Which tensor the backward pass keeps, see `scale_output`. `"output"` costs nothing where the layer keeps
            its input anyway, as a LoRA adapter does.

    Returns:
        The scaled input, of the dtype of `x`; in half precision rounded as `san_peft.rounding.multiply` does.

    Raises:
        SanError: If the length of `scale` is not the size of that axis.

    Example:
        >>> scale_input(torch.ones(2, 3), torch.tensor([1.0, 2.0, 3.0])).tolist()
        [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]
    """
    _check_length(scale, x, channel_dim, "input scale")
    factor = Factor(scale, divisible=not near_zero(scale), salt=SALT["input_scale"])
    return scale_channels(x, factor, None, channel_dim, keep=keep)


def scale_output(
    z: Float[Tensor, "*shape"],
    scale: Float[Tensor, " channels"] | None,
    shift: Float[Tensor, " channels"] | None = None,
    channel_dim: int = -1,
    *,
    inplace: bool = False,
    keep: str = "output",
) -> Float[Tensor, "*shape"]:
    r"""Scales and shifts the output channels of a layer.

    $$ y = g \odot z + t, \qquad
       \frac{\partial L}{\partial g_j} = \sum_n \dot y_{nj} z_{nj} = \frac{1}{g_j} \sum_n \dot y_{nj} (y_{nj} - t_j) $$

    The second form of the gradient needs the output $y$, which the operation that follows usually keeps anyway, in
    place of $z$, which nobody else keeps: no activation of its own is saved there. The first form is taken where a
    scale is nearer to zero than `NEAR_ZERO` (looked at on the CPU; on other devices a channel of exactly zero gets the
    gradient zero), in compiled code, and with a shift in half precision, where $y - t$ would cancel.

    Args:
        z: Output of the frozen layer.
        scale: Scale $g$; `None` is one.
        shift: Shift $t$; `None` is zero.
        channel_dim: Axis of the channels in `z`.
        inplace: Whether `z` may be overwritten. Only for a tensor nobody else reads, fresh from a layer that does not
            keep its own output.
        keep: `"output"` or `"input"`: which tensor is kept for the backward pass. An output that a later operation
            overwrites, as `ReLU(inplace=True)` does, must not be kept.

    Returns:
        The scaled and shifted output, of the dtype of `z`; in half precision rounded as
        `san_peft.rounding.multiply` does, so that a scale near one is not lost.

    Raises:
        SanError: If the length of a vector is not the size of that axis.

    Example:
        >>> y = scale_output(torch.ones(2, 2), torch.tensor([2.0, 3.0]), shift=torch.tensor([0.0, 1.0]))
        >>> y.tolist()
        [[2.0, 4.0], [2.0, 4.0]]
    """
    for vector, name in ((scale, "scale"), (shift, "shift")):
        _check_length(vector, z, channel_dim, name)
    if scale is None:
        return z if shift is None else z + along(shift, z, channel_dim).to(z.dtype)
    factor = Factor(scale, divisible=not near_zero(scale))
    return scale_channels(z, factor, shift, channel_dim, inplace=inplace, keep=keep)


def fold(
    weight: Float[Tensor, "*weight"],
    bias: Float[Tensor, " out"] | None,
    scale: Float[Tensor, " out"] | None,
    input_scale: Float[Tensor, " in"] | None = None,
    shift: Float[Tensor, " out"] | None = None,
    *,
    groups: int = 1,
    transposed: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Float[Tensor, "*weight"], Float[Tensor, " out"] | None]:
    r"""Folds a scale, a shift and the scale propagated to the input into a dense or convolutional layer.

    $$ W' = \operatorname{diag}(g)\, W \,\operatorname{diag}(s), \qquad b' = g \odot b + t $$

    Exact for every stride, dilation and zero padding, because the shift goes into the layer's own bias, which is added
    after the padding.

    Rounding: computed in float32 at least and rounded once, at the end. To float16 and bfloat16 by dithering
    (`rounding.round_to`): rounded to the nearest, a weight would not move before a scale is about half a percent away
    from one. So single entries are up to one step of the type off, twice what the nearest would be, and sums over many
    are what float32 gives. An entry whose factors are one comes back bit for bit. The gradient of dithering is that of
    the identity.

    Args:
        weight: Frozen weight: (out, in) dense; (out, in/groups, *kernel) convolution; with `transposed`, (in, out) as
            in GPT-2's `Conv1D` or (in, out/groups, *kernel) as in a transposed convolution.
        bias: Frozen bias, or `None`.
        scale: The layer's own scale $g$; `None` is one.
        input_scale: Scale $s$ propagated from anterior layers; `None` where nothing propagates.
        shift: Shift $t$; `None` is zero. Without a bias it becomes one.
        groups: Number of groups of the convolution.
        transposed: Whether the input axis of the weight comes first.
        dtype: Type of the folded weight, and of a bias that a shift has made; `None` is that of the weight.

    Returns:
        The folded weight and bias, as new tensors; the bias is `None` where there is neither bias nor shift.

    Raises:
        SanError: If a vector's length differs from the axis it acts on, or the groups do not divide an axis.

    Example:
        >>> weight, bias = fold(torch.ones(2, 3), torch.ones(2), torch.tensor([2.0, 0.5]))
        >>> weight.tolist(), bias.tolist()
        ([[2.0, 2.0, 2.0], [0.5, 0.5, 0.5]], [2.0, 0.5])
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    dtype = weight.dtype if dtype is None else dtype
    both = _weight_factors(weight, scale, input_scale, wide, groups, transposed)
    _check_lengths(weight, bias, shift, groups, transposed)
    folded = _multiplied(weight, [factor for factor in both if factor is not None], groups, dtype)
    if bias is not None:
        out = bias.to(wide, copy=True)
    elif shift is not None:
        out = torch.zeros_like(shift, dtype=wide)
    else:
        return folded, None
    if scale is not None:
        out = out * scale.to(wide)
    if shift is not None:
        out = out + shift.to(wide)
    return folded, rounded(out, dtype if bias is None else bias.dtype)


def _multiplied(weight: Tensor, factors: list[Tensor], groups: int, dtype: torch.dtype) -> Tensor:
    """Returns a weight times factors that broadcast over its grouped shape, half precision by parts."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    shape = _grouped_shape(weight, groups)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (weight, *factors)):
        product = weight.to(wide).reshape(shape)
        for factor in factors:
            product = product * factor
        return rounded(product.reshape(weight.shape), dtype)
    if dtype not in HALF:
        folded = weight.to(wide, copy=True)
        for factor in factors:
            folded.view(shape).mul_(factor)
        return folded.to(dtype)
    folded = torch.empty_like(weight, dtype=dtype, requires_grad=False)
    source, result = weight.detach().view(shape), folded.view(shape)
    least, most = AT_ONCE.get(weight.device.type, AT_ONCE["cuda"])
    entries = max(least, min(most, weight.numel() // 40))  # 20 bytes an entry stand beside the whole weight's two
    count = max(1, entries * shape[1] // max(1, weight.numel()))
    for start in range(0, shape[1], count):
        part = source[:, start : start + count].to(wide, copy=True)
        for factor in factors:
            part.mul_(factor.detach()[:, start : start + count] if factor.shape[1] > 1 else factor.detach())
        result[:, start : start + count] = rounding.round_to(part, dtype)
    return folded


def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds by dithering, with the gradient of the identity."""
    if not (torch.is_grad_enabled() and value.requires_grad):
        return rounding.round_to(value, dtype)
    nearest = value.to(dtype)
    return nearest if dtype not in HALF else nearest + (rounding.round_to(value.detach(), dtype) - nearest.detach())


def _check_length(vector: Tensor | None, x: Tensor, channel_dim: int, name: str) -> None:
    if vector is not None and (vector.dim() != 1 or vector.numel() != x.shape[channel_dim]):
        raise SanError(
            f"The {name} has shape {tuple(vector.shape)}, but axis {channel_dim} of the activation of shape "
            f"{tuple(x.shape)} has {x.shape[channel_dim]} channels."
        )


def _grouped_shape(weight: Tensor, groups: int) -> list[int]:
    return [groups, weight.shape[0] // groups, *weight.shape[1:]]


def channels_of(weight: Float[Tensor, "*weight"], groups: int = 1, transposed: bool = False) -> tuple[int, int]:
    """Returns how many output and input channels a weight has, in one of the layouts of `fold`.

    Raises:
        SanError: If the groups do not divide the leading axis, or the weight has no two axes.
    """
    if weight.dim() < 2 or groups < 1 or weight.shape[0] % groups:
        raise SanError(f"A weight of shape {tuple(weight.shape)} cannot be split into {groups} groups.")
    leading, other = weight.shape[0], weight.shape[1] * groups
    return (other, leading) if transposed else (leading, other)


def _weight_factors(
    weight: Tensor, scale: Tensor | None, input_scale: Tensor | None, dtype: torch.dtype, groups: int, transposed: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Views both vectors so that they broadcast over the weight seen as (groups, first/groups, second, *kernel)."""
    out, size = channels_of(weight, groups, transposed)
    tail = [1] * (weight.dim() - 2)
    views = []
    for name, vector, length, leading in (
        ("scale", scale, out, not transposed),
        ("input scale", input_scale, size, transposed),
    ):
        if vector is None:
            views.append(None)
            continue
        if vector.shape != (length,):
            raise SanError(
                f"The {name} has shape {tuple(vector.shape)}, but a weight of shape {tuple(weight.shape)} with "
                f"{groups} group{'' if groups == 1 else 's'} needs ({length},)."
            )
        shape = [groups, length // groups, 1] if leading else [groups, 1, length // groups]
        views.append(vector.to(dtype).view(shape + tail))
    return views[0], views[1]


def _check_lengths(weight: Tensor, bias: Tensor | None, shift: Tensor | None, groups: int, transposed: bool) -> None:
    out = channels_of(weight, groups, transposed)[0]
    for name, vector in (("bias", bias), ("shift", shift)):
        if vector is not None and vector.shape != (out,):
            raise SanError(f"The {name} has shape {tuple(vector.shape)}, but the layer has {out} output channels.")
