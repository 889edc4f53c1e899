"""Computes the constant part of a pass: positions of scales in concatenated vectors, and where each is applied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from san_peft.propagation.placement import INPUT, OUTPUT
from san_peft.tuner.decompose import type_of
from san_peft.tuner.norms import bind, norm_at
from san_peft.tuner.sharded import is_sharded

NORM = "norm:"
"""Prefix of the placement of a scale that is applied in a norm, followed by the norm's name."""


@dataclass
class ScaleLayout:
    """Stores the positions of one adapter's scales in the vectors of a pass, and where they are applied.

    The *sources* are the concatenated scales of all anterior layers, followed by a one. Indexing the sources gives the
    factors of all inputs, outputs and norms in one operation.

    Attributes:
        name: The name of the adapter.
        own: Layers with a trainable scale and no derived one; they come first among the sources.
        both: Layers with a trainable scale and one derived from a host.
        shifted: The layers of these with a shift.
        low_rank: Groups of LoRA hosts with the same shape, whose scales are computed together.
        dora: DoRA hosts whose magnitude is applied by `SanLayer`; those with a trainable scale come last.
        other: Hosts whose scales are computed one by one.
        offset: The position of each layer's scale in the sources.
        placed: Hosts at whose output a propagated scale is applied.
        outputs: The source index of each output channel of own, both, placed and dora.
        shifts: The source index of each channel of `shifted`.
        inputs: The names and sizes of layers with an input scale, then of norms.
        index: The source index of each channel of `inputs`; several indices, to be multiplied, if edges overlap.
        norms: The norms among `inputs`.
        fed: A mask of the channels of `inputs` that receive a scale.
        groups: The index of each layer's group of layers with the same input scale.
        posteriors: The layers among `inputs`.
        hosts: LoRA and DoRA hosts on dense layers, whose matrices are cast together.
        edge: Any edge, for the options that all edges share: bound, detach, and the exponent if it is the same.
        exponents: The size and exponent of each layer in the order of the sources, if exponents differ.
        strength: The strength of each channel of own and both; `None` stands for one.
        shift_strength: The strength of each channel of `shifted`; `None` stands for one.
    """

    name: str
    own: list[Any] = field(default_factory=list)
    both: list[Any] = field(default_factory=list)
    shifted: list[Any] = field(default_factory=list)
    low_rank: list[list[Any]] = field(default_factory=list)
    dora: list[Any] = field(default_factory=list)
    other: list[Any] = field(default_factory=list)
    offset: dict[str, int] = field(default_factory=dict)
    placed: list[Any] = field(default_factory=list)
    outputs: Tensor | None = None
    shifts: Tensor | None = None
    inputs: list[tuple[str, int]] = field(default_factory=list)
    index: list[Tensor] = field(default_factory=list)
    fed: Tensor | None = None
    norms: set[str] = field(default_factory=set)
    groups: dict[str, int] = field(default_factory=dict)
    hosts: list[Any] = field(default_factory=list)
    posteriors: list[Any] = field(default_factory=list)
    edge: Any = None
    exponents: list[tuple[int, float]] = field(default_factory=list)
    strength: Tensor | None = None
    shift_strength: Tensor | None = None
    _constants: dict[Any, Any] = field(default_factory=dict)

    def move(self, device: torch.device) -> None:
        """Moves the indices to a device."""
        for name in ("outputs", "shifts", "fed", "strength", "shift_strength"):
            value = getattr(self, name)
            if value is not None and value.device != device:
                setattr(self, name, value.to(device))
        if self.index and self.index[0].device != device:
            self.index = [one.to(device) for one in self.index]

    def constant(self, key: Any, parts: list[Tensor], make: Callable[[list[Tensor]], Any]) -> Any:
        """Returns a cached value computed from tensors of frozen weights; recomputes it if a tensor was replaced."""
        if torch.compiler.is_compiling():
            return make(parts)
        kept = self._constants.get(key)
        if kept is None or len(kept[0]) != len(parts) or any(a is not b for a, b in zip(kept[0], parts, strict=True)):
            kept = self._constants[key] = (parts, make(parts))
        return kept[1]


def lay_out_scales(scales: Any, name: str, single: bool) -> ScaleLayout:
    """Computes the layout of an adapter for the current state of the layers.

    Args:
        scales: The scales of the model.
        name: The name of the adapter.
        single: Whether it is the only active adapter.
    """
    layers = scales.layers
    layout = ScaleLayout(name)
    edges = _edges(scales, name)
    layout.edge = next((edge for incoming in edges.values() for edge in incoming), None)
    where = places(scales, name, single)
    sources = {e.anterior for incoming in edges.values() for e in incoming}
    for layer in layers.values():
        own, hosted = name in layer.san_scale, name in layer.san_host
        if own and hosted:
            layout.both.append(layer)
        elif own:
            layout.own.append(layer)
        if name in layer.san_shift:
            layout.shifted.append(layer)
    groups: dict[Any, list[Any]] = {}
    for fqn, layer in layers.items():
        frozen = name in layer.san_host and layer.san_host[name].frozen is not None  # merged: the scale was stored
        dora = single and layer.host is not None and not frozen and layer.one_pass_dora(name)
        if name in layer.san_host and name not in layer.san_scale:
            key = _group(layer, name)
            if fqn in sources and not dora:
                if key is not None:
                    groups.setdefault(key, []).append(layer)
                else:
                    layout.other.append(layer)
        if dora:
            layout.dora.append(layer)
        if single and layer.host is not None and layer.channel_dim == -1 and layer.one_pass(name):
            layout.hosts.append(layer)
    layout.low_rank = list(groups.values())
    layout.dora.sort(key=lambda layer: name in layer.san_scale)  # hosts without a trainable scale come first
    plain = [layer for layer in layout.dora if name not in layer.san_scale]
    order = [*layout.own, *layout.both, *(x for g in layout.low_rank for x in g), *plain, *layout.other]
    end = 0
    for layer in order:
        layout.offset[layer.san_name] = end
        end += layer.out_features
    exponents = {e.anterior: e.exponent for incoming in edges.values() for e in incoming}
    if len(set(exponents.values())) > 1:
        layout.exponents = [(layer.out_features, exponents.get(layer.san_name, 1.0)) for layer in order]
    layout.strength = _strength([*layout.own, *layout.both], name)
    layout.shift_strength = _strength(layout.shifted, name)
    _lay_out_outputs(scales, layout, where, edges, end)
    _lay_out_inputs(scales, layout, where, edges, end)
    return layout


def _strength(layers: list[Any], name: str) -> Tensor | None:
    """Returns the strength of an adapter per output channel, or `None` if it is one for all layers."""
    strengths = [layer.san_scale[name].strength for layer in layers]
    if all(strength == 1 for strength in strengths):
        return None
    return torch.cat([torch.full((x.out_features,), s) for x, s in zip(layers, strengths, strict=True)])


def _group(layer: Any, name: str) -> Any:
    """Returns the key that groups LoRA hosts whose scales can be computed together, or `None` for others."""
    host, scale = layer.host, layer.san_host[name]
    if type_of(host) != "LORA" or name in host.lora_magnitude_vector or scale.frozen is not None:
        return None
    base = host.get_base_layer()
    if is_sharded(base.weight):
        return None
    a, b = host.lora_A[name].weight, host.lora_B[name].weight
    key = (tuple(base.weight.shape), base.weight.dtype, base.weight.device, type(base), a.shape, a.dtype, b.dtype)
    return (*key, host.scaling[name], scale.decomposition, scale.reference is None)


def places(scales: Any, name: str, single: bool) -> dict[tuple[str, str], str]:
    """Returns where the scale of each edge is applied in the current state of the layers."""
    edges = _edges(scales, name)
    states = {
        (str(layer._active_adapter), layer._disable_adapters, tuple(layer.merged_adapters), layer.san_mode)
        for layer in scales.layers.values()
    }
    wired = scales.placements.get(name, {})
    usual = single and len(states) == 1 and next(iter(states))[3] == "both" and not next(iter(states))[2]
    gated = any(name in layer.san_gate for layer in scales.layers.values())
    found = {(e.anterior, fqn): INPUT for fqn, incoming in edges.items() for e in incoming}
    if not usual or gated:
        return found
    for pair, place in wired.items():
        if pair not in found:
            continue
        edge = next(e for e in edges[pair[1]] if e.anterior == pair[0])
        plain = edge.exponent == 1 and not edge.detach and edge.bound is None
        # a KV cache must hold the same values as after merging, where the scale is in the posterior's weight
        cached = pair in scales.attention.get(name, ()) and not scales.model.training
        if place == OUTPUT and plain and not cached:
            found[pair] = OUTPUT
        elif place.startswith(NORM) and _norm_is_ready(scales, name, place.removeprefix(NORM), edges):
            found[pair] = place
    return found


def _norm_is_ready(scales: Any, name: str, fqn: str, edges: dict[str, list[Any]]) -> bool:
    """Binds a norm if all its readers have the same input scale; returns whether it was bound."""
    readers = scales.readers[name].get(fqn, ())
    module = norm_at(scales.model, fqn)
    if module is None or not readers or any(reader not in scales.layers for reader in readers):
        return False
    wanted = [[(e.anterior, _key(e.index)) for e in edges[reader]] for reader in readers]
    if not wanted[0] or any(sorted(one) != sorted(wanted[0]) for one in wanted):
        return False
    sizes = {scales.layers[reader].in_features for reader in readers}
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or sizes != {weight.numel()}:
        return False
    return bind(module, scales, fqn)


def _lay_out_outputs(
    scales: Any, layout: ScaleLayout, places: dict[tuple[str, str], str], edges: dict[str, list[Any]], one: int
) -> None:
    indices: dict[str, Tensor] = {}
    for (anterior, posterior), place in places.items():
        if place == OUTPUT:
            layer = scales.layers[anterior]
            edge = next(e for e in edges[posterior] if e.anterior == anterior)
            index = indices.setdefault(anterior, torch.full((layer.out_features,), one))
            read = torch.arange(layer.out_features) if edge.index is None else edge.index.cpu().unique()
            read = read[read >= 0]
            index[read] = layout.offset[anterior] + read
    if not indices:
        return
    with_factor = [*layout.own, *layout.both]
    known = {layer.san_name for layer in (*with_factor, *layout.dora)}
    layout.placed = [scales.layers[fqn] for fqn in indices if fqn not in known]
    parts = [indices.get(x.san_name, torch.full((x.out_features,), one)) for x in (*with_factor, *layout.placed)]
    for layer in layout.dora:  # a trainable scale already includes it
        alone = layout.name not in layer.san_scale and layer.san_name in indices
        parts.append(indices[layer.san_name] if alone else torch.full((layer.out_features,), one))
    layout.outputs = torch.cat(parts)
    if layout.shifted:
        shifted = [indices.get(x.san_name, torch.full((x.out_features,), one)) for x in layout.shifted]
        layout.shifts = torch.cat(shifted)


def _lay_out_inputs(
    scales: Any, layout: ScaleLayout, places: dict[tuple[str, str], str], edges: dict[str, list[Any]], one: int
) -> None:
    rounds: list[list[Tensor]] = []
    readers: dict[Any, list[str]] = {}

    def add(fqn: str, size: int, incoming: list[Any]) -> None:
        layers: list[Tensor] = []
        for edge in incoming:
            index = torch.arange(size) if edge.index is None else edge.index.cpu()
            index = torch.where(index < 0, one, index + layout.offset[edge.anterior])
            for present in layers:  # combine channel maps that do not overlap
                if not bool(((present != one) & (index != one)).any()):
                    present.copy_(torch.minimum(present, index))
                    break
            else:
                layers.append(index)
        layout.inputs.append((fqn, size))
        while len(rounds) < max(1, len(layers)):
            rounds.append([torch.full((n,), one) for _, n in layout.inputs[:-1]])
        for number, column in enumerate(rounds):
            column.append(layers[number] if number < len(layers) else torch.full((size,), one))

    for fqn, incoming in edges.items():
        here = [e for e in incoming if places[e.anterior, fqn] == INPUT]
        if here:
            layer = scales.layers[fqn]
            add(fqn, layer.in_features, here)
            layout.posteriors.append(layer)
            key = (layer.channel_dim, layer.host is None, tuple((e.anterior, _key(e.index)) for e in here))
            if layout.name not in layer.san_gate:
                readers.setdefault(key, []).append(fqn)
        for place in {places[e.anterior, fqn] for e in incoming if places[e.anterior, fqn].startswith(NORM)}:
            norm = place.removeprefix(NORM)
            if norm not in layout.norms:
                layout.norms.add(norm)
                add(norm, scales.layers[fqn].in_features, incoming)
    for number, group in enumerate(group for group in readers.values() if len(group) > 1):
        layout.groups.update(dict.fromkeys(group, number))
    layout.index = [torch.cat(column) for column in rounds]
    if layout.index:
        layout.fed = torch.stack([index != one for index in layout.index]).any(0)


def _edges(scales: Any, name: str) -> dict[str, list[Any]]:
    """Returns the edges of an adapter by posterior layer."""
    return {fqn: layer.san_incoming.get(name, []) for fqn, layer in scales.layers.items()}


def _key(index: Tensor | None) -> Any:
    return None if index is None else tuple(index.tolist())
