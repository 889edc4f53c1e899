"""A pass of the model gives what its layers give by themselves, and leaves nothing behind."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from tests.contract.nets import disturb
from tests.tuner.hosted import IDS, host_parameters, layers_of
from tests.tuner.passes import (
    CASES,
    CLOSE,
    DORA,
    LORA,
    OPTIONS,
    adapted,
    alone,
    check_law,
    counted,
    larger,
    output,
    total,
)
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from san_bench.models.adapt import saved_activation_bytes

# ---------------------------------------------------------------------- one function, wherever its scales act


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["llama-grouped", "vit", "convnext", "timm-vit"])
def test_a_pass_equals_the_layers_by_themselves(name, case):
    model = adapted(name, **CASES[case])
    check_law(model, name)
    with torch.no_grad(), model.disable_adapter():
        frozen = output(model, name)
    assert not torch.allclose(output(model, name), frozen, rtol=1e-3)


@pytest.mark.parametrize("host", ["own", "lora"])
@pytest.mark.parametrize("option", OPTIONS)
def test_options(option, host):
    model = adapted(**{**CASES[host], **OPTIONS[option]}).train()
    check_law(model)


@pytest.mark.parametrize("case", ["own", "lora", "dora"])
def test_a_scale_near_zero_keeps_its_gradient(case):
    model = adapted(**CASES[case])
    layer = layers_of(model)["model.layers.0.self_attn.v_proj"]
    with torch.no_grad():
        if case == "own":
            layer.san_scale["default"].weight[:2] = torch.tensor([-1.0, -0.999])
        elif case == "dora":
            layer.host.lora_magnitude_vector["default"].weight[:2] = torch.tensor([0.0, 1e-4])
        else:  # the update takes away nearly all of a row
            layer.host.lora_A["default"].weight[0] = layer.get_base_layer().weight[1]
            layer.host.lora_B["default"].weight[1] = torch.tensor([-0.999 / layer.host.scaling["default"], 0.0])
    assert layer.get_scale().abs().min() < 1e-2
    check_law(model)


@pytest.mark.parametrize("case", ["own", "lora", "dora"])
def test_a_scale_near_zero_costs_memory_in_its_layer_alone(case):
    """A layer keeps its input beside its output, so that no gradient is divided by the scale; the others do not."""
    model = adapted(**CASES[case]).train()
    before = saved_activation_bytes(model, {"input_ids": IDS})
    layer = layers_of(model)["model.layers.0.self_attn.o_proj"]
    with torch.no_grad():
        if case == "own":
            layer.san_scale["default"].weight[0] = -0.999
        elif case == "dora":
            layer.host.lora_magnitude_vector["default"].weight[0] = 1e-4
        else:
            layer.host.lora_A["default"].weight[0] = layer.get_base_layer().weight[1]
            layer.host.lora_B["default"].weight[1] = torch.tensor([-0.999 / layer.host.scaling["default"], 0.0])
    more = saved_activation_bytes(model, {"input_ids": IDS}) - before
    assert 0 <= more <= 2 * IDS.numel() * layer.out_features * 8


# ---------------------------------------------------------------------- nothing is kept that could be stale


@pytest.mark.parametrize("case", ["own", "lora", "dora"])
@pytest.mark.parametrize("trained", [False, True])
def test_one_activation_read_again_after_an_update(case, trained):
    model = adapted(**CASES[case]).train(trained)
    embedded = model.get_input_embeddings()(IDS).detach()

    def run() -> Tensor:
        with torch.set_grad_enabled(trained):
            out = model(inputs_embeds=embedded).logits
            if trained:
                total(out).backward()
            return out.detach()

    before = run()
    disturb(model, seed=7)
    after = run()
    assert not torch.allclose(after, before, rtol=1e-3)
    with alone(model):
        torch.testing.assert_close(after, run(), **CLOSE)


@pytest.mark.parametrize("case", ["own", "lora"])
def test_one_layer_read_again_by_one_reader_alone(case):
    """Encoder features that are kept, and heads that are trained in turn."""
    model = adapted(**CASES[case])
    layers = layers_of(model)
    readers = [layers[f"model.layers.1.self_attn.{name}_proj"] for name in "qkv"]
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    for reader in (*readers, *readers):
        reader(x).sum().backward()
        disturb(model, seed=4)
        with torch.no_grad():
            expected = reader.base_layer(x * reader.get_input_scale())
            scale = reader.get_scale() if case == "own" else None
            torch.testing.assert_close(reader(x), expected if scale is None else expected * scale, **CLOSE)


def test_an_exception_leaves_nothing():
    model = adapted(inner=LORA).train()
    held = model.base_model.scales
    expected = output(model).detach()
    kept: list[Any] = []

    def fail(module: nn.Module, args: Any) -> None:
        kept.extend(weakref.ref(vectors[3]) for vectors in held.acting().shared.values())
        kept.append(weakref.ref(held.acting()))
        raise MemoryError

    handle = layers_of(model)["model.layers.1.mlp.down_proj"].register_forward_pre_hook(fail)
    for _ in range(2):
        with pytest.raises(MemoryError):
            output(model)
    handle.remove()
    assert held._running == {}
    held._recall = None  # values of the parameters, without a graph
    assert len(kept) >= 2
    assert not any(one() for one in kept)
    torch.testing.assert_close(output(model), expected)


def test_tensors_of_a_pass_die_with_it():
    model = adapted(inner=LORA).train()
    seen: list[Any] = []
    for layer in layers_of(model).values():
        layer.register_forward_pre_hook(lambda module, args: seen.append(weakref.ref(args[0])))
        layer.register_forward_hook(lambda module, args, out: seen.append(weakref.ref(out)))
    total(output(model)).backward()
    assert len(seen) == 2 * len(layers_of(model))
    assert not any(one() is not None for one in seen)


@pytest.mark.parametrize("case", ["own", "lora", "dora", "all"])
def test_parameters_written_past_their_version(case):
    """Swapping in averaged weights by `p.data`, and back, between two evaluations."""
    model = adapted(**CASES[case])
    with torch.no_grad():
        before = output(model)
        kept = {n: p.data.clone() for n, p in host_parameters(model).items()}
        for parameter in host_parameters(model).values():
            parameter.data.copy_(parameter.data * 1.5 + 0.1)
        fresh = adapted(**CASES[case])
        fresh.load_state_dict(model.state_dict())
        assert not torch.allclose(output(model), before, rtol=1e-3)
        torch.testing.assert_close(output(model), output(fresh), rtol=0, atol=0)
        for name, parameter in host_parameters(model).items():
            parameter.data.copy_(kept[name])
        torch.testing.assert_close(output(model), before, rtol=0, atol=0)


def test_frozen_weights_changed_in_place():
    for case in ("lora", "dora"):
        model = adapted(**CASES[case])
        with torch.no_grad():
            output(model)
            larger(model.base_model.model.model.layers[0].mlp.up_proj.get_base_layer())
        check_law(model)


# ---------------------------------------------------------------------- generation


def greedy(model: nn.Module, tokens: int = 5) -> Tensor:
    """Generation written out, without a cache."""
    ids = IDS
    with torch.no_grad():
        for _ in range(tokens):
            scores = model(input_ids=ids, use_cache=False).logits[:, -1:]
            scores[..., model.generation_config.eos_token_id] = -torch.inf
            ids = torch.cat([ids, scores.argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("case", ["own", "lora", "dora"])
@pytest.mark.parametrize("cache", ["dynamic", "static", "none", "beams"])
def test_generation(case, cache):
    model = adapted(**CASES[case])
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    options |= {"static": {"cache_implementation": "static"}, "none": {"use_cache": False}}.get(cache, {})
    if cache == "beams":
        found = model.generate(input_ids=IDS, num_beams=3, **options)
        with alone(model):
            expected = model.generate(input_ids=IDS, num_beams=3, **options)
    else:
        found, expected = model.generate(input_ids=IDS, **options), greedy(model)
    assert torch.equal(found, expected)
    with model.disable_adapter():
        assert not torch.equal(model.generate(input_ids=IDS, **options), found)


def test_scales_are_computed_once_while_a_cache_is_used(monkeypatch):
    calls = counted(monkeypatch)
    model = adapted(inner=LORA)
    model.generate(input_ids=IDS, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    groups = len(model.base_model.scales._layouts["default"].low_rank)
    assert groups
    assert len(calls) == groups
    model.generate(input_ids=IDS, max_new_tokens=2, do_sample=False)
    assert len(calls) == 2 * groups


@pytest.mark.parametrize("change", ["in place", "optimizer", "load", "frozen", "scaling", "merge", "mode"])
def test_a_cache_that_is_used_on_after_a_change(change):
    model, cache = adapted(inner=LORA), DynamicCache()
    with torch.no_grad():
        model(input_ids=IDS, past_key_values=cache)
        other = copy.deepcopy(cache)
        if change == "in place":
            disturb(model, seed=9)
        elif change == "load":
            model.load_state_dict({n: p * 1.3 if "lora_" in n else p for n, p in model.state_dict().items()})
        layer = layers_of(model)["model.layers.0.mlp.up_proj"]
        if change == "frozen":
            layer.get_base_layer().weight.mul_(1.7)
        elif change == "scaling":
            layer.host.set_scale("default", 3.0)
        elif change == "merge":
            layer.merge()
        elif change == "mode":
            layer.san_mode = "neuron"
    if change == "optimizer":
        total(output(model)).backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    with torch.no_grad():
        again = model(input_ids=IDS[:, :1], past_key_values=cache).logits
        fresh = copy.deepcopy(model)
        torch.testing.assert_close(again, fresh(input_ids=IDS[:, :1], past_key_values=other).logits, **CLOSE)


@pytest.mark.parametrize("case", ["own", "lora"])
def test_a_static_cache_that_is_emptied_after_weights_were_swapped(case):
    model = adapted(**CASES[case])
    cache = StaticCache(model.config, max_cache_len=12)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "past_key_values": cache}
    before = model.generate(input_ids=IDS, **options)
    cache.reset()
    for parameter in host_parameters(model).values():
        parameter.data.copy_(parameter.data * 2 + 0.5)
    after = model.generate(input_ids=IDS, **options)
    assert torch.equal(after, greedy(model))
    assert not torch.equal(after, before)


def test_dora_takes_no_norms_for_each_token(monkeypatch):
    model = adapted(inner=DORA)
    found = counted(monkeypatch)
    model.generate(input_ids=IDS, max_new_tokens=1, do_sample=False)
    once = len(found)
    model.generate(input_ids=IDS, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert once > 0
    assert len(found) == 2 * once
