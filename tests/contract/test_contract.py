"""What PEFT users expect of a tuner, for every kind of layer in two precisions."""

from __future__ import annotations

import copy
import dataclasses
import warnings

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from tests.contract.nets import CLOSE, adapted, disturb, ours, outputs

from san_peft import SanConfig, SanError, SanLayer, merge_and_verify
from san_peft.tuner.frozen import stored_weight


def test_start_is_the_base_model_bit_for_bit(kind, dtype, shift):
    before = outputs(kind.net(dtype), kind, dtype)
    model = get_peft_model(kind.net(dtype), kind.config(shift=shift, gate=True)).eval()
    assert model.base_model.propagation_graph.edges
    assert torch.equal(outputs(model, kind, dtype), before)


def test_adapter_changes_the_output_and_keeps_its_type(kind, dtype):
    model = adapted(kind, dtype)
    out = outputs(model, kind, dtype)
    assert out.dtype == dtype
    assert not torch.allclose(out, outputs(kind.net(dtype), kind, dtype), rtol=1e-2)


def test_vectors_are_float32_and_only_they_and_the_head_are_trained(kind, dtype):
    model = get_peft_model(kind.net(dtype), kind.config(shift=True))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(any(part in n for part in ("san_", "lora_", "head.modules_to_save")) for n in trained)
    assert sum("san_scale" in n for n in trained) == len(kind.targets)
    assert sum("lora_A" in n for n in trained) == (len(kind.targets) if kind.inner else 0)
    assert all(p.dtype == torch.float32 for n, p in trained.items() if ours(n))
    half = get_peft_model(kind.net(torch.bfloat16), kind.config(), autocast_adapter_dtype=False)
    assert all(p.dtype == torch.bfloat16 for n, p in half.named_parameters() if ours(n))
    scale = next(m for m in half.modules() if isinstance(m, SanLayer)).get_scale()
    assert scale.dtype == torch.float32


def test_a_host_adds_no_parameter_of_san(kind):
    if kind.inner is None:
        pytest.skip("own scales are parameters of SAN")
    model = get_peft_model(kind.net(), kind.config(modules_to_save=None))
    host = get_peft_model(kind.net(), dataclasses.replace(kind.inner(), target_modules=list(kind.targets)))
    assert not any("san_" in name for name, _ in model.named_parameters())
    assert model.get_nb_trainable_parameters() == host.get_nb_trainable_parameters()
    assert model.base_model.propagation_graph.edges


def test_every_vector_gets_a_gradient(kind, dtype):
    model = get_peft_model(kind.net(dtype), kind.config(shift=True, gate=True)).train()
    disturb(model)  # at the start LoRA's A has no gradient
    model(kind.input(dtype)).float().square().sum().backward()
    for name, parameter in model.named_parameters():
        if ours(name):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("low", [False, True], ids=["", "low_cpu_mem_usage"])
def test_save_and_reload(kind, dtype, shift, low, tmp_path):
    model = adapted(kind, dtype, shift=shift, gate=True)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(kind.net(dtype), tmp_path, low_cpu_mem_usage=low).eval()
    if low and kind.inner is not None:  # tensors read in place are aligned otherwise, which changes how sums are taken
        torch.testing.assert_close(outputs(again, kind, dtype), outputs(model, kind, dtype), **CLOSE[dtype])
        if dtype == torch.float32:  # else PEFT rounds a host's tensors to the type of the frozen layer
            assert all(torch.equal(v, model.state_dict()[n]) for n, v in again.state_dict().items())
    else:
        assert torch.equal(outputs(again, kind, dtype), outputs(model, kind, dtype))
    assert again.base_model.propagation_graph == model.base_model.propagation_graph
    assert not any(p.is_meta for p in again.parameters())
    assert not any(p.requires_grad for p in again.parameters())


def test_names_in_the_state_dict(kind):
    state = get_peft_model_state_dict(adapted(kind, shift=True))
    expected = {f"base_model.model.{t}.san_{v}.weight" for t in kind.targets for v in ("scale", "shift")}
    if kind.inner is not None:
        parts = ("A", "B", "magnitude_vector") if kind.inner().use_dora else ("A", "B")
        expected |= {f"base_model.model.{t}.base_layer.lora_{p}.weight" for t in kind.targets for p in parts}
    assert {name for name in state if "head" not in name} == expected


@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unmerge(kind, dtype, shift, safe):
    model = adapted(kind, dtype, shift=shift)
    before = outputs(model, kind, dtype)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.merge_adapter(safe_merge=safe)
    assert all(m.merged for m in model.modules() if isinstance(m, SanLayer))
    torch.testing.assert_close(outputs(model, kind, dtype), before, **CLOSE[dtype])
    model.unmerge_adapter()
    assert torch.equal(outputs(model, kind, dtype), before)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_merge_and_unload_gives_the_plain_model(kind, dtype, shift):
    model = adapted(kind, dtype, shift=shift)
    before = outputs(model, kind, dtype)
    plain = model.merge_and_unload(safe_merge=True)
    assert type(plain) is type(kind.net())
    assert not any(isinstance(m, SanLayer) for m in plain.modules())
    torch.testing.assert_close(outputs(plain, kind, dtype), before, **CLOSE[dtype])


def test_unload_gives_the_base_model_back(kind, dtype):
    plain = adapted(kind, dtype).unload()
    assert torch.equal(outputs(plain, kind, dtype), outputs(kind.net(dtype), kind, dtype))
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in kind.net().named_parameters()]


def test_disable_adapter(kind, dtype):
    model = adapted(kind, dtype)
    before = outputs(model, kind, dtype)
    with model.disable_adapter():
        assert torch.equal(outputs(model, kind, dtype), outputs(kind.net(dtype), kind, dtype))
    assert torch.equal(outputs(model, kind, dtype), before)


def test_disabling_a_merged_adapter_unmerges_it(kind):
    model = adapted(kind)
    model.merge_adapter()
    with model.disable_adapter():
        base = outputs(model, kind, torch.float32)
    torch.testing.assert_close(base, outputs(kind.net(), kind, torch.float32), **CLOSE[torch.float32])


def test_two_adapters(kind, dtype):
    model = adapted(kind, dtype)
    first = outputs(model, kind, dtype)
    model.add_adapter("second", kind.config(shift=True))
    assert torch.equal(outputs(model, kind, dtype), first), "adding one changes nothing"
    disturb(model, "second", seed=1)
    model.set_adapter("second")
    second = outputs(model, kind, dtype)
    assert not torch.allclose(first, second, rtol=1e-2)
    model.set_adapter("default")
    assert torch.equal(outputs(model, kind, dtype), first)
    model.delete_adapter("second")
    assert torch.equal(outputs(model, kind, dtype), first)
    assert not any("second" in name for name, _ in model.named_parameters())
    assert all("second" not in m.san_incoming for m in model.modules() if isinstance(m, SanLayer))


def test_adding_an_adapter_trains_only_the_active_one(kind):
    model = get_peft_model(kind.net(), kind.config(gate=True))
    model.add_adapter("second", kind.config(gate=True))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".default." in name for name in trained)
    model.set_adapter("second")
    trained = {n for n, p in model.named_parameters() if p.requires_grad and ours(n)}
    assert all(".second." in name for name in trained)
    assert any("san_gate" in name for name in trained)


def test_several_active_adapters_multiply_and_merge_in_any_order(kind, shift):
    if kind.inner is not None and kind.inner().use_dora:
        pytest.skip("PEFT applies several DoRA adapters one after the other, so their order matters")
    model = adapted(kind, shift=shift, modules_to_save=None)
    model.add_adapter("second", kind.config(shift=shift, modules_to_save=None))
    disturb(model, "second", seed=1)
    tuner = model.base_model
    tuner.set_adapter(["default", "second"])
    both = outputs(model, kind, torch.float32)
    tuner.set_adapter(["second", "default"])
    torch.testing.assert_close(outputs(model, kind, torch.float32), both, **CLOSE[torch.float32])
    for order in (["default", "second"], ["second", "default"]):
        other = copy.deepcopy(model)
        other.base_model.merge_adapter(adapter_names=order)
        torch.testing.assert_close(outputs(other, kind, torch.float32), both, **CLOSE[torch.float32])
        other.base_model.unmerge_adapter()
        torch.testing.assert_close(outputs(other, kind, torch.float32), both, **CLOSE[torch.float32])


def test_mixed_batch(kind, dtype):
    if kind.inner is not None and kind.inner().use_dora:
        pytest.skip("PEFT's DoRA has no mixed batches")
    model = adapted(kind, dtype)
    if "attn" in kind.targets:
        with pytest.raises(SanError, match="adapter_names cannot be used here"):
            outputs(model, kind, dtype, adapter_names=["default"] * 4)
        return
    model.add_adapter("second", kind.config(shift=True))
    disturb(model, "second", seed=1)
    names = ["default", "__base__", "second", "default"]
    mixed = outputs(model, kind, dtype, adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = outputs(model, kind, dtype)
        else:
            model.set_adapter(name)
            alone = outputs(model, kind, dtype)
        torch.testing.assert_close(mixed[row], alone[row], **CLOSE[dtype])


def test_mixed_batch_refuses_what_cannot_be(kind):
    model = adapted(kind)
    with pytest.raises(ValueError, match="non-existing adapter"):
        outputs(model, kind, torch.float32, adapter_names=["nobody"] * 4)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        outputs(model, kind, torch.float32, adapter_names=["default"] * 4)
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="training mode"):
        model.train()(kind.input(), adapter_names=["default"] * 4)


def test_deleting_a_merged_adapter_is_refused(kind):
    model = adapted(kind)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("default")


def test_merging_twice_warns(kind):
    model = adapted(kind)
    model.merge_adapter()
    before = outputs(model, kind, torch.float32)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    assert torch.equal(outputs(model, kind, torch.float32), before)


def test_safe_merge_finds_nan_before_anything_is_touched(kind):
    model = adapted(kind)
    layers = [m for m in model.modules() if isinstance(m, SanLayer) and m.get_scale() is not None]
    last = layers[-1]
    vector = last.san_scale["default"].weight if kind.inner is None else last.host.lora_B["default"].weight
    vector.data[0] = float("nan")
    weights = [stored_weight(layer.get_base_layer()).clone() for layer in layers]
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)
    assert not any(layer.merged for layer in layers)
    assert all(torch.equal(stored_weight(layer.get_base_layer()), w) for layer, w in zip(layers, weights, strict=True))


def test_unmerge_restores_the_weights_even_if_training_went_on(kind):
    model = adapted(kind)
    base = {n: stored_weight(m.get_base_layer()).clone() for n, m in model.named_modules() if isinstance(m, SanLayer)}
    model.merge_adapter()
    merged = outputs(model, kind, torch.float32)
    disturb(model, seed=5)
    assert torch.equal(outputs(model, kind, torch.float32), merged), "what is merged is a copy"
    model.unmerge_adapter()
    for name, weight in base.items():
        assert torch.equal(stored_weight(model.get_submodule(name).get_base_layer()), weight)


def test_a_scale_of_zero_can_be_unmerged(kind):
    model = adapted(kind, own_scale=True)
    layer = next(m for m in model.modules() if isinstance(m, SanLayer))
    layer.san_scale["default"].weight.data[0] = -1.0  # the offset from one
    before, weight = outputs(model, kind, torch.float32), stored_weight(layer.get_base_layer()).clone()
    model.merge_adapter()
    torch.testing.assert_close(outputs(model, kind, torch.float32), before, **CLOSE[torch.float32])
    model.unmerge_adapter()
    assert torch.equal(stored_weight(layer.get_base_layer()), weight)


@pytest.mark.parametrize("mode", ["both", "neuron", "synapse", "off"])
def test_modes(kind, mode):
    model = adapted(kind, shift=True)
    full = outputs(model, kind, torch.float32)
    with model.base_model.set_mode(mode):
        out = outputs(model, kind, torch.float32)
    if mode == "both":
        assert torch.equal(out, full)
    elif mode == "off":
        with model.disable_adapter():
            trained_head = model.base_model.model.head
            trained_head.enable_adapters(True)
            assert torch.equal(out, outputs(model, kind, torch.float32))
    else:
        assert not torch.allclose(out, full, rtol=1e-3)
    assert torch.equal(outputs(model, kind, torch.float32), full), "the mode before is back"


def test_modes_are_propagation_alone_and_scales_alone(kind):
    """`neuron` equals the same vectors without edges; `neuron` and `synapse` together make `both`."""
    model = adapted(kind)
    alone = get_peft_model(kind.net(), kind.config(propagation="none")).eval()
    disturb(alone)
    with model.base_model.set_mode("neuron"):
        torch.testing.assert_close(
            outputs(model, kind, torch.float32), outputs(alone, kind, torch.float32), rtol=0, atol=0
        )


def test_injection_without_a_wrapper(kind):
    model = inject_adapter_in_model(kind.config(), kind.net())
    assert isinstance(model, type(kind.net()))
    disturb(model)
    expected = adapted(kind)
    assert torch.equal(outputs(model, kind, torch.float32), outputs(expected, kind, torch.float32))


def test_status(kind):
    model = adapted(kind, gate=True, modules_to_save=None)
    status = model.get_model_status()
    assert (status.peft_types, status.active_adapters) == ({"default": "SAN"}, ["default"])
    assert status.merged_adapters == []
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]


def test_weighted_adapters(kind):
    if kind.inner is not None:
        pytest.skip("hosts are combined by PEFT's own add_weighted_adapter: see tests/tuner/test_hosts.py")
    model = adapted(kind, shift=True, modules_to_save=None)
    model.add_adapter("second", kind.config(shift=True, modules_to_save=None))
    disturb(model, "second", seed=1)
    tuner = model.base_model
    tuner.add_weighted_adapter(["default", "second"], [0.25, 0.5], "linear")
    tuner.add_weighted_adapter(["default", "second"], [1.0, 1.0], "product", combination_type="product")
    for layer in (m for m in model.modules() if isinstance(m, SanLayer) and "default" in m.san_scale):
        a, b = layer.get_scale("default"), layer.get_scale("second")
        torch.testing.assert_close(layer.get_scale("linear") - 1, 0.25 * (a - 1) + 0.5 * (b - 1))
        torch.testing.assert_close(layer.get_scale("product"), a * b)
        shifts = layer.get_shift("default"), layer.get_shift("second")
        torch.testing.assert_close(layer.get_shift("linear"), 0.25 * shifts[0] + 0.5 * shifts[1])
    assert model.peft_config["product"].edges == model.peft_config["default"].edges


def test_merge_and_verify(kind, dtype, shift):
    model = adapted(kind, dtype, shift=shift)
    before = outputs(model, kind, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = merge_and_verify(model, (kind.input(dtype),))
    assert report.layers >= len(kind.targets)
    assert 0 <= report.max_abs_difference <= report.tolerance
    torch.testing.assert_close(outputs(report.model, kind, dtype), before, **CLOSE[dtype])
    assert type(report.model) is type(kind.net())


def test_peft_version_is_in_reach():
    assert "SAN" in {str(t.value) for t in peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING}
    assert SanConfig().peft_type == "SAN"
