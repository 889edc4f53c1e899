"""Defines the propagation graph: layers, norms, edges and barriers, as frozen dataclasses with JSON serialization.

The classes hold no module or tensor, so graphs can be compared, hashed and stored in a configuration.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from san_peft.errors import GraphError
from san_peft.propagation.channels import ChannelMap
from san_peft.propagation.rules import ATTENTION, kind_of

__all__ = ["Barrier", "ChannelMap", "Edge", "Layer", "Norm", "PropagationGraph"]

FORMAT = 2
"""Version of the JSON format."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A traced layer that SAN can adapt.

    Args:
        fqn: Dotted name of the module.
        type: Name of its class.
        in_channels: Number of input channels.
        out_channels: Number of output channels.
        overwritten: Whether an in-place operation overwrites its output, which the backward pass then cannot use.
        left_out: Why the default `target_modules` exclude it; empty if they do not.
    """

    fqn: str
    type: str
    in_channels: int
    out_channels: int
    overwritten: bool = False
    left_out: str = ""

    def to_json(self) -> dict[str, Any]:
        """Returns the layer as a JSON-compatible dict."""
        data = {"fqn": self.fqn, "type": self.type, "in": self.in_channels, "out": self.out_channels}
        optional = {"overwritten": self.overwritten, "left_out": self.left_out}
        return {**data, **{name: value for name, value in optional.items() if value}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Layer:
        """Creates a layer from the output of `to_json`; raises `GraphError` if it is malformed."""
        needed = {"fqn": str, "type": str, "in": int, "out": int}
        fields = _fields(data, "layer", needed, {"overwritten": bool, "left_out": str})
        return cls(
            fqn=fields["fqn"],
            type=fields["type"],
            in_channels=fields["in"],
            out_channels=fields["out"],
            overwritten=fields.get("overwritten", False),
            left_out=fields.get("left_out", ""),
        )

    def __str__(self) -> str:
        return f"{self.fqn} ({self.type} {self.in_channels} -> {self.out_channels})"


@dataclass(frozen=True, slots=True)
class Norm:
    """A normalisation module whose output is read only by layers, its channel j as their input channel j.

    A factor on its output, or on its weight and bias, therefore scales the inputs of these layers and nothing else.

    Args:
        fqn: Dotted name of the module.
        readers: Names of the layers that read its output, in execution order.
    """

    fqn: str
    readers: tuple[str, ...]

    def __post_init__(self) -> None:
        if isinstance(self.readers, str) or not all(isinstance(name, str) for name in self.readers):
            raise GraphError(f"norm {self.fqn}: readers must be a tuple of layer names, got {self.readers!r:.100}.")
        object.__setattr__(self, "readers", tuple(self.readers))

    def to_json(self) -> dict[str, Any]:
        """Returns the norm as a JSON-compatible dict."""
        return {"fqn": self.fqn, "readers": list(self.readers)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Norm:
        """Creates a norm from the output of `to_json`; raises `GraphError` if it is malformed."""
        return cls(**_fields(data, "norm", {"fqn": str, "readers": list | tuple}))

    def __str__(self) -> str:
        return f"{self.fqn} -> {', '.join(self.readers)}"


@dataclass(frozen=True, slots=True)
class Edge:
    """A propagation of the scale of one layer's outputs to the inputs of another layer.

    Args:
        anterior: Name of the layer whose scale is propagated.
        posterior: Name of the layer whose input channels are scaled.
        channels: Source channel of each input channel of the posterior.
        via: Operations between the two layers that do more than move channels, in order, without duplicates.
        closed: Whether the edge is exact and, as far as the trace could see, only the posterior reads these channels:
            scaling them at the anterior's output is then the same as at the posterior's input.

    Raises:
        GraphError: If a name is empty, or both ends are the same layer without an attention in between.

    Example:
        >>> edge = Edge("fc1", "fc2", ChannelMap.identity(64), via=("gelu",))
        >>> edge.kind, str(edge)
        ('activation', 'fc1 -> fc2 [identity] (through gelu)')
    """

    anterior: str
    posterior: str
    channels: ChannelMap
    via: tuple[str, ...] = ()
    closed: bool = False

    def __post_init__(self) -> None:
        for name in (self.anterior, self.posterior):
            if not isinstance(name, str) or not name:
                raise GraphError(f"an edge needs two layer names, got {self.anterior!r} -> {self.posterior!r}.")
        if self.anterior == self.posterior and ATTENTION not in self.via:
            raise GraphError(f"{self.anterior} -> {self.posterior}: a layer cannot propagate its scale to itself.")
        if not isinstance(self.channels, ChannelMap):
            raise GraphError(f"{self.anterior} -> {self.posterior}: channels must be a ChannelMap.")
        if isinstance(self.via, str) or not all(isinstance(name, str) for name in self.via):
            raise GraphError(f"{self.anterior} -> {self.posterior}: via must be a tuple of operation names.")
        object.__setattr__(self, "via", tuple(self.via))

    @property
    def kind(self) -> str:
        """Strongest kind of operation on the edge: `exact` (the scale commutes), `activation`, `norm`, `residual`."""
        return kind_of(self.via)

    def to_json(self) -> dict[str, Any]:
        """Returns the edge as a JSON-compatible dict."""
        data = {
            "anterior": self.anterior,
            "posterior": self.posterior,
            "channels": self.channels.to_json(),
            "via": list(self.via),
        }
        return {**data, "closed": True} if self.closed else data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Edge:
        """Creates an edge from the output of `to_json`; raises `GraphError` if it is malformed."""
        needed = {"anterior": str, "posterior": str, "channels": Mapping}
        fields = _fields(data, "edge", needed, {"via": list | tuple, "closed": bool})
        name = f"edge {fields['anterior']} -> {fields['posterior']}"
        try:
            channels = ChannelMap.from_json(fields["channels"])
        except GraphError as error:
            raise GraphError(f"{name}: {error}") from error
        via, closed = tuple(fields.get("via", ())), fields.get("closed", False)
        return cls(fields["anterior"], fields["posterior"], channels, via, closed)

    def __str__(self) -> str:
        path = f" (through {', '.join(self.via)})" if self.via else ""
        return f"{self.anterior} -> {self.posterior} [{self.channels}]{path}"


@dataclass(frozen=True, slots=True)
class Barrier:
    """An operation at which the trace lost the channels that a layer reads, with the reason."""

    operation: str
    layer: str
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Returns the barrier as a JSON-compatible dict."""
        return {"operation": self.operation, "layer": self.layer, "reason": self.reason}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Barrier:
        """Creates a barrier from the output of `to_json`; raises `GraphError` if it is malformed."""
        return cls(**_fields(data, "barrier", {"operation": str, "layer": str, "reason": str}))

    def __str__(self) -> str:
        return f"{self.operation} at {self.layer}: {self.reason}"


@dataclass(frozen=True, slots=True)
class PropagationGraph:
    """A graph of which layer's scale is propagated to which layer's inputs.

    Args:
        edges: The edges, at most one per pair of layers.
        barriers: Operations at which channels were lost.
        layers: All traced layers, in the order of their first call.
        heads: Layers that compute the model's output. `select("all")` excludes the edges into them.
        norms: Norms whose output is read only by layers.

    Raises:
        GraphError: If an edge appears twice, an edge or a norm names a layer that was not traced, or numbers of
            channels do not match.

    Example:
        >>> graph = PropagationGraph([Edge("fc1", "fc2", ChannelMap.identity(64), via=("gelu",))])
        >>> print(graph)
        1 edge, 0 barriers
          fc1 -> fc2 [identity] (through gelu)
        >>> PropagationGraph.from_json(graph.to_json()) == graph
        True
    """

    edges: tuple[Edge, ...] = ()
    barriers: tuple[Barrier, ...] = ()
    layers: tuple[Layer, ...] = ()
    heads: tuple[str, ...] = ()
    norms: tuple[Norm, ...] = ()

    def __post_init__(self) -> None:
        for name in ("edges", "barriers", "layers", "heads", "norms"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        self._check()

    def _check(self) -> None:
        known = {layer.fqn: layer for layer in self.layers}
        for norm in self.norms:
            for fqn in norm.readers:
                if known and fqn not in known:
                    raise GraphError(f"norm {norm} names {fqn}, which was not traced.{_suggest(fqn, known)}")
        pairs: set[tuple[str, str]] = set()
        in_channels = {layer.fqn: layer.in_channels for layer in self.layers}
        out_channels = {layer.fqn: layer.out_channels for layer in self.layers}
        for edge in self.edges:
            pair = (edge.anterior, edge.posterior)
            if pair in pairs:
                raise GraphError(f"edge {edge.anterior} -> {edge.posterior} appears twice; merge its channel maps.")
            pairs.add(pair)
            for fqn in pair:
                if known and fqn not in known:
                    raise GraphError(f"edge {edge} names {fqn}, which was not traced.{_suggest(fqn, known)}")
            out = out_channels.setdefault(edge.anterior, edge.channels.source_size)
            if out != edge.channels.source_size:
                raise GraphError(
                    f"edge {edge}: the channel map has {edge.channels.source_size} source channels, "
                    f"but {edge.anterior} has {out} output channels."
                )
            size = in_channels.setdefault(edge.posterior, edge.channels.size)
            if size != edge.channels.size:
                raise GraphError(
                    f"edge {edge}: the channel map has {edge.channels.size} input channels, "
                    f"but {edge.posterior} has {size}."
                )

    def __len__(self) -> int:
        return len(self.edges)

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Edge]:
        return iter(self.edges)

    def incoming(self, fqn: str) -> tuple[Edge, ...]:
        """Returns the edges whose posterior is `fqn`."""
        return tuple(edge for edge in self.edges if edge.posterior == fqn)

    def outgoing(self, fqn: str) -> tuple[Edge, ...]:
        """Returns the edges whose anterior is `fqn`."""
        return tuple(edge for edge in self.edges if edge.anterior == fqn)

    def names(self) -> tuple[str, ...]:
        """Returns the names of all layers: traced layers first, then layers that only edges name."""
        ends = (fqn for edge in self.edges for fqn in (edge.anterior, edge.posterior))
        return tuple(dict.fromkeys((*(layer.fqn for layer in self.layers), *ends)))

    def with_edges(self, edges: Iterable[Edge]) -> PropagationGraph:
        """Returns a copy of the graph with other edges."""
        return replace(self, edges=tuple(edges))

    def select(self, scheme: str) -> PropagationGraph:
        """Returns the graph with the edges of a scheme: `all`, `exact`, `feedforward`, `reference` or `none`.

        Raises:
            GraphError: For an unknown scheme, or `reference` on a model that is not a vision transformer.
        """
        from san_peft.propagation.schemes import select

        return select(self, scheme)

    def to_dict(self) -> dict[str, Any]:
        """Returns the graph as a JSON-compatible dict."""
        return {
            "format": FORMAT,
            "edges": [edge.to_json() for edge in self.edges],
            "barriers": [barrier.to_json() for barrier in self.barriers],
            "layers": [layer.to_json() for layer in self.layers],
            "heads": list(self.heads),
            "norms": [norm.to_json() for norm in self.norms],
        }

    def to_json(self, indent: int | None = None) -> str:
        """Returns the graph as a JSON string."""
        return json.dumps(self.to_dict(), indent=indent)

    @classmethod
    def from_json(cls, data: str | Mapping[str, Any]) -> PropagationGraph:
        """Creates a graph from a JSON string or from the output of `to_dict`.

        Raises:
            GraphError: If the string is not JSON or a part is malformed; the message names the part.
        """
        if isinstance(data, str):
            try:
                data = json.loads(data)
            except json.JSONDecodeError as error:
                raise GraphError(f"the propagation graph is not valid JSON: {error}.") from error
        optional = {"barriers": list, "layers": list, "heads": list, "norms": list, "format": int}
        fields = _fields(data, "propagation graph", {"edges": list}, optional)
        if fields.get("format", FORMAT) > FORMAT:
            raise GraphError(
                f"the propagation graph has format {fields['format']}, but this version reads up to {FORMAT}. "
                "Upgrade san-peft."
            )
        heads = fields.get("heads", [])
        if not all(isinstance(head, str) for head in heads):
            raise GraphError(f"propagation graph: heads must be a list of layer names, got {heads!r}.")
        return cls(
            tuple(Edge.from_json(item) for item in fields["edges"]),
            tuple(Barrier.from_json(item) for item in fields.get("barriers", [])),
            tuple(Layer.from_json(item) for item in fields.get("layers", [])),
            tuple(heads),
            tuple(Norm.from_json(item) for item in fields.get("norms", [])),
        )

    def __str__(self) -> str:
        def count(number: int, word: str) -> str:
            return f"{number} {word}{'' if number == 1 else 's'}"

        lines = [f"{count(len(self.edges), 'edge')}, {count(len(self.barriers), 'barrier')}"]
        lines += [f"  {edge}" for edge in self.edges]
        lines += [f"  barrier: {barrier}" for barrier in self.barriers]
        if self.heads:
            lines.append(f"  heads: {', '.join(self.heads)}")
        lines += [f"  left out: {layer.fqn}: {layer.left_out}" for layer in self.layers if layer.left_out]
        return "\n".join(lines)


def _suggest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" Did you mean {', '.join(close)}?" if close else ""


def _fields(
    data: Any, what: str, needed: Mapping[str, Any], optional: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise GraphError(f"a {what} must be a JSON object, got {data!r}.")
    types = {**needed, **(optional or {})}
    for name in needed:
        if name not in data:
            raise GraphError(f"{what} {dict(data)!r:.200}: the field {name!r} is missing.")
    for name, value in data.items():
        if name not in types:
            raise GraphError(f"{what}: unknown field {name!r}.{_suggest(str(name), types)}")
        if not isinstance(value, types[name]) or (isinstance(value, bool) and types[name] is int):
            raise GraphError(f"{what}: the field {name!r} has the wrong type, got {value!r:.100}.")
    return dict(data)
