"""Texts on a graph that the tree, the SVG and the HTML page share."""

from __future__ import annotations

from collections import Counter

from san_bench.graph.fold import FoldedEdge
from san_peft.propagation.graph import PropagationGraph
from san_peft.propagation.rules import KINDS


def many(number: int, word: str) -> str:
    """Returns a count with its noun, such as `1 edge` or `2 edges`."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def summary(graph: PropagationGraph) -> str:
    """Summarises a graph in one line: edges by kind, layers, barriers and heads.

    Example:
        >>> summary(PropagationGraph())
        '0 edges; 0 layers; 0 barriers; no head'
    """
    kinds = Counter(edge.kind for edge in graph.edges)
    edges = many(len(graph.edges), "edge")
    if kinds:
        edges += f": {', '.join(f'{kinds[kind]:,} {kind}' for kind in KINDS if kinds[kind])}"
    heads = f"head{'s' if len(graph.heads) > 1 else ''} {', '.join(graph.heads)}" if graph.heads else "no head"
    return "; ".join([edges, many(len(graph.layers), "layer"), many(len(graph.barriers), "barrier"), heads])


def path_words(edge: FoldedEdge, through: str = "through ") -> str:
    """Describes the operations on an edge's path, and the blocks in which they differ; empty without operations."""
    first, *others = edge.paths
    words = [f"{through}{', '.join(first[0])}" if first[0] else ""]
    words += [f"({note}: {through}{', '.join(via) or 'nothing'})" for via, note in others]
    return " ".join(word for word in words if word)
