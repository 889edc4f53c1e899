"""SAN on adapters that are there: attached, taken off, combined, swapped, and turned into LoRA."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from tests.contract.nets import KINDS
from tests.tuner.hosted import IDS, LLAMA, config, layers_of, logits, run, small_llama, trained

from san_peft import (
    AdapterError,
    MergeError,
    PropagationGraph,
    SanConfig,
    SanError,
    SanLayer,
    detach_san,
    hotswap,
    propagate,
    save_as_lora,
)

# ---------------------------------------------------------------------- attaching and taking off


def lora_model(**options) -> PeftModel:
    model = get_peft_model(small_llama(), LoraConfig(r=2, target_modules=LLAMA, modules_to_save=["lm_head"], **options))
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif parameter.requires_grad:
                parameter.mul_(1.1)
    return model.eval()


@pytest.mark.parametrize("dora", [False, True])
def test_attach_to_a_trained_adapter_and_take_off_again(dora, tmp_path):
    model = lora_model(use_dora=dora)
    before, state = logits(model), {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    flags = {n.replace(".base_layer", ""): p.requires_grad for n, p in model.named_parameters()}
    assert propagate(model, propagation="all") is model
    attached = logits(model)
    assert not torch.allclose(attached, before, rtol=1e-3)
    assert {n.replace(".base_layer", ""): p.requires_grad for n, p in model.named_parameters()} == flags
    with model.base_model.set_mode("neuron"):
        torch.testing.assert_close(logits(model), before)
    model.save_pretrained(tmp_path / "san")
    again = PeftModel.from_pretrained(small_llama(), tmp_path / "san").eval()
    assert torch.equal(logits(again), attached)
    for one in (model, again):
        assert detach_san(one) is one
        assert torch.equal(logits(one), before)
        assert not any(isinstance(m, SanLayer) for m in one.modules())
        one.save_pretrained(tmp_path / "plain")
        split = PeftModel.from_pretrained(small_llama(), tmp_path / "plain").eval()
        assert split.peft_config["default"].peft_type == "LORA"
        assert torch.equal(logits(split), before)
        assert {k: v for k, v in get_peft_model_state_dict(split).items()}.keys() == state.keys()


def test_attaching_keeps_several_adapters_and_what_is_active():
    model = lora_model()
    model.add_adapter("second", LoraConfig(r=3, target_modules=["v_proj"]))
    model.set_adapter("second")
    propagate(model)
    assert model.active_adapters == ["second"]
    assert {e.anterior.rpartition(".")[2] for e in model.base_model.propagation_graph.edges} == {"v_proj"}
    model.set_adapter("default")
    assert len(model.base_model.propagation_graph.edges) > 2
    model.delete_adapter("second")
    detach_san(model)
    assert list(model.peft_config) == ["default"]


def test_what_cannot_be_attached_or_taken_off():
    model = lora_model()
    model.merge_adapter()
    with pytest.raises(AdapterError, match=r"merged.*unmerge"):
        propagate(model)
    model.unmerge_adapter()
    with pytest.raises(SanError, match="Unknown propagation scheme 'al'"):
        propagate(model, propagation="al")
    out = logits(model)
    propagate(model)
    with pytest.raises(SanError, match="already attached"):
        propagate(model)
    model.add_adapter("own", SanConfig(target_modules=["v_proj"]))
    with pytest.raises(AdapterError, match=r"host.* own"):
        detach_san(model)
    model.delete_adapter("own")
    assert torch.equal(logits(detach_san(model)), out)
    with pytest.raises(AdapterError, match="not attached"):
        detach_san(model)
    pissa = get_peft_model(small_llama(), LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights="pissa"))
    with pytest.raises(AdapterError, match="pissa"):
        propagate(pissa)
    prompt = get_peft_model(small_llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(AdapterError, match="no adapter layers"):
        propagate(prompt)


# ---------------------------------------------------------------------- several adapters, swapping, converting


def test_adapters_with_and_without_a_host_side_by_side():
    model = get_peft_model(small_llama(), SanConfig(target_modules=LLAMA))
    model.add_adapter("hosted", SanConfig(inner=LoraConfig(r=2), target_modules=LLAMA))
    assert torch.equal(logits(model.eval()), logits(small_llama()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".default." in name or ".hosted." in name:
                parameter.add_(0.05)
    outs = {}
    for name in ("default", "hosted"):
        model.set_adapter(name)
        outs[name] = logits(model)
        assert all(f".{name}." in n for n, p in model.named_parameters() if p.requires_grad)
    names = ["hosted", "default"]
    mixed = model(input_ids=IDS, adapter_names=names).logits
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], outs[name][row])
    model.delete_adapter("hosted")
    assert torch.equal(logits(model), outs["default"])
    assert not any("lora_" in n for n, _ in model.named_parameters())


def test_weighted_hosts():
    model = get_peft_model(small_llama(), SanConfig(inner=LoraConfig(r=2), target_modules=LLAMA))
    model.add_adapter("second", SanConfig(inner=LoraConfig(r=2), target_modules=LLAMA))
    with torch.no_grad():
        for parameter in (p for n, p in model.named_parameters() if "lora_B" in n):
            parameter.normal_(std=0.1)
    model.base_model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both", "cat")
    layer = layers_of(model)["model.layers.0.mlp.up_proj"]
    frozen = layer.get_base_layer().weight
    delta = 0.5 * (layer.host.get_delta_weight("default") + layer.host.get_delta_weight("second"))
    torch.testing.assert_close(layer.get_scale("both"), (frozen + delta).norm(dim=1) / frozen.norm(dim=1))
    assert model.peft_config["both"].inner["r"] == 4
    model.set_adapter("both")
    assert len(model.base_model.propagation_graph.edges) > 4
    model.add_adapter("third", SanConfig(inner=LoraConfig(r=2), target_modules=["v_proj"]))
    with pytest.raises(AdapterError, match="differ in"):
        model.base_model.add_weighted_adapter(["default", "third"], [1, 1], "odd")


def test_hotswap(tmp_path):
    other = trained("dense", "lora")
    other.save_pretrained(tmp_path)
    model = get_peft_model(KINDS["dense"].net(), config("dense", "lora")).eval()
    run(model, "dense")
    hotswap(model, tmp_path)
    assert torch.equal(run(model, "dense"), run(other, "dense"))
    dora = get_peft_model(KINDS["dense"].net(), config("dense", "dora"))
    with pytest.raises(AdapterError, match=r"differs .* in inner"):
        hotswap(dora, tmp_path)


@pytest.mark.parametrize(
    ("kind", "host"), [("dense", None), ("dense", "lora"), ("conv2d-lora", "dora"), ("gpt2", None)]
)
def test_the_closest_lora(kind, host, tmp_path):
    if host is None:
        model = get_peft_model(KINDS[kind].net(), KINDS[kind].config(shift=True)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "san_" in name:
                    parameter.normal_(std=0.2)
    else:
        graph = KINDS[kind].graph()
        edges = tuple(e for e in graph.edges if "stem" not in e.anterior or kind == "dense")  # none into a grouped one
        model = trained(kind, host, propagation=PropagationGraph(edges))
    out = run(model, kind)
    errors = []
    for rank in (1, 3, 64):
        report = save_as_lora(model, tmp_path / str(rank), rank)
        errors.append(report.error)
        assert report.worst >= report.error
        assert report.where in layers_of(model)
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora = PeftModel.from_pretrained(KINDS[kind].net(), tmp_path / "64").eval()
    assert lora.peft_config["default"].peft_type == "LORA"
    torch.testing.assert_close(run(lora, kind), out, rtol=1e-4, atol=1e-4)
    assert torch.equal(run(model, kind), out), "the model is left as it was"


def test_what_cannot_become_lora(tmp_path):
    grouped = get_peft_model(KINDS["conv2d"].net(), KINDS["conv2d"].config())
    with pytest.raises(MergeError, match="8 groups"):
        save_as_lora(grouped, tmp_path / "out", 2)
    assert not (tmp_path / "out").exists()
    model = trained("dense", "lora")
    with pytest.raises(AdapterError, match="rank must be at least 1, got 0"):
        save_as_lora(model, tmp_path / "out", 0)
    with pytest.raises(AdapterError, match=r"x.*default"):
        save_as_lora(model, tmp_path / "out", 1, "x")
    model.merge_adapter()
    with pytest.raises(MergeError, match="unmerge"):
        save_as_lora(model, tmp_path / "out", 1)
