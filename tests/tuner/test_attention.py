"""`nn.MultiheadAttention` as a layer: its scales, the edge from its values to its output, edges in and out."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from peft import get_peft_model
from tests.contract.nets import KINDS, Attention, adapted, disturb
from torch import Tensor, nn

from san_peft import PropagationGraph, SanConfig, SanLayer, TargetError, trace
from san_peft.propagation.placement import place
from san_peft.tuner.attention import SanAttention

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
KIND = KINDS["attention"]


def pairs(graph: PropagationGraph) -> set[tuple[str, str]]:
    return {(e.anterior, e.posterior) for e in graph.edges}


def test_what_the_trace_sees():
    graph = KIND.graph()
    assert pairs(graph) == {
        ("stem", "attn"),
        ("attn", "attn"),
        ("attn", "cross"),
        ("other", "cross"),
        ("cross", "cross"),
        ("cross", "fc"),
        ("fc", "head"),
    }
    edges = {(e.anterior, e.posterior): e for e in graph.edges}
    inside = edges["attn", "attn"]
    assert (inside.kind, inside.closed, inside.via) == ("exact", True, ("attention",))
    assert inside.channels.index.tolist() == [-1] * 24 + list(range(16, 24))
    assert edges["stem", "attn"].channels.index.tolist() == [*range(8)] * 3 + [-1] * 8
    assert edges["attn", "cross"].channels.index.tolist() == list(range(24, 32)) + [-1] * 16
    assert edges["other", "cross"].channels.index.tolist() == [-1] * 8 + [*range(4)] * 2 + [-1] * 8
    assert edges["cross", "fc"].channels.index.tolist() == list(range(24, 32))
    assert {layer.fqn for layer in graph.layers} == {"stem", "other", "attn", "cross", "fc", "head"}
    assert place(graph)["attn", "attn"] in ("output", "input")
    assert PropagationGraph.from_json(graph.to_json()) == graph
    assert "attn -> attn" in str(graph)


def test_a_bias_among_the_values_is_no_channel_of_theirs():
    net = Attention(add_bias_kv=True).eval()
    edges = {(e.anterior, e.posterior): e for e in trace(net, KIND.input()).edges}
    assert not edges["attn", "attn"].closed


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}])
def test_one_attention_equals_the_formula_written_out(options):
    torch.manual_seed(0)
    net = Attention(**options).double().eval()
    base = copy.deepcopy(net)
    graph = trace(net, KIND.input(torch.float64))
    model = get_peft_model(net, SanConfig(target_modules=["stem", "attn"], propagation=graph, shift=True)).double()
    disturb(model)
    layers: Any = model.base_model.model
    g, t = layers.attn.get_scale(), layers.attn.get_shift()
    s = layers.stem.get_scale()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    attn: Any = base.attn
    with torch.no_grad():
        attn.in_proj_weight.mul_(g[:24, None]).mul_(s)
        attn.in_proj_bias.mul_(g[:24]).add_(t[:24])
        attn.out_proj.weight.mul_(g[24:, None]).mul_(g[16:24])
        attn.out_proj.bias.mul_(g[24:]).add_(t[24:])
        expected = attn(x, x, x)
        for mode in (model.eval(), model.train()):
            with mode.base_model.scales.passing((), {}):
                found = layers.attn(x, x, x)
            torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("shift", [False, True])
def test_gradients_are_those_of_the_formula(shift):
    model = adapted(KIND, shift=shift, modules_to_save=None).double().train()
    x = KIND.input(torch.float64)
    model(x).square().sum().backward()
    attn: Any = model.base_model.model.attn
    scale = attn.san_scale["default"].weight
    direction = torch.randn(scale.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values, step = [], 1e-6
    with torch.no_grad():
        for sign in (1, -1):
            scale.add_(direction, alpha=sign * step)
            values.append(model(x).square().sum().item())
            scale.sub_(direction, alpha=sign * step)
    numeric = (values[0] - values[1]) / (2 * step)
    assert abs(float((scale.grad * direction).sum()) - numeric) < 1e-6 * abs(numeric)


def test_sequence_first_masks_weights_and_one_sequence():
    torch.manual_seed(0)
    net = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)}).double()
    model = get_peft_model(net, SanConfig(target_modules=["attn"], propagation="none")).double().eval()
    disturb(model)
    attn: Any = model.base_model.model["attn"]
    merged = copy.deepcopy(attn)
    merged.merge()
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    mask = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    for args in ({}, {"attn_mask": mask, "key_padding_mask": padding}, {"need_weights": False}):
        torch.testing.assert_close(attn(x, x, x, **args), merged(x, x, x, **args), **CLOSE)
    torch.testing.assert_close(attn(query=x, key=x, value=x), merged(x, x, x), **CLOSE)
    torch.testing.assert_close(attn(x[:, 0], x[:, 0], x[:, 0]), merged(x[:, 0], x[:, 0], x[:, 0]), **CLOSE)
    assert (attn.embed_dim, attn.batch_first, attn._qkv_same_embed_dim) == (8, False, True)


def test_an_attention_that_is_read_and_not_adapted():
    model = get_peft_model(KIND.net(), SanConfig(target_modules=["stem", "fc"], propagation=KIND.graph())).eval()
    layer: Any = model.base_model.model.attn
    assert isinstance(layer, SanAttention)
    assert layer.get_scale() is None
    assert layer.get_input_scale()[24:].tolist() == [1.0] * 8
    with torch.no_grad():
        start = model(KIND.input())
        disturb(model)
        out = model(KIND.input())
        assert not torch.allclose(out, start, rtol=1e-3)
        model.merge_adapter()
        torch.testing.assert_close(model(KIND.input()), out)
        model.unmerge_adapter()


def test_without_a_bias_a_shift_makes_one():
    model = adapted(KIND, shift=True).double()
    cross: Any = model.base_model.model.cross
    assert cross.get_base_layer().in_proj_bias is None
    x = KIND.input(torch.float64)
    out = model(x)
    model.merge_adapter()
    assert cross.get_base_layer().in_proj_bias is not None
    torch.testing.assert_close(model(x), out, **CLOSE)
    model.unmerge_adapter()
    assert cross.get_base_layer().in_proj_bias is None
    assert cross.get_base_layer().out_proj.bias is None
    torch.testing.assert_close(model(x), out, **CLOSE)


def test_its_output_projection_is_named_with_it_or_alone():
    graph = KIND.graph()
    with pytest.raises(TargetError, match=r"attn\.out_proj is part of an nn\.MultiheadAttention"):
        get_peft_model(KIND.net(), SanConfig(target_modules=["attn", "attn.out_proj"], propagation=graph))
    with pytest.warns(UserWarning, match="reads their weights directly"):
        model = get_peft_model(KIND.net(), SanConfig(target_modules=["stem", "attn.out_proj"], propagation=graph))
    layers = {n for n, m in model.base_model.model.named_modules() if isinstance(m, SanLayer)}
    assert layers == {"stem", "attn.out_proj"}


def test_two_threads():
    model = adapted(KIND).eval()
    x = [KIND.input() * (i + 1) for i in range(2)]
    with torch.no_grad():
        expected = [model(one) for one in x]
        found: dict[int, list[Tensor]] = {0: [], 1: []}

        def call(number: int) -> None:
            with torch.no_grad():
                found[number] = [model(x[number]) for _ in range(20)]

        threads = [threading.Thread(target=call, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, outs in found.items():
        assert len(outs) == 20
        assert all(torch.equal(out, expected[number]) for out in outs)


def test_the_vision_transformer_of_torchvision(tmp_path):
    vision = pytest.importorskip("torchvision.models.vision_transformer")
    torch.manual_seed(0)
    net = vision.VisionTransformer(16, 8, 2, 2, 8, 16, num_classes=3).double().eval()
    nn.init.normal_(net.heads.head.weight)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    graph = trace(net, x)
    first, second = (f"encoder.layers.encoder_layer_{i}" for i in range(2))
    assert {
        (f"{first}.self_attention", f"{first}.self_attention"),
        (f"{first}.self_attention", f"{first}.mlp.0"),
        (f"{first}.mlp.3", f"{second}.self_attention"),
    } <= pairs(graph)
    model = get_peft_model(net, SanConfig(propagation=graph)).double().eval()
    assert f"{second}.self_attention" in model.peft_config["default"].target_modules
    disturb(model)
    with torch.no_grad():
        out = model(x)
        torch.testing.assert_close(model.train()(x), out, **CLOSE)
        model.eval().save_pretrained(tmp_path)
        torch.testing.assert_close(model.merge_and_unload()(x), out, **CLOSE)
