"""Multiplies with a frozen weight and a low-rank adapter without copying the weight or an activation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from san_peft.scaling import plain_operations

CHUNK = {"cpu": 2**18, "cuda": 2**24}
"""Entries of a half-precision weight that are cast to float32 at a time, by device type. 1 MiB fits into a CPU cache;
64 MiB keep a GPU busy, where small chunks would be bound by kernel launches."""


def weight_product(weight: Float[Tensor, "out in"], rows: Float[Tensor, "r in"]) -> Float[Tensor, "out r"]:
    r"""Multiplies a frozen weight with a few rows: $M = W A^\top$, in at least float32.

    A half-precision weight is read once. On a GPU, a bfloat16 weight is multiplied with the high and the low bfloat16
    half of the rows, accumulated in float32; otherwise the weight is cast `CHUNK` entries at a time. Neither pass makes
    a larger copy.

    Args:
        weight: Frozen weight $W$; no gradient flows to it.
        rows: Rows $A$, in the dtype of the weight or a wider one.

    Returns:
        The product, in float32 or float64.

    Example:
        >>> weight_product(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 1.0]])).tolist()
        [[3.0], [7.0]]
    """
    wide = torch.promote_types(torch.promote_types(weight.dtype, rows.dtype), torch.float32)
    weight, rows = weight.detach(), rows.to(wide)
    if weight.dtype == wide:
        return torch.mm(weight, rows.t())
    if plain_operations():
        return torch.mm(weight.to(wide), rows.t())
    return _WeightProduct.apply(weight, rows)


class _WeightProduct(torch.autograd.Function):
    """Computes `weight @ rows.T` for a half-precision weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return times_rows(weight, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (weight,) = ctx.saved_tensors
        with full_types(weight):
            if torch.is_grad_enabled():  # double backward
                return None, torch.mm(grads[0].t(), weight.to(grads[0].dtype))
            return None, times_columns(weight, grads[0])


def times_rows(weight: Tensor, rows: Tensor) -> Tensor:
    """Returns `weight @ rows.T` in the dtype of the rows, at least float32, without a gradient."""
    if weight.dtype == rows.dtype:
        return torch.mm(weight, rows.t())
    if _splits(weight, rows):
        r = rows.shape[0]
        both = multiply_wide(weight, _halves(rows, weight.dtype).t())
        return both[:, :r] + both[:, r:]
    parts = [torch.mm(chunk.to(rows.dtype), rows.t()) for chunk in weight.split(rows_at_once(weight))]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def times_columns(weight: Tensor, columns: Tensor) -> Tensor:
    """Returns `columns.T @ weight` in the dtype of the columns, at least float32, without a gradient."""
    if weight.dtype == columns.dtype:
        return torch.mm(columns.t(), weight)
    if _splits(weight, columns):
        r = columns.shape[1]
        both = multiply_wide(_halves(columns.t(), weight.dtype), weight)
        return both[:r] + both[r:]
    count = rows_at_once(weight)
    total = None
    for chunk, part in zip(weight.split(count), columns.split(count), strict=True):
        chunk = chunk.to(columns.dtype)
        total = torch.mm(part.t(), chunk) if total is None else total.addmm_(part.t(), chunk)
    return total if total is not None else columns.new_zeros(columns.shape[1], weight.shape[1])


def multiply_wide(a: Tensor, b: Tensor) -> Tensor:
    """Multiplies two bfloat16 matrices on a GPU with a float32 result."""
    return torch.mm(a, b, out_dtype=torch.float32)  # type: ignore[call-overload]


def _splits(weight: Tensor, other: Tensor) -> bool:
    # not for float16: the low halves of small gradients would underflow
    return weight.is_cuda and weight.dtype == torch.bfloat16 and other.dtype == torch.float32


def _halves(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Splits rows into their rounded values and the remainders, both in a dtype, stacked vertically."""
    high = rows.to(dtype)
    return torch.cat([high, (rows - high).to(dtype)])


def rows_at_once(weight: Float[Tensor, "out in"]) -> int:
    """Returns the number of rows of a half-precision weight that are cast at a time."""
    return max(1, CHUNK.get(weight.device.type, CHUNK["cuda"]) // max(1, weight.shape[1]))


def adapted_linear(
    x: Float[Tensor, "*batch in"],
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"] | None,
    lora_A: Float[Tensor, "r in"],
    lora_B: Float[Tensor, "out r"],
    scaling: float = 1.0,
    dropped: Float[Tensor, "*batch in"] | None = None,
) -> Float[Tensor, "*batch out"]:
    r"""Applies a frozen dense layer with LoRA in one pass.

    $$ y = W x + c\,B A\,x + b $$

    Each pass accumulates into one tensor of the size of the output or the input, where autograd allocates one per term.
    Saves $x$ and $A x$ for the backward pass.

    Args:
        x: Input of the layer. All tensors have the same dtype.
        weight: Frozen weight $W$; neither it nor the bias gets a gradient.
        bias: Frozen bias, or `None`.
        lora_A: Down-projection.
        lora_B: Up-projection.
        scaling: Scaling $c$ of the adapter.
        dropped: Input of the adapter, if it is not `x`: `x` after dropout.

    Returns:
        The output of the layer.

    Example:
        >>> x, weight = torch.ones(1, 2), torch.eye(2)
        >>> a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0], [1.0]])
        >>> adapted_linear(x, weight, None, a, b, scaling=0.5).tolist()
        [[1.0, 1.5]]
    """
    if plain_operations():
        update = linear(linear(x if dropped is None else dropped, lora_A), lora_B)
        return linear(x, weight.detach(), None if bias is None else bias.detach()) + update * scaling
    with full_types(x):
        return _AdaptedLinear.apply(x, dropped, weight, bias, lora_A, lora_B, scaling)


@contextmanager
def full_types(x: Tensor) -> Iterator[None]:
    """Disables autocast, because the tensors already have the dtype to multiply in."""
    if not torch.is_autocast_enabled(x.device.type):
        yield
        return
    with torch.autocast(x.device.type, enabled=False):
        yield


class _AdaptedLinear(torch.autograd.Function):
    """Accumulates matrix products in place, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
    ) -> Tensor:
        flat = _rows(x)
        hidden = _scaled_product(flat if dropped is None else _rows(dropped), lora_A.t(), scaling)
        y = x.new_empty(*x.shape[:-1], weight.shape[0])  # final shape: a view could not be overwritten
        out = _rows(y)
        if bias is None:
            torch.mm(flat, weight.t(), out=out)
        else:
            torch.addmm(bias, flat, weight.t(), out=out)
        out.addmm_(hidden, lora_B.t())
        ctx.scaling, ctx.shape, ctx.apart = scaling, x.shape, dropped is not None
        ctx.save_for_backward(x if dropped is None else dropped, hidden, weight, lora_A, lora_B)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        read, hidden, weight, lora_A, lora_B = ctx.saved_tensors
        grad = _rows(grads[0])
        with full_types(grad):
            if torch.is_grad_enabled():
                return _adapted_gradients(ctx, grads[0], read, weight, lora_A, lora_B)
            grad_x = grad_dropped = grad_a = grad_b = None
            grad_hidden = _scaled_product(grad, lora_B, ctx.scaling)
            if ctx.needs_input_grad[5]:
                grad_b = torch.mm(grad.t(), hidden)
            if ctx.needs_input_grad[4]:
                grad_a = torch.mm(grad_hidden.t(), _rows(read))
            if ctx.needs_input_grad[0]:
                grad_x = torch.mm(grad, weight)
                if not ctx.apart:
                    grad_x.addmm_(grad_hidden, lora_A)
                grad_x = grad_x.view(ctx.shape)
            if ctx.apart and ctx.needs_input_grad[1]:
                grad_dropped = torch.mm(grad_hidden, lora_A).view(ctx.shape)
        return grad_x, grad_dropped, None, None, grad_a, grad_b, None


def _adapted_gradients(ctx: Any, grad: Tensor, read: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Any:
    """Returns the gradients of `_AdaptedLinear` from differentiable operations, for double backward."""
    flat, rows, c = _rows(grad), _rows(read), ctx.scaling
    frozen, low = grad @ weight, c * ((grad @ lora_B) @ lora_A)
    grad_a, grad_b = c * (flat @ lora_B).t() @ rows, c * flat.t() @ (rows @ lora_A.t())
    x, dropped = (frozen, low) if ctx.apart else (frozen + low, None)
    return x, dropped, None, None, grad_a, grad_b, None


def _rows(x: Tensor) -> Tensor:
    """Reshapes a tensor to a matrix with all axes but the last as rows; copies only if the strides require it."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _scaled_product(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Returns `scaling * a @ b` from a single call."""
    return torch.mm(a, b) if scaling == 1 else torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scaling)
