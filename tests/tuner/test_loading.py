"""Damaged adapters: refused by every way to load them, by the name of the tensor, with the model as it was."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from tests.contract.nets import disturb
from tests.golden.models import MODELS
from tests.tuner.hosted import logits, small_llama
from torch import Tensor, nn

from san_peft import AdapterError, SanConfig, SanError, SanLayer, hotswap
from san_peft.tuner import loading

FILE = "adapter_model.safetensors"
PLACE = "base_model.model.vit.layers.0.mlp"
HOST = f"{PLACE}.fc1.base_layer.lora_A.weight"
SCALE = f"{PLACE}.fc2.san_scale.weight"
FROZEN = f"{PLACE}.fc1.base_layer.base_layer.weight"
HEAD = "base_model.model.classifier.weight"

FAULTS: dict[str, tuple[str, Any]] = {
    "missing in the host": (HOST, lambda t: t.pop(HOST)),
    "missing in SAN": (SCALE, lambda t: t.pop(SCALE)),
    "extra": ("fc3.san_scale", lambda t: t.update({SCALE.replace("fc2", "fc3"): t[SCALE].clone()})),
    "a frozen weight": (FROZEN, lambda t: t.update({FROZEN: torch.zeros(32, 16)})),
    "rank": (rf"{HOST} has shape \(3, 16\).*\(2, 16\)", lambda t: t.update({HOST: torch.zeros(3, 16)})),
    "shape": (rf"{HEAD} has shape \(2,\).*\(2, 16\)", lambda t: t.update({HEAD: torch.zeros(2)})),
    "nan": (f"1 of 32 entries of {HOST}", lambda t: t[HOST].view(-1)[3].fill_(torch.nan)),
    "infinite": (f"1 of 16 entries of {SCALE}", lambda t: t[SCALE][3].fill_(torch.inf)),
    "integers": (f"{SCALE} is torch.int64", lambda t: t.update({SCALE: t[SCALE].long()})),
    "complex": (f"{HEAD} is torch.complex64", lambda t: t.update({HEAD: t[HEAD].to(torch.complex64)})),
    "quantized": (f"{HOST} is torch.float8_e4m3fn", lambda t: t.update({HOST: t[HOST].to(torch.float8_e4m3fn)})),
}


def vit() -> nn.Module:
    torch.manual_seed(0)
    return MODELS["vit"]().eval()


def image() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """An adapter with every kind of part: scales, a host and a saved module."""
    folder = tmp_path_factory.mktemp("adapter")
    options = {"target_modules": ["fc1", "fc2"], "own_scale": True, "modules_to_save": ["classifier"]}
    model = get_peft_model(vit(), SanConfig(inner=LoraConfig(r=2), **options))
    disturb(model)
    model.save_pretrained(folder)
    return folder


def expected(folder: Path) -> Tensor:
    with torch.no_grad():
        return PeftModel.from_pretrained(vit(), folder).eval()(image()).logits


def broken(saved: Path, folder: Path, change) -> Path:
    tensors = load_file(saved / FILE)
    change(tensors)
    shutil.copytree(saved, folder)
    save_file(tensors, folder / FILE)
    return folder


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that loading may not change: objects, values, names and what is active."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, SanLayer)}
    return {
        "modules": {n: (id(m), type(m), m.training, sorted(vars(m))) for n, m in model.named_modules()},
        "parameters": {n: (id(p), p.requires_grad) for n, p in model.named_parameters()},
        "values": {n: t.clone() for n, t in model.state_dict().items()},
        "hooks": {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()},
        "adapters": list(getattr(model, "peft_config", {})),
        "active": [list(layer.active_adapters) for layer in layers.values()],
    }


def assert_same(model: nn.Module, before: dict[str, Any]) -> None:
    after = state_of(model)
    values, old = after.pop("values"), before["values"]
    assert after == {k: v for k, v in before.items() if k != "values"}
    assert values.keys() == old.keys()
    assert all(torch.equal(value, old[name]) for name, value in values.items())


def with_first(saved: Path) -> PeftModel:
    return PeftModel.from_pretrained(vit(), saved, adapter_name="first")


def bare_with_first(saved: Path) -> Any:
    model: Any = vit()
    model.load_adapter(str(saved), adapter_name="first")
    return model


def state_dict_of(folder: Path) -> dict[str, Any]:
    return {"peft_config": PeftConfig.from_pretrained(folder), "adapter_state_dict": load_file(folder / FILE)}


WAYS: dict[str, tuple[Any, Any]] = {
    "PeftModel.from_pretrained": (lambda saved: vit(), PeftModel.from_pretrained),
    "with a config": (
        lambda saved: vit(),
        lambda model, folder: PeftModel.from_pretrained(model, folder, config=PeftConfig.from_pretrained(folder)),
    ),
    "low_cpu_mem_usage": (
        lambda saved: vit(),
        lambda model, folder: PeftModel.from_pretrained(model, folder, low_cpu_mem_usage=True),
    ),
    "a second adapter": (with_first, lambda model, folder: model.load_adapter(folder, "second")),
    "over an adapter": (with_first, lambda model, folder: model.load_adapter(folder, "first")),
    "transformers": (lambda saved: vit(), lambda model, folder: model.load_adapter(str(folder))),
    "transformers, a second": (bare_with_first, lambda model, folder: model.load_adapter(str(folder), "second")),
    "transformers, a state dict": (
        lambda saved: vit(),
        lambda model, folder: model.load_adapter(**state_dict_of(folder)),
    ),
    "hotswap": (with_first, lambda model, folder: hotswap(model, folder, "first")),
    "set_peft_model_state_dict": (
        with_first,
        lambda model, folder: set_peft_model_state_dict(model, load_file(folder / FILE), "first"),
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_damaged_tensors_are_refused_and_leave_the_model(saved, tmp_path, way):
    make, load = WAYS[way]
    model = make(saved)
    before = state_of(model)
    for number, (text, change) in enumerate(FAULTS.values()):
        folder = broken(saved, tmp_path / str(number), change)
        with pytest.raises(AdapterError, match=text):
            load(model, folder)
        assert_same(model, before)
    found = load(model, saved)
    model = found if isinstance(found, nn.Module) else model
    if "second" in getattr(model, "peft_config", {}):
        model.set_adapter("second")
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(image()).logits, expected(saved))


@pytest.mark.parametrize("way", ["PeftModel.from_pretrained", "over an adapter", "transformers", "hotswap"])
def test_damaged_files_are_refused_and_leave_the_model(saved, tmp_path, way):
    make, load = WAYS[way]
    model = make(saved)
    before = state_of(model)
    folder = tmp_path / "adapter"
    shutil.copytree(saved, folder)
    file, config = folder / FILE, folder / "adapter_config.json"
    whole, text = file.read_bytes(), config.read_text()
    for damaged in (whole[:-100], whole[:20], b""):
        file.write_bytes(damaged)
        with pytest.raises(AdapterError, match=r"adapter_model\.safetensors is damaged"):
            load(model, folder)
        assert_same(model, before)
    file.unlink()
    with pytest.raises(AdapterError, match=r"has no adapter_model\.safetensors"):
        load(model, folder)
    torch.save(load_file(saved / FILE), folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"adapter_model\.bin is a pickle file"):
        load(model, folder)
    assert_same(model, before)
    file.write_bytes(whole)
    if way == "over an adapter":  # PEFT does not read the config of an adapter that is there
        return
    config.write_text(text[:-30])
    with pytest.raises(AdapterError, match=r"adapter_config\.json in .*adapter is damaged"):
        load(model, folder)
    config_of = json.loads(text)
    for change in (
        {"edges": [{"anterior": "a"}]},
        {"exponent": "two"},
        {"target_modules": ["nowhere"], "edges": None, "placement": None},
        {"inner": {**config_of["inner"], "r": 3}},
        {"inner": {**config_of["inner"], "lora_dropout": 3}},
    ):
        config.write_text(json.dumps({**config_of, **change}))
        with pytest.raises(SanError):
            load(model, folder)
        assert_same(model, before)


def test_pickle_is_refused_where_transformers_would_prefer_it(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "both")
    torch.save({}, tmp_path / "both" / "adapter_model.bin")
    model: Any = vit()
    with pytest.raises(AdapterError, match=r"adapter_model\.bin is a pickle file"):
        model.load_adapter(str(tmp_path / "both"), use_safetensors=False)


def test_the_hub_is_asked_for_safetensors_only(saved, monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def download(repository, name, **options):
        asked.append((repository, name, options))
        if options.get("revision") == "v1":
            raise LocalEntryNotFoundError("not there")
        return str(saved / FILE)

    monkeypatch.setattr(loading, "hf_hub_download", download)
    source = loading.AdapterSource("who/what", options={"revision": "v2"})
    assert source.read().keys() == load_file(saved / FILE).keys()
    assert asked == [("who/what", FILE, {"revision": "v2"})]
    with pytest.raises(AdapterError, match=r"who/what has no adapter_model\.safetensors on the Hub.*not there"):
        loading.AdapterSource("who/what", options={"revision": "v1"}).read()


def test_hotswap_adapter_of_peft_refuses_it(saved):
    model = with_first(saved)
    before = state_of(model)
    with pytest.raises(ValueError, match="SAN"):
        hotswap_adapter(model, str(saved), "first")
    assert_same(model, before)


def test_a_weight_that_an_initialisation_replaces_is_put_back(tmp_path):
    """PiSSA moves part of the frozen weight into the adapter when the adapter is added."""
    config = SanConfig(inner=LoraConfig(r=2, init_lora_weights="pissa"), target_modules=["fc1", "fc2"])
    get_peft_model(vit(), config).save_pretrained(tmp_path / "whole")
    model = vit()
    before = state_of(model)
    folder = broken(tmp_path / "whole", tmp_path / "broken", FAULTS["missing in the host"][1])
    with pytest.raises(AdapterError, match=HOST):
        PeftModel.from_pretrained(model, folder)
    assert_same(model, before)


def test_an_adapter_with_resized_embeddings_loads(tmp_path):
    """PEFT saves the embeddings with the adapter, as tensors that are not the adapter's."""
    small_llama().save_pretrained(tmp_path / "base")
    base: Any = type(small_llama()).from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(33)
    model = get_peft_model(base.eval(), SanConfig(target_modules=["v_proj"]))
    disturb(model)
    with torch.no_grad():
        base.get_input_embeddings().weight[1].add_(1)
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        model.save_pretrained(tmp_path / "adapter")
    again = type(base).from_pretrained(tmp_path / "base").eval()
    before = state_of(again)
    with pytest.raises(AdapterError, match=r"lm_head\.weight has shape \(33, 16\).*\(30, 16\)"):
        PeftModel.from_pretrained(again, tmp_path / "adapter")
    assert_same(again, before)
    again.resize_token_embeddings(33)
    assert torch.equal(logits(PeftModel.from_pretrained(again, tmp_path / "adapter").eval()), logits(model.eval()))


def test_a_host_beside_a_plain_adapter_in_another_thread(monkeypatch):
    """PEFT converts the target names of plain adapters on fused experts, but not those of a host, in any order."""
    from peft.tuners.lora import LoraModel
    from tests.zoo.test_zoo import subject_of

    plain = subject_of("Qwen3NextForCausalLM").base()
    injecting, converted = threading.Event(), threading.Event()
    prepare = LoraModel._prepare_adapter_config

    def wait(self, config, model_config):
        if threading.current_thread() is not threading.main_thread():
            injecting.set()
            assert converted.wait(60)
        return prepare(self, config, model_config)

    monkeypatch.setattr(LoraModel, "_prepare_adapter_config", wait)
    targets = ["gate_proj", "up_proj"]
    made: list[PeftModel] = []

    def host() -> None:
        net = subject_of("Qwen3NextForCausalLM").base()
        config = SanConfig(inner=LoraConfig(r=2), target_modules=targets, propagation="none")
        made.append(get_peft_model(net, config))

    thread = threading.Thread(target=host)
    thread.start()
    try:
        assert injecting.wait(60)
        config = LoraConfig(r=2, target_modules=targets)
        get_peft_model(plain, config)
    finally:
        converted.set()
        thread.join()
    assert config.target_parameters == {"gate_up_proj"}
    names = {name.rpartition(".")[2] for name, m in made[0].named_modules() if isinstance(m, SanLayer)}
    assert names == set(targets)
