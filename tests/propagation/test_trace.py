"""Tracing small nets: what an operation does to the channels that pass it."""

from __future__ import annotations

import pytest
import torch
from tests.propagation.nets import graph_of, only_edge
from torch import nn
from torch.nn import functional as F

# ------------------------------------------------------------------ single operations, against an index made by numbers


def by_numbers(move, channels: int) -> list[int]:
    """Which source channel each channel is after a movement, found by moving the channels' own numbers."""
    numbers = torch.arange(channels).expand(2, 6, channels)
    return move(numbers)[0, 0].tolist()


MOVES = {
    "slice": lambda x: x[..., 2:7],
    "flip": lambda x: x.flip(-1),
    "roll": lambda x: x.roll(3, -1),
    "chunk and cat": lambda x: torch.cat(x.chunk(2, -1)[::-1], -1),
    "heads": lambda x: x.view(2, 6, 2, 4).transpose(2, 3).reshape(2, 6, 8),
    "repeat": lambda x: x.repeat(1, 1, 3),
    "repeat_interleave": lambda x: x.repeat_interleave(2, -1),
    "every other": lambda x: x[..., ::2],
    "gathered": lambda x: x[..., torch.tensor([7, 0, 0, 3])],
    "unbind and stack": lambda x: torch.stack(x.unbind(-1)[::-1], -1),
    "split sizes": lambda x: x.split([3, 5], -1)[1],
    "tokens rolled and cut": lambda x: x.roll(2, 1)[:, 1:4],
    "windows": lambda x: x.view(2, 2, 3, 8).flatten(0, 1),
    "index_select": lambda x: x.index_select(-1, torch.tensor([5, 1])),
    "permuted twice": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
}


@pytest.mark.parametrize("name", MOVES)
def test_movements_of_channels(name):
    index = by_numbers(MOVES[name], 8)
    graph = graph_of(
        lambda n, x: n.b(MOVES[name](n.a(x))), torch.randn(2, 6, 4), a=nn.Linear(4, 8), b=nn.Linear(len(index), 3)
    )
    edge = only_edge(graph)
    assert edge.channels.index.tolist() == index
    assert edge.kind == "exact"


def test_padding_has_no_source():
    edge = only_edge(graph_of(lambda n, x: n.b(F.pad(n.a(x), (1, 2))), a=nn.Linear(4, 3), b=nn.Linear(6, 1)))
    assert edge.channels.index.tolist() == [-1, 0, 1, 2, -1, -1]


def test_pixel_shuffle_and_flattened_pixels():
    image = torch.randn(1, 3, 4, 4)
    graph = graph_of(lambda n, x: n.b(F.pixel_shuffle(n.a(x), 2)), image, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(2, 1, 1))
    assert [barrier.operation for barrier in graph.barriers] == ["input"], "four source channels per input channel"
    graph = graph_of(lambda n, x: n.b(n.a(x).flatten(1)), image, a=nn.Conv2d(3, 2, 1), b=nn.Linear(32, 1))
    assert only_edge(graph).channels.index.tolist() == [0] * 16 + [1] * 16
    assert (only_edge(graph).channels.kind, only_edge(graph).channels.times) == ("repeat", 16)


@pytest.mark.parametrize(
    ("name", "operation", "kind", "via"),
    [
        ("relu", F.relu, "activation", ("relu",)),
        ("gelu", F.gelu, "activation", ("gelu",)),
        ("layer norm", lambda y: F.layer_norm(y, (8,)), "norm", ("layer_norm",)),
        ("rms norm by hand", lambda y: y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6), "norm", ("norm",)),
        ("constant factor", lambda y: y * 0.5 / 3, "exact", ()),
        ("learned factor", lambda y: y * torch.ones(8), "exact", ()),
        ("mean over tokens", lambda y: y.mean(1, keepdim=True), "exact", ("pool",)),
        ("dropout in eval", lambda y: F.dropout(y, 0.5, False), "exact", ()),
        ("cast", lambda y: y.double().float(), "exact", ()),
        ("masked", lambda y: y.masked_fill(torch.ones(2, 5, 1, dtype=torch.bool), 0.0), "exact", ()),
        ("constant per channel", lambda y: y + torch.ones(8), "norm", ("bias",)),
        ("constant per position", lambda y: y + torch.randn(5, 8), "residual", ("offset",)),
    ],
)
def test_what_an_operation_makes_of_an_edge(name, operation, kind, via):
    edge = only_edge(graph_of(lambda n, x: n.b(operation(n.a(x))), a=nn.Linear(4, 8), b=nn.Linear(8, 3)))
    assert (edge.channels.kind, edge.kind, edge.via) == ("identity", kind, via)


def test_residual_carries_the_most_recent_writer():
    def forward(n, x):
        first = n.a(x)
        return n.c(first + n.b(first))

    graph = graph_of(forward, a=nn.Linear(4, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 2))
    assert [(e.anterior, e.posterior, e.kind) for e in graph.edges] == [("a", "b", "exact"), ("b", "c", "residual")]


def test_gate_is_left_and_the_linear_branch_carries():
    graph = graph_of(lambda n, x: n.c(F.silu(n.a(x)) * n.b(x)), a=nn.Linear(4, 8), b=nn.Linear(4, 8), c=nn.Linear(8, 2))
    assert [(e.anterior, e.posterior, e.kind) for e in graph.edges] == [("b", "c", "exact")]


@pytest.mark.parametrize("combine", [torch.mul, lambda a, b: F.silu(a) * F.silu(b)])
def test_two_equal_branches_are_a_barrier(combine):
    graph = graph_of(lambda n, x: n.c(combine(n.a(x), n.b(x))), a=nn.Linear(4, 8), b=nn.Linear(4, 8), c=nn.Linear(8, 2))
    assert not graph.edges
    assert "two branches" in graph.barriers[0].reason


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_attention_carries_values(grouped, fused):
    heads = 2 if grouped else 4

    def forward(n, x):
        q, k, v = (layer(x).view(2, 5, -1, 4).transpose(1, 2) for layer in (n.q, n.k, n.v))
        if grouped and not fused:
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        if fused:
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
        else:
            y = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
        return n.o(y.transpose(1, 2).reshape(2, 5, 16))

    small = 4 * heads
    graph = graph_of(forward, q=nn.Linear(4, 16), k=nn.Linear(4, small), v=nn.Linear(4, small), o=nn.Linear(16, 4))
    edge = only_edge(graph)
    expected = [4 * (head * heads // 4) + c for head in range(4) for c in range(4)]
    assert (edge.anterior, edge.kind, edge.channels.index.tolist()) == ("v", "exact", expected)


def test_two_anteriors_of_one_layer():
    graph = graph_of(
        lambda n, x: n.c(torch.cat([n.a(x), n.b(x)], -1)), a=nn.Linear(4, 3), b=nn.Linear(4, 2), c=nn.Linear(5, 1)
    )
    assert [(e.anterior, e.channels.index.tolist()) for e in graph.edges] == [
        ("a", [0, 1, 2, -1, -1]),
        ("b", [-1, -1, -1, 0, 1]),
    ]


def test_layer_called_twice_keeps_what_both_calls_agree_on():
    def forward(n, x):
        y = n.a(x)
        return n.c(y) + n.c(y.relu())

    edge = only_edge(graph_of(forward, a=nn.Linear(4, 8), c=nn.Linear(8, 8)))
    assert (edge.anterior, edge.posterior, edge.kind) == ("a", "c", "activation")
    graph = graph_of(lambda n, x: n.c(n.a(x)) + n.c(n.b(x)), a=nn.Linear(4, 8), b=nn.Linear(4, 8), c=nn.Linear(8, 8))
    assert not graph.edges
    assert graph.barriers[0].reason == "its calls read from different layers"


def test_layer_that_reads_itself():
    graph = graph_of(lambda n, x: n.a(n.a(x)), a=nn.Linear(4, 4))
    assert not graph.edges
    assert graph.barriers


def test_one_module_under_two_names_and_one_weight_in_two_modules():
    shared = nn.Linear(4, 4)
    graph = graph_of(lambda n, x: n.c(n.b(n.a(x).relu())), a=shared, b=shared, c=nn.Linear(4, 2))
    assert {layer.fqn for layer in graph.layers} == {"a", "c"}, "a module has its first name"
    assert [(e.anterior, e.posterior) for e in graph.edges] == [("a", "c")]
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    graph = graph_of(lambda n, x: n.b(n.a(x)), a=first, b=second)
    assert only_edge(graph).kind == "exact", "tied weights are still two layers"


@pytest.mark.parametrize(
    "posterior",
    [nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 4, 3, groups=2), nn.Conv2d(8, 4, 1, stride=2)],
    ids=["depthwise", "grouped", "strided"],
)
def test_convolutions(posterior):
    graph = graph_of(lambda n, x: n.b(n.a(x)), torch.randn(1, 3, 8, 8), a=nn.Conv2d(3, 8, 3), b=posterior)
    assert (only_edge(graph).channels.kind, only_edge(graph).channels.size) == ("identity", 8)


def test_operation_without_a_rule_is_reported_by_name():
    graph = graph_of(lambda n, x: n.b(torch.cumsum(n.a(x), -1)), a=nn.Linear(4, 8), b=nn.Linear(8, 2))
    assert not graph.edges
    assert [(b.operation, b.layer) for b in graph.barriers] == [("cumsum", "b")]


def test_contraction_over_channels_ends_them():
    graph = graph_of(lambda n, x: n.b(n.a(x) @ torch.ones(8, 8)), a=nn.Linear(4, 8), b=nn.Linear(8, 2))
    assert "contracts the channel axis" in graph.barriers[0].reason


def test_activation_in_place():
    edge = only_edge(graph_of(lambda n, x: n.b(F.relu_(n.a(x))), a=nn.Linear(4, 8), b=nn.Linear(8, 2)))
    assert edge.kind == "activation"


def test_layer_that_never_runs():
    graph = graph_of(lambda n, x: n.a(x), a=nn.Linear(4, 8), spare=nn.Linear(8, 8))
    assert [layer.fqn for layer in graph.layers] == ["a"]
    assert [b.layer for b in graph.barriers] == ["spare"]


def test_heads_of_a_sum_are_both_heads_but_the_end_of_a_stream_is_none():
    graph = graph_of(
        lambda n, x: (n.b(n.a(x)) + n.c(n.a(x))) / 2, a=nn.Linear(4, 4), b=nn.Linear(4, 2), c=nn.Linear(4, 2)
    )
    assert graph.heads == ("b", "c")

    def stream(n, x):
        y = n.a(x)
        return y + n.b(y)

    assert graph_of(stream, a=nn.Linear(4, 4), b=nn.Linear(4, 4)).heads == ()
