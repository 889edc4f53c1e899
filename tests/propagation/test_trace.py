"""Tracing: what it finds in small nets, and that it leaves a model and the random state as they were."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import transformers
from tests.golden.models import MODELS
from torch import Tensor, nn
from torch.nn import functional as F

from san_peft import PropagationGraph, TraceError, trace


class Net(nn.Module):
    """A net whose forward is given as a function of itself and its input."""

    def __init__(self, forward, **layers: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def graph_of(forward, x: Tensor | None = None, **layers: nn.Module) -> PropagationGraph:
    return trace(Net(forward, **layers), torch.randn(2, 5, 4) if x is None else x)


def only_edge(graph: PropagationGraph):
    assert len(graph.edges) == 1, graph
    assert not graph.barriers, graph
    return graph.edges[0]


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


def test_writing_in_place_into_a_view_loses_the_other_views():
    def forward(n, x):
        y = n.a(x)
        half = y[..., :4]
        half.add_(n.b(x))
        return n.c(y)

    graph = graph_of(forward, a=nn.Linear(4, 8), b=nn.Linear(4, 4), c=nn.Linear(8, 2))
    assert not graph.incoming("c")
    assert "in place" in graph.barriers[0].reason


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


# ------------------------------------------------------------------ exact means exact


@pytest.mark.parametrize(
    "name", ["timm-vit", "vit", "bert", "gpt2", "gpt-neox", "llama-grouped", "gemma", "phi3", "t5", "timm-swin"]
)
def test_minus_one_leaves_the_function_of_exact_edges_unchanged(name):
    """A law: scaling rows of the anterior by g and columns of the posterior by 1/g changes nothing on an exact edge.

    It holds where nothing else reads those rows, as in these models (in ConvNeXt a shortcut does).
    """
    from san_peft.functional import fold, propagate

    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    graph = trace(model)
    exact = graph.select("exact").edges
    assert exact
    before = outputs(model)
    for edge in exact:
        scale = torch.rand(edge.channels.source_size, dtype=torch.float64) + 0.5
        reached = torch.zeros(edge.channels.source_size, dtype=torch.bool)
        reached[edge.channels.index] = True
        scale = torch.where(reached, scale, 1.0)  # queries and keys of a fused layer act elsewhere
        anterior, posterior = (model.get_submodule(fqn) for fqn in (edge.anterior, edge.posterior))
        set_weight(anterior, *fold(anterior.weight, anterior.bias, scale, **layout(anterior)))
        inverse = propagate(scale, edge.channels.index, exponent=-1.0)
        set_weight(posterior, *fold(posterior.weight, posterior.bias, None, inverse, **layout(posterior)))
    torch.testing.assert_close(outputs(model), before, rtol=1e-9, atol=1e-9)


def layout(layer: nn.Module) -> dict[str, object]:
    return {"groups": getattr(layer, "groups", 1), "transposed": type(layer).__name__ == "Conv1D"}


def set_weight(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    layer.weight.data = weight
    if bias is not None:
        layer.bias.data = bias


@torch.no_grad()
def outputs(model: nn.Module) -> list[Tensor]:
    from san_peft.propagation.inputs import derive_inputs

    inputs = derive_inputs(model)
    noise = torch.Generator().manual_seed(1)

    def filled(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=noise, dtype=x.dtype) if x.is_floating_point() else x

    if isinstance(inputs, dict):
        out = model(**{k: filled(v) if isinstance(v, Tensor) else v for k, v in inputs.items()})
        return [v for v in out.values() if isinstance(v, Tensor)]
    return [model(*map(filled, inputs))]


# ------------------------------------------------------------------ leaves no mark


def snapshot(model: nn.Module) -> dict[str, object]:
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "training": [m.training for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "grads": [p.grad for p in model.parameters()],
        "buffers": [id(b) for b in model.buffers()],
        "random": torch.get_rng_state(),
        "fastpath": torch.backends.mha.get_fastpath_enabled(),
    }


def assert_unchanged(before, after):
    for key in ("training", "hooks", "grads", "buffers", "fastpath"):
        assert before[key] == after[key], key
    assert torch.equal(before["random"], after["random"])
    assert before["state"].keys() == after["state"].keys()
    assert all(torch.equal(value, after["state"][name]) for name, value in before["state"].items())


class Stateful(nn.Module):
    """Counts its calls in buffers, draws random numbers, and may raise at the end."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.fails = fails
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("last", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.norm(self.a(x)) + torch.randn(4)
        self.last = y.mean(0)
        if self.fails:
            raise ValueError("on purpose")
        return self.b(y)


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_it_was(fails):
    model = Stateful(fails)
    model.norm.eval()  # a mixture of modes has to come back
    before = snapshot(model)
    if fails:
        with pytest.raises(TraceError, match="on purpose"):
            trace(model, torch.randn(3, 4))
    else:
        before["random"] = torch.get_rng_state()
        x = torch.ones(3, 4)
        assert trace(model, x).edges
    after = snapshot(model)
    if fails:  # the input above was drawn in between
        before["random"] = after["random"]
    assert_unchanged(before, after)


def test_a_whole_model_is_as_it_was():
    model = MODELS["timm-vit"]().train()
    before = snapshot(model)
    trace(model)
    assert_unchanged(before, snapshot(model))


def test_tracing_twice_gives_the_same():
    model = MODELS["swin"]()
    assert trace(model) == trace(model)


def test_half_precision_and_training_mode_give_the_same():
    model = MODELS["vit"]()
    assert trace(model.train()) == trace(model.eval()) == trace(model.bfloat16())


@pytest.mark.gpu
def test_on_a_gpu():
    model = MODELS["vit"]()
    assert trace(model) == trace(model.cuda())


# ------------------------------------------------------------------ inputs and devices


def test_inputs_as_tensor_tuple_or_dict():
    net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    x = torch.randn(1, 4)
    assert trace(net, x) == trace(net, (x,)) == trace(net, {"input": x})


def test_inputs_that_cannot_be_derived():
    with pytest.raises(TraceError, match=r"cannot be derived.*trace\(model, example_inputs\).*propagation='none'"):
        trace(nn.Sequential(nn.Linear(4, 8)))


def test_inputs_that_do_not_fit():
    with pytest.raises(TraceError, match=r"Sequential raised RuntimeError.*Pass inputs that it accepts"):
        trace(nn.Sequential(nn.Linear(4, 8)), torch.randn(1, 5))


@pytest.mark.parametrize("name", [name for name in MODELS if name != "mixtral"])
def test_meta_device_gives_the_same_graph(name):
    with torch.device("meta"):
        empty = MODELS[name]()
    assert trace(empty) == trace(MODELS[name]())
    assert all(p.is_meta for p in empty.parameters())


def test_mixtral_on_meta_says_that_routing_needs_numbers():
    with torch.device("meta"):
        empty = MODELS["mixtral"]()
    assert {barrier.operation for barrier in trace(empty).barriers} == {"index"}


@pytest.mark.slow
def test_llama_7b_on_meta_is_small():
    """In a process of its own, so that memory is this test's; time is told, not asserted."""
    program = """
import resource, time, torch, transformers
from san_peft import trace
with torch.device("meta"):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig())
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
graph = trace(model)
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
print(f"{len(graph.edges)} edges, {time.perf_counter() - start:.1f} s, {grown:.2f} GiB")
assert len(graph.edges) == 32 * 7 - 2 and not graph.barriers
assert grown < 1, grown
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    print(run.stdout)


def test_attention_implementation_does_not_matter():
    config = transformers.LlamaConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        vocab_size=50,
    )
    graphs = [
        trace(transformers.AutoModelForCausalLM.from_config(config, attn_implementation=name))
        for name in ("eager", "sdpa")
    ]
    assert graphs[0] == graphs[1]
