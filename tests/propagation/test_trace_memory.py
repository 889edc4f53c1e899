"""Memory that is written in parts: slices of a buffer, entries at indices, views of what a layer wrote."""

from __future__ import annotations

import pytest
import torch
from tests.propagation.nets import Net, assert_exact, graph_of, only_edge, pairs
from torch import Tensor, nn
from torch.nn import functional as F

ROWS = torch.tensor([4, 0, 2, 1, 3])


def halves(y: Tensor, buffer: Tensor) -> Tensor:
    buffer[..., :4] = y[..., 4:]
    buffer[..., 4:8] = y[..., :4]
    return buffer


def through_a_view(y: Tensor) -> Tensor:
    buffer = torch.empty(2, 5, 8)
    buffer.view(10, 8)[:, 2:].copy_(y.view(10, 8)[:, :6])
    buffer[..., :2] = y[..., 6:]
    return buffer


def one_by_one(y: Tensor) -> Tensor:
    buffer = torch.zeros(2, 8, 5)
    for channel in range(8):
        buffer[:, 7 - channel].copy_(y[..., channel])
    return buffer.mT


def in_place(y: Tensor) -> Tensor:
    first = y[..., :4].clone()
    y[..., :4] = y[..., 4:]
    y[..., 4:] = first
    return y


def put(y: Tensor) -> Tensor:
    buffer = torch.zeros(5, 2, 8)
    buffer[ROWS] = y.transpose(0, 1)
    return buffer


SWAPPED = [4, 5, 6, 7, 0, 1, 2, 3]
WRITTEN = {
    "slices of zeros": (lambda y: halves(y, torch.zeros(2, 5, 8)), SWAPPED),
    "slices of empty memory": (lambda y: halves(y, torch.empty(2, 5, 8)), SWAPPED),
    "slices of something like it": (lambda y: halves(y, torch.empty_like(y)), SWAPPED),
    "a view of a view": (through_a_view, [6, 7, 0, 1, 2, 3, 4, 5]),
    "channel by channel": (one_by_one, list(range(8))[::-1]),
    "halves that change places": (in_place, SWAPPED),
    "half of zeros": (lambda y: F.pad(halves(y, torch.zeros(2, 5, 10))[..., :4], (0, 4)), [4, 5, 6, 7, -1, -1, -1, -1]),
    "rows put": (put, list(range(8))),
    "index_put": (lambda y: torch.zeros(2, 5, 8).index_put((torch.arange(2)[:, None], ROWS[None]), y), list(range(8))),
    "scatter": (lambda y: torch.zeros(2, 5, 8).scatter(1, ROWS[None, :, None].expand(2, 5, 8), y), list(range(8))),
    "index_copy": (lambda y: torch.zeros(2, 5, 8).index_copy(2, torch.arange(8).flip(0), y), list(range(8))[::-1]),
    "masked": (lambda y: torch.zeros(2, 5, 8).masked_scatter(torch.ones(2, 5, 8, dtype=torch.bool), y), list(range(8))),
    "slice_scatter": (lambda y: y.slice_scatter(y[..., 4:], -1, 0, 4), [4, 5, 6, 7, 4, 5, 6, 7]),
    "index_add": (lambda y: torch.zeros(2, 5, 8).index_add(1, ROWS, y), list(range(8))),
    "put and added up": (
        lambda y: torch.zeros(2, 5, 8).index_put_((torch.arange(2)[:, None], ROWS[None]), y, accumulate=True),
        list(range(8)),
    ),
    "scatter_add": (lambda y: torch.zeros(2, 3, 8).scatter_add(1, (ROWS % 3)[None, :, None].expand(2, 5, 8), y), None),
    "moved out": (lambda y: torch.exp(torch.zeros(2, 5, 8), out=torch.empty(2, 5, 8)) * y, list(range(8))),
    "zeros written in place": (lambda y: (y[..., 1:3].zero_(), y)[1], [0, -1, -1, 3, 4, 5, 6, 7]),
    "zeros assigned": (lambda y: (y.__setitem__((..., slice(1, 3)), 0.0), y)[1], [0, -1, -1, 3, 4, 5, 6, 7]),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_can_be_read_anywhere(name):
    write, index = WRITTEN[name]
    net = Net(lambda n, x: n.b(write(n.a(x))), a=nn.Linear(4, 8), b=nn.Linear(8, 3))
    x = torch.randn(2, 5, 4)
    edge = only_edge(graph_of(net.run, x, a=net.a, b=net.b))
    assert edge.kind == "exact"
    assert edge.channels.index.tolist() == (index or list(range(8)))
    if name != "half of zeros":
        assert_exact(net, x)


def test_rotary_in_place_keeps_the_values():
    """The usual way to write it: queries and keys are turned in a buffer of their own, or where they are."""

    def turn(y: Tensor, where: Tensor) -> Tensor:
        first, second = y[..., :2].clone(), y[..., 2:].clone()
        where[..., :2] = first * 0.6 - second * 0.8
        where[..., 2:] = first * 0.8 + second * 0.6
        return where

    def forward(n, x):
        q, k, v = (layer(x).view(2, 5, 2, 4).transpose(1, 2) for layer in (n.q, n.k, n.v))
        q, k = turn(q, torch.empty_like(q)), turn(k, k)
        return n.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 8))

    graph = graph_of(forward, **{name: nn.Linear(4, 8) for name in "qkv"}, o=nn.Linear(8, 4))
    assert pairs(graph) == [("v", "o", "exact")]
    assert not graph.barriers


def test_a_half_that_is_written_in_place():
    """Every half keeps its own layer, and its own operations on the way."""

    def forward(n, x):
        y = n.a(x)
        half = y[..., :4]
        half.add_(n.b(x))
        return n.c(y)

    graph = graph_of(forward, a=nn.Linear(4, 8), b=nn.Linear(4, 4), c=nn.Linear(8, 2))
    assert {(e.anterior, e.kind, tuple(e.channels.index.tolist())) for e in graph.edges} == {
        ("b", "residual", (0, 1, 2, 3, -1, -1, -1, -1)),
        ("a", "exact", (-1, -1, -1, -1, 4, 5, 6, 7)),
    }


def test_a_copy_keeps_what_it_copied():
    def forward(n, x):
        y = n.a(x)
        kept = y.clone()
        y[..., :4] = 0.0
        return n.b(kept)

    edge = only_edge(graph_of(forward, a=nn.Linear(4, 8), b=nn.Linear(8, 2)))
    assert edge.channels.kind == "identity"


def test_constants_that_stay_beside_what_is_put_among_them():
    def forward(n, x):
        stream = torch.ones(2, 9, 8)
        stream[torch.tensor([[0, 1], [1, 0]]).bool().repeat_interleave(5, 1)[:, :9]] = n.a(x).flatten(0, 1)[:9]
        return n.b(stream)

    graph = graph_of(forward, a=nn.Linear(4, 8), b=nn.Linear(8, 2))
    assert not graph.edges
    assert [b.operation for b in graph.barriers] == ["index_put"]


def test_channels_that_are_added_up_by_index():
    def forward(n, x):
        return n.b(torch.zeros(2, 5, 8).index_add(2, torch.arange(8) // 2, n.a(x)))

    graph = graph_of(forward, a=nn.Linear(4, 8), b=nn.Linear(8, 2))
    assert not graph.edges
    assert [(b.operation, b.reason) for b in graph.barriers] == [
        ("index_add", "it adds different channels of one layer")
    ]


@pytest.mark.parametrize("experts", [2, 4])
def test_tokens_of_experts_that_are_added_up(experts):
    """A layer for each expert; those without tokens read nothing."""

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 8)
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(experts))
            self.out = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.inner(x).flatten(0, 1)
            expert = torch.arange(10) % 2
            y = torch.zeros_like(h)
            for number, layer in enumerate(self.experts):
                tokens = (expert == number).nonzero().flatten()
                y.index_add_(0, tokens, layer(h[tokens]) * 0.5)
            return self.out(y)

    from san_peft import trace

    graph = trace(Routed(), torch.randn(2, 5, 4))
    assert pairs(graph) == [("inner", "experts.0", "exact"), ("inner", "experts.1", "exact")]
    barriers = {barrier.layer: barrier for barrier in graph.barriers}
    assert set(barriers) == {"out", *(f"experts.{number}" for number in range(2, experts))}
    assert "different channels, or layers" in barriers["out"].reason
    assert all("trace larger inputs" in b.reason for name, b in barriers.items() if name != "out")


class Chosen(nn.Module):
    """Every token goes to one of two layers, as a router decides."""

    def __init__(self, write) -> None:
        super().__init__()
        self.router, self.write = nn.Linear(4, 2), write
        self.a, self.b, self.out = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(0, 1)
        expert = self.router(x).argmax(-1)
        return self.out(self.write(self, x, expert))


def added(n: Chosen, x: Tensor, expert: Tensor) -> Tensor:
    y = torch.zeros(10, 8)
    for number, layer in enumerate((n.a, n.b)):
        tokens = (expert == number).nonzero().flatten()
        y.index_add_(0, tokens, layer(x[tokens]))
    return y


ROUTED = {
    "added up": added,
    "chosen": lambda n, x, expert: torch.where((expert == 0)[:, None], n.a(x), n.b(x)),
    "gathered": lambda n, x, expert: torch.stack([n.a(x), n.b(x)])[expert, torch.arange(10)],
    "gathered from a row": lambda n, x, expert: torch.cat([n.a(x), n.b(x)])[expert * 10 + torch.arange(10)],
    "put": lambda n, x, expert: n.a(x).index_put((expert.nonzero().flatten(),), n.b(x)[: int(expert.sum())]),
}


@pytest.mark.parametrize("name", ROUTED)
@pytest.mark.parametrize("chosen", [0, 1, None])
def test_a_router_decides_nothing_about_the_graph(name, chosen):
    """Whichever layer the tokens of the example go to, no layer is taken for the one that writes them all."""
    from san_peft import trace

    net = Chosen(ROUTED[name])
    if chosen is not None:
        net.router.bias.data[chosen] += 100
    graph = trace(net, torch.randn(2, 5, 4))
    if name == "added up" and chosen is not None:
        return  # the other layer had nothing to read, so it cannot be told from one layer that writes all in some order
    assert not graph.incoming("out")
    assert "out" in {barrier.layer for barrier in graph.barriers}


def test_a_permutation_that_values_decide():
    """All tokens are sorted, written by one layer, and put back."""

    def forward(n, x):
        y = n.a(x).flatten(0, 1)
        order = y[:, 0].argsort()
        z = n.b(y[order])
        return n.c(torch.empty_like(z).index_copy_(0, order, z))

    net = Net(forward, a=nn.Linear(4, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 2))
    assert pairs(graph_of(forward, a=net.a, b=net.b, c=net.c)) == [("a", "b", "exact"), ("b", "c", "exact")]
