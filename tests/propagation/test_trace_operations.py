"""Operations that move, mix or sort entries: maps checked by scaling a layer and taking the scale back."""

from __future__ import annotations

import pytest
import torch
from tests.propagation.nets import Net, assert_exact, graph_of, only_edge, pairs
from torch import Tensor, nn
from torch.nn import functional as F

from san_peft import trace

TOKENS = {
    "cumsum": lambda y: y.cumsum(1),
    "fft": lambda y: torch.fft.fft(y, dim=1).real,
    "rfft and back": lambda y: torch.fft.irfft(torch.fft.rfft(y, dim=1) * torch.rand(3, 1), n=5, dim=1),
    "complex numbers of one channel": lambda y: torch.view_as_real(torch.complex(y, y * 0.5)).sum(-1),
    "gathered": lambda y: y.gather(1, torch.randint(5, (2, 3, 8))),
    "mixed by a constant": lambda y: torch.einsum("st,btc->bsc", torch.ones(7, 5) / 5, y),
    "strided": lambda y: y.contiguous().as_strided((2, 2, 8), (40, 16, 1)),
    "overlapping": lambda y: y.contiguous().as_strided((2, 4, 2, 8), (40, 8, 8, 1)).mean(2),
    "unfolded": lambda y: y.unfold(1, 2, 1).mean(-1),
    "triangle": lambda y: y.mT.tril(4).mT,
    "chosen": lambda y: torch.where(torch.arange(5)[:, None] > 2, y, 0.0),
    "one gate for each token": lambda y: y * y.detach().new_tensor(2.0),
    "masked_select": lambda y: y.masked_select(torch.ones(2, 5, 8, dtype=torch.bool)).view(2, 5, 8),
    "embedding of what was written": lambda y: F.embedding(torch.tensor([[0, 2], [1, 1]]), y[0]),
    "padded by reflection": lambda y: F.pad(y.mT, (1, 1), mode="reflect").mT,
    "interpolated": lambda y: F.interpolate(y.mT, size=9, mode="linear").mT,
}
SORTED = {
    "sort": lambda y: y.sort(1).values,
    "topk": lambda y: y.topk(2, 1).values,
    "cummax": lambda y: y.cummax(1).values,
    "maximum": lambda y: torch.maximum(y, torch.zeros(8)),
    "relu by hand": lambda y: torch.where(y > 0, y, torch.zeros_like(y)),
    "relu by a mask": lambda y: y.masked_fill(y < 0, 0.0),
    "relu by a product": lambda y: y * (y > 0),
}
IMAGES = {
    "unfold": lambda y: F.fold(F.unfold(y, 2, stride=2), (6, 6), 2, stride=2),
    "unfold with overlap": lambda y: F.fold(F.unfold(y, 3, padding=1), (6, 6), 3, padding=1),
    "fft of pixels": lambda y: torch.fft.irfft2(torch.fft.rfft2(y) * torch.rand(8, 6, 4), s=(6, 6)),
    "grid_sample": lambda y: F.grid_sample(y, torch.rand(1, 4, 4, 2) * 2 - 1, align_corners=False),
    "blur": lambda y: F.conv2d(y, torch.rand(8, 1, 3, 3), groups=8, padding=1),
    "interpolated": lambda y: F.interpolate(y, size=9, mode="bicubic", antialias=True),
    "replicated": lambda y: F.pad(y, (1, 1, 2, 2), mode="replicate"),
    "patches and back": lambda y: F.pixel_shuffle(F.pixel_unshuffle(y, 2), 2),
}


@pytest.mark.parametrize("name", TOKENS)
def test_along_tokens(name):
    net = Net(lambda n, x: n.b(TOKENS[name](n.a(x))), a=nn.Linear(4, 8), b=nn.Linear(8, 3))
    torch.manual_seed(1)
    edge = only_edge(trace(net, torch.randn(2, 5, 4)))
    assert (edge.kind, edge.channels.kind) == ("exact", "identity")
    fixed = Net(lambda n, x: (torch.manual_seed(2), net.run(n, x))[1], a=net.a, b=net.b)
    assert_exact(fixed, torch.randn(2, 5, 4))


@pytest.mark.parametrize("name", SORTED)
def test_sorted_and_cut_off_along_tokens(name):
    """A positive scale commutes; that it may turn negative makes an activation of it."""
    net = Net(lambda n, x: n.b(SORTED[name](n.a(x))), a=nn.Linear(4, 8), b=nn.Linear(8, 3))
    x = torch.randn(2, 5, 4)
    edge = only_edge(trace(net, x))
    assert (edge.kind, edge.channels.kind) == ("activation", "identity")
    assert_exact(net, x, [edge])


@pytest.mark.parametrize("name", IMAGES)
def test_images(name):
    net = Net(lambda n, x: n.b(IMAGES[name](n.a(x))), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 2, 1))
    edge = only_edge(trace(net, torch.randn(1, 3, 6, 6)))
    assert (edge.kind, edge.channels.kind) == ("exact", "identity")
    fixed = Net(lambda n, x: (torch.manual_seed(2), net.run(n, x))[1], a=net.a, b=net.b)
    assert_exact(fixed, torch.randn(1, 3, 6, 6))


def test_unfolded_patches_are_channels():
    """As TNT has it: nine pixels of every channel, in torch's own order, and none where the padding is."""
    net = Net(lambda n, x: n.b(F.unfold(n.a(x), 3, stride=2, padding=1).mT), a=nn.Conv2d(3, 4, 1), b=nn.Linear(36, 2))
    x = torch.randn(1, 3, 6, 6)
    edge = only_edge(trace(net, x))
    assert edge.channels.index.tolist() == [channel for channel in range(4) for _ in range(9)]
    assert_exact(net, x)


def test_gated_linear_unit():
    net = Net(lambda n, x: n.b(F.glu(n.a(x), -1)), a=nn.Linear(4, 16), b=nn.Linear(8, 2))
    edge = only_edge(trace(net, torch.randn(2, 5, 4)))
    assert (edge.kind, str(edge.channels)) == ("exact", "slice 0:8 of 16")
    assert_exact(net, torch.randn(2, 5, 4))


@pytest.mark.parametrize("combine", [lambda n, x: n.a(x) * n.b(x).sigmoid(), lambda n, x: n.a(x) / n.b(x).exp()])
def test_a_gate_that_multiplies_or_divides(combine):
    net = Net(lambda n, x: n.c(combine(n, x)), a=nn.Linear(4, 8), b=nn.Linear(4, 8), c=nn.Linear(8, 2))
    assert pairs(trace(net, torch.randn(2, 5, 4))) == [("a", "c", "exact")]
    assert_exact(net, torch.randn(2, 5, 4))


def test_a_gate_of_one_number_for_each_token():
    net = Net(lambda n, x: n.c(n.a(x) * n.b(x)), a=nn.Linear(4, 8), b=nn.Linear(4, 1), c=nn.Linear(8, 2))
    assert pairs(trace(net, torch.randn(2, 5, 4))) == [("a", "c", "exact")]
    assert_exact(net, torch.randn(2, 5, 4))


def test_depthwise_products_that_make_more_channels():
    net = Net(
        lambda n, x: n.b(F.conv1d(n.a(x).mT, n.weight, n.bias, groups=8, padding=2).mT),
        a=nn.Linear(4, 8),
        b=nn.Linear(16, 2),
    )
    net.weight, net.bias = nn.Parameter(torch.rand(16, 1, 3)), None
    edge = only_edge(trace(net, torch.randn(2, 5, 4)))
    assert (edge.kind, edge.channels.kind, edge.channels.times) == ("exact", "repeat", 2)
    assert_exact(net, torch.randn(2, 5, 4))


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        (lambda y: torch.fft.fft(y, dim=-1).real, "_fft_r2c"),
        (lambda y: torch.fft.fft2(y).real, "_fft_c2c"),
        (lambda y: y.cumsum(-1), "cumsum"),
        (lambda y: y.sort(-1).values, "sort"),
        (lambda y: torch.view_as_complex(y.view(2, 5, 4, 2)).abs().repeat(1, 1, 2), "view_as_complex"),
        (lambda y: F.fold(F.unfold(y[:, None], 3, padding=1), (8, 5), 3, padding=1).reshape(2, 5, 8), "col2im"),
        (lambda y: y.softmax(-1), "softmax"),
        (lambda y: y.view(2, 5, 4, 2).sum(-1).repeat(1, 1, 2), "sum"),
        (lambda y: y.view(2, 5, 4, 2).amax(-1).repeat(1, 1, 2), "amax"),
        (lambda y: torch.from_numpy(y.numpy() * 2), "input"),
        (lambda y: torch.tensor(y.tolist()), "input"),
        (lambda y: (y * 127).to(torch.int8).to(y.dtype) / 127, "_to_copy"),
        (lambda y: F.one_hot(y.argmax(-1), 8).float(), "_to_copy"),
        (lambda y: F.embedding(y.argmax(-1), torch.rand(8, 8)), "embedding"),
        (lambda y: torch.cdist(y, torch.rand(8, 8)), "_cdist_forward"),
        (lambda y: F.conv1d(y.mT, torch.rand(8, 8, 1)).mT, "convolution"),
        (lambda y: y + y.softmax(-1), "add"),
        (lambda y: y.cumprod(1), "cumprod"),
        (lambda y: y @ torch.rand(8, 8), "mm"),
    ],
)
def test_what_cannot_be_followed_is_a_barrier(operation, name):
    graph = graph_of(lambda n, x: n.b(operation(n.a(x))), a=nn.Linear(4, 8), b=nn.Linear(8, 2))
    assert not graph.edges
    assert [(barrier.operation, barrier.layer) for barrier in graph.barriers] == [(name, "b")]
    assert "report" not in graph.barriers[0].reason


def test_constants_and_inputs_are_no_barriers():
    """Nothing that no layer reaches is lost, wherever it is made."""

    def forward(n, x):
        y = n.a(x)
        mask = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])[:, None]
        return n.b(y) + n.c(x) + n.d(torch.arange(4.0)) + n.c(mask.expand(5, 4) * 0 + x.round().int().float())

    graph = graph_of(
        forward, a=nn.Linear(4, 8), b=nn.Linear(8, 8), c=nn.Linear(4, 8), d=nn.Linear(4, 8), e=nn.Linear(8, 2)
    )
    assert pairs(graph) == [("a", "b", "exact")]


def test_a_kernel_of_ones_own():
    """An operation that torch does not know is named, whatever it is called."""
    library = torch.library.Library("san_peft_test", "DEF")
    library.define("relu(Tensor x) -> Tensor")
    library.impl("relu", lambda x: x.flip(-1).clone(), "CompositeExplicitAutograd")
    try:
        graph = graph_of(lambda n, x: n.b(torch.ops.san_peft_test.relu(n.a(x))), a=nn.Linear(4, 8), b=nn.Linear(8, 2))
    finally:
        library._destroy()
    assert not graph.edges
    assert [barrier.operation for barrier in graph.barriers] == ["san_peft_test::relu"]


def test_memory_that_an_extension_fills():
    """No operation is seen to write it, as where a kernel gets pointers."""

    def forward(n, x):
        y = n.a(x)
        out = torch.empty_like(y)
        out.numpy()[:] = y.numpy()
        return n.b(out * 2)

    graph = graph_of(forward, a=nn.Linear(4, 8), b=nn.Linear(8, 2))
    assert not graph.edges
    assert "no operation was seen to write" in graph.barriers[0].reason


def test_a_rule_that_fails_is_a_barrier(monkeypatch):
    from san_peft.propagation.operations import Operations

    monkeypatch.setattr(Operations, "_softmax", lambda *_: 1 / 0)
    graph = graph_of(lambda n, x: n.b(n.a(x).softmax(-1)), a=nn.Linear(4, 8), b=nn.Linear(8, 2))
    assert "ZeroDivisionError" in graph.barriers[0].reason


class Picky(nn.Linear):
    """Raises on what it does not like."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] > 4:
            raise ValueError("too wide")
        return super().forward(x)


def test_an_exception_that_the_model_catches():
    def forward(n, x):
        y = n.a(x)
        try:
            y = n.b(y)
        except ValueError:
            y = n.c(y)
        return n.d(y)

    graph = graph_of(forward, a=nn.Linear(4, 8), b=Picky(4, 8), c=nn.Linear(8, 8), d=nn.Linear(8, 2))
    assert ("a", "c", "exact") in pairs(graph)
    assert ("c", "d", "exact") in pairs(graph)


def test_flexible_attention():
    from torch.nn.attention.flex_attention import flex_attention

    def forward(n, x):
        q, k, v = (layer(x).view(2, 5, 2, 4).transpose(1, 2) for layer in (n.q, n.k, n.v))
        return n.o(flex_attention(q, k, v).transpose(1, 2).reshape(2, 5, 8))

    net = Net(forward, **{name: nn.Linear(4, 8) for name in "qkv"}, o=nn.Linear(8, 4))
    graph = trace(net, torch.randn(2, 5, 4))
    assert pairs(graph) == [("v", "o", "exact")]
    assert not graph.barriers
