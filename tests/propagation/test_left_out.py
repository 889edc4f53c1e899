"""Layers that default targets leave out, and layers whose weights functions read."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from tests.golden.models import GROUPED, TEXT
from tests.propagation.nets import Net, graph_of, pairs
from torch import Tensor, nn
from torch.nn import functional as F

from san_peft import PropagationGraph, trace
from san_peft.propagation import Layer


def left_out(graph: PropagationGraph) -> dict[str, str]:
    return {layer.fqn: layer.left_out for layer in graph.layers if layer.left_out}


class Pair(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = super().forward(x)
        return y.softmax(-1), y


class Named(nn.Linear):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": super().forward(x)}


@pytest.mark.parametrize(("layer", "get"), [(Pair, lambda y: y[0]), (Named, lambda y: y["out"])])
def test_a_layer_that_returns_no_tensor(layer, get):
    graph = graph_of(lambda n, x: n.b(get(n.a(x))), a=layer(4, 8), b=nn.Linear(8, 2))
    assert list(left_out(graph)) == ["a"]
    assert {Pair: "tuple", Named: "dict"}[layer] in left_out(graph)["a"]
    assert not graph.edges
    assert [(barrier.operation, barrier.layer) for barrier in graph.barriers] == [("a", "b")]


def test_a_router_that_returns_a_tuple_weighs_tokens():
    """What it weighs keeps its channels, since a token has one weight."""

    def forward(n, x):
        return n.c(n.a(x) * n.router(x)[0][..., :1])

    graph = graph_of(forward, a=nn.Linear(4, 8), router=Pair(4, 2), c=nn.Linear(8, 2))
    assert pairs(graph) == [("a", "c", "exact")]
    assert list(left_out(graph)) == ["router"]


UNUSED = {
    "not returned": (lambda n, x: (n.b(x), n.a(x))[1], {"b"}),
    "behind it": (lambda n, x: (n.c(n.b(x)), n.a(x))[1], {"b", "c"}),
    "counted": (lambda n, x: n.a(x)[..., : max(1, int(n.b(x).argmax()))], {"b"}),
    "through integers": (lambda n, x: n.a(x) + n.b(x).round().int(), {"b"}),
    "through numpy": (lambda n, x: n.a(x) + torch.from_numpy(n.b(x).numpy()), {"b"}),
    "through scores": (lambda n, x: n.a(x) * n.b(x).softmax(-1), set()),
    "through a statistic": (lambda n, x: n.a(x) * n.b(x).std(), set()),
    "through a buffer": (lambda n, x: torch.zeros(2, 5, 8).index_copy_(1, torch.arange(5), n.b(x)) + n.a(x), set()),
    "through another layer": (lambda n, x: n.d(n.b(x)) + n.a(x), set()),
    "through a tuple": (lambda n, x: {"features": [n.a(x), n.b(x)]}, set()),
    "nothing that floats": (lambda n, x: (n.a(x) + n.b(x)).argmax(-1), set()),
    "the shape alone": (lambda n, x: n.a(x) + torch.zeros_like(n.b(x)), {"b"}),
}


@pytest.mark.parametrize("name", UNUSED)
def test_layers_on_which_no_output_depends(name):
    forward, expected = UNUSED[name]
    graph = graph_of(forward, a=nn.Linear(4, 8), b=nn.Linear(4, 8), c=nn.Linear(8, 8), d=nn.Linear(8, 8))
    assert set(left_out(graph)) == expected
    assert all("no output" in reason for reason in left_out(graph).values())


def test_the_pooler_of_bert():
    """It is left out where features are what a task reads, and it stays where a classifier reads it."""
    config = tf.BertConfig(**TEXT)
    assert list(left_out(trace(tf.BertModel(config)))) == ["pooler.dense"]
    assert not left_out(trace(tf.BertForSequenceClassification(config)))
    assert not left_out(trace(tf.BertModel(config, add_pooling_layer=False)))


def test_the_router_of_llama_4():
    config = tf.Llama4TextConfig(
        **{**TEXT, **GROUPED}, num_local_experts=4, num_experts_per_tok=1, head_dim=8, intermediate_size_mlp=32,
        pad_token_id=0,
    )  # fmt: skip
    graph = trace(tf.Llama4ForCausalLM(config))
    assert set(left_out(graph)) == {"model.layers.0.feed_forward.router", "model.layers.1.feed_forward.router"}
    assert not any("report" in barrier.reason for barrier in graph.barriers)


def test_the_router_of_phi_moe():
    config = tf.PhimoeConfig(**{**TEXT, **GROUPED}, num_local_experts=4, pad_token_id=0)
    graph = trace(tf.PhimoeForCausalLM(config))
    assert {name.rpartition(".")[2] for name in left_out(graph)} == {"router"}


def test_written_and_read_back():
    graph = graph_of(lambda n, x: (n.b(x), n.a(x))[1], a=nn.Linear(4, 8), b=nn.Linear(4, 8))
    assert PropagationGraph.from_json(graph.to_json()) == graph
    assert "left out: b: no output that a task uses depends on it" in str(graph)
    old = {"fqn": "b", "type": "Linear", "in": 4, "out": 8}
    assert Layer.from_json(old) == Layer("b", "Linear", 4, 8)
    assert "left_out" not in Layer("b", "Linear", 4, 8).to_json()


def test_the_tree_names_what_is_left_out():
    from san_bench.graph.command import to_text

    graph = graph_of(lambda n, x: (n.b(x), n.a(x))[1], a=nn.Linear(4, 8), b=nn.Linear(4, 8))
    assert "b  Linear 4 -> 8  left out: no output that a task uses depends on it" in to_text(graph, "net")


# ------------------------------------------------------------------ weights that functions read


def test_a_parameter_that_a_function_reads():
    net = Net(lambda n, x: n.b(F.linear(n.a(x), n.weight)), a=nn.Linear(4, 8), b=nn.Linear(6, 2))
    net.weight = nn.Parameter(torch.rand(6, 8))
    graph = trace(net, torch.randn(2, 5, 4))
    assert not graph.edges
    assert {(barrier.layer, barrier.reason) for barrier in graph.barriers} == {
        ("b", "it multiplies channels with the parameter weight outside of a layer"),
        ("weight", "its weight is read by a function, past SAN"),
    }


def test_a_layer_whose_weight_is_read_as_well():
    graph = graph_of(lambda n, x: n.b(n.a(x)) + F.linear(n.a(x), n.b.weight), a=nn.Linear(4, 8), b=nn.Linear(8, 2))
    assert ("b", "its weight is read by a function, past SAN") in {(b.layer, b.reason) for b in graph.barriers}


@pytest.mark.parametrize("first", [False, True])
def test_encoder_layers_of_torch_are_explained(first):
    net = nn.Sequential(
        nn.Linear(4, 8),
        nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=first), 2, enable_nested_tensor=False
        ),
        nn.Linear(8, 2),
    )
    graph = trace(net, torch.randn(2, 5, 4))
    blocks = [f"1.layers.{number}" for number in range(2)]
    for block in blocks:
        assert (f"{block}.linear1", f"{block}.linear2", "activation") in pairs(graph)
        assert (f"{block}.self_attn", f"{block}.self_attn", "exact") in pairs(graph)
        assert (f"{block}.self_attn", f"{block}.linear1", "residual") in pairs(graph)
    assert not graph.barriers
    assert ("1.layers.1.linear2", "2", "residual") in pairs(graph)


def test_a_head_behind_a_bias_of_the_model():
    """BART adds `final_logits_bias` to what its head writes."""

    class Biased(Net):
        def __init__(self) -> None:
            super().__init__(lambda n, x: n.head(n.a(x)) + n.beside, a=nn.Linear(4, 8), head=nn.Linear(8, 3))
            self.register_buffer("beside", torch.arange(3.0))

    assert trace(Biased(), torch.randn(2, 5, 4)).heads == ("head",)


def test_a_layer_whose_weight_another_module_holds():
    layers = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "head": nn.Linear(4, 2)}
    layers["b"].weight = layers["a"].weight
    found = left_out(graph_of(lambda n, x: n.head(n.b(n.a(x).relu())), **layers))
    assert set(found) == {"a", "b"}
    assert "tied to b" in found["a"]
    assert "tied to a" in found["b"]
