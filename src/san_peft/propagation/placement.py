"""Decides where to apply the scale of an edge: in a norm, at the anterior's output, or at the posterior's input."""

from __future__ import annotations

import torch

from san_peft.propagation.graph import Edge, PropagationGraph

OUTPUT = "output"
INPUT = "input"


def place(graph: PropagationGraph) -> dict[tuple[str, str], str]:
    """Decides where to apply the scale of each edge. All places compute the same function up to rounding.

    | place | condition | what the scale multiplies |
    |---|---|---|
    | `norm:<fqn>` | only layers read this norm, and all of them get the same scale | the output of the norm |
    | `output` | all edges into the posterior are closed | the output channels of the anterior that are in the map |
    | `input` | otherwise | the input of the posterior |

    All edges into a posterior share the first place that fits.

    Args:
        graph: A traced graph, or a selection of it. A graph built by hand has no norms and no closed edges, so that
            all its scales are applied at inputs.

    Returns:
        The place of each (anterior, posterior), in the order of the edges: `norm:<fqn>`, `output` or `input`.

    Example:
        >>> from torch import nn
        >>> from san_peft import trace
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.Linear(6, 2))
        >>> place(trace(net, torch.zeros(3, 4)))
        {('0', '2'): 'norm:1', ('2', '3'): 'output'}
    """
    incoming: dict[str, list[Edge]] = {}
    for edge in graph.edges:
        incoming.setdefault(edge.posterior, []).append(edge)
    places: dict[str, str] = {}
    for norm in graph.norms:
        scales = {frozenset((e.anterior, e.channels) for e in incoming.get(fqn, ())) for fqn in norm.readers}
        if len(scales) == 1 and scales != {frozenset()}:
            places |= dict.fromkeys(norm.readers, f"norm:{norm.fqn}")
    for posterior, edges in incoming.items():
        disjoint = bool((torch.stack([edge.channels.index >= 0 for edge in edges]).sum(0) <= 1).all())
        closed = disjoint and all(edge.closed for edge in edges)
        places.setdefault(posterior, OUTPUT if closed else INPUT)
    return {(edge.anterior, edge.posterior): places[edge.posterior] for edge in graph.edges}


def describe(graph: PropagationGraph) -> str:
    """Describes each edge and where its scale is applied, one line per edge.

    Args:
        graph: A traced graph, or a selection of it.

    Returns:
        The printed edges, each followed by `@ norm <fqn>`, `@ output` or `@ input`.

    Example:
        >>> from torch import nn
        >>> from san_peft import trace
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.Linear(6, 2))
        >>> print(describe(trace(net, torch.zeros(3, 4))))
        0 -> 2 [identity] (through layer_norm) @ norm 1
        2 -> 3 [identity] @ output
    """
    places = place(graph)
    return "\n".join(f"{e} @ {places[e.anterior, e.posterior].replace(':', ' ', 1)}" for e in graph.edges)
