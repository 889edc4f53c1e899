"""Scales the channels of an activation, with low memory use in the backward pass and dithered rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from san_peft import kernels, rounding
from san_peft.rounding import HALF

NEAR_ZERO = 1e-2
"""Magnitude of a scale below which its gradient is computed from the saved input, not by a division."""

SALT = {"scale": 0, "magnitude": 7919, "input_scale": 104729}
"""Salts of the hash that rounds half precision, by kind of factor. Factors that are applied to the same value one after
the other need different salts, see `rounding.multiply`."""


class Factor(NamedTuple):
    """A scale in the form in which a layer applies it.

    Attributes:
        wide: The scale in at least float32; gradients flow to it.
        low: The scale in the dtype of the activation, used for the activation's gradient; `None` to cast on demand.
        divisible: Whether all entries are far enough from zero for the second form of the gradient, see `scale_output`.
        deferred: Whether the division in that form is deferred to the code that computed the scale, which does it for
            many layers at once. The returned gradient is then multiplied by the scale.
        salt: Salt of the rounding hash, one of `SALT`.
    """

    wide: Tensor
    low: Tensor | None = None
    divisible: bool = True
    deferred: bool = False
    salt: int = 0


def near_zero(scale: Float[Tensor, "*shape"]) -> bool:
    """Returns whether an entry is closer to zero than `NEAR_ZERO`; always `False` off the CPU, to avoid a sync."""
    if scale.device.type != "cpu" or plain_operations():
        return False
    return bool(scale.numel()) and float(np.abs(scale.detach().numpy()).min()) < NEAR_ZERO


def spread(factor: Factor) -> Tensor:
    """Returns a factor in at least float32 for use in autograd operations; handles `Factor.deferred`."""
    return _TimesScale.apply(factor.wide) if factor.deferred and torch.is_grad_enabled() else factor.wide


def plain_operations() -> bool:
    """Returns whether to avoid custom autograd functions: in compiled or traced code and under `torch.func`."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return True
    return torch._C._functorch.maybe_current_level() is not None  # type: ignore[attr-defined]


def is_dispatched() -> bool:
    """Returns whether a dispatch mode is active, such as selective checkpointing, which may save any result."""
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


def scale_channels(
    x: Tensor,
    factor: Factor,
    shift: Tensor | None = None,
    channel_dim: int = -1,
    *,
    inplace: bool = False,
    keep: str = "output",
) -> Tensor:
    """Scales and shifts channels like `scale_output`, without checks."""
    if factor.wide.device != x.device:
        factor = factor._replace(wide=factor.wide.to(x.device), low=None)
        shift = None if shift is None else shift.to(x.device)
    dim, wide = channel_dim % x.dim(), factor.wide
    if plain_operations():
        return _plain_scale(x, wide, shift, dim, factor.salt)
    inplace = inplace and not is_dispatched()
    trained = torch.is_grad_enabled() and (wide.requires_grad or (shift is not None and shift.requires_grad))
    if trained:
        keep_output = keep == "output" and factor.divisible and not (x.dtype in HALF and shift is not None)
        options = (inplace, keep_output, factor.deferred, factor.salt)
        return _ScaleChannels.apply(x, wide, factor.low, shift, dim, *options)
    if inplace and x.dtype not in HALF and not (torch.is_grad_enabled() and x.requires_grad and x.is_leaf):
        y = x.mul_(along(wide, x, dim).to(x.dtype))
        return y if shift is None else y.add_(along(shift, x, dim).to(x.dtype))
    if torch.is_grad_enabled() and x.requires_grad:
        return _ScaleChannels.apply(x, wide, factor.low, shift, dim, False, False, False, factor.salt)
    return _multiply(x, wide, shift, dim, factor.salt)


def _multiply(x: Tensor, wide: Tensor, shift: Tensor | None, dim: int, salt: int) -> Tensor:
    if kernels.available(x) and x.is_contiguous():
        return kernels.scale_forward(x, wide, shift, dim, salt=salt)
    return rounding.multiply(x, along(wide, x, dim), dim, None if shift is None else along(shift, x, dim), salt)


def _plain_scale(x: Tensor, wide: Tensor, shift: Tensor | None, dim: int, salt: int) -> Tensor:
    """Scales with operations that can be compiled and transformed; rounding has a straight-through gradient."""
    y = x * along(wide, x, dim)
    if shift is not None:
        y = y + along(shift, x, dim)
    y = y.to(x.dtype)
    if x.dtype not in HALF:
        return y
    with torch.no_grad():
        vectors = [None if v is None else along(v.detach(), x, dim) for v in (wide, shift)]
        rounded = rounding.multiply(x.detach(), vectors[0], dim, vectors[1], salt)  # type: ignore[arg-type]
        correction = rounded - y.detach()
    return y + correction


class _ScaleChannels(torch.autograd.Function):
    """Computes `x * factor + shift` and saves either its input or its output for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        wide: Tensor,
        low: Tensor | None,
        shift: Tensor | None,
        dim: int,
        inplace: bool,
        keep_output: bool,
        deferred: bool,
        salt: int,
    ) -> Tensor:
        if inplace and keep_output and x.dtype not in HALF:
            y = x.mul_(along(wide, x, dim).to(x.dtype))
            if shift is not None:
                y += along(shift, x, dim).to(x.dtype)
            ctx.mark_dirty(y)
        else:
            y = _multiply(x, wide, shift, dim, salt)
        ctx.dim, ctx.deferred, ctx.keep_output = dim, deferred, keep_output
        trained = any(ctx.needs_input_grad[i] for i in (1, 3))
        ctx.save_for_backward((y if keep_output else x) if trained else None, wide, low, shift)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        again = torch.is_grad_enabled()  # double backward
        saved, wide, low, shift = ctx.saved_tensors
        grad_scale: Any
        need_x, need_scale, need_shift = (ctx.needs_input_grad[i] for i in (0, 1, 3))
        need_shift = need_shift or (need_scale and shift is not None and ctx.keep_output)
        grad_x = grad_scale = grad_shift = None
        if need_scale and not again and kernels.available(grad) and saved.is_contiguous():
            grad_x, grad_scale, grad_shift = kernels.scale_backward(
                grad.contiguous(), saved, wide, ctx.dim, need_x=need_x, need_shift=need_shift
            )
        else:
            product = None
            if need_shift:
                grad_shift = _sum_but(grad, ctx.dim)
            if need_scale:
                product = grad * saved
                grad_scale = _sum_but(product, ctx.dim)
            if need_x:
                whole = _TimesScale.apply(wide) if again and ctx.deferred else wide
                narrow = whole.to(grad.dtype) if again or low is None or low.dtype != grad.dtype else low
                factor = along(narrow, grad, ctx.dim)
                grad_x = grad * factor if again or product is None else torch.mul(grad, factor, out=product)
        if need_scale and ctx.keep_output:
            if shift is not None:
                grad_scale = grad_scale - grad_shift * shift  # type: ignore[operator]
            if not ctx.deferred:
                grad_scale = undo_scale(grad_scale, wide)
        elif need_scale and ctx.deferred:
            grad_scale = grad_scale * (_TimesScale.apply(wide) if again else wide)
        if grad_scale is not None:
            grad_scale = grad_scale.to(wide.dtype)
        if grad_shift is not None:
            grad_shift = grad_shift.to(shift.dtype) if ctx.needs_input_grad[3] else None  # type: ignore[union-attr]
        return grad_x, grad_scale, None, grad_shift, None, None, None, None, None


def undo_scale(total: Tensor, scale: Tensor) -> Tensor:
    """Divides sums over a scaled tensor by the scale; returns zero where the scale is zero."""
    zero = scale == 0
    if torch.is_grad_enabled():
        scale = scale.masked_fill(zero, 1)
    return torch.where(zero, torch.zeros_like(total), total / scale)


def replayed(operation: Callable[..., Tensor], inputs: Sequence[Tensor | None], grad: Tensor) -> list[Tensor | None]:
    """Recomputes an operation and returns its gradients as differentiable tensors, for double backward.

    Args:
        operation: The operation, written in differentiable operations.
        inputs: Its inputs.
        grad: Gradient of its output.
    """
    wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    found = iter(torch.autograd.grad(operation(*inputs), wanted, grad, create_graph=True, allow_unused=True))
    return [next(found) if tensor is not None and tensor.requires_grad else None for tensor in inputs]


def _sum_but(x: Tensor, dim: int) -> Tensor:
    """Sums over all axes but one, in at least float32."""
    dims = [d for d in range(x.dim()) if d != dim]
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.sum(dims, dtype=wide) if dims else x.to(wide)


def along(vector: Tensor, x: Tensor, dim: int) -> Tensor:
    """Views a vector to broadcast along one axis of `x`, on the device of `x`."""
    if vector.device != x.device:
        vector = vector.to(x.device)
    return vector.view([-1 if d == dim % x.dim() else 1 for d in range(x.dim())])


class _TimesScale(torch.autograd.Function):
    """Identity whose gradient is multiplied by the scale, to cancel the division of `Factor.deferred`."""

    @staticmethod
    def forward(ctx: Any, wide: Tensor) -> Tensor:
        ctx.save_for_backward(wide)
        return wide.view_as(wide)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.saved_tensors[0]
