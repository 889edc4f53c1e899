"""The decomposition `feature`: where its moments come from, what they do, and what keeps them."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.contract.nets import disturb
from tests.tuner.hosted import IDS
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from san_peft import AdapterError, SanConfig, SanError, SanLayer, hotswap, merge_and_verify

torch.set_num_threads(1)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    return LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=4, num_key_value_heads=2, attention_dropout=0.5))


def feature(net: nn.Module | None = None, inner: Any = None, moved: bool = True, **options: Any) -> PeftModel:
    """A model with a host that has been trained, and moments of one."""
    config = SanConfig(inner=inner or LoraConfig(r=2), decomposition="feature", **options)
    model = get_peft_model(llama() if net is None else net, config).eval()
    if moved:
        disturb(model)
    return model


def layers(model: nn.Module) -> dict[str, SanLayer]:
    return {layer.san_name: layer for layer in model.modules() if isinstance(layer, SanLayer)}


def moments(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    return {name: layer.san_host[adapter].moments.clone() for name, layer in layers(model).items()}


def calibrated(model: nn.Module) -> bool:
    return all(not bool((value == 1).all()) for value in moments(model).values())


def test_moments_are_those_of_the_inputs_of_all_batches():
    model = feature(moved=False)  # the identity: inputs are those of the frozen model
    batches = [torch.randint(0, 32, (2, 5), generator=torch.Generator().manual_seed(n)) for n in range(3)]
    seen: dict[str, list[Tensor]] = {}
    frozen = llama().eval()
    for name, module in frozen.named_modules():
        if name in layers(model):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0]))
    with torch.no_grad():
        for ids in batches:
            frozen(ids)
    model.base_model.calibrate([{"input_ids": ids} for ids in batches])
    for name, found in moments(model).items():
        expected = torch.cat(seen[name]).flatten(0, 1).square().mean(0)
        torch.testing.assert_close(found, expected / expected.mean())


def test_a_layer_s_scale_follows_its_definition():
    model = feature()
    model.base_model.calibrate([IDS])
    for layer in layers(model).values():
        weight, host, c = layer.get_base_layer().weight, layer.host, layer.san_host["default"].moments
        a, b = host.lora_A["default"].weight, host.lora_B["default"].weight
        norm = (weight.square() @ c).sqrt()
        norm = torch.maximum(norm, 0.1 * norm.median())
        expected = 1 + host.scaling["default"] * (b * (weight @ (a * c).T)).sum(1) / norm.square()
        torch.testing.assert_close(layer.get_scale(), expected)
        assert (layer.get_scale() - 1).abs().max() > 1e-3


def test_before_calibration_it_is_projection():
    model = get_peft_model(llama(), SanConfig(inner=LoraConfig(r=2), decomposition="projection")).eval()
    disturb(model)
    torch.testing.assert_close(feature()(IDS).logits, model(IDS).logits)


def test_the_first_training_batch_calibrates_and_no_other():
    model = feature(moved=False)
    model(IDS)
    with torch.no_grad():
        model.train()(IDS)
    assert not calibrated(model)
    state, before = torch.get_rng_state(), copy.deepcopy(model)
    model(IDS)
    after = torch.get_rng_state()
    assert calibrated(model)
    assert all(module.training for module in model.modules())
    torch.set_rng_state(state)
    for layer in layers(before).values():
        layer.san_host["default"].moments.fill_(0.5)
    before(IDS)
    assert torch.equal(torch.get_rng_state(), after)  # dropout draws what it would draw without calibration
    first = moments(model)
    model(IDS + 1)
    torch.testing.assert_close(moments(model), first, rtol=0, atol=0)


def test_gradients_flow_and_a_step_changes_scales():
    model = feature(moved=False).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0)
    before = {name: layer.get_scale().detach() for name, layer in layers(model).items()}
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert any((layer.get_scale() - before[name]).abs().max() > 0 for name, layer in layers(model).items())
    assert not any("moments" in name for name, _ in model.named_parameters())


def test_saved_loaded_swapped_and_not_measured_again(tmp_path):
    model = feature()
    model.base_model.calibrate([IDS])
    expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    for empty in (False, True):
        loaded = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True, low_cpu_mem_usage=empty).eval()
        assert torch.equal(loaded(IDS).logits, expected)
        loaded.train()(IDS + 1)
        torch.testing.assert_close(moments(loaded), moments(model), rtol=0, atol=0)
    other = feature()
    hotswap(other, tmp_path)
    assert torch.equal(other(IDS).logits, expected)


def test_merging():
    model = feature()
    model.base_model.calibrate([IDS])
    expected = model(IDS).logits
    assert merge_and_verify(model, {"input_ids": IDS}).relative < 1e-3
    model = feature()
    model.base_model.calibrate([IDS])
    model.merge_adapter()
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(AdapterError, match="'default' is merged"):
        model.base_model.calibrate([IDS])


@pytest.mark.parametrize(
    "inner",
    [
        peft.VeraConfig(r=4),
        peft.LoHaConfig(r=2),
        peft.LoKrConfig(r=2),
        peft.OFTConfig(r=0, oft_block_size=2, use_cayley_neumann=False),
        peft.HRAConfig(r=2),
    ],
    ids=lambda inner: inner.peft_type.value,
)
def test_other_hosts(inner):
    model = feature(inner=inner)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.4 - 0.2)
    before = {name: layer.get_scale().detach() for name, layer in layers(model).items()}
    model.base_model.calibrate([IDS])
    for name, layer in layers(model).items():
        weight, host, c = layer.get_base_layer().weight, layer.host, layer.san_host["default"].moments
        delta = host.get_delta_weight("default")
        change = weight @ delta - weight if inner.peft_type.value in ("OFT", "HRA") else delta
        norm = (weight.square() @ c).sqrt()
        norm = torch.maximum(norm, 0.1 * norm.median())
        torch.testing.assert_close(layer.get_scale(), 1 + (change * weight) @ c / norm.square(), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(layer.get_scale(), before[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["conv2d", "conv1d"])
def test_convolutions(kind):
    conv, axes = (nn.Conv2d, 2) if kind == "conv2d" else (nn.Conv1d, 1)
    torch.manual_seed(0)
    net = nn.Sequential(conv(3, 6, 3, padding=1), nn.ReLU(), conv(6, 4, 3))
    model = get_peft_model(
        net,
        SanConfig(target_modules=["0", "2"], inner=LoraConfig(r=2), decomposition="feature", propagation="none"),
    )
    disturb(model.eval())
    x = torch.randn(5, 3, *[8] * axes)
    model.base_model.calibrate([x])
    layer = layers(model)["0"]
    expected = x.square().mean([0, *range(2, 2 + axes)])
    torch.testing.assert_close(layer.san_host["default"].moments, expected / expected.mean())
    columns = layer.san_host["default"].columns()
    weight = layer.get_base_layer().weight.flatten(1)
    delta = layer.host.get_delta_weight("default").flatten(1)
    norm = (weight.square() @ columns).sqrt()
    norm = torch.maximum(norm, 0.1 * norm.median())
    torch.testing.assert_close(layer.get_scale(), 1 + (delta * weight) @ columns / norm.square(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing(reentrant):
    model = feature().train()
    plain = copy.deepcopy(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for one in (model, plain):
        torch.manual_seed(1)
        one(IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(moments(model), moments(plain))
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        if mine.requires_grad:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_half_precision_keeps_the_moments():
    model = feature()
    model.base_model.calibrate([IDS])
    before = moments(model)
    torch.testing.assert_close(moments(model.to(torch.bfloat16)), before, rtol=0, atol=0)
    assert model(IDS).logits.dtype == torch.bfloat16


def test_combined_adapters_have_the_mean_of_the_moments():
    model = feature()
    model.add_adapter("other", SanConfig(inner=LoraConfig(r=2), decomposition="feature"))
    disturb(model, seed=4)
    model.base_model.calibrate([IDS])
    model.set_adapter("other")
    model.base_model.calibrate([IDS + 1], "other")
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both", combination_type="cat")
    both, one, two = (moments(model, name) for name in ("both", "default", "other"))
    torch.testing.assert_close(both, {name: (one[name] + two[name]) / 2 for name in both})


def test_errors():
    model = feature()
    with pytest.raises(SanError, match="at least one batch"):
        model.base_model.calibrate([])
    with pytest.raises(AdapterError, match="'other' does not exist; there are default"):
        model.base_model.calibrate([IDS], "other")
    with torch.no_grad():
        model.get_input_embeddings().weight[IDS[0, 0]] = torch.inf
    with pytest.raises(SanError, match=r"model\.layers\.0.* not finite"):
        model.base_model.calibrate([IDS])
    assert not any((value != 1).any() for value in moments(model).values())
    plain = get_peft_model(llama(), SanConfig(inner=LoraConfig(r=2)))
    with pytest.raises(AdapterError, match="decomposition='norm'"):
        plain.base_model.calibrate([IDS])


@pytest.mark.parametrize(
    ("inner", "match"),
    [
        (LoraConfig(r=2, use_dora=True), "use_dora"),
        (peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "IA3 .* vector"),
    ],
)
def test_hosts_without_a_feature_scale(inner, match):
    with pytest.raises(AdapterError, match=match):
        SanConfig(inner=inner, decomposition="feature")
