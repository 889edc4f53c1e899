"""Names of adapters, which are active, and models that are compiled already."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.contract.nets import KINDS, disturb
from torch import nn

from san_peft import AdapterError, PropagationGraph, SanConfig, SanError, SanLayer

DENSE = KINDS["dense"]
GRAPH = DENSE.graph()


def config(*targets: str, **options) -> SanConfig:
    edges = tuple(e for e in GRAPH.edges if e.anterior in (targets or DENSE.targets))
    given = {"propagation": PropagationGraph(edges), "modules_to_save": ["head"], **options}
    return SanConfig(target_modules=list(targets or DENSE.targets), **given)


@pytest.mark.parametrize("inner", [None, LoraConfig(r=2)])
@pytest.mark.parametrize("name", ["", "a.b", "default.1", "forward", "keys", "training", "__base__", "weight", "bias"])
def test_names_that_are_refused(name, inner):
    net = DENSE.net()
    with pytest.raises(AdapterError, match=re.escape(repr(name))):
        get_peft_model(net, config(inner=inner), adapter_name=name)
    assert not any(isinstance(m, SanLayer) for m in net.modules())
    model = get_peft_model(net, config(inner=inner))
    before = sorted(model.state_dict())
    with pytest.raises(AdapterError):
        model.add_adapter(name, config(inner=inner))
    assert list(model.peft_config) == ["default"]
    assert sorted(model.state_dict()) == before


@pytest.mark.parametrize("inner", [None, LoraConfig(r=2)])
@pytest.mark.parametrize("name", ["base", "fc1", "norm", "model", "ä b-c_1", "lora_A", "san_scale"])
def test_one_adapter_may_have_any_other_name(name, inner, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(DENSE.net(), config(inner=inner), adapter_name=name).eval()
        disturb(model, name)
        x = DENSE.input()
        expected = model(x)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(DENSE.net(), tmp_path / name, adapter_name=name).eval()
        other = PeftModel.from_pretrained(DENSE.net(), tmp_path / name).eval()
    assert torch.equal(again(x), expected)
    assert torch.equal(other(x), expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), expected)


@pytest.mark.parametrize("name", ["fc1", "model", "san_scale", "modules_to_save"])
@pytest.mark.parametrize("first", [False, True])
def test_of_several_none_has_the_name_of_a_part(name, first):
    names = [name, "other"] if first else ["other", name]
    if name == "modules_to_save" and first:
        names = ["other", name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(DENSE.net(), config(), adapter_name=names[0])
        with pytest.raises(AdapterError, match=f"cannot be named '{name}'"):
            model.add_adapter(names[1], config())
    assert list(model.peft_config) == names[:1]


class Gated(nn.Module):
    """A router named as those of mixtures of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inside = nn.Linear(6, 8), nn.ModuleDict({"gate": nn.Linear(8, 4)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inside["gate"](torch.relu(self.stem(x)))


def test_a_saved_module_may_be_called_as_the_end_of_a_part_of_the_adapter(tmp_path):
    options = {"target_modules": ["stem"], "propagation": "none", "modules_to_save": ["gate"]}
    model = get_peft_model(Gated(), SanConfig(**options), adapter_name="my_gate")
    assert model.peft_config["my_gate"].modules_to_save == ["inside.gate"]
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {
        "base_model.model.stem.san_scale.my_gate.weight",
        "base_model.model.inside.gate.modules_to_save.my_gate.weight",
        "base_model.model.inside.gate.modules_to_save.my_gate.bias",
    }
    net = DENSE.net()
    with pytest.raises(AdapterError, match=r"'head'.*modules_to_save=\['head'\]"):
        get_peft_model(net, config(), adapter_name="head")
    assert not any(isinstance(m, SanLayer) for m in net.modules())


def test_a_layer_of_another_adapter_cannot_be_saved_as_a_whole():
    model = get_peft_model(DENSE.net(), config("stem"))
    before = sorted(model.state_dict())
    with pytest.raises(AdapterError, match=r"modules_to_save.*'stem'"):
        model.add_adapter("two", config("fc1", modules_to_save=["stem"]))
    assert sorted(model.state_dict()) == before


def test_two_adapters_with_other_edges_and_heads(tmp_path):
    x = DENSE.input()
    model = get_peft_model(DENSE.net(), config("stem", "fc1"), adapter_name="one").eval()
    model.add_adapter("two", config("fc2", modules_to_save=["head"]))
    outputs = {}
    for name in ("one", "two"):
        disturb(model, name, seed=len(name))
        with torch.no_grad():
            model.base_model.model.head.modules_to_save[name].weight.add_(0.1 * len(outputs) + 0.1)
        model.set_adapter(name)
        outputs[name] = model(x)
    assert (outputs["one"] - outputs["two"]).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(DENSE.net(), tmp_path / "two", adapter_name="two").eval()
    again.load_adapter(tmp_path / "one", "one")
    for name, expected in outputs.items():
        again.set_adapter(name)
        assert torch.equal(again(x), expected)
        torch.testing.assert_close(again(x, adapter_names=[name] * len(x)), expected)
    again.delete_adapter("two")
    assert again.active_adapter == "one"
    assert torch.equal(again(x), outputs["one"])


@pytest.mark.parametrize("deleted", ["one", "two"])
@pytest.mark.parametrize("active", ["one", "two"])
def test_deleting_leaves_one_active_in_every_layer(deleted, active):
    """Not every layer has a part of both, and PEFT asks the first one."""
    x = DENSE.input()
    model = get_peft_model(DENSE.net(), config("stem"), adapter_name="one").eval()
    model.add_adapter("two", config("fc2"))
    disturb(model, "one")
    disturb(model, "two")
    (left,) = {"one", "two"} - {deleted}
    model.set_adapter(left)
    expected = model(x)
    model.set_adapter(active)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter(deleted)
    assert model.active_adapter == left
    assert model.base_model.active_adapters == [left]
    assert torch.equal(model(x), expected)
    assert not any(f".{deleted}." in name for name in model.state_dict())
    model.add_adapter(deleted, config("fc1"))
    model.set_adapter(deleted)
    assert model(x).isfinite().all()
    with pytest.raises(ValueError, match="Adapter nobody does not exist"):
        model.delete_adapter("nobody")


def test_setting_adapters_that_are_not_there():
    model = get_peft_model(DENSE.net(), config())
    for names in ("nobody", ["default", "nobody"]):
        with pytest.raises(AdapterError, match=r"Adapter nobody not found\. There are default"):
            model.base_model.set_adapter(names)
    assert model.base_model.active_adapters == ["default"]


def test_a_batch_has_a_name_for_every_sample():
    model = get_peft_model(DENSE.net(), config()).eval()
    for count in (2, 3, 8):
        text = f"Length of `adapter_names` should be the same as the number of inputs, but got {count} and 4"
        with pytest.raises(ValueError, match=text):
            model(DENSE.input(), adapter_names=["default"] * count)
    torch.testing.assert_close(model(DENSE.input(), adapter_names=["default"] * 4), model(DENSE.input()))


@pytest.mark.parametrize("inner", [None, LoraConfig(r=2)])
def test_a_model_that_is_compiled_already_is_refused(inner):
    net = DENSE.net()
    with pytest.raises(SanError, match=r"the model.*compiled"):
        get_peft_model(torch.compile(net), config(inner=inner))
    net.fc1 = torch.compile(net.fc1)
    with pytest.raises(SanError, match=r"fc1.*compiled"):
        get_peft_model(net, config(inner=inner))


class Listed(nn.Module):
    """Holds its layers as modules and calls them from a list, as Mask2Former's prediction heads do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 2)
        self.steps = {"all": [("first", self.fc1), (torch.relu, self.fc2)]}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (_, first), (act, last) = self.steps["all"]
        return last(act(first(x)))


@pytest.mark.parametrize("inner", [None, LoraConfig(r=2, init_lora_weights=False)])
def test_layers_that_a_list_holds(inner):
    net, x = Listed(), torch.randn(3, 4)
    before = net(x)
    model = get_peft_model(net, SanConfig(target_modules=["fc1", "fc2"], inner=inner, init_weights=False)).eval()
    expected = model(x)
    assert not torch.allclose(expected, before)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    plain = model.unload()
    assert plain.steps == {"all": [("first", plain.fc1), (torch.relu, plain.fc2)]}
    assert torch.equal(plain(x), before)


class Based(nn.Module):
    """Has a child called `base_layer`, as timm's DLA has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base_layer, self.fc = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.base_layer(x))


def test_a_model_with_a_child_called_base_layer():
    x, net = torch.randn(3, 4), Based()
    model = get_peft_model(net, SanConfig(target_modules=["fc"], init_weights=False)).eval()
    expected = model(x)
    plain = model.merge_and_unload()
    assert plain is net
    assert type(plain.fc) is nn.Linear
    torch.testing.assert_close(plain(x), expected)
    assert "unload_and_optionally_merge_module" not in vars(net)
