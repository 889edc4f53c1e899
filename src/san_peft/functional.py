r"""The equations of SAN, as functions of tensors: no modules, no configuration, no PEFT.

A layer with frozen weight $W$ and bias $b$, own scale $g$, shift $t$ and input scale $s$ computes

$$ y = g \odot \bigl( W (s \odot x) + b \bigr) + t, \qquad s = \prod_e P_e(g_e)^k, $$

where edge $e$ carries the scale $g_e$ of an anterior layer through its channel map $P_e$. `scale_input` and
`scale_output` are the two halves of that equation, `propagate` is one factor of $s$, and `fold` writes all of it into
the weight. Over another adapter, such as LoRA, $g$ is no parameter but comes out of that adapter: see `decomposition`.
Source: arXiv 2409.06706; the equations are this library's reading of it, see the guide to the method.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from san_peft.errors import SanError

NEAR_ZERO = 1e-2
"""Below this magnitude of a scale its gradient is taken from a kept copy of the channel, not from a division."""


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
        exponent: The exponent $k$. A fraction keeps the sign of a negative scale: $\operatorname{sign}(g)|g|^k$.
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
    if exponent == 1.0:
        powered = scale
    elif float(exponent).is_integer():
        powered = scale.pow(int(exponent))
    else:
        powered = scale.sign() * scale.abs().pow(exponent)
    if bound is not None:
        powered = 1 + bound * torch.tanh((powered - 1) / bound)
    if index is None:
        return powered
    gathered = powered[index.clamp(min=0)]
    return torch.where(index < 0, torch.ones_like(gathered), gathered)


def scale_input(
    x: Float[Tensor, "*shape"],
    scale: Float[Tensor, " channels"],
    channel_dim: int = -1,
    *,
    keep_output: bool = False,
) -> Float[Tensor, "*shape"]:
    r"""Scales the input channels of a layer: $s \odot x$, which equals scaling the columns of its weight.

    Args:
        x: Input of the layer.
        scale: Input scale $s$. It is cast to the type of `x`, never the other way round.
        channel_dim: Axis of the channels in `x`.
        keep_output: Whether to keep the scaled input for the backward pass in place of `x`, as in `scale_output`. This
            costs nothing where the layer keeps its input anyway: a trained layer, a LoRA adapter.

    Returns:
        The scaled input, of the type of `x`.

    Raises:
        SanError: If the length of `scale` is not the size of that axis.

    Example:
        >>> scale_input(torch.ones(2, 3), torch.tensor([1.0, 2.0, 3.0])).tolist()
        [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]
    """
    factor = _along(scale, x, channel_dim, "input scale")
    if torch.is_grad_enabled() and scale.requires_grad and not torch.compiler.is_compiling():
        return _ScaleInput.apply(x, factor, channel_dim % x.dim(), keep_output)
    return x * factor


class _ScaleInput(torch.autograd.Function):
    """`x * factor` whose backward pass makes one tensor of the size of `x`, where autograd's product makes two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor, dim: int, keep_output: bool) -> Tensor:
        y = x * factor
        ctx.dim, ctx.keep_output = dim, keep_output
        near_zero = kept = None
        if keep_output:
            near_zero, kept = _near_zero(x, factor, dim)
        ctx.save_for_backward(y if keep_output else x, factor, near_zero, kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # type: ignore[override]  # what the decorator returns
        (grad,) = grads
        saved, factor, near_zero, kept = ctx.saved_tensors
        product = grad * saved
        grad_factor = _sum_but(product, ctx.dim)
        if ctx.keep_output:
            grad_factor = _divided(grad_factor, factor, grad, near_zero, kept, ctx.dim)
        grad_x = torch.mul(grad, factor, out=product) if ctx.needs_input_grad[0] else None
        return grad_x, grad_factor.to(factor.dtype), None, None


def _near_zero(x: Tensor, factor: Tensor, dim: int) -> tuple[Tensor, Tensor | None]:
    """Channels whose factor is too near zero to divide by, and a copy of them."""
    channels = torch.nonzero(factor.flatten().abs() < NEAR_ZERO).flatten()
    return channels, x.index_select(dim, channels) if channels.numel() else None


def _divided(total: Tensor, factor: Tensor, grad: Tensor, near_zero: Tensor, kept: Tensor | None, dim: int) -> Tensor:
    """The gradient of a factor from sums over the scaled tensor, and from the kept channels where it is near zero."""
    out = total / factor
    if kept is not None:
        exact = _sum_but(grad.index_select(dim, near_zero) * kept, dim)
        out.view(-1)[near_zero] = exact.view(-1)
    return out


def _sum_but(x: Tensor, dim: int) -> Tensor:
    """Sums over all axes but one, in float32 at least."""
    dims = [d for d in range(x.dim()) if d != dim]
    return x.sum(dims, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))


def scale_output(
    z: Float[Tensor, "*shape"],
    scale: Float[Tensor, " channels"] | None,
    shift: Float[Tensor, " channels"] | None = None,
    channel_dim: int = -1,
    *,
    inplace: bool = False,
) -> Float[Tensor, "*shape"]:
    r"""Scales and shifts the output channels of a layer.

    $$ y = g \odot z + t, \qquad
       \frac{\partial L}{\partial g_j} = \sum_n \dot y_{nj} z_{nj} = \frac{1}{g_j} \sum_n \dot y_{nj} (y_{nj} - t_j) $$

    The second form of the gradient needs the output $y$, which the operation that follows usually keeps anyway, in
    place of $z$, which nobody else keeps: no activation of its own is saved there. Channels with a scale nearer to zero
    than `NEAR_ZERO` are kept and take the first form. Compiled code, and a shift in half precision (where $y - t$ would
    cancel), take the first form throughout.

    Args:
        z: Output of the frozen layer.
        scale: Scale $g$, cast to the type of `z`; `None` is one.
        shift: Shift $t$, cast to the type of `z`; `None` is zero.
        channel_dim: Axis of the channels in `z`.
        inplace: Whether `z` may be overwritten. Only for a tensor nobody else reads, fresh from a layer that does not
            keep its own output.

    Returns:
        The scaled and shifted output, of the type of `z`.

    Raises:
        SanError: If the length of a vector is not the size of that axis.

    Example:
        >>> y = scale_output(torch.ones(2, 2), torch.tensor([2.0, 3.0]), shift=torch.tensor([0.0, 1.0]))
        >>> y.tolist()
        [[2.0, 4.0], [2.0, 4.0]]
    """
    if scale is None:
        return z if shift is None else z + _along(shift, z, channel_dim, "shift")
    factor = _along(scale, z, channel_dim, "scale")
    term = None if shift is None else _along(shift, z, channel_dim, "shift")
    cancels = term is not None and z.dtype in (torch.float16, torch.bfloat16)
    lean = torch.is_grad_enabled() and scale.requires_grad and not cancels and not torch.compiler.is_compiling()
    if lean:
        return _ScaleOutput.apply(z, factor, term, channel_dim % z.dim(), inplace)
    if inplace and not (torch.is_grad_enabled() and scale.requires_grad):
        return z.mul_(factor) if term is None else z.mul_(factor).add_(term)
    return z * factor if term is None else z * factor + term


class _ScaleOutput(torch.autograd.Function):
    """`z * factor + shift` that saves its output in place of its input."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, factor: Tensor, shift: Tensor | None, dim: int, inplace: bool) -> Tensor:
        near_zero, kept = _near_zero(z, factor, dim)
        y = z.mul_(factor) if inplace else z * factor
        if shift is not None:
            y += shift
        if inplace:
            ctx.mark_dirty(y)
        ctx.dim = dim
        ctx.save_for_backward(y, factor, shift, near_zero, kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # type: ignore[override]  # what the decorator returns
        (grad,) = grads
        y, factor, shift, near_zero, kept = ctx.saved_tensors
        grad_z = grad_factor = grad_shift = None
        product = None
        if shift is not None and (ctx.needs_input_grad[2] or ctx.needs_input_grad[1]):
            grad_shift = _sum_but(grad, ctx.dim)
        if ctx.needs_input_grad[1]:
            product = grad * y
            total = _sum_but(product, ctx.dim)
            if shift is not None:
                total -= grad_shift * shift
            grad_factor = _divided(total, factor, grad, near_zero, kept, ctx.dim).to(factor.dtype)
        if ctx.needs_input_grad[0]:
            grad_z = grad * factor if product is None else torch.mul(grad, factor, out=product)
        if grad_shift is not None:
            grad_shift = grad_shift.to(grad.dtype) if ctx.needs_input_grad[2] else None
        return grad_z, grad_factor, grad_shift, None, None


def fold(
    weight: Float[Tensor, "*weight"],
    bias: Float[Tensor, " out"] | None,
    scale: Float[Tensor, " out"] | None,
    input_scale: Float[Tensor, " in"] | None = None,
    shift: Float[Tensor, " out"] | None = None,
    *,
    groups: int = 1,
    transposed: bool = False,
) -> tuple[Float[Tensor, "*weight"], Float[Tensor, " out"] | None]:
    r"""Folds a scale, a shift and the scale propagated to the input into a dense or convolutional layer.

    $$ W' = \operatorname{diag}(g)\, W \,\operatorname{diag}(s), \qquad b' = g \odot b + t $$

    Exact for every stride, dilation and zero padding, because the shift goes into the layer's own bias, which is added
    after the padding. Computed in float32 at least, and cast to the weight's type last.

    Args:
        weight: Frozen weight: (out, in) dense; (out, in/groups, *kernel) convolution; with `transposed`, (in, out) as
            in GPT-2's `Conv1D` or (in, out/groups, *kernel) as in a transposed convolution.
        bias: Frozen bias, or `None`.
        scale: The layer's own scale $g$; `None` is one.
        input_scale: Scale $s$ propagated from anterior layers; `None` where nothing propagates.
        shift: Shift $t$; `None` is zero. Without a bias it becomes one.
        groups: Number of groups of the convolution.
        transposed: Whether the input axis of the weight comes first.

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
    rows, columns = _weight_factors(weight, scale, input_scale, wide, groups, transposed)
    folded = weight.to(wide, copy=True)
    for factor in (rows, columns):
        if factor is not None:
            grouped = folded.view(_grouped_shape(weight, groups))
            grouped.mul_(factor)
    _check_lengths(weight, bias, shift, groups, transposed)
    if bias is not None:
        out = bias.to(wide, copy=True)
    elif shift is not None:
        out = torch.zeros_like(shift, dtype=wide)
    else:
        return folded.to(weight.dtype), None
    if scale is not None:
        out *= scale.to(wide)
    if shift is not None:
        out += shift.to(wide)
    return folded.to(weight.dtype), out.to(weight.dtype if bias is None else bias.dtype)


def unfold(
    weight: Float[Tensor, "*weight"],
    bias: Float[Tensor, " out"] | None,
    scale: Float[Tensor, " out"] | None,
    input_scale: Float[Tensor, " in"] | None = None,
    shift: Float[Tensor, " out"] | None = None,
    *,
    groups: int = 1,
    transposed: bool = False,
) -> tuple[Float[Tensor, "*weight"], Float[Tensor, " out"] | None]:
    r"""Takes out of a layer what `fold` put in: the inverse, up to rounding.

    $$ W = \operatorname{diag}(g)^{-1} W' \operatorname{diag}(s)^{-1}, \qquad b = (b' - t) \oslash g $$

    Args:
        weight: Folded weight, in one of the layouts of `fold`.
        bias: Folded bias, or `None`.
        scale: The scale that was folded.
        input_scale: The input scale that was folded.
        shift: The shift that was folded.
        groups: Number of groups of the convolution.
        transposed: Whether the input axis of the weight comes first.

    Returns:
        The weight and bias before folding. A bias that `fold` created comes back as zeros.

    Raises:
        SanError: If a factor is zero (what it was multiplied onto is lost), or a length does not fit.

    Example:
        >>> weight, bias = unfold(torch.full((1, 2), 6.0), None, torch.tensor([2.0]), torch.tensor([3.0, 1.0]))
        >>> weight.tolist()
        [[1.0, 3.0]]
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    inverse = []
    for name, vector in (("scale", scale), ("input scale", input_scale)):
        if vector is not None and bool((vector == 0).any()):
            lost = torch.nonzero(vector == 0).flatten().tolist()
            raise SanError(
                f"Cannot unfold: {len(lost)} of the {vector.numel()} entries of the {name} are zero (channels "
                f"{lost[:5]}{' ...' if len(lost) > 5 else ''}), so the weights there are lost. Keep a copy."
            )
        inverse.append(None if vector is None else vector.to(wide).reciprocal())
    base = bias if bias is None or shift is None else (bias.to(wide) - shift.to(wide))
    restored, base = fold(weight, base, inverse[0], inverse[1], groups=groups, transposed=transposed)
    return restored, base if base is None or bias is None else base.to(bias.dtype)


def _along(vector: Tensor, x: Tensor, channel_dim: int, name: str) -> Tensor:
    """Views a vector so that it broadcasts along one axis of `x`, in the type of `x`."""
    if vector.dim() != 1 or vector.numel() != x.shape[channel_dim]:
        raise SanError(
            f"The {name} has shape {tuple(vector.shape)}, but axis {channel_dim} of the activation of shape "
            f"{tuple(x.shape)} has {x.shape[channel_dim]} channels."
        )
    dim = channel_dim % x.dim()
    return vector.to(x.device, x.dtype).view([-1 if d == dim else 1 for d in range(x.dim())])


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
