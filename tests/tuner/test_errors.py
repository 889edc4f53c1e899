"""Wrong input: an error that names the thing, the numbers and the way out, and a model left as it was."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tests.contract.nets import disturb
from tests.golden.models import MODELS
from torch import nn

from san_peft import AdapterError, Edge, GraphError, PropagationGraph, SanConfig, SanError, SanLayer, TargetError
from san_peft.propagation.graph import ChannelMap


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return MODELS["vit"]().eval()


@pytest.fixture
def saved(model, tmp_path):
    adapted = get_peft_model(copy.deepcopy(model), SanConfig())
    disturb(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture(autouse=True)
def _unchanged(model):
    """After every test here the base model is what it was: names, values, and no adapter left."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    yield
    assert not any(isinstance(m, SanLayer) for m in model.modules())
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def edge(anterior="vit.layers.0.mlp.fc1", posterior="vit.layers.0.mlp.fc2", size=32) -> PropagationGraph:
    return PropagationGraph([Edge(anterior, posterior, ChannelMap.identity(size))])


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"target_modules": ["fc1", "fc3"]}, TargetError, r"'fc3'.*Did you mean fc[12]"),
        ({"target_modules": ["dropout"]}, TargetError, r"'dropout'|is a Dropout"),
        ({"target_modules": ["layernorm_before"]}, TargetError, r"layernorm_before is a LayerNorm, which SAN cannot"),
        ({"target_modules": ["mlp", "fc1"]}, TargetError, r"vit\.layers\.0\.mlp is a ViTMLP"),
        ({"target_modules": r".*nothing"}, ValueError, r"not found in the base model|No modules were targeted"),
        (
            {"target_modules": ["fc1"], "propagation": edge("vit.fc")},
            GraphError,
            r"no layer vit\.fc that SAN can adapt",
        ),
        (
            {"target_modules": ["fc1"], "propagation": edge(posterior="vit.layers.0.attention.o_proj")},
            GraphError,
            r"from 32 to 32 channels.*fc1 has 32 .*o_proj has 16",
        ),
        (
            {"target_modules": ["fc1"], "propagation": edge(anterior="vit.layers.0.attention.o_proj")},
            GraphError,
            r"o_proj has 16 .*fc2 has 32",
        ),
    ],
)
def test_what_does_not_fit_the_model(model, options, error, text):
    with pytest.raises(error, match=text):
        get_peft_model(model, SanConfig(**options))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"propagation": "exakt"}, r"Unknown propagation scheme 'exakt'\. Did you mean 'exact'"),
        ({"propagation": 3}, r"got int"),
        ({"propagation": '{"edges": 1}'}, r"edges.*wrong type"),
        ({"exponent": "two"}, r"exponent must be a number, got 'two'"),
        ({"exponent": float("nan")}, r"exponent must be finite"),
        ({"init_weights": None}, r"init_weights.*got None"),
        ({"init_weights": "gaussian"}, r"got 'gaussian'"),
        ({"init_weights": 1}, r"got 1"),
        ({"layers_pattern": "layers"}, r"layers_to_transform"),
        ({"format": 99}, r"format 99.* 2\. Upgrade"),
        ({"format": None}, r"format must be of type int, got None"),
        ({"exponent_pattern": [1]}, r"exponent_pattern.*got \[1\]"),
        ({"bound": "x"}, r"bound must be of type float \| None, got 'x'"),
        ({"gate": "no"}, r"gate must be of type bool, got 'no'"),
        ({"detach": 1}, r"detach must be of type bool, got 1"),
        ({"target_modules": 3}, r"target_modules must be of type .*, got 3"),
        ({"modules_to_save": [1]}, r"modules_to_save must be of type .*, got \[1\]"),
        ({"task_type": "x"}, r"task type: 'x'"),
        ({"edges": [{"anterior": "a"}]}, r"'posterior' is missing"),
        ({"edges": "many"}, r"edges.*got str"),
    ],
)
def test_what_does_not_fit_the_configuration(options, text):
    with pytest.raises(SanError, match=text):
        SanConfig(**options)


def test_two_targets_of_one_error_class():
    assert issubclass(TargetError, SanError)
    assert issubclass(SanError, ValueError), "so that code that expects PEFT's errors catches ours"


def test_adapter_of_another_base_model(model, saved):
    other = MODELS["llama"]()
    with pytest.raises(GraphError, match=r"the model has no layer vit\..*edges=None"):
        PeftModel.from_pretrained(other, saved)
    assert not any(isinstance(m, SanLayer) for m in other.modules())


def test_adapter_of_a_wider_model(saved):
    import transformers as tf

    wide = tf.ViTForImageClassification(
        tf.ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=16,
            patch_size=8,
        )
    )
    with pytest.raises(GraphError, match=r"16 to 16 channels.* has 32 .* has 32"):
        PeftModel.from_pretrained(wide, saved)
    assert not any(isinstance(m, SanLayer) for m in wide.modules())


def test_truncated_file(model, saved):
    file = saved / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors is damaged"):
        PeftModel.from_pretrained(model, saved)


def rewrite(saved, change) -> None:
    file = saved / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


KEY = "base_model.model.vit.layers.0.mlp.fc1.san_scale.weight"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t[KEY].__setitem__(3, float("nan")), r"1 of 32 entries of .*fc1\.san_scale\.weight are not finite"),
        (lambda t: t.pop(KEY), r"lacks 1 of its \d+ tensors, such as .*vit\.layers\.0\.mlp\.fc1\.san_scale\.weight"),
        (lambda t: t.__setitem__(KEY, torch.zeros(31)), r"fc1\.san_scale\.weight has shape \(31,\).*\(32,\)"),
    ],
)
def test_tampered_tensors(model, saved, change, text):
    rewrite(saved, change)
    with pytest.raises(AdapterError, match=text):
        PeftModel.from_pretrained(model, saved)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda c: c["edges"][0].pop("posterior"), r"posterior"),
        (lambda c: c["edges"][0]["channels"].update(kind="magic"), r"unknown kind of channel map 'magic'"),
        (lambda c: c["edges"][0].update(anterior="vit.nowhere"), r"vit\.nowhere"),
        (lambda c: c.update(format=7), r"format 7"),
    ],
)
def test_tampered_configuration(model, saved, change, text):
    file = saved / "adapter_config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))
    with pytest.raises(SanError, match=text):
        PeftModel.from_pretrained(model, saved)


def test_a_failed_second_adapter_leaves_the_first(model, saved):
    adapted = get_peft_model(copy.deepcopy(model), SanConfig()).eval()
    disturb(adapted)
    x = torch.randn(1, 3, 16, 16)
    before = adapted(x).logits
    with pytest.raises(TargetError):
        adapted.add_adapter("second", SanConfig(target_modules=["fc3"]))
    file = saved / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(AdapterError):
        adapted.load_adapter(saved, "third")
    assert torch.equal(adapted(x).logits, before)
    assert list(adapted.peft_config) == ["default"]


def test_an_adapter_of_an_older_format_loads(model, saved):
    """The first adapters had no format, no edges and no gate: edges follow from the scheme, by tracing."""
    config = json.loads((saved / "adapter_config.json").read_text())
    missing = ("format", "edges", "placement", "gate", "detach", "exponent")
    old = {k: v for k, v in config.items() if k not in missing}
    (saved / "adapter_config.json").write_text(json.dumps(old))
    again = PeftModel.from_pretrained(copy.deepcopy(model), saved).eval()
    shutil.copytree(saved, saved.parent / "new")
    (saved.parent / "new" / "adapter_config.json").write_text(json.dumps(config))
    new = PeftModel.from_pretrained(copy.deepcopy(model), saved.parent / "new").eval()
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(again(x).logits, new(x).logits)


def test_an_adapter_of_the_first_format_means_what_it_meant(model, saved):
    """It says nothing of norms, nor of what is overwritten: every scale acts at the input of its posterior layer."""
    config = json.loads((saved / "adapter_config.json").read_text())
    first = {k: v for k, v in config.items() if k != "placement"} | {"format": 1}
    first["edges"] = [{k: v for k, v in edge.items() if k != "closed"} for edge in config["edges"]]
    new = PeftModel.from_pretrained(copy.deepcopy(model), saved).eval()
    (saved / "adapter_config.json").write_text(json.dumps(first))
    old = PeftModel.from_pretrained(copy.deepcopy(model), saved).eval()
    assert set(old.base_model.scales.placements["default"].values()) == {"input"}
    x = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(old(x).logits, new(x).logits)


def test_weighted_adapter_mistakes(model):
    adapted = get_peft_model(copy.deepcopy(model), SanConfig())
    adapted.add_adapter("other", SanConfig(propagation="exact"))
    tuner = adapted.base_model
    for arguments, text in (
        ((["default", "nobody"], [1, 1], "new"), r"Adapter nobody does not exist; there are default, other"),
        ((["default"], [1, 2], "new"), r"got 1 and 2"),
        ((["default"], [1], "other"), r"Adapter with name 'other' already exists"),
        ((["default", "other"], [1, 1], "new"), r"differ in edges"),
        ((["default"], [1], "new", "svd"), r"Invalid combination_type: svd"),
    ):
        with pytest.raises(AdapterError, match=text):
            tuner.add_weighted_adapter(*arguments)
    assert list(adapted.peft_config) == ["default", "other"]


def test_tied_weights_are_not_merged():
    import transformers as tf

    torch.manual_seed(0)
    config = tf.LlamaConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=50,
        tie_word_embeddings=True,
    )
    adapted = get_peft_model(tf.LlamaForCausalLM(config), SanConfig(target_modules=["v_proj", "lm_head"]))
    with pytest.raises(SanError, match=r"lm_head cannot be merged: its weight is tied"):
        adapted.merge_and_unload()
