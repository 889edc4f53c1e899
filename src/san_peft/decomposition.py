r"""Decomposes a per-channel scale from a weight update: the equations, as functions of tensors.

An adapter turns the frozen weight $W_0$ into $W_0 + \Delta$. SAN propagates the part of $\Delta$ that scales row $j$.
`low_rank_scale` computes it for $\Delta = c\,B A$ without forming $B A$, `dense_scale` for any $\Delta$.
Source: arXiv 2409.06706 for the idea; the equations are our interpretation, see the guide to the method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from san_peft.errors import SanError
from san_peft.products import full_types, times_columns, times_rows, weight_product
from san_peft.scaling import plain_operations, replayed

DECOMPOSITIONS = ("norm", "projection", "feature")

FLOOR = 0.1
"""Smallest row norm that an update is divided by, as a fraction of the median row norm of the layer."""


def floored(norm: Float[Tensor, "*layers out"]) -> Float[Tensor, "*layers out"]:
    """Clamps the norms of nearly dead rows to `FLOOR` times the median of the layer.

    Otherwise the update of such a row could be thousands of times its norm, and so could its scale.

    Args:
        norm: Row norms, those of one layer along the last axis.

    Returns:
        The norms to divide by; zero where at least half of the rows are zero.

    Example:
        >>> [round(n, 4) for n in floored(torch.tensor([1.0, 2.0, 1e-9])).tolist()]
        [1.0, 2.0, 0.1]
    """
    return torch.maximum(norm, FLOOR * norm.median(-1, keepdim=True).values)


def low_rank_scale(
    product: Float[Tensor, "out r"],
    lora_A: Float[Tensor, "r in"],
    lora_B: Float[Tensor, "out r"],
    norm: Float[Tensor, " out"],
    scaling: float = 1.0,
    decomposition: str = "norm",
    reference: Float[Tensor, " out"] | None = None,
) -> Float[Tensor, " out"]:
    r"""Decomposes the scale of a low-rank adapter without forming $B A$.

    With $M = W_0 A^\top$ (`weight_product`), $G = A A^\top$, $n_j = \lVert w_j \rVert^2$ and $c$ the adapter's scaling,

    $$ g_j = \sqrt{1 + \frac{2c \langle B, M \rangle_j + c^2 \langle B G, B \rangle_j}{n_j}} \;\text{(norm)},
       \qquad g_j = 1 + \frac{c \langle B, M \rangle_j}{n_j} \;\text{(projection)} $$

    `norm` is the ratio of the row norms of the adapted and the frozen weight, which is DoRA's magnitude relative to its
    initial value. `projection` is the signed least-squares scale of the adapted row onto the frozen one. `feature` is
    the signed least-squares scale of what the adapter adds to the output on the frozen output, for inputs whose
    channels are uncorrelated with second moments $C$: it is `projection` with $M = W_0 (A C)^\top$ and
    $n_j = \sum_k C_k w_{jk}^2$, which the caller passes as `product` and `norm`. All are exactly one at $B = 0$
    and have a gradient there. Row norms below a tenth of the median are clamped to it in denominators (`floored`).

    Args:
        product: The product $M$.
        lora_A: Down-projection.
        lora_B: Up-projection.
        norm: Row norms of the frozen weight, $\sqrt{n_j}$.
        scaling: Scaling $c$ of the adapter.
        decomposition: `norm`, `projection` or `feature`.
        reference: Row norms that correspond to a scale of one, where the initialisation moves a part of the weight into
            the adapter (PiSSA, OLoRA); `None` is `norm`. Only for `decomposition="norm"`.

    Returns:
        The scale of each output channel, in at least float32.

    Raises:
        SanError: For an unknown decomposition, or a reference with a decomposition other than `norm`.

    Example:
        >>> weight, a, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0]])
        >>> low_rank_scale(weight_product(weight, a), a, b, torch.tensor([5.0])).tolist()
        [2.0]
    """
    check_decomposition(decomposition)
    wide = product.dtype
    rows, columns, norm = lora_A.to(wide), lora_B.to(wide), norm.to(wide)
    if decomposition != "norm":
        if reference is not None:
            raise SanError(f"A reference norm needs decomposition='norm', got {decomposition!r}.")
        return 1 + _ratio(scaling * (columns * product).sum(1), floored(norm).square())
    gain = _gain(product, rows, columns, scaling)
    if reference is None:
        return _root(_ratio(gain, floored(norm).square()))
    reference = reference.to(wide)
    return _root(_ratio(norm.square() - reference.square() + gain, floored(reference).square()))


def low_rank_norm(
    product: Float[Tensor, "out r"],
    lora_A: Float[Tensor, "r in"],
    lora_B: Float[Tensor, "out r"],
    norm: Float[Tensor, " out"],
    scaling: float = 1.0,
) -> Float[Tensor, " out"]:
    r"""Computes the row norms of an adapted weight without forming $B A$: $\lVert w_j + c\, b_j A \rVert$.

    DoRA divides its magnitude by these norms. See `low_rank_scale` for the arguments.

    Returns:
        The row norms, in at least float32.

    Example:
        >>> weight, a, b = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]]), torch.tensor([[1.0]])
        >>> low_rank_norm(weight_product(weight, a), a, b, torch.tensor([3.0])).tolist()
        [5.0]
    """
    wide = product.dtype
    gain, norm = _gain(product, lora_A.to(wide), lora_B.to(wide), scaling), norm.to(wide)
    return torch.where(norm > 0, norm * _root(_ratio(gain, norm.square())), gain.clamp_min(0).sqrt())


def _gain(product: Tensor, rows: Tensor, columns: Tensor, scaling: float) -> Tensor:
    """Returns the increase of the squared row norms due to the adapter."""
    cross, square = (columns * product).sum(1), (columns @ (rows @ rows.t()) * columns).sum(1)
    return 2 * scaling * cross + scaling**2 * square


Unpack = Callable[[], Tensor]
"""Returns a frozen weight as a matrix with one row per output channel; unpacks a quantized weight at each call."""


def low_rank_scales(
    weights: Sequence[Unpack],
    inverse: Float[Tensor, "layers out"],
    scaling: float,
    decomposition: str,
    start: Float[Tensor, "layers out"] | None,
    lora_A: Sequence[Float[Tensor, "r in"]],
    lora_B: Sequence[Float[Tensor, "out r"]],
    moments: Float[Tensor, "layers in"] | None = None,
) -> Float[Tensor, "layers out"]:
    r"""Decomposes the scales of several layers of the same shape at once: a batched `low_rank_scale`.

    Runs as one autograd node with a hand-written backward pass. With $N = M + c\,B G$ and $u = c\,\dot g / (n g)$
    (`norm`),

    $$ \frac{\partial L}{\partial B} = \operatorname{diag}(u)\, N, \qquad
       \frac{\partial L}{\partial A} = (\operatorname{diag}(u) B)^\top W + c\,(B^\top \operatorname{diag}(u) B)\, A, $$

    and for `projection` $N = M$, $u = c\,\dot g / n$ without the second term. `feature` is `projection` with $A C$ in
    place of $A$, see `low_rank_scale`.

    Args:
        weights: The frozen weights.
        inverse: Inverse of the squared, `floored` row norms, $1 / n$; zero where the norm is zero.
        scaling: Scaling $c$ of the adapters.
        decomposition: `norm`, `projection` or `feature`.
        start: Replaces the one under the root where the reference norms are not those of the frozen weights (see
            `reference` of `low_rank_scale`); `None` is one.
        lora_A: Down-projections, in at least float32.
        lora_B: Up-projections.
        moments: The second moments $C$ of the input columns, for `feature`.

    Returns:
        The scales.

    Example:
        >>> weight, a, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0]])
        >>> low_rank_scales([lambda: weight], torch.tensor([[1 / 25]]), 1.0, "norm", None, [a], [b]).tolist()
        [[2.0]]
    """
    if plain_operations():
        return _plain_scales(weights, inverse, scaling, decomposition == "norm", start, moments, lora_A, lora_B)
    return _LowRankScales.apply(weights, inverse, scaling, decomposition == "norm", start, moments, *lora_A, *lora_B)


def _plain_scales(
    weights: Sequence[Unpack],
    inverse: Tensor,
    scaling: float,
    norm: bool,
    start: Tensor | None,
    moments: Tensor | None,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
) -> Tensor:
    rows, columns = torch.stack(list(lora_A)), torch.stack(list(lora_B))
    rows = rows if moments is None else rows * moments.unsqueeze(1)
    product = torch.stack([weight_product(w(), a) for w, a in zip(weights, rows.unbind(0), strict=True)])
    if not norm:
        return 1 + scaling * (columns * product).sum(-1) * inverse
    full = product + scaling * columns @ (rows @ rows.transpose(1, 2))
    gain = scaling * (columns * (product + full)).sum(-1) * inverse
    return _root(gain if start is None else gain + (start - 1))


class _LowRankScales(torch.autograd.Function):
    """Computes stacked scales; saves only tensors of the size of the adapters for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        weights: Sequence[Unpack],
        inverse: Tensor,
        scaling: float,
        norm: bool,
        start: Tensor | None,
        moments: Tensor | None,
        *adapters: Tensor,
    ) -> Tensor:
        count = len(weights)
        rows, columns = torch.stack(adapters[:count]), torch.stack(adapters[count:])
        rows = rows if moments is None else rows.mul_(moments.unsqueeze(1))
        product = torch.stack([times_rows(w().detach(), a) for w, a in zip(weights, rows.unbind(0), strict=True)])
        total = along = product
        if norm:
            gram = torch.bmm(rows, rows.transpose(1, 2))
            total = torch.baddbmm(product, columns, gram, alpha=scaling)
            along = product.add_(total)
        gain = torch.linalg.vecdot(columns, along).mul_(inverse)
        if norm:
            base = torch.ones_like(inverse) if start is None else start
            scale = base.add(gain, alpha=scaling).clamp_min_(torch.finfo(gain.dtype).tiny).sqrt_()
        else:
            scale = gain.mul_(scaling).add_(1)
        ctx.weights, ctx.scaling, ctx.norm = weights, scaling, norm
        ctx.save_for_backward(rows, columns, total, scale if norm else None, inverse, start, moments, *adapters)
        return scale

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        rows, columns, total, scale, inverse, start, moments, *adapters = ctx.saved_tensors
        if torch.is_grad_enabled():  # double backward: use differentiable operations
            count = len(ctx.weights)

            def plain(*given: Any) -> Tensor:
                return _plain_scales(
                    ctx.weights, inverse, ctx.scaling, ctx.norm, start, moments, given[:count], given[count:]
                )

            return (*[None] * 6, *replayed(plain, adapters, grads[0]))
        weighed = grads[0] * inverse
        if ctx.norm:
            weighed = weighed.div_(scale)
        weighed = weighed.mul_(ctx.scaling).unsqueeze(-1)
        scaled = weighed * columns
        with full_types(scaled):
            parts = [times_columns(w().detach(), one) for w, one in zip(ctx.weights, scaled.unbind(0), strict=True)]
            grad_rows = torch.stack(parts)
            if ctx.norm:
                square = torch.bmm(scaled.transpose(1, 2), columns)
                grad_rows = grad_rows.baddbmm_(square, rows, alpha=ctx.scaling)
            if moments is not None:
                grad_rows = grad_rows.mul_(moments.unsqueeze(1))
        grad_columns = weighed * total
        return (*[None] * 6, *grad_rows.unbind(0), *grad_columns.unbind(0))


def dense_scale(
    change: Float[Tensor, "out in"],
    weight: Float[Tensor, "out in"],
    decomposition: str = "norm",
    moments: Float[Tensor, " in"] | None = None,
) -> Float[Tensor, " out"]:
    r"""Decomposes the scale of any weight update, given as a matrix.

    $$ g_j = \lVert w_j + \delta_j \rVert / \lVert w_j \rVert \;\text{(norm)}, \qquad
       g_j = 1 + \langle \delta_j, w_j \rangle / \lVert w_j \rVert^2 \;\text{(projection)} $$

    and for `feature` as for `projection`, with inner products weighted by the second moments of the input.

    The norms of nearly dead rows are clamped by `floored`, as in `low_rank_scale`.

    Args:
        change: Weight update $\delta$.
        weight: Frozen weight.
        decomposition: `norm`, `projection` or `feature`.
        moments: The second moments of the input columns, for `feature`; `None` is one for all.

    Returns:
        The scale of each output channel, in at least float32.

    Raises:
        SanError: For an unknown decomposition.

    Example:
        >>> dense_scale(torch.tensor([[3.0, -4.0]]), torch.tensor([[0.0, 4.0]])).tolist()
        [0.75]
    """
    check_decomposition(decomposition)
    wide = torch.promote_types(change.dtype, torch.float32)
    change, frozen = change.to(wide), weight.detach().to(wide)
    weighted = frozen if moments is None else frozen * moments.to(frozen)
    along = (change * weighted).sum(1)
    total = floored((frozen * weighted).sum(1).sqrt()).square()
    if decomposition != "norm":
        return 1 + _ratio(along, total)
    return _root(_ratio(2 * along + change.square().sum(1), total))


def check_decomposition(decomposition: str) -> None:
    """Raises `SanError` for an unknown decomposition."""
    if decomposition not in DECOMPOSITIONS:
        raise SanError(f"Unknown decomposition {decomposition!r}; choose from {', '.join(DECOMPOSITIONS)}.")


def _ratio(value: Tensor, total: Tensor) -> Tensor:
    """Returns `value / total`, or zero without a gradient where the total is zero."""
    empty = total <= 0
    return torch.where(empty, torch.zeros_like(value), value / torch.where(empty, torch.ones_like(total), total))


def _root(gain: Tensor) -> Tensor:
    """Returns `sqrt(1 + gain)`, clamped so that rounding cannot make the radicand negative."""
    return torch.sqrt((1 + gain).clamp_min(torch.finfo(gain.dtype).tiny))
