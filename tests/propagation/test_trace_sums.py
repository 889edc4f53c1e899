"""A sum of streams has one graph, however it is written."""

from __future__ import annotations

import pytest
import torch
from tests.propagation.nets import Net, assert_exact, graph_of, only_edge, pairs
from torch import Tensor, nn

STREAMS = {
    "plus": lambda u, v: u + v,
    "stack and sum": lambda u, v: torch.stack([u, v]).sum(0),
    "stack last and sum": lambda u, v: torch.stack([u, v], -1).sum(-1),
    "mean": lambda u, v: torch.stack([u, v], 1).mean(1),
    "mean, kept": lambda u, v: torch.stack([u, v], 1).mean(1, keepdim=True)[:, 0],
    "einsum": lambda u, v: torch.einsum("nbtc->btc", torch.stack([u, v])),
    "cat and view and sum": lambda u, v: torch.cat([u, v], -1).view(2, 5, 2, 8).sum(-2),
    "cat of tokens": lambda u, v: torch.cat([u, v], 1).view(2, 2, 5, 8).sum(1),
    "builtin": lambda u, v: sum([u, v]),
    "addcmul": lambda u, v: torch.addcmul(u, v, torch.ones(8)),
    "lerp": lambda u, v: torch.lerp(u, v, 0.3),
    "in place": lambda u, v: u.add_(v),
    "into a buffer": lambda u, v: torch.zeros(2, 5, 8).add_(u).add_(v),
    "index_add": lambda u, v: torch.zeros(2, 5, 8).index_add(1, torch.arange(5), u).index_add_(1, torch.arange(5), v),
    "scatter_add": lambda u, v: torch.zeros(2, 5, 8).scatter_add(
        1, torch.arange(5).repeat(2)[None, :, None].expand(2, 10, 8), torch.cat([u, v], 1)
    ),
}
BENT = {
    "maximum": torch.maximum,
    "amax": lambda u, v: torch.stack([u, v]).amax(0),
    "max": lambda u, v: torch.stack([u, v]).max(0).values,
    "logsumexp": lambda u, v: torch.stack([u, v]).logsumexp(0),
    "logaddexp": torch.logaddexp,
    "weighted": lambda u, v: torch.einsum("n,nbtc->btc", torch.rand(2), torch.stack([u, v])),
}


def layers(names: str = "abcd") -> dict[str, nn.Module]:
    return {name: nn.Linear(4, 8) if name in "abc" else nn.Linear(8, 2) for name in names}


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("before", [False, True])
def test_a_sum_is_a_sum_however_it_is_written(name, before):
    """D reads the sum of two layers, or a stream to which it is added."""

    def forward(combine):
        return lambda n, x: n.d((n.a(x) + combine(n.b(x), n.c(x))) if before else combine(n.b(x), n.c(x)))

    names = "abcd" if before else "bcd"
    expected = graph_of(forward(STREAMS["plus"]), **layers(names))
    assert pairs(expected) == [("c", "d", "residual")]
    found = graph_of(forward(STREAMS[name]), **layers(names))
    assert pairs(found) == pairs(expected)
    assert found.barriers == expected.barriers == ()
    if name not in ("in place", "into a buffer", "index_add", "scatter_add"):
        assert found.edges == expected.edges


@pytest.mark.parametrize("name", BENT)
def test_the_more_recent_of_two_streams_whatever_is_done_with_them(name):
    graph = graph_of(lambda n, x: n.d(n.a(x) + BENT[name](n.b(x), n.c(x))), **layers())
    assert pairs(graph) == [("c", "d", "residual")]
    assert not graph.barriers


@pytest.mark.parametrize("name", ["var", "prod", "norm"])
def test_two_streams_of_which_no_sum_is_taken(name):
    def forward(n, x):
        return n.d(n.a(x) + getattr(torch.stack([n.b(x), n.c(x)]), name)(dim=0))

    graph = graph_of(forward, **layers())
    assert not graph.edges
    assert [(b.operation, b.layer) for b in graph.barriers] == [({"norm": "linalg_vector_norm"}.get(name, name), "d")]


def test_two_heads_whose_mean_is_the_output():
    graph = graph_of(lambda n, x: torch.stack([n.d(n.a(x)), n.e(n.b(x))]).mean(0), **layers("abde"))
    assert graph.heads == ("d", "e")


def by_hand(y: Tensor, dims: tuple[int, ...] = (-1,)) -> Tensor:
    return (y - y.mean(dims, keepdim=True)) * torch.rsqrt(y.var(dims, keepdim=True) + 1e-5)


NORMS = {
    "layer norm": by_hand,
    "of joined channels": lambda y: by_hand(torch.cat([y, y.flip(-1)], -1))[..., :8],
    "of groups": lambda y: by_hand(y.view(2, 5, 2, 4), (1, 3)).view(2, 5, 8),
    "of everything": lambda y: by_hand(y, (0, 1, 2)),
    "mean alone": lambda y: y - y.mean(-1, keepdim=True),
    "length": lambda y: y / y.norm(dim=-1, keepdim=True),
    "length of all": lambda y: y / y.norm(),
}


@pytest.mark.parametrize("name", NORMS)
def test_statistics_over_channels_make_a_norm(name):
    edge = only_edge(graph_of(lambda n, x: n.d(NORMS[name](n.a(x))), a=nn.Linear(4, 8), d=nn.Linear(8, 2)))
    assert (edge.kind, edge.channels.kind) == ("norm", "identity")


def test_a_norm_of_two_streams_side_by_side():
    """The channels of two layers, one after the other, are normalised together."""

    def forward(n, x):
        return n.d(by_hand(torch.cat([n.a(x), n.b(x)], -1)))

    graph = graph_of(forward, a=nn.Linear(4, 3), b=nn.Linear(4, 2), d=nn.Linear(5, 2))
    assert pairs(graph) == [("a", "d", "norm"), ("b", "d", "norm")]


def test_the_axis_of_a_reduction_where_all_axes_have_one_length():
    x = torch.randn(5, 5, 5)
    for dim, edges in ((0, 1), (1, 1), (2, 0)):
        graph = graph_of(lambda n, x, dim=dim: n.b(n.a(x).mean(dim)), x, a=nn.Linear(5, 5), b=nn.Linear(5, 5))
        assert len(graph.edges) == edges, dim
        assert len(graph.barriers) == 1 - edges, dim


def test_constants_among_averaged_tokens_are_an_offset():
    """The average is not the layer's alone, so its scale does not commute."""
    edge = only_edge(
        graph_of(
            lambda n, x: n.b(torch.cat([n.a(x), torch.ones(2, 1, 8)], 1).mean(1)), a=nn.Linear(4, 8), b=nn.Linear(8, 2)
        )
    )
    assert edge.kind == "residual"
    edge = only_edge(
        graph_of(lambda n, x: n.b(torch.cat([n.a(x), torch.ones(2, 1, 8)], 1)), a=nn.Linear(4, 8), b=nn.Linear(8, 2))
    )
    assert edge.kind == "residual"


def test_sums_of_streams_over_tokens_scaled_and_taken_back():
    def forward(n, x):
        return n.b(torch.stack([n.a(x)] * 3).sum(0).mean(1))

    assert_exact(Net(forward, a=nn.Linear(4, 8), b=nn.Linear(8, 2)), torch.randn(2, 5, 4))


def test_a_product_of_matrices_added_to_a_stream():
    """`baddbmm` adds what it multiplies to its first argument, which is a stream as well."""

    def forward(n, x):
        return n.d(torch.baddbmm(n.a(x), torch.ones(2, 5, 5), n.b(x)))

    assert pairs(graph_of(forward, **layers())) == [("b", "d", "residual")]
