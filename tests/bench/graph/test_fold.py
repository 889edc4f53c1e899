"""Folding: what repeats becomes one block, what differs does not, and no edge is lost."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import transformers
from tests.golden.models import GROUPED, MODELS, TEXT

from san_bench.graph.fold import Folded, Repeat, fold_blocks
from san_peft import Barrier, ChannelMap, Edge, PropagationGraph, trace
from san_peft.propagation.graph import Layer


@cache
def traced(name: str) -> PropagationGraph:
    return trace(MODELS[name]())


def layer(fqn: str, reads: int = 4, writes: int = 4, kind: str = "Linear") -> Layer:
    return Layer(fqn, kind, reads, writes)


def edge(anterior: str, posterior: str, *via: str, size: int = 4) -> Edge:
    return Edge(anterior, posterior, ChannelMap.identity(size), via)


def stack(count: int, prefix: str = "layers") -> tuple[list[Layer], list[Edge]]:
    """Blocks of two layers, each block reading the one before."""
    layers = [layer(f"{prefix}.{i}.{name}") for i in range(count) for name in ("a", "b")]
    inside = [edge(f"{prefix}.{i}.a", f"{prefix}.{i}.b", "gelu") for i in range(count)]
    return layers, inside + [edge(f"{prefix}.{i}.b", f"{prefix}.{i + 1}.a", "residual") for i in range(count - 1)]


def fold(edges: list[Edge], layers: list[Layer], **more: object) -> Folded:
    return fold_blocks(PropagationGraph(tuple(edges), layers=tuple(layers), **more))


def titles(folded: Folded) -> list[str]:
    return [block.title for block in folded.blocks]


def shown(folded: Folded) -> list[str]:
    return [str(edge) for edge in folded.edges]


# ------------------------------------------------------------------ every edge is in the picture


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_lost_and_nothing_is_counted_twice(name):
    graph = traced(name)
    for scheme in ("all", "exact", "none"):
        chosen = graph.select(scheme)
        folded = fold_blocks(chosen)
        assert sum(edge.count for edge in folded.edges) == len(chosen.edges)
        assert sorted(map(str, (e for f in folded.edges for e in f.edges))) == sorted(map(str, chosen.edges))
        assert sum(layer.count for layer in folded.layers) == len(chosen.layers)
        assert [b for f in folded.barriers for b in f.barriers] == sorted(
            chosen.barriers, key=[b for f in folded.barriers for b in f.barriers].index
        )
        names = {layer.name for layer in folded.layers}
        assert {n for e in folded.edges for n in (e.anterior.name, e.posterior.name)} <= names


@pytest.mark.parametrize("name", ["llama", "timm-swin", "t5"])
def test_the_whole_graph_with_its_edges_into_heads_folds_too(name):
    graph = traced(name)
    assert sum(edge.count for edge in fold_blocks(graph).edges) == len(graph.edges)


# ------------------------------------------------------------------ what folds


def test_a_llama_of_32_layers_is_one_block_and_a_head():
    config = transformers.LlamaConfig(**{**TEXT, **GROUPED, "num_hidden_layers": 32})
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    graph = trace(model).select("all")
    folded = fold_blocks(graph)
    assert titles(folded) == ["model.layers.0 .. 31 (x32)", "lm_head"]
    assert folded.blocks[0].run == Repeat("model.layers", 0, 31)
    counts = {(e.anterior.name.split(".")[-1], e.posterior.name.split(".")[-1]): e.count for e in folded.edges}
    assert counts == {
        ("v_proj", "o_proj"): 32,
        ("o_proj", "gate_proj"): 32,
        ("o_proj", "up_proj"): 32,
        ("up_proj", "down_proj"): 32,
        ("down_proj", "q_proj"): 31,
        ("down_proj", "k_proj"): 31,
        ("down_proj", "v_proj"): 31,
    }
    assert sum(counts.values()) == len(graph.edges) == 221


def test_the_first_block_that_goes_another_way_is_named():
    gate = next(e for e in fold_blocks(traced("llama")).edges if e.posterior.name.endswith("gate_proj"))
    assert sorted(via for via, _ in gate.paths) == [("offset", "norm"), ("residual", "norm")]
    assert [note for _, note in gate.paths] == ["", "block 1"]


def test_swin_folds_stage_by_stage_because_widths_differ():
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=2, embed_dim=8, depths=(2, 3), num_heads=(2, 2)
    )
    folded = fold_blocks(trace(model))
    assert titles(folded) == [
        "patch_embed.proj",
        "layers.0.blocks.0 .. 1 (x2)",
        "layers.1.downsample.reduction",
        "layers.1.blocks.0 .. 2 (x3)",
        "head.fc",
    ]


def test_a_model_that_does_not_repeat_is_left_as_it_is():
    folded = fold_blocks(traced("timm-convnext"))
    assert all(layer.count == 1 for layer in folded.layers)
    assert all(edge.count == 1 and not edge.note for edge in folded.edges)
    assert [layer.name for layer in folded.layers] == [layer.fqn for layer in traced("timm-convnext").layers]


def test_blocks_that_are_layers_themselves():
    folded = fold([edge(f"net.{i}", f"net.{i + 1}") for i in range(3)], [layer(f"net.{i}") for i in range(4)])
    assert titles(folded) == ["net.0 .. 3 (x4)"]
    assert shown(folded) == ["net.{0-3} -> net.{0-3} [identity] (x3; to the next block)"]


def test_blocks_without_a_prefix():
    folded = fold([edge(f"{i}.fc", f"{i + 1}.fc") for i in range(2)], [layer(f"{i}.fc") for i in range(3)])
    assert titles(folded) == ["0 .. 2 (x3)"]


def test_blocks_within_blocks_multiply():
    layers = [layer(f"layers.{i}.experts.{j}.w") for i in range(3) for j in range(4)]
    edges = [edge(f"layers.{i}.experts.{j}.w", f"layers.{i}.out") for i in range(3) for j in range(4)]
    folded = fold(edges, layers + [layer(f"layers.{i}.out") for i in range(3)])
    assert titles(folded) == ["layers.0 .. 2 (x3)"]
    assert [(x.name, x.count) for x in folded.layers] == [
        ("layers.{0-2}.experts.{0-3}.w", 12),
        ("layers.{0-2}.out", 3),
    ]
    assert shown(folded) == [
        "layers.{0-2}.experts.{0-3}.w -> layers.{0-2}.out [identity] (x12; from every block)",
    ]


def test_a_graph_of_edges_alone_folds():
    folded = fold_blocks(PropagationGraph(tuple(stack(3)[1])))
    assert titles(folded) == ["layers.0 .. 2 (x3)"]
    assert {layer.size for layer in folded.layers} == {"layer"}


# ------------------------------------------------------------------ what does not


def changed(what: str) -> Folded:
    """Four equal blocks but for one difference in block 2."""
    layers, edges = stack(4)
    heads: tuple[str, ...] = ()
    if what == "type":
        layers[4] = layer("layers.2.a", kind="Conv1d")
    elif what == "width":
        layers[5] = layer("layers.2.b", writes=8)
        edges = [e for e in edges if e.anterior != "layers.2.b"]
    elif what == "layer":
        layers.insert(6, layer("layers.2.c"))
    elif what == "kind":
        edges[2] = edge("layers.2.a", "layers.2.b", "layer_norm")
    elif what == "map":
        edges[2] = Edge("layers.2.a", "layers.2.b", ChannelMap.from_index([3, 2, 1, 0], 4), ("gelu",))
    elif what == "missing":
        del edges[2]
    elif what == "head":
        heads = ("layers.2.b",)
    return fold(edges, layers, heads=heads)


@pytest.mark.parametrize("what", ["type", "width", "layer", "kind", "map", "missing", "head"])
def test_a_block_that_differs_stays_alone(what):
    assert titles(changed(what)) == ["layers.0 .. 1 (x2)", "layers.2", "layers.3"]


def test_a_missing_edge_to_the_next_block_cuts_the_stretch():
    layers, edges = stack(5)
    edges = [e for e in edges if (e.anterior, e.posterior) != ("layers.2.b", "layers.3.a")]
    folded = fold(edges, layers)
    assert titles(folded) == ["layers.0 .. 2 (x3)", "layers.3 .. 4 (x2)"]
    assert [e.count for e in folded.edges] == [3, 2, 2, 1]


def test_numbers_with_a_gap_do_not_fold():
    assert titles(fold([], [layer("net.0.a"), layer("net.2.a")])) == ["net.0.a", "net.2.a"]


# ------------------------------------------------------------------ what an edge says of its blocks


def test_edges_from_outside_say_where_they_lead():
    layers, edges = stack(4)
    outside = [layer("stem"), layer("norm"), layer("side"), layer("out")]
    edges += [edge("stem", "layers.0.a"), *(edge("norm", f"layers.{i}.b", "add") for i in range(4))]
    edges += [edge("side", "layers.1.b"), edge("side", "layers.2.b"), edge("layers.3.b", "out")]
    notes = {str(e.edges[0].anterior): e.note for e in fold(edges, [*layers, *outside]).edges[2:]}
    assert notes == {
        "stem": "to block 0",
        "norm": "to every block",
        "side": "to blocks 1 .. 2",
        "layers.3.b": "from block 3",
    }


def test_edges_that_skip_blocks_or_lead_back_are_told_apart():
    layers, edges = stack(4)
    edges += [edge("layers.0.a", "layers.2.b"), edge("layers.1.a", "layers.3.b"), edge("layers.3.a", "layers.1.b")]
    notes = [(e.count, e.note) for e in fold(edges, layers).edges]
    assert (2, "2 blocks on") in notes
    assert (1, "2 blocks back, from block 3") in notes


def test_an_edge_in_some_blocks_only_cannot_hide():
    """Inside a run every block has the same edges; one that leaves from some blocks only is said to."""
    layers, edges = stack(4)
    edges += [edge("layers.0.a", "out"), edge("layers.2.a", "out")]
    last = fold(edges, [*layers, layer("out")]).edges[-1]
    assert (last.count, last.note) == (2, "from blocks 0, 2")


def test_barriers_fold_with_the_blocks_they_stand_in():
    layers, edges = stack(3)
    graph = PropagationGraph(
        tuple(edges),
        (*(Barrier("cumsum", f"layers.{i}.a", "no rule") for i in range(3)), Barrier("call", "layers.1.z", "never")),
        tuple(layers),
    )
    folded = fold_blocks(graph)
    assert [(b.name, b.count, b.note) for b in folded.barriers] == [
        ("layers.{0-2}.a", 3, "every block"),
        ("layers.{0-2}.z", 1, "block 1"),
    ]


def test_mixtral_says_that_the_first_block_has_no_barrier():
    folded = fold_blocks(traced("mixtral"))
    assert {(b.name.split(".")[-1], b.note) for b in folded.barriers} == {
        ("q_proj", "block 1"),
        ("k_proj", "block 1"),
        ("v_proj", "block 1"),
        ("lm_head", ""),
        ("gate", "every block"),
        ("experts", "every block"),
    }


def test_the_reference_scheme_reaches_every_block():
    folded = fold_blocks(traced("timm-vit").select("reference"))
    assert shown(folded)[0] == "patch_embed.proj -> blocks.{0-1}.attn.qkv [identity] (x2; to every block)"
