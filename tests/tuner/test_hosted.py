"""LoRA and DoRA computed by the layer of SAN give what PEFT's give, and so do their gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.contract.nets import KINDS, Dense, disturb
from torch import nn

from san_peft import SanConfig, SanLayer
from san_peft.tuner import hosted

CASES = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "bias": {"lora_bias": True},
    "dora": {"use_dora": True},
}


def pair(kind: str, dtype: torch.dtype = torch.float32, **options):
    """PEFT's adapter, and the same inside SAN without propagation."""
    net, targets = KINDS[kind], list(KINDS[kind].targets)
    theirs = get_peft_model(net.net(dtype), LoraConfig(r=2, lora_alpha=3, target_modules=targets, **options))
    inner = LoraConfig(r=2, lora_alpha=3, **options)
    mine = get_peft_model(net.net(dtype), SanConfig(inner=inner, target_modules=targets, propagation="none"))
    for model in (theirs, mine):
        disturb(model)
    return net, theirs, mine


def variants(model: nn.Module) -> list:
    return [v for m in model.modules() if isinstance(m, SanLayer) for v in m.host.lora_variant.values()]


@pytest.mark.parametrize("kind", ["dense-lora", "conv2d-lora"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_outputs_and_gradients(kind, case, dropout):
    net, theirs, mine = pair(kind, lora_dropout=dropout, **CASES[case])
    results = []
    for model in (theirs, mine):
        model.train()
        torch.manual_seed(3)
        x = net.input().requires_grad_()
        out = model(x)
        out.square().sum().backward()
        results.append((out.detach(), x.grad, [p.grad for n, p in model.named_parameters() if "lora_" in n]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dense-lora", "conv2d-lora"])
@pytest.mark.parametrize("case", ["lora", "dora"])
def test_half_precision(kind, case):
    net, theirs, mine = pair(kind, torch.bfloat16, **CASES[case])
    with torch.no_grad():
        torch.testing.assert_close(
            mine(net.input(torch.bfloat16)), theirs(net.input(torch.bfloat16)), rtol=0.03, atol=0.03
        )


@pytest.mark.parametrize("case", ["lora", "dora"])
def test_two_active_adapters(case):
    _, theirs, mine = pair("dense-lora", **CASES[case])
    torch.manual_seed(6)
    theirs.add_adapter("second", LoraConfig(r=3, target_modules=["fc1"], **CASES[case]))
    torch.manual_seed(6)
    mine.add_adapter(
        "second", SanConfig(inner=LoraConfig(r=3, **CASES[case]), target_modules=["fc1"], propagation="none")
    )
    results = []
    for model in (theirs, mine):
        disturb(model, "second", seed=4)
        model.base_model.set_adapter(["default", "second"])
        out = model(KINDS["dense"].input())
        out.square().sum().backward()
        results.append((out.detach(), [p.grad for n, p in model.named_parameters() if "lora_" in n]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


def test_a_row_of_zeros_under_dora():
    """PEFT divides its magnitude by the norm of the adapted row, which is that of the update alone."""
    net = Dense()
    net.fc1.weight.data[2] = 0
    torch.manual_seed(6)
    theirs = get_peft_model(copy.deepcopy(net), LoraConfig(r=2, target_modules=["fc1"], use_dora=True))
    inner = LoraConfig(r=2, use_dora=True)
    torch.manual_seed(6)
    mine = get_peft_model(net, SanConfig(inner=inner, target_modules=["fc1"], propagation="none"))
    for model in (theirs, mine):
        disturb(model)
    x = KINDS["dense"].input()
    torch.testing.assert_close(mine(x), theirs(x), rtol=1e-4, atol=1e-4)
    layer = mine.base_model.model.fc1
    norms = layer.get_base_layer().weight.norm(dim=1)
    magnitude = layer.host.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(layer.get_scale()[2], 1 + magnitude[2] / (0.1 * norms.median()))


def test_nothing_of_the_host_is_patched():
    """After SAN every attribute of a host is PEFT's own."""
    for case in ("lora", "dora"):
        _, theirs, mine = pair("dense-lora", **CASES[case])
        mine(KINDS["dense"].input())
        for name in KINDS["dense-lora"].targets:
            host, own = mine.base_model.model.get_submodule(name).host, theirs.base_model.model.get_submodule(name)
            assert vars(host).keys() == vars(own).keys()
            assert type(host) is type(own)
            assert {k: type(v) for k, v in host.lora_variant.items()} == {
                k: type(v) for k, v in own.lora_variant.items()
            }


def test_other_variants_run_themselves():
    inner = LoraConfig(r=2, init_lora_weights="mica")
    mine = get_peft_model(Dense(), SanConfig(inner=inner, target_modules=["fc1"], propagation="none"))
    assert [type(v).__name__ for v in variants(mine)] == ["MiCALinearVariant"]
    assert mine.base_model.model.fc1._runs_here() is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("nothing", 3),
        ("hook", 2),
        ("backward hook", 2),
        ("autocast", 3),
        ("dropout", 3),
        ("bias", 0),
        ("half", 3),
        ("eval dropout", 3),
    ],
)
@pytest.mark.parametrize("case", ["lora", "dora"])
def test_layers_that_are_taken_in_one_pass(case, change, expected, monkeypatch):
    if (case, change) == ("dora", "bias"):
        pytest.skip("PEFT has no DoRA with lora_bias")
    options = {"lora_dropout": 0.1} if "dropout" in change else {"lora_bias": True} if change == "bias" else {}
    dtype = torch.bfloat16 if change == "half" else torch.float32
    _, _, model = pair("dense-lora", dtype, **CASES[case], **options)
    model.train("eval" not in change)
    calls = []
    original = hosted.adapted_linear
    monkeypatch.setattr(hosted, "adapted_linear", lambda *args: calls.append(args) or original(*args))
    lora_A = model.base_model.model.fc1.host.lora_A["default"]
    if change == "hook":
        lora_A.register_forward_hook(lambda module, args, out: None)
    if change == "backward hook":
        lora_A.register_full_backward_hook(lambda module, grad_input, grad_output: None)
    with torch.autocast("cpu", enabled=change == "autocast"):
        model(KINDS["dense"].input(dtype))
    assert len(calls) == expected
