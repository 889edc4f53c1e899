r"""Taking a scale per output channel out of a change of a weight: the equations, as functions of tensors.

An adapter turns the frozen weight $W_0$ into $W_0 + \Delta$. The part of $\Delta$ that scales row $j$ is what SAN
propagates. `low_rank_scale` finds it for $\Delta = c\,B A$ without forming $B A$, `dense_scale` for any $\Delta$.
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
CHUNK = 128
"""Rows of a half-precision weight that are cast to float32 at a time."""


def weight_product(weight: Float[Tensor, "out in"], rows: Float[Tensor, "r in"]) -> Float[Tensor, "out r"]:
    r"""Multiplies a frozen weight with a few rows: $M = W A^\top$, in float32 at least.

    A weight in half precision is cast a few rows at a time, in both passes: no float32 copy of it is made.

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


class _WeightProduct(torch.autograd.Function):
    """`weight @ rows.T` for a weight in half precision, cast by chunks of rows."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return torch.cat([torch.mm(chunk.to(rows.dtype), rows.t()) for chunk in weight.split(CHUNK)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # type: ignore[override]  # what the decorator returns
        (grad,) = grads
        (weight,) = ctx.saved_tensors
        total = torch.zeros(grad.shape[1], weight.shape[1], dtype=grad.dtype, device=grad.device)
        for chunk, part in zip(weight.split(CHUNK), grad.split(CHUNK), strict=True):
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
