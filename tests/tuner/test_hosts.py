"""Adapters of other methods as hosts of SAN: what their scale is, where it goes, and that nothing else changes."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.contract.nets import KINDS, Dense
from tests.tuner.hosted import (
    CASES,
    HOSTS,
    IDS,
    LLAMA,
    ROTATIONS,
    config,
    host_parameters,
    layers_of,
    rows,
    run,
    small_llama,
    trained,
)
from torch import Tensor, nn

from san_peft import SanConfig, merge_and_verify, trace
from san_peft.tuner import fill

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(projection_prng_key|full delta weight|has no bias|already found).*", "ignore:Setting.*save_projection"
)


@pytest.mark.parametrize(("kind", "host"), CASES)
def test_the_start_is_the_base_model(kind, host):
    torch.manual_seed(0)
    model = get_peft_model(KINDS[kind].net(), config(kind, host)).eval()
    before, after = run(KINDS[kind].net(), kind), run(model, kind)
    if host in ("pissa", "olora", "hra", "oft"):  # these start at the base model up to rounding by themselves
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(after, before)
    assert model.base_model.propagation_graph.edges
    assert not any("san_" in name for name in host_parameters(model))


@pytest.mark.parametrize(("kind", "host"), CASES)
def test_the_scale_is_that_of_the_merged_weight(kind, host):
    """Against the plain formula on the weight that PEFT itself merges."""
    model = trained(kind, host)
    layers = layers_of(model)
    scales = {n: layer.get_scale() for n, layer in layers.items()}
    frozen = {n: rows(layer) for n, layer in layers.items()}
    if host in ("pissa", "olora"):
        frozen = {n: KINDS[kind].net().get_submodule(n).weight.detach().flatten(1) for n in layers}
    for name, layer in layers.items():
        if scales[name] is None:
            continue
        layer.host.merge()
        merged = rows(layer)
        if host == "dora":
            expected = layer.host.lora_magnitude_vector["default"].weight.flatten() / frozen[name].norm(dim=1)
        elif host in ROTATIONS:
            expected = (merged * frozen[name]).sum(1) / frozen[name].square().sum(1)
        else:
            expected = merged.norm(dim=1) / frozen[name].norm(dim=1)
        if host == "ia3":
            assert torch.equal(scales[name], layer.host.ia3_l["default"].flatten())
            expected = expected * scales[name].sign()
        torch.testing.assert_close(scales[name], expected.detach(), rtol=1e-4, atol=1e-4)
        assert scales[name].dtype == torch.float32


@pytest.mark.parametrize(("kind", "host"), CASES)
def test_save_reload_merge_and_unmerge(kind, host, tmp_path):
    model = trained(kind, host)
    out = run(model, kind)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(KINDS[kind].net(), tmp_path).eval()
    assert torch.equal(run(again, kind), out)
    state = {name: value.clone() for name, value in again.state_dict().items()}
    again.merge_adapter(safe_merge=True)
    torch.testing.assert_close(run(again, kind), out, rtol=1e-4, atol=1e-5)
    again.unmerge_adapter()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    assert torch.equal(run(again, kind), out)
    report = merge_and_verify(again, (KINDS[kind].input(),))
    assert report.max_abs_difference <= report.tolerance
    assert type(report.model) is type(KINDS[kind].net())
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["inner"]["peft_type"] == HOSTS[host].peft_type
    assert saved["edges"]


@pytest.mark.parametrize(("kind", "host"), CASES)
def test_propagation_acts_and_reaches_every_parameter(kind, host):
    model = trained(kind, host)
    alone = trained(kind, host, exponent=0.0)
    assert not torch.allclose(run(model, kind), run(alone, kind), rtol=1e-3)
    posterior = {e.posterior for e in model.base_model.propagation_graph.edges}
    for name in posterior:
        assert layers_of(model)[name].get_input_scale() is not None
    model.train()(KINDS[kind].input()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in host_parameters(model).values())


@pytest.mark.parametrize("decomposition", ["norm", "projection"])
def test_one_network_equals_the_formula_written_out(decomposition):
    """Outputs and gradients against plain tensor code in float64, without PEFT, hooks or tricks."""
    torch.manual_seed(0)
    net = Dense().double()
    options = {"propagation": trace(net, torch.zeros(1, 6).double()), "decomposition": decomposition}
    model = get_peft_model(
        net, SanConfig(inner=LoraConfig(r=2, lora_alpha=3), target_modules=["stem", "fc1"], **options)
    )
    for parameter in host_parameters(model).values():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(5, 6, dtype=torch.float64)
    out = model(x)
    out.square().sum().backward()
    copies = {n: p.detach().clone().requires_grad_() for n, p in host_parameters(model).items()}

    def adapted(name: str) -> tuple[Tensor, Tensor]:
        frozen = net.get_submodule(name).get_base_layer().weight.detach()
        a, b = (copies[f"base_model.model.{name}.base_layer.lora_{k}.default.weight"] for k in "AB")
        weight = frozen + 1.5 * b @ a
        if decomposition == "norm":
            return weight, weight.norm(dim=1) / frozen.norm(dim=1)
        return weight, (weight * frozen).sum(1) / frozen.square().sum(1)

    def bias(name: str) -> Tensor:
        return net.get_submodule(name).bias.detach()

    (stem, stem_scale), (fc1, fc1_scale) = adapted("stem"), adapted("fc1")
    h = x @ stem.t() + bias("stem")
    normed = nn.functional.layer_norm(h, (8,), net.norm.weight, net.norm.bias)
    hidden = torch.relu((normed * stem_scale) @ fc1.t() + bias("fc1"))
    h = h + (hidden * fc1_scale) @ net.fc2.get_base_layer().weight.detach().t()
    # fc2 carries no adapter, so its scale is one: nothing reaches the head from it
    plain = h @ net.head.weight.t() + net.head.bias
    torch.testing.assert_close(out, plain)
    plain.square().sum().backward()
    for name, parameter in host_parameters(model).items():
        torch.testing.assert_close(parameter.grad, copies[name].grad)


def test_layers_without_an_adapter_are_fed():
    model = get_peft_model(small_llama(), SanConfig(inner=LoraConfig(r=2, target_modules=LLAMA)))
    layers = layers_of(model)
    fed = {"o_proj": "v_proj", "down_proj": "up_proj", "q_proj": "down_proj"}
    for end, source in fed.items():
        layer = next(m for n, m in layers.items() if n.endswith(end) and m.san_incoming)
        assert layer.san_incoming["default"][0].anterior.endswith(source)
    assert all(m.host is None for n, m in layers.items() if n.endswith(("o_proj", "gate_proj")))
    assert not any(n.endswith("gate_proj") for n in layers), "its anterior, o_proj, carries no adapter"
    wider = get_peft_model(small_llama(), SanConfig(inner=LoraConfig(r=2, target_modules=[*LLAMA, "o_proj"])))
    gate = layers_of(wider)["model.layers.0.mlp.gate_proj"]
    assert gate.host is None
    assert gate.san_incoming["default"][0].anterior == "model.layers.0.self_attn.o_proj"


def test_targets_may_stand_in_either_configuration():
    outer = SanConfig(inner=LoraConfig(r=2), target_modules=LLAMA)
    inner = SanConfig(inner=LoraConfig(r=2, target_modules=LLAMA))
    assert outer.target_modules == inner.target_modules == set(LLAMA)
    everything = get_peft_model(small_llama(), SanConfig(inner=LoraConfig(r=2)))
    assert len(layers_of(everything)) == 14
    assert all(m.host is not None for m in layers_of(everything).values())


def test_layers_to_transform_of_the_host():
    model = get_peft_model(
        small_llama(), SanConfig(inner=LoraConfig(r=2, target_modules=LLAMA, layers_to_transform=[1]))
    )
    assert {n.split(".")[2] for n, m in layers_of(model).items() if m.host is not None} == {"1"}


def test_ia3_scales_of_inputs_are_not_propagated_again():
    inner = peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    model = get_peft_model(small_llama(), SanConfig(inner=inner))
    anteriors = {e.anterior.rpartition(".")[2] for e in model.base_model.propagation_graph.edges}
    assert anteriors == {"v_proj"}
    assert layers_of(model)["model.layers.0.mlp.down_proj"].get_scale() is None


def test_layers_that_read_one_activation_share_its_scaled_copy():
    model = get_peft_model(small_llama(), SanConfig(inner=LoraConfig(r=2, target_modules=LLAMA)))
    seen = []
    for name, layer in layers_of(model).items():
        if ".1." in name and name.endswith(("q_proj", "k_proj", "v_proj")):
            layer.host.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(input_ids=IDS)
    assert len(seen) == 3
    assert seen[0] is seen[1] is seen[2]


def test_a_model_called_twice_on_one_tensor_uses_what_it_has_learnt_meanwhile():
    model = get_peft_model(small_llama(), SanConfig(target_modules=LLAMA))
    embedded = model.get_input_embeddings()(IDS)
    before = model(inputs_embeds=embedded).logits
    with torch.no_grad():
        for parameter in host_parameters(model).values():
            parameter.add_(0.1)
    assert not torch.allclose(model(inputs_embeds=embedded).logits, before)


def test_generation_takes_the_scales_once(monkeypatch):
    model = get_peft_model(small_llama(), SanConfig(inner=LoraConfig(r=2, target_modules=LLAMA))).eval()
    calls = []
    original = fill.low_rank_scales
    monkeypatch.setattr(fill, "low_rank_scales", lambda *args: calls.append(args) or original(*args))
    with torch.inference_mode():
        assert model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False).shape == (2, 9)
    once = len(calls)
    assert once
    with torch.no_grad():
        model(input_ids=IDS)
        model(input_ids=IDS)
    assert len(calls) == 3 * once


def test_gradient_checkpointing_of_blocks_and_of_single_layers():
    def gradients(wrap) -> dict[str, Tensor]:
        model = get_peft_model(small_llama(), SanConfig(inner=LoraConfig(r=2, target_modules=LLAMA))).train()
        torch.manual_seed(2)
        for parameter in host_parameters(model).values():
            nn.init.normal_(parameter, std=0.1)
        wrap(model)
        model(input_ids=IDS, labels=IDS).loss.backward()
        return {n: p.grad for n, p in host_parameters(model).items()}

    def single(model: PeftModel) -> None:
        for layer in layers_of(model).values():
            inside = layer.forward
            layer.forward = lambda x, inside=inside: torch.utils.checkpoint.checkpoint(inside, x, use_reentrant=False)

    def blocks(model: PeftModel) -> None:
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})

    plain = gradients(lambda model: None)
    for wrap in (blocks, single):
        for name, gradient in gradients(wrap).items():
            torch.testing.assert_close(gradient, plain[name], msg=name)


def test_compiled_without_a_break():
    model = trained("dense", "lora")
    before = run(model, "dense")
    for host in ("lora", "dora"):
        model = trained("dense", host)
        before = run(model, "dense")
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(run(compiled, "dense"), before)
