"""Where a propagated scale may act: norms, closed edges, overwritten outputs; and that all places are one function."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch
import transformers as tf
from tests.golden.models import GROUPED, MODELS, TEXT
from tests.propagation.test_readers import closed, readers
from tests.propagation.test_trace_models import outputs
from torch import Tensor, nn

from san_peft import PropagationGraph, trace
from san_peft.errors import GraphError
from san_peft.propagation import ChannelMap, Edge, Layer, Norm, ablate, place


def falcon() -> nn.Module:
    config = tf.FalconConfig(**{k: v for k, v in TEXT.items() if k != "intermediate_size"}, parallel_attn=True)
    return tf.FalconForCausalLM(config)


BUILD = {**MODELS, "falcon": falcon}


@cache
def traced(name: str) -> PropagationGraph:
    torch.manual_seed(0)
    return trace(BUILD[name]())


def places(name: str) -> dict[tuple[str, str], str]:
    return place(traced(name))


# ------------------------------------------------------------------ whole models


def test_llama_with_grouped_heads():
    found, b = places("llama-grouped"), "model.layers"
    for reader in ("q_proj", "k_proj", "v_proj"):
        place_of = found[f"{b}.0.mlp.down_proj", f"{b}.1.self_attn.{reader}"]
        assert place_of == f"norm:{b}.1.input_layernorm"
    for i in range(2):
        for reader in ("gate_proj", "up_proj"):
            place_of = found[f"{b}.{i}.self_attn.o_proj", f"{b}.{i}.mlp.{reader}"]
            assert place_of == f"norm:{b}.{i}.post_attention_layernorm"
        assert found[f"{b}.{i}.self_attn.v_proj", f"{b}.{i}.self_attn.o_proj"] == "output"
        assert found[f"{b}.{i}.mlp.up_proj", f"{b}.{i}.mlp.down_proj"] == "output"
    assert found[f"{b}.1.mlp.down_proj", "lm_head"] == "norm:model.norm"
    value = next(e for e in traced("llama-grouped") if e.anterior.endswith("v_proj"))
    assert (value.channels.kind, value.closed) == ("repeat", True)
    assert "closed" not in str(value)


def test_a_norm_one_of_whose_readers_gets_no_scale_is_not_used():
    graph, block = traced("llama-grouped"), "model.layers.1.self_attn"
    found = place(graph.with_edges(e for e in graph if e.posterior != f"{block}.k_proj"))
    assert found["model.layers.0.mlp.down_proj", f"{block}.q_proj"] == "input"
    assert found[f"{block}.v_proj", f"{block}.o_proj"] == "output", "that nobody else reads it stays true"


def test_gpt2():
    found, b = places("gpt2"), "transformer.h"
    assert found[f"{b}.0.attn.c_attn", f"{b}.0.attn.c_proj"] == "output"
    assert found[f"{b}.0.attn.c_proj", f"{b}.0.mlp.c_fc"] == f"norm:{b}.0.ln_2"
    assert found[f"{b}.0.mlp.c_fc", f"{b}.0.mlp.c_proj"] == "input"
    assert found[f"{b}.0.mlp.c_proj", f"{b}.1.attn.c_attn"] == f"norm:{b}.1.ln_1"


def test_vit_with_separate_and_with_fused_queries_keys_and_values():
    found, b = places("vit"), "vit.layers"
    assert found[f"{b}.0.attention.v_proj", f"{b}.0.attention.o_proj"] == "output"
    assert found[f"{b}.0.attention.o_proj", f"{b}.0.mlp.fc1"] == f"norm:{b}.0.layernorm_after"
    for reader in ("q_proj", "k_proj", "v_proj"):
        assert found[f"{b}.0.mlp.fc2", f"{b}.1.attention.{reader}"] == f"norm:{b}.1.layernorm_before"
    found = places("timm-vit")
    assert found["blocks.0.attn.qkv", "blocks.0.attn.proj"] == "output", "only the value third is read"
    assert found["blocks.0.mlp.fc1", "blocks.0.mlp.fc2"] == "input"
    assert found["blocks.0.mlp.fc2", "blocks.1.attn.qkv"] == "norm:blocks.1.norm1"
    assert found["blocks.1.mlp.fc2", "head"] == "norm:norm", "the head reads whole tokens"


def test_windows_of_swin_lie_between_norm_and_reader():
    found = places("timm-swin")
    assert found["layers.0.blocks.0.mlp.fc2", "layers.0.blocks.1.attn.qkv"] == "norm:layers.0.blocks.1.norm1"
    assert found["layers.0.blocks.1.attn.qkv", "layers.0.blocks.1.attn.proj"] == "output"
    assert found["layers.0.blocks.1.mlp.fc2", "layers.1.downsample.reduction"] == "norm:layers.1.downsample.norm"
    assert found["layers.1.blocks.0.mlp.fc2", "head.fc"] == "input", "tokens are averaged before the head"


def test_convnext_has_channels_first_and_shortcuts():
    found = places("timm-convnext")
    assert found["stages.0.blocks.0.conv_dw", "stages.0.blocks.0.mlp.fc1"] == "norm:stages.0.blocks.0.norm"
    assert found["stages.0.blocks.0.mlp.fc2", "stages.1.downsample.1"] == "norm:stages.1.downsample.0"
    assert found["stem.0", "stages.0.blocks.0.conv_dw"] == "input", "its norm also starts the stream"
    edge = next(e for e in traced("timm-convnext") if e.anterior == "stages.1.downsample.1")
    assert (edge.kind, edge.closed) == ("exact", False), "a shortcut reads it too"
    assert "stages.0.blocks.0.mlp.grn" not in readers(traced("timm-convnextv2")), "it adds its own input"


def test_norms_of_bert_also_go_to_the_stream():
    assert set(readers(traced("bert"))) == {"bert.encoder.layer.1.output.LayerNorm"}
    exact = {pair for pair, where in places("bert").items() if where == "output"}
    assert {posterior.split(".")[-3:-1] == ["attention", "output"] for _, posterior in exact} == {True}


def test_experts_open_a_norm():
    found = readers(traced("mixtral"))
    assert "model.layers.0.input_layernorm" in found
    assert not any("post_attention" in fqn for fqn in found)


def test_a_decoder_reads_one_norm_in_every_block_and_states_are_returned():
    assert "encoder.final_layer_norm" not in readers(traced("t5")), "the model returns it"


def test_parallel_attention_shares_a_norm():
    found, b = readers(traced("falcon")), "transformer.h.1"
    norm, shared = f"{b}.input_layernorm", {f"{b}.self_attention.query_key_value", f"{b}.mlp.dense_h_to_4h"}
    assert set(found[norm]) == shared
    where = {where for (_, posterior), where in places("falcon").items() if posterior in shared}
    assert where == {f"norm:{norm}"}
    assert places("gpt-neox")[
        "gpt_neox.layers.0.mlp.dense_4h_to_h", "gpt_neox.layers.1.mlp.dense_h_to_4h"
    ] == "norm:gpt_neox.layers.1.post_attention_layernorm"  # fmt: skip


def test_batch_norm_is_read_through_an_activation():
    assert not traced("timm-resnet").norms


def test_a_model_on_meta_in_half_precision_and_with_eager_attention():
    config = tf.LlamaConfig(**{**TEXT, **GROUPED})
    graphs = [trace(tf.AutoModelForCausalLM.from_config(config, attn_implementation=n)) for n in ("eager", "sdpa")]
    graphs.append(trace(tf.LlamaForCausalLM(config).bfloat16()))
    with torch.device("meta"):
        graphs.append(trace(tf.LlamaForCausalLM(config)))
    assert all(graph == traced("llama-grouped") for graph in graphs)
    assert len(graphs[0].norms) == 5


def test_only_mutated_memory_counts_in_models():
    assert not any(layer.overwritten for layer in traced("llama").layers)
    found = {layer.fqn for layer in traced("timm-swinv2").layers if layer.overwritten}
    assert found
    assert all(fqn.endswith("cpb_mlp.0") for fqn in found), "a linear layer before a ReLU in place"


# ------------------------------------------------------------------ as values


def test_json_keeps_norms_closed_edges_and_overwritten_outputs():
    for name in ("llama", "timm-swinv2", "timm-vit"):
        graph = traced(name)
        assert PropagationGraph.from_json(graph.to_json()) == graph
    data = traced("timm-vit").to_dict()
    assert data["format"] == 2
    assert not any("overwritten" in layer for layer in data["layers"]), "written where true"
    assert {edge.get("closed") for edge in data["edges"]} == {None, True}
    old = {**{k: v for k, v in data.items() if k != "norms"}, "format": 1}
    old["edges"] = [{k: v for k, v in edge.items() if k != "closed"} for edge in data["edges"]]
    graph = PropagationGraph.from_json(old)
    assert str(graph) == str(traced("timm-vit"))
    assert set(place(graph).values()) == {"input"}
    for bad in ({"fqn": "n"}, {"fqn": "n", "readers": [1]}, {"fqn": "n", "readers": ["nobody"]}):
        with pytest.raises(GraphError, match="norm"):
            PropagationGraph.from_json({**data, "norms": [bad]})


def test_what_changes_edges_keeps_what_stays_true():
    graph = traced("timm-vit")
    assert graph.select("all").norms == graph.norms
    assert closed(graph.select("exact")) == closed(graph)
    assert closed(ablate(graph, "shuffled")) == closed(ablate(graph, "skip-one")) == set()


def test_a_graph_by_hand():
    same = ChannelMap.identity(2)
    edges = [Edge("a", "b", same), Edge("a", "c", same)]
    graph = PropagationGraph(edges, norms=[Norm("n", ["b", "c"])])
    assert place(graph) == {("a", "b"): "norm:n", ("a", "c"): "norm:n"}
    assert place(graph.with_edges(edges[:1])) == {("a", "b"): "input"}
    assert place(PropagationGraph([dataclasses.replace(edges[0], closed=True)])) == {("a", "b"): "output"}
    twice = [Edge("a", "c", same, closed=True), Edge("b", "c", same, closed=True)]
    assert set(place(PropagationGraph(twice)).values()) == {"input"}, "both scales on one channel"
    with pytest.raises(GraphError, match="names c"):
        PropagationGraph(norms=[Norm("n", ("b", "c"))], layers=[Layer("b", "Linear", 2, 2)])


# ------------------------------------------------------------------ one function, wherever the scale acts


def channels_of(module: nn.Module, scale: Tensor) -> Tensor:
    """A scale per channel in the shape that a module's input or output broadcasts with."""
    image = type(module).__name__.endswith("2d") or getattr(module, "data_format", "") == "channels_first"
    axes = 2 if image else 1 if isinstance(module, nn.Conv1d) else 0
    return scale.reshape(-1, *[1] * axes)


def with_hooks(model: nn.Module, at_inputs: dict[str, Tensor], at_outputs: dict[str, Tensor]) -> list[Tensor]:
    handles = []
    for fqn, scale in at_inputs.items():
        module = model.get_submodule(fqn)
        s = channels_of(module, scale)
        handles.append(module.register_forward_pre_hook(lambda _, args, s=s: (args[0] * s, *args[1:])))
    for fqn, scale in at_outputs.items():
        module = model.get_submodule(fqn)
        s = channels_of(module, scale)
        handles.append(module.register_forward_hook(lambda _, __, out, s=s: out * s))
    try:
        return outputs(model)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", BUILD)
def test_every_place_is_the_same_function(name):
    """A law: what acts in a norm or at an output is what acts at the inputs it stands for."""
    torch.manual_seed(0)
    graph, dtype = traced(name), torch.float32 if name == "mixtral" else torch.float64  # its experts want float32
    model = jolted(BUILD[name]().eval().to(dtype))
    sizes = {layer.fqn: layer.in_channels for layer in graph.layers}
    pairs: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    for norm in graph.norms:
        scale = torch.rand(sizes[norm.readers[0]], dtype=dtype) + 0.5
        pairs.append((dict.fromkeys(norm.readers, scale), {norm.fqn: scale}))
    for edge in graph.edges:
        if edge.closed:
            index = edge.channels.index
            scale = torch.ones(edge.channels.source_size, dtype=dtype)
            scale[index[index >= 0]] = torch.rand(int((index >= 0).sum()), dtype=dtype) + 0.5
            pairs.append(({edge.posterior: torch.where(index >= 0, scale[index], 1.0)}, {edge.anterior: scale}))
    plain, differ, tolerance = outputs(model), [], 1e-10 if dtype == torch.float64 else 1e-5
    for at_inputs, elsewhere in pairs:
        expected = with_hooks(model, at_inputs, {})
        torch.testing.assert_close(with_hooks(model, {}, elsewhere), expected, rtol=tolerance, atol=tolerance)
        differ.append(any(not torch.equal(a, b) for a, b in zip(expected, plain, strict=True)))
    assert pairs or set(place(graph).values()) == {"input"}
    assert all(differ) or (any(differ) and name == "llava"), "only LLaVA has a layer that its output does not depend on"


@torch.no_grad()
def jolted(model: nn.Module) -> nn.Module:
    """The model with other numbers where a layer scale, a bias or a head of zeros would hide what passes."""
    for parameter in model.parameters():
        if parameter.dim() == 1 or not parameter.any():
            parameter.copy_(torch.rand_like(parameter) + 0.5)
    return model
