r"""Computes the equations of SAN as pure functions of tensors, without modules, configuration or PEFT.

A layer with frozen weight $W$ and bias $b$, scale $g$, shift $t$ and input scale $s$ computes

$$ y = g \odot \bigl( W (s \odot x) + b \bigr) + t, \qquad s = \prod_e P_e(g_e)^k, $$

where edge $e$ carries the scale $g_e$ of an anterior layer through its channel map $P_e$. `scale_input` and
`scale_output` are the two halves of the equation, `propagate` computes one factor of $s$, and `fold` folds everything
into the weight. On top of another adapter, such as LoRA, $g$ is not a parameter but is decomposed from that adapter:
see `decomposition`. Source: arXiv 2409.06706; the equations are our interpretation, see the guide to the method.
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
"""Magnitude of a scale below which fractional and negative powers are replaced by a ramp to zero."""
AT_ONCE = {"cpu": (2**12, 2**20), "cuda": (2**22, 2**24)}
"""Minimum and maximum number of half-precision weight entries that are cast to float32 and folded at a time."""


def propagate(
    scale: Float[Tensor, " source"],
    index: Int[Tensor, " size"] | None = None,
    exponent: float = 1.0,
    bound: float | None = None,
) -> Float[Tensor, " size"]:
    r"""Propagates a scale to the input channels of a posterior layer.

    $$ s_j = g_{P[j]}^{\,k}, \qquad s_j = 1 \text{ where } P[j] = -1 $$

    Args:
        scale: Scale $g$ of the anterior layer.
        index: Source channel $P[j]$ of each input channel, -1 for none; `None` is the identity.
        exponent: Exponent $k$. A fractional exponent keeps the sign of the scale: $\operatorname{sign}(g)|g|^k$. For
            fractional and negative exponents, whose value or gradient is infinite at zero, the factor of a scale below
            `SMALLEST` goes to zero linearly, or quadratically for an even exponent.
        bound: Largest distance $b$ of the factor from one, as a smooth clamp: $1 + b \tanh((g^k - 1) / b)$, which is
            the identity near one. `None` disables it.

    Returns:
        The factor that this edge contributes to the input scale.

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
    r"""Raises a scale to the power of a strength and keeps its sign: $\operatorname{sign}(g)|g|^s$.

    Args:
        scale: Scale $g$.
        strength: Non-negative strength $s$, one number or one per channel. Strength zero gives a scale of one.

    Returns:
        The scale at this strength. Strengths compose by multiplication: $(g^s)^r = g^{sr}$.

    Example:
        >>> strengthen(torch.tensor([4.0, -4.0, 0.0]), 0.5).tolist()
        [2.0, -2.0, 0.0]
        >>> strengthen(torch.tensor([4.0, -4.0, 0.0]), 0.0).tolist()
        [1.0, 1.0, 1.0]
    """
    powers = torch.as_tensor(strength, dtype=scale.dtype, device=scale.device)
    return torch.where(powers == 0, torch.ones_like(scale), scale.sign() * scale.abs().pow(powers))


def _power(scale: Tensor, exponent: float) -> Tensor:
    """Raises a scale to a power, with a finite value and gradient at zero."""
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
    r"""Scales the input channels of a layer: $s \odot x$, equivalent to scaling the columns of its weight.

    Args:
        x: Input of the layer.
        scale: Input scale $s$.
        channel_dim: Channel axis of `x`.
        keep: Which tensor to save for the backward pass, see `scale_output`. `"output"` is free where the layer saves
            its input anyway, as a LoRA adapter does.

    Returns:
        The scaled input, in the dtype of `x`; half precision is rounded by `san_peft.rounding.multiply`.

    Raises:
        SanError: If the length of `scale` differs from the size of the channel axis.

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

    The second form of the gradient reuses the output $y$, which the next operation usually saves anyway, instead of
    saving $z$: no extra activation memory. The first form is used where a scale is closer to zero than `NEAR_ZERO`
    (checked on the CPU only; on other devices a channel scaled by exactly zero gets gradient zero), in compiled code,
    and with a shift in half precision, where $y - t$ would cancel.

    Args:
        z: Output of the frozen layer.
        scale: Scale $g$; `None` is one.
        shift: Shift $t$; `None` is zero.
        channel_dim: Channel axis of `z`.
        inplace: Whether `z` may be overwritten. Safe only if nothing else reads `z` and the layer that computed it
            does not save its output for backward.
        keep: Which tensor to save for the backward pass, `"output"` or `"input"`. Use `"input"` if a later operation,
            such as `ReLU(inplace=True)`, overwrites the output.

    Returns:
        The scaled and shifted output, in the dtype of `z`; half precision is rounded by
        `san_peft.rounding.multiply`, so that a scale near one is not lost.

    Raises:
        SanError: If the length of a vector differs from the size of the channel axis.

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
    r"""Folds a scale, a shift and an input scale into the weight and bias of a dense or convolutional layer.

    $$ W' = \operatorname{diag}(g)\, W \,\operatorname{diag}(s), \qquad b' = g \odot b + t $$

    Exact for every stride, dilation and zero padding, because the shift goes into the bias, which is added after the
    padding.

    The product is computed in at least float32 and rounded once. Rounding to float16 and bfloat16 is dithered
    (`rounding.round_to`): with round-to-nearest, no weight changes until its scale is about half a percent away from
    one. The error of one entry is up to one ulp, twice that of round-to-nearest, while sums over many entries match
    float32. Entries whose factors are one are returned bit for bit. The gradient is that of unrounded folding.

    Args:
        weight: Frozen weight: (out, in) dense; (out, in/groups, *kernel) convolution; with `transposed`, (in, out) as
            in GPT-2's `Conv1D` or (in, out/groups, *kernel) as in a transposed convolution.
        bias: Frozen bias, or `None`.
        scale: Scale $g$ of the layer; `None` is one.
        input_scale: Scale $s$ propagated from anterior layers; `None` where nothing propagates.
        shift: Shift $t$; `None` is zero. It becomes the bias of a layer without one.
        groups: Number of groups of the convolution.
        transposed: Whether the input axis of the weight comes first.
        dtype: Dtype of the folded weight, and of a bias created for a shift; `None` is the dtype of the weight.

    Returns:
        The folded weight and bias, as new tensors; the bias is `None` if there is neither a bias nor a shift.

    Raises:
        SanError: If the length of a vector differs from its axis, or `groups` does not divide the channels.

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
    """Multiplies a weight with factors that broadcast over its grouped shape; half precision in chunks."""
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
    entries = max(least, min(most, weight.numel() // 40))  # temporaries of 20 bytes per entry, next to a weight of 2
    count = max(1, entries * shape[1] // max(1, weight.numel()))
    for start in range(0, shape[1], count):
        part = source[:, start : start + count].to(wide, copy=True)
        for factor in factors:
            part.mul_(factor.detach()[:, start : start + count] if factor.shape[1] > 1 else factor.detach())
        result[:, start : start + count] = rounding.round_to(part, dtype)
    return folded


def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds by dithering, with a straight-through gradient."""
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
    """Returns the number of output and input channels of a weight in one of the layouts of `fold`.

    Raises:
        SanError: If `groups` does not divide the leading axis, or the weight has fewer than two axes.
    """
    if weight.dim() < 2 or groups < 1 or weight.shape[0] % groups:
        raise SanError(f"A weight of shape {tuple(weight.shape)} cannot be split into {groups} groups.")
    leading, other = weight.shape[0], weight.shape[1] * groups
    return (other, leading) if transposed else (leading, other)


def _weight_factors(
    weight: Tensor, scale: Tensor | None, input_scale: Tensor | None, dtype: torch.dtype, groups: int, transposed: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Reshapes both vectors to broadcast over the weight viewed as (groups, first/groups, second, *kernel)."""
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
