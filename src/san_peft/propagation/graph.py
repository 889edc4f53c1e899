"""Defines the propagation graph, a frozen dataclass with JSON serialization.

It holds no module or tensor, so graphs can be compared, hashed and stored in a configuration.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from san_peft.errors import GraphError
from san_peft.propagation.channels import ChannelMap
from san_peft.propagation.edges import Barrier, Edge, Layer, Norm, read_fields, suggestion
from san_peft.propagation.schemes import select

__all__ = ["Barrier", "ChannelMap", "Edge", "Layer", "Norm", "PropagationGraph"]

FORMAT = 2
"""Version of the JSON format."""


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
                    raise GraphError(f"norm {norm} names {fqn}, which was not traced.{suggestion(fqn, known)}")
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
                    raise GraphError(f"edge {edge} names {fqn}, which was not traced.{suggestion(fqn, known)}")
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
        fields = read_fields(data, "propagation graph", {"edges": list}, optional)
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
