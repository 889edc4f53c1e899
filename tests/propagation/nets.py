"""Nets of a few layers for tests of the trace, and the check that a map is right: outputs, not codes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from san_peft import Edge, PropagationGraph, trace
from san_peft.functional import propagate


class Net(nn.Module):
    """A net whose forward is given as a function of itself and its input."""

    def __init__(self, forward, **layers: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def graph_of(forward, x: Tensor | None = None, **layers: nn.Module) -> PropagationGraph:
    return trace(Net(forward, **layers), torch.randn(2, 5, 4) if x is None else x)


def only_edge(graph: PropagationGraph):
    assert len(graph.edges) == 1, graph
    assert not graph.barriers, graph
    return graph.edges[0]


def pairs(graph: PropagationGraph) -> list[tuple[str, str, str]]:
    return [(edge.anterior, edge.posterior, edge.kind) for edge in graph.edges]


@torch.no_grad()
def assert_exact(net: nn.Module, x: Tensor, edges: Iterable[Edge] | None = None) -> None:
    """Scales what anteriors write, and takes it back from the posteriors' columns: the outputs stay the same.

    Args:
        net: The net; it is changed.
        x: Its input.
        edges: Edges to check, with positive scales; `None` takes the exact ones of a trace. It has to hold where
            nothing else reads those channels.
    """
    edges = [edge for edge in trace(net, x).edges if edge.kind == "exact"] if edges is None else list(edges)
    assert edges
    net, x = net.double().eval(), x.double()
    standard = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        _scale_and_take_back(net, x, edges)
    finally:
        torch.set_default_dtype(standard)


def _scale_and_take_back(net: nn.Module, x: Tensor, edges: list[Edge]) -> None:
    before = net(x)
    for edge in edges:
        reached = torch.zeros(edge.channels.source_size, dtype=torch.bool)
        index = edge.channels.index
        reached[index[index >= 0]] = True
        scale = torch.where(reached, torch.rand(len(reached), dtype=torch.float64) + 0.5, 1.0)
        anterior, posterior = (net.get_submodule(fqn) for fqn in (edge.anterior, edge.posterior))
        anterior.weight *= scale.view(-1, *[1] * (anterior.weight.dim() - 1))
        if anterior.bias is not None:
            anterior.bias *= scale
        columns = propagate(scale, index, exponent=-1.0)
        groups = getattr(posterior, "groups", 1)
        if groups == 1:
            posterior.weight *= columns.view(1, -1, *[1] * (posterior.weight.dim() - 2))
        else:
            rows = columns.view(groups, 1, -1).expand(-1, posterior.weight.shape[0] // groups, -1).flatten(0, 1)
            posterior.weight *= rows.view(*rows.shape, *[1] * (posterior.weight.dim() - 2))
    torch.testing.assert_close(net(x), before, rtol=1e-9, atol=1e-9)
