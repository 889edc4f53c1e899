"""What a pass computes: the vectors of all layers, each kind in a handful of operations, and their parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from san_peft.decomposition import low_rank_scales
from san_peft.functional import propagate
from san_peft.rounding import HALF
from san_peft.scaling import NEAR_ZERO, SALT, Factor, near_zero, plain_operations, undo_scale
from san_peft.tuner.decompose import over_norm
from san_peft.tuner.layout import ScaleLayout
from san_peft.tuner.quantized import row_matrix
from san_peft.tuner.sharded import is_sharded, whole


class Vectors(NamedTuple):
    """What one layer applies in a pass.

    Attributes:
        scale: Factor of the output: the layer's own scale, and what is propagated to the posterior but acts here.
        shift: What is added to the output.
        input_scale: Factor of the input.
        magnitude: Factor of the output of a DoRA layer that is computed in one pass: its magnitude over the norms of
            the adapted rows, times what is propagated but acts here.
        placed: The part of `magnitude` that is propagated; `None` is one.
        offset: What is added then, so that the frozen bias is not multiplied with the magnitude.
        lora: The matrices A and B of the host, in the dtype of the products, where that is not their own.
        group: Number of the layers that read the same scaled input, where there are several.
    """

    scale: Factor | None = None
    shift: Tensor | None = None
    input_scale: Factor | None = None
    magnitude: Factor | None = None
    placed: Tensor | None = None
    offset: Tensor | None = None
    lora: tuple[Tensor, Tensor] | None = None
    group: int | None = None


NOTHING = Vectors()


class Whole(NamedTuple):
    """The vectors of one adapter in a pass, each that of all layers that have such a one, in its order."""

    own: Tensor | None = None
    alone: Tensor | None = None
    shift: Tensor | None = None
    magnitude: Tensor | None = None
    placed: Tensor | None = None
    offset: Tensor | None = None
    inputs: Tensor | None = None
    lora: Tensor | None = None


def fill(layout: ScaleLayout, dtype: torch.dtype) -> Whole:
    """Computes all vectors of an adapter.

    Args:
        layout: Where they stand.
        dtype: The dtype in which the frozen layers multiply.
    """
    name, edge = layout.name, layout.edge
    own = _joined([layer.san_scale[name].offset for layer in (*layout.own, *layout.both)], 1.0)
    shift = _joined([layer.san_shift[name].offset for layer in layout.shifted])
    magnitude = _joined([layer.host.lora_magnitude_vector[name].weight.flatten() for layer in layout.dora])
    sources = _sources(layout, own, magnitude)
    if magnitude is not None:
        magnitude = magnitude / _adapted_norms(layout)
    alone = placed = inputs = None
    if sources is not None:
        layout.move(sources.device)
        carried = propagate(sources.detach() if edge.detach else sources, None, edge.exponent, edge.bound)
        carried = torch.cat([carried, carried.new_ones(1)])
        if layout.index:
            inputs = carried.index_select(0, layout.index[0])
            for index in layout.index[1:]:
                inputs = inputs * carried.index_select(0, index)
            inputs = _gated(layout, inputs)
        if layout.outputs is not None:
            count = 0 if own is None else own.numel()
            end = count + sum(layer.out_features for layer in layout.placed)
            placed = carried.index_select(0, layout.outputs)
            own = None if own is None else own * placed[:count]
            alone = placed[count:end] if layout.placed else None
            rest = placed[end:]
            placed = None if magnitude is None else rest
            magnitude = None if magnitude is None else magnitude * rest
        if layout.shifts is not None and shift is not None:
            shift = shift * carried.index_select(0, layout.shifts)
    offset = None
    biases = [layer.get_base_layer().bias for layer in layout.dora]
    if magnitude is not None and any(bias is not None for bias in biases):
        bias = torch.cat(
            [
                magnitude.new_zeros(layer.out_features) if bias is None else bias.detach().to(magnitude)
                for layer, bias in zip(layout.dora, biases, strict=True)
            ]
        )
        offset = bias * ((1 if placed is None else placed) - magnitude)
    return Whole(own, alone, shift, magnitude, placed, offset, inputs, _cast(layout, dtype))


def _sources(layout: ScaleLayout, own: Tensor | None, magnitude: Tensor | None) -> Tensor | None:
    """The scales of all layers that something reads, in the order of `offset`, or `None` if nothing does."""
    name, parts = layout.name, []
    if not layout.index and layout.outputs is None:
        return None
    count = sum(layer.out_features for layer in layout.own)
    if layout.own:
        parts.append(own[:count] if layout.both else own)  # type: ignore[index]
    if layout.both:
        hosted = torch.cat([layer.san_host[name]().to(own.device) for layer in layout.both])  # type: ignore[union-attr]
        parts.append(own[count:] * hosted)  # type: ignore[index, operator]
    for number, group in enumerate(layout.low_rank):
        parts.append(_low_rank(layout, number, group).flatten())
    dora = [layer for layer in layout.dora if name not in layer.san_scale]
    if dora and magnitude is not None:
        norms = layout.constant("dora", [layer.san_host[name].norms() for layer in dora], torch.cat)
        parts.append(over_norm(magnitude[: norms.numel()], norms))
    parts += [layer.san_host[name]() for layer in layout.other]
    home = parts[0].device
    return parts[0] if len(parts) == 1 else torch.cat([part.to(home) for part in parts])


def _low_rank(layout: ScaleLayout, number: int, group: list[Any]) -> Tensor:
    """The scales of LoRA hosts of one shape."""
    name = layout.name
    scales = [layer.san_host[name] for layer in group]
    references = [scale.reference for scale in scales]
    norms = [scale.norms() for scale in scales]
    if references[0] is None:
        inverse, start = layout.constant(("inverse", number), norms, _inverse), None
    else:
        inverse, start = layout.constant(("inverse", number), [*norms, *references], _inverse_of_references)
    hosts = [layer.host for layer in group]
    return low_rank_scales(
        [_unpack(host.get_base_layer()) for host in hosts],
        inverse,
        hosts[0].scaling[name],
        scales[0].decomposition,
        start,
        *_matrices(hosts, name, inverse.dtype),
    )


@torch.no_grad()
def _adapted_norms(layout: ScaleLayout) -> Tensor:
    """Row norms of the weights of all DoRA hosts with their adapters; DoRA takes no gradient through them."""
    name = layout.name
    groups: dict[Any, list[Any]] = {}
    for layer in layout.dora:
        host = layer.host
        shape = host.lora_A[name].weight.shape
        groups.setdefault((host.get_base_layer().weight.shape, shape, host.scaling[name]), []).append(layer)
    found: dict[str, Tensor] = {}
    for number, group in enumerate(groups.values()):
        norms = [layer.san_host[name].norms() for layer in group]
        inverse = layout.constant(("dora", number), norms, _inverse)
        hosts = [layer.host for layer in group]
        weights = [_unpack(host.get_base_layer()) for host in hosts]
        matrices = _matrices(hosts, name, inverse.dtype)
        gains = low_rank_scales(weights, inverse, hosts[0].scaling[name], "norm", None, *matrices)
        scaled = gains * layout.constant(("norms", number), norms, torch.stack)
        found.update(zip([layer.san_name for layer in group], scaled.unbind(0), strict=True))
    parts = [found[layer.san_name] for layer in layout.dora]
    return torch.cat([part.to(parts[0].device) for part in parts])


def _gated(layout: ScaleLayout, inputs: Tensor) -> Tensor:
    """Multiplies the gates of an adapter, an ablation, onto the channels that are fed."""
    banks = [layer.san_gate for layer in layout.posteriors]
    if not any(layout.name in bank for bank in banks):
        return inputs
    gate = _joined([bank[layout.name].weight for bank in banks], 1.0)
    return inputs * torch.where(layout.fed, gate, torch.ones_like(gate))  # type: ignore[arg-type]


def hand_out(
    layout: ScaleLayout, vectors: Whole, dtype: torch.dtype, exact: bool, leaves: Any = None
) -> tuple[dict[str, Vectors], dict[str, Factor]]:
    """Cuts the vectors of an adapter into the parts of its layers and norms.

    Args:
        layout: Where they stand.
        vectors: The vectors.
        dtype: The dtype in which the frozen layers multiply.
        exact: Whether layers take the gradients of their factors by themselves.
        leaves: For each of the vectors whether its parts are leaves that require a gradient; `None` is the vector's
            own graph.
    """
    own, placed, dora, shifted = (
        [(layer.san_name, layer.out_features) for layer in layers]
        for layers in ([*layout.own, *layout.both], layout.placed, layout.dora, layout.shifted)
    )
    found: dict[str, dict[str, Any]] = {}

    def cut(field: str, vector: Tensor, sizes: list[int], deferred: bool = False) -> Sequence[Tensor]:
        slots = _cut(vector, sizes, deferred)
        return slots if leaves is None else [slot.detach().requires_grad_(getattr(leaves, field)) for slot in slots]

    for field, kind, parts in (
        ("own", "scale", own),
        ("alone", "scale", placed),
        ("magnitude", "magnitude", dora),
        ("inputs", "input_scale", layout.inputs),
        ("shift", "shift", shifted),
        ("placed", "placed", dora),
        ("offset", "offset", dora),
    ):
        vector = getattr(vectors, field)
        if vector is None:
            continue
        sizes = [size for _, size in parts]
        if kind in ("shift", "placed", "offset"):
            values: Any = cut(field, vector, sizes)
        else:
            deferred = kind != "input_scale" and not exact
            low = vector.detach().to(dtype).split(sizes) if dtype in HALF else [None] * len(sizes)
            slots = cut(field, vector, sizes, deferred)
            rest = (not exact, deferred, SALT[kind])
            values = [Factor(slot, small, *rest) for slot, small in zip(slots, low, strict=True)]
        for (fqn, _), value in zip(parts, values, strict=True):
            found.setdefault(fqn, {})[kind] = value
    if vectors.lora is not None:
        shapes = [m.weight.shape for layer in layout.hosts for m in layer.matrices(layout.name)]
        slots = cut("lora", vectors.lora, [shape.numel() for shape in shapes])
        slots = [slot.view(shape) for slot, shape in zip(slots, shapes, strict=True)]
        for layer, down, up in zip(layout.hosts, slots[::2], slots[1::2], strict=True):
            found.setdefault(layer.san_name, {})["lora"] = (down, up)
    norms = {fqn: found.pop(fqn)["input_scale"] for fqn in layout.norms}
    for fqn, number in layout.groups.items():
        found[fqn]["group"] = number
    return {fqn: Vectors(**parts) for fqn, parts in found.items()}, norms


def _cast(layout: ScaleLayout, dtype: torch.dtype) -> Tensor | None:
    """The matrices of all LoRA hosts in the dtype of their products, cast together; `None` if they have it."""
    weights = [m.weight for layer in layout.hosts for m in layer.matrices(layout.name)]
    if not weights or dtype not in HALF or weights[0].dtype == dtype:
        return None
    if len({(w.device, w.dtype) for w in weights}) > 1 or any(is_sharded(w) for w in weights):
        return None
    if plain_operations() or not torch.is_grad_enabled():
        return torch.cat([w.flatten() for w in weights]).to(dtype)
    return _Cast.apply(dtype, *weights)


def factors_with_gradients(vectors: Whole) -> list[Tensor]:
    """Returns the vectors of factors that are trained."""
    given = (vectors.own, vectors.alone, vectors.magnitude, vectors.inputs)
    return [vector for vector in given if vector is not None and vector.requires_grad]


class Watch:
    """Looks for scales near zero: on the CPU at once, on a GPU without waiting for it, so one pass late."""

    def __init__(self) -> None:
        self.seen = False
        self._flag: Tensor | None = None
        self._event: Any = None

    def near_zero(self, vectors: list[Tensor]) -> bool:
        """Whether one of the vectors has an entry near zero."""
        if not vectors or vectors[0].device.type != "cuda":
            return any(near_zero(vector) for vector in vectors)
        if self._event is not None and self._event.query():
            self.seen = bool(self._flag.numpy()[0])  # type: ignore[union-attr]
            self._event = None
        if self._event is None:
            if self._flag is None:
                self._flag = torch.zeros(1, dtype=torch.bool, pin_memory=True)
            lowest = torch.stack([vector.detach().abs().amin() for vector in vectors]).amin()
            self._flag.copy_((lowest < NEAR_ZERO).view(1), non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        return self.seen


class _Cut(torch.autograd.Function):
    """Cuts a vector into parts; of scales whose layers left the division to it, it does that for all at once."""

    @staticmethod
    def forward(ctx: Any, vector: Tensor, sizes: list[int], deferred: bool) -> Any:
        ctx.sizes, ctx.deferred = sizes, deferred
        ctx.save_for_backward(vector if deferred else None)
        ctx.like = vector.dtype, vector.device
        ctx.set_materialize_grads(False)
        return tuple(vector.split(sizes))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # type: ignore[override]  # what the decorator returns
        (vector,) = ctx.saved_tensors
        dtype, device = ctx.like
        parts = [
            torch.zeros(size, dtype=dtype, device=device) if grad is None else grad
            for grad, size in zip(grads, ctx.sizes, strict=True)
        ]
        total = torch.cat(parts)
        return undo_scale(total, vector) if ctx.deferred else total, None, None


def _cut(vector: Tensor, sizes: list[int], deferred: bool = False) -> Sequence[Tensor]:
    if plain_operations() or not (torch.is_grad_enabled() and vector.requires_grad):
        return vector.split(sizes)
    return _Cut.apply(vector, sizes, deferred)


class _Cast(torch.autograd.Function):
    """Casts many tensors by one operation, to one vector; the gradients are cast back by one as well."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> Tensor:
        ctx.shapes, ctx.dtype = [t.shape for t in tensors], tensors[0].dtype
        return torch.cat([t.reshape(-1) for t in tensors]).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # type: ignore[override]  # what the decorator returns
        parts = grads[0].to(ctx.dtype).split([shape.numel() for shape in ctx.shapes])
        return (None, *(part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True)))


def _joined(tensors: Sequence[Tensor], constant: float = 0.0) -> Tensor | None:
    """Joins parameters to one vector in float32 at least, plus a constant; `None` for none."""
    if not tensors:
        return None
    parts = [whole(t) for t in tensors]
    wide = torch.promote_types(parts[0].dtype, torch.float32)
    home = parts[0].device
    vector = torch.cat([part if part.device == home else part.to(home) for part in parts]).to(wide)
    return vector + constant if constant else vector


def _matrices(hosts: list[Any], name: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    down = [whole(host.lora_A[name].weight).flatten(1).to(dtype) for host in hosts]
    return down, [whole(host.lora_B[name].weight).flatten(1).to(dtype) for host in hosts]


def _inverse(norms: list[Tensor]) -> Tensor:
    """One over squared row norms, zero where a row is zero."""
    total = torch.stack(norms).square()
    return torch.where(total > 0, total.reciprocal(), torch.zeros_like(total))


def _inverse_of_references(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The same of norms that count as one, and the squared norms of the frozen weights in units of them."""
    half = len(parts) // 2
    inverse = _inverse(parts[half:])
    norms = torch.stack([part.to(inverse.device) for part in parts[:half]])
    start = torch.where(inverse > 0, norms.square() * inverse, torch.ones_like(inverse))
    return inverse, start


def _unpack(base: Any) -> Callable[[], Tensor]:
    return lambda: row_matrix(base)


def combined(found: list[Vectors]) -> Vectors:
    """What several active adapters together apply: factors multiplied, shifts added."""

    def product(factors: list[Factor | None]) -> Factor | None:
        given = [factor.wide for factor in factors if factor is not None]
        total = None
        for one in given:
            total = one if total is None else total * one
        return None if total is None else Factor(total, salt=next(f.salt for f in factors if f is not None))

    shifts = [one.shift for one in found if one.shift is not None]
    shift = None if not shifts else torch.stack(shifts).sum(0) if len(shifts) > 1 else shifts[0]
    return Vectors(product([one.scale for one in found]), shift, product([one.input_scale for one in found]))
