r"""Taking a scale per output channel out of a change of a weight: the equations, as functions of tensors.

An adapter turns the frozen weight $W_0$ into $W_0 + \Delta$. The part of $\Delta$ that scales row $j$ is what SAN
propagates. `low_rank_scale` finds it for $\Delta = c\,B A$ without forming $B A$, `dense_scale` for any $\Delta$.
`adapted_linear` is the layer itself, frozen weight and low-rank adapter together.
Source: arXiv 2409.06706 for the idea; the equations are this library's reading of it, see the guide to the method.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from san_peft.errors import SanError

DECOMPOSITIONS = ("norm", "projection")
CHUNK = {"cpu": 2**18, "cuda": 2**24}
"""Entries of a half-precision weight that are cast to float32 at a time, by type of device: 1 MiB stays in the cache of
a processor, and 64 MiB keep a GPU busy, which with small parts would wait for the launches of their kernels."""


def weight_product(weight: Float[Tensor, "out in"], rows: Float[Tensor, "r in"]) -> Float[Tensor, "out r"]:
    r"""Multiplies a frozen weight with a few rows: $M = W A^\top$, in float32 at least.

    A weight in half precision is cast some rows at a time, `CHUNK` entries, in both passes: no larger copy is made.

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
    if torch.compiler.is_compiling():
        return torch.mm(weight.to(wide), rows.t())
    return _WeightProduct.apply(weight, rows)


def rows_at_once(weight: Float[Tensor, "out in"]) -> int:
    """Returns how many rows of a half-precision weight are cast at a time."""
    return max(1, CHUNK.get(weight.device.type, CHUNK["cuda"]) // max(1, weight.shape[1]))


class _WeightProduct(torch.autograd.Function):
    """`weight @ rows.T` for a weight in half precision, cast by chunks of rows."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return torch.cat([torch.mm(chunk.to(rows.dtype), rows.t()) for chunk in weight.split(rows_at_once(weight))])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # type: ignore[override]  # what the decorator returns
        (grad,) = grads
        (weight,) = ctx.saved_tensors
        total = torch.zeros(grad.shape[1], weight.shape[1], dtype=grad.dtype, device=grad.device)
        count = rows_at_once(weight)
        for chunk, part in zip(weight.split(count), grad.split(count), strict=True):
            total.addmm_(part.t(), chunk.to(grad.dtype))
        return None, total


def low_rank_scale(
    product: Float[Tensor, "out r"],
    lora_A: Float[Tensor, "r in"],
    lora_B: Float[Tensor, "out r"],
    norm: Float[Tensor, " out"],
    scaling: float = 1.0,
    decomposition: str = "norm",
    reference: Float[Tensor, " out"] | None = None,
) -> Float[Tensor, " out"]:
    r"""Decomposes the scale out of a low-rank adapter, without forming $B A$.

    With $M = W_0 A^\top$ (`weight_product`), $G = A A^\top$, $n_j = \lVert w_j \rVert^2$ and $c$ the adapter's scaling,

    $$ g_j = \sqrt{1 + \frac{2c \langle B, M \rangle_j + c^2 \langle B G, B \rangle_j}{n_j}} \;\text{(norm)},
       \qquad g_j = 1 + \frac{c \langle B, M \rangle_j}{n_j} \;\text{(projection)} $$

    The first is the ratio of the norms of the adapted and the frozen row, DoRA's magnitude over its start; the second
    is the least-squares scale of the adapted row on the frozen one, with a sign. Both are exactly one for
    $B = 0$, and have a gradient there. A row of zeros has scale one.

    Args:
        product: $M$, the frozen weight times the rows of $A$.
        lora_A: Down-projection.
        lora_B: Up-projection.
        norm: Norms of the rows of the frozen weight, $\sqrt{n_j}$.
        scaling: The factor $c$ on $B A$.
        decomposition: `norm` or `projection`.
        reference: Norms that count as one, where an initialisation has moved a part of the weight into the adapter
            (PiSSA, OLoRA); `None` is `norm`. For `norm` only.

    Returns:
        The scale of every output channel, in float32 at least.

    Raises:
        SanError: For an unknown decomposition, or a reference with `projection`.

    Example:
        >>> weight, a, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0]])
        >>> low_rank_scale(weight_product(weight, a), a, b, torch.tensor([5.0])).tolist()
        [2.0]
    """
    _check_decomposition(decomposition)
    wide = product.dtype
    rows, columns, total = lora_A.to(wide), lora_B.to(wide), norm.to(wide).square()
    if decomposition == "projection":
        if reference is not None:
            raise SanError("A reference norm goes with decomposition='norm'.")
        return 1 + _ratio(scaling * (columns * product).sum(1), total)
    gain = _gain(product, rows, columns, scaling)
    if reference is not None:
        start = reference.to(wide).square()
        return _root(_ratio(total - start + gain, start))
    return _root(_ratio(gain, total))


def low_rank_norm(
    product: Float[Tensor, "out r"],
    lora_A: Float[Tensor, "r in"],
    lora_B: Float[Tensor, "out r"],
    norm: Float[Tensor, " out"],
    scaling: float = 1.0,
) -> Float[Tensor, " out"]:
    r"""Norms of the rows of an adapted weight, without forming $B A$: $\lVert w_j + c\, b_j A \rVert$.

    The arguments are those of `low_rank_scale`. DoRA divides its magnitude by these.

    Returns:
        The norms, in float32 at least.

    Example:
        >>> weight, a, b = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]]), torch.tensor([[1.0]])
        >>> low_rank_norm(weight_product(weight, a), a, b, torch.tensor([3.0])).tolist()
        [5.0]
    """
    wide = product.dtype
    gain, norm = _gain(product, lora_A.to(wide), lora_B.to(wide), scaling), norm.to(wide)
    return torch.where(norm > 0, norm * _root(_ratio(gain, norm.square())), gain.clamp_min(0).sqrt())


def _gain(product: Tensor, rows: Tensor, columns: Tensor, scaling: float) -> Tensor:
    """What an adapter adds to the squared norm of every row."""
    cross, square = (columns * product).sum(1), (columns @ (rows @ rows.t()) * columns).sum(1)
    return 2 * scaling * cross + scaling**2 * square


def dense_scale(
    change: Float[Tensor, "out in"], weight: Float[Tensor, "out in"], decomposition: str = "norm"
) -> Float[Tensor, " out"]:
    r"""Decomposes the scale out of any change of a weight, given as a matrix.

    $$ g_j = \lVert w_j + \delta_j \rVert / \lVert w_j \rVert \;\text{(norm)}, \qquad
       g_j = 1 + \langle \delta_j, w_j \rangle / \lVert w_j \rVert^2 \;\text{(projection)} $$

    Args:
        change: The change $\delta$ of the weight.
        weight: The frozen weight.
        decomposition: `norm` or `projection`.

    Returns:
        The scale of every output channel, in float32 at least; one for a row of zeros.

    Raises:
        SanError: For an unknown decomposition.

    Example:
        >>> dense_scale(torch.tensor([[3.0, -4.0]]), torch.tensor([[0.0, 4.0]])).tolist()
        [0.75]
    """
    _check_decomposition(decomposition)
    wide = torch.promote_types(change.dtype, torch.float32)
    change, frozen = change.to(wide), weight.detach().to(wide)
    along, total = (change * frozen).sum(1), frozen.square().sum(1)
    if decomposition == "projection":
        return 1 + _ratio(along, total)
    return _root(_ratio(2 * along + change.square().sum(1), total))


def adapted_linear(
    x: Float[Tensor, "*batch in"],
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"] | None,
    lora_A: Float[Tensor, "r in"],
    lora_B: Float[Tensor, "out r"],
    scaling: float = 1.0,
    magnitude: Float[Tensor, " out"] | None = None,
) -> Float[Tensor, "*batch out"]:
    r"""A frozen dense layer with LoRA, or with DoRA, in one pass.

    $$ y = m \odot (W + c\,B A)\,x + b $$

    Both passes write into one tensor of the size of the output, or of the input, where autograd makes one for each
    term. For the backward pass it keeps $x$ and $A x$; with a magnitude also $y$, as `scale_output` does and with its
    gradient, so no entry of the magnitude may be near zero.

    Args:
        x: Input of the layer. All tensors have one type.
        weight: Frozen weight $W$; it gets no gradient, and neither does the bias.
        bias: Frozen bias, or `None`.
        lora_A: Down-projection.
        lora_B: Up-projection.
        scaling: The factor $c$.
        magnitude: What the rows are multiplied with, DoRA's magnitude over the row norms; `None` is one (LoRA).

    Returns:
        The output of the layer.

    Example:
        >>> x, weight = torch.ones(1, 2), torch.eye(2)
        >>> a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0], [1.0]])
        >>> adapted_linear(x, weight, None, a, b, scaling=0.5, magnitude=torch.tensor([2.0, 4.0])).tolist()
        [[2.0, 6.0]]
    """
    return _AdaptedLinear.apply(x, weight, bias, lora_A, lora_B, scaling, magnitude)


class _AdaptedLinear(torch.autograd.Function):
    """Matrix products that accumulate in place, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        magnitude: Tensor | None,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        hidden = torch.mm(flat, lora_A.t()).mul_(scaling)
        y = torch.mm(flat, weight.t()) if bias is None else torch.addmm(bias, flat, weight.t())
        y.addmm_(hidden, lora_B.t())
        if magnitude is not None:
            y.mul_(magnitude)
            if bias is not None:
                y.add_(bias * (1 - magnitude))
        ctx.scaling = scaling
        ctx.save_for_backward(x, hidden, weight, bias, lora_A, lora_B, magnitude, None if magnitude is None else y)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # type: ignore[override]  # what the decorator returns
        x, hidden, weight, bias, lora_A, lora_B, magnitude, y = ctx.saved_tensors
        grad = grads[0].reshape(-1, weight.shape[0])
        grad_x = grad_a = grad_b = grad_m = None
        if magnitude is not None:
            product = grad * y
            if ctx.needs_input_grad[6]:
                grad_m = product.sum(0)
                if bias is not None:
                    grad_m -= grad.sum(0) * bias
                grad_m /= magnitude
            grad = torch.mul(grad, magnitude, out=product)
        grad_hidden = torch.mm(grad, lora_B).mul_(ctx.scaling)
        if ctx.needs_input_grad[4]:
            grad_b = torch.mm(grad.t(), hidden)
        if ctx.needs_input_grad[3]:
            grad_a = torch.mm(grad_hidden.t(), x.reshape(-1, x.shape[-1]))
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grad, weight).addmm_(grad_hidden, lora_A).view(x.shape)
        return grad_x, None, None, grad_a, grad_b, None, grad_m


def _check_decomposition(decomposition: str) -> None:
    if decomposition not in DECOMPOSITIONS:
        raise SanError(f"Unknown decomposition {decomposition!r}; choose {' or '.join(DECOMPOSITIONS)}.")


def _ratio(value: Tensor, total: Tensor) -> Tensor:
    """`value / total`, and zero without a gradient where the total is zero."""
    empty = total <= 0
    return torch.where(empty, torch.zeros_like(value), value / torch.where(empty, torch.ones_like(total), total))


def _root(gain: Tensor) -> Tensor:
    """`sqrt(1 + gain)`; rounding may not take the radicand below zero."""
    return torch.sqrt((1 + gain).clamp_min(torch.finfo(gain.dtype).tiny))
