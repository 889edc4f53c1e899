"""Hosts that make no sense: clear errors, and nothing half applied."""

from __future__ import annotations

import dataclasses
import json

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import config as lora
from tests.contract.nets import KINDS, Image
from tests.tuner.hosted import HOSTS, ROTATIONS, config, layers_of, logits, rows, small_llama, trained
from torch import nn

from san_peft import AdapterError, SanConfig, SanError, TargetError
from san_peft.tuner.decompose import KINDS as KINDS_OF_HOSTS

# ---------------------------------------------------------------------- variants of LoRA


@pytest.mark.parametrize(
    "options",
    [
        {"kasa_config": lora.KasaConfig()},
        {"alora_invocation_tokens": [1, 2]},
        {"use_bdlora": lora.BdLoraConfig(target_modules_bd_a=["fc1"], nblocks=2)},
        {"use_qalora": True},
        {"arrow_config": lora.ArrowConfig()},
        {"monteclora_config": lora.MontecloraConfig()},
    ],
    ids=lambda options: next(iter(options)),
)
def test_variants_that_are_not_right_are_refused_with_the_reason(options):
    (name,) = options
    with pytest.raises(AdapterError, match=f"{name}=.*cannot host SAN: .*Leave {name} out"):
        SanConfig(inner=LoraConfig(r=2, **options), target_modules=["fc1"])


def test_every_variant_that_peft_knows_is_decided_on():
    """A variant of a later PEFT is refused until somebody has looked at it; a test says so when it comes."""
    kind = KINDS_OF_HOSTS["LORA"]
    marked = {f.name for f in dataclasses.fields(LoraConfig) if f.metadata.get("is_lora_variant")}
    assert marked <= {*kind.variants, *kind.refused}


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"inner": LoraConfig(r=0)}, SanError, r"rank 0 \(r\)"),
        ({"inner": LoraConfig(rank_pattern={"fc1": 0})}, SanError, r"rank 0 \(fc1\)"),
        ({"inner": {"r": 8}}, SanError, "peft_type None"),
        ({"inner": {"peft_type": "NEWEST"}}, SanError, "peft_type 'NEWEST'"),
        ({"inner": "lora"}, SanError, "got 'lora'"),
        ({"inner": {"peft_type": "LORA", "r": "x"}}, SanError, "inner is not a valid configuration.*'str'"),
        ({"inner": {"peft_type": "LORA", "r": 2, "eva_config": 3}}, SanError, "inner is not a valid.*EvaConfig"),
        ({"inner": {"peft_type": "LORA", "task_type": "x"}}, SanError, "inner is not a valid.*'x'"),
        (
            {"inner": LoraConfig(target_modules=["fc1"]), "target_modules": ["fc2"]},
            SanError,
            r"\['fc2'\] here, \['fc1'\]",
        ),
        ({"inner": LoraConfig(bias="all")}, SanError, "bias='all'"),
        ({"inner": LoraConfig(init_lora_weights="pissa"), "decomposition": "projection"}, SanError, "pissa"),
        ({"inner": LoraConfig(), "shift": True}, SanError, "own_scale=True"),
        ({"inner": LoraConfig(), "decomposition": "angle"}, SanError, "angle"),
        ({"inner": peft.OFTConfig()}, AdapterError, "OFT .*decomposition='projection'"),
        ({"inner": peft.PromptTuningConfig()}, AdapterError, "PROMPT_TUNING cannot host"),
        ({"inner": peft.LNTuningConfig()}, AdapterError, "train_norms=True"),
        ({"inner": peft.AdaLoraConfig(total_step=10)}, AdapterError, "ADALORA cannot host"),
        ({"inner": peft.FourierFTConfig()}, AdapterError, "FOURIERFT cannot host"),
        ({"inner": SanConfig()}, AdapterError, "SAN cannot host SAN"),
    ],
)
def test_configurations_that_make_no_sense(options, error, text):
    with pytest.raises(error, match=text):
        SanConfig(**options)


@pytest.mark.parametrize(
    ("host", "target", "text"),
    [("lora", "grouped", "grouped is a Conv2d in 2 groups"), ("oft", "last", r"kernel_size \(2, 2\)")],
)
def test_convolutions_whose_weight_the_host_does_not_change(host, target, text):
    net = Image()
    options = {"decomposition": "projection"} if host in ROTATIONS else {}
    with pytest.raises(TargetError, match=text):
        get_peft_model(net, SanConfig(inner=HOSTS[host], target_modules=[target], propagation="none", **options))
    assert type(net.get_submodule(target)) is nn.Conv2d


def test_san_beside_another_tuner_and_two_kinds_of_host():
    model = get_peft_model(small_llama(), LoraConfig(r=2, target_modules=["v_proj"]))
    with pytest.raises(TargetError, match=r"LORA.*san_peft.propagate"):
        get_peft_model(model.base_model.model, SanConfig(target_modules=["v_proj"]))
    model = get_peft_model(small_llama(), SanConfig(inner=LoraConfig(r=2), target_modules=["v_proj"])).eval()
    before = logits(model)
    with pytest.raises(TargetError, match=r"LORA.*LOHA"):
        model.add_adapter("second", SanConfig(inner=peft.LoHaConfig(r=2), target_modules=["v_proj"]))
    assert torch.equal(logits(model), before)


def test_a_host_that_fails_half_way_leaves_the_model(monkeypatch):
    net = KINDS["dense"].net()
    modules = dict(net.named_modules())
    from peft.tuners.lora import Linear as LoraLinear

    original = LoraLinear.update_layer

    def fail_on_second(self, *args, **kwargs):
        if self.in_features == 8:
            raise RuntimeError("no memory")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LoraLinear, "update_layer", fail_on_second)
    with pytest.raises(RuntimeError, match="no memory"):
        get_peft_model(net, config("dense", "lora"))
    assert dict(net.named_modules()) == modules
    assert not hasattr(net, "peft_config")


def test_files_that_do_not_fit(tmp_path):
    from safetensors.torch import load_file, save_file

    model = trained("dense", "lora")
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    broken = {k: v * float("nan") if "fc1.base_layer.lora_B" in k else v for k, v in tensors.items()}
    save_file(broken, file)
    with pytest.raises(AdapterError, match=r"24 of 24 entries of .*fc1.base_layer.lora_B"):
        PeftModel.from_pretrained(KINDS["dense"].net(), tmp_path)
    other = {k.replace("lora_", "hada_"): v for k, v in tensors.items()}
    save_file(other, file)
    with pytest.raises(AdapterError, match=r"lacks 6 of its 6 tensors.*lora_A.* has 6 tensors .*hada_A"):
        PeftModel.from_pretrained(KINDS["dense"].net(), tmp_path)


def test_nan_in_a_host_is_found_before_anything_is_merged():
    model = trained("dense", "lora")
    weights = {n: rows(layer) for n, layer in layers_of(model).items()}
    layers_of(model)["fc2"].host.lora_B["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(rows(layer), weights[n]) for n, layer in layers_of(model).items())
    assert not any(layer.merged or layer.host.merged for layer in layers_of(model).values() if layer.host is not None)


def test_configuration_survives_json_and_dataclasses():
    first = SanConfig(inner=LoraConfig(r=4, use_dora=True, target_modules=["a"]), exponent=2.0)
    again = SanConfig(**json.loads(json.dumps(dataclasses.asdict(first), default=lambda v: sorted(v))))
    assert (again.inner, again.target_modules) == (first.inner, {"a"})
    assert again.inner_config().use_dora
    with pytest.raises(SanError, match="no host"):
        SanConfig().inner_config()
