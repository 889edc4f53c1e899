"""Computes the vectors of all layers for a pass in a few operations, and splits them by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from san_peft.decomposition import floored, low_rank_scales
from san_peft.functional import propagate, strengthen
from san_peft.rounding import HALF
from san_peft.scaling import NEAR_ZERO, SALT, Factor, near_zero, plain_operations, undo_scale
from san_peft.tuner.decompose import over_norm
from san_peft.tuner.layout import ScaleLayout
from san_peft.tuner.quantized import row_matrix
from san_peft.tuner.sharded import is_sharded, whole


class Vectors(NamedTuple):
    """Holds the vectors that one layer applies in a pass.

    Attributes:
        scale: Factor of the output: the layer's own scale, times a propagated scale if it is applied at this output.
        shift: Added to the output.
        input_scale: Factor of the input.
        magnitude: Factor of the output of a DoRA host: its magnitude over the norms of the adapted rows, times a
            propagated scale if it is applied at this output.
        placed: The propagated part of `magnitude`; `None` stands for one.
        offset: Added after `magnitude`, so that the frozen bias is not multiplied by it.
        lora: The matrices A and B of the host, cast to the compute dtype; `None` if no cast is needed.
        group: Index of the group of layers that share the same scaled input; `None` if there is no such group.
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
"""The vectors of a layer on which no adapter has an effect."""


class Whole(NamedTuple):
    """Holds the vectors of one adapter in a pass, each concatenated over all layers that have it."""

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
        layout: The positions of the layers in the vectors.
        dtype: The compute dtype of the frozen layers.
    """
    name = layout.name
    own = _joined([layer.san_scale[name].weight for layer in (*layout.own, *layout.both)], 1.0)
    shift = _joined([layer.san_shift[name].weight for layer in layout.shifted])
    if own is not None and layout.strength is not None:
        layout.move(own.device)
        own = strengthen(own, layout.strength)
    if shift is not None and layout.shift_strength is not None:
        layout.move(shift.device)
        shift = shift * layout.shift_strength
    magnitude = _joined([layer.host.lora_magnitude_vector[name].weight.flatten() for layer in layout.dora])
    sources = _sources(layout, own, magnitude)
    if magnitude is not None:
        magnitude = magnitude / _adapted_norms(layout)
    alone = placed = inputs = None
    if sources is not None:
        layout.move(sources.device)
        carried = _carried(layout, sources)
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
    """Computes the scales of all anterior layers in the order of `offset`; `None` if nothing is propagated."""
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
        each = [layer.san_host[name].norms() for layer in dora]
        norms, floors = layout.constant(
            "dora", each, lambda parts: (torch.cat(parts), torch.cat([*map(floored, parts)]))
        )
        parts.append(over_norm(magnitude[: norms.numel()], norms, floors))
    parts += [layer.san_host[name]() for layer in layout.other]
    home = parts[0].device
    return parts[0] if len(parts) == 1 else torch.cat([part.to(home) for part in parts])


def _carried(layout: ScaleLayout, sources: Tensor) -> Tensor:
    """Applies exponent and bound of the edges to the scales of the anterior layers."""
    edge = layout.edge
    sources = sources.detach() if edge.detach else sources
    if not layout.exponents:
        return propagate(sources, None, edge.exponent, edge.bound)
    sizes, exponents = zip(*layout.exponents, strict=True)
    parts = zip(sources.split(sizes), exponents, strict=True)
    return torch.cat([propagate(part, None, exponent, edge.bound) for part, exponent in parts])


def _low_rank(layout: ScaleLayout, number: int, group: list[Any]) -> Tensor:
    """Computes the scales of LoRA hosts with the same shape."""
    name = layout.name
    scales = [layer.san_host[name] for layer in group]
    references = [scale.reference for scale in scales]
    norms = [scale.norms() for scale in scales]
    if references[0] is None:
        inverse, start = layout.constant(("inverse", number), norms, _floored_inverse), None
    else:
        inverse, start = layout.constant(("inverse", number), [*norms, *references], _inverse_of_references)
    hosts = [layer.host for layer in group]
    columns: Any = [scale.columns() for scale in scales]
    moments = None if columns[0] is None else layout.constant(("moments", number), columns, torch.stack)
    return low_rank_scales(
        [_unpack(host.get_base_layer()) for host in hosts],
        inverse,
        hosts[0].scaling[name],
        scales[0].decomposition,
        start,
        *_matrices(hosts, name, inverse.dtype),
        moments,
    )


@torch.no_grad()
def _adapted_norms(layout: ScaleLayout) -> Tensor:
    """Computes the row norms of adapted weights of all DoRA hosts, without gradients as in DoRA."""
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
    """Multiplies input scales by the gates of an adapter (an ablation), on channels that receive a scale."""
    banks = [layer.san_gate for layer in layout.posteriors]
    if not any(layout.name in bank for bank in banks):
        return inputs
    gate = _joined([bank[layout.name].weight for bank in banks], 1.0)
    return inputs * torch.where(layout.fed, gate, torch.ones_like(gate))  # type: ignore[arg-type]


def _parts_of(layout: ScaleLayout) -> dict[str, tuple[str, list[tuple[str, int]]]]:
    """Returns, for each vector, the field of `Vectors` that it fills, and the names and sizes of its parts."""
    own, placed, dora, shifted = (
        [(layer.san_name, layer.out_features) for layer in layers]
        for layers in ([*layout.own, *layout.both], layout.placed, layout.dora, layout.shifted)
    )
    return {
        "own": ("scale", own),
        "alone": ("scale", placed),
        "magnitude": ("magnitude", dora),
        "inputs": ("input_scale", layout.inputs),
        "shift": ("shift", shifted),
        "placed": ("placed", dora),
        "offset": ("offset", dora),
    }


def hand_out(
    layout: ScaleLayout, vectors: Whole, dtype: torch.dtype, near: dict[str, list[bool]] | None, leaves: Any = None
) -> tuple[dict[str, Vectors], dict[str, Factor]]:
    """Splits the vectors of an adapter into those of its layers and norms.

    Args:
        layout: The positions of the layers in the vectors.
        vectors: The vectors.
        dtype: The compute dtype of the frozen layers.
        near: For each vector which of its parts have an entry near zero, so that gradients are computed without
            dividing by it, see `Watch`; `None` stands for all parts of all vectors.
        leaves: For each vector whether its parts are detached leaves that require gradients; `None` keeps the graph.
    """
    found: dict[str, dict[str, Any]] = {}

    def cut(field: str, vector: Tensor, sizes: list[int], deferred: list[bool] | None = None) -> Sequence[Tensor]:
        slots = _cut(vector, sizes, deferred)
        return slots if leaves is None else [slot.detach().requires_grad_(getattr(leaves, field)) for slot in slots]

    for field, (kind, parts) in _parts_of(layout).items():
        vector = getattr(vectors, field)
        if vector is None:
            continue
        sizes = [size for _, size in parts]
        if kind in ("shift", "placed", "offset"):
            values: Any = cut(field, vector, sizes)
        else:
            exact = [True] * len(sizes) if near is None else near.get(field) or [False] * len(sizes)
            deferred = [kind != "input_scale" and not one for one in exact]
            low = vector.detach().to(dtype).split(sizes) if dtype in HALF else [None] * len(sizes)
            slots = cut(field, vector, sizes, deferred)
            values = [
                Factor(slot, small, not one, later, SALT[kind])
                for slot, small, one, later in zip(slots, low, exact, deferred, strict=True)
            ]
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
    """Casts the matrices of all LoRA hosts to the compute dtype at once; `None` if no cast is needed."""
    weights = [m.weight for layer in layout.hosts for m in layer.matrices(layout.name)]
    if not weights or dtype not in HALF or weights[0].dtype == dtype:
        return None
    if len({(w.device, w.dtype) for w in weights}) > 1 or any(is_sharded(w) for w in weights):
        return None
    if plain_operations() or not torch.is_grad_enabled():
        return torch.cat([w.flatten() for w in weights]).to(dtype)
    return _Cast.apply(dtype, *weights)


class Watch:
    """Detects layers with a scale near zero. On a GPU the result is one pass late, to avoid a synchronisation."""

    def __init__(self) -> None:
        self._of: tuple[ScaleLayout, list[str]] | None = None
        self._owners = self._flags = self._event = None
        self._seen: dict[str, list[bool]] = {}

    def near_zero(self, layout: ScaleLayout, vectors: Whole) -> dict[str, list[bool]]:
        """Returns for each vector of factors which of its parts have an entry near zero.

        Vectors without gradients are left out.
        """
        given = {field: getattr(vectors, field) for field in ("own", "alone", "magnitude", "inputs")}
        given = {field: vector for field, vector in given.items() if vector is not None and vector.requires_grad}
        if not given:
            return {}
        parts = _parts_of(layout)
        sizes = {field: [size for _, size in parts[field][1]] for field in given}
        if next(iter(given.values())).device.type == "cuda":
            return self._one_late(layout, given, sizes)
        return {field: _near_zero(vector, sizes[field]) for field, vector in given.items()}

    def _one_late(
        self, layout: ScaleLayout, given: dict[str, Tensor], sizes: dict[str, list[int]]
    ) -> dict[str, list[bool]]:
        first = next(iter(given.values()))
        if self._of is None or self._of[0] is not layout or self._of[1] != list(given):
            self._of, self._seen, self._event = (layout, list(given)), {}, None
            counts = torch.tensor([size for field in given for size in sizes[field]])
            self._owners = torch.repeat_interleave(counts).to(first.device)
            self._flags = torch.zeros(len(counts), dtype=torch.bool, pin_memory=True)
        if self._event is not None and self._event.query():
            flags = iter(self._flags.tolist())  # type: ignore[union-attr]
            self._seen = {field: [next(flags) for _ in sizes[field]] for field in given}
            self._event = None
        if self._event is None:
            magnitudes = torch.cat([vector.detach().to(first.device) for vector in given.values()]).abs()
            lowest = magnitudes.new_full(self._flags.shape, NEAR_ZERO)  # type: ignore[union-attr]
            lowest.scatter_reduce_(0, self._owners, magnitudes, "amin")  # type: ignore[arg-type]
            self._flags.copy_(lowest < NEAR_ZERO, non_blocking=True)  # type: ignore[union-attr]
            self._event = torch.cuda.Event()
            self._event.record()
        return self._seen


def _near_zero(vector: Tensor, sizes: list[int]) -> list[bool]:
    """Returns which parts of a vector have an entry near zero; none off the CPU, to avoid a synchronisation."""
    if not near_zero(vector):
        return [False] * len(sizes)
    return [near_zero(part) for part in vector.detach().split(sizes)]


class _Cut(torch.autograd.Function):
    """Splits a vector; its backward pass divides by the scales once for all layers that deferred the division."""

    @staticmethod
    def forward(ctx: Any, vector: Tensor, sizes: list[int], deferred: list[bool]) -> Any:
        ctx.sizes, ctx.deferred = sizes, deferred
        ctx.save_for_backward(vector if any(deferred) else None)
        ctx.like = vector.dtype, vector.device
        ctx.set_materialize_grads(False)
        return tuple(vector.split(sizes))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (vector,) = ctx.saved_tensors
        dtype, device = ctx.like
        parts = [
            torch.zeros(size, dtype=dtype, device=device) if grad is None else grad
            for grad, size in zip(grads, ctx.sizes, strict=True)
        ]
        if vector is None:
            return torch.cat(parts), None, None
        if all(ctx.deferred):
            return undo_scale(torch.cat(parts), vector), None, None
        each = zip(parts, vector.split(ctx.sizes), ctx.deferred, strict=True)
        return torch.cat([undo_scale(part, scale) if later else part for part, scale, later in each]), None, None


def _cut(vector: Tensor, sizes: list[int], deferred: list[bool] | None = None) -> Sequence[Tensor]:
    if plain_operations() or not (torch.is_grad_enabled() and vector.requires_grad):
        return vector.split(sizes)
    return _Cut.apply(vector, sizes, deferred or [False] * len(sizes))


class _Cast(torch.autograd.Function):
    """Casts and concatenates tensors in one operation, and their gradients as well."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> Tensor:
        ctx.shapes, ctx.dtype = [t.shape for t in tensors], tensors[0].dtype
        return torch.cat([t.reshape(-1) for t in tensors]).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        parts = grads[0].to(ctx.dtype).split([shape.numel() for shape in ctx.shapes])
        return (None, *(part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True)))


def _joined(tensors: Sequence[Tensor], constant: float = 0.0) -> Tensor | None:
    """Concatenates parameters in at least float32 and adds a constant; `None` if there are none."""
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
    """Returns inverse squared row norms, and zero for zero rows."""
    return _reciprocal(torch.stack(norms).square())


def _floored_inverse(norms: list[Tensor]) -> Tensor:
    """Returns inverse squared row norms, with a floor for rows near zero."""
    return _reciprocal(floored(torch.stack(norms)).square())


def _reciprocal(total: Tensor) -> Tensor:
    return torch.where(total > 0, total.reciprocal(), torch.zeros_like(total))


def _inverse_of_references(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns inverse squared reference norms, and the squared norms of the frozen weights relative to them."""
    half = len(parts) // 2
    inverse = _floored_inverse(parts[half:])
    norms, references = (torch.stack([p.to(inverse.device) for p in each]) for each in (parts[:half], parts[half:]))
    return inverse, 1 + (norms.square() - references.square()) * inverse


def _unpack(base: Any) -> Callable[[], Tensor]:
    return lambda: row_matrix(base)


def combined(found: list[Vectors]) -> Vectors:
    """Combines the vectors of several active adapters: multiplies factors and adds shifts."""

    def product(factors: list[Factor | None]) -> Factor | None:
        given = [factor.wide for factor in factors if factor is not None]
        total = None
        for one in given:
            total = one if total is None else total * one
        return None if total is None else Factor(total, salt=next(f.salt for f in factors if f is not None))

    shifts = [one.shift for one in found if one.shift is not None]
    shift = None if not shifts else torch.stack(shifts).sum(0) if len(shifts) > 1 else shifts[0]
    return Vectors(product([one.scale for one in found]), shift, product([one.input_scale for one in found]))
