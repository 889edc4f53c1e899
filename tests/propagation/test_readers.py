"""What a trace of small nets sees beside edges: norms that only layers read, closed edges, overwritten outputs."""

from __future__ import annotations

import pytest
import torch
from tests.propagation.nets import Net, graph_of
from torch import Tensor, nn
from torch.nn import functional as F

from san_peft import PropagationGraph, trace
from san_peft.propagation import describe_placement, place


def readers(graph: PropagationGraph) -> dict[str, tuple[str, ...]]:
    return {norm.fqn: norm.readers for norm in graph.norms}


def closed(graph: PropagationGraph) -> set[tuple[str, str]]:
    return {(edge.anterior, edge.posterior) for edge in graph.edges if edge.closed}


# ------------------------------------------------------------------ norms


def test_norm_read_by_two_layers():
    graph = graph_of(
        lambda n, x: n.b(y := n.norm(n.a(x))) + n.c(y),
        a=nn.Linear(4, 8), norm=nn.LayerNorm(8), b=nn.Linear(8, 2), c=nn.Linear(8, 2),
    )  # fmt: skip
    assert readers(graph) == {"norm": ("b", "c")}
    assert set(place(graph).values()) == {"norm:norm"}
    assert "a -> b [identity] (through layer_norm) @ norm norm" in describe_placement(graph)


OPEN = {
    "added to a stream": lambda n, y: n.b(y) + y,
    "returned": lambda n, y: (n.b(y), y),
    "returned within an object": lambda n, y: (n.b(y), {"kept": [y]}),
    "activation": lambda n, y: n.b(y.relu()),
    "scaled": lambda n, y: n.b(y * 2),
    "other channels": lambda n, y: n.b(y.flip(-1)),
    "some channels": lambda n, y: n.c(y[..., :4]),
    "concatenated tokens": lambda n, y: n.b(torch.cat([y, torch.ones(2, 1, 8)], 1)),
    "padding that is not zero": lambda n, y: n.b(F.pad(y, (0, 0, 1, 1), value=1.0)),
    "written in place": lambda n, y: n.b(y.add_(1)),
    "written through a view": lambda n, y: (y[:, 0].zero_(), n.b(y))[1],
    "read by a weight": lambda n, y: n.b(y) + F.linear(y, n.b.weight),
    "a condition": lambda n, y: n.b(y) + int((y > 0).any()),
    "reader called again on something else": lambda n, y: n.b(n.b(y)),
    "called again": lambda n, y: n.b(n.norm(y)),
    "its weight read elsewhere": lambda n, y: n.b(y) * n.norm.weight,
    "read by nobody": lambda n, y: n.b(n.spare),
}


@pytest.mark.parametrize("name", OPEN)
def test_an_open_norm_is_left_out(name):
    net = Net(lambda n, x: OPEN[name](n, n.norm(n.a(x))), a=nn.Linear(4, 8), norm=nn.LayerNorm(8))
    net.b, net.c = nn.Linear(8, 8), nn.Linear(4, 8)
    net.register_buffer("spare", torch.ones(8))
    assert trace(net, torch.randn(2, 5, 4)).norms == ()


KEPT = {
    "itself": lambda y: y,
    "cast": lambda y: y.double().float(),
    "tokens rolled and padded": lambda y: F.pad(y.roll(1, 1), (0, 0, 1, 1)),
    "one token": lambda y: y[:, 0],
    "folded": lambda y: y.flatten(0, 1),
    "dropout": lambda y: F.dropout(y, 0.5, False),
    "shape alone": lambda y: (torch.zeros_like(y), y)[1],
    "there and back": lambda y: torch.cat(y.chunk(2, -1), -1),
}


@pytest.mark.parametrize("name", KEPT)
def test_moves_of_tokens_keep_a_norm(name):
    layers = {"a": nn.Linear(4, 8), "norm": nn.LayerNorm(8), "b": nn.Linear(8, 2)}
    graph = graph_of(lambda n, x: n.b(KEPT[name](n.norm(n.a(x)))), **layers)
    assert readers(graph) == {"norm": ("b",)}


class OffsetNorm(nn.Module):
    """As Gemma's: one plus its weight."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).float() * (1.0 + self.weight.float())


class ChannelsFirstNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Scaled(nn.Module):
    """Has one weight per channel and is no normalisation."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


@pytest.mark.parametrize(
    ("norm", "image", "found"),
    [
        (nn.LayerNorm(5), False, True),
        (nn.RMSNorm(5), False, True),
        (OffsetNorm(5), False, True),
        (nn.LayerNorm(5, bias=False), False, True),
        (nn.LayerNorm(5, elementwise_affine=False), False, False),
        (nn.BatchNorm2d(5), True, True),
        (nn.GroupNorm(1, 5), True, True),
        (nn.InstanceNorm2d(5, affine=True), True, True),
        (ChannelsFirstNorm(5), True, True),
        (Scaled(5), False, False),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else None,
)
def test_kinds_of_norms_where_every_axis_has_one_length(norm, image, found):
    """So that the sizes say nothing of which axis is the channels'."""
    if image:
        x, layers = torch.randn(5, 5, 5, 5), {"a": nn.Conv2d(5, 5, 1), "b": nn.Conv2d(5, 5, 1)}
    else:
        x, layers = torch.randn(5, 5, 5), {"a": nn.Linear(5, 5), "b": nn.Linear(5, 5)}
    assert bool(graph_of(lambda n, x: n.b(n.norm(n.a(x))), x, **layers, norm=norm).norms) is found
    if found:  # the wrong axis
        x = x.movedim(1, -1)
        graph = graph_of(lambda n, x: n.b(n.norm(n.a(x)).transpose(1, -1)), x, **layers, norm=norm)
        assert not graph.norms


def test_two_norms_with_one_weight():
    first, second = nn.LayerNorm(4), nn.LayerNorm(4)
    second.weight = first.weight
    graph = graph_of(lambda n, x: n.b(n.v(n.a(n.u(x)))), u=first, v=second, a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    assert graph.norms == ()


# ------------------------------------------------------------------ closed edges

CLOSED = {
    "alone": (lambda n, y, x: n.b(y), True),
    "moved": (lambda n, y, x: n.b(y.flip(-1).roll(1, 1)), True),
    "scaled": (lambda n, y, x: n.b(y * 0.5 / torch.rand(8)), True),
    "padded with zeros": (lambda n, y, x: n.b(F.pad(y, (0, 0, 1, 1))), True),
    "averaged over tokens": (lambda n, y, x: n.b(y.mean(1)), True),
    "gated": (lambda n, y, x: n.b(y * F.silu(n.c(x))), True),
    "read in both calls": (lambda n, y, x: n.b(y) + n.b(y), True),
    "an activation": (lambda n, y, x: n.b(y.relu()), False),
    "returned": (lambda n, y, x: (n.b(y), y), False),
    "returned within an object": (lambda n, y, x: (n.b(y), {"kept": [y[0]]}), False),
    "another reader": (lambda n, y, x: n.b(y) + n.d(y), False),
    "another reader through an activation": (lambda n, y, x: n.b(y) + n.d(y.relu()), False),
    "added to": (lambda n, y, x: n.b(y) + n.d(y + n.c(x)), False),
    "gate of another": (lambda n, y, x: n.b(y) + n.d(F.silu(y) * n.c(x)), False),
    "contracted": (lambda n, y, x: (y @ y.mT) @ n.b(y), False),
    "statistic": (lambda n, y, x: n.b(y) * y.std(), False),
    "rounded": (lambda n, y, x: n.b(torch.div(y, 2, rounding_mode="floor")), False),
    "a condition": (lambda n, y, x: n.b(y) + int((y > 0).any()), False),
    "a number": (lambda n, y, x: n.b(y) * float(y.sum()), False),
    "no rule": (lambda n, y, x: n.b(y) + n.d(torch.cumsum(y, -1)), False),
    "read by a weight": (lambda n, y, x: n.b(y) + F.linear(y, n.b.weight), False),
    "further tokens": (lambda n, y, x: n.b(torch.cat([y, torch.ones(2, 1, 8)], 1)), False),
    "further tokens, averaged": (lambda n, y, x: n.b(torch.cat([y, torch.ones(2, 1, 8)], 1).mean(1)), False),
    "padded with ones": (lambda n, y, x: n.b(F.pad(y, (0, 0, 1, 1), value=1.0)), False),
    "masked to one": (lambda n, y, x: n.b(y.masked_fill(torch.ones(5, 1, dtype=torch.bool), 1.0)), False),
    "masked to zero": (lambda n, y, x: n.b(y.masked_fill(torch.ones(5, 1, dtype=torch.bool), 0.0)), True),
    "copied away": (lambda n, y, x: (n.b(y), torch.zeros(2, 5, 8)[:, :].copy_(y))[0], False),
    "called twice": (lambda n, y, x: n.b(y) + n.a(x), False),
    "a call reads something else": (lambda n, y, x: n.b(y) + n.b(y.flip(1) + 1), False),
}


@pytest.mark.parametrize("name", CLOSED)
def test_closed_edges(name):
    forward, expected = CLOSED[name]
    graph = graph_of(
        lambda n, x: forward(n, n.a(x), x),
        a=nn.Linear(4, 8), b=nn.Linear(8, 8), c=nn.Linear(4, 8), d=nn.Linear(8, 8),
    )  # fmt: skip
    assert (("a", "b") in closed(graph)) is expected, graph


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def test_values_that_are_also_returned():
    def forward(n, x):
        q, k, v = n.qkv(x).chunk(3, -1)
        return n.o(attend(q, k, v)), v

    layers = {"qkv": nn.Linear(4, 24), "o": nn.Linear(8, 4)}
    assert closed(graph_of(forward, **layers)) == set()
    assert closed(graph_of(lambda n, x: forward(n, x)[0], **layers)) == {("qkv", "o")}


def test_channels_are_told_apart():
    """A layer reads half of another's channels; the other half goes elsewhere."""

    def forward(n, x):
        first, second = n.a(x).chunk(2, -1)
        return n.b(first), second.relu()

    layers = {"a": nn.Linear(4, 8), "b": nn.Linear(4, 2)}
    assert closed(graph_of(forward, **layers)) == {("a", "b")}
    assert closed(graph_of(lambda n, x: (n.b((y := n.a(x))[..., :4]), y[..., 3:]), **layers)) == set()


def test_two_anteriors_act_at_their_outputs_only_together():
    layers = {"a": nn.Linear(4, 3), "b": nn.Linear(4, 2), "c": nn.Linear(5, 1)}
    graph = graph_of(lambda n, x: n.c(torch.cat([n.a(x), n.b(x)], -1)), **layers)
    assert place(graph) == {("a", "c"): "output", ("b", "c"): "output"}
    graph = graph_of(lambda n, x: n.c(torch.cat([n.a(x), n.b(x).relu()], -1)), **layers)
    assert closed(graph) == {("a", "c")}
    assert place(graph) == {("a", "c"): "input", ("b", "c"): "input"}


# ------------------------------------------------------------------ overwritten outputs

IN_PLACE = {
    "nothing": (lambda n, y: n.b(y.relu()), False),
    "activation": (lambda n, y: n.b(F.relu(y, inplace=True)), True),
    "sum": (lambda n, y: n.b(y.add_(1)), True),
    "view": (lambda n, y: n.b((y.view(10, 8)[:3].div_(2), y)[1]), True),
    "view that outlives the output": (lambda n, y: n.b(y.relu()) + n.b(y.flatten(0, 1).mul_(2)).sum(), True),
    "copy": (lambda n, y: n.b(y.clone().add_(1)), False),
    "written out": (lambda n, y: n.b(torch.exp(n.b(y), out=y)), True),
    "read by what is written": (lambda n, y: n.b(torch.zeros(2, 5, 8).add_(y)), False),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_overwritten_outputs(name):
    forward, expected = IN_PLACE[name]
    graph = graph_of(lambda n, x: forward(n, n.a(x)), a=nn.Linear(4, 8), b=nn.Linear(8, 8))
    a, b = graph.layers
    assert a.overwritten is expected
    assert not b.overwritten
    assert "overwritten" not in str(a)


@pytest.mark.parametrize("after", [nn.ReLU, nn.Dropout, nn.Dropout2d])
@pytest.mark.parametrize("inplace", [False, True])
def test_modules_in_place_after_a_convolution(after, inplace):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), after(inplace=inplace), nn.Conv2d(8, 4, 3))
    graph = trace(net, torch.randn(1, 3, 8, 8))
    assert [layer.overwritten for layer in graph.layers] == [inplace, False]
