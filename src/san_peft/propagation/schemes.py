"""Selects the edges of a traced graph by a scheme, and ablates the order of propagation."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch

from san_peft.errors import GraphError
from san_peft.propagation.channels import ChannelMap
from san_peft.propagation.edges import Edge
from san_peft.propagation.rules import ATTENTION, GATED, is_activation

if TYPE_CHECKING:
    from san_peft.propagation.graph import PropagationGraph

SCHEMES = ("all", "exact", "feedforward", "reference", "none")
ABLATIONS = ("reversed", "skip-one", "permuted", "shuffled")


def select(graph: PropagationGraph, scheme: str) -> PropagationGraph:
    """Selects the edges of a scheme.

    | scheme | edges |
    |---|---|
    | all | all edges except those into a head |
    | exact | of these, the edges on which the scale commutes |
    | feedforward | of these, the edges within a feed-forward block: an activation or a gate, no sum, no attention |
    | reference | patch embedding to the queries, keys and values of each block; attention output to fc1; fc1 to fc2 |
    | none | no edges |

    Args:
        graph: A traced graph.
        scheme: Name of the scheme.

    Returns:
        A graph with the same layers and barriers, and the selected edges.

    Raises:
        GraphError: For an unknown scheme, or `reference` on a model that is not a vision transformer.

    Example:
        >>> from san_peft import PropagationGraph
        >>> edge = Edge("fc1", "fc2", ChannelMap.identity(4), via=("gelu",))
        >>> len(select(PropagationGraph([edge]), "feedforward")), len(select(PropagationGraph([edge]), "exact"))
        (1, 0)
    """
    body = [edge for edge in graph.edges if edge.posterior not in graph.heads]
    if scheme == "all":
        return graph.with_edges(body)
    if scheme == "exact":
        return graph.with_edges(edge for edge in body if edge.kind == "exact")
    if scheme == "feedforward":
        return graph.with_edges(edge for edge in body if _is_feedforward(edge))
    if scheme == "reference":
        return graph.with_edges(_reference(graph, body))
    if scheme == "none":
        return graph.with_edges(())
    raise GraphError(f"unknown scheme {scheme!r}; known are {', '.join(SCHEMES)}, or pass a PropagationGraph.")


def ablate(graph: PropagationGraph, kind: str, seed: int = 0) -> PropagationGraph:
    """Ablates the order of propagation, for experiments.

    | kind | what changes |
    |---|---|
    | reversed | the scale of the posterior is propagated to the inputs of the anterior |
    | skip-one | a scale skips the layer that it feeds and goes to the layers which that layer feeds |
    | permuted | the anteriors are permuted among edges with the same channel map |
    | shuffled | all edges stay, the entries of each channel map are shuffled |

    `reversed` and `skip-one` drop edges between layers with different numbers of channels.

    Args:
        graph: The graph to ablate.
        kind: One of the four kinds above.
        seed: Seed of `permuted` and `shuffled`.

    Returns:
        The ablated graph.

    Raises:
        GraphError: For an unknown kind.
    """
    if kind == "reversed":
        return graph.with_edges(_fitting(graph, [(e.posterior, e.anterior, e.via[::-1]) for e in graph.edges[::-1]]))
    if kind == "skip-one":
        pairs = [
            (first.anterior, second.posterior, tuple(dict.fromkeys(first.via + second.via)))
            for first in graph.edges
            for second in graph.outgoing(first.posterior)
        ]
        return graph.with_edges(_fitting(graph, pairs))
    if kind == "permuted":
        return graph.with_edges(_permuted(graph.edges, random.Random(seed)))
    if kind == "shuffled":
        generator = torch.Generator().manual_seed(seed)
        return graph.with_edges(
            Edge(e.anterior, e.posterior, _shuffled(e.channels, generator), e.via) for e in graph.edges
        )
    raise GraphError(f"unknown ablation {kind!r}; known are {', '.join(ABLATIONS)}.")


def _is_feedforward(edge: Edge) -> bool:
    bends = is_activation(edge.via) or GATED in edge.via
    return bends and edge.kind != "residual" and ATTENTION not in edge.via


def _reference(graph: PropagationGraph, body: list[Edge]) -> list[Edge]:
    order = {layer.fqn: place for place, layer in enumerate(graph.layers)}
    values = dict.fromkeys(edge.anterior for edge in body if ATTENTION in edge.via)
    outputs = {edge.posterior for edge in body if ATTENTION in edge.via}
    seconds = {edge.posterior for edge in body if _is_feedforward(edge)}
    stem = min((edge.anterior for edge in body), key=lambda fqn: order.get(fqn, 0), default="")
    starts = stem and not graph.incoming(stem) and stem not in values and stem not in outputs | seconds
    if not (starts and any(edge.posterior in values for edge in graph.outgoing(stem))):
        raise GraphError(
            "the scheme 'reference' needs a vision transformer, but this model does not start with a patch embedding. "
            "Use 'all', 'exact' or 'feedforward'."
        )
    patches = graph.outgoing(stem)[0]
    readers: list[str] = []
    for value in values:
        sources = _sources(graph, value)
        readers += [
            edge.posterior
            for edge in body
            if edge.posterior == value
            or (not graph.outgoing(edge.posterior) and sources and _sources(graph, edge.posterior) == sources)
        ]
    width = patches.channels.source_size
    edges: list[Edge] = []
    for reader in dict.fromkeys(readers):
        size = graph.incoming(reader)[0].channels.size
        if size != width:
            raise GraphError(
                f"the scheme 'reference' needs equal widths, but {stem} has {width} output channels and "
                f"{reader} has {size} input channels. Use 'all', 'exact' or 'feedforward'."
            )
        edges.append(Edge(stem, reader, ChannelMap.identity(width), patches.via))
    edges += [edge for edge in body if edge.anterior in outputs and edge.posterior not in set(readers)]
    edges += [edge for edge in body if _is_feedforward(edge)]
    ranked = sorted(dict.fromkeys(edges), key=lambda edge: order.get(edge.posterior, 0))
    return ranked


def _sources(graph: PropagationGraph, fqn: str) -> tuple[tuple[str, ChannelMap], ...]:
    return tuple((edge.anterior, edge.channels) for edge in graph.incoming(fqn))


def _fitting(graph: PropagationGraph, pairs: list[tuple[str, str, tuple[str, ...]]]) -> list[Edge]:
    reads: dict[str, int] = {layer.fqn: layer.in_channels for layer in graph.layers}
    writes: dict[str, int] = {layer.fqn: layer.out_channels for layer in graph.layers}
    for edge in graph.edges:
        reads.setdefault(edge.posterior, edge.channels.size)
        writes.setdefault(edge.anterior, edge.channels.source_size)
    edges: dict[tuple[str, str], Edge] = {}
    for anterior, posterior, via in pairs:
        size = reads.get(posterior)
        if anterior != posterior and size is not None and writes.get(anterior) == size:
            edges.setdefault((anterior, posterior), Edge(anterior, posterior, ChannelMap.identity(size), via))
    return list(edges.values())


def _permuted(edges: tuple[Edge, ...], rng: random.Random) -> list[Edge]:
    groups: dict[ChannelMap, list[int]] = {}
    for place, edge in enumerate(edges):
        groups.setdefault(edge.channels, []).append(place)
    result = list(edges)
    for places in groups.values():
        anteriors = [edges[place].anterior for place in places]
        for _ in range(100):
            names = rng.sample(anteriors, len(anteriors))
            pairs = {(name, edges[place].posterior) for name, place in zip(names, places, strict=True)}
            if len(pairs) == len(places) and all(a != b for a, b in pairs):
                for name, place in zip(names, places, strict=True):
                    result[place] = Edge(name, edges[place].posterior, edges[place].channels, edges[place].via)
                break
    pairs = [(edge.anterior, edge.posterior) for edge in result]
    if len(set(pairs)) < len(pairs):
        return _permuted(edges, rng)
    return result


def _shuffled(channels: ChannelMap, generator: torch.Generator) -> ChannelMap:
    index = channels.index
    return ChannelMap.from_index(index[torch.randperm(len(index), generator=generator)], channels.source_size)
