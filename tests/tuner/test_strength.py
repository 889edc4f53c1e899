"""The strength of an adapter at run time: `set_scale`, `scale_layer`, `unscale_layer`."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting, rescale_adapter_scale
from tests.contract.nets import KINDS, adapted, disturb
from tests.tuner.passes import CASES, CLOSE, alone, check_law, output
from tests.tuner.passes import adapted as language_model

from san_peft import SanConfig, SanError, SanLayer
from san_peft.functional import strengthen


def layers_of(model) -> list[SanLayer]:
    return [m for m in model.modules() if isinstance(m, SanLayer)]


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0, 2.0])
def test_own_scales_to_a_power(strength):
    model = adapted(KINDS["dense"], shift=True).double()
    layers = [layer for layer in layers_of(model) if "default" in layer.san_scale]
    before = [(layer.get_scale(), layer.get_shift()) for layer in layers]
    model.base_model.set_scale("default", strength)
    for layer, (scale, shift) in zip(layers, before, strict=True):
        torch.testing.assert_close(layer.get_scale(), scale**strength)
        torch.testing.assert_close(layer.get_shift(), shift * strength)
    x = KINDS["dense"].input(torch.float64)
    out = model(x)
    with alone(model):
        torch.testing.assert_close(model(x), out, **CLOSE)
    merged = copy.deepcopy(model)
    merged.merge_adapter()
    torch.testing.assert_close(merged(x), out, **CLOSE)
    with pytest.raises(SanError, match="merged"):
        merged.base_model.set_scale("default", 1.0)
    model.base_model.set_scale("default", 1.0)
    assert [layer.strengths for layer in layers] == [(1.0,)] * len(layers)


def test_no_strength_is_the_frozen_model():
    model = adapted(KINDS["dense"], modules_to_save=None, shift=True)
    layers_of(model)[0].san_scale["default"].weight.data[:2] = torch.tensor([-1.0, -3.0])
    x = KINDS["dense"].input()
    model.base_model.set_scale("default", 0.0)
    with model.disable_adapter():
        expected = model(x)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("case", ["own", "shift", "lora", "all"])
def test_passes_gradients_and_layers_by_themselves(case):
    model = language_model(**CASES[case])
    model.base_model.set_scale("default", 0.5)
    check_law(model)


@pytest.mark.parametrize("case", ["lora", "projection"])
def test_a_host_has_its_own_strength_and_the_scale_follows(case):
    model = language_model(**CASES[case])
    layers = [layer for layer in layers_of(model) if "default" in layer.san_host]
    model.base_model.set_scale("default", 0.0)
    assert all(torch.equal(layer.get_scale(), torch.ones_like(layer.get_scale())) for layer in layers)
    model.base_model.set_scale("default", 0.25)
    quarter, scales = output(model), [layer.get_scale() for layer in layers]
    model.base_model.set_scale("default", 1.0)
    full = output(model)
    with rescale_adapter_scale(model, 0.25):
        torch.testing.assert_close(output(model), quarter, **CLOSE)
        for layer, scale in zip(layers, scales, strict=True):
            torch.testing.assert_close(layer.get_scale(), scale, **CLOSE)
    torch.testing.assert_close(output(model), full, **CLOSE)
    assert not torch.allclose(full, quarter, rtol=1e-3)


def test_relative_strength_as_code_that_goes_through_all_layers_sets_it():
    model = language_model(**CASES["all"])
    model.base_model.set_scale("default", 0.5)
    expected = output(model)
    model.base_model.set_scale("default", 1.0)
    tuners = [m for m in model.modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)]
    for module in tuners:
        module.scale_layer(0.5)
    torch.testing.assert_close(output(model), expected, **CLOSE)
    for module in tuners:
        module.unscale_layer(0.5)
    full = output(model)
    for module in tuners:
        module.scale_layer(0.3)
        module.unscale_layer()
    torch.testing.assert_close(output(model), full, **CLOSE)


def test_what_has_no_strength_changes_nothing():
    model = adapted(KINDS["dense"])
    with pytest.raises(SanError, match=r"finite and not negative, got -1"):
        model.base_model.set_scale("default", -1.0)
    with pytest.raises(SanError, match=r"'other'.*there are default"):
        model.base_model.set_scale("other", 0.5)
    layers_of(model)[0].set_scale("other", 0.5)  # no part here, as PEFT passes it over
    hosted = get_peft_model(
        KINDS["dense"].net(),
        SanConfig(
            inner=peft.IA3Config(feedforward_modules=[]),
            target_modules=["fc1", "fc2"],
            propagation="none",
            own_scale=True,
        ),
    )
    with pytest.raises(SanError, match="IA3 host"):
        hosted.base_model.set_scale("default", 0.5)
    assert all(layer.strengths in ((), (1.0,)) for layer in layers_of(hosted))


def test_strengths_multiply():
    scale = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(strengthen(strengthen(scale, 0.5), 3.0), strengthen(scale, 1.5))


def test_compiled_code_follows():
    torch.compiler.reset()
    model = adapted(KINDS["dense"], shift=True)
    compiled, x = torch.compile(model, backend="aot_eager"), KINDS["dense"].input()
    with torch.no_grad():
        compiled(x)
        for strength in (0.5, 1.0):
            model.base_model.set_scale("default", strength)
            torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("inner", [None, LoraConfig(r=2), LoraConfig(r=2, use_dora=True)])
def test_inputs_that_are_not_cast(inner):
    model = get_peft_model(
        KINDS["dense"].net(), SanConfig(target_modules=["fc1", "fc2"], propagation=KINDS["dense"].graph(), inner=inner)
    )
    disturb(model)
    x = KINDS["dense"].input()
    expected = model(x)
    with disable_input_dtype_casting(model):
        torch.testing.assert_close(model(x), expected)
    assert all(layer.cast_input_dtype_enabled for layer in layers_of(model))


@pytest.mark.parametrize("name", ["dense", "dense-lora", "attention"])
def test_status_of_layers(name):
    model = adapted(KINDS[name], modules_to_save=None)
    found = model.get_layer_status()
    hosts = sum(layer.host is not None for layer in layers_of(model))
    assert len(found) == len(layers_of(model)) + hosts
    assert all(s.enabled and s.active_adapters == ["default"] for s in found)
    status = model.get_model_status()
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    assert status.num_adapter_layers == len(found)
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]
