"""What diffusers and PEFT's tools ask of every layer: strengths, and conversion to LoRA."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.conversion import convert_to_lora
from peft.tuners.lora.conversion import save_as_lora as peft_save_as_lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.hotswap import hotswap_adapter
from tests.contract.nets import KINDS, adapted
from tests.tuner.hosted import logits, small_llama
from torch import nn

from san_peft import SanConfig, merge_and_verify

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def set_adapters(model: nn.Module, names: list[str], weights: list[float]) -> None:
    """As `set_adapters` of diffusers does it."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(names)
            for name, weight in zip(names, weights, strict=True):
                module.set_scale(name, weight)


@pytest.mark.parametrize("kind", ["dense", "conv2d", "dense-lora", "dense-dora"])
def test_strengths_of_several_adapters(kind):
    case = KINDS[kind]
    x = case.input()
    model = adapted(case, modules_to_save=None)
    frozen, one = case.net()(x), model(x)
    set_adapters(model, ["default"], [1.0])
    assert torch.equal(model(x), one)
    if kind != "dense-dora":  # whose magnitude has no strength in PEFT either
        set_adapters(model, ["default"], [0.0])
        torch.testing.assert_close(model(x), frozen)
    set_adapters(model, ["default"], [0.5])
    half = model(x)
    assert (half - one).abs().max() > 1e-3
    merged = merge_and_verify(model, x).model
    torch.testing.assert_close(merged(x), half, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- PEFT's conversion to LoRA


def test_layers_without_a_bias_convert(tmp_path):
    model = get_peft_model(small_llama(), SanConfig(target_modules=LINEAR, modules_to_save=["lm_head"]))
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    expected = logits(model.eval())
    assert model.supports_lora_conversion()
    _, state = convert_to_lora(model, rank=2)
    assert len([name for name in state if ".lora_A." in name]) == 2 * len(LINEAR)
    peft_save_as_lora(tmp_path, model, rank=1.0)
    again = PeftModel.from_pretrained(small_llama(), tmp_path).eval()
    assert again.peft_config["default"].peft_type == "LORA"
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "reason"), [("dense", "changes its bias"), ("conv1d", "is a convolution"), ("dense-lora", "has a host")]
)
@pytest.mark.filterwarnings("ignore:PEFT's conversion")
def test_what_peft_would_lose_is_not_converted(kind, reason):
    model = adapted(KINDS[kind], modules_to_save=None)
    with pytest.warns(UserWarning, match=rf"{reason}\. Use san_peft\.save_as_lora"):
        assert not model.supports_lora_conversion()
    with pytest.raises(TypeError, match=r"do not support LoRA conversion.*SanLayer"):
        convert_to_lora(model, rank=2)


def test_a_layer_that_only_reads_scales_is_not_converted():
    model = get_peft_model(small_llama(), SanConfig(target_modules=["up_proj"]))
    with pytest.warns(UserWarning, match="down_proj is not a target"):
        assert not model.supports_lora_conversion()


def test_hotswap_of_peft_says_that_it_takes_lora_alone(tmp_path):
    model = get_peft_model(small_llama(), SanConfig(target_modules=LINEAR))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"Hotswapping only supports .*LORA.* but SAN was passed"):
        hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")
    lora = get_peft_model(small_llama(), LoraConfig(r=2, target_modules=LINEAR))
    with pytest.raises(ValueError, match="Incompatible PEFT types found: LORA and SAN"):
        hotswap_adapter(lora, str(tmp_path), "default", torch_device="cpu")
