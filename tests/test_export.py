"""Merging with proof, and swapping adapters in place."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from tests.contract.nets import disturb
from tests.golden.models import MODELS
from torch import nn

from san_peft import AdapterError, MergeError, SanConfig, SanLayer, hotswap, merge_and_verify


def image() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def adapted(seed: int = 0, **options):
    torch.manual_seed(0)
    model = get_peft_model(MODELS["vit"]().eval(), SanConfig(**options)).eval()
    disturb(model, seed=seed)
    return model


def test_the_report_names_what_changed():
    model = adapted()
    before = model(image()).logits
    report = merge_and_verify(model, {"pixel_values": image()})
    assert 0 < report.max_abs_difference < 1e-5
    assert report.where.startswith("output.logits[")
    assert (report.layers, report.made_biases) == (13, ())
    torch.testing.assert_close(report.model(image()).logits, before, rtol=1e-4, atol=1e-5)


def test_the_probe_is_derived():
    assert merge_and_verify(adapted()).layers == 13


def test_merged_model_saves_and_loads_without_san(tmp_path):
    import transformers as tf

    model = adapted(train_norms=True, modules_to_save=["classifier"])
    before = model(image()).logits
    merge_and_verify(model).model.save_pretrained(tmp_path)
    plain = tf.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(plain(image()).logits, before, rtol=1e-4, atol=1e-5)


def test_a_shift_without_a_bias_makes_one_and_says_so():
    net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(8, 2))
    model = get_peft_model(net, SanConfig(target_modules=["0"], shift=True, propagation="none")).eval()
    disturb(model)
    report = merge_and_verify(model, torch.randn(3, 4))
    assert report.made_biases == ("0",)
    assert report.model[0].bias is not None


def assert_untouched(model, before, weights):
    assert torch.equal(model(image()).logits, before)
    for name, layer in model.named_modules():
        if isinstance(layer, SanLayer):
            assert not layer.merged
            assert torch.equal(layer.get_base_layer().weight, weights[name]), name


@pytest.mark.parametrize("training", [False, True])
def test_past_the_tolerance_the_model_is_as_it_was(training):
    model = adapted()
    before = model(image()).logits
    weights = {n: m.get_base_layer().weight.clone() for n, m in model.named_modules() if isinstance(m, SanLayer)}
    model.train(training)
    with pytest.raises(
        MergeError, match=r"changes output\.logits\[.*\] by .*, more than the tolerance of 0.*as it was"
    ):
        merge_and_verify(model, tolerance=0.0)
    assert model.training is training
    assert_untouched(model.eval(), before, weights)


def test_nan_and_broken_probe_leave_the_model_as_it_was():
    model = adapted()
    before = model(image()).logits
    weights = {n: m.get_base_layer().weight.clone() for n, m in model.named_modules() if isinstance(m, SanLayer)}
    with pytest.raises(Exception, match="size"):
        merge_and_verify(model, {"pixel_values": torch.randn(2, 3, 8, 8)})
    assert_untouched(model, before, weights)
    layer = next(m for m in model.modules() if isinstance(m, SanLayer))
    kept = layer.san_scale["default"].weight.data.clone()
    layer.san_scale["default"].weight.data[0] = float("inf")
    with pytest.raises(MergeError, match="NaN"):
        merge_and_verify(model)
    layer.san_scale["default"].weight.data = kept
    assert_untouched(model, before, weights)


def test_nothing_to_merge():
    model = adapted()
    model.merge_adapter()
    with pytest.raises(MergeError, match="merged already"):
        merge_and_verify(model)
    model.unmerge_adapter()
    with model.base_model.set_mode("neuron"), pytest.raises(MergeError, match=r"Mode 'neuron' is for analysis"):
        merge_and_verify(model)


# ------------------------------------------------------------------ hotswap


def test_hotswap_copies_the_vectors_in_place(tmp_path):
    first, second = adapted(), adapted(seed=1)
    second.save_pretrained(tmp_path)
    parameters = dict(first.named_parameters())
    hotswap(first, str(tmp_path))
    assert torch.equal(first(image()).logits, second(image()).logits)
    assert all(parameters[name] is parameter for name, parameter in first.named_parameters())


def test_hotswap_does_not_recompile(tmp_path):
    first, second = adapted(), adapted(seed=1)
    second.save_pretrained(tmp_path)
    graphs = []

    def count(module, inputs):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(first, backend=count)
    with torch.no_grad():
        compiled(image())
        compiled_once = len(graphs)
        hotswap(first, str(tmp_path))
        torch.testing.assert_close(compiled(image()).logits, second(image()).logits)
    assert len(graphs) == compiled_once


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"propagation": "exact"}, "differs from 'default' in edges"),
        ({"shift": True}, "in shift"),
        ({"exponent": 2.0}, "in exponent"),
        ({"train_norms": True}, r"in \d+ tensors, such as"),
    ],
)
def test_hotswap_refuses_what_does_not_fit(tmp_path, options, text):
    first = adapted()
    before = copy.deepcopy(first.state_dict())
    adapted(**options).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=text):
        hotswap(first, str(tmp_path))
    assert all(torch.equal(value, before[name]) for name, value in first.state_dict().items())


def test_hotswap_refuses_a_merged_model(tmp_path):
    first = adapted()
    first.save_pretrained(tmp_path)
    first.merge_adapter()
    with pytest.raises(AdapterError, match="merged"):
        hotswap(first, str(tmp_path))
