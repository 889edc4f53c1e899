"""Channel maps, graphs as values, schemes and ablations."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from san_peft.errors import GraphError
from san_peft.propagation import (
    ABLATIONS,
    SCHEMES,
    Barrier,
    ChannelMap,
    Edge,
    Layer,
    PropagationGraph,
    ablate,
)


def vit(blocks: int = 3, width: int = 4) -> PropagationGraph:
    same, stream = ChannelMap.identity(width), ("residual", "layer_norm")
    value = ChannelMap("slice", width, 3 * width, start=2 * width)
    edges, layers, writer = [], [Layer("stem", "Conv2d", 3, width)], "stem"
    for i in range(blocks):
        edges += [
            Edge(writer, f"{i}.qkv", same, stream),
            Edge(f"{i}.qkv", f"{i}.proj", value, ("attention",)),
            Edge(f"{i}.proj", f"{i}.fc1", same, stream),
            Edge(f"{i}.fc1", f"{i}.fc2", ChannelMap.identity(4 * width), ("gelu",)),
        ]
        layers += [
            Layer(f"{i}.qkv", "Linear", width, 3 * width),
            Layer(f"{i}.proj", "Linear", width, width),
            Layer(f"{i}.fc1", "Linear", width, 4 * width),
            Layer(f"{i}.fc2", "Linear", 4 * width, width),
        ]
        writer = f"{i}.fc2"
    edges.append(Edge(writer, "head", same, ("layer_norm",)))
    layers.append(Layer("head", "Linear", width, 10))
    return PropagationGraph(edges, [Barrier("linear", "head", "for the test")], layers, ["head"])


@given(st.lists(st.integers(-1, 11), min_size=1, max_size=40))
def test_from_index_keeps_the_index(index):
    channels = ChannelMap.from_index(index, 12)
    assert channels.index.tolist() == index
    assert ChannelMap.from_json(json.loads(json.dumps(channels.to_json()))) == channels


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_regular_maps_are_compact(blocks, block, times):
    source = blocks * block
    every = torch.arange(source)
    repeated = every.view(blocks, 1, block).expand(-1, times, -1).flatten()
    for index in (every, every.repeat(times), repeated):
        channels = ChannelMap.from_index(index, source)
        assert torch.equal(channels.index, index)
        assert channels.kind != "explicit"


def test_kind_is_the_strongest_on_the_way():
    same = ChannelMap.identity(2)
    kinds = [
        Edge("a", "b", same, via).kind
        for via in ((), ("attention",), ("relu",), ("gelu", "layer_norm"), ("layer_norm", "residual"), ("offset",))
    ]
    assert kinds == ["exact", "exact", "activation", "norm", "residual", "residual"]


def test_json_both_ways_and_equality():
    graph = vit()
    assert PropagationGraph.from_json(graph.to_json()) == graph
    assert PropagationGraph.from_json(graph.to_dict()) == graph
    assert hash(graph) == hash(vit())
    assert "0.fc1 -> 0.fc2 [identity] (through gelu)" in str(graph)


@pytest.mark.parametrize(
    "change",
    [
        {"edges": [{"anterior": "a"}]},
        {"edges": 3},
        {"edges": [], "surprise": 1},
        {"edges": [], "format": 99},
        {"edges": [{"anterior": "a", "posterior": "a", "channels": {"kind": "identity", "size": 2, "source_size": 2}}]},
        {"edges": [{"anterior": "a", "posterior": "b", "channels": {"kind": "identity", "size": 2, "source_size": 3}}]},
        {"edges": [{"anterior": "a", "posterior": "b", "channels": {"kind": "what", "size": 2, "source_size": 3}}]},
    ],
)
def test_malformed_json_is_named(change):
    with pytest.raises(GraphError):
        PropagationGraph.from_json(change)
    with pytest.raises(GraphError, match="JSON"):
        PropagationGraph.from_json("{")


def test_lengths_and_names_are_checked():
    edge = Edge("a", "b", ChannelMap.identity(2))
    with pytest.raises(GraphError, match="has 3"):
        PropagationGraph([edge], layers=[Layer("a", "Linear", 1, 3), Layer("b", "Linear", 2, 1)])
    with pytest.raises(GraphError, match="names b"):
        PropagationGraph([edge], layers=[Layer("a", "Linear", 1, 2)])
    with pytest.raises(GraphError, match="a -> b"):
        PropagationGraph([edge, edge])


def test_schemes():
    graph = vit()
    sizes = {scheme: len(graph.select(scheme)) for scheme in SCHEMES}
    assert sizes == {"all": 12, "exact": 3, "feedforward": 3, "reference": 9, "none": 0}
    with pytest.raises(GraphError, match="everything"):
        graph.select("everything")


def test_reference_scheme_follows_the_reference_code():
    graph = vit(2)
    edges = {(edge.anterior, edge.posterior) for edge in graph.select("reference")}
    assert edges == {
        ("stem", "0.qkv"),
        ("stem", "1.qkv"),
        ("0.proj", "0.fc1"),
        ("0.fc1", "0.fc2"),
        ("1.proj", "1.fc1"),
        ("1.fc1", "1.fc2"),
    }
    with pytest.raises(GraphError, match="patch embedding"):
        graph.with_edges(edge for edge in graph if edge.anterior != "stem").select("reference")


def test_neighbours():
    graph = vit(1)
    assert [edge.posterior for edge in graph.outgoing("0.proj")] == ["0.fc1"]
    assert [edge.anterior for edge in graph.incoming("0.qkv")] == ["stem"]


@pytest.mark.parametrize("kind", ABLATIONS)
def test_ablations_fit_and_are_deterministic(kind):
    graph = vit()
    broken = ablate(graph, kind, seed=1)
    assert len(broken)
    assert broken != graph
    assert broken == ablate(graph, kind, seed=1)
    with pytest.raises(GraphError, match="sideways"):
        ablate(graph, "sideways")


def test_ablations_do_what_they_say():
    graph = vit()
    assert ("0.fc2", "0.fc1") in {(e.anterior, e.posterior) for e in ablate(graph, "reversed")}
    assert ("stem", "0.proj") in {(e.anterior, e.posterior) for e in ablate(graph, "skip-one")}
    permuted = ablate(graph, "permuted")
    assert sorted(e.anterior for e in permuted) == sorted(e.anterior for e in graph)
    for old, new in zip(graph, ablate(graph, "shuffled"), strict=True):
        assert sorted(old.channels.index.tolist()) == sorted(new.channels.index.tolist())
