"""Traced graphs of tiny models, as reviewed text; and what must hold of them whatever the text says.

`pytest tests/golden --regenerate-golden` writes the texts anew. Read the difference before you commit it.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import torch
from tests.golden.models import MODELS

from san_peft import PropagationGraph, trace

HERE = Path(__file__).parent


@cache
def graph_of(name: str) -> PropagationGraph:
    torch.manual_seed(0)
    return trace(MODELS[name]())


@pytest.mark.parametrize("name", MODELS)
def test_graph_is_the_reviewed_one(name, request):
    file, text = HERE / f"{name}.txt", f"{graph_of(name)}\n"
    if request.config.getoption("--regenerate-golden"):
        file.write_text(text, encoding="utf-8")
        pytest.skip(f"wrote {file.name}: review the difference")
    assert text == file.read_text(encoding="utf-8")


def test_no_text_is_left_over():
    assert {file.stem for file in HERE.glob("*.txt")} == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_json_round_trip(name):
    assert PropagationGraph.from_json(graph_of(name).to_json()) == graph_of(name)


def edges(name: str) -> dict[tuple[str, str], tuple[str, str]]:
    """Map and kind of every edge, by its ends without the numbers of blocks."""
    return {
        (re.sub(r"\.\d+\.", ".N.", e.anterior), re.sub(r"\.\d+\.", ".N.", e.posterior)): (str(e.channels), e.kind)
        for e in graph_of(name).edges
    }


# What follows is said once more by hand, so that a careless regeneration cannot change it.


def test_vit_with_fused_qkv():
    found = edges("timm-vit")
    assert found["blocks.N.attn.qkv", "blocks.N.attn.proj"] == ("slice 32:48 of 48", "exact")
    assert found["blocks.N.attn.proj", "blocks.N.mlp.fc1"] == ("identity", "residual")
    assert found["blocks.N.mlp.fc1", "blocks.N.mlp.fc2"] == ("identity", "activation")
    assert found["blocks.N.mlp.fc2", "blocks.N.attn.qkv"] == ("identity", "residual")
    assert found["patch_embed.proj", "blocks.N.attn.qkv"] == ("identity", "residual")
    assert graph_of("timm-vit").heads == ("head",)
    assert ("blocks.N.mlp.fc2", "head") in found
    assert all(edge.posterior != "head" for edge in graph_of("timm-vit").select("all").edges)


@pytest.mark.parametrize(
    ("name", "value", "out"),
    [
        ("vit", "vit.layers.N.attention.v_proj", "vit.layers.N.attention.o_proj"),
        ("bert", "bert.encoder.layer.N.attention.self.value", "bert.encoder.layer.N.attention.output.dense"),
        ("llama", "model.layers.N.self_attn.v_proj", "model.layers.N.self_attn.o_proj"),
        ("clip", "text_model.encoder.layers.N.self_attn.v_proj", "text_model.encoder.layers.N.self_attn.out_proj"),
    ],
)
def test_values_reach_the_output_projection(name, value, out):
    assert edges(name)[value, out] == ("identity", "exact")


@pytest.mark.parametrize("name", ["llama-grouped", "mistral", "qwen2", "qwen3"])
def test_grouped_heads_repeat_by_head(name):
    graph = graph_of(name)
    edge = next(e for e in graph.edges if e.anterior.endswith("v_proj"))
    size = edge.channels.source_size // 2
    expected = [head * size + channel for head in (0, 0, 1, 1) for channel in range(size)]
    assert edge.channels.index.tolist() == expected
    assert (edge.channels.kind, edge.kind) == ("repeat", "exact")


def test_one_shared_head_is_tiled():
    edge = next(e for e in graph_of("gemma").edges if e.anterior.endswith("v_proj"))
    assert edge.channels.index.tolist() == [*range(8), *range(8)]


@pytest.mark.parametrize("name", ["llama", "llama-grouped", "mistral", "qwen2", "qwen3", "gemma"])
def test_the_linear_branch_of_a_gated_feedforward(name):
    found = edges(name)
    assert found["model.layers.N.mlp.up_proj", "model.layers.N.mlp.down_proj"] == ("identity", "exact")
    assert ("model.layers.N.mlp.gate_proj", "model.layers.N.mlp.down_proj") not in found
    for reader in ("gate_proj", "up_proj"):
        assert found["model.layers.N.self_attn.o_proj", f"model.layers.N.mlp.{reader}"] == ("identity", "residual")
    for reader in ("q_proj", "k_proj", "v_proj"):
        assert found["model.layers.N.mlp.down_proj", f"model.layers.N.self_attn.{reader}"] == ("identity", "residual")


def test_phi3_unpacks_two_fused_layers():
    found = edges("phi3")
    assert found["model.layers.N.mlp.gate_up_proj", "model.layers.N.mlp.down_proj"] == ("slice 32:64 of 64", "exact")
    edge = next(e for e in graph_of("phi3").edges if e.anterior.endswith("qkv_proj"))
    first, second = list(range(24, 28)), list(range(28, 32))  # queries take 0:16, keys 16:24, values 24:32
    assert edge.channels.index.tolist() == first + first + second + second


def test_neox_packs_queries_keys_and_values_by_head():
    edge = next(e for e in graph_of("gpt-neox").edges if e.anterior.endswith("query_key_value"))
    assert edge.channels.index.tolist() == [*range(16, 24), *range(40, 48)]
    assert edge.kind == "exact"


def test_gpt2_transposed_layers():
    found = edges("gpt2")
    assert found["transformer.h.N.attn.c_attn", "transformer.h.N.attn.c_proj"] == ("slice 32:48 of 48", "exact")


@pytest.mark.parametrize("name", ["swin", "timm-swin", "timm-swinv2"])
def test_patch_merging_tiles_four_times(name):
    graph = graph_of(name)
    edge = next(e for e in graph.edges if e.posterior.endswith("reduction"))
    assert edge.anterior.endswith(("blocks.1.mlp.fc2",))
    assert edge.channels.kind == "tile"
    assert edge.channels.times == 4


def test_convnext_goes_round_per_channel():
    found = edges("timm-convnext")
    block = "stages.N.blocks.N"
    found = {(re.sub(r"\d+", "N", a), re.sub(r"\d+", "N", b)): v for (a, b), v in found.items()}
    assert found[f"{block}.conv_dw", f"{block}.mlp.fcN"] == ("identity", "norm")
    assert found[f"{block}.mlp.fcN", f"{block}.mlp.fcN"] == ("identity", "activation")
    assert found[f"{block}.mlp.fcN", "stages.N.downsample.N"] == ("identity", "residual")
    assert found["stages.N.downsample.N", f"{block}.conv_dw"] == ("identity", "exact")


def test_llava_stops_at_the_mixed_stream():
    graph = graph_of("llava")
    tower, projector = "model.vision_tower.encoder.layers", "model.multi_modal_projector"
    into = {edge.anterior for edge in graph.incoming(f"{projector}.linear_1")}
    assert into == {f"{tower}.1.mlp.fc2"}, "features come from the last layer but one of three"
    assert not graph.outgoing(f"{projector}.linear_2")
    assert {barrier.operation for barrier in graph.barriers} == {"masked_scatter"}


def test_mixture_of_experts_is_a_barrier_that_says_so():
    assert all(barrier.reason for barrier in graph_of("mixtral").barriers)
    assert {barrier.operation for barrier in graph_of("mixtral").barriers} == {"_grouped_mm", "mm"}


def test_decoder_reads_the_encoder():
    for name, writer, reader in (
        ("t5", "encoder.block.N.layer.N.DenseReluDense.wo", "decoder.block.N.layer.N.EncDecAttention.v"),
        ("whisper", "model.encoder.layers.N.fc2", "model.decoder.layers.N.encoder_attn.v_proj"),
    ):
        found = {(re.sub(r"\.\d+\.", ".N.", a), re.sub(r"\.\d+\.", ".N.", b)) for a, b in edges(name)}
        assert (writer, reader) in found


def test_swinv2_leaves_out_the_layer_whose_weight_it_reads_itself():
    graph = graph_of("timm-swinv2")
    assert "layers.0.blocks.0.attn.qkv" not in {layer.fqn for layer in graph.layers}
    assert "never called" in next(b.reason for b in graph.barriers if b.layer == "layers.0.blocks.0.attn.qkv")


@pytest.mark.parametrize("name", ["timm-vit", "timm-deit", "vit", "dinov2"])
def test_reference_scheme_on_vision_transformers(name):
    chosen = graph_of(name).select("reference").edges
    stem = next(layer.fqn for layer in graph_of(name).layers)
    queries = [e for e in chosen if e.anterior == stem]
    blocks = {re.search(r"\.(\d+)\.", e.posterior)[1] for e in queries}
    assert blocks == {"0", "1"}, "the patch embedding goes to every block"
    assert all(re.search(r"qkv|q_proj|k_proj|v_proj", e.posterior) for e in queries)
    rest = {(e.anterior.split(".")[-1], e.posterior.split(".")[-1]) for e in chosen if e.anterior != stem}
    assert rest in ({("proj", "fc1"), ("fc1", "fc2")}, {("o_proj", "fc1"), ("fc1", "fc2")})
