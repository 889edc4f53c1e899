"""Matrix products with a frozen weight and a low-rank adapter, which copy neither the weight nor an activation."""

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
"""Entries of a half-precision weight that are cast to float32 at a time, by type of device: 1 MiB stays in the cache of
a processor, and 64 MiB keep a GPU busy, which with small parts would wait for the launches of their kernels."""


def weight_product(weight: Float[Tensor, "out in"], rows: Float[Tensor, "r in"]) -> Float[Tensor, "out r"]:
    r"""Multiplies a frozen weight with a few rows: $M = W A^\top$, in float32 at least.

    A weight in half precision is read once, as it is. On a GPU a weight in bfloat16 is multiplied with the rows split
    into a high and a low half, both in bfloat16, and summed in float32; elsewhere it is cast `CHUNK` entries at a time.
    No larger copy is made, in neither pass.

    Args:
        weight: Frozen weight $W$; no gradient flows to it.
        rows: The rows $A$, of the same type as the weight or wider.

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
    """`weight @ rows.T` for a weight in half precision."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return times_rows(weight, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (weight,) = ctx.saved_tensors
        with full_types(weight):
            if torch.is_grad_enabled():  # the gradient is to be differentiated once more
                return None, torch.mm(grads[0].t(), weight.to(grads[0].dtype))
            return None, times_columns(weight, grads[0])


def times_rows(weight: Tensor, rows: Tensor) -> Tensor:
    """Returns `weight @ rows.T` in the type of the rows, float32 at least, without a gradient."""
    if weight.dtype == rows.dtype:
        return torch.mm(weight, rows.t())
    if _splits(weight, rows):
        r = rows.shape[0]
        both = multiply_wide(weight, _halves(rows, weight.dtype).t())
        return both[:, :r] + both[:, r:]
    parts = [torch.mm(chunk.to(rows.dtype), rows.t()) for chunk in weight.split(rows_at_once(weight))]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def times_columns(weight: Tensor, columns: Tensor) -> Tensor:
    """Returns `columns.T @ weight` in the type of the columns, float32 at least, without a gradient."""
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
    """Multiplies two matrices in bfloat16 on a GPU, with the result in float32."""
    return torch.mm(a, b, out_dtype=torch.float32)  # type: ignore[call-overload]


def _splits(weight: Tensor, other: Tensor) -> bool:
    # float16 is left out: the low halves of small gradients would leave its range
    return weight.is_cuda and weight.dtype == torch.bfloat16 and other.dtype == torch.float32


def _halves(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Splits rows into what a type can hold of them and what is left, one below the other."""
    high = rows.to(dtype)
    return torch.cat([high, (rows - high).to(dtype)])


def rows_at_once(weight: Float[Tensor, "out in"]) -> int:
    """Returns how many rows of a half-precision weight are cast at a time."""
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
    r"""A frozen dense layer with LoRA, in one pass.

    $$ y = W x + c\,B A\,x + b $$

    Both passes write into one tensor of the size of the output, or of the input, where autograd makes one for each
    term. For the backward pass it keeps $x$ and $A x$.

    Args:
        x: Input of the layer. All tensors have one dtype.
        weight: Frozen weight $W$; it gets no gradient, and neither does the bias.
        bias: Frozen bias, or `None`.
        lora_A: Down-projection.
        lora_B: Up-projection.
        scaling: The factor $c$.
        dropped: What the adapter reads in place of `x`, after dropout.

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
    """Switches autocast off where it is on: the tensors have the type in which they are to be multiplied."""
    if not torch.is_autocast_enabled(x.device.type):
        yield
        return
    with torch.autocast(x.device.type, enabled=False):
        yield


class _AdaptedLinear(torch.autograd.Function):
    """Matrix products that accumulate in place, forward and backward."""

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
        y = x.new_empty(*x.shape[:-1], weight.shape[0])  # in its final shape, so that it may be overwritten
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
    """The gradients of `_AdaptedLinear`, in operations that can be differentiated once more."""
    flat, rows, c = _rows(grad), _rows(read), ctx.scaling
    frozen, low = grad @ weight, c * ((grad @ lora_B) @ lora_A)
    grad_a, grad_b = c * (flat @ lora_B).t() @ rows, c * flat.t() @ (rows @ lora_A.t())
    x, dropped = (frozen, low) if ctx.apart else (frozen + low, None)
    return x, dropped, None, None, grad_a, grad_b, None


def _rows(x: Tensor) -> Tensor:
    """Views a tensor as a matrix with all axes but the last as rows; a copy where its strides do not allow it."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _scaled_product(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Returns `scaling * a @ b` by one product."""
    return torch.mm(a, b) if scaling == 1 else torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scaling)
